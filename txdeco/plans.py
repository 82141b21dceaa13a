"""One plan for each decorated function: what all its stacked decorators say together, in whatever order.

Contradictions are found here, when the function is decorated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from txdeco.arguments import Shape
from txdeco.errors import MisuseError
from txdeco.locking.plan import LockPlan
from txdeco.propagation import Propagation
from txdeco.settings import ScopeSpec
from txdeco.signatures import find_session

if TYPE_CHECKING:
    from collections.abc import Iterable

    from txdeco.declarations import Part, RowWait
    from txdeco.locking.templates import Path
    from txdeco.retries import Retry
    from txdeco.sessions import Source
    from txdeco.signatures import Parameters

_WITHOUT_TRANSACTION = (Propagation.SUPPORTS, Propagation.NOT_SUPPORTED, Propagation.NEVER)
_OPENS_ANOTHER = (Propagation.REQUIRES_NEW, *_WITHOUT_TRANSACTION)


@dataclass(frozen=True, slots=True)
class Plan:
    """What happens around each call of one function.

    Attributes:
        function: its qualified name.
        shape: how its arguments are read and completed.
        source: the source that is declared for it.
        join: whether it may use a session that is there already.
        waits: the changes that are waited for first.
        scope: the transaction around the body; None where the session is only provided.
        retry: how conflicts are retried, where this call owns the transaction.
        locks: the locks that are held before the body runs; None for none.
        is_generator: whether the scope spans an iteration.
    """

    function: str
    shape: Shape
    source: Source | None
    join: bool
    waits: tuple[RowWait, ...]
    scope: ScopeSpec | None
    retry: Retry | None
    locks: LockPlan | None
    is_generator: bool


def plan_of(parameters: Parameters, parts: tuple[Part, ...]) -> Plan:
    """Merge what the decorators of one function say.

    Raises:
        MisuseError: they contradict each other, or the function.
    """
    function = parameters.function
    source: Source | None = _only([part.source for part in parts], function, "two different sources")
    transactions = [part for part in parts if part.scope is not None]
    _one({(part.scope, part.retry) for part in transactions}, function, "two @transactional with different options")
    joins = {part.join for part in parts if part.join is not None}
    _one(joins, function, "@injects_session with join=True and with join=False")
    locks = _locks(parts)
    scope, retry = (transactions[0].scope, transactions[0].retry) if transactions else (None, None)
    plan = Plan(
        function=function,
        shape=_shape(parameters, parts, injects=bool(joins)),
        source=source,
        join=joins != {False},
        waits=tuple(sorted((wait for part in parts for wait in part.waits), key=lambda wait: wait.rank)),
        scope=_scope(scope, locks, function),
        retry=retry,
        locks=locks or None,
        is_generator=parameters.is_generator,
    )
    _refuse_contradictions(plan)
    _refuse_unreachable_session(plan, parameters)
    return plan


def _one(said: set[Any], function: str, what: str) -> None:
    if len(said) > 1:
        raise MisuseError(function, f"it is decorated with {what}", "Say it once")


def _only(values: Iterable[Any], function: str, what: str) -> Any:
    said = [value for value in values if value is not None]
    if any(value is not said[0] and value != said[0] for value in said):
        raise MisuseError(function, f"it is decorated with {what}", "Say it once")
    return said[0] if said else None


def _locks(parts: Iterable[Part]) -> LockPlan:
    declared = [lock for part in parts for lock in part.locks.locks()]
    return LockPlan.of(*sorted(declared, key=repr))  # any order of stacking is the same plan


def _scope(declared: ScopeSpec | None, locks: LockPlan, function: str) -> ScopeSpec | None:
    scope = ScopeSpec.build(where=function, for_locks=True) if declared is None and locks else declared
    if scope is None or not (locks.tables or locks.advisory):
        return scope
    return replace(scope, fresh=True)  # a snapshot that is older than the lock would not show what its last holder did


def _shape(parameters: Parameters, parts: tuple[Part, ...], *, injects: bool) -> Shape:
    function = parameters.function
    path = _only([part.session for part in parts], function, "two different sessions")
    rows = [lock.into for part in parts for lock in part.locks.rows] + [w.into for part in parts for w in part.waits]
    intos = tuple(into for into in rows if into is not None)
    for into in intos:
        if not isinstance(into, str):
            raise MisuseError(function, f"into={into!r} is no name of a parameter", 'Write into="rows"')
        parameters.require(into, said_by="into=")
        if into in parameters.pinned or intos.count(into) > 1:
            raise MisuseError(function, f"into={into!r} is filled in twice", "Give each its own parameter")
    session = _session(parameters, path, intos, injects=injects)
    return Shape(parameters, session, path if path is not None and path.steps else None, injects, tuple(sorted(intos)))


def _session(parameters: Parameters, path: Path | None, intos: tuple[str, ...], *, injects: bool) -> str | None:
    function = parameters.function
    if path is not None and path.steps:
        if injects:
            why = f"@injects_session cannot fill {path.text} in: every call of that object would share the session"
            raise MisuseError(function, why, "Add a parameter for it: `*, session: AsyncSession = INJECTED`")
        return None
    session = path.root if path is not None else find_session(parameters)
    if session is None and injects:
        why = "@injects_session has no parameter to fill in"
        fix = "Add `session: AsyncSession`, or use @transactional with current_session()"
        raise MisuseError(function, why, fix)
    if session in intos:
        raise MisuseError(function, f"{session!r} is both the session and into=", "Give the rows their own parameter")
    return session


def _refuse_contradictions(plan: Plan) -> None:
    for what, fix in _contradictions(plan):
        raise MisuseError(plan.function, what, fix)


def _contradictions(plan: Plan) -> Iterable[tuple[str, str]]:
    scope, locks = plan.scope, plan.locks or LockPlan()
    if scope is None:
        return
    propagation = scope.propagation
    if plan.retry is not None and plan.is_generator:
        yield "retry cannot repeat an async generator: what it yielded is out", "Collect the rows in an `async def`"
    if plan.retry is not None and propagation in (*_WITHOUT_TRANSACTION, Propagation.MANDATORY):
        yield f"retry with propagation={str(propagation)!r}: it never owns a transaction", "Declare retry on the owner"
    if not plan.join and propagation is Propagation.MANDATORY:
        yield "join=False opens a session that propagation='mandatory' never finds in a transaction", "Leave out one"
    if locks and propagation in _WITHOUT_TRANSACTION:
        yield f"locks need a transaction, and propagation={str(propagation)!r} has none", "Use 'nested' or 'required'"
    if locks.rows and scope.read_only:
        yield "PostgreSQL locks no rows in a read_only transaction", "Leave out read_only"
    if locks.advisory and scope.isolation == "REPEATABLE READ":
        why = "the SELECT of @locks_advisory takes the snapshot of REPEATABLE READ before the lock is granted"
        yield why, "Use READ COMMITTED, SERIALIZABLE with retry, or `async with advisory_lock(source, key)` around it"


def _refuse_unreachable_session(plan: Plan, parameters: Parameters) -> None:
    """Refuse a session of its own that the body could not see, because it cannot be rebound."""
    scope, shape = plan.scope, plan.shape
    pinned = shape.session if shape.session in parameters.pinned else None
    fixed = shape.path.text if shape.path is not None else pinned
    if scope is not None and fixed is not None and scope.propagation in _OPENS_ANOTHER:
        raise MisuseError(
            plan.function,
            f"propagation={str(scope.propagation)!r} opens a session of its own, and the body would go on with {fixed}",
            "Pass the session as a parameter of its own, or leave session= out and use source= and current_session()",
        )

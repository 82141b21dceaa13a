"""A declared scope: what is found on entry, what is opened. Leaving has a module of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm.session import SessionTransactionOrigin

from txdeco import ambient, driver, guards, telemetry
from txdeco.commits import roll_back
from txdeco.deadlines import Deadline
from txdeco.errors import ConnectionUnavailableError, PropagationError, TransactionTimeoutError, UnsupportedError
from txdeco.leaving import leave, undo_savepoint
from txdeco.ledger import ledger_of, run_script
from txdeco.loaded import Loaded
from txdeco.propagation import Action, IsolationLevel, Standing, action_for
from txdeco.sessions import entered_already, open_session, source_for, unwrapped
from txdeco.settings import characteristics, check_joining, timeout_commands
from txdeco.stages import unwind
from txdeco.standing import check_task, in_autocommit, restart, standing_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import CoroutineType, TracebackType

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import SessionTransaction

    from txdeco.ledger import Doom, Ledger
    from txdeco.retries import Turn
    from txdeco.sessions import Source
    from txdeco.settings import ScopeSpec
    from txdeco.stages import Stage

__all__ = ["Scope", "open_scope"]

NOBODY = object()
"""The task of a scope that nobody has entered; in a loop without tasks None stands for who has."""

PATIENCE_OF_NEW = 5.0
"""Seconds that `requires_new` waits for a connection, or for a lock, where no deadline is set."""


class Scope:
    """One open scope. `session` is the one to use in it."""

    __slots__ = (
        "action",
        "broken",
        "deadline",
        "doomed",
        "entry",
        "fresh",
        "function",
        "hooks_before",
        "inside",
        "isolation",
        "joined",
        "late",
        "ledger",
        "loaded",
        "lock_timeout",
        "nested",
        "opened",
        "own_deadline",
        "owner",
        "read_only",
        "restore",
        "rollback_only",
        "root",
        "session",
        "settings",
        "span",
        "spec",
        "stage",
        "task",
        "turn",
        "undeclared",
    )

    session: AsyncSession
    ledger: Ledger

    def __init__(self, spec: ScopeSpec, function: str, turn: Turn | None) -> None:
        self.spec = spec
        self.function = function
        self.turn = turn
        self.task: object = NOBODY
        self.action = Action.BEGIN
        self.owner = False  # it commits the transaction
        self.inside = False  # another scope is open around it in its task
        self.joined: Scope | None = None  # the scope whose transaction it shares without a savepoint of its own
        self.undeclared = False  # the transaction that it works in was declared by nobody
        self.opened: open_session | None = None  # its session is its own, and closed at the end
        self.entry: ambient.Entry | None = None
        self.root: SessionTransaction | None = None
        self.nested: SessionTransaction | None = None
        self.isolation: IsolationLevel | None = spec.isolation
        self.read_only = spec.read_only
        self.lock_timeout = spec.lock_timeout
        self.deadline: Deadline | None = None
        self.own_deadline = False
        self.fresh = False  # nothing but BEGIN has been sent in this transaction
        self.settings: list[str] = []  # commands that ride along with the next script
        self.restore: list[str] = []  # commands that put the caller's settings back
        self.loaded: Loaded | None = None
        self.hooks_before = 0
        self.rollback_only = False
        self.late = False  # its deadline has passed
        self.doomed: Doom | None = None
        self.span: telemetry.Span | None = None
        self.stage: Stage | None = None  # of the async generator that it is around, on a session that is not its own
        self.broken: str | None = None  # why nothing of it can be committed any more

    @property
    def bearer(self) -> Any:
        """Who bears the fate of this scope: itself, the scope it joined, or the ledger of an undeclared transaction."""
        if self.action is not Action.JOIN:
            return self
        return self.ledger if self.joined is None else self.joined.bearer

    @property
    def own_hooks(self) -> int:
        """Where its hooks begin among those of its session; with a transaction the hooks in it are adopted, too."""
        return 0 if self.action is Action.ADOPT else self.hooks_before

    async def run(self, script: str = "") -> None:
        """Send *script* in one round trip, the scope's own pending settings in front of it. See `run_script`."""
        commands = [command for command in (*self.settings, script) if command]
        self.settings = []
        self.fresh = False
        if commands:
            await run_script(self.session, ";".join(commands))

    def attach(self, session: AsyncSession, ledger: Ledger) -> None:
        """Enter the stack of *session*: before the first await, so that a second task meets it."""
        self.session = session
        self.ledger = ledger
        scopes = ledger.scopes
        if scopes:
            check_task(ledger, self.function)
        if self.action is not Action.AUTOCOMMIT and (not scopes or scopes[-1].action is Action.AUTOCOMMIT):
            guards.put_up(session.sync_session)
        scopes.append(self)

    def detach(self) -> None:
        """Leave the stack; where no transaction is open any more, the session has its own methods back."""
        scopes = self.ledger.scopes
        if scopes and scopes[-1] is self:
            scopes.pop()
        elif self in scopes:
            scopes.remove(self)
        if not scopes or scopes[-1].action is Action.AUTOCOMMIT:
            guards.take_down(self.session.sync_session)


class open_scope:
    """Enter a scope on *session*, or on a new session from *source*; yield the session to use in it.

    Args:
        session: the session to open it on; None opens a session from *source* for this scope alone.
        spec: what is declared.
        function: who declares it, for errors and logs.
        preamble: runs as the last step of entering, such as taking locks; if it raises, the scope rolls back.
        source: where a session of its own comes from; by default that of *session*, or the configured one.
        turn: the attempt that this scope is, where the call may be retried.
    """

    __slots__ = ("_preamble", "_session", "_source", "scope")

    def __init__(
        self,
        session: AsyncSession | None,
        spec: ScopeSpec,
        *,
        function: str,
        preamble: Callable[[Scope], Awaitable[object]] | None = None,
        source: Source | None = None,
        turn: Turn | None = None,
    ) -> None:
        self._session = None if session is None else unwrapped(session, function)
        self._source = source
        self._preamble = preamble
        self.scope = Scope(spec, function, turn)

    async def __aenter__(self) -> AsyncSession:
        scope = self.scope
        if scope.task is not NOBODY:
            raise entered_already(scope.function)
        scope.task = ambient.task_here()
        scope.inside = ambient.in_scope()
        if self._session is not None:
            ledger = ledger_of(self._session)
            if ledger.suspended:
                await unwind(ledger, dropped=True)
            scope.attach(self._session, ledger)
        try:
            scope.span = telemetry.start("txdeco.scope", function=scope.function, propagation=scope.spec.propagation)
            await self._open()
            if scope.deadline is not None or scope.lock_timeout is not None or (scope.inside and scope.opened):
                await _announce(scope)
        except BaseException as error:
            late = scope.own_deadline and scope.deadline is not None and await scope.deadline.stop(error)
            await _abandon(scope, error)
            if late and isinstance(error, asyncio.CancelledError):
                raise TransactionTimeoutError(scope.function, scope.spec.timeout or 0.0) from error
            raise
        try:
            if self._preamble is not None:
                with telemetry.span("txdeco.lock", function=scope.function):
                    await self._preamble(scope)
            if scope.settings:
                await scope.run()
        except BaseException as error:
            await leave(scope, error)  # as if the body had raised it: with its name, and with another attempt
            raise
        source = self._source if scope.ledger.source is None else scope.ledger.source
        scope.entry = ambient.push(scope.session, source, scope)
        return scope.session

    def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> CoroutineType[Any, Any, None]:
        return leave(self.scope, error)  # type: ignore[return-value]  # mypy knows it only as Coroutine

    async def _open(self) -> None:
        scope, found = self.scope, self._session
        around = None
        standing = Standing.IDLE
        if found is not None:
            around = scope.ledger.scopes[-2] if len(scope.ledger.scopes) > 1 else None
            standing = await _standing(found, scope.ledger, around)
        scope.action = action_for(scope.spec.propagation, standing, function=scope.function)
        _set_deadline(scope, around)
        if scope.own_deadline and scope.deadline is not None:
            await scope.deadline.start()
        if found is None and scope.action is Action.BEGIN:
            scope.action = Action.NEW
        action = scope.action
        scope.owner = action is Action.NEW or action is Action.BEGIN or action is Action.ADOPT
        if action is Action.NEW or action is Action.AUTOCOMMIT:
            if found is not None:
                scope.detach()
            source = self._source if self._source is not None else source_for(None, found, function=scope.function)
            await _open_own_session(scope, source, beside=found is not None)
        elif scope.owner:
            await _own(scope)
        else:
            await _share(scope, standing, around)
        if scope.turn is not None:
            scope.turn.owner, scope.turn.inside = scope.owner, scope.inside
            if not scope.owner:
                scope.turn.around = "a transaction that nobody declared" if around is None else around.function


async def _standing(session: AsyncSession, ledger: Ledger, around: Scope | None) -> Standing:
    if around is None:
        return await standing_of(session, ledger)
    if around.action is not Action.AUTOCOMMIT:
        return Standing.DECLARED
    if session.in_transaction():
        await restart(session)  # in AUTOCOMMIT every statement has been committed already
    return Standing.IDLE


def _set_deadline(scope: Scope, around: Scope | None) -> None:
    """Nested scopes can only shrink the deadline, those on another session of this task as well."""
    outer = None if around is None else around.deadline
    if around is None and scope.inside:
        entries = (e.scope for e in ambient.entries() if e.task is scope.task and e.scope is not None)
        outer = next((each.deadline for each in entries if each.deadline is not None), None)
    scope.deadline = outer
    if scope.spec.timeout is not None:
        own = Deadline.within(scope.spec.timeout) if scope.turn is None else scope.turn.deadline(scope.spec.timeout)
        if outer is None or own.at < outer.at:
            scope.deadline, scope.own_deadline = own, True


async def _own(scope: Scope) -> None:
    """Begin, or take over a transaction that has only read: the scope will commit it."""
    sync = scope.session.sync_session
    scope.loaded = Loaded(sync) if sync.identity_map else None
    scope.hooks_before = len(scope.ledger.hooks)
    if scope.action is Action.ADOPT:
        retries = scope.turn is not None and scope.turn.retries
        if not (scope.spec.needs_restart or retries):
            scope.root = sync.get_transaction()
            return
        await restart(scope.session)
        if scope.loaded is not None:
            scope.loaded.restore(sync, clean=False)
    if options := _begin(scope):
        await _take_connection(scope, **options)


def _begin(scope: Scope) -> dict[str, Any]:
    """Begin, without a word to the server; return what the connection has to be taken with at once, if it has to."""
    sync = scope.session.sync_session
    scope.root = sync.get_transaction() or sync.begin()  # a source such as `maker.begin` has begun already
    scope.fresh = True
    bind = driver.bind_of(sync)
    autocommit = bind is not None and driver.is_autocommit(bind)
    if not (autocommit or scope.spec.isolation or scope.spec.read_only):
        return {}
    options = characteristics(scope.spec, bind, where=scope.function, autocommit=autocommit)
    if autocommit and scope.isolation is None:
        scope.isolation = IsolationLevel.READ_COMMITTED
    return {} if scope.ledger.rehearsal else {"execution_options": options}


async def _take_connection(scope: Scope, **options: Any) -> None:
    """Check a connection out now. A scope that may itself be what the pool waits for does not wait long."""
    loop = asyncio.get_running_loop()
    started, until = loop.time(), None
    if scope.inside and scope.opened is not None:
        until = started + PATIENCE_OF_NEW if scope.deadline is None else scope.deadline.at
    taken = scope.session.run_sync(lambda sync: sync.connection(**options))
    try:
        if until is None:
            await taken
        else:
            async with asyncio.timeout_at(until):
                await taken
    except (TimeoutError, PoolTimeoutError) as error:
        why = "The scope around it in this task holds a connection while it waits for another" if scope.inside else ""
        unreachable = driver.is_unreachable(error, driver.bind_of(scope.session.sync_session))
        raise ConnectionUnavailableError(scope.function, loop.time() - started, why, unreachable) from error


async def _open_own_session(scope: Scope, source: Source, *, beside: bool) -> None:
    """Open the scope's own session. *beside*: another one of this task may hold what this one will wait for."""
    scope.inside = scope.inside or beside
    opened = scope.opened = open_session(source)
    session = await opened.__aenter__()
    scope.attach(session, opened.ledger)
    if scope.action is Action.AUTOCOMMIT:
        _put_in_autocommit(scope)
        if scope.inside:
            await _take_connection(scope)
        return
    options = _begin(scope)
    if scope.inside or options:
        await _take_connection(scope, **options)


def _put_in_autocommit(scope: Scope) -> None:
    sync, spec = scope.session.sync_session, scope.spec
    if spec.isolation or spec.read_only or spec.verify_commit or spec.lock_timeout:
        raise PropagationError(
            scope.function,
            f"propagation={spec.propagation.value!r} found no transaction, and it declares something about one",
            "Leave those options out, or use propagation='required'",
        )
    bind = driver.bind_of(sync)
    if bind is None:
        raise UnsupportedError(scope.function, "a session with several binds cannot be put in AUTOCOMMIT")
    if not scope.ledger.rehearsal:
        sync.bind = bind.execution_options(isolation_level="AUTOCOMMIT")


async def _share(scope: Scope, standing: Standing, around: Scope | None) -> None:
    """Set a savepoint in the transaction that is open, or join it."""
    if around is not None or not scope.ledger.rehearsal:  # what a test has left open stands for no transaction
        check_joining(scope.spec, around, function=scope.function)
    if around is None and in_autocommit(scope.session.sync_session, scope.ledger):
        why = "session.begin() on an AUTOCOMMIT engine opens no transaction that it could be part of"
        raise UnsupportedError(scope.function, why, "Declare a scope in the place of session.begin()")
    root = scope.session.sync_session.get_transaction()
    scope.undeclared = root is not None and root.origin is SessionTransactionOrigin.AUTOBEGIN
    if around is not None:
        scope.undeclared = around.undeclared
        scope.isolation = around.isolation
        scope.read_only = around.read_only or scope.read_only
    if scope.action is Action.JOIN:
        scope.joined = around
        return
    sync = scope.session.sync_session
    if not driver.is_clean(sync):
        await scope.session.flush()
    scope.nested = sync.begin_nested()
    if scope.spec.read_only and not (around is not None and around.read_only):
        characteristics(scope.spec, driver.bind_of(sync), where=scope.function, autocommit=False)  # or refuses it
        scope.settings.append("SET LOCAL transaction_read_only = on")


async def _announce(scope: Scope) -> None:
    """Queue what the server is told about deadlines: they ride along with the first script."""
    if scope.action is not Action.AUTOCOMMIT and driver.is_postgresql(scope.session.sync_session):
        dialect = driver.dialect_of(scope.session.sync_session)
        if getattr(dialect, "server_version_info", None) is None:
            await _take_connection(scope)  # the engine's first one: it asks the server for its version
        if scope.inside and scope.opened is not None and scope.lock_timeout is None:
            # a scope around it may hold that lock; and before the deadline itself ends the statement, for that would
            # not say that a lock was waited for
            scope.lock_timeout = PATIENCE_OF_NEW if scope.deadline is None else max(0.001, scope.deadline.left * 0.8)
        before, scope.restore = timeout_commands(scope, server_version=getattr(dialect, "server_version_info", None))
        scope.settings.extend(before)


async def _abandon(scope: Scope, error: BaseException) -> None:
    """Undo an entry that failed halfway; the error that it failed with is on its way."""
    try:
        if not hasattr(scope, "session"):
            return
        if scope.nested is not None:
            await undo_savepoint(scope)
        elif scope.root is not None:
            await roll_back(scope.session)
        if scope.loaded is not None:
            scope.loaded.restore(scope.session.sync_session, clean=True)
    finally:
        if hasattr(scope, "session"):
            scope.detach()
        if scope.span is not None:
            scope.span.end(error)
        if scope.opened is not None:
            await scope.opened.__aexit__(type(error), error, error.__traceback__)

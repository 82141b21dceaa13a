"""What a scope declares about its transaction, and how the server is told: on BEGIN, or in one script at entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from txdeco.durations import Duration, milliseconds, seconds
from txdeco.errors import MisuseError, PropagationError, UnsupportedError
from txdeco.propagation import IsolationLevel, Propagation, parse

if TYPE_CHECKING:
    from txdeco.scopes import Scope

__all__ = ["ScopeSpec", "characteristics", "check_flags", "check_joining", "timeout_commands"]


@dataclass(frozen=True, slots=True)
class ScopeSpec:
    """What a scope declares. `build` validates; the fields are in their final form."""

    propagation: Propagation = Propagation.NESTED
    isolation: IsolationLevel | None = None
    read_only: bool = False
    deferrable: bool = False
    timeout: float | None = None
    lock_timeout: float | None = None
    no_rollback_for: tuple[type[BaseException], ...] = ()
    verify_commit: bool = False
    fresh: bool = False
    """Locks come first: the transaction must not have a snapshot yet, so an adopted one is restarted."""
    for_locks: bool = False
    """Opened for locks alone: whether it may write is for the scope around it to say, and for the server."""

    @classmethod
    def build(
        cls,
        *,
        where: str,
        propagation: Propagation | str = Propagation.NESTED,
        isolation: IsolationLevel | str | None = None,
        read_only: bool = False,
        deferrable: bool = False,
        timeout: Duration | None = None,
        lock_timeout: Duration | None = None,
        no_rollback_for: type[BaseException] | tuple[type[BaseException], ...] = (),
        verify_commit: bool = False,
        fresh: bool = False,
        for_locks: bool = False,
    ) -> ScopeSpec:
        """Return the spec of what was declared at *where*.

        Raises:
            MisuseError: an option does not exist, is of a wrong type, or contradicts another one.
        """
        check_flags(where, read_only=read_only, deferrable=deferrable, verify_commit=verify_commit)
        spec = cls(
            propagation=parse(Propagation, propagation, where=where, name="propagation"),
            isolation=None if isolation is None else parse(IsolationLevel, isolation, where=where, name="isolation"),
            read_only=read_only,
            deferrable=deferrable,
            timeout=seconds(timeout, where=where, name="timeout"),
            lock_timeout=seconds(lock_timeout, where=where, name="lock_timeout"),
            no_rollback_for=_exceptions(no_rollback_for, where),
            verify_commit=verify_commit,
            fresh=fresh,
            for_locks=for_locks,
        )
        spec._check(where)
        return spec

    def _check(self, where: str) -> None:
        if self.deferrable and not (self.read_only and self.isolation is IsolationLevel.SERIALIZABLE):
            raise MisuseError(
                where,
                "deferrable=True means something only with isolation='SERIALIZABLE' and read_only=True",
                "Declare all three, or leave deferrable out",
            )
        transactional = (
            self.isolation or self.read_only or self.verify_commit or self.no_rollback_for or self.lock_timeout
        )
        if self.propagation in {Propagation.NOT_SUPPORTED, Propagation.NEVER} and transactional:
            raise MisuseError(
                where,
                f"propagation={self.propagation.value!r} runs without a transaction: nothing can be declared about one",
                "Leave the other options out, or choose propagation='required'",
            )

    @property
    def needs_restart(self) -> bool:
        """Whether a transaction that has begun already cannot serve, even if it has only read."""
        return self.fresh or self.isolation is not None or self.read_only


def check_flags(where: str, **flags: object) -> None:
    """Refuse options that are neither True nor False: a text such as ``"no"`` would be true.

    Raises:
        MisuseError: one of *flags* is something else.
    """
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise MisuseError(where, f"{name}={flag!r} is neither True nor False")


def _exceptions(value: Any, where: str) -> tuple[type[BaseException], ...]:
    kinds: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
    for kind in kinds:
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise MisuseError(
                where,
                f"no_rollback_for={value!r} is not an exception class or a tuple of them",
                "Name subclasses of Exception; a cancelled call always rolls back",
            )
    return kinds


def characteristics(spec: ScopeSpec, bind: Any, *, where: str, autocommit: bool) -> dict[str, Any]:
    """Return the execution options that make BEGIN say what *spec* declares; none where it declares nothing.

    *bind* is the session's one engine or connection, None where it has several.

    Raises:
        UnsupportedError: the session uses several databases, or the database has no such thing.
    """
    options: dict[str, Any] = {}
    if spec.isolation is not None:
        options["isolation_level"] = spec.isolation.value
    elif autocommit:
        options["isolation_level"] = IsolationLevel.READ_COMMITTED.value
    if spec.read_only:
        options["postgresql_readonly"] = True
    if spec.deferrable:
        options["postgresql_deferrable"] = True
    if options and bind is None:
        raise UnsupportedError(where, "a session with several binds has no one transaction to declare this about")
    if (spec.read_only or spec.deferrable) and bind.dialect.name != "postgresql":
        raise UnsupportedError(where, "only PostgreSQL has read_only and deferrable transactions")
    return options


def check_joining(spec: ScopeSpec, scope: Scope | None, *, function: str) -> None:
    """Refuse what cannot be had inside the transaction that is open: another isolation level, writing where it reads.

    Raises:
        PropagationError: the declaration would have to be ignored.
    """
    isolation = None if scope is None else scope.isolation
    if spec.isolation is not None and spec.isolation is not isolation:
        found = isolation.value if isolation is not None else "another isolation level, or one that nobody declared"
        raise PropagationError(
            function,
            f"it declares isolation={spec.isolation.value!r}, and the transaction that is open has {found}",
            "Declare it on the outermost scope, or use propagation='requires_new'",
        )
    if scope is not None and scope.read_only and not (spec.read_only or spec.for_locks):
        reader = scope.ledger.reader or scope
        raise PropagationError(
            function,
            f"it may write, and {reader.function} declared its transaction read-only",
            "Declare read_only=True on it as well, or use propagation='requires_new'",
        )


def timeout_commands(scope: Scope, *, server_version: tuple[int, ...] | None) -> tuple[list[str], list[str]]:
    """Return the commands that tell the server about a scope's deadlines, and those that take them back."""
    before: list[str] = []
    after: list[str] = []
    if scope.deadline is not None and (scope.own_deadline or scope.opened is not None):
        left = milliseconds(max(0.001, scope.deadline.left))
        before.append(_set("statement_timeout", left, scope, after))
        if scope.owner and server_version is not None and server_version >= (17,):
            before.append(f"SET LOCAL transaction_timeout = {left + 1000}")
    if scope.lock_timeout is not None:
        before.append(_set("lock_timeout", milliseconds(scope.lock_timeout), scope, after))
    return before, after


def _set(name: str, value: int, scope: Scope, after: list[str]) -> str:
    """Return the command that sets *name*; in a savepoint note how it is put back, for RELEASE keeps a SET LOCAL."""
    if scope.owner:
        return f"SET LOCAL {name} = {value}"
    saved = f"txdeco.{name}_{len(scope.ledger.scopes)}"
    after.append(f"SELECT set_config('{name}', current_setting('{saved}'), true)")
    return f"SELECT set_config('{saved}', current_setting('{name}'), true);SELECT set_config('{name}', '{value}', true)"

"""Inside a declared scope the transaction is the scope's to end: `session.commit()` there is refused at that line."""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from txdeco import ambient
from txdeco.errors import MisuseError, SessionOwnershipError
from txdeco.ledger import ledger_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_WAYS_OUT = {
    "commit": "Leave the scope to commit, or open one of its own with propagation='requires_new'",
    "rollback": "Raise an exception, or call set_rollback_only() to roll back and return normally",
}


class _Guard:
    __slots__ = ("_fix", "_method")

    def __init__(self, method: str, fix: str) -> None:
        self._method = method
        self._fix = fix

    def __call__(self, *_: Any, **__: Any) -> None:
        scopes = (entry.scope.function for entry in ambient.entries() if entry.scope is not None)
        inside = next(scopes, "a declared scope")
        raise MisuseError(f"session.{self._method}()", f"it was called inside {inside}", self._fix)


class _Closer:
    """Refuses to close the session under who is inside; whoever else closes it breaks up the scopes that are open."""

    __slots__ = ("_method",)

    def __init__(self, method: str) -> None:
        self._method = method

    def __call__(self, session: Session, *_: Any, **__: Any) -> None:
        scopes = ledger_of(session).scopes
        if any(entry.scope in scopes for entry in ambient.entries()):
            _Guard(self._method, "Leave the scope first")()
        for scope in scopes:
            scope.broken = "its session was closed by another task while it was still open; its work is rolled back"
        seal(session)
        type(session).invalidate(session)  # a task may be in the middle of a statement


_GUARDS = {method: _Guard(method, fix) for method, fix in _WAYS_OUT.items()}
_CLOSERS = tuple((method, _Closer(method)) for method in ("close", "reset", "invalidate"))
_REPLACED = (*_GUARDS, *(method for method, _ in _CLOSERS))


class _Outlived:
    """Stands where a session begins by itself: whoever is in a scope that was broken up must not write any more."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, *args: Any, **options: Any) -> Any:
        session, here = self._session, ambient.task_here()
        for entry in ambient.entries():
            scope = entry.scope
            if entry.task is here and scope is not None and scope.broken and entry.session.sync_session is session:
                raise SessionOwnershipError(scope.function, scope.broken)
        return type(session)._autobegin_t(session, *args, **options)  # pyright: ignore[reportPrivateUsage]


def seal(session: Session) -> None:
    """Keep the tasks whose scopes were broken up from beginning anew on *session*, until they have left."""
    take_down(session)
    session.__dict__["_autobegin_t"] = _Outlived(session)


def put_up(session: Session) -> None:
    """Refuse, on this session, whatever would end the transaction under the scopes that are open on it."""
    own = session.__dict__
    own.update(_GUARDS)
    for method, closer in _CLOSERS:
        own[method] = MethodType(closer, session)


def take_down(session: Session) -> None:
    """Give the session its methods back."""
    own = session.__dict__
    if own.get("commit") is _GUARDS["commit"]:  # and not a user's own, where none were put up
        for method in _REPLACED:
            own.pop(method, None)
    if type(own.get("_autobegin_t")) is _Outlived:
        del own["_autobegin_t"]

"""What is open around the running code: a chain of entries in one context variable.

The chain is immutable, so a child task inherits a picture of it that nobody changes; each entry knows the task that
pushed it, so that an inherited entry is never taken for an own one.
"""

from __future__ import annotations

from asyncio import current_task, get_running_loop
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from txdeco.errors import SessionNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.ext.asyncio import AsyncSession

    from txdeco.scopes import Scope


class Entry:
    """One session that is open around the running code, provided (`scope` is None) or in a declared scope."""

    __slots__ = ("open", "parent", "scope", "session", "source", "task")

    def __init__(
        self, session: AsyncSession, source: Any, scope: Scope | None, parent: Entry | None, task: object
    ) -> None:
        self.session = session
        self.source = source
        self.scope = scope
        self.parent = parent
        self.task = task
        self.open = True


_chain: ContextVar[Entry | None] = ContextVar("txdeco", default=None)


def task_here() -> object:
    """Return the running task; outside of asyncio (a plain thread) None."""
    try:
        return current_task(get_running_loop())
    except RuntimeError:
        return None


def push(session: AsyncSession, source: Any, scope: Scope | None) -> Entry:
    """Make *session* ambient in this task until the entry is popped."""
    parent = _chain.get()
    while parent is not None and not parent.open:  # what was ended elsewhere is let go of
        parent = parent.parent
    entry = Entry(session, source, scope, parent, task_here() if scope is None else scope.task)
    _chain.set(entry)
    return entry


def pop(entry: Entry) -> None:
    """End *entry*. From another context (a fixture, a generator closed by the collector) only its owner sees it end."""
    entry.open = False
    if _chain.get() is entry:
        _chain.set(entry.parent)


def innermost() -> Entry | None:
    """Return the innermost entry of the chain that has not ended, whosever it is."""
    entry = _chain.get()
    while entry is not None and not entry.open:
        entry = entry.parent
    return entry


def entries() -> Iterator[Entry]:
    """Yield the open entries of the chain, the innermost first, inherited ones included."""
    entry = _chain.get()
    while entry is not None:
        if entry.open:
            yield entry
        entry = entry.parent


def in_scope() -> bool:
    """Tell whether a declared scope is open around the running code in this very task."""
    if _chain.get() is None:
        return False
    here = task_here()
    return any(entry.scope is not None and entry.task is here for entry in entries())


def own_entry() -> Entry | None:
    """Return the innermost open entry if this very task pushed it."""
    entry = innermost()
    return entry if entry is not None and entry.task is task_here() else None


def chain() -> Entry | None:
    """Return the chain as it stands, for `swap`."""
    return _chain.get()


def swap(entry: Entry | None) -> Entry | None:
    """Replace the chain and return what it was: how a generator's body has its own between two yields."""
    before = _chain.get()
    _chain.set(entry)
    return before


def current_session() -> AsyncSession:
    """Return the session of the scope or the provided session that is open in this task.

    A child task does not inherit it: a session belongs to one task at a time.

    Raises:
        SessionNotFoundError: nothing is open in this task.

    Example:
        ```python
        @transactional
        async def rename(user_id: int, name: str) -> None:
            user = await current_session().get_one(User, user_id)
            user.name = name
        ```
    """
    entry = own_entry()
    if entry is None:
        raise SessionNotFoundError("current_session()")
    return entry.session

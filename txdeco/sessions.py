"""Where a call's session comes from; the only place that opens and closes one."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker

from txdeco import ambient, driver
from txdeco.commits import conclude
from txdeco.errors import MisuseError, SessionNotFoundError, SessionOwnershipError
from txdeco.hooks import keep
from txdeco.ledger import ledger_of
from txdeco.uninterrupted import run_to_end

if TYPE_CHECKING:
    from types import TracebackType

    from txdeco.ambient import Entry
    from txdeco.ledger import Ledger

__all__ = ["Source", "configure", "create_db_context", "default_source", "locate", "open_session", "provide"]

Source: TypeAlias = "async_sessionmaker[Any] | Callable[[], AbstractAsyncContextManager[AsyncSession]]"

_default: Source | None = None


def configure(source: Source | None) -> None:
    """Set the source that sessions come from where neither a decorator nor a session in use names one.

    One per process; a later call replaces it, and None forgets it. Nothing is opened.

    Args:
        source: an `async_sessionmaker`, or a callable that returns an async context manager of an `AsyncSession`.

    Raises:
        MisuseError: it is neither.

    Example:
        ```python
        txdeco.configure(async_sessionmaker(engine))
        ```
    """
    global _default
    if source is not None:
        check_source(source, "configure()")
    _default = source


def default_source() -> Source | None:
    """Return the configured source, if there is one."""
    return _default


def check_source(source: object, where: str) -> None:
    """Refuse what cannot be a source of sessions.

    Raises:
        MisuseError: *source* is a session, an engine, or not callable.
    """
    if isinstance(source, (AsyncEngine, AsyncSession, async_scoped_session)) or not callable(source):
        raise MisuseError(
            where,
            f"{source!r} is not a source of sessions",
            "Give async_sessionmaker(engine), or a callable that returns an async context manager of an AsyncSession",
        )


def unwrapped(session: object, function: str) -> AsyncSession:
    """Return the `AsyncSession` that was meant: that of this task where it is an `async_scoped_session`.

    Raises:
        MisuseError: it is something else.
        SessionOwnershipError: it was closed for good.
    """
    if isinstance(session, async_scoped_session):
        session = session()
    if not isinstance(session, AsyncSession):
        raise MisuseError(
            function,
            f"{type(session).__name__} is not an AsyncSession",
            "Pass an AsyncSession of sqlalchemy.ext.asyncio; a source of sessions goes into `source=`",
        )
    closed = ledger_of(session).closed
    if closed is not None:
        raise SessionOwnershipError(function, closed)
    return session


def locate(
    explicit: object,
    source: Source | None,
    *,
    function: str,
    join: bool = True,
) -> AsyncSession | None:
    """Return the session that a call joins: the explicit one, else the ambient one; None where it needs its own.

    Raises:
        MisuseError: *explicit* is no session.
        SessionOwnershipError: this is a child task, and a declared transaction of its parent is still open.
    """
    if explicit is not None:
        return unwrapped(explicit, function)
    if not join:
        return None
    if ambient.chain() is None:
        return _rehearsed(source) if rehearsals else None
    here = ambient.task_here()
    for entry in ambient.entries():
        if source is not None and entry.source is not source:
            continue
        if entry.task is here:
            return entry.session
        if entry.scope is not None:
            raise SessionOwnershipError(
                function, f"{entry.scope.function} opened a transaction in another task, which this task does not share"
            )
    return _rehearsed(source)


def source_for(
    source: Source | None, session: AsyncSession | None, *, function: str, looked_at: tuple[str, ...] = ()
) -> Source:
    """Return where a new session comes from: the named source, that of the session in use, or the configured one.

    Raises:
        SessionNotFoundError: there is none.
    """
    if source is not None:
        return source
    if session is not None:
        known = ledger_of(session).source
        if known is not None:
            return known  # type: ignore[no-any-return]
    for entry in ambient.entries():
        if entry.source is not None:
            return entry.source  # type: ignore[no-any-return]
    if _default is None:
        raise SessionNotFoundError(function, looked_at)
    return _default


class open_session:
    """Open a session from *source*, and close it for good at the end; it is neither committed nor made ambient.

    The sessions of an `async_sessionmaker` can never be used again afterwards: SQLAlchemy would quietly reopen them and
    leak a connection. Other sources close their own.
    """

    __slots__ = ("_close", "_source", "ledger", "session")

    ledger: Ledger

    def __init__(self, source: Source) -> None:
        self._source = source
        self.session: AsyncSession | None = None
        self._close: Any = None

    async def __aenter__(self) -> AsyncSession:
        source = self._source
        rehearsal = _rehearsal_of(source)
        if rehearsal is not None:
            session = rehearsal.new_session()
        elif isinstance(source, async_sessionmaker):
            session = source(close_resets_only=False)
        else:
            context = source()
            if not hasattr(context, "__aenter__"):
                raise MisuseError(
                    f"the source {source!r}",
                    f"it returned {type(context).__name__}, not an async context manager",
                    "Decorate it with contextlib.asynccontextmanager, or pass an async_sessionmaker",
                )
            session = unwrapped(await context.__aenter__(), f"the source {source!r}")
            self._close = context.__aexit__
        self.session = session
        self.ledger = ledger = ledger_of(session)
        ledger.source = source
        ledger.keeper = keep
        return session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(error, committed=error is None)

    async def close(self, error: BaseException | None, *, committed: bool) -> None:
        """Close the session of a call that raises *error*; once is enough.

        A cancellation meanwhile says whether its work has committed, or gives way to one that says so itself.
        """
        session, self.session = self.session, None
        if session is None:
            return
        if self._close is None:
            await close_for_good(session, self.ledger, "its call has ended, and the session is closed for good")
            return
        try:
            await run_to_end(self._close(type(error) if error else None, error, error and error.__traceback__))
        except CancelledError as cancelled:
            if isinstance(error, CancelledError):
                return
            if committed:
                cancelled.add_note("txdeco: cancelled while its session was closed; the transaction committed")
            raise


async def close_for_good(session: AsyncSession, ledger: Ledger, why: str) -> None:
    """Close *session*, and have every later use of it refused with *why* and the way out."""
    sync = session.sync_session
    try:
        if sync.in_transaction():
            await run_to_end(session.close())
        elif driver.holds_instances(sync):
            sync.close()  # lets go of the instances; nothing is sent, so nothing can wait
    finally:
        ledger.closed = why
        sync._autobegin_t = _Refusal(why)  # type: ignore[method-assign]


class _Refusal:
    """Stands where a closed session would begin again. Without it SQLAlchemy refuses, but does not say the way out."""

    __slots__ = ("why",)

    def __init__(self, why: str) -> None:
        self.why = why

    def __call__(self, *_: object, **__: object) -> Any:
        raise SessionOwnershipError(
            "session",
            self.why,
            "Open a session of its own for this work: `async with create_db_context(source)() as session`, in FastAPI "
            "also for streaming bodies and background tasks; a dependency that needs the session in its teardown is "
            'declared with scope="function"',
        )


def entered_already(function: str) -> MisuseError:
    """Return the error for a block that is entered again: it would begin with what the first left behind."""
    return MisuseError(function, "its block was entered already", "Make a new one for each block")


class provide:
    """Open a session from *source* that is ambient in this task; commit what is left on success, always close.

    Any exception rolls back. The user of the session may commit and roll back in between.

    Raises:
        MisuseError: it is entered for a second time.
        UnexpectedRollbackError: a database error was swallowed inside, so that nothing could be committed.
        CommitOutcomeUnknownError: the answer to COMMIT was lost.
    """

    __slots__ = ("_entered", "_entry", "_function", "_opened", "_source")

    def __init__(self, source: Source, *, function: str) -> None:
        self._source = source
        self._function = function
        self._opened = open_session(source)
        self._entered = False
        self._entry: Entry | None = None

    async def __aenter__(self) -> AsyncSession:
        if self._entered:
            raise entered_already(self._function)
        self._entered = True
        session = await self._opened.__aenter__()
        self._opened.ledger.managed = True
        self._entry = ambient.push(session, self._source, None)
        return session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        session, entry = self._opened.session, self._entry
        if session is None or entry is None:
            return
        ambient.pop(entry)
        raised, asked_for = error, self._opened.ledger.rollback_only
        try:
            await conclude(session, error, function=self._function, close=self._opened.close)
        except BaseException as failed:
            raised = failed
            raise
        finally:
            await self._opened.close(raised, committed=raised is None and not asked_for)


def create_db_context(source: Source) -> Callable[[], AbstractAsyncContextManager[AsyncSession]]:
    """Return a factory of sessions for work outside of request handlers: jobs, commands, background tasks.

    ``async with db_context() as session`` opens a session, makes it ambient in this task, commits on success what is
    not committed yet, rolls back on any exception (cancellation included), and closes it for good. The session belongs
    to the block: it may commit and roll back. Commits by txdeco do not expire instances.

    Args:
        source: an `async_sessionmaker`, or a callable that returns an async context manager of an `AsyncSession`.

    Returns:
        A callable without parameters; each call is one session.

    Raises:
        MisuseError: *source* is none.
        UnexpectedRollbackError: from the block, where a database error was swallowed in it.

    Example:
        ```python
        db_context = create_db_context(async_sessionmaker(engine))

        async def seed() -> None:
            async with db_context() as session:
                session.add(User(name="admin"))
        ```
    """
    check_source(source, "create_db_context()")

    def db_context() -> AbstractAsyncContextManager[AsyncSession]:
        return provide(source, function="create_db_context()")

    return db_context


class Rehearsal(Protocol):
    """What a rolled-back test session puts in the place of real ones; see `txdeco.testing.rolled_back_session`."""

    session: AsyncSession

    def covers(self, source: Source | None) -> bool:
        """Tell whether calls with *source* belong to the test."""
        ...

    def new_session(self) -> AsyncSession:
        """Return one more session on the test's connection."""
        ...


@asynccontextmanager
async def rehearse(session: AsyncSession, *, function: str) -> AsyncGenerator[AsyncSession, None]:
    """Do with the session of a test what `provide` does with a new one; what the test had left open is not lost."""
    nested = await session.begin_nested() if session.in_transaction() else None
    entry = ambient.push(session, ledger_of(session).source, None)
    try:
        yield session
    except BaseException as error:
        ambient.pop(entry)
        if nested is not None and nested.is_active:
            await run_to_end(nested.rollback())
        else:
            await conclude(session, error, function=function)
        raise
    ambient.pop(entry)
    await conclude(session, None, function=function)


rehearsals: list[Rehearsal] = []


def _rehearsal_of(source: Source | None) -> Rehearsal | None:
    if not rehearsals:
        return None
    return next((each for each in reversed(rehearsals) if each.covers(source)), None)


def _rehearsed(source: Source | None) -> AsyncSession | None:
    rehearsal = _rehearsal_of(source) if rehearsals else None
    return None if rehearsal is None else rehearsal.session

"""Sessions for tests whose every commit is undone in the end, and what goes with them: hooks, attempts that fail."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from txdeco import commits, hooks, sessions
from txdeco.errors import MisuseError
from txdeco.ledger import ledger_of
from txdeco.uninterrupted import run_to_end

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from txdeco.hooks import Hook
    from txdeco.sessions import Source

__all__ = ["captured_hooks", "failing_attempts", "rolled_back_session"]

_WHERE = "rolled_back_session()"


class _RolledBack:
    """The sessions of one test: all on one connection, whose transaction is never committed."""

    def __init__(self, source: Source | AsyncEngine, connection: AsyncConnection) -> None:
        self._source = source
        self._engine = connection.engine.sync_engine
        self._connection = connection
        self.session = self.new_session()
        ledger_of(self.session).managed = True

    def covers(self, source: Source | None) -> bool:
        """Calls without a source of their own, with this very source, or with one of the same engine."""
        return source is None or source is self._source or _engine_of(source) is self._engine

    def new_session(self) -> AsyncSession:
        """Return one more session on the connection; its commits release a savepoint."""
        options: dict[str, Any] = {"bind": self._connection, "join_transaction_mode": "create_savepoint"}
        if isinstance(self._source, async_sessionmaker):
            session: AsyncSession = self._source(**options, close_resets_only=False)
        else:
            session = AsyncSession(**options, close_resets_only=False)
        ledger = ledger_of(session)
        ledger.rehearsal = True
        ledger.source = self._source if callable(self._source) else sessions.default_source()
        ledger.keeper = hooks.keep
        return session


@asynccontextmanager
async def rolled_back_session(source: Source | AsyncEngine) -> AsyncGenerator[AsyncSession, None]:
    """Open a session for one test; whatever the test commits is rolled back in the end.

    As long as it is open, every call that would find or open a session of this source uses it, or another session on
    its connection: decorated functions, ``Depends(get_db)``, `create_db_context`, ``requires_new``, row waits. It need
    not be opened in the task that the test runs in: it may be a fixture of pytest-asyncio or of anyio. Commits become
    savepoints; isolation levels, ``read_only`` and AUTOCOMMIT cannot be had inside the one transaction, and are left
    out; ``requires_new`` rolls back together with what is around it. Hooks run when the outermost declared scope ends,
    as ever; `captured_hooks` collects them.

    All of it is one connection, which one task at a time can use: calls of one test that really run at once need an
    engine and real commits.

    Args:
        source: what the application uses: its `async_sessionmaker`, another source of sessions, or the `AsyncEngine`.

    Raises:
        MisuseError: no one engine can be told from *source*.

    Example:
        ```python
        @pytest.fixture
        async def session():
            async with rolled_back_session(maker) as session:
                yield session

        async def test_booking(session):
            booking = await book(show_id=1, name="Ada")     # the decorated service finds the session by itself
            assert await session.get(Booking, booking.id)
        ```
    """
    engine = source if isinstance(source, AsyncEngine) else await _async_engine_of(source)
    async with engine.connect() as connection:
        transaction = await connection.begin()
        rehearsal = _RolledBack(source, connection)
        sessions.rehearsals.append(rehearsal)
        try:
            yield rehearsal.session
        finally:
            sessions.rehearsals.remove(rehearsal)
            try:
                await sessions.close_for_good(rehearsal.session, ledger_of(rehearsal.session), "its test has ended")
            finally:
                await run_to_end(transaction.rollback())


def _engine_of(source: object) -> Any:
    bind = source.kw.get("bind") if isinstance(source, async_sessionmaker) else source
    return bind.sync_engine if isinstance(bind, AsyncEngine) else None


async def _async_engine_of(source: Source) -> AsyncEngine:
    sessions.check_source(source, _WHERE)
    bind: object
    if isinstance(source, async_sessionmaker):
        bind = source.kw.get("bind")
    else:
        async with source() as session:
            bind = session.bind
    if not isinstance(bind, AsyncEngine):
        raise MisuseError(
            _WHERE, f"the sessions of {source!r} are not bound to one engine", "Pass the AsyncEngine itself"
        )
    return bind


@contextmanager
def captured_hooks(*, run: bool = False) -> Generator[list[Hook], None, None]:
    """Collect the hooks that would run while the block is open, instead of running them.

    Yields the list, in the order in which they would have run; each has `fn`, `args` and `after_commit`. A hook that a
    rollback or a retry has dropped is never in it.

    Args:
        run: run them as well, each when it is due.

    Example:
        ```python
        with captured_hooks() as hooks:
            await place_order(order_id=1)
        assert [hook.fn for hook in hooks] == [send_receipt]
        ```
    """
    captured: list[Hook] = []
    capture = hooks.Capture(captured, run=run)
    hooks.captures.append(capture)
    try:
        yield captured
    finally:
        hooks.captures.remove(capture)


@contextmanager
def failing_attempts(times: int = 1, *, sqlstate: str = "40001") -> Generator[None, None, None]:
    """Make the next commits of declared transactions fail on the server, as a conflict with others would.

    The error is PostgreSQL's own, raised in the transaction just before its COMMIT, so that everything that hangs on it
    is what happens in production: rollback, retry, hooks.

    Args:
        times: how many commits fail.
        sqlstate: with which SQLSTATE; by default a serialization failure.

    Raises:
        MisuseError: *sqlstate* is none.

    Example:
        ```python
        with failing_attempts(2):
            await book(show_id=1, name="Ada")       # @transactional(retry=3): the third attempt commits
        ```
    """
    if not re.fullmatch(r"[0-9A-Z]{5}", sqlstate) or sqlstate == "00000":
        raise MisuseError(
            "failing_attempts()", f"{sqlstate!r} is not the SQLSTATE of an error", "Write sqlstate='40001'"
        )
    failures = [sqlstate] * times
    commits.rehearsed_failures.append(failures)
    try:
        yield
    finally:
        commits.rehearsed_failures.remove(failures)

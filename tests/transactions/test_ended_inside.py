"""Nobody ends a declared transaction but its scope: not by a method, not by a statement, not from another task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from support.clock import Clock
from support.models import User
from txdeco import (
    INJECTED,
    MisuseError,
    PropagationError,
    SessionOwnershipError,
    TransactionTimeoutError,
    UncommittedWorkWarning,
    configure,
    get_transaction,
    injects_session,
    transactional,
)

Maker: TypeAlias = async_sessionmaker[AsyncSession]
Names: TypeAlias = Callable[[], Awaitable[list[str]]]


async def by_connection(session: AsyncSession) -> None:
    """Commit below the session."""
    await (await session.connection()).commit()


async def by_transaction(session: AsyncSession) -> None:
    """Commit beside the session."""
    transaction = session.get_transaction()
    assert transaction is not None
    await transaction.commit()


def by_statement(statement: str) -> Callable[[AsyncSession], Awaitable[Any]]:
    """Commit, or roll back, behind everybody's back."""
    return lambda session: session.execute(text(statement))


ENDINGS = {
    "connection": by_connection,
    "transaction": by_transaction,
    **{each: by_statement(each) for each in ("COMMIT", "  rollback", "END", "ABORT", "BEGIN", "ROLLBACK AND CHAIN")},
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
async def test_ending_the_transaction_from_inside_is_refused(
    maker: Maker, names: Names, ending: Callable[[AsyncSession], Awaitable[Any]]
) -> None:
    """The misuse is told at that line, before anything is sent, and what the scope did is rolled back with it."""

    @transactional
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        session.add(User(name="half"))
        await session.flush()
        await ending(session)

    with pytest.raises(MisuseError):
        await call()
    assert await names() == []


async def test_savepoints_of_the_users_own_are_theirs(maker: Maker, names: Names) -> None:
    """SAVEPOINT, ROLLBACK TO and RELEASE as statements end nothing but themselves."""
    async with maker() as session, get_transaction(session):
        session.add(User(name="kept"))
        await session.flush()
        for statement in ("SAVEPOINT mine", "ROLLBACK TO SAVEPOINT mine", "ROLLBACK WORK TO mine", "RELEASE mine"):
            await session.execute(text(statement))
    assert await names() == ["kept"]


async def test_closing_from_outside_breaks_up_the_scope(maker: Maker, names: Names) -> None:
    """A parent that closes the session of a child still at work is not refused; the child commits nothing."""
    inside, go = asyncio.Event(), asyncio.Event()

    @transactional
    async def child(session: AsyncSession) -> None:
        session.add(User(name="half"))
        await session.flush()
        inside.set()
        await go.wait()

    async def parent() -> None:
        async with maker() as session:
            tasks.append(asyncio.create_task(child(session)))
            await asyncio.wait(tasks)

    tasks: list[asyncio.Task[None]] = []
    running = asyncio.create_task(parent())
    await inside.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    go.set()
    with pytest.raises(SessionOwnershipError):
        await tasks[0]
    assert await names() == []


async def test_closing_from_inside_is_refused(maker: Maker) -> None:
    """Whoever is in the scope leaves it first."""
    async with maker() as session, get_transaction(session):
        for close in (session.close, session.reset, session.invalidate):
            with pytest.raises(MisuseError, match="Leave the scope first"):
                await close()


@pytest.mark.parametrize("around", [False, True], ids=["owner", "savepoint"])
async def test_past_its_deadline_nothing_commits(maker: Maker, names: Names, clock: Clock, around: bool) -> None:
    """`no_rollback_for` does not mean the deadline: what is late is rolled back, and says so."""

    @transactional(timeout=60, no_rollback_for=Exception)
    async def late(session: AsyncSession) -> None:
        session.add(User(name="late"))
        await session.flush()
        clock.advance(61)
        await asyncio.Event().wait()

    async with maker() as session:
        if around:
            async with get_transaction(session):
                with pytest.raises(TransactionTimeoutError):
                    await late(session)
        else:
            with pytest.raises(TransactionTimeoutError):
                await late(session)
    assert await names() == []


@pytest.mark.parametrize("kind", [BaseException, asyncio.CancelledError, KeyboardInterrupt])
def test_a_cancelled_call_cannot_be_declared_to_commit(kind: type[BaseException]) -> None:
    """`no_rollback_for` takes subclasses of Exception only."""
    with pytest.raises(MisuseError, match="no_rollback_for"):
        transactional(no_rollback_for=kind)(by_connection)


async def test_a_query_without_autoflush_overwrites_no_change(maker: Maker, names: Names) -> None:
    """What was loaded before is read anew, but not over a change that was not flushed."""
    async with maker.begin() as session:
        session.add(User(id=1, name="old"))
    async with maker() as session:
        user = await session.get_one(User, 1)
        async with get_transaction(session, isolation="REPEATABLE READ"):
            user.name = "mine"
            await session.execute(select(User).execution_options(autoflush=False))
    assert await names() == ["mine"]


@pytest.mark.parametrize(
    "options", [{"read_only": True}, {"isolation": "SERIALIZABLE"}, {"verify_commit": True}, {"lock_timeout": 1}]
)
async def test_supports_ignores_nothing(maker: Maker, options: dict[str, Any]) -> None:
    """Without a transaction, what is declared about one is an error and not left out."""

    @transactional(propagation="supports", source=maker, **options)
    async def call() -> None:
        raise AssertionError("not reached")

    with pytest.raises(PropagationError):
        await call()


async def test_no_session_is_no_session(maker: Maker) -> None:
    """A forgotten session is not replaced by one that nobody passed."""
    configure(maker)
    try:
        with pytest.raises(MisuseError, match="None is not an AsyncSession"):
            get_transaction(None)  # type: ignore[arg-type]
    finally:
        configure(None)


async def test_a_source_may_begin_by_itself(maker: Maker, names: Names) -> None:
    """`maker.begin` yields sessions that have begun: they are taken as they are."""

    @transactional(source=maker.begin, isolation="SERIALIZABLE")
    @injects_session
    async def call(*, session: AsyncSession = INJECTED) -> None:
        session.add(User(name=str(await session.scalar(text("SHOW transaction_isolation")))))

    await call()
    assert await names() == ["serializable"]


async def test_a_source_hears_how_its_call_ended(maker: Maker) -> None:
    """What a source does after its yield, it does knowing whether the call failed."""
    heard: list[str] = []

    @asynccontextmanager
    async def source() -> Any:
        try:
            async with maker() as session:
                yield session
        except ValueError as error:
            heard.append(str(error))
            raise
        heard.append("well")

    @transactional
    @injects_session(source)
    async def call(fails: bool, *, session: AsyncSession = INJECTED) -> None:
        await session.execute(text("SELECT 1"))
        if fails:
            raise ValueError("badly")

    await call(False)
    with pytest.raises(ValueError, match="badly"):
        await call(True)
    assert heard == ["well", "badly"]


async def test_a_nowait_of_the_users_own_passes_unchanged(maker: Maker) -> None:
    """Only a lock that was waited for in vain is LockTimeoutError; a refusal at once is PostgreSQL's own error."""
    async with maker.begin() as session:
        session.add(User(id=1, name="held"))
    async with maker() as holder:
        await holder.execute(select(User).with_for_update())
        async with maker() as session:
            with pytest.raises(DBAPIError, match="could not obtain lock"):
                async with get_transaction(session, lock_timeout=5):
                    await session.execute(select(User).with_for_update(nowait=True))


async def test_work_in_a_savepoint_that_nobody_commits_is_warned_of(maker: Maker) -> None:
    """`begin_nested` is no transaction: what is released into it is lost as surely when the session closes."""

    @transactional
    async def call(session: AsyncSession) -> None:
        session.add(User(name="lost"))

    session = maker()
    await session.execute(text("SELECT 1"))
    async with session.begin_nested():
        await call(session)
    with pytest.warns(UncommittedWorkWarning, match="call"):
        await session.close()


async def test_a_session_with_methods_of_its_own_keeps_them(maker: Maker) -> None:
    """What a user put in the place of a method, for instrumentation say, is not taken for what a scope put there."""
    seen: list[AsyncSession] = []

    def counted() -> None:
        """Stand for a user's own commit."""

    @transactional(propagation="not_supported", source=maker)
    @injects_session
    async def call(*, session: AsyncSession = INJECTED) -> None:
        session.sync_session.commit = counted  # type: ignore[method-assign]
        seen.append(session)

    await call()
    assert seen[0].sync_session.commit is counted

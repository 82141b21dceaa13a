"""The deadline of a scope: the server ends a statement, the client everything else, and the connection stays usable."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TypeAlias

import anyio
import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from support.clock import Clock
from support.commits import held_commits
from support.database import BEFORE_THE_GUARDS
from support.models import Account, User
from support.waiting import pid_of, until
from support.wire import Wire
from txdeco import (
    CommitOutcomeUnknownError,
    LockTimeoutError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    create_db_context,
    current_session,
    deadlines,
    get_transaction,
    transactional,
)
from txdeco.ledger import ledger_of
from txdeco.testing import FaultProxy

Maker: TypeAlias = async_sessionmaker[AsyncSession]
Names: TypeAlias = Callable[[], Awaitable[list[str]]]

SLEEP = text("SELECT pg_sleep(60)")
SHOW = text("SHOW statement_timeout")


@asynccontextmanager
async def promptly() -> AsyncIterator[None]:
    """Fail if the block takes so long that the server's guards may have ended it."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < BEFORE_THE_GUARDS


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the server time to end its statement first, however busy the machine is."""
    monkeypatch.setattr(deadlines, "GRACE", 3)


@pytest.mark.usefixtures("busy")
async def test_statement_that_takes_too_long_is_ended_by_the_server(maker: Maker, names: Names) -> None:
    """The scope ends in `TransactionTimeoutError`, nothing is stored, and the same connection goes on."""
    async with maker() as session:
        async with get_transaction(session):
            before = await pid_of(session)
        with pytest.raises(TransactionTimeoutError, match=r"get_transaction\(\).*0\.3 s") as caught:
            async with promptly(), get_transaction(session, timeout=0.3):
                session.add(User(name="lost"))
                await session.execute(SLEEP)
        assert caught.value.timeout == 0.3
        assert caught.value.__cause__ is not None
        async with get_transaction(session):
            assert await pid_of(session) == before
            assert await session.scalar(SHOW) == "20s"
    assert await names() == []


async def test_body_that_waits_for_something_else_is_ended_by_the_client(
    maker: Maker, names: Names, clock: Clock
) -> None:
    """The client's own timer ends what the server knows nothing of; the connection goes on as well."""
    async with maker() as session:
        async with get_transaction(session):
            before = await pid_of(session)
        with pytest.raises(TransactionTimeoutError):
            async with get_transaction(session, timeout=60):
                session.add(User(name="lost"))
                await session.flush()
                clock.advance(61)
                await asyncio.Event().wait()
        async with get_transaction(session):
            assert await pid_of(session) == before
    assert await names() == []
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_body_that_never_touched_the_database_has_its_deadline_too(maker: Maker, clock: Clock) -> None:
    """A deadline is about the call."""
    async with maker() as session:
        with pytest.raises(TransactionTimeoutError):
            async with get_transaction(session, timeout=60):
                clock.advance(61)
                await asyncio.Event().wait()


async def test_body_that_computes_too_long_does_not_commit(maker: Maker, names: Names, clock: Clock) -> None:
    """A block that never gives way is late all the same: what is not committed at the deadline is rolled back."""
    async with maker() as session:
        with pytest.raises(TransactionTimeoutError):
            async with get_transaction(session, timeout=60):
                session.add(User(name="lost"))
                await session.flush()
                clock.advance(61)
    assert await names() == []


async def test_body_that_swallows_the_cancellation_does_not_commit(maker: Maker, names: Names, clock: Clock) -> None:
    """Nor does one that eats the cancellation by which it is ended."""
    async with maker() as session:
        with pytest.raises(TransactionTimeoutError):
            async with get_transaction(session, timeout=60):
                session.add(User(name="lost"))
                await session.flush()
                clock.advance(61)
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
    assert await names() == []


async def test_exception_of_the_body_after_the_deadline_is_itself(maker: Maker, clock: Clock) -> None:
    """A body that fails late failed: its own exception comes out."""
    async with maker() as session:
        with pytest.raises(ZeroDivisionError):
            async with get_transaction(session, timeout=60):
                clock.advance(61)
                raise ZeroDivisionError


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("timeout", [0.2, timedelta(milliseconds=200), "200ms", "0.2 s"])
async def test_deadline_has_several_spellings(maker: Maker, timeout: object) -> None:
    """Seconds, a `timedelta`, and PostgreSQL's own spelling."""
    async with maker() as session:
        with pytest.raises(TransactionTimeoutError):
            async with promptly(), get_transaction(session, timeout=timeout):  # type: ignore[arg-type]
                await session.execute(SLEEP)


@pytest.mark.usefixtures("busy")
async def test_deadline_reaches_through_lock_waits(maker: Maker) -> None:
    """A row that somebody else holds is waited for until the deadline, not longer."""
    async with maker.begin() as session:
        session.add(Account(id=1, balance=1))
    change = update(Account).values(balance=2)
    async with maker() as holder, maker() as waiter:
        await holder.execute(change)
        with pytest.raises(TransactionTimeoutError):
            async with promptly(), get_transaction(waiter, timeout=0.2):
                await waiter.execute(change)
        await holder.rollback()
        async with get_transaction(waiter, timeout=5):
            await waiter.execute(change)


async def test_lock_timeout_ends_a_lock_wait_and_nothing_else(maker: Maker) -> None:
    """`lock_timeout` is `LockTimeoutError`; a slow statement that waits for no lock is let run."""
    async with maker.begin() as session:
        session.add(Account(id=1, balance=1))
    change = update(Account).values(balance=2)
    async with maker() as holder, maker() as waiter:
        await holder.execute(change)
        with pytest.raises(LockTimeoutError, match=r"within \d+\.\d+ s") as caught:
            async with get_transaction(waiter, lock_timeout="100ms"):
                await waiter.execute(text("SELECT pg_sleep(0.15)"))
                await waiter.execute(change)
        assert caught.value.__cause__.orig.sqlstate == "55P03"  # type: ignore[union-attr]
        assert caught.value.waited >= 0.09
        await holder.rollback()


@pytest.mark.usefixtures("busy")
async def test_deadlines_shrink_and_never_grow(maker: Maker) -> None:
    """An inner scope that asks for longer gets what the outer one has left, and it is the outer one that ends."""
    async with maker() as session:
        with pytest.raises(TransactionTimeoutError) as caught:
            async with promptly(), get_transaction(session, timeout=0.3), get_transaction(session, timeout=60):
                await session.execute(SLEEP)
        assert caught.value.timeout == 0.3


@pytest.mark.parametrize("what", ["statement", "idle"])
@pytest.mark.usefixtures("busy")
async def test_inner_deadline_ends_the_savepoint_alone(maker: Maker, names: Names, clock: Clock, what: str) -> None:
    """A shorter one ends the inner scope: its savepoint is rolled back, and the outer scope goes on and commits."""
    async with maker() as session, get_transaction(session, timeout=200):
        session.add(User(name="kept"))
        with pytest.raises(TransactionTimeoutError):
            async with promptly(), get_transaction(session, timeout=0.3 if what == "statement" else 60):
                session.add(User(name="lost"))
                await session.flush()
                if what == "statement":
                    await session.execute(SLEEP)
                clock.advance(70)
                await asyncio.Event().wait()
    assert await names() == ["kept"]


async def test_inner_scope_gives_the_callers_timeouts_back(maker: Maker) -> None:
    """Whether it is released or rolled back, joined or a savepoint, the caller's own timeouts stand afterwards."""
    both = text("SELECT current_setting('statement_timeout') || ' ' || current_setting('lock_timeout')")
    async with maker() as session, get_transaction(session):
        await session.execute(text("SET LOCAL statement_timeout = '7s'"))
        await session.execute(text("SET LOCAL lock_timeout = '3s'"))
        for propagation in ("nested", "required"):
            async with get_transaction(session, propagation=propagation, timeout=6, lock_timeout=1):
                inside = (await session.scalar(both)).split()
                assert inside[1] == "1s"
                assert inside[0] != "7s"
                async with get_transaction(session, lock_timeout="500ms"):
                    assert (await session.scalar(both)).split()[1] == "500ms"
                assert (await session.scalar(both)).split() == inside
            assert await session.scalar(both) == "7s 3s"
        with pytest.raises(ZeroDivisionError):
            async with get_transaction(session, timeout=6, lock_timeout=1):
                raise ZeroDivisionError
        assert await session.scalar(both) == "7s 3s"


async def test_settings_of_a_transaction_end_with_it(maker: Maker) -> None:
    """The connection goes back to the pool with the timeouts that it came with."""
    async with maker() as session:
        async with get_transaction(session, timeout=15, lock_timeout=1):
            assert await session.scalar(SHOW) != "20s"
        async with get_transaction(session):
            assert await session.scalar(SHOW) == "20s"
            assert await session.scalar(text("SHOW lock_timeout")) == "10s"


async def test_transaction_timeout_stands_behind(maker: Maker) -> None:
    """On PostgreSQL 17 and newer the server ends the whole transaction a little later, should the client be gone."""
    async with maker() as session, get_transaction(session, timeout=15):
        version = await session.scalar(text("SELECT current_setting('server_version_num')::int"))
        if version < 170000:
            pytest.skip("transaction_timeout came with PostgreSQL 17")
        later = "current_setting('transaction_timeout')::interval - current_setting('statement_timeout')::interval"
        assert await session.scalar(text(f"SELECT extract(epoch FROM {later})")) == 1


async def test_server_is_told_once(wire: Wire, wired: AsyncEngine) -> None:
    """A deadline costs one round trip, at entry, however many statements follow."""
    async with async_sessionmaker(wired)() as session:
        async with get_transaction(session):
            await session.execute(text("SELECT 1"))
        wire.forget()
        async with get_transaction(session, timeout=15, lock_timeout=1):
            await session.execute(text("SELECT 1"))
            await session.execute(text("SELECT 1"))
    assert wire.round_trips == 5
    told = [each.split(" =")[0] for each in wire.statements[1].split(";")]
    assert [each for each in told if "transaction_timeout" not in each] == [  # that one came with PostgreSQL 17
        "SET LOCAL statement_timeout",
        "SET LOCAL lock_timeout",
    ]


@pytest.mark.usefixtures("busy")
async def test_deadline_spans_the_decorated_call(maker: Maker) -> None:
    """By the decorator it is the same, and the error names the function."""

    @transactional(source=maker, timeout=0.2)
    async def slow() -> None:
        await current_session().execute(SLEEP)

    with pytest.raises(TransactionTimeoutError, match="slow"):
        async with promptly():
            await slow()


# COMMIT ---------------------------------------------------------------------------------------------------------------


async def test_commit_that_has_no_answer_at_the_deadline_is_of_unknown_outcome(
    maker: Maker, engine: AsyncEngine, probe: AsyncConnection, clock: Clock
) -> None:
    """A COMMIT that stands still is given up at the deadline: nobody knows, and the error says so."""
    async with held_commits(engine, probe, "user") as held, maker() as session:

        async def call() -> None:
            async with get_transaction(session, timeout=60):
                session.add(User(name="perhaps"))

        calling = asyncio.create_task(call())
        await held.reached()
        clock.advance(61)
        with pytest.raises(CommitOutcomeUnknownError, match="deadline"):
            await calling
        await held.release()
        async with get_transaction(session, timeout=5):
            assert await session.scalar(text("SELECT 1")) == 1


async def test_answer_to_commit_that_is_held_on_the_wire_is_given_up(
    fault_proxy: FaultProxy, make_engine: Callable[..., AsyncEngine], clock: Clock
) -> None:
    """The transaction has committed, the answer is stuck: unknown at the deadline, and the connection is gone."""
    maker = async_sessionmaker(make_engine(fault_proxy.url))

    async def late() -> None:
        await fault_proxy.sprung()
        clock.advance(61)

    async with maker() as session:
        with pytest.raises(CommitOutcomeUnknownError):
            async with get_transaction(session, timeout=60):
                session.add(User(name="stored"))
                await session.flush()
                fault_proxy.hold_reply_after("COMMIT")
                waiting = asyncio.create_task(late())
        await waiting
        fault_proxy.resume()
        async with get_transaction(session):
            assert await session.scalar(select(User.name)) == "stored"


async def test_network_that_goes_silent_is_given_up_at_the_deadline(
    fault_proxy: FaultProxy, make_engine: Callable[..., AsyncEngine]
) -> None:
    """Where the server cannot be heard the client ends the call alone, and drops the connection."""
    maker = async_sessionmaker(make_engine(fault_proxy.url))
    async with maker() as session:
        with pytest.raises(TransactionTimeoutError):
            async with promptly(), get_transaction(session, timeout=0.3):
                await session.execute(text("SELECT 1"))
                fault_proxy.pause()
                await session.execute(text("SELECT 2"))
        fault_proxy.resume()


# Cancellation is never anything else ----------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 30])
async def test_cancelled_task_ends_in_cancelled_error(maker: Maker, names: Names, timeout: float | None) -> None:
    """`task.cancel()` comes out as `CancelledError`, with a deadline of the scope or without."""
    inside = asyncio.Event()

    async def call() -> None:
        async with maker() as session, get_transaction(session, timeout=timeout):
            session.add(User(name="lost"))
            await session.flush()
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await inside.wait()
    task.cancel("reason")
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.args == ("reason",)
    assert await names() == []


@pytest.mark.parametrize("timeout", [None, 300])
@pytest.mark.parametrize("what", ["asyncio.timeout", "fail_after", "move_on_after", "task group"])
async def test_scopes_of_other_libraries_see_their_own_cancellation(
    maker: Maker, names: Names, probe: AsyncConnection, schema: str, clock: Clock, timeout: float | None, what: str
) -> None:
    """`asyncio.timeout` and anyio's cancel scopes around a scope work as they do around anything else."""
    asleep = text("SELECT true FROM pg_stat_activity WHERE application_name = :name AND wait_event = 'PgSleep'")

    async def call() -> None:
        async with create_db_context(maker)() as session, get_transaction(session, timeout=timeout):
            session.add(User(name="lost"))
            await session.flush()
            await session.execute(SLEEP)

    async def put_forward() -> None:
        await until(lambda: probe.scalar(asleep, {"name": schema}))
        clock.advance(61)

    async with promptly():
        late = asyncio.create_task(put_forward())
        match what:
            case "asyncio.timeout":
                with pytest.raises(TimeoutError) as caught:
                    async with asyncio.timeout(60):
                        await call()
                assert type(caught.value) is TimeoutError
            case "fail_after":
                with pytest.raises(TimeoutError) as caught:
                    with anyio.fail_after(60):
                        await call()
                assert type(caught.value) is TimeoutError
            case "move_on_after":
                with anyio.move_on_after(60) as scope:
                    await call()
                assert scope.cancelled_caught
            case _:
                with pytest.raises(ExceptionGroup) as group:
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(call())
                        await late
                        raise ZeroDivisionError
                assert group.value.subgroup(ZeroDivisionError) is not None
                assert len(group.value.exceptions) == 1
        await late
    assert await names() == []


async def test_timeout_of_the_caller_that_is_longer_is_not_touched(maker: Maker, clock: Clock) -> None:
    """The scope's own deadline inside `asyncio.timeout`: the scope's error comes out, and the outer timer goes on."""
    async with asyncio.timeout(200) as outer, maker() as session:
        with pytest.raises(TransactionTimeoutError):
            async with get_transaction(session, timeout=60):
                clock.advance(61)
                await asyncio.Event().wait()
        await asyncio.sleep(0)
    assert not outer.expired()


# The exit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("propagation", ["required", "nested", "not_supported"])
async def test_flush_at_the_exit_has_the_deadline_too(maker: Maker, names: Names, propagation: str) -> None:
    """A change that waits for a row somebody else holds, sent as the scope ends: the scope ends at its deadline."""
    async with maker.begin() as session:
        session.add(User(id=1, name="before"))
    async with maker() as holder, maker() as waiter:
        await holder.execute(update(User).values(name="held"))
        ledger_of(waiter).source = maker
        async with promptly(), get_transaction(waiter) if propagation == "nested" else nullcontext():
            with pytest.raises(TransactionTimeoutError):
                async with get_transaction(waiter, propagation=propagation, timeout=0.5) as session:
                    (await session.get_one(User, 1)).name = "lost"
        await holder.rollback()
    assert await names() == ["before"]


@asynccontextmanager
async def stuck_at(fault_proxy: FaultProxy, clock: Clock, needle: str) -> AsyncIterator[None]:
    """A minute passes once *needle*, sent in the block, is on its way to the server, where it does not arrive."""
    fault_proxy.hold_before(needle)

    async def later() -> None:
        await fault_proxy.sprung()
        clock.advance(61)

    passing = asyncio.create_task(later())
    yield
    await passing
    fault_proxy.resume()


async def test_question_before_a_verified_commit_has_the_deadline_too(
    fault_proxy: FaultProxy, make_engine: Callable[..., AsyncEngine], clock: Clock, names: Names
) -> None:
    """What is asked before COMMIT can still be undone: where no answer comes, nothing commits."""
    maker = async_sessionmaker(make_engine(fault_proxy.url))
    async with promptly(), maker() as session, stuck_at(fault_proxy, clock, "pg_current_xact_id"):
        with pytest.raises(TransactionTimeoutError):
            async with get_transaction(session, timeout=60, verify_commit=True):
                session.add(User(name="lost"))
    assert await names() == []


async def test_settings_that_a_joined_scope_gives_back_have_its_deadline(
    fault_proxy: FaultProxy, make_engine: Callable[..., AsyncEngine], clock: Clock, names: Names
) -> None:
    """Where the network goes silent meanwhile the call ends in time, and nothing around it commits."""
    async with async_sessionmaker(make_engine(fault_proxy.url))() as session:
        with pytest.raises(UnexpectedRollbackError):
            async with promptly(), get_transaction(session):
                session.add(User(name="lost"))
                await session.flush()
                joined = get_transaction(session, propagation="mandatory", timeout=60)
                await joined.__aenter__()
                await session.execute(text("SELECT 1"))
                async with stuck_at(fault_proxy, clock, "set_config('statement_timeout', current_setting"):
                    with pytest.raises(TransactionTimeoutError):
                        await joined.__aexit__(None, None, None)
    assert await names() == []


async def test_flush_that_ends_after_the_deadline_is_not_committed(
    maker: Maker, names: Names, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its deadline nothing commits, though the timer that would have ended the flush is not due yet."""
    monkeypatch.setattr(deadlines, "GRACE", 3600)
    async with maker() as session:
        event.listen(session.sync_session, "after_flush", lambda *_: clock.advance(61))
        with pytest.raises(TransactionTimeoutError):
            async with get_transaction(session, timeout=60):
                session.add(User(name="late"))
    assert await names() == []

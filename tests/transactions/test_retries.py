"""Which calls run again, how often, how soon, and beside how many others."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections import defaultdict
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from support.clock import Clock
from support.commits import fail_commit
from support.models import Account
from support.waiting import until
from txdeco import (
    INJECTED,
    DeadlockError,
    LockTimeoutError,
    MisuseError,
    Retry,
    SerializationError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
    admission,
    get_transaction,
    injects_session,
    locks_rows,
    on_commit,
    transactional,
)
from txdeco.admission import COURTESY, Gate
from txdeco.testing import failing_attempts

Maker = async_sessionmaker[AsyncSession]
SOON = Retry(attempts=5, delay=0.0)


async def fail(session: AsyncSession, sqlstate: str) -> None:
    """Have the server raise *sqlstate*."""
    await session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{sqlstate}'; END $$"))


@pytest.mark.parametrize(("sqlstate", "kind"), [("40001", SerializationError), ("40P01", DeadlockError)])
async def test_a_conflict_at_a_statement_is_retried_until_attempts_are_used_up(
    maker: Maker, sqlstate: str, kind: type[SerializationError | DeadlockError]
) -> None:
    """The owner runs the whole call again, and in the end says how often, with the original as the cause."""
    sessions: list[AsyncSession] = []

    @transactional(retry=Retry(attempts=3, delay=0.0))
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        sessions.append(session)
        await fail(session, sqlstate)

    with pytest.raises(kind, match="All 3 attempts are used up") as raised:
        await call()
    assert raised.value.attempts == 3
    assert isinstance(raised.value.__cause__, DBAPIError)
    assert len({id(session) for session in sessions}) == 3


async def test_a_conflict_at_commit_is_retried(maker: Maker) -> None:
    """An error that only COMMIT raises is retried as well, and what failed attempts added is gone."""
    turns = 0

    @transactional(retry=SOON)
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> int:
        nonlocal turns
        turns += 1
        session.add(Account(balance=turns))
        return turns

    with failing_attempts(2):
        assert await call() == 3
    async with maker() as session:
        assert list(await session.scalars(select(Account.balance))) == [3]


async def conflict(session: AsyncSession) -> None:
    await fail(session, "40001")


async def divide(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1 / 0"))


async def fail_at_commit(session: AsyncSession) -> None:
    fail_commit(session)


@pytest.mark.parametrize(
    ("retry", "body", "kind", "attempts"),
    [
        (None, conflict, SerializationError, 1),
        (1, conflict, SerializationError, 1),
        (Retry(attempts=1), conflict, SerializationError, 1),
        (SOON, conflict, SerializationError, 5),
        (SOON, divide, DBAPIError, 1),
        (SOON, fail_at_commit, IntegrityError, 1),
        (Retry(attempts=2, delay=0.0, sqlstates=frozenset({"22012"})), divide, DBAPIError, 2),
        (Retry(attempts=2, delay=0.0, sqlstates=frozenset({"22012"})), conflict, SerializationError, 1),
    ],
)
async def test_what_is_retried_is_what_sqlstates_name(
    maker: Maker, retry: Any, body: Any, kind: type[Exception], attempts: int
) -> None:
    """By default conflicts, which have their names in any case; other errors pass unchanged at the first attempt."""
    turns: list[int] = []

    @transactional(retry=retry)
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        turns.append(1)
        await body(session)

    with pytest.raises(kind) as raised:
        await call()
    assert len(turns) == attempts
    assert getattr(raised.value, "attempts", attempts) == attempts


async def test_a_swallowed_conflict_is_retried(maker: Maker) -> None:
    """A serialization failure that the body swallowed still ends the attempt, and is worth another one."""
    turns: list[int] = []

    @transactional(retry=SOON)
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> int:
        turns.append(1)
        if len(turns) == 1:
            with pytest.raises(DBAPIError):
                await conflict(session)
        return len(turns)

    assert await call() == 2


async def test_a_lock_timeout_is_retried_where_it_is_named(maker: Maker) -> None:
    """55P03 stands for every lock that was not granted in time, those of the plan included."""
    async with maker.begin() as session:
        session.add(Account(id=1))
    turns = 0

    @transactional(retry=Retry(attempts=3, delay=0.0, sqlstates=frozenset({"55P03"})))
    @locks_rows(Account, "account_id", nowait=True)
    @injects_session(maker)
    async def call(account_id: int, *, session: AsyncSession = INJECTED) -> None:
        raise AssertionError("the lock is held by another")

    def count(*_: object) -> None:
        nonlocal turns
        turns += 1

    async with maker() as holder:
        await holder.execute(select(Account).with_for_update())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Retry, "pause", lambda *_: count() or 0.0)
            with pytest.raises(LockTimeoutError):
                await call(1)
    assert turns == 2


async def test_only_the_owner_retries(maker: Maker) -> None:
    """Inside another scope a conflict passes through unchanged, with a note that says where it might be retried."""
    turns = 0

    @transactional(retry=SOON)
    async def inner(session: AsyncSession) -> None:
        nonlocal turns
        turns += 1
        await fail(session, "40001")

    @transactional(source=maker)
    @injects_session
    async def outer(*, session: AsyncSession = INJECTED) -> None:
        await inner(session)

    with pytest.raises(SerializationError) as raised:
        await outer()
    assert turns == 1
    (note,) = [note for note in raised.value.__cause__.__notes__ if note.startswith("txdeco")]  # type: ignore[union-attr]
    assert "inner" in note
    assert "outer" in note


async def test_a_conflict_of_another_transaction_is_not_the_owners(maker: Maker) -> None:
    """What requires_new could not serialize is no reason to repeat the transaction around it."""
    turns = 0

    @transactional(propagation="requires_new")
    async def inner(session: AsyncSession) -> None:
        await fail(session, "40001")

    @transactional(retry=SOON)
    @injects_session(maker)
    async def outer(*, session: AsyncSession = INJECTED) -> None:
        nonlocal turns
        turns += 1
        await inner(session)

    with pytest.raises(SerializationError):
        await outer()
    assert turns == 1


async def test_a_second_attempt_begins_where_the_first_did(maker: Maker) -> None:
    """On a session that was handed in nothing of the failed attempt is left; what was loaded before is readable."""
    async with maker.begin() as session:
        session.add_all([Account(id=1, balance=10), Account(id=2, balance=20)])
    seen = []
    loaded: list[Account] = []  # the identity map holds only what somebody else holds, too

    @transactional(retry=SOON)
    async def call(session: AsyncSession, mine: Account) -> None:
        seen.append((mine.balance, len(session.identity_map), bool(session.new)))
        mine.balance += 5
        loaded.append(await session.get_one(Account, 2))
        session.add(Account(id=3 + len(seen)))
        await session.flush()
        if len(seen) == 1:
            await fail(session, "40001")

    async with maker() as session:
        mine = await session.get_one(Account, 1)
        await call(session, mine)
        assert mine.balance == 15
    assert seen == [(10, 1, False), (10, 1, False)]
    async with maker() as session:
        rows = await session.execute(select(Account.id, Account.balance).order_by(Account.id))
        assert [tuple(row) for row in rows] == [(1, 15), (2, 20), (5, 0)]


async def test_later_attempts_run_few_at_a_time(make_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Second and later attempts of one function pass a gate of `concurrency`; first attempts do not."""
    maker = async_sessionmaker(make_engine(pool_size=8))
    first = asyncio.Barrier(8)
    running = most = 0

    @transactional(retry=Retry(attempts=2, delay=0.0, concurrency=3))
    @injects_session(maker)
    async def call(turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        nonlocal running, most
        turns.append(1)
        if len(turns) == 1:
            await session.execute(text("SELECT 1"))
            await first.wait()
            await fail(session, "40001")
        running += 1
        most = max(most, running)
        for _ in range(20):
            await asyncio.sleep(0)  # lets the others in, if anything would
        await session.execute(text("SELECT 1"))
        running -= 1

    await asyncio.gather(*(call([]) for _ in range(8)))
    assert most == 3


async def test_the_gate_narrows_while_conflicts_go_on(make_engine: Any) -> None:
    """Attempts that meet a conflict again leave fewer places, in the end one, to those that come after them."""
    maker = async_sessionmaker(make_engine(pool_size=8))
    first = asyncio.Barrier(8)
    running, most = [0] * 4, [0] * 4

    @transactional(retry=Retry(attempts=3, delay=0.0, concurrency=3))
    @injects_session(maker)
    async def call(turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        turns.append(1)
        turn = len(turns)
        running[turn] += 1
        most[turn] = max(most[turn], running[turn])
        await session.execute(text("SELECT 1"))
        if turn == 1:
            await first.wait()
        for _ in range(20):
            await asyncio.sleep(0)  # lets the others in, if anything would
        running[turn] -= 1
        if turn < 3:
            await fail(session, "40001")

    await asyncio.gather(*(call([]) for _ in range(8)))
    assert most[1:] == [8, 3, 1]


async def test_the_gate_widens_in_peace() -> None:
    """After eight attempts without a conflict in a row one more place is open, up to `concurrency` and no further."""
    gate = Gate(2)

    async def places() -> int:
        """Count those who get in at once; each of them is one more that ended without a conflict."""
        tasks = [asyncio.create_task(gate.enter()) for _ in range(4)]
        await asyncio.sleep(0)
        entered = [task for task in tasks if task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _ in entered:
            gate.leave(conflicted=False)
        return len(entered)

    async def attempts(number: int, *, conflicted: bool) -> None:
        for _ in range(number):
            await gate.enter()
            gate.leave(conflicted=conflicted)

    assert await places() == 2
    await attempts(3, conflicted=True)
    assert await places() == 1
    await attempts(6, conflicted=False)
    await attempts(1, conflicted=True)  # peace has to last
    await attempts(6, conflicted=False)
    assert await places() == 1
    await attempts(1, conflicted=False)
    assert await places() == 2
    await attempts(40, conflicted=False)
    assert await places() == 2


async def test_who_waits_at_the_gate_holds_no_connection(make_engine: Any) -> None:
    """An attempt is admitted before it takes a connection, so that those inside can finish on a pool of one."""
    engine: AsyncEngine = make_engine(pool_size=2, max_overflow=0)
    maker = async_sessionmaker(engine)
    held, failed, go = asyncio.Event(), asyncio.Barrier(2), asyncio.Event()

    @transactional(retry=Retry(attempts=2, delay=0.0, concurrency=1))
    @injects_session(maker)
    async def call(turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        turns.append(1)
        if len(turns) == 1:
            await failed.wait()
            await fail(session, "40001")
        held.set()
        await session.execute(text("SELECT 1"))
        await go.wait()

    calls = [asyncio.create_task(call([])) for _ in range(2)]
    await held.wait()
    async with asyncio.timeout(5), maker() as other:
        await other.execute(text("SELECT 1"))  # the second connection of the pool comes free, and stays so
        for _ in range(20):
            await other.execute(text("SELECT 1"))
    assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]
    go.set()
    await asyncio.gather(*calls)


async def test_inside_another_scope_nobody_waits_at_the_gate(maker: Maker) -> None:
    """The locks of the scope around may be what those inside the gate wait for: such an attempt just goes on."""
    entered: list[int] = []

    @transactional(source=maker, propagation="requires_new", retry=Retry(attempts=2, delay=0.0, concurrency=1))
    async def inner(session: AsyncSession, deeper: bool) -> None:
        entered.append(1)
        if len(entered) in (1, 3):
            await fail(session, "40001")
        if deeper:
            await inner(session, False)

    async with maker() as session, get_transaction(session), asyncio.timeout(10):
        await inner(session, True)
    assert len(entered) == 4


async def some_turns_of_the_loop() -> None:
    """Let in whoever can go on without waiting for anything."""
    for _ in range(50):
        await asyncio.sleep(0)


def somebody_is_to_run_alone() -> bool:
    """Tell whether an attempt of any function runs alone, or waits for the others to end."""
    return any(gate._alone for gates in admission._gates.values() for gate in gates.values())


async def test_who_runs_alone_waits_for_the_others_and_they_for_it() -> None:
    """Those that have begun end first; those that come meanwhile begin afterwards, and before the next one alone."""
    gate = Gate(4)
    await gate.begin("first")
    waiting = {
        "alone": asyncio.create_task(gate.begin("alone", alone=True)),
        "late": asyncio.create_task(gate.begin("late")),
        "next": asyncio.create_task(gate.begin("next", alone=True)),
    }

    async def begun() -> list[str]:
        await some_turns_of_the_loop()
        return [name for name, task in waiting.items() if task.done()]

    assert await begun() == []
    gate.end("first")
    assert await begun() == ["alone"]
    gate.end("alone")
    assert await begun() == ["alone", "late"]
    gate.end("late")
    assert await begun() == ["alone", "late", "next"]
    gate.end("next")
    await gate.begin("last")


async def test_attempts_wait_for_each_other_only_as_long_as_courtesy_asks(clock: Clock) -> None:
    """What one of them holds may be what another waits for: they go on when time is up, or when their own is."""
    gate = Gate(4)
    await gate.begin("first")
    for name, alone, patience in (
        ("alone", True, COURTESY),
        ("hasty", False, COURTESY / 2),
        ("late", False, COURTESY / 2),  # all that the one alone may still ask for
        ("next", True, COURTESY),
    ):
        own_end = asyncio.get_running_loop().time() + patience if name == "hasty" else None
        waiting = asyncio.create_task(gate.begin(name, alone=alone, until=own_end))
        await some_turns_of_the_loop()
        assert not waiting.done()
        clock.advance(patience)
        await some_turns_of_the_loop()
        assert waiting.done()
    for name in ("alone", "next", "late", "first", "hasty"):
        gate.end(name)
    await gate.begin("quiet", alone=True)
    gate.end("quiet")


async def test_a_call_that_nobody_waits_for_pauses_in_full(clock: Clock) -> None:
    """The jitter is for those in other processes, too."""
    gate = Gate(2)
    await gate.enter()
    pausing = asyncio.create_task(gate.pause(10))
    await some_turns_of_the_loop()
    assert not pausing.done()
    clock.advance(10)
    await some_turns_of_the_loop()
    assert pausing.done()


@pytest.mark.parametrize("ends", [True, False], ids=["nobody runs any more", "time is up"])
async def test_while_others_wait_a_pause_lasts_only_as_long_as_somebody_runs(clock: Clock, ends: bool) -> None:
    """Nothing is gained by a pause beside which nothing happens; of several that pause one goes on at a time."""
    gate = Gate(2)
    await gate.begin("running")

    async def pause(name: str) -> None:
        await gate.pause(10)
        await gate.begin(name)

    await gate.enter()
    await gate.enter()
    waiting = asyncio.create_task(gate.enter())
    await some_turns_of_the_loop()
    pausing = [asyncio.create_task(pause("first")), asyncio.create_task(pause("second"))]
    await some_turns_of_the_loop()
    assert [task.done() for task in pausing] == [False, False]
    if ends:
        gate.end("running")
    else:
        clock.advance(10)
    await some_turns_of_the_loop()
    assert [task.done() for task in pausing] == [True, not ends]
    gate.end("first")
    await some_turns_of_the_loop()
    assert pausing[1].done()
    gate.leave(conflicted=False)
    await waiting


async def test_calls_that_wait_for_each_other_do_not_pause_beside_nobody(
    maker: Maker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first goes on as soon as the second waits for its place; the second, behind which nobody waits, pauses."""
    monkeypatch.setattr(random, "uniform", lambda _, longest: longest)
    first, ended = asyncio.Barrier(2), 0

    @transactional(source=maker, retry=Retry(attempts=2, delay=3600, max_delay=3600, concurrency=1))
    @injects_session
    async def call(turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        nonlocal ended
        turns.append(1)
        if len(turns) == 1:
            await first.wait()
            await fail(session, "40001")
        ended += 1

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(call([]))
        tasks.create_task(call([]))
        await until(lambda: ended)
        await some_turns_of_the_loop()
        assert ended == 1
        clock.advance(3600)
    assert ended == 2


@pytest.mark.parametrize("alone", [True, False])
async def test_an_attempt_that_is_cancelled_while_it_waits_keeps_nobody_waiting(alone: bool) -> None:
    """It has not begun: nobody waits for its end."""
    gate = Gate(4)
    other = asyncio.create_task(gate.begin("other", alone=not alone))
    await some_turns_of_the_loop()
    assert other.done()
    cancelled = asyncio.create_task(gate.begin("cancelled", alone=alone))
    await some_turns_of_the_loop()
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    gate.end("other")
    for everybody in (False, True):
        begun = asyncio.create_task(gate.begin("late", alone=everybody))
        await some_turns_of_the_loop()
        assert begun.done()
        gate.end("late")


async def test_the_third_attempt_of_a_call_runs_alone(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it no other call of the function runs: what had begun has ended, what comes waits."""
    monkeypatch.setattr("txdeco.admission.COURTESY", 3600.0)
    order: list[str] = []
    begun, go = defaultdict(asyncio.Event), defaultdict(asyncio.Event)

    @transactional(source=maker, retry=Retry(attempts=3, delay=0.0))
    async def call(session: AsyncSession, name: str, turns: list[int]) -> None:
        turns.append(1)
        turn = f"{name} {len(turns)}"
        order.append(turn)
        begun[turn].set()
        if turn != "loser 1":
            await go[turn].wait()
        if name == "loser" and len(turns) < 3:
            await fail(session, "40001")
        order.append(f"{name} ends")

    async def start(name: str) -> None:
        async with maker() as session:
            await call(session, name, [])

    async with asyncio.TaskGroup() as tasks, asyncio.timeout(20):
        tasks.create_task(start("loser"))
        await begun["loser 2"].wait()
        tasks.create_task(start("neighbour"))
        await begun["neighbour 1"].wait()
        go["loser 2"].set()
        await until(somebody_is_to_run_alone)
        tasks.create_task(start("late"))
        await some_turns_of_the_loop()
        go["neighbour 1"].set()
        await begun["loser 3"].wait()
        await some_turns_of_the_loop()
        go["late 1"].set()
        go["loser 3"].set()
    assert order[2:] == ["neighbour 1", "neighbour ends", "loser 3", "loser ends", "late 1", "late ends"]


@pytest.mark.parametrize(
    ("begin", "shares"),
    [(get_transaction, True), (get_transaction, False), (AsyncSession.begin, True)],
    ids=["declared", "declared, on another session", "undeclared"],
)
async def test_inside_a_transaction_nobody_waits_for_who_runs_alone(
    maker: Maker, monkeypatch: pytest.MonkeyPatch, begin: Any, shares: bool
) -> None:
    """The locks of the transaction around may be what the one that runs alone waits for."""
    monkeypatch.setattr("txdeco.admission.COURTESY", 3600.0)
    alone, inside = asyncio.Event(), asyncio.Event()

    @transactional(source=maker, retry=Retry(attempts=3, delay=0.0))
    @injects_session
    async def call(turns: list[int], event: asyncio.Event, *, session: AsyncSession = INJECTED) -> None:
        turns.append(1)
        if len(turns) < 3:
            await fail(session, "40001")
        event.set()
        await inside.wait()

    async with maker() as session, asyncio.TaskGroup() as tasks, asyncio.timeout(20):
        tasks.create_task(call([], alone))
        await alone.wait()
        async with begin(session):
            await call([0, 0], inside, session=session if shares else INJECTED)


async def test_who_runs_alone_lets_end_what_began_before_the_first_conflict(
    maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every attempt counts from the first call on, though nobody had to wait yet."""
    monkeypatch.setattr("txdeco.admission.COURTESY", 3600.0)
    order: list[str] = []
    begun, go = asyncio.Event(), asyncio.Event()

    @transactional(source=maker, retry=Retry(attempts=3, delay=0.0))
    @injects_session
    async def call(name: str, turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        turns.append(1)
        if name == "neighbour":
            begun.set()
            await go.wait()
        elif len(turns) < 3:
            await fail(session, "40001")
        order.append(name)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(call("neighbour", []))
        await begun.wait()
        tasks.create_task(call("loser", []))
        await until(lambda: order or somebody_is_to_run_alone())
        go.set()
    assert order == ["neighbour", "loser"]


async def test_a_hook_of_a_call_that_ran_alone_does_not_wait_for_it(
    maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction has ended when its hooks run: they may call the same function."""
    monkeypatch.setattr("txdeco.admission.COURTESY", 3600.0)

    @transactional(source=maker, retry=Retry(attempts=3, delay=0.0))
    @injects_session
    async def call(turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        turns.append(1)
        if len(turns) < 3:
            await fail(session, "40001")
        if len(turns) == 3:
            on_commit(call, turns)

    turns: list[int] = []
    async with asyncio.timeout(20):
        await call(turns)
    assert len(turns) == 4


@pytest.mark.parametrize(("sqlstate", "shortened"), [("40001", 2), ("40P01", 2), ("55P03", 0)])
async def test_who_has_lost_against_somebody_outside_pauses_in_full(
    maker: Maker, monkeypatch: pytest.MonkeyPatch, sqlstate: str, shortened: int
) -> None:
    """Only the first two pauses may end early, and only after a conflict."""
    pauses: list[float] = []

    async def pause(_: Gate, seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(Gate, "pause", pause)

    @transactional(source=maker, retry=Retry(6, delay=0.0, sqlstates=frozenset({"40001", "40P01", "55P03"})))
    @injects_session
    async def call(*, session: AsyncSession = INJECTED) -> None:
        await fail(session, sqlstate)

    with pytest.raises((SerializationError, DeadlockError, DBAPIError)):
        await call()
    assert len(pauses) == shortened


def test_the_gate_of_a_loop_that_is_closed_is_let_go_of(database: str) -> None:
    """One loop for each job leaves nothing behind but the last one."""
    loops: list[weakref.ref[asyncio.AbstractEventLoop]] = []

    @transactional(retry=Retry(attempts=2, delay=0.0))
    @injects_session
    async def call(turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        turns.append(1)
        if len(turns) == 1:
            await fail(session, "40001")

    async def job() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        engine = create_async_engine(database)
        async with AsyncSession(engine) as session:
            await call([], session=session)
        await engine.dispose()

    for _ in range(5):
        asyncio.run(job())
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1


async def test_waiting_for_who_runs_alone_is_part_of_the_deadline(
    maker: Maker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that has no time left when it is let in does not begin."""
    monkeypatch.setattr("txdeco.admission.COURTESY", 3600.0)
    alone, bodies = asyncio.Event(), 0

    @transactional(source=maker, retry=Retry(attempts=3, delay=0.0), timeout=60)
    @injects_session
    async def call(turns: list[int], *, session: AsyncSession = INJECTED) -> None:
        nonlocal bodies
        bodies += 1
        turns.append(1)
        if len(turns) < 3:
            await fail(session, "40001")
        alone.set()
        await asyncio.Event().wait()

    loser = asyncio.create_task(call([]))
    await alone.wait()
    late = asyncio.create_task(call([0, 0]))
    await some_turns_of_the_loop()
    clock.advance(61)
    ended = await asyncio.gather(loser, late, return_exceptions=True)
    assert [type(each) for each in ended] == [TransactionTimeoutError, TransactionTimeoutError]
    assert bodies == 3


async def test_the_deadline_spans_all_attempts(maker: Maker, clock: Clock) -> None:
    """A second attempt has what the first has left, and none begins past the deadline."""
    turns = 0

    @transactional(retry=Retry(attempts=1000, delay=0.0), timeout=200)
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        nonlocal turns
        turns += 1
        clock.advance(90)
        await fail(session, "40001")

    with pytest.raises((SerializationError, TransactionTimeoutError)):
        await call()
    assert turns == 3


async def test_retries_of_real_conflicts_lose_nothing(make_engine: Any) -> None:
    """Serializable increments of one row from many tasks all arrive, none twice."""
    maker = async_sessionmaker(make_engine(pool_size=8))
    async with maker.begin() as session:
        session.add(Account(id=1))

    @transactional(isolation="SERIALIZABLE", retry=Retry(attempts=50, delay=0.001))
    @injects_session(maker)
    async def increment(*, session: AsyncSession = INJECTED) -> None:
        balance = await session.scalar(select(Account.balance).where(Account.id == 1))
        await session.execute(update(Account).where(Account.id == 1).values(balance=(balance or 0) + 1))

    await asyncio.gather(*(increment() for _ in range(24)))
    async with maker() as session:
        assert await session.scalar(select(Account.balance)) == 24


async def test_a_cancelled_attempt_is_not_retried(maker: Maker) -> None:
    """Cancellation ends the call at once, whatever is declared."""
    started = asyncio.Event()
    turns = 0

    @transactional(retry=SOON)
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        nonlocal turns
        turns += 1
        await session.execute(text("SELECT 1"))
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert turns == 1


def test_pauses_are_drawn_from_a_window_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full jitter: between zero and `delay` doubled from attempt to attempt, at most `max_delay`."""
    windows: list[tuple[float, float]] = []
    monkeypatch.setattr(random, "uniform", lambda low, high: windows.append((low, high)) or high)
    retry = Retry(attempts=9, delay=0.1, max_delay=0.5)
    for number in range(1, 6):
        retry.pause(number)
    assert windows == [(0, 0.1), (0, 0.2), (0, 0.4), (0, 0.5), (0, 0.5)]
    retry.pause(5000)
    assert windows[-1] == (0, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": True},
        {"attempts": "3"},
        {"concurrency": 0},
        {"delay": -1},
        {"max_delay": -0.5},
        {"delay": "soon"},
        {"sqlstates": "40001"},
        {"sqlstates": {"4000"}},
        {"sqlstates": {40001}},
        {"sqlstates": 5},
    ],
)
def test_nonsense_is_refused_where_it_is_written(options: dict[str, Any]) -> None:
    """A policy that cannot work is a MisuseError that names the option."""
    with pytest.raises(MisuseError, match="Retry"):
        Retry(**options)


@pytest.mark.parametrize("retry", [0, -1, True, "3", 2.5])
def test_a_number_of_attempts_that_is_none_is_refused_at_decoration(retry: Any) -> None:
    """`retry=` takes a number of attempts or a Retry."""
    with pytest.raises(MisuseError, match="retry"):
        transactional(retry=retry)(test_a_cancelled_attempt_is_not_retried)


async def test_an_unknown_commit_is_never_retried(maker: Maker, fault_proxy: Any, make_engine: Any) -> None:
    """What may have happened is not done again."""
    from txdeco import CommitOutcomeUnknownError

    far = async_sessionmaker(make_engine(fault_proxy.url))
    turns = 0

    @transactional(retry=SOON)
    @injects_session(far)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        nonlocal turns
        turns += 1
        session.add(Account(id=1))

    fault_proxy.cut_reply_after("COMMIT")
    with pytest.raises(CommitOutcomeUnknownError):
        await call()
    assert turns == 1


async def test_a_commit_that_did_not_happen_is_retried_once_that_is_known(fault_proxy: Any, make_engine: Any) -> None:
    """With verify_commit the server says that the lost COMMIT never came; then the call may run again."""
    far = async_sessionmaker(make_engine(fault_proxy.url))
    turns = 0

    @transactional(retry=SOON, verify_commit=True)
    @injects_session(far)
    async def call(*, session: AsyncSession = INJECTED) -> int:
        nonlocal turns
        turns += 1
        session.add(Account(id=1))
        return turns

    fault_proxy.cut_before("COMMIT")
    assert await call() == 2


async def test_an_unexpected_rollback_of_another_kind_is_not_retried(maker: Maker) -> None:
    """A swallowed error that is no conflict ends the call as it is."""

    @transactional(retry=SOON)
    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        with pytest.raises(DBAPIError):
            await session.execute(text("SELECT 1 / 0"))

    with pytest.raises(UnexpectedRollbackError):
        await call()

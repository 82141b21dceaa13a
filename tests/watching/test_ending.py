"""However a wait ends, and wherever it is cancelled, nothing of it stays behind."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
from contextlib import aclosing
from types import CoroutineType
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from support.clock import Clock
from support.models import Order, User
from support.waiting import until
from support.watched import Checkouts, Statements, groups, in_background, listeners, live, pollers, waiting, write
from txdeco.errors import ConnectionUnavailableError
from txdeco.watching import create_watch_sql, row_changes, wait_for_row_change
from txdeco.watching.calls import Wait
from txdeco.watching.groups import Group
from txdeco.watching.listener import Listener
from txdeco.watching.waiters import own_copy

Maker = async_sessionmaker[AsyncSession]


class CancelledAt:
    """Awaits a coroutine, and has it cancelled at its *n*-th suspension; `suspensions` counts those there were."""

    def __init__(self, coroutine: Any, n: int) -> None:
        self.coroutine: CoroutineType[Any, Any, Any] = coroutine
        self.n = n
        self.suspensions = 0

    def __await__(self) -> Any:
        answer: Any = None
        while True:
            try:
                waited_for = self.coroutine.send(answer)
            except StopIteration as done:
                return done.value
            self.suspensions += 1
            if self.suspensions == self.n:
                task = asyncio.current_task()
                assert task is not None
                task.get_loop().call_soon(task.cancel)
            try:
                answer = yield waited_for
            except BaseException as error:
                try:
                    waited_for = self.coroutine.throw(error)
                except StopIteration as done:
                    return done.value
                answer = yield waited_for


@pytest.mark.parametrize("held", [False, True], ids=["idle session", "session that has read"])
async def test_a_wait_can_be_cancelled_at_every_await(
    engine: AsyncEngine, maker: Maker, order: int, *, held: bool
) -> None:
    """Cancelled at its first, second, … n-th suspension a wait ends in CancelledError and leaves no entry."""
    n = 0
    while True:
        n += 1
        async with maker() as session:
            if held:
                await session.get(Order, order)
            wait = CancelledAt(wait_for_row_change(session, Order, order, interval=0.05), n)
            task = asyncio.ensure_future(_run(wait))
            writer = asyncio.ensure_future(_change_once_it_waits(engine, maker))
            done, _ = await asyncio.wait({task}, timeout=5)
            assert done
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            assert waiting(engine) == 0
        if not task.cancelled():
            break
    assert wait.suspensions < n
    assert n > (3 if held else 1)


async def test_five_thousand_cancelled_waiters_leave_nothing(
    engine: AsyncEngine, maker: Maker, order: int, clock: Clock
) -> None:
    """All of them end in CancelledError; no entry, task or connection is left, and the poller ends."""
    sessions = [maker() for _ in range(5000)]
    tasks = [asyncio.ensure_future(wait_for_row_change(each, Order, order)) for each in sessions]
    for rounds in range(50):
        await asyncio.sleep(0)
        for task in tasks[rounds::50]:
            task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in ended} == {asyncio.CancelledError}
    assert waiting(engine) == 0
    await until(lambda: not groups(engine))  # nothing is read any more: the poller lingers
    clock.advance(1.0)
    await clock.still(lambda: not pollers(engine))
    await clock.still(lambda: not [each for each in asyncio.all_tasks() if "txdeco" in each.get_name()])
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("push", [False, True], ids=["polling", "push"])
async def test_disposing_of_the_engine_ends_poller_and_listener(
    make_engine: Any, probe: AsyncConnection, schema: str, maker: Maker, order: int, clock: Clock, *, push: bool
) -> None:
    """Whoever still waits is told that the engine is gone, and no connection is left."""
    if push:
        await write(maker, create_watch_sql(Order))
    engine = make_engine(connect_args={"server_settings": {"application_name": f"{schema} waits"}})
    async with (
        async_sessionmaker(engine)() as session,
        in_background(engine, wait_for_row_change(session, Order, order, interval=0.05)) as [task],
    ):
        await until(lambda: live(engine) is push)
        await engine.dispose()
        with pytest.raises(ConnectionUnavailableError, match="disposed"):
            await task
    assert not pollers(engine)
    query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")

    async def gone() -> bool:
        return await probe.scalar(query, {"name": f"{schema} waits"}) == 0

    await clock.still(gone)


async def test_a_connection_that_comes_back_after_the_disposal_is_closed(
    make_engine: Any,
    probe: AsyncConnection,
    schema: str,
    order: int,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pool that it came from has been emptied, and nobody would look into it again."""
    engine = make_engine(connect_args={"server_settings": {"application_name": f"{schema} waits"}})
    read_on = Group.read_on

    async def read_and_dispose(*arguments: Any) -> None:
        await read_on(*arguments)
        await engine.dispose()

    monkeypatch.setattr(Group, "read_on", read_and_dispose)
    async with async_sessionmaker(engine)() as session:
        with pytest.raises(ConnectionUnavailableError, match="disposed"):
            await wait_for_row_change(session, Order, order, interval=0.05)
    query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")

    async def gone() -> bool:
        return await probe.scalar(query, {"name": f"{schema} waits"}) == 0

    await clock.still(gone)


async def test_an_iteration_hears_of_a_disposal_between_two_changes(
    engine: AsyncEngine, maker: Maker, order: int
) -> None:
    """Who was busy while the engine was disposed of is told at the next change that it asks for."""
    async with maker() as session, aclosing(row_changes(session, Order, order, interval=0.05)) as changes:
        change = asyncio.ensure_future(anext(changes))
        await _change_once_it_waits(engine, maker)
        await change
        await _dispose(engine)
        with pytest.raises(ConnectionUnavailableError, match="disposed"):
            await asyncio.wait_for(anext(changes), 5)


async def test_a_wait_that_has_not_looked_yet_hears_of_a_disposal(
    engine: AsyncEngine, maker: Maker, order: int
) -> None:
    """The engine may be disposed of while a wait still ends the caller's transaction."""
    async with maker() as session:
        wait = Wait.declared("", session, Order, order, None, 0.5, None, None, shared=True)
        holding = await wait.release()
        await _dispose(engine)
        with pytest.raises(ConnectionUnavailableError, match="disposed"):
            await asyncio.wait_for(wait.change(None, holding), 5)
        wait.leave()


async def test_each_waiter_is_raised_an_error_of_its_own(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """One failure ends many waits; the tracebacks of their tasks do not grow into each other."""
    async with maker() as one, maker() as two:
        waits = [wait_for_row_change(each, Order, order) for each in (one, two)]
        async with in_background(engine, *waits) as tasks:
            await engine.dispose()
            first, second = await asyncio.gather(*tasks, return_exceptions=True)
        assert str(first) == str(second)
        assert first is not second
        refused = [wait_for_row_change(each, Order, "seven") for each in (one, two)]
        causes = [getattr(each, "__cause__", None) for each in await asyncio.gather(*refused, return_exceptions=True)]
        assert all(isinstance(each, DBAPIError) and each.__cause__ is each.orig for each in causes)
        assert causes[0] is not causes[1]


def test_an_error_that_cannot_be_copied_is_raised_as_it_is() -> None:
    """Exceptions of users may need more than their args to be made."""

    class OddError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(one + two)

    error = OddError(1, 2)
    assert own_copy(error) is error


async def test_the_listener_ends_within_a_second_of_the_last_waiter(
    engine: AsyncEngine, probe: AsyncConnection, maker: Maker, order: int, clock: Clock
) -> None:
    """Its connection is closed, and its task is gone."""
    await write(maker, create_watch_sql(Order))
    async with maker() as session, in_background(engine, wait_for_row_change(session, Order, order)):
        await until(lambda: live(engine))
        pid = listeners(engine)[0]._connection.get_server_pid()
        await until(lambda: not pollers(engine)[0]._wakeup.is_set())  # asleep until the safety look
    query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")

    async def gone() -> bool:
        tasks = [each for each in asyncio.all_tasks() if "txdeco" in each.get_name()]
        return not tasks and await probe.scalar(query, {"pid": pid}) == 0

    await until(lambda: not groups(engine))  # nothing is read any more: the poller lingers
    clock.advance(1.0)
    await clock.still(gone)


async def test_the_listener_ends_while_others_still_poll(
    engine: AsyncEngine, maker: Maker, order: int, clock: Clock
) -> None:
    """When nobody waits any more for a table that has the trigger its connection is given up, whoever else waits."""
    await write(maker, create_watch_sql(Order))
    await write(maker, "INSERT INTO \"user\" (id, name) VALUES (1, 'me')")
    async with maker() as one, maker() as two, in_background(engine, wait_for_row_change(one, User, 1, interval=0.05)):
        async with in_background(engine, wait_for_row_change(two, Order, order)):
            await until(lambda: any(group.hints.live for group in groups(engine)))
            assert len(listeners(engine)) == 1
        clock.advance(1.0)
        await until(lambda: not listeners(engine))
        async with in_background(engine, wait_for_row_change(two, Order, order)):
            await until(lambda: any(group.hints.live for group in groups(engine)))  # and there is another when needed


async def test_a_listener_that_cannot_connect_ends_while_others_still_poll(
    engine: AsyncEngine, maker: Maker, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not try for ever when nobody needs it any more."""

    async def refuse(self: Listener) -> None:
        raise ConnectionError("not now")

    monkeypatch.setattr(Listener, "_connect", refuse)
    await write(maker, create_watch_sql(Order))
    await write(maker, "INSERT INTO \"user\" (id, name) VALUES (1, 'me')")
    async with maker() as one, maker() as two, in_background(engine, wait_for_row_change(one, User, 1, interval=0.05)):
        async with in_background(engine, wait_for_row_change(two, Order, order, interval=0.05)):
            await until(lambda: listeners(engine) and listeners(engine)[0]._failures)
        await until(lambda: not listeners(engine))


async def test_a_listener_that_rests_ends_with_its_last_waiter_while_others_still_poll(
    engine: AsyncEngine, maker: Maker, order: int, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """It does not stay for the next attempt, half a minute later, when nobody needs it any more."""

    async def refuse(self: Listener) -> None:
        self._failures = 100
        raise ConnectionError("not now")

    monkeypatch.setattr(Listener, "_connect", refuse)
    await write(maker, create_watch_sql(Order))
    await write(maker, "INSERT INTO \"user\" (id, name) VALUES (1, 'me')")
    async with maker() as one, maker() as two, in_background(engine, wait_for_row_change(one, User, 1)):
        async with in_background(engine, wait_for_row_change(two, Order, order)):
            await until(lambda: listeners(engine) and listeners(engine)[0]._failures)
        await clock.still(lambda: not listeners(engine))


async def test_a_listener_that_nobody_needs_any_more_takes_no_pooled_connection(
    engine: AsyncEngine, maker: Maker, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the last waiter leaves before the listener has proved that it hears itself, it ends without the proof."""
    await write(maker, create_watch_sql(Order))
    prove, connected, go_on = Listener._hear_itself, asyncio.Event(), asyncio.Event()

    async def late(self: Listener) -> None:
        connected.set()
        await go_on.wait()
        await prove(self)

    monkeypatch.setattr(Listener, "_hear_itself", late)
    async with maker() as session, in_background(engine, wait_for_row_change(session, Order, order)):
        await connected.wait()
        [listener] = listeners(engine)
    await until(lambda: not groups(engine))
    taken = Checkouts(engine)
    go_on.set()
    await asyncio.wait((listener._task,), timeout=5)
    assert listener._task.done()
    assert not taken


async def test_a_read_for_nobody_takes_no_connection(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """Whoever wanted the row may leave before the read begins, even one that was to be of all rows."""
    async with maker() as session, in_background(engine, wait_for_row_change(session, Order, order)):
        [group] = groups(engine)
    taken = Checkouts(engine)
    group.hints.confirming = True
    await group.read()
    assert not taken


async def test_a_read_that_had_to_wait_for_its_connection_sends_nothing_for_nobody(
    make_engine: Any, order: int
) -> None:
    """The connection goes back as it is when the waiter has left meanwhile."""
    narrow = make_engine(pool_size=1, max_overflow=0)
    async with async_sessionmaker(narrow)() as session:
        async with narrow.connect():
            task = asyncio.ensure_future(wait_for_row_change(session, Order, order))
            await until(lambda: any(each.reading for each in groups(narrow)))
            [group] = groups(narrow)
            task.cancel()
            await asyncio.wait((task,))
            seen = Statements(narrow)
        await until(lambda: not group.reading)
        assert not seen


async def test_an_iteration_that_is_left_early_is_forgotten(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """Closing the generator takes its waiter out, also when it is waiting for nothing at the time."""
    async with maker() as session:
        async with aclosing(row_changes(session, Order, order, interval=0.05)) as changes:
            async with in_background(engine, anext(changes)) as [task]:
                await write(maker, "UPDATE \"order\" SET status = 'paid' WHERE id = 1")
                await task
            assert waiting(engine) == 1
        assert waiting(engine) == 0


async def test_an_iteration_that_is_dropped_is_forgotten(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """The event loop closes a generator that nobody refers to any more."""
    async with maker() as session:
        changes = row_changes(session, Order, order, interval=0.05)
        async with in_background(engine, anext(changes)) as [task]:
            await write(maker, "UPDATE \"order\" SET status = 'paid' WHERE id = 1")
            await task
        del changes, task
        gc.collect()
        await until(lambda: waiting(engine) == 0)


@pytest.mark.parametrize(
    ("ends", "push"),
    [
        ("cancelled by asyncio.run", True),
        ("exits", True),
        ("lingering", True),
        ("disposed of", True),
        ("cancelled by asyncio.run", False),
        ("disposed of", False),
    ],
)
async def test_an_interpreter_that_exits_says_nothing(
    maker: Maker, database: str, schema: str, order: int, ends: str, *, push: bool
) -> None:
    """Whether the program ends with waiters, through sys.exit, or right after the last: nothing on stderr."""
    if push:
        await write(maker, create_watch_sql(Order))
    program = f"""
        import asyncio, sys
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
        from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
        from txdeco.watching import poller, wait_for_row_change

        class Base(DeclarativeBase): ...
        class Order(Base):
            __tablename__ = "order"
            id: Mapped[int] = mapped_column(primary_key=True)
            status: Mapped[str]

        async def main():
            settings = {{"search_path": {schema!r}, "application_name": {schema!r}}}
            engine = create_async_engine({database!r}, connect_args={{"server_settings": settings}})
            session = async_sessionmaker(engine)()
            async def wait():
                try:
                    await wait_for_row_change(session, Order, {order}, interval=0.05, timeout=0.5 if lingers else None)
                except TimeoutError:
                    pass
            lingers = {ends in {"lingering", "disposed of"}}
            asyncio.get_running_loop().slow_callback_duration = 60
            task = asyncio.ensure_future(wait())
            def ready():
                found = [each for loops in poller._pollers.values() for each in loops.values()]
                groups = [group for each in found for group in each.groups.values()]
                return groups and all(group.hints.live is {push} and group.reads for group in groups)
            while not ready() and not task.done():
                await asyncio.sleep(0.01)
            if {ends == "exits"}:
                sys.exit(3)
            if lingers:
                await task
            if {ends == "disposed of"}:
                await session.close()
                await engine.dispose()  # while poller and listener are still there

        asyncio.run(main())
    """
    quiet = [] if ends == "disposed of" else ["-W", "ignore::ResourceWarning"]  # a pool that nobody disposed of
    arguments = [sys.executable, "-X", "dev", *quiet, "-c", textwrap.dedent(program)]
    ended = await asyncio.to_thread(subprocess.run, arguments, capture_output=True, text=True, timeout=20, check=False)
    assert (ended.stderr, ended.stdout) == ("", "")
    assert ended.returncode == (3 if ends == "exits" else 0)


async def _dispose(engine: AsyncEngine) -> None:
    [poller] = pollers(engine)
    await engine.dispose()
    await asyncio.wait({poller._task})  # nothing that it does on its way out comes any more


async def _run(wait: CancelledAt) -> Any:
    return await wait


async def _change_once_it_waits(engine: AsyncEngine, maker: Maker) -> None:
    await until(lambda: any(waiter.baseline is not None for each in pollers(engine) for waiter in each._waiters()))
    await write(maker, 'UPDATE "order" SET total = total + 1 WHERE id = 1')

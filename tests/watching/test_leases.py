"""Writers are disturbed while somebody waits, and not for longer; nothing about it can be forgotten or misused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Column, Integer, Table, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase

from support.clock import Clock
from support.models import Order
from support.waiting import until
from support.watched import groups, in_background, listeners, live, write
from txdeco.watching import create_watch_sql, listener, wait_for_row_change
from txdeco.watching.ddl import WatchDDL

Maker = async_sessionmaker[AsyncSession]
NEVER = 3600
UPDATE = 'UPDATE "order" SET total = total + 1'
DISTURBED = "SELECT pg_sequence_last_value('{}'::regclass) IS NULL"


@pytest.fixture
def names(order: int) -> WatchDDL:
    """What the trigger on `Order` is made of."""
    return WatchDDL(Order.__table__, {})  # type: ignore[arg-type]


@pytest.fixture
async def writer(maker: Maker, names: WatchDDL) -> AsyncIterator[AsyncSession]:
    """Somebody who writes to a table with the trigger, for whom nobody has ever waited."""
    await write(maker, create_watch_sql(Order))
    async with maker() as session:
        yield session


async def _disturbed(session: AsyncSession, names: WatchDDL) -> bool:
    """Tell whether writers call the function of the trigger."""
    return bool(await session.scalar(text(DISTURBED.format(names.lease))))


async def test_the_first_writer_after_a_lease_ends_what_is_left_of_it(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """Those after it see at a glance that nobody waits, whether its transaction is committed or not."""
    await write(maker, f"SELECT {names.wake}(-30)")
    assert await _disturbed(writer, names)
    await writer.execute(text(UPDATE))
    await writer.rollback()
    assert not await _disturbed(writer, names)
    await write(maker, f"SELECT {names.wake}(30)")
    assert await _disturbed(writer, names)


async def test_a_writer_that_ends_a_lease_keeps_nobody_from_beginning_one(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """However long its transaction goes on, it holds no lock that waiters need, and it does not notify."""
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) == 0
    async with maker.begin() as waiter:
        await waiter.execute(text("SET LOCAL lock_timeout = 100"))
        await waiter.execute(text(f"SELECT {names.wake}(30)"))
        await writer.execute(text(UPDATE))  # nor does it wait for them
        assert await _disturbed(writer, names)
    await writer.commit()


async def test_a_lease_that_is_just_being_renewed_is_left_alone(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """A writer that found the lease over does not end the one that a waiter has begun by then."""
    async with maker() as waiter:
        await waiter.execute(text(f"SELECT {names.wake}(-30)"))  # it holds what keeps writers from the lease
        await writer.execute(text(UPDATE))
        await writer.commit()
        assert await _disturbed(writer, names)
        await waiter.commit()
    await writer.commit()
    await writer.execute(text(UPDATE))
    assert not await _disturbed(writer, names)


async def test_a_session_that_knows_of_a_lease_looks_again_once_that_ends(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """Looking costs more than notifying once too often."""
    mark = names.channel.removeprefix("txdeco_")
    await write(maker, f"SELECT {names.wake}(30)")
    await writer.execute(text(UPDATE))
    await writer.commit()
    until = await writer.scalar(text(f"SELECT current_setting('txdeco.ends_{mark}')"))
    assert until == str(await writer.scalar(text(f"SELECT last_value FROM {names.lease}")))
    await write(maker, f"SELECT {names.wake}(-30)")
    await writer.execute(text(UPDATE))
    assert await _disturbed(writer, names)
    await writer.rollback()
    await writer.execute(text(f"SELECT set_config('txdeco.ends_{mark}', '1', true)"))  # time passes
    await writer.execute(text(UPDATE))
    assert not await _disturbed(writer, names)


async def test_a_transaction_that_found_no_lease_does_not_look_again(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """Whoever begins to wait later waits for its end anyway."""
    await writer.execute(text(UPDATE))
    await write(maker, f"SELECT {names.wake}(30)")
    mark = f"txdeco.sent_{names.channel.removeprefix('txdeco_')}"
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text(f"SELECT current_setting('{mark}')")) == "-1"
    await writer.commit()
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text(f"SELECT current_setting('{mark}')")) == "1"


async def test_the_last_value_of_the_writer_is_its_own(maker: Maker, writer: AsyncSession) -> None:
    """`lastval()` is of a sequence that the writer itself has called."""
    await writer.execute(text("CREATE TEMPORARY SEQUENCE mine START 4711"))
    await writer.scalar(text("SELECT nextval('mine')"))
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text("SELECT lastval()")) == 4711


async def test_the_trigger_runs_nothing_of_the_writers(
    writer: AsyncSession, probe: AsyncConnection, schema: str, names: WatchDDL
) -> None:
    """It runs as the owner of the table, so a writer must not be able to slip it an operator."""
    await probe.exec_driver_sql(f'CREATE SCHEMA "{schema}_evil"')
    try:
        for left, right in (("integer", "integer"), ("bigint", "double precision"), ("text", "text")):
            await probe.exec_driver_sql(
                f'CREATE FUNCTION "{schema}_evil".slip({left}, {right}) RETURNS boolean LANGUAGE plpgsql'
                " AS $$ BEGIN RAISE EXCEPTION 'slipped in'; END $$"
            )
            for operator in ("<", "="):
                await probe.exec_driver_sql(
                    f'CREATE OPERATOR "{schema}_evil".{operator}'
                    f' (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = "{schema}_evil".slip)'
                )
        await writer.execute(text(f'SET LOCAL search_path = "{schema}_evil", "{schema}", pg_catalog'))
        with pytest.raises(Exception, match="slipped in"):
            async with writer.begin_nested():
                await writer.scalar(text("SELECT 1 < 2"))
        await writer.execute(text(UPDATE))
        await writer.commit()
        assert not await _disturbed(writer, names)
    finally:
        await writer.rollback()
        await probe.exec_driver_sql(f'DROP SCHEMA "{schema}_evil" CASCADE')


async def test_a_lease_is_found_under_another_name(maker: Maker, writer: AsyncSession, names: WatchDDL) -> None:
    """What was renamed since is still the lease of this trigger."""
    await write(maker, f"ALTER SEQUENCE {names.lease} RENAME TO elsewhere")
    await writer.execute(text(UPDATE))
    assert not await writer.scalar(text(DISTURBED.format("elsewhere")))


async def test_a_writer_with_an_old_snapshot_is_not_harmed(
    maker: Maker, order: int, names: WatchDDL, engine: AsyncEngine
) -> None:
    """It does not see the trigger in the catalog that it fires, and notifies: better once too often."""
    async with AsyncSession(engine.execution_options(isolation_level="REPEATABLE READ")) as writer:
        await writer.execute(text("SELECT 1"))
        await write(maker, create_watch_sql(Order))
        await writer.execute(text(UPDATE))
        await writer.commit()
    async with maker() as session:
        assert await _disturbed(session, names)


async def test_partitions_end_the_lease_of_their_table(maker: Maker) -> None:
    """A trigger that a partition has from its table depends on the same lease."""

    class Parted(DeclarativeBase):
        __abstract__ = True

    table = Table("parted", Parted.metadata, Column("id", Integer, primary_key=True))
    await write(maker, "CREATE TABLE parted (id integer PRIMARY KEY) PARTITION BY RANGE (id)")
    await write(maker, "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    await write(maker, create_watch_sql(type("Row", (Parted,), {"__table__": table})))
    await write(maker, "INSERT INTO parted VALUES (1)")
    async with maker() as session:
        names = WatchDDL(table, {})
        assert await _disturbed(session, names)
        await session.execute(text("UPDATE parted SET id = 2"))
        assert not await _disturbed(session, names)


async def test_a_lease_that_another_began_again_is_not_taken_for_unbroken(
    engine: AsyncEngine,
    maker: Maker,
    writer: AsyncSession,
    names: WatchDDL,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a stop of longer than its lease a process looks again, though somebody else keeps the lease by then."""
    monkeypatch.setattr(listener, "RENEW", 3600)
    async with (
        maker() as session,
        in_background(engine, wait_for_row_change(session, Order, 1, interval=2 * NEVER)) as [task],
    ):
        await until(lambda: live(engine))
        await write(maker, f"SELECT setval('{names.lease}', 1)")  # the lease ended
        await writer.execute(text(UPDATE))
        await writer.commit()
        await write(maker, f"SELECT {names.wake}(30)")  # another process begins to wait
        [group] = groups(engine)
        reads = group.reads
        clock.advance(listener.LEASE)
        listeners(engine)[0]._wakeup.set()
        assert (await asyncio.wait_for(task, 5)).total == 1
        assert group.reads > reads

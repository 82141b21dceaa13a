"""Writers are disturbed while somebody waits, and not for longer; nothing about it can be forgotten or misused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import Column, Integer, Table, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase

from support.clock import Clock
from support.models import Order
from support.waiting import pid_of, until
from support.watched import groups, in_background, listeners, live, write
from txdeco.watching import create_watch_sql, drop_watch_sql, listener, wait_for_row_change
from txdeco.watching.ddl import WatchDDL

Maker = async_sessionmaker[AsyncSession]
NEVER = 3600
UPDATE = 'UPDATE "order" SET total = total + 1'
NOTED = """SELECT current_setting('txdeco.{}_' || '"order"'::regclass::oid)"""
OVER = "SELECT setval('{}', 1, false)"
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


@pytest.fixture
async def stranger(probe: AsyncConnection, schema: str) -> AsyncIterator[str]:
    """A role that may see what is in the schema, and no more."""
    role = f"{schema}_stranger"
    await probe.exec_driver_sql(f'CREATE ROLE "{role}"')
    await probe.exec_driver_sql(f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}"')
    yield role
    await probe.exec_driver_sql(f'DROP OWNED BY "{role}"')
    await probe.exec_driver_sql(f'DROP ROLE "{role}"')


async def _disturbed(session: AsyncSession, names: WatchDDL) -> bool:
    """Tell whether writers call the function of the trigger."""
    return bool(await session.scalar(text(DISTURBED.format(names.lease))))


async def test_the_first_writer_after_a_lease_ends_what_is_left_of_it(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """Those after it see at a glance that nobody waits, whether its transaction is committed or not."""
    await write(maker, OVER.format(names.lease))
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
    held = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
    assert await writer.scalar(held) == 0
    async with maker.begin() as waiter:
        await waiter.execute(text("SET LOCAL lock_timeout = 100"))
        await waiter.execute(text(f"SELECT {names.wake}(30)"))
        assert await _disturbed(writer, names)
    await writer.commit()


async def test_a_lease_that_is_just_being_renewed_is_left_alone(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """A writer does not wait for whoever is about to begin to wait."""
    async with maker() as waiter:
        await waiter.execute(text(f"SELECT {names.wake}(30)"))  # it holds what keeps writers from the lease
        await write(maker, OVER.format(names.lease))
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
    await write(maker, f"SELECT {names.wake}(30)")
    await writer.execute(text(UPDATE))
    await writer.commit()
    assert await writer.scalar(text(NOTED.format("ends"))) == str(
        await writer.scalar(text(f"SELECT last_value FROM {names.lease}"))
    )
    await write(maker, OVER.format(names.lease))
    await writer.execute(text(UPDATE))
    assert await _disturbed(writer, names)
    await writer.rollback()
    await writer.execute(
        text("""SELECT set_config('txdeco.ends_' || '"order"'::regclass::oid, '1', true)""")
    )  # time passes
    await writer.execute(text(UPDATE))
    assert not await _disturbed(writer, names)


async def test_a_transaction_that_found_no_lease_does_not_look_again(
    maker: Maker, writer: AsyncSession, names: WatchDDL
) -> None:
    """Whoever begins to wait later waits for its end anyway."""
    await writer.execute(text(UPDATE))
    await write(maker, f"SELECT {names.wake}(30)")
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text(NOTED.format("sent"))) == "-1"
    await writer.commit()
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text(NOTED.format("sent"))) == "1"


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


async def test_a_trigger_of_somebody_else_touches_no_sequence_but_leases(
    maker: Maker, stranger: str, writer: AsyncSession, names: WatchDDL
) -> None:
    """Anybody may make a trigger that runs the function, and have it depend on a sequence of the function's owner."""
    await write(maker, "CREATE SEQUENCE invoice_number START 4711")
    await writer.execute(text(f'SET LOCAL ROLE "{stranger}"'))
    with pytest.raises(DBAPIError, match="permission denied"):
        async with writer.begin_nested():
            await writer.execute(text("SELECT setval('invoice_number', 1)"))
    await writer.execute(text("CREATE TEMPORARY TABLE mine ON COMMIT DROP AS SELECT 1 AS id"))
    await writer.execute(
        text(
            "CREATE TRIGGER mine AFTER UPDATE ON mine FOR EACH ROW WHEN ('invoice_number'::regclass IS NOT NULL)"
            f" EXECUTE FUNCTION {names.notify}('channel', '1')"
        )
    )
    await writer.execute(text("UPDATE mine SET id = 2"))
    await writer.execute(text("RESET ROLE"))
    assert await writer.scalar(text("SELECT last_value FROM invoice_number")) == 4711
    await writer.commit()


async def test_a_lease_that_the_trigger_may_not_use_goes_on(
    writer: AsyncSession, probe: AsyncConnection, schema: str, names: WatchDDL, stranger: str
) -> None:
    """A writer does not fail where function and lease have come to have different owners: it notifies."""
    await probe.exec_driver_sql(f'GRANT CREATE ON SCHEMA "{schema}" TO "{stranger}"')
    await writer.execute(text(f'ALTER FUNCTION {names.notify}() OWNER TO "{stranger}"'))
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text(NOTED.format("sent"))) == "1"
    await writer.rollback()


@pytest.mark.parametrize("before", ["nothing", "another"])
async def test_a_writer_with_an_old_snapshot_is_not_harmed(
    maker: Maker, order: int, names: WatchDDL, engine: AsyncEngine, before: str
) -> None:
    """It does not see in the catalog what it fires, and notifies: better once too often."""
    if before == "another":
        await write(maker, create_watch_sql(Order))
    async with AsyncSession(engine.execution_options(isolation_level="REPEATABLE READ")) as writer:
        await writer.execute(text("SELECT 1"))
        if before == "another":
            await write(maker, drop_watch_sql(Order))
        await write(maker, create_watch_sql(Order))
        await writer.execute(text(UPDATE))
        assert await writer.scalar(text(NOTED.format("sent"))) == "1"
        await writer.commit()


async def test_a_transaction_keeps_tables_of_one_name_apart(maker: Maker, writer: AsyncSession, schema: str) -> None:
    """With a schema a tenant, and the search_path to choose it, both tables are the same to the model."""
    await write(maker, f'CREATE SCHEMA "{schema}_b"')
    try:
        async with maker.begin() as other:
            await other.execute(text(f'SET LOCAL search_path = "{schema}_b"'))
            await other.execute(text(f'CREATE TABLE "order" (LIKE "{schema}"."order" INCLUDING ALL)'))
            await other.execute(text(f'INSERT INTO "order" SELECT * FROM "{schema}"."order"'))
            await other.execute(text(create_watch_sql(Order)))
        await writer.execute(text(UPDATE))  # nobody waits for the one
        await writer.execute(text(f'SET LOCAL search_path = "{schema}_b"'))
        await writer.execute(text(f"SELECT {WatchDDL(Order.__table__, {}).wake}(30)"))  # type: ignore[arg-type]
        await writer.execute(text(UPDATE))
        assert await writer.scalar(text(NOTED.format("sent"))) == "1"
        await writer.commit()
    finally:
        await writer.rollback()
        await write(maker, f'DROP SCHEMA "{schema}_b" CASCADE')


async def test_a_lease_that_begins_while_a_writer_ends_it_goes_on(
    maker: Maker, writer: AsyncSession, probe: AsyncConnection, names: WatchDDL
) -> None:
    """A writer that is stopped between its look and its turn looks again."""
    turn = "IF pg_catalog.pg_try_advisory_xact_lock"
    source = str(await writer.scalar(text(f"SELECT pg_get_functiondef('{names.notify}()'::regprocedure)")))
    await writer.commit()
    assert turn in source
    stopping = source.replace(turn, f"PERFORM pg_catalog.pg_advisory_xact_lock(4711, 42); {turn}")
    async with maker() as holder:
        await (await holder.connection()).exec_driver_sql(stopping)
        await holder.commit()
        await holder.execute(text("SELECT pg_advisory_xact_lock(4711, 42)"))
        pid = await pid_of(writer)
        writing = asyncio.create_task(writer.execute(text(UPDATE)))
        waits = text("SELECT count(*) FROM pg_locks WHERE pid = :pid AND locktype = 'advisory' AND NOT granted")
        await until(lambda: probe.scalar(waits, {"pid": pid}))
        await write(maker, f"SELECT {names.wake}(30)")
        await holder.commit()
        await writing
        await writer.commit()
    assert await _disturbed(writer, names)
    assert await writer.scalar(text(f"SELECT {names.awake}()"))


async def test_a_lease_is_awake_for_as_long_as_it_goes_on(maker: Maker, writer: AsyncSession, names: WatchDDL) -> None:
    """It has not ended by time, and no writer has ended it; nobody can make it shorter."""
    awake = text(f"SELECT {names.awake}()")
    assert not await writer.scalar(awake)
    await write(maker, f"SELECT {names.wake}(30)")
    await write(maker, f"SELECT {names.wake}(-60)")
    assert await writer.scalar(awake)
    await write(maker, f"SELECT setval('{names.lease}', 99999999999)")
    assert not await writer.scalar(awake)


async def test_a_writer_that_may_not_read_the_lease_ends_it_once(
    maker: Maker, stranger: str, writer: AsyncSession, probe: AsyncConnection, schema: str, names: WatchDDL
) -> None:
    """It calls the function each time, which then sees that there is nothing to end."""
    await probe.exec_driver_sql(f'GRANT SELECT, UPDATE ON "{schema}"."order" TO "{stranger}"')
    await write(maker, f"REVOKE ALL ON SEQUENCE {names.lease} FROM PUBLIC")
    await write(maker, f"SELECT setval('{names.lease}', 2)")
    await writer.execute(text(f'SET LOCAL ROLE "{stranger}"'))
    await writer.execute(text(UPDATE))
    assert await writer.scalar(text(NOTED.format("sent"))) == "-1"
    await writer.commit()
    assert await writer.scalar(text(f"SELECT last_value FROM {names.lease}")) == 2


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

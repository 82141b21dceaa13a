"""The trigger's DDL: what it is installed on, by whom, and how it goes away again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import DDL, BigInteger, ForeignKey, String, Text, event, text
from sqlalchemy.dialects.postgresql import BIT
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from support.models import Order
from support.waiting import pid_of, until
from support.watched import groups, in_background, listeners, live, write
from txdeco.errors import MisuseError
from txdeco.watching import create_watch_sql, drop_watch_sql, notify_on_change, wait_for_row_change
from txdeco.watching.ddl import WatchDDL

Maker = async_sessionmaker[AsyncSession]
NEVER = 3600
LEFT = text(
    """
    SELECT relname::text FROM pg_class WHERE relnamespace = CAST(:schema AS regnamespace) AND relname LIKE 'txdeco%'
    UNION ALL SELECT proname::text FROM pg_proc WHERE pronamespace = CAST(:schema AS regnamespace)
    UNION ALL SELECT tgname::text FROM pg_trigger JOIN pg_class c ON c.oid = tgrelid
               WHERE c.relnamespace = CAST(:schema AS regnamespace)
    """
)


class Base(DeclarativeBase):
    """Tables with everything that makes their names and keys awkward."""


# SQLAlchemy 2.0 itself cannot write to a column with the longer name
HOSTILE = "No:te %s" if sqlalchemy.__version__.startswith("2.0.") else "No:te %(x)s"


class Ticket(Base):
    """A composite key, its columns in another order than the key; quoted and hostile names."""

    __tablename__ = 'Ticket "x"; :no %s \\ $$'

    note: Mapped[str | None] = mapped_column(HOSTILE, Text)
    seat: Mapped[str] = mapped_column('se"at', String(5), primary_key=True)
    show: Mapped[int] = mapped_column("Show", BigInteger, primary_key=True)


class Event(Base):
    """A partitioned table."""

    __tablename__ = "event"
    __table_args__ = {"postgresql_partition_by": "RANGE (day)"}  # noqa: RUF012

    id: Mapped[int] = mapped_column(primary_key=True)
    day: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


event.listen(
    Event.__table__,
    "after_create",
    DDL(
        "DO $$ BEGIN CREATE TABLE event_early (name varchar NOT NULL, id int NOT NULL, day int NOT NULL);"
        " ALTER TABLE event ATTACH PARTITION event_early FOR VALUES FROM (0) TO (100);"
        " CREATE TABLE event_late PARTITION OF event FOR VALUES FROM (100) TO (200); END $$"
    ),
)


class Person(Base):
    """The base of a joined inheritance."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    name: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "person"}  # noqa: RUF012


class Clerk(Person):
    """A person with a second table."""

    __tablename__ = "clerk"

    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    desk: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "clerk"}  # noqa: RUF012


for model in (Ticket, Event, Clerk):
    notify_on_change(model)


@pytest.fixture
async def created(engine: AsyncEngine) -> AsyncEngine:
    """The engine, with the tables and their triggers made by create_all."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    return engine


async def test_drop_all_removes_what_create_all_has_made(created: AsyncEngine, schema: str) -> None:
    """Functions, sequences and triggers come and go with their tables."""
    async with created.connect() as connection:
        assert len((await connection.execute(LEFT, {"schema": schema})).all()) >= 4 * 6
        await connection.run_sync(Base.metadata.drop_all)
        left = (await connection.execute(LEFT, {"schema": schema})).scalars().all()
        assert [each for each in left if not each.startswith("RI_")] == []


async def test_the_sql_can_be_run_twice(engine: AsyncEngine, maker: Maker, order: int, schema: str) -> None:
    """Creating twice leaves one working trigger; dropping twice leaves nothing at all."""
    for columns in (None, ["status"]):
        await write(maker, create_watch_sql(Order, columns=columns))
    async with (
        maker() as session,
        in_background(engine, wait_for_row_change(session, Order, 1, columns=["status"], interval=NEVER)) as [task],
    ):
        await until(lambda: live(engine))
        await write(maker, "UPDATE \"order\" SET status = 'paid'")
        await asyncio.wait_for(task, 5)
    for _ in range(2):
        await write(maker, drop_watch_sql(Order))
    async with maker() as session:
        left = (await session.execute(LEFT, {"schema": schema})).scalars().all()
        assert [each for each in left if not each.startswith("RI_")] == []


async def test_composite_and_quoted_names_work(created: AsyncEngine, maker: Maker) -> None:
    """Names with quotes, colons, percent signs and dollars are names; keys longer than their column find nobody."""
    async with maker.begin() as session:
        session.add_all([Ticket(show=1, seat="A1"), Ticket(show=2, seat="A1"), Ticket(show=2, seat="12345")])
    async with (
        maker() as session,
        in_background(created, wait_for_row_change(session, Ticket, ("A1", 2), interval=NEVER)) as [task],
    ):
        await until(lambda: live(created))
        async with maker.begin() as writer:
            (await writer.get_one(Ticket, ("A1", 1))).note = "no"
        async with maker.begin() as writer:
            (await writer.get_one(Ticket, {"show": 2, "seat": "A1"})).note = "yes"
        changed = await asyncio.wait_for(task, 5)
        assert (changed.show, changed.note) == (2, "yes")
        with pytest.raises(LookupError, match="not found"):
            await wait_for_row_change(session, Ticket, ("123456", 2))


async def test_partitions_notify_for_their_table(created: AsyncEngine, maker: Maker) -> None:
    """Rows in partitions with another column order, and rows that move to another partition."""
    async with maker.begin() as session:
        session.add_all([Event(id=1, day=1, name="a"), Event(id=2, day=150, name="b")])
    for key, statement in (
        ((1, 1), "UPDATE event SET name = 'c' WHERE id = 1"),
        ((2, 150), "UPDATE event_late SET name = 'd' WHERE id = 2"),
    ):
        async with (
            maker() as session,
            in_background(created, wait_for_row_change(session, Event, key, interval=NEVER)) as [task],
        ):
            await until(lambda: live(created))
            await write(maker, statement)
            assert (await asyncio.wait_for(task, 5)).name in {"c", "d"}
    async with (
        maker() as session,
        in_background(created, wait_for_row_change(session, Event, (2, 150), interval=NEVER)) as [task],
    ):
        await until(lambda: live(created))
        await write(maker, "UPDATE event SET day = 50 WHERE id = 2")
        with pytest.raises(LookupError, match="was deleted"):
            await asyncio.wait_for(task, 5)


@pytest.mark.parametrize("statement", ["UPDATE person SET name = 'x'", "UPDATE clerk SET desk = 'x'"])
async def test_joined_inheritance_is_watched_in_all_its_tables(
    created: AsyncEngine, maker: Maker, statement: str
) -> None:
    """A change in the table of the base wakes as well as one in the table of the class."""
    async with maker.begin() as session:
        session.add(Clerk(id=1, name="me", desk="left"))
    async with (
        maker() as session,
        in_background(created, wait_for_row_change(session, Clerk, 1, interval=NEVER)) as [task],
    ):
        await until(lambda: live(created))
        await write(maker, statement)
        changed = await asyncio.wait_for(task, 5)
        assert "x" in {changed.name, changed.desk}


async def test_a_writer_between_the_leases_of_two_tables_is_not_missed(
    created: AsyncEngine, maker: Maker, probe: AsyncConnection
) -> None:
    """Leases of several tables begin one after the other: who found the second asleep is waited for as well."""
    async with maker.begin() as session:
        session.add(Clerk(id=1, name="me", desk="left"))
    second = max((WatchDDL(each, {}) for each in (Person.__table__, Clerk.__table__)), key=lambda each: each.channel)  # type: ignore[arg-type]
    async with maker() as holder, maker() as writer, maker() as session:
        await holder.execute(text(f"SELECT pg_advisory_xact_lock({second.seed})"))
        async with in_background(created, wait_for_row_change(session, Clerk, 1, interval=NEVER)) as [task]:
            pid = await pid_of(holder)
            stuck = text("SELECT count(*) FROM pg_locks WHERE :pid = ANY (pg_blocking_pids(pid))")
            await until(lambda: probe.scalar(stuck, {"pid": pid}))
            column = "name" if second.table == "person" else "desk"
            await writer.execute(text(f"UPDATE {second.table} SET {column} = 'x'"))
            await holder.commit()
            leases = listeners(created)[0]._leases
            await until(lambda: live(created) or any(horizon is not None for horizon in leases.values()))
            assert not live(created)
            await writer.commit()
            changed = await asyncio.wait_for(task, 5)
            assert "x" in {changed.name, changed.desk}


async def test_a_class_is_polled_where_one_of_its_tables_lacks_the_trigger(created: AsyncEngine, maker: Maker) -> None:
    """Push is relied on only where no change of the row can go without a hint."""
    async with maker.begin() as session:
        session.add(Clerk(id=1, name="me", desk="left"))
    await write(maker, "DROP TRIGGER txdeco_watch ON clerk")
    async with (
        maker() as session,
        in_background(created, wait_for_row_change(session, Clerk, 1, interval=0.05)) as [task],
    ):
        assert not groups(created)[0].hints.watches
        await write(maker, "UPDATE clerk SET desk = 'x'")
        assert (await asyncio.wait_for(task, 5)).desk == "x"


async def test_create_all_installs_it_in_the_schema_of_the_tenant(
    engine: AsyncEngine, maker: Maker, schema: str
) -> None:
    """With a schema_translate_map the functions and the sequence are where the table is."""
    tenant = f"{schema}_tenant"
    await write(maker, f'CREATE SCHEMA "{tenant}"')
    translated = engine.execution_options(schema_translate_map={None: tenant})
    try:
        async with translated.begin() as connection:
            await connection.run_sync(Person.__table__.create)
        await write(maker, f"INSERT INTO \"{tenant}\".person VALUES (1, 'person', 'a')")
        async with (
            AsyncSession(translated) as session,
            in_background(engine, wait_for_row_change(session, Person, 1, interval=NEVER)) as [task],
        ):
            await until(lambda: live(engine))
            await write(maker, f"UPDATE \"{tenant}\".person SET name = 'b'")
            assert (await asyncio.wait_for(task, 5)).name == "b"
        async with translated.begin() as connection:
            await connection.run_sync(Person.__table__.drop)
        async with maker() as session:
            assert (await session.execute(LEFT, {"schema": tenant})).all() == []
    finally:
        await write(maker, f'DROP SCHEMA "{tenant}" CASCADE')


async def test_a_table_with_heirs_is_polled(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """Triggers do not fire for rows of tables that inherit with INHERITS, which the table shows all the same."""
    await write(maker, create_watch_sql(Order))
    await write(maker, 'CREATE TABLE heir () INHERITS ("order")')
    await write(maker, "INSERT INTO heir (id, status, total) VALUES (2, 'new', 0)")
    async with (
        maker() as session,
        in_background(engine, wait_for_row_change(session, Order, 2, interval=0.05)) as [task],
    ):
        assert not live(engine)
        await write(maker, "UPDATE heir SET status = 'paid'")
        assert (await asyncio.wait_for(task, 5)).status == "paid"


async def test_only_tables_can_have_the_trigger() -> None:
    """What is mapped to a query, or not mapped at all, is `MisuseError`, and so is a column that is not there."""
    with pytest.raises(MisuseError, match="Its columns are"):
        create_watch_sql(Order, columns=["colour"])
    with pytest.raises(MisuseError, match="columns is empty"):
        notify_on_change(Order, columns=[])
    with pytest.raises(MisuseError, match="not a mapped class"):
        drop_watch_sql(dict)


async def test_a_key_that_cannot_be_hashed_fails_when_it_is_installed(engine: AsyncEngine) -> None:
    """The migration fails, and not one day the writers."""

    class Bits(DeclarativeBase):
        pass

    class Flag(Bits):
        __tablename__ = "flag"
        id: Mapped[Any] = mapped_column(BIT(3), primary_key=True)

    async with engine.connect() as connection:
        await connection.run_sync(Bits.metadata.create_all)
        with pytest.raises(Exception, match="hash function"):
            await connection.exec_driver_sql(create_watch_sql(Flag))


async def test_a_schema_that_is_renamed_keeps_its_trigger(engine: AsyncEngine, maker: Maker, schema: str) -> None:
    """What the trigger refers to it refers to by identity: a writer never fails because something was renamed."""

    class Tenants(DeclarativeBase):
        pass

    class Item(Tenants):
        __tablename__ = "item"
        __table_args__ = {"schema": f"{schema}_old"}  # noqa: RUF012
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    await write(maker, f'CREATE SCHEMA "{schema}_old"')
    async with engine.begin() as connection:
        await connection.run_sync(Tenants.metadata.create_all)
        await connection.exec_driver_sql(create_watch_sql(Item))
    await write(maker, f"INSERT INTO \"{schema}_old\".item VALUES (1, 'a')")
    await write(maker, f'ALTER SCHEMA "{schema}_old" RENAME TO "{schema}_new"')
    moved = engine.execution_options(schema_translate_map={f"{schema}_old": f"{schema}_new"})
    try:
        async with (
            AsyncSession(moved) as session,
            in_background(engine, wait_for_row_change(session, Item, 1, interval=NEVER)) as [task],
        ):
            await until(lambda: live(engine))
            await write(maker, f"UPDATE \"{schema}_new\".item SET name = 'b'")
            assert (await asyncio.wait_for(task, 5)).name == "b"
    finally:
        await write(maker, f'DROP SCHEMA "{schema}_new" CASCADE')


async def test_other_databases_install_nothing(tmp_path: Path) -> None:
    """create_all on SQLite makes the tables, and waiters there poll."""

    class Lite(DeclarativeBase):
        pass

    class Thing(Lite):
        __tablename__ = "thing"
        id: Mapped[int] = mapped_column(primary_key=True)
        other: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    notify_on_change(Thing)
    notify_on_change(Thing, columns=["name"])
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/things.db")
    async with engine.begin() as connection:
        await connection.run_sync(Lite.metadata.create_all)
    maker = async_sessionmaker(engine)
    await write(maker, "INSERT INTO thing VALUES (1, 2, 'a')")
    async with (
        maker() as session,
        in_background(engine, wait_for_row_change(session, Thing, (1, 2), interval=0.05)) as [task],
    ):
        await write(maker, "UPDATE thing SET name = 'b'")
        assert (await task).name == "b"
        with pytest.raises(LookupError, match="not found"):
            await wait_for_row_change(session, Thing, (1, 3))
    await engine.dispose()

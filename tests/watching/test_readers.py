"""Who reads what: tenants, row-level security, test sessions, and what the caller's session has open."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import Any

import pytest
from sqlalchemy import Connection, event, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, with_loader_criteria

from support.models import Order
from support.waiting import until
from support.watched import Statements, groups, in_background, pollers, waiting, write
from txdeco import INJECTED, current_session, get_transaction, transactional, waits_for_row_change
from txdeco.errors import MisuseError, RowChangeTimeoutError, RowNotFoundError
from txdeco.testing import rolled_back_session
from txdeco.watching import row_changes, wait_for_row_change

Maker = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    """Tables of tenants."""


class Item(Base):
    """A row in the schema of a tenant."""

    __tablename__ = "item"
    __table_args__ = {"schema": "tenant"}  # noqa: RUF012
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


@pytest.fixture
async def tenants(engine: AsyncEngine, maker: Maker, schema: str) -> object:
    """The schemas of two tenants, each with item 1."""
    names = [f"{schema}_a", f"{schema}_b"]
    for name in names:
        await write(maker, f'CREATE SCHEMA "{name}"')
        await write(maker, f'CREATE TABLE "{name}".item (id int PRIMARY KEY, name varchar NOT NULL)')
        await write(maker, f"INSERT INTO \"{name}\".item VALUES (1, '{name}')")
    yield names
    for name in names:
        await write(maker, f'DROP SCHEMA "{name}" CASCADE')


async def test_tenants_by_translate_map_see_their_own_rows(
    engine: AsyncEngine, maker: Maker, tenants: list[str]
) -> None:
    """Waiters share a statement only with those who would read the same schema, however the map was given."""
    first, second = ({"tenant": name} for name in tenants)
    one = AsyncSession(engine.execution_options(schema_translate_map=first))
    two = AsyncSession(engine.execution_options(schema_translate_map=second))
    three = AsyncSession(engine.execution_options(schema_translate_map=dict(second)))
    four = AsyncSession(engine)
    await four.connection(execution_options={"schema_translate_map": second})
    sessions = [one, two, three, four]
    waits = [wait_for_row_change(each, Item, 1, interval=0.05) for each in sessions]
    async with in_background(engine, *waits) as tasks:
        assert len(groups(engine)) == 2
        await write(maker, f"UPDATE \"{tenants[1]}\".item SET name = 'x'")
        assert [(await task).name for task in tasks[1:]] == ["x"] * 3
        assert not tasks[0].done()
    for session in sessions:
        await session.close()


@pytest.fixture
async def secured(engine: AsyncEngine, maker: Maker, probe: AsyncConnection, schema: str, order: int) -> object:
    """Row-level security on the orders: a role sees those whose note is its tenant."""
    role = f"{schema}_app"
    await write(maker, "UPDATE \"order\" SET note = 'mine'")
    for statement in (
        f'CREATE ROLE "{role}"',
        f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}"',
        f'GRANT SELECT, UPDATE ON "{schema}"."order" TO "{role}"',
        f'ALTER TABLE "{schema}"."order" ENABLE ROW LEVEL SECURITY',
        f'CREATE POLICY tenant ON "{schema}"."order" USING (note = current_setting(\'app.tenant\', true))',
    ):
        await probe.exec_driver_sql(statement)
    yield role
    await probe.exec_driver_sql(f'DROP OWNED BY "{role}"')
    await probe.exec_driver_sql(f'DROP ROLE "{role}"')


@pytest.mark.parametrize("tenant", ["mine", "yours"])
async def test_row_level_security_holds_where_the_session_reads_itself(
    engine: AsyncEngine, maker: Maker, secured: str, tenant: str
) -> None:
    """With shared=False the settings of the session's own transactions apply to each look."""
    session = maker()

    @event.listens_for(session.sync_session, "after_begin")
    def become(session_: Session, transaction: object, connection: object) -> None:
        connection.exec_driver_sql(f'SET LOCAL ROLE "{secured}"')  # type: ignore[attr-defined]
        connection.exec_driver_sql(f"SET LOCAL app.tenant = '{tenant}'")  # type: ignore[attr-defined]

    wait = asyncio.ensure_future(wait_for_row_change(session, Order, 1, interval=0.05, shared=False))
    if tenant == "yours":
        with pytest.raises(RowNotFoundError):
            await wait
    else:
        looks = 0

        @event.listens_for(session.sync_session, "after_begin")
        def count(*_: object) -> None:
            nonlocal looks
            looks += 1

        await until(lambda: looks >= 2)
        await write(maker, "UPDATE \"order\" SET status = 'paid'")
        assert (await wait).status == "paid"
    await session.close()


@pytest.mark.parametrize(
    "become",
    ["SET LOCAL app.tenant = 'mine'", "SELECT set_config('app.tenant', 'mine', true)"],
    ids=["SET", "function"],
)
@pytest.mark.parametrize("shared", [True, False])
async def test_settings_of_an_event_do_not_keep_a_transaction_open(
    engine: AsyncEngine, maker: Maker, order: int, become: str, *, shared: bool
) -> None:
    """What `after_begin` sets is set again with the next transaction, so one that has only read is released."""
    begun: list[str] = []
    async with maker() as session:

        @event.listens_for(session.sync_session, "after_begin")
        def set_tenant(session_: Session, transaction: object, connection: Connection) -> None:
            connection.exec_driver_sql(become)
            begun.append(become)

        tenant = text("SELECT current_setting('app.tenant', true)")
        mine = await session.get_one(Order, order)
        assert await session.scalar(tenant) == "mine"
        looks = Statements(engine)
        wait = asyncio.ensure_future(wait_for_row_change(session, Order, order, interval=0.01, shared=shared))
        await until(lambda: len(looks) >= 8)
        if shared:
            assert not session.in_transaction()
            assert len(begun) == 1
        await write(maker, "UPDATE \"order\" SET status = 'paid'")
        assert await wait is mine
        assert not session.in_transaction()
        assert await session.scalar(tenant) == "mine"


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("call", ["wait", "iterate"])
async def test_a_session_that_cannot_see_changes_cannot_wait_for_them(
    engine: AsyncEngine, maker: Maker, order: int, isolation: str, call: str
) -> None:
    """With shared=False in a transaction of one snapshot that stays open the wait is refused before it begins."""
    async with maker() as session, get_transaction(session, isolation=isolation):
        with pytest.raises(MisuseError, match=rf"at {isolation} it never changes.*Wait before the transaction begins"):
            if call == "wait":
                await wait_for_row_change(session, Order, order, shared=False, timeout=5)
            else:
                await anext(row_changes(session, Order, order, shared=False, timeout=5))
        assert (await session.get_one(Order, order)).status == "new"  # the transaction goes on


async def sees_the_next_change(engine: AsyncEngine, maker: Maker, session: AsyncSession, order: int) -> None:
    """Change the row once *session* has looked at it itself for some time; see that it finds the change."""
    looks = Statements(engine)
    wait = asyncio.ensure_future(wait_for_row_change(session, Order, order, interval=0.01, shared=False))
    await until(lambda: sum("SELECT" in each for each in looks) >= 3)
    await write(maker, "UPDATE \"order\" SET status = 'paid'")
    assert (await wait).status == "paid"


async def test_a_session_that_stays_open_reads_itself_at_read_committed(
    engine: AsyncEngine, maker: Maker, order: int
) -> None:
    """With shared=False in a declared transaction each look sees what has been committed by then."""
    async with maker() as session, get_transaction(session):
        await sees_the_next_change(engine, maker, session, order)


async def test_a_session_of_snapshots_that_is_released_reads_itself(
    engine: AsyncEngine, maker: Maker, order: int
) -> None:
    """At REPEATABLE READ each look of a session that has only read has a transaction, and a snapshot, of its own."""
    async with AsyncSession(engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        await session.get_one(Order, order)
        await sees_the_next_change(engine, maker, session, order)


async def test_a_session_in_autocommit_reads_itself_whatever_the_default_isolation_is(
    make_engine: Any, maker: Maker, order: int
) -> None:
    """Where each statement is a transaction of its own each has a snapshot of its own."""
    snapshots = {"server_settings": {"default_transaction_isolation": "repeatable read"}}
    engine = make_engine(isolation_level="AUTOCOMMIT", connect_args=snapshots)
    async with AsyncSession(engine) as session, session.begin():
        looks = Statements(engine)
        wait = asyncio.ensure_future(wait_for_row_change(session, Order, order, interval=0.01, shared=False))
        await until(lambda: wait.done() or sum("SELECT" in each for each in looks) >= 3)
        await write(maker, "UPDATE \"order\" SET status = 'paid'")
        assert (await wait).status == "paid"


async def test_the_sessions_loader_criteria_apply_where_it_reads_itself(
    engine: AsyncEngine, maker: Maker, order: int
) -> None:
    """`with_loader_criteria` of the session's events hides rows from a wait with shared=False."""
    async with maker() as session:

        @event.listens_for(session.sync_session, "do_orm_execute")
        def hide(state: object) -> None:
            state.statement = state.statement.options(  # type: ignore[attr-defined]
                with_loader_criteria(Order, Order.status != "new")
            )

        with pytest.raises(RowNotFoundError):
            await wait_for_row_change(session, Order, order, shared=False)


async def test_a_session_on_a_connection_is_read_through_it(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """A rolled-back test session sees what its own transaction has written, and nobody else does."""
    async with engine.connect() as connection:
        outer = await connection.begin()
        bound = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
        async with bound() as session, bound() as writer:
            seen: list[str] = []
            changes = row_changes(session, Order, order, interval=0.01, timeout=5)

            async def consume() -> None:
                async for each in changes:
                    seen.append(each.status)

            task = asyncio.ensure_future(consume())
            for status in ("paid", "shipped"):
                await writer.execute(text('UPDATE "order" SET status = :status'), {"status": status})
                await writer.commit()
                await until(lambda status=status: status in seen)
            await writer.execute(text('DELETE FROM "order"'))
            await writer.commit()
            with pytest.raises(RowNotFoundError, match="was deleted"):
                await task
            assert waiting(engine) == 0
        await outer.rollback()
    async with maker() as session:
        assert (await session.get_one(Order, order)).status == "new"


async def test_reading_on_an_idle_connection_leaves_it_idle(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """A connection that was in no transaction before is in none afterwards; deadline and `since` hold there too."""
    async with engine.connect() as connection, AsyncSession(connection) as session:
        with pytest.raises(RowChangeTimeoutError):
            await wait_for_row_change(session, Order, order, interval=0.01, timeout=0.05)
        assert not connection.in_transaction()
        found = await wait_for_row_change(session, Order, order, since={"status": "paid"})
        assert found.status == "new"


async def test_waiting_inside_a_declared_scope_is_logged(
    engine: AsyncEngine, maker: Maker, order: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The transaction stays open, which is what the line says; the wait itself works."""
    async with maker() as session, get_transaction(session):
        await session.scalars(select(Order))
        async with in_background(engine, wait_for_row_change(session, Order, order, interval=0.05)) as [task]:
            assert session.in_transaction()
            await write(maker, "UPDATE \"order\" SET status = 'paid'")
            assert (await task).status == "paid"
    [line] = [each for each in caplog.records if each.name == "txdeco.watching"]
    assert line.levelno == logging.WARNING
    assert "keeps its transaction open" in line.getMessage()


async def test_a_transaction_that_has_written_stays_open(
    engine: AsyncEngine, maker: Maker, order: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller's own work is neither committed nor lost by a wait."""
    async with maker() as session:
        session.add(Order(id=2, status="mine"))
        await session.flush()
        async with in_background(engine, wait_for_row_change(session, Order, order, interval=0.05)) as [task]:
            await write(maker, "UPDATE \"order\" SET status = 'paid' WHERE id = 1")
            await task
        async with maker() as other:
            assert await other.get(Order, 2) is None
        await session.commit()
    assert "a transaction that has written" in caplog.text
    async with maker() as other:
        assert await other.get(Order, 2) is not None


async def test_what_is_ambient_in_the_first_waiter_stays_out_of_the_poller(
    engine: AsyncEngine, maker: Maker, order: int
) -> None:
    """The poller's task has a context of its own, so a session in use elsewhere is not kept or used by it."""
    contexts: list[contextvars.Context] = []
    marker = contextvars.ContextVar[str]("marker")

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def look(*_: object) -> None:
        contexts.append(contextvars.copy_context())

    async with maker() as session, get_transaction(session):
        marker.set("the caller's")
        assert current_session() is session
        async with in_background(engine, wait_for_row_change(session, Order, order, interval=0.05)):
            pass
    assert contexts
    assert all(marker not in each for each in contexts)


async def test_a_rolled_back_test_session_is_read_through(engine: AsyncEngine, maker: Maker, order: int) -> None:
    """In a user's test the wait sees what the test's services have written, which nobody else ever does."""

    @transactional(source=maker)
    async def pay(status: str) -> None:
        (await current_session().get_one(Order, order)).status = status

    @waits_for_row_change(Order, pk="key", into="order", interval=0.01, timeout=5, source=maker)
    async def follow(key: int, *, order: Order = INJECTED) -> str:
        return order.status

    async with rolled_back_session(maker) as session:
        await pay("paid")
        changed = await wait_for_row_change(session, Order, order, since={"status": "new"}, timeout=5)
        assert changed.status == "paid"
        looks = Statements(engine)
        following = asyncio.ensure_future(follow(order))
        await until(lambda: looks)
        await pay("shipped")
        assert await following == "shipped"
        assert not pollers(engine)
    async with maker() as other:
        assert (await other.get_one(Order, order)).status == "new"

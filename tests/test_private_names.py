"""What txdeco uses of others without being promised it: each private name still is, and does, what is relied on.

Where one of these fails after an upgrade, the code that uses the name has to find another way; `users_of` says which.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import greenlet
import pytest
import wrapt
from opentelemetry import trace
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import QueuePool
from starlette.requests import Request

import txdeco
from support.models import Order, User

Maker = async_sessionmaker[AsyncSession]
Test = TypeVar("Test", bound=Callable[..., Any])
PACKAGE = Path(txdeco.__file__).parent
TESTED: set[str] = set()


def relies_on(*names: str) -> Callable[[Test], Test]:
    """Say which private names of others a test is about."""
    TESTED.update(names)
    return lambda test: test


# Sessions -------------------------------------------------------------------------------------------------------------


@relies_on("_autobegin_t")
async def test_whatever_begins_a_transaction_asks_the_instance_to(maker: Maker) -> None:
    """What stands in the place of `Session._autobegin_t` is called by everything that a closed session must not do."""

    def refuse(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    uses: dict[str, Callable[[AsyncSession], Any]] = {
        "execute": lambda session: session.execute(text("SELECT 1")),
        "get": lambda session: session.get(User, 1),
        "connection": lambda session: session.connection(),
        "add": lambda session: session.run_sync(lambda sync: sync.add(User(name="late"))),
        "begin": lambda session: session.run_sync(lambda sync: sync.begin()),
        "begin_nested": lambda session: session.run_sync(lambda sync: sync.begin_nested()),
    }
    for use in uses.values():
        async with maker() as session:
            session.sync_session._autobegin_t = refuse  # type: ignore[assignment, method-assign]
            with pytest.raises(ZeroDivisionError):
                await use(session)
    async with maker() as session:
        session.add(User(name="late"))
        session.sync_session._autobegin_t = refuse  # type: ignore[assignment, method-assign]
        with pytest.raises(ZeroDivisionError):
            await session.flush()


@relies_on("_connection_for_bind")
async def test_whatever_is_sent_asks_the_instance_for_its_connection(maker: Maker) -> None:
    """What stands in the place of `Session._connection_for_bind` is called before anything but a flush is sent."""
    async with maker() as session:
        sync = session.sync_session
        await session.execute(text("SELECT 1"))

        def refuse(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        sync._connection_for_bind = refuse  # type: ignore[assignment, method-assign]
        for use in (lambda: session.execute(text("SELECT 1")), lambda: session.get(User, 1), session.connection):
            with pytest.raises(ZeroDivisionError):
                await use()


@relies_on("_close_state")
async def test_a_session_that_was_invalidated_can_be_given_its_state_back(engine: AsyncEngine) -> None:
    """`invalidate` closes for good a session that is told so, and says that by `Session._close_state` alone."""
    async with AsyncSession(engine, close_resets_only=False) as session:
        await session.execute(text("SELECT 1"))
        state = session.sync_session._close_state
        await session.invalidate()
        with pytest.raises(InvalidRequestError, match="closed"):
            await session.execute(text("SELECT 1"))
        session.sync_session._close_state = state
        assert await session.scalar(text("SELECT 1")) == 1


@relies_on("_Session__binds")
async def test_a_session_with_several_binds_has_them_by_one_of_two_names(engine: AsyncEngine) -> None:
    """`Session.binds` in SQLAlchemy 2.1, `Session._Session__binds` in 2.0: empty where there is one bind."""
    for binds, several in (({}, False), ({User: engine}, True)):
        async with AsyncSession(engine, binds=binds) as session:
            sync = session.sync_session
            named = [name for name in ("binds", "_Session__binds") if hasattr(sync, name)]
            assert named, "a session with several binds cannot be told from others any more"
            assert any(getattr(sync, name) for name in named) is several


@relies_on("_is_clean", "_new", "_deleted", "_modified")
async def test_a_session_knows_what_waits_to_be_flushed(maker: Maker) -> None:
    """`_is_clean` says whether anything does; `_new`, `_deleted` and the identity map's `_modified` say what."""
    async with maker() as session:
        sync = session.sync_session

        def waits() -> list[object]:
            states: list[Any] = [*sync._new, *sync._deleted, *sync.identity_map._modified]
            assert sync._is_clean() is (not states)
            return [state.obj() for state in states]

        user = User(name="ann")
        assert waits() == []
        session.add(user)
        assert waits() == [user]
        await session.flush()
        assert waits() == []
        user.name = "bob"
        assert waits() == [user]
        await session.flush()
        await session.delete(user)
        assert user in waits()


@relies_on("_flushing")
async def test_a_session_knows_that_it_flushes(maker: Maker, engine: AsyncEngine) -> None:
    """`Session._flushing` is true while the statements of a flush are sent, and false for all others."""
    seen: list[tuple[str, bool]] = []
    async with maker() as session:

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def look(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
            seen.append((statement.split()[0], session.sync_session._flushing))

        session.add(User(name="ann"))
        await session.flush()
        await session.execute(text("SELECT 1"))
    assert seen == [("INSERT", True), ("SELECT", False)]


@relies_on("_sa_instance_state")
async def test_an_instance_keeps_its_state_beside_its_values(maker: Maker) -> None:
    """All else in the `__dict__` of an instance is what was loaded."""
    async with maker.begin() as session:
        session.add(Order(id=1))
    async with maker() as session:
        order = await session.get_one(Order, 1)
        assert set(vars(order)) == {"_sa_instance_state", "id", "status", "total", "note"}


# Transactions ---------------------------------------------------------------------------------------------------------


@relies_on("_current_fn", "_connection_for_bind")
async def test_a_transaction_knows_that_it_is_asked_for_a_connection(maker: Maker) -> None:
    """During the event `after_begin`, and at no other time, `_current_fn` is `_connection_for_bind`."""
    doing: list[str | None] = []

    def look(session: Any, transaction: Any, connection: Any) -> None:
        connection.execute(text("SELECT 1"))
        doing.append(getattr(transaction._current_fn, "__name__", None))

    async with maker() as session:
        event.listen(session.sync_session, "after_begin", look)
        await session.execute(text("SELECT 1"))
        transaction: Any = session.sync_session.get_transaction()
        assert getattr(transaction._current_fn, "__name__", None) != "_connection_for_bind"
    assert doing == ["_connection_for_bind"]


@relies_on("_connections")
async def test_a_transaction_knows_its_connections(maker: Maker) -> None:
    """`SessionTransaction._connections` is empty until something is sent."""
    async with maker() as session, session.begin():
        transaction: Any = session.sync_session.get_transaction()
        assert not transaction._connections
        await session.execute(text("SELECT 1"))
        assert transaction._connections


@relies_on("_rollback_exception")
async def test_a_transaction_knows_the_flush_that_ended_it(maker: Maker) -> None:
    """After a flush has failed, `_rollback_exception` is what it failed with."""
    async with maker() as session:
        session.add_all([Order(id=1), Order(id=1)])
        with pytest.raises(IntegrityError) as failed:
            await session.flush()
        transaction: Any = session.sync_session.get_transaction()
        assert transaction._rollback_exception is failed.value
        await session.rollback()


# Engines and connections ----------------------------------------------------------------------------------------------


@relies_on("_on_connect_isolation_level")
@pytest.mark.parametrize("level", [None, "AUTOCOMMIT", "SERIALIZABLE"])
def test_a_dialect_knows_the_isolation_level_of_its_engine(level: str | None) -> None:
    """`create_engine(isolation_level=…)` is known to the dialect alone, not among the execution options."""
    options = {} if level is None else {"isolation_level": level}
    engine = create_async_engine("postgresql+asyncpg://nobody@nowhere/none", **options)
    assert engine.dialect._on_connect_isolation_level == level  # type: ignore[attr-defined]


@relies_on("_proxied")
def test_a_variant_of_an_engine_knows_the_engine() -> None:
    """`execution_options()` makes an engine that shares the pool of the one in `_proxied`; that one has none."""
    engine = create_async_engine("postgresql+asyncpg://nobody@nowhere/none").sync_engine
    variant: Any = engine.execution_options(a=1)
    further: Any = variant.execution_options(b=2)
    assert variant._proxied is engine
    assert further._proxied in (variant, engine)
    assert getattr(engine, "_proxied", None) is None


@relies_on("_max_overflow")
def test_a_pool_knows_how_far_it_may_overflow() -> None:
    """`QueuePool._max_overflow` is what was asked for; -1 means without end."""
    for limit in (0, 7, -1):
        pool = create_async_engine("postgresql+asyncpg://nobody@nowhere/none", max_overflow=limit).pool
        assert isinstance(pool, QueuePool)
        assert pool._max_overflow == limit


@relies_on("_execute_mutex", "_handle_exception", "_start_transaction", "_transaction", "_started")
async def test_a_connection_of_asyncpg_can_be_used_behind_the_adapter(engine: AsyncEngine) -> None:
    """The adapter's mutex, its BEGIN, how it tells that it has begun, and its translation of errors."""
    async with engine.connect():
        pass  # the first one is asked for what the dialect wants to know
    async with engine.connect() as connection:
        adapter: Any = (await connection.get_raw_connection()).dbapi_connection
        raw = adapter.driver_connection

        def begun() -> bool:
            return bool(adapter._started if hasattr(adapter, "_started") else adapter._transaction is not None)

        async with adapter._execute_mutex:
            assert not begun()
            await adapter._start_transaction()
            assert begun()
            assert raw.is_in_transaction()
            try:
                await raw.execute("SELECT 1; SELECT 1 / 0")
            except Exception as error:
                with pytest.raises(engine.dialect.loaded_dbapi.Error) as raised:  # type: ignore[attr-defined]
                    adapter._handle_exception(error)
        assert raised.value.sqlstate == "22012"
        await connection.run_sync(lambda _: adapter.rollback())
        assert not begun()


# Python, wrapt, Starlette ---------------------------------------------------------------------------------------------


@relies_on("_asyncio_future_blocking")
async def test_a_future_that_is_awaited_says_so() -> None:
    """A task goes to sleep on what is yielded to it with `_asyncio_future_blocking` true, and sets it back."""
    future = asyncio.get_running_loop().create_future()
    yielded: Any = next(future.__await__())
    assert yielded is future
    assert future._asyncio_future_blocking

    class StandIn:
        def __init__(self) -> None:
            self._asyncio_future_blocking = True
            self.add_done_callback, self.get_loop = future.add_done_callback, future.get_loop

        def __await__(self) -> Iterator[Any]:
            yield self

    async def wait() -> str:
        await stand_in
        return "woken"

    stand_in = StandIn()
    future._asyncio_future_blocking = False
    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    assert not stand_in._asyncio_future_blocking
    assert not waiting.done()
    future.set_result(None)
    assert await waiting == "woken"


@relies_on("_getframe")
def test_frames_lead_out_of_a_greenlet() -> None:
    """`sys._getframe` sees what runs in this greenlet; `gr_frame` of the one around it sees who waits for it."""
    seen: list[str] = []

    def inside() -> None:
        seen.append(sys._getframe(0).f_code.co_name)
        around = greenlet.getcurrent().parent
        assert around is not None
        assert around.gr_frame is not None
        seen.append(around.gr_frame.f_code.co_name)

    greenlet.greenlet(inside).switch()
    assert seen == ["inside", "test_frames_lead_out_of_a_greenlet"]


@relies_on("_is_protocol")
def test_a_protocol_says_that_it_is_one() -> None:
    """`_is_protocol` is true of a Protocol, and false of a class that only follows one."""

    class Wanted(Protocol):
        def go(self) -> None: ...

    class Given(Wanted):
        def go(self) -> None: ...

    assert Wanted._is_protocol  # type: ignore[attr-defined]
    assert not Given._is_protocol  # type: ignore[attr-defined]


@relies_on("_is_coroutine")
def test_a_function_can_be_marked_as_async() -> None:
    """What asyncio, or inspect since 3.12, has marked as a coroutine function says so by an attribute of its own."""

    def plain() -> None: ...

    if hasattr(inspect, "markcoroutinefunction"):
        assert inspect.iscoroutinefunction(inspect.markcoroutinefunction(plain))
    else:
        plain._is_coroutine = asyncio.coroutines._is_coroutine  # type: ignore[attr-defined]
        assert asyncio.iscoroutinefunction(plain)


@relies_on("_self_parent", "_self_owner", "_self_instance")
def test_a_bound_wrapper_knows_what_it_was_bound_from() -> None:
    """wrapt's bound wrappers have the wrapper, the class and the instance that they were bound from."""

    class Bound(wrapt.BoundFunctionWrapper):  # type: ignore[type-arg]
        pass

    class Wrapper(wrapt.FunctionWrapper):  # type: ignore[type-arg]
        __bound_function_wrapper__ = Bound

    def go(self: object) -> None: ...

    class Owner:
        method = Wrapper(go, lambda wrapped, instance, args, kwargs: None)

    owner = Owner()
    bound: Any = owner.method
    assert type(bound) is Bound
    assert bound._self_parent is vars(Owner)["method"]
    assert bound._self_instance is owner
    assert bound._self_owner is Owner


@relies_on("_receive", "_stream_consumed", "_is_disconnected")
async def test_a_request_reads_through_its_own_receive() -> None:
    """What stands in the place of `Request._receive` gets the body; flags say that it was read, and who has gone."""
    heard: list[str] = []

    async def receive() -> dict[str, Any]:
        heard.append("message")
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def never() -> Any:
        raise AssertionError

    request = Request({"type": "http", "headers": []}, never)
    assert request._receive is never
    assert not request._stream_consumed
    request._receive = receive  # type: ignore[assignment]
    assert request.receive is receive
    assert await request.body() == b"x"
    assert heard == ["message"]
    assert request._stream_consumed

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    request._receive = gone  # type: ignore[assignment]
    assert not request._is_disconnected
    assert await request.is_disconnected()
    assert request._is_disconnected


@relies_on("_TRACER_PROVIDER")
def test_the_api_of_opentelemetry_knows_its_provider_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`opentelemetry.trace._TRACER_PROVIDER` is what `get_tracer_provider` returns; None stands for its proxy."""
    for provider in (None, trace.NoOpTracerProvider()):
        monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
        returned = trace.get_tracer_provider()
        assert returned is provider if provider else isinstance(returned, trace.ProxyTracerProvider)


# All of them ----------------------------------------------------------------------------------------------------------


def users_of() -> dict[str, list[str]]:
    """Return the private names that the package uses and does not define, each with the places that use it."""
    defined: set[str] = set()
    used: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            defined.update(_defined_by(node))
            for name in _used_by(node):
                if re.fullmatch(r"_[A-Za-z]\w*(?<!__)", name):
                    used.setdefault(name, []).append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno}")  # type: ignore[attr-defined]
    return {name: places for name, places in used.items() if name not in defined}


def _defined_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
            yield name
        case ast.Assign(targets=[ast.Name(id="__slots__")], value=value):
            given = ast.literal_eval(value)
            yield from (given,) if isinstance(given, str) else given


def _used_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Attribute(attr=name):
            yield name
        case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]):
            yield name
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            yield name
        case ast.Compare(comparators=[ast.Constant(value=str(name))]):
            yield name
        case ast.Assign(value=ast.Tuple(elts=elements)):
            yield from (str(each.value) for each in elements if isinstance(each, ast.Constant))


def test_every_private_name_of_others_has_its_test() -> None:
    """Whoever uses another one adds a test of it here, which fails loudly when an upgrade takes the name away."""
    untested = {name: places for name, places in users_of().items() if name not in TESTED}
    assert not untested

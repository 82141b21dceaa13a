"""Hooks run once the outermost transaction has ended, in order, outside of it, and only those that fit its end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeAlias

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from support.commits import fail_commit
from support.models import User
from txdeco import (
    INJECTED,
    MisuseError,
    SessionOwnershipError,
    UnexpectedRollbackError,
    configure,
    create_db_context,
    current_session,
    get_transaction,
    injects_session,
    on_commit,
    on_rollback,
    set_rollback_only,
    transactional,
)
from txdeco.testing import FaultProxy

Maker: TypeAlias = async_sessionmaker[AsyncSession]
Names: TypeAlias = Callable[[], Awaitable[list[str]]]
Opener: TypeAlias = Callable[[], AbstractAsyncContextManager[AsyncSession]]


@pytest.fixture
def ran() -> list[Any]:
    """What the hooks of a test have done, in order."""
    return []


def register(ran: list[Any], name: str) -> None:
    """Register a hook of either kind."""
    on_commit(ran.append, f"{name} committed")
    on_rollback(ran.append, f"{name} rolled back")


async def test_hooks_run_in_order_after_the_commit_and_outside_of_it(
    opener: Opener, names: Names, ran: list[Any]
) -> None:
    """Sync and async ones, in the order of registration; the row is visible to all, and the session is idle."""
    async with opener() as session:

        async def look(name: str) -> None:
            ran.append((name, await names(), session.in_transaction()))

        async with get_transaction(session):
            session.add(User(name="ada"))
            on_commit(ran.append, 1)
            on_commit(look, 2)
            on_commit(functools.partial(look, 3))
            on_commit(lambda: ran.append(4))
            assert ran == []
        assert ran == [1, (2, ["ada"], False), (3, ["ada"], False), 4]


async def test_hooks_of_an_inner_scope_wait_for_the_outermost(opener: Opener, ran: list[Any]) -> None:
    """A savepoint that is released commits nothing yet."""
    async with opener() as session:
        async with get_transaction(session):
            register(ran, "outer")
            for propagation in ("nested", "required"):
                async with get_transaction(session, propagation=propagation):
                    register(ran, propagation)
            assert ran == []
        assert ran == ["outer committed", "nested committed", "required committed"]


async def test_hooks_of_a_savepoint_that_rolled_back_never_run(opener: Opener, ran: list[Any]) -> None:
    """Neither kind: what they were about did not happen, and the transaction did not roll back."""
    async with opener() as session:
        async with get_transaction(session):
            register(ran, "outer")
            with contextlib.suppress(ZeroDivisionError):
                async with get_transaction(session):
                    register(ran, "inner")
                    async with get_transaction(session):
                        register(ran, "innermost")
                    raise ZeroDivisionError
            async with get_transaction(session):
                register(ran, "asked for")
                set_rollback_only()
            register(ran, "after")
        assert ran == ["outer committed", "after committed"]


async def test_savepoints_of_the_user_count_as_well(opener: Opener, ran: list[Any]) -> None:
    """`session.begin_nested()` that rolls back drops what was registered inside."""
    async with opener() as session:
        async with get_transaction(session):
            with contextlib.suppress(ZeroDivisionError):
                async with session.begin_nested():
                    register(ran, "lost")
                    raise ZeroDivisionError
            async with session.begin_nested():
                register(ran, "kept")
        assert ran == ["kept committed"]


@pytest.mark.parametrize("how", ["raises", "rollback only", "swallowed", "commit fails", "cancelled"])
async def test_rollback_runs_the_other_kind(opener: Opener, ran: list[Any], how: str) -> None:
    """However the transaction rolls back, `on_rollback` runs and `on_commit` does not."""
    expected = {
        "raises": ZeroDivisionError,
        "rollback only": None,
        "swallowed": UnexpectedRollbackError,
        "commit fails": IntegrityError,
        "cancelled": asyncio.CancelledError,
    }[how]
    async with opener() as session:
        with contextlib.nullcontext() if expected is None else pytest.raises(expected):
            async with get_transaction(session):
                register(ran, "it")
                if how == "raises":
                    raise ZeroDivisionError
                if how == "cancelled":
                    raise asyncio.CancelledError
                if how == "rollback only":
                    set_rollback_only()
                elif how == "commit fails":
                    fail_commit(session)
                else:
                    with contextlib.suppress(DBAPIError):
                        await session.execute(text("SELECT * FROM missing"))
        assert ran == ["it rolled back"]


async def test_end_of_autocommit_that_fails_runs_the_other_kind(maker: Maker, ran: list[Any], names: Names) -> None:
    """What is flushed as the scope ends can fail there as well; what was flushed before is stored."""

    @transactional(source=maker, propagation="not_supported")
    async def store_twice() -> None:
        register(ran, "it")
        session = current_session()
        session.add(User(id=1, name="stored"))
        await session.flush()
        session.expunge_all()
        session.add(User(id=1, name="twice"))

    with pytest.raises(IntegrityError):
        await store_twice()
    assert ran == ["it rolled back"]
    assert await names() == ["stored"]


async def test_end_of_autocommit_of_unknown_outcome_runs_no_hook(
    fault_proxy: FaultProxy, make_engine: Callable[..., AsyncEngine], ran: list[Any]
) -> None:
    """Where the connection is lost under the last flush it is stored, or it is not: neither kind says which."""

    @transactional(source=async_sessionmaker(make_engine(fault_proxy.url)), propagation="not_supported")
    async def store() -> None:
        register(ran, "it")
        await current_session().execute(text("SELECT 1"))
        fault_proxy.cut_reply_after("INSERT")
        current_session().add(User(name="stored"))

    with pytest.raises(DBAPIError):
        await store()
    assert ran == []


async def test_failing_hook_is_logged_and_stops_nobody(
    opener: Opener, names: Names, ran: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """With its traceback; the hooks after it run, and the call returns."""

    def fail() -> None:
        raise ZeroDivisionError("of the hook")

    async def fail_later() -> None:
        raise KeyError("of the async hook")

    with caplog.at_level(logging.ERROR, "txdeco"):
        async with opener() as session, get_transaction(session):
            session.add(User(name="ada"))
            on_commit(fail)
            on_commit(fail_later)
            on_commit(ran.append, "after")
    assert ran == ["after"]
    assert [record.name for record in caplog.records] == ["txdeco.hooks"] * 2
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError, KeyError]
    assert await names() == ["ada"]


class Mailer:
    @injects_session
    async def send(self, session: AsyncSession) -> None:
        raise ZeroDivisionError

    async def __call__(self) -> None:
        raise ZeroDivisionError


@transactional
async def settle() -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("hook", "name"),
    [
        (settle, "settle"),
        (functools.partial(functools.partial(settle)), "settle"),
        (Mailer().send, "Mailer.send"),
        (Mailer(), "Mailer"),
    ],
)
async def test_failing_hook_is_logged_by_its_name(
    maker: Maker, caplog: pytest.LogCaptureFixture, hook: Any, name: str
) -> None:
    """Also where it is decorated, a method, a partial or an object: their reprs tell nothing."""
    configure(maker)
    with caplog.at_level(logging.ERROR, "txdeco.hooks"):
        async with maker() as session, get_transaction(session):
            on_commit(hook)
    (record,) = caplog.records
    assert record.getMessage() == f"a hook failed: {__name__}.{name}"
    assert record.txdeco_hook == f"{__name__}.{name}"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("hook", "name"),
    [([].remove, "list.remove"), ({}.__delitem__, "dict.__delitem__")],
)
async def test_failing_hook_without_a_module_is_logged_by_its_name(
    maker: Maker, ran: list[Any], caplog: pytest.LogCaptureFixture, hook: Any, name: str
) -> None:
    """Methods of built-in types have no module, or not even the attribute; the call returns all the same."""
    with caplog.at_level(logging.ERROR, "txdeco.hooks"):
        async with maker() as session, get_transaction(session):
            on_commit(hook, 1)
            on_commit(ran.append, "after")
    assert [record.getMessage() for record in caplog.records] == [f"a hook failed: {name}"]
    assert ran == ["after"]


async def test_hook_that_is_cancelled_does_not_stop_the_others(maker: Maker, names: Names, ran: list[Any]) -> None:
    """The cancellation comes out after the last hook; the work is committed."""
    waiting = asyncio.Event()

    async def wait() -> None:
        waiting.set()
        await asyncio.Event().wait()

    async def call() -> None:
        async with maker() as session, get_transaction(session):
            session.add(User(name="ada"))
            on_commit(wait)
            on_commit(ran.append, "after")

    calling = asyncio.create_task(call())
    await waiting.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ran == ["after"]
    assert await names() == ["ada"]


async def test_hook_may_open_a_scope_of_its_own(opener: Opener, names: Names, ran: list[Any]) -> None:
    """Even on the same session: the transaction is over, so that it is a new one, with hooks of its own."""
    async with opener() as session:

        async def again() -> None:
            async with get_transaction(session):
                session.add(User(name="second"))
                on_commit(ran.append, "second committed")

        async with get_transaction(session):
            session.add(User(name="first"))
            on_commit(again)
            on_commit(ran.append, "first committed")
    assert ran == ["second committed", "first committed"]
    assert await names() == ["first", "second"]


async def test_only_the_last_attempt_has_hooks(maker: Maker, ran: list[Any]) -> None:
    """Those of a failed attempt are dropped; when all are used up, `on_rollback` of the last one runs."""

    @transactional(source=maker, retry=3)
    async def call(succeed: bool) -> None:
        number = len(attempts)
        attempts.append(number)
        register(ran, f"attempt {number}")
        if not (succeed and number == 1):
            await current_session().execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    attempts: list[int] = []
    await call(True)
    assert ran == ["attempt 1 committed"]
    attempts.clear()
    ran.clear()
    with pytest.raises(Exception, match="40001"):
        await call(False)
    assert ran == ["attempt 2 rolled back"]


async def test_hooks_of_requires_new_are_its_own(maker: Maker, ran: list[Any]) -> None:
    """They run when that transaction ends, whatever becomes of the one around it."""

    @transactional(source=maker, propagation="requires_new")
    async def inner() -> None:
        register(ran, "inner")

    with contextlib.suppress(ZeroDivisionError):
        async with create_db_context(maker)() as session, get_transaction(session):
            register(ran, "outer")
            await inner()
            assert ran == ["inner committed"]
            raise ZeroDivisionError
    assert ran == ["inner committed", "outer rolled back"]


async def test_hooks_with_an_explicit_session(maker: Maker, ran: list[Any]) -> None:
    """`session=` names the transaction that is meant; it need not be the innermost one."""
    async with maker() as first, maker() as second:
        async with get_transaction(first):
            async with get_transaction(second):
                on_commit(ran.append, "first", session=first)
                on_commit(ran.append, "second", session=second)
                on_commit(ran.append, "innermost")
            assert ran == ["second", "innermost"]
        assert ran == ["second", "innermost", "first"]


# Where nobody has declared a transaction ------------------------------------------------------------------------------


async def test_hooks_of_a_provided_session_run_at_its_end(maker: Maker, names: Names, ran: list[Any]) -> None:
    """The end of the block commits, so the hooks run there."""

    async def look() -> None:
        ran.append(await names())

    async with create_db_context(maker)() as session:
        session.add(User(name="ada"))
        register(ran, "it")
        on_commit(look)
        assert ran == []
    assert ran == ["it committed", ["ada"]]
    ran.clear()
    with contextlib.suppress(ZeroDivisionError):
        async with create_db_context(maker)():
            register(ran, "it")
            raise ZeroDivisionError
    assert ran == ["it rolled back"]


async def test_own_commit_of_a_provided_session_runs_its_hooks(maker: Maker, ran: list[Any]) -> None:
    """`session.commit()` and `session.rollback()` end a transaction: its hooks run there, once."""

    async def later(what: str) -> None:
        await asyncio.sleep(0)
        ran.append(what)

    async with create_db_context(maker)() as session:
        session.add(User(name="first"))
        await session.flush()
        register(ran, "first")
        on_commit(later, "async")
        await session.commit()
        assert ran == ["first committed", "async"]
        session.add(User(name="second"))
        await session.flush()
        register(ran, "second")
        await session.rollback()
        assert ran == ["first committed", "async", "second rolled back"]
    assert ran == ["first committed", "async", "second rolled back"]


async def test_hooks_of_released_work_wait_for_the_commit_of_the_owner(maker: Maker, ran: list[Any]) -> None:
    """In a user's own session with work of its own, the scope is a savepoint, and the user's commit runs the hooks."""
    for end in ("commit", "rollback"):
        async with maker() as session:
            session.add(User(name="before"))
            async with get_transaction(session):
                register(ran, "it")
            assert ran == []
            await getattr(session, end)()
        assert ran == ["it committed" if end == "commit" else "it rolled back"]
        ran.clear()


async def test_hooks_under_session_begin_run_at_its_end(maker: Maker, ran: list[Any]) -> None:
    """So does the end of `async with session.begin()`."""
    async with maker() as session:
        async with session.begin():
            async with get_transaction(session):
                register(ran, "it")
            assert ran == []
        assert ran == ["it committed"]


async def test_outside_any_scope_a_plain_hook_runs_at_once(ran: list[Any]) -> None:
    """There is nothing to wait for; and nothing that could roll back."""
    on_commit(ran.append, "now")
    on_rollback(ran.append, "never")
    assert ran == ["now"]


async def test_outside_any_scope_an_async_hook_is_refused(recwarn: pytest.WarningsRecorder) -> None:
    """Nobody could await it: `MisuseError` says to await it yourself, and no coroutine is left behind."""

    async def hook() -> None: ...

    class Callable_:
        async def __call__(self) -> None: ...

    for fn in (hook, functools.partial(hook), Callable_(), lambda: hook()):
        with pytest.raises(MisuseError, match="Await it yourself"):
            on_commit(fn)
    assert not recwarn.list


@pytest.mark.parametrize("register_", [on_commit, on_rollback])
async def test_hook_that_is_not_callable_is_refused(maker: Maker, register_: Callable[..., None]) -> None:
    """With a coroutine in place of the function, the error shows how it is written."""
    for inside in (False, True):
        async with contextlib.AsyncExitStack() as stack:
            if inside:
                session = await stack.enter_async_context(maker())
                await stack.enter_async_context(get_transaction(session))
            with pytest.raises(MisuseError, match=r"not callable.*on_commit\(fn, \*args\)"):
                register_("not callable")  # type: ignore[arg-type]


# In child tasks -------------------------------------------------------------------------------------------------------


async def test_child_task_cannot_register_on_the_transaction_of_its_parent(maker: Maker, ran: list[Any]) -> None:
    """Without a session the child would not know whose transaction is meant: `SessionOwnershipError`."""

    async def child() -> None:
        on_commit(ran.append, "child")

    async with maker() as session, get_transaction(session):
        with pytest.raises(SessionOwnershipError, match=r"on_commit\(\)"):
            await asyncio.gather(child())


async def test_child_task_registers_by_the_session_that_it_was_handed(maker: Maker, ran: list[Any]) -> None:
    """With the parent's session it can, and its hook runs with those of the parent."""

    async def child(session: AsyncSession) -> None:
        on_commit(ran.append, "child", session=session)

    async with maker() as session, get_transaction(session):
        on_commit(ran.append, "parent")
        await asyncio.gather(child(session))
    assert ran == ["parent", "child"]


async def test_children_with_scopes_of_their_own_have_hooks_of_their_own(maker: Maker, ran: list[Any]) -> None:
    """In `gather` each call without a session has its own transaction, and its own hooks."""

    @transactional(source=maker)
    async def child(name: str, fail: bool) -> None:
        register(ran, name)
        if fail:
            raise ZeroDivisionError

    await asyncio.gather(child("a", False), child("b", True), return_exceptions=True)
    assert sorted(ran) == ["a committed", "b rolled back"]


@pytest.mark.parametrize("kind", ["provided", "declared"])
async def test_a_hook_cannot_begin_anew_on_the_session_of_its_call(
    maker: async_sessionmaker[AsyncSession], kind: str, caplog: pytest.LogCaptureFixture, names: Names
) -> None:
    """The session is closed before its hooks run: what one of them did on it would be lost without a word."""

    @injects_session(maker)
    async def call(*, session: AsyncSession = INJECTED) -> None:
        async def write() -> None:
            session.add(User(name="late"))
            await session.flush()

        session.add(User(name="in time"))
        on_commit(write)

    await (call if kind == "provided" else transactional(call))()
    assert await names() == ["in time"]
    assert "SessionOwnershipError" in caplog.text

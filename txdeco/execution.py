"""How the plan of a function is carried out around each of its calls.

In this order: find the session; wait for rows, while nothing is held; open the scope and take the locks; run the body.
The plan is shared by all calls and never changes; what does belongs to one call.
"""

from __future__ import annotations

import asyncio
import weakref
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from txdeco import ambient
from txdeco.arguments import Arguments
from txdeco.errors import SessionOwnershipError
from txdeco.ledger import ledger_of
from txdeco.locking.acquire import Acquisition
from txdeco.propagation import Propagation
from txdeco.retries import run_with_retry
from txdeco.scopes import open_scope
from txdeco.sessions import locate, open_session, provide, rehearse, source_for
from txdeco.stages import ENDED, Stage

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from sqlalchemy.ext.asyncio import AsyncSession

    from txdeco.plans import Plan
    from txdeco.retries import Turn
    from txdeco.sessions import Source
    from txdeco.watching.calls import Wait

_INDEPENDENT = (Propagation.REQUIRES_NEW, Propagation.NOT_SUPPORTED)


def runner(plan: Plan) -> Callable[..., Any]:
    """Return what wrapt calls in place of the function: nothing begins before it is awaited, or iterated."""

    shape, name = plan.shape, plan.shape.parameters.qualname  # tasks, tracebacks and warnings show the name
    begin: Callable[[_Call], object] = _await
    if plan.is_generator:
        begin = _start
    elif not plan.waits:
        begin = _attempt if plan.retry is None else _attempts

    def run(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Any = begin(_Call(plan, wrapped, Arguments(shape, instance, args, kwargs), run))
        call.__qualname__ = name
        return call

    def lend(wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call: Any = _lend(plan, wrapped, Arguments(shape, instance, args, kwargs))
        call.__qualname__ = name
        return call

    needs_more = plan.scope is not None or plan.waits or plan.is_generator
    return run if needs_more else lend


class _Call:
    """One call of a decorated function."""

    __slots__ = ("arguments", "body", "explicit", "found", "key", "located", "own", "plan", "waited")

    def __init__(self, plan: Plan, body: Any, arguments: Arguments, key: object) -> None:
        self.plan = plan
        self.body = body
        self.arguments = arguments
        self.key = key  # whose attempts share a gate: those of one decorated function
        self.explicit: AsyncSession | None = None
        self.found: AsyncSession | None = None
        self.located = False
        self.own = False  # what was found has been opened for this very call
        self.waited: dict[str, tuple[Wait, Any]] = {}

    def locate(self) -> None:
        """Find the session that the call joins; in the task that runs it, which need not be its maker. Once."""
        if self.located:
            return
        self.located, plan = True, self.plan
        self.explicit = self.arguments.session()
        try:
            self.found = locate(self.explicit, plan.source, function=plan.function, join=plan.join)
        except SessionOwnershipError:
            alone = plan.scope is not None and plan.scope.propagation in _INDEPENDENT
            if self.explicit is not None or not alone:
                raise

    def surroundings(
        self, locks: Acquisition | None = None, turn: Turn | None = None
    ) -> AbstractAsyncContextManager[AsyncSession]:
        """Return what opens around the body: its scope, or else the session alone."""
        plan, found = self.plan, self.found
        if plan.scope is not None:
            spec, source = plan.scope, plan.source
            if found is None and source is None and spec.propagation is not Propagation.MANDATORY:  # is refused anyway
                source = _source(plan)
            if self.own and spec.propagation is Propagation.REQUIRES_NEW:
                spec = replace(spec, propagation=Propagation.NESTED)  # the session is new already
            return open_scope(found, spec, function=plan.function, preamble=locks, source=source, turn=turn)
        return provide(_source(plan), function=plan.function) if found is None else _Ambient(found)

    def locks(self) -> Acquisition | None:
        """Return the locks of the plan, completed by the arguments."""
        declared = self.plan.locks
        return None if declared is None else Acquisition(declared, self.arguments, function=self.plan.function)

    def complete(self, session: AsyncSession, locks: Acquisition | None) -> None:
        """Fill in what callers do not see: the session, and the rows that were waited for or locked."""
        arguments, shape = self.arguments, self.plan.shape
        if shape.session is not None and (shape.injects if self.explicit is None else session is not self.found):
            arguments.put(shape.session, session)
        for name, (wait, row) in self.waited.items():
            arguments.put(name, row if session is self.found else wait.again(session))
        if locks is not None:
            for lock, rows in zip(locks.plan.rows, locks.rows, strict=True):
                if lock.into is not None:
                    arguments.put(lock.into, rows)

    async def wait(self, session: AsyncSession) -> None:
        """Wait for the changes that were declared, while no transaction is open and no lock is held."""
        from txdeco.watching.calls import Wait

        where = self.plan.function
        for wanted in self.plan.waits:
            begun = asyncio.get_running_loop().time()
            key = tuple(path.value(self.arguments, where=where) for path in wanted.pk)
            since = None if wanted.since is None else wanted.since.value(self.arguments, where=where)
            pk = key[0] if len(key) == 1 else key
            wait = Wait.declared(where, session, wanted.model, pk, since=since, **dict(wanted.options))
            row = await wait.once(begun)
            if wanted.into is not None:
                self.waited[wanted.into] = wait, row


class _Ambient:
    """Makes a session that was handed in the ambient one; it stays its owner's."""

    __slots__ = ("_entry", "_session")

    def __init__(self, session: AsyncSession) -> None:
        self._session = session
        self._entry: ambient.Entry | None = None

    async def __aenter__(self) -> AsyncSession:
        around = ambient.own_entry()
        if around is None or around.session is not self._session:
            self._entry = ambient.push(self._session, ledger_of(self._session).source, None)
        return self._session

    async def __aexit__(self, *_: object) -> None:
        if self._entry is not None:
            ambient.pop(self._entry)


async def _lend(plan: Plan, body: Any, arguments: Arguments) -> Any:
    """Run a call that needs a session and nothing else. The short way: it is on the path of every helper function."""
    explicit = arguments.session()
    session = locate(explicit, plan.source, function=plan.function, join=plan.join)
    if session is None:
        async with provide(_source(plan), function=plan.function) as session:
            arguments.put(str(plan.shape.session), session)
            return await body(*arguments.args, **arguments.kwargs)
    if explicit is None:
        arguments.put(str(plan.shape.session), session)
        around = ambient.own_entry()
        if around is not None and around.session is session:
            return await body(*arguments.args, **arguments.kwargs)
        if around is None and ledger_of(session).rehearsal:
            async with rehearse(session, function=plan.function):
                return await body(*arguments.args, **arguments.kwargs)
    entry = ambient.push(session, ledger_of(session).source, None)
    try:
        return await body(*arguments.args, **arguments.kwargs)
    finally:
        ambient.pop(entry)


def _source(plan: Plan) -> Source:
    """Return where a session of its own comes from."""
    shape = plan.shape
    looked_at = (shape.path.text,) if shape.path is not None else (shape.session,) if shape.session else ()
    return source_for(plan.source, None, function=plan.function, looked_at=looked_at)


async def _await(call: _Call) -> Any:
    async with _changed(call):
        return await _attempts(call)


async def _attempts(call: _Call) -> Any:
    plan = call.plan
    if plan.retry is None:
        return await _attempt(call)
    call.locate()
    return await run_with_retry(
        plan.retry,
        function=plan.function,
        key=call.key,
        attempt=lambda turn: _attempt(call, turn),
        timeout=None if plan.scope is None else plan.scope.timeout,
        gated=call.found is None or not call.found.in_transaction(),
    )


async def _attempt(call: _Call, turn: Turn | None = None) -> Any:
    call.locate()
    locks = call.locks()
    async with call.surroundings(locks, turn) as session:
        call.complete(session, locks)
        return await call.body(*call.arguments.args, **call.arguments.kwargs)


@asynccontextmanager
async def _changed(call: _Call) -> AsyncGenerator[None]:
    """Wait for the rows, on the session that the call goes on with: where there is none, on one opened for both."""
    call.locate()
    if call.found is not None:
        await call.wait(call.found)
        yield
        return
    plan = call.plan
    source = _source(plan)
    async with open_session(source) if plan.scope is not None else provide(source, function=plan.function) as session:
        await call.wait(session)
        call.found, call.own = session, True
        yield


def _start(call: _Call) -> AsyncGenerator[Any, Any]:
    """Make the generator, and hear of it where it is dropped: asyncio closes it later, and in another task."""
    stage = Stage()
    generator = _iterate(call, stage)
    stage.watch = weakref.ref(generator, stage.drop)
    return generator


async def _iterate(call: _Call, stage: Stage) -> AsyncGenerator[Any, Any]:
    """Drive an async generator inside its surroundings; between two yields the consumer has its own back."""
    stage.begin()
    try:
        call.locate()
        async with AsyncExitStack() as stack:
            if call.plan.waits:
                await stack.enter_async_context(_changed(call))
            locks = call.locks()
            surroundings = call.surroundings(locks)
            call.complete(await stack.enter_async_context(surroundings), locks)
            generator = call.body(*call.arguments.args, **call.arguments.kwargs)
            stage.clear_for(call.plan.function, generator, surroundings, own=call.own)
            step = generator.__anext__()
            while True:
                try:
                    item = await step
                except StopAsyncIteration:
                    break
                await stage.leave()
                try:
                    sent = yield item
                except GeneratorExit:
                    if await stage.exit():
                        stack.pop_all()  # its scope has ended, or is the owner's of the session to end
                        raise
                    await generator.aclose()
                    raise
                except BaseException as error:
                    if stage.ended:  # with what was around it, which the error has passed through already
                        stack.pop_all()
                        raise
                    late = await stage.enter()
                    step = generator.athrow(error)
                else:
                    late = await stage.enter()
                    step = generator.asend(sent) if late is None else generator.athrow(late)
                if stage.ended:
                    stack.pop_all()
                    step.close()
                    raise SessionOwnershipError(call.plan.function, ENDED)
    finally:
        stage.give_back()

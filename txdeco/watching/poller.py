"""One poller an engine and event loop: reads for all groups, and is gone when nobody waits."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, event
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine

from txdeco.errors import ConnectionUnavailableError
from txdeco.watching.groups import Group
from txdeco.watching.listener import Listener
from txdeco.watching.waiters import own_copy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from sqlalchemy.ext.asyncio import AsyncConnection

    from txdeco.watching.groups import Reading
    from txdeco.watching.hints import Hints
    from txdeco.watching.rows import RowShape
    from txdeco.watching.waiters import Entry

logger = logging.getLogger("txdeco.watching")

LINGER: Final = 0.5  # seconds that an idle poller waits for the next waiter before it ends
PATIENCE: Final = 0.25  # seconds after which a slow statement no longer holds up those of other tables
POOL_WAIT: Final = 5.0  # seconds to wait for a pooled connection
READ_LIMIT: Final = 30.0  # seconds after which a statement is given up

_pollers: WeakKeyDictionary[Engine, dict[asyncio.AbstractEventLoop, Poller]] = WeakKeyDictionary()


def poller_of(engine: Engine) -> Poller:
    """Return the poller of *engine* in the running loop; it starts with its first waiter."""
    loop = asyncio.get_running_loop()
    by_loop = _pollers.setdefault(engine, {})
    for other in [each for each in by_loop if each.is_closed()]:
        del by_loop[other]
    poller = by_loop.get(loop)
    if poller is None:
        poller = by_loop[loop] = Poller(engine, loop)
    return poller


def root_of(engine: Any) -> Engine:
    """Return the engine that *engine* is a variant of: `execution_options()` makes new ones that share its pool."""
    while (parent := getattr(engine, "_proxied", None)) is not None:
        engine = parent
    return engine  # type: ignore[no-any-return]


def _disposed(engine: Engine) -> None:
    for poller in list(_pollers.get(engine, {}).values()):
        poller.stop()


class Poller:
    """Reads for the waiters of one engine, one statement at a time, on a pooled connection only while it runs."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.engine = engine
        self.loop = loop
        self.phase = random.random()
        self.groups: dict[Any, Group] = {}
        self.ended: BaseException | None = None  # what those who still wait are told
        self.async_engine = AsyncEngine(engine)
        self._listener: Listener | None = None
        self._wakeup = asyncio.Event()
        self._slow: set[asyncio.Task[None]] = set()
        self._troubled: set[Group] = set()
        if not event.contains(engine, "engine_disposed", _disposed):
            event.listen(engine, "engine_disposed", _disposed)
        # A fresh context: the session that is ambient in the first waiter's task is no business of the poller.
        self._task = loop.create_task(self._run(), name="txdeco.watching poller", context=contextvars.Context())

    def group(self, shape: RowShape, options: dict[str, Any], key: Any) -> Group:
        """Return the group for rows of *shape*, read with the execution options *options*."""
        group = self.groups.get((shape, key))
        if group is None:
            group = self.groups[shape, key] = Group(self, shape, options)
        return group

    def wake(self) -> None:
        """Look again for what there is to do."""
        self._wakeup.set()

    def listen(self, hints: Hints) -> None:
        """Hear of changes in the tables that *hints* is about, as far as that is possible."""
        if self._listener is None or self._listener.ended:
            if not hints.watches:
                return
            self._listener = Listener(self)
        self._listener.attend(hints)

    async def lend(self, group: Group, wanted: Sequence[Entry], readings: list[Reading]) -> None:
        """Lend *group* a pooled connection to read *wanted* on, in AUTOCOMMIT."""
        try:
            async with asyncio.timeout(POOL_WAIT):
                connection = await self.async_engine.connect()
        except (TimeoutError, PoolTimeout):
            self._exhausted()
            raise
        async with self.giving_back(connection), asyncio.timeout(READ_LIMIT):
            await connection.execution_options(**group.options, isolation_level="AUTOCOMMIT")
            await group.read_on(connection, wanted, readings)

    @asynccontextmanager
    async def giving_back(self, connection: AsyncConnection) -> AsyncGenerator[None]:
        """Give *connection* back to the pool after the block; once the engine is disposed of nobody would close it."""
        try:
            yield
        finally:
            if self.ended is not None:
                await connection.invalidate()
            await connection.close()

    def troubled(self, group: Group, error: BaseException) -> None:
        """Log that *group* could not be read, once for the engine until all can be read again."""
        if not self._troubled:
            logger.warning(
                "Reading %s failed; %d waiters keep waiting: %s",
                group.shape.label,
                len(self._waiters()),
                error or type(error).__name__,
                extra={"model": group.shape.label, "error": type(error).__name__},
            )
        self._troubled.add(group)

    def recovered(self, group: Group) -> None:
        """Log that all groups can be read again, with the last one."""
        self._troubled.discard(group)
        if not self._troubled:
            logger.info("Reading %s works again", group.shape.label, extra={"model": group.shape.label})

    def _exhausted(self) -> None:
        """Tell those who hold connections themselves: as long as they wait, none will come free."""
        why = f"The waiter's own session holds a connection while it waits ({self.engine.pool.status()})"
        for waiter in self._waiters():
            if waiter.holding:
                waiter.settle(ConnectionUnavailableError("wait_for_row_change()", POOL_WAIT, why))

    def _waiters(self) -> list[Any]:
        return [waiter for group in self.groups.values() for each in group.entries.values() for waiter in each.waiters]

    async def _run(self) -> None:
        try:
            while await self._pause():
                for group in list(self.groups.values()):
                    now = self.loop.time()
                    if group.next_at() <= now:
                        group.collect(now)
                        await self._serve(group)
        except Exception as error:
            logger.exception("The poller of %r failed", self.engine)
            self._end(error)
        finally:
            self._end(ConnectionUnavailableError("wait_for_row_change()", 0.0, "The poller was stopped"))
            if self._listener is not None:
                self._listener.end(at_once=False)
            await self._stop_reading()

    async def _serve(self, group: Group) -> None:
        task = self.loop.create_task(group.read(), name="txdeco.watching read", context=contextvars.Context())
        self._slow.add(task)
        task.add_done_callback(self._slow.discard)
        await asyncio.wait((task,), timeout=PATIENCE)

    async def _pause(self) -> bool:
        """Sleep until something is due; tell whether anybody still waits."""
        for key in [key for key, group in self.groups.items() if not group.entries and not group.reading]:
            group = self.groups.pop(key)
            self._troubled.discard(group)
            group.hints.watches = ()
            self.listen(group.hints)
        at = min((group.next_at() for group in self.groups.values()), default=self.loop.time() + LINGER)
        timer = self.loop.call_at(at, self._wakeup.set) if at < self.loop.time() + 3600 else None
        try:
            await self._wakeup.wait()
        finally:
            if timer is not None:
                timer.cancel()
        self._wakeup.clear()
        return bool(self.groups) or self.loop.time() < at

    async def _stop_reading(self) -> None:
        for task in list(self._slow):
            task.cancel()
        await asyncio.gather(*self._slow, return_exceptions=True)

    def stop(self) -> None:
        """End at once: the engine was disposed of."""
        self._end(ConnectionUnavailableError("wait_for_row_change()", 0.0, "The engine was disposed of meanwhile"))
        if self._listener is not None:
            self._listener.end(at_once=True)
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._task.cancel)

    def _end(self, error: BaseException) -> None:
        """Leave the stage: whoever comes now gets a new poller, and nobody is left waiting for this one."""
        by_loop = _pollers.get(self.engine, {})
        if by_loop.get(self.loop) is self:
            del by_loop[self.loop]
        self.ended = self.ended or error
        for waiter in self._waiters():
            waiter.settle(own_copy(self.ended))

"""One LISTEN connection an engine, outside of the pool, while anybody waits for a table that has the trigger."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import text

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from txdeco.watching.catalog import Watch
    from txdeco.watching.hints import Hints
    from txdeco.watching.poller import Poller

logger = logging.getLogger("txdeco.watching")

LEASE: Final = 6.0  # seconds that writers go on notifying after they were last asked to
RENEW: Final = 2.0  # seconds between two times of asking; it proves that the connection lives, too
DRAIN: Final = 0.1  # seconds between two looks whether the writers that ran at the start have ended
IDLE: Final = 0.5  # seconds without anything to listen for, after which it ends
ECHO: Final = 2.0  # seconds to wait for the connection's own notification
ANSWER: Final = 5.0  # seconds to wait for an answer on the connection
DEAF: Final = 300.0  # seconds for which an engine that did not hear itself is not tried again

_HASH = re.compile(r"-?\d{1,19}", re.ASCII)
_deaf_until: WeakKeyDictionary[Engine, float] = WeakKeyDictionary()


class DeafError(Exception):
    """The connection does not hear its own notification."""


class Listener:
    """Hears hints and hands them to the groups; whatever happens to its connection, the groups are told in time.

    A group is live once no change can be missed any more: LISTEN and the lease stand, every transaction that ran before
    that has ended, and all rows have been read once since.
    """

    def __init__(self, poller: Poller) -> None:
        self._poller = poller
        self._by_channel: dict[str, set[Hints]] = {}
        self._channels: set[str] = set()  # those that the connection listens to
        self._leases: dict[Watch, int | None] = {}  # None: nobody from before the lease is still running
        self._asked = 0.0  # when the leases were last asked for
        self._wakeup = asyncio.Event()
        self._raw: Any = None  # keeps SQLAlchemy's end of the connection alive
        self._connection: Any = None
        self._failures = 0
        self._ending = False
        self._task = poller.loop.create_task(
            self._run(), name="txdeco.watching listener", context=contextvars.Context()
        )

    @property
    def ended(self) -> bool:
        """Whether it hears nothing any more."""
        return self._ending

    def attend(self, hints: Hints) -> None:
        """Listen for the tables that *hints* now watches, and no others."""
        for channel in list(self._by_channel):
            self._by_channel[channel].discard(hints)
            if not self._by_channel[channel]:
                del self._by_channel[channel]
        for watch in hints.watches:
            self._by_channel.setdefault(watch.channel, set()).add(hints)
        self._wakeup.set()

    def end(self, *, at_once: bool) -> None:
        """Close the connection and end the task; *at_once* does not say goodbye to the server."""
        self._ending = True
        if at_once:
            self._hang_up()
        self._task.cancel()

    # -- its task

    async def _run(self) -> None:
        try:
            while not self._ending:
                await self._listen()
        finally:
            self._hang_up()

    async def _listen(self) -> None:
        try:
            await self._connect()
            while not self._ending:
                await self._serve()
                self._failures = 0
        except DeafError:
            _deaf_until[self._poller.engine] = time.monotonic() + DEAF
            self._ending = True
            logger.warning(
                "Notifications do not reach %r (a pooler in transaction mode in between?): waiters poll",
                self._poller.engine,
            )
        except Exception as error:  # asyncpg raises more than its own kinds when a connection is killed
            self._failures += 1
            if self._failures == 1:
                logger.warning("Listening failed; waiters poll meanwhile: %s", error or type(error).__name__)
        finally:
            await self._lost()
        if not self._by_channel:
            self._ending = True
        if not self._ending:
            await self._rest(min(0.05 * 2**self._failures, 30.0))

    async def _rest(self, seconds: float) -> None:
        """Wait before the next attempt; end instead once there is nothing to listen for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._by_channel:
                    self._wakeup.clear()
                    await self._wakeup.wait()
        self._ending = self._ending or not self._by_channel

    async def _connect(self) -> None:
        async with asyncio.timeout(ANSWER):
            raw = await self._poller.async_engine.raw_connection()
        self._raw, self._connection = raw, raw.driver_connection  # which it has no longer once it is detached
        raw.detach()
        self._connection.add_termination_listener(lambda _: self._wakeup.set())
        await self._hear_itself()

    async def _hear_itself(self) -> None:
        """A pooler in transaction mode takes LISTEN and forgets it: only a notification that arrives is a proof."""
        heard, channel = asyncio.Event(), f"txdeco_echo_{secrets.token_hex(8)}"
        callback: Any = lambda *_: heard.set()  # noqa: E731
        async with asyncio.timeout(ANSWER):
            await self._connection.add_listener(channel, callback)
            if not self._by_channel:
                self._ending = True  # whoever waited has gone: nobody is owed a proof, or a pooled connection for it
                return
            # from another connection, while this one is idle: a pooler has then taken its server away
            other = await self._poller.async_engine.connect()
            async with self._poller.giving_back(other):
                await other.execution_options(isolation_level="AUTOCOMMIT")
                await other.execute(text("SELECT pg_notify(:channel, '')"), {"channel": channel})
        try:
            async with asyncio.timeout(ECHO):
                await heard.wait()
        except TimeoutError:
            raise DeafError from None
        async with asyncio.timeout(ANSWER):
            await self._connection.remove_listener(channel, callback)

    async def _serve(self) -> None:
        """Renew the leases, see who is live, and sleep until that is to be done again."""
        self._wakeup.clear()
        if self._connection.is_closed():
            raise ConnectionError("the connection that listens was closed")
        async with asyncio.timeout(ANSWER):
            watches = {watch for hints in self._hints() for watch in hints.watches}
            await self._tune({watch.channel for watch in watches})
            for watch in self._leases.keys() - watches:
                del self._leases[watch]
            if watches:
                await self._renew(sorted(watches, key=lambda each: each.channel))
        draining = any(horizon is not None for horizon in self._leases.values())
        try:
            async with asyncio.timeout(DRAIN if draining else RENEW if watches else IDLE):
                await self._wakeup.wait()
        except TimeoutError:
            if not self._by_channel:
                self._ending = True

    async def _tune(self, channels: set[str]) -> None:
        for channel in channels - self._channels:
            await self._connection.add_listener(channel, self._heard)
        for channel in self._channels - channels:
            await self._connection.remove_listener(channel, self._heard)
        self._channels = channels

    async def _renew(self, watches: list[Watch]) -> None:
        asked = self._poller.loop.time()
        awake = await self._connection.fetchrow(f"SELECT {', '.join(f'{each.awake}()' for each in watches)}")
        await self._connection.execute(f"SELECT {', '.join(f'{each.wake}({LEASE})' for each in watches)}")
        # others keep the same lease: it may have ended, and begun again, since this one last asked
        in_time, self._asked = self._poller.loop.time() - self._asked < LEASE - 1, asked
        begun = [
            watch
            for watch, unbroken in zip(watches, awake, strict=True)
            if watch not in self._leases or not (unbroken and in_time)
        ]
        # A statement of its own: the snapshot of one that sets leases is older than they are. Writers that have taken
        # their transaction id before the one that is taken here may have found a lease that had not begun.
        limit = "pg_current_xact_id()" if begun else "pg_snapshot_xmax(s)"
        oldest, newest = await self._connection.fetchrow(
            f"SELECT pg_snapshot_xmin(s)::text::bigint, {limit}::text::bigint FROM pg_current_snapshot() s"
        )
        for watch in begun:
            self._leases[watch] = newest
            for hints in self._by_channel.get(watch.channel, ()):
                hints.doubt()
        for watch in watches:
            horizon = self._leases[watch]
            if horizon is not None and oldest >= horizon:
                self._leases[watch] = None
        for hints in self._hints():
            if all(self._leases.get(watch, 0) is None for watch in hints.watches):
                hints.confirm()

    def _hints(self) -> set[Hints]:
        return {hints for each in self._by_channel.values() for hints in each}

    def _heard(self, _: Any, __: int, channel: str, payload: str) -> None:
        hinted = int(payload) if _HASH.fullmatch(payload) else None  # an empty one means "many rows"
        for hints in self._by_channel.get(channel, ()):
            hints.hear(channel, hinted)

    # -- how it ends

    async def _lost(self) -> None:
        """Poll until there is a connection again, and part from this one."""
        self._leases, self._channels = {}, set()
        for hints in self._hints():
            hints.doubt()
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                await connection.close(timeout=0.5)
            except BaseException:
                connection.terminate()
                raise

    def _hang_up(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            connection.terminate()


def can_listen(engine: Engine) -> bool:
    """Tell whether it is worth trying to listen on a connection of *engine*."""
    return engine.dialect.driver == "asyncpg" and time.monotonic() >= _deaf_until.get(engine, 0.0)

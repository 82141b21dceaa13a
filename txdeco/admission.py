"""The gate that second and later attempts of one function pass: the more conflicts they meet, the fewer at once.

A gate knows only its own process. Where several work on the same rows, each of them sees the conflicts of all, and so
narrows its gate: additive increase, multiplicative decrease in small, as in TCP (https://www.rfc-editor.org/rfc/rfc5681).

Who keeps losing all the same runs alone: then it can only lose against another process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final
from weakref import WeakKeyDictionary

__all__ = ["ALONE", "COURTESY", "Gate", "gate_of"]

PEACE: Final = 8
"""How many attempts in a row have to end without a conflict before one more is let in again."""

ALONE: Final = 3
"""The attempt from which on a call runs alone, as far as the others in this process can be waited for."""

COURTESY: Final = 0.25
"""Seconds that attempts wait for each other so that one can run alone: no longer, for what one of them holds may be
what another waits for."""

_gates: WeakKeyDictionary[Any, WeakKeyDictionary[asyncio.AbstractEventLoop, Gate]] = WeakKeyDictionary()


def gate_of(key: object, concurrency: int) -> Gate:
    """Return the gate of one function on the running loop."""
    loop, loops = asyncio.get_running_loop(), _gates.get(key)
    if loops is None:
        loops = _gates[key] = WeakKeyDictionary()
    gate = loops.get(loop)
    if gate is None:
        for closed in [each for each in loops if each.is_closed()]:
            del loops[closed]  # what has been waited for in a loop holds it
        gate = loops[loop] = Gate(concurrency)
    return gate


class Gate:
    """Lets at most *concurrency* in at once, in the order in which they came; never fewer than one."""

    def __init__(self, concurrency: int) -> None:
        self._places = asyncio.Semaphore(concurrency)
        self._waiting = 0
        self._can_close = concurrency - 1
        self._closed = 0
        self._peace = 0
        self._running = 0
        self._quiet = asyncio.Event()  # is set while nobody runs
        self._quiet.set()
        self._idle = asyncio.Event()  # is set while nobody runs, although somebody waits
        self._turns = asyncio.Lock()  # of those that want to run alone
        self._alone: object = None  # who does
        self._since = 0.0  # since when
        self._over = asyncio.Event()  # set when it has ended

    async def enter(self) -> None:
        """Wait for a place. Cancelled, it takes none."""
        self._count(waiting=1)
        try:
            await self._places.acquire()
        finally:
            self._count(waiting=-1)

    def leave(self, *, conflicted: bool) -> None:
        """Give the place back, or close it where the attempt met a conflict again."""
        if conflicted:
            self._peace = 0
            if self._closed < self._can_close:
                self._closed += 1
                return
        elif self._closed:
            self._peace += 1
            if self._peace == PEACE:
                self._peace = 0
                self._closed -= 1
                self._places.release()
        self._places.release()

    async def pause(self, seconds: float) -> None:
        """Let *seconds* go by before an attempt; while others wait for its place, only as long as somebody runs."""
        await _until_set(self._idle, asyncio.get_running_loop().time() + seconds)

    async def begin(self, who: object, *, alone: bool = False, until: float | None = None) -> None:
        """Let the attempt *who* run, once the one that runs alone has ended; *alone*: as that one, once all have.

        Nobody waits longer than `COURTESY`, or than *until* on the clock of the loop, and nobody for one that has been
        alone for so long. Cancelled, it does not run.
        """
        if alone or self._alone is not None:
            courtesy = (asyncio.get_running_loop().time() if alone else self._since) + COURTESY
            limit = courtesy if until is None else min(courtesy, until)
            in_time = await _until(limit, self._turns.acquire() if alone else self._over.wait())
            if alone and in_time:
                await self._begin_alone(who, limit)
        self._count(running=1)

    async def _begin_alone(self, who: object, limit: float) -> None:
        loop = asyncio.get_running_loop()
        self._alone, self._since = who, loop.time()
        self._over.clear()
        try:
            await _until_set(self._quiet, limit)
        except BaseException:
            self._end_alone()
            raise
        self._since = loop.time()

    def end(self, who: object) -> None:
        """Take note that the attempt *who* has ended."""
        if who is self._alone:
            self._end_alone()
        self._count(running=-1)

    def _end_alone(self) -> None:
        self._alone = None
        self._over.set()
        self._turns.release()

    def _count(self, *, waiting: int = 0, running: int = 0) -> None:
        self._waiting += waiting
        self._running += running
        for event, is_so in ((self._quiet, not self._running), (self._idle, self._waiting and not self._running)):
            if is_so:
                event.set()
            else:
                event.clear()


async def _until_set(event: asyncio.Event, limit: float) -> None:
    while not event.is_set() and await _until(limit, event.wait()):
        pass  # of several that waited for it the first may have cleared it again


async def _until(limit: float, waiting: Awaitable[object]) -> bool:
    """Await *waiting* until *limit* on the clock of the loop; tell whether it has happened."""
    try:
        async with asyncio.timeout_at(limit):
            await waiting
    except TimeoutError:
        return False
    return True

"""The deadline of a scope, kept on both sides: the server ends a statement, the client ends everything else."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from txdeco.errors import TransactionTimeoutError

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

T = TypeVar("T")

GRACE = 0.05
"""Seconds that the server has to end its statement by itself. A statement that is cancelled from here costs its
connection, so the client's own timer comes second (shorter deadlines than a reconnect would end all throughput)."""


class Deadline:
    """A point in time, `at`, on the clock of the event loop, and the timer that cancels the body soon after."""

    __slots__ = ("_timer", "at", "timeout")

    def __init__(self, timeout: float, at: float) -> None:
        self.timeout = timeout
        self.at = at
        self._timer: asyncio.Timeout | None = None

    @classmethod
    def within(cls, timeout: float) -> Deadline:
        """Return the deadline *timeout* seconds from now."""
        return cls(timeout, asyncio.get_running_loop().time() + timeout)

    @property
    def left(self) -> float:
        """Seconds that are left; not above zero once it has passed."""
        return self.at - asyncio.get_running_loop().time()

    async def start(self) -> None:
        """Start the timer in the running task."""
        self._timer = asyncio.timeout_at(self.at + GRACE)
        await self._timer.__aenter__()

    async def bound(self, work: Coroutine[Any, Any, T], function: str) -> T:
        """Await *work*, a part of the exit that can still be undone; the timer of the body has been stopped.

        Raises:
            TransactionTimeoutError: the deadline has passed meanwhile.
        """
        await self.start()
        try:
            result = await work
        except BaseException as error:
            if await self.stop(error):
                raise TransactionTimeoutError(function, self.timeout) from error
            raise
        await self.stop(None)
        return result

    async def stop(self, error: BaseException | None) -> bool:
        """Stop the timer; tell whether *error* is its doing, or, without an error, whether time is up."""
        timer, self._timer = self._timer, None
        if timer is None:
            return False
        kind: type[BaseException] | None = None if error is None else type(error)
        trace: TracebackType | None = None if error is None else error.__traceback__
        task = asyncio.current_task()
        pending = task.cancelling() if task is not None else 0
        try:
            await timer.__aexit__(kind, error, trace)
        except TimeoutError:
            return True
        if error is None and timer.expired() and task is not None and task.cancelling() < pending:
            await _absorb()
        return error is None and self.left <= 0


async def _absorb() -> None:
    """Take the cancellation that the timer has asked for and that nobody has seen yet."""
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        return

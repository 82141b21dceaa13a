"""Await work that must not stop halfway: cancellation is held back until it is done, and then raised.

`asyncio.shield` needs a task of its own, which costs three turns of the event loop and runs the work outside of the
task that the rest of the call runs in. Here the work runs in the caller's own task; what the task waits for is a
stand-in for the future, and its `cancel` only takes note.
"""

from __future__ import annotations

import asyncio
from asyncio import current_task, get_running_loop
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

__all__ = ["PATIENCE", "finish", "run_to_end"]

PATIENCE = 30.0
"""Seconds that a cancelled call waits for its COMMIT, or for a cleanup, before it gives the connection up."""


class _StandIn:
    """What the task waits for in place of *future*: the same, but that it cannot be cancelled from outside."""

    __slots__ = ("_asyncio_future_blocking", "_future", "_work", "add_done_callback", "get_loop")

    def __init__(self, future: asyncio.Future[Any], work: finish) -> None:
        future._asyncio_future_blocking = False
        self._asyncio_future_blocking = True
        self._future = future
        self._work = work
        self.add_done_callback = future.add_done_callback
        self.get_loop = future.get_loop

    def cancel(self, msg: Any | None = None) -> bool:
        self._work.note_cancellation(msg)
        return True

    def end_by_force(self) -> bool:
        """Do what the *work*, which another work awaits, does when its own time is up."""
        return self._work.end_by_force()

    def remove_done_callback(self, callback: Any) -> int:
        return self._future.remove_done_callback(callback)

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> Any:
        return self._future.result()


class finish:
    """Await *work* in full, whatever happens to this task. What is awaited returns itself, and tells how it ended.

    Args:
        work: a coroutine.
        until: when it is ended by force, on the clock of the event loop; by default `PATIENCE` after a cancellation.

    Attributes:
        result: what the work returned.
        error: what it raised.
        cancelled: the cancellation of this task that came meanwhile.
        late: whether it was ended by force.
    """

    __slots__ = (
        "_before",
        "_loop",
        "_task",
        "_timer",
        "_until",
        "_waits_for",
        "_work",
        "cancelled",
        "error",
        "late",
        "result",
    )

    def __init__(self, work: Coroutine[Any, Any, Any], *, until: float | None = None) -> None:
        self._work = work
        self._until = until
        self._loop = get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._before = 0  # how often the task had been cancelled before it was during the work
        self._timer: asyncio.Handle | None = None
        self._waits_for: asyncio.Future[Any] | _StandIn | None = None
        self.result: Any = None
        self.error: BaseException | None = None
        self.cancelled: asyncio.CancelledError | None = None
        self.late = False

    def note_cancellation(self, msg: Any | None) -> None:
        """Take note that this task was cancelled; from now on the work has `PATIENCE`, if it had no end yet."""
        cancellations = 1 if self._task is None else self._task.cancelling()
        self._forget_if_taken_back(cancellations - 1)
        if self.cancelled is None:
            self._before = cancellations - 1
            self.cancelled = asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
            if self._until is None and self._timer is None:
                self._timer = self._loop.call_at(self._loop.time() + PATIENCE, self._lose_patience)

    def _forget_if_taken_back(self, cancellations: int) -> None:
        """A timeout inside the work cancels the task as well; when it ends, it takes that back."""
        if self.cancelled is not None and cancellations <= self._before:
            self.cancelled = None

    def _lose_patience(self) -> None:
        self._timer = None
        if self._task is not None:
            self._forget_if_taken_back(self._task.cancelling())
        if self.cancelled is not None:
            self._give_up()

    def _give_up(self) -> None:
        if not self.end_by_force():
            self._timer = self._loop.call_soon(self._give_up)  # until then the work may end by itself

    def end_by_force(self) -> bool:
        """Cancel what the work waits for; tell whether there was anything that had not ended by itself."""
        waits_for = self._waits_for
        if waits_for is None:
            return False
        ended = waits_for.end_by_force() if isinstance(waits_for, _StandIn) else waits_for.cancel()
        self.late = self.late or ended
        return ended

    def __await__(self) -> Generator[Any, Any, finish]:
        work = self._work
        if self._until is not None:
            self._timer = self._loop.call_at(self._until, self._give_up)
        try:
            while True:
                self._waits_for = awaited = work.send(None)
                self._task = current_task(self._loop)  # now, while the work is under way
                try:
                    yield None if awaited is None else _StandIn(awaited, self)
                except asyncio.CancelledError as error:
                    if awaited is None or not awaited.done():
                        self.note_cancellation(error.args[0] if error.args else None)
                except GeneratorExit:
                    raise
                except BaseException:  # the future's own error: the work meets it when it goes on
                    pass
        except StopIteration as stop:
            self.result = stop.value
        except GeneratorExit:  # the coroutine around this is closed: nothing can be waited for any more
            work.close()
            raise
        except BaseException as error:
            self.error = error
        finally:
            self._waits_for = None
            if self._timer is not None:
                self._timer.cancel()
        if self.cancelled is not None and self._task is not None:
            self._forget_if_taken_back(self._task.cancelling())
        return self


async def run_to_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Await *work* in full even if this task is cancelled meanwhile; the cancellation is raised once it is done."""
    outcome = await finish(work)
    if outcome.cancelled is not None:
        outcome.cancelled.__context__ = outcome.error
        raise outcome.cancelled
    if outcome.error is not None:
        raise outcome.error
    return outcome.result

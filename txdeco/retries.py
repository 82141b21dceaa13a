"""Run a whole call again when PostgreSQL asks for it, where the call owns its transaction.

Backoff alone gains little on hot rows: what helps is that few of the losers run at once. So second and later attempts
of one function pass a gate, before they take a connection.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from txdeco import ambient, driver, telemetry
from txdeco.admission import ALONE, Gate, gate_of
from txdeco.deadlines import Deadline
from txdeco.durations import Duration, is_zero, seconds
from txdeco.errors import (
    CommitOutcomeUnknownError,
    DeadlockError,
    LockTimeoutError,
    MisuseError,
    SerializationError,
    UnexpectedRollbackError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["Retry", "Turn", "run_with_retry"]

log = logging.getLogger("txdeco.retries")
T = TypeVar("T")

LOCK_NOT_AVAILABLE = "55P03"
CONFLICTS = frozenset({SerializationError.sqlstate, DeadlockError.sqlstate})


@dataclass(frozen=True)
class Retry:
    """When a call runs again, how often, and how soon.

    Only the scope that owns the transaction retries, and always the whole call on a clean session. The pauses are
    drawn evenly between zero and ``delay * 2**n``, at most `max_delay` ("full jitter",
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). Where other calls of the function wait
    to be let in and none runs, the first two pauses after a conflict end early. From its third attempt on a call runs
    alone, as far as the others in this process end, and wait, within a quarter of a second.

    Attributes:
        attempts: how many times the call runs at most, the first time included.
        delay: seconds; the longest pause before the second attempt. It doubles from attempt to attempt.
        max_delay: seconds; no pause is longer.
        sqlstates: which errors of the database are worth another attempt; by default 40001 (serialization failure)
            and 40P01 (deadlock).
        concurrency: how many second and later attempts of one function run at once in this process: at most so many,
            and fewer for as long as they meet conflicts again.
    """

    attempts: int = 3
    delay: float = 0.01
    max_delay: float = 1.0
    sqlstates: frozenset[str] = field(default=CONFLICTS)
    concurrency: int = 4

    def __post_init__(self) -> None:
        for name, value in (("attempts", self.attempts), ("concurrency", self.concurrency)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MisuseError("Retry", f"{name}={value!r} is not a whole number of at least 1")
        object.__setattr__(self, "delay", _pause(self.delay, "delay"))
        object.__setattr__(self, "max_delay", _pause(self.max_delay, "max_delay"))
        states: object = self.sqlstates
        if isinstance(states, str) or not isinstance(states, Iterable):
            raise MisuseError("Retry", f"sqlstates={states!r} is not a set of SQLSTATEs", 'Write {"40001", "40P01"}')
        for state in states:
            if not isinstance(state, str) or len(state) != 5:
                raise MisuseError("Retry", f"{state!r} is not a SQLSTATE", "They have five characters, such as '40001'")
        object.__setattr__(self, "sqlstates", frozenset(states))

    @classmethod
    def build(cls, value: Retry | int | None, *, where: str) -> Retry | None:
        """Return the policy that *value* stands for: a number is the number of attempts, None is no retry.

        Raises:
            MisuseError: it is neither.
        """
        if value is None or isinstance(value, Retry):
            return value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise MisuseError(where, f"retry={value!r} is no number of attempts", "Write retry=5, or retry=Retry(...)")
        return cls(attempts=value)

    def pause(self, number: int) -> float:
        """Return how long to wait, in seconds, after attempt *number*."""
        return random.uniform(0, min(self.max_delay, self.delay * 2 ** min(number - 1, 30)))


def _pause(value: Duration, name: str) -> float:
    if is_zero(value):
        return 0.0
    pause = seconds(value, where="Retry", name=name)
    if pause is None:
        raise MisuseError("Retry", f"{name} is None", "Write 0 for no pause")
    return pause


class Turn:
    """The attempts of one call: its scope says here how it ended, and the loop around it decides."""

    __slots__ = ("_deadline", "again", "around", "gate", "inside", "number", "owner", "policy", "sqlstate")

    def __init__(self, policy: Retry | None) -> None:
        self.policy = policy
        self.number = 0
        self.owner = False  # the scope owns its transaction, so that the whole call may run again
        self.inside = False  # another scope is open around the call
        self.around: str | None = None  # whose transaction the call works in, where it does not own one
        self.again = False
        self.sqlstate: str | None = None
        self.gate: Gate | None = None  # where the attempt counts as running
        self._deadline: Deadline | None = None

    @property
    def retries(self) -> bool:
        """Whether there may be a second attempt."""
        return self.policy is not None and self.policy.attempts > 1

    def deadline(self, timeout: float) -> Deadline:
        """Return the deadline of the whole call: the second attempt has what the first has left.

        It begins with the first scope. What the call waited for before (`@waits_for_row_change`) has no part in it.
        """
        if self._deadline is None:
            self._deadline = Deadline.within(timeout)
        return Deadline(timeout, self._deadline.at)

    @property
    def conflicted(self) -> bool:
        """Whether the attempt that has just ended met what is worth another one."""
        return self.policy is not None and self.sqlstate in self.policy.sqlstates

    @property
    def lost_outside(self) -> bool:
        """Whether it was not another call of the function that the attempt lost against, as far as can be told."""
        return self.number >= ALONE or self.sqlstate not in CONFLICTS

    @property
    def until(self) -> float | None:
        """When the deadline of the whole call is, on the clock of the loop."""
        return None if self._deadline is None else self._deadline.at

    def hurry(self, timeout: float | None) -> float | None:
        """Begin the deadline, if there is one, before the first scope does; return when it is."""
        return None if timeout is None else self.deadline(timeout).at

    async def begin(self, gate: Gate, *, alone: bool = False, until: float | None = None) -> None:
        """Count as running at *gate*, once it lets the attempt run."""
        await gate.begin(self, alone=alone, until=until)
        self.gate = gate

    def end(self) -> None:
        """The transaction of the attempt has ended: what its hooks call need not wait for it. Once is enough."""
        gate, self.gate = self.gate, None
        if gate is not None:
            gate.end(self)

    def start(self) -> None:
        """Begin the next attempt."""
        self.number += 1
        self.again = self.owner = False
        self.sqlstate = None

    def decide(self, error: BaseException | None, *, own: bool = False) -> bool:
        """Tell whether the call runs again after its owner has rolled back because of *error*.

        *own*: the error is of this very transaction's COMMIT, not of another one inside the call.
        """
        policy = self.policy
        self.sqlstate = _reason(error, own=own)
        if policy is None or self.sqlstate is None or self.number >= policy.attempts:
            return False
        in_time = self._deadline is None or self._deadline.left > 0
        self.again = in_time and (self.sqlstate in policy.sqlstates or self.sqlstate == _LOST)
        return self.again


_LOST = "lost"  # the COMMIT was lost, and the server says that nothing of it has happened


def _reason(error: BaseException | None, *, own: bool) -> str | None:
    """Return the SQLSTATE that made the owner roll back, looking through what was swallowed."""
    if isinstance(error, UnexpectedRollbackError):
        return _LOST if isinstance(error.__cause__, CommitOutcomeUnknownError) else driver.sqlstate(error.__cause__)
    if isinstance(error, (SerializationError, DeadlockError)) and not own:
        return None  # of another transaction, which has had its own attempts
    return LOCK_NOT_AVAILABLE if isinstance(error, LockTimeoutError) else driver.sqlstate(error)


async def run_with_retry(
    retry: Retry | None,
    *,
    function: str,
    key: object,
    attempt: Callable[[Turn], Awaitable[T]],
    timeout: float | None = None,
    gated: bool = True,
) -> T:
    """Await *attempt* until it succeeds, or is not worth another try.

    Args:
        retry: the policy; None means one attempt.
        function: the name of the call, for errors and logs.
        key: what the gate of second and later attempts belongs to: the decorated function.
        timeout: the seconds that the scopes of the call have, all together.
        gated: whether the first attempt may wait for another one; not where it begins inside a transaction.
        attempt: opens the scope, giving it the `Turn`, and runs the call.
    """
    turn = Turn(retry)
    if gated and turn.retries and retry is not None and not ambient.in_scope():
        await turn.begin(gate_of(key, retry.concurrency), until=turn.hurry(timeout))
    admitted: Gate | None = None
    while True:
        turn.start()
        try:
            with telemetry.span("txdeco.attempt", function=function, attempt=turn.number):
                return await attempt(turn)
        except Exception as error:
            failure = error
            if not turn.again or retry is None:
                _explain(error, turn, function)
                raise
        finally:
            turn.end()
            if admitted is not None:
                admitted.leave(conflicted=turn.conflicted)
                admitted = None
        log.info(
            "%s: attempt %d ended with SQLSTATE %s, trying again",
            function,
            turn.number,
            turn.sqlstate,
            extra={"txdeco_function": function, "txdeco_attempt": turn.number, "txdeco_sqlstate": turn.sqlstate},
        )
        admitted = await _admission(retry, turn, key, failure)


async def _admission(retry: Retry, turn: Turn, key: object, failure: Exception) -> Gate | None:
    """Wait to be let in, then pause: who pauses inside keeps the gate, so the more conflicts, the fewer at once.

    Inside another scope nobody waits at the gate: the locks of that scope may be what those inside wait for.
    """
    gate = None if turn.inside else gate_of(key, retry.concurrency)
    admitted = False
    try:
        async with asyncio.timeout_at(turn.until):
            if gate is not None:
                await gate.enter()
                admitted = True
            if gate is None or turn.lost_outside:
                await asyncio.sleep(retry.pause(turn.number))
            else:
                await gate.pause(retry.pause(turn.number))
            if gate is not None:
                await turn.begin(gate, alone=turn.number + 1 >= ALONE)
            admitted = False  # the attempt gives it back
            return gate
    except TimeoutError:
        failure.add_note("txdeco: no time was left for another attempt")
        raise failure from failure.__cause__
    finally:
        if gate is not None and admitted:
            gate.leave(conflicted=False)


def _explain(error: Exception, turn: Turn, function: str) -> None:
    """Say in the error how often the call was tried, or why it was not tried again."""
    if isinstance(error, (SerializationError, DeadlockError)) and turn.owner:
        error.attempts = turn.number
    state = driver.sqlstate(error)
    if turn.policy is not None and not turn.owner and state in turn.policy.sqlstates and turn.around is not None:
        error.add_note(f"txdeco: {function} declares retry, but was not retried here: it ran inside {turn.around}")

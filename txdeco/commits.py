"""How a transaction ends: a COMMIT that is not interrupted, a rollback that always happens, the truth about both."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.util.concurrency import greenlet_spawn

from txdeco import driver, guards
from txdeco.errors import (
    CommitOutcomeUnknownError,
    ConcurrentSessionUseError,
    ConnectionUnavailableError,
    DeadlockError,
    SerializationError,
    TxdecoError,
    UnexpectedRollbackError,
)
from txdeco.hooks import run_hooks
from txdeco.ledger import Failure, ledger_of, run_script, watch_of
from txdeco.stages import dropped_in, unwind
from txdeco.uninterrupted import finish
from txdeco.verification import Evidence

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import SessionTransaction

    from txdeco.ledger import Doom, Ledger
    from txdeco.scopes import Scope

    class Close(Protocol):
        """Closes the session of a call that raises *error*."""

        def __call__(self, error: BaseException | None, *, committed: bool) -> Awaitable[None]: ...


__all__ = ["break_up", "commit", "conclude", "conflict", "drop_connections", "end_commit", "no_connection", "roll_back"]

log = logging.getLogger("txdeco.transactions")

ROLLBACK_PATIENCE = 5.0
"""Seconds that a rollback may take: PostgreSQL undoes nothing then, so one that takes longer has lost its server."""


async def commit(
    session: AsyncSession, *, function: str, deadline: float | None = None, evidence: Evidence | None = None
) -> None:
    """Commit the session's outermost transaction, in which nothing has failed, or raise what kept it from that.

    It has been flushed, and *evidence* gathered: that may still be cancelled, the COMMIT may not. Instances are not
    expired. When this raises, the transaction is over: rolled back, or of unknown outcome.
    """
    ledger, sync = ledger_of(session), session.sync_session
    if rehearsed_failures:
        await _fail_as_rehearsed(session)
    if not ledger.watches:
        end_commit(sync, ledger)  # nothing was sent, so there is nothing to wait for
        return
    if ledger.gate is not None:
        await ledger.gate()
    sent = await finish(greenlet_spawn(end_commit, sync, ledger), until=deadline)
    if sent.error is not None or sent.cancelled is not None:
        failure = await _outcome(session, sent, evidence, function=function, deadline=deadline)
        if failure is not None:
            raise failure


def no_connection(error: PoolTimeoutError, session: AsyncSession, function: str) -> ConnectionUnavailableError:
    """Return what SQLAlchemy's pool timeout leaves a scope as."""
    pool = getattr(driver.bind_of(session.sync_session), "pool", None)
    timeout: Callable[[], float] | None = getattr(pool, "timeout", None)
    better = ConnectionUnavailableError(function, 0.0 if timeout is None else float(timeout()))
    better.__cause__ = error
    return better


rehearsed_failures: list[list[str]] = []
"""SQLSTATEs that the next commits fail with, in tests; see `txdeco.testing.failing_attempts`."""


async def _fail_as_rehearsed(session: AsyncSession) -> None:
    for failures in rehearsed_failures:
        if failures:
            state = failures.pop()
            await run_script(session, f"DO $$ BEGIN RAISE EXCEPTION 'rehearsed' USING ERRCODE = '{state}'; END $$")


def swallowed(ledger: Ledger, function: str, transaction: SessionTransaction | None = None) -> UnexpectedRollbackError:
    """Return the error for a transaction that would be rolled back although nobody has raised.

    *transaction*: the one that a failing flush may have ended, where nothing has failed on the server.
    """
    in_flush = getattr(transaction, "_rollback_exception", None)
    if driver.sqlstate(in_flush) == "25P02":
        in_flush = None  # it only met what an earlier error had done
    failure = ledger.failure or (Failure(in_flush) if in_flush is not None else ledger.last_error)
    if failure is None:
        return UnexpectedRollbackError(function, "an error while flushing was swallowed inside")
    error = UnexpectedRollbackError(
        function, "an error that had aborted the transaction was swallowed inside", failure.swallowed_at()
    )
    error.__cause__ = failure.error
    return error


def end_commit(sync: Session, ledger: Ledger) -> None:
    """Commit for txdeco: nothing is expired, and the hooks are not the session's to run."""
    expire, sync.expire_on_commit = sync.expire_on_commit, False
    ledger.expected = True
    try:
        type(sync).commit(sync)
    finally:
        ledger.expected = False
        sync.expire_on_commit = expire


async def _outcome(
    session: AsyncSession, sent: finish, evidence: Evidence | None, *, function: str, deadline: float | None
) -> BaseException | None:
    """Return what a COMMIT that failed, or that the task was cancelled during, ends in; clean up after it."""
    error, cancelled = sent.error, sent.cancelled
    if error is not None:
        error = _meaning(error, function, late=sent.late)
        after = await finish(_aftermath(session, error, evidence, deadline))
        cancelled = cancelled or after.cancelled
        error = after.result if after.error is None else after.error
    if cancelled is None:
        return error  # none where the COMMIT has been found to have happened
    cancelled.add_note(f"txdeco: {function} was cancelled while it committed; {_ending(error)}")
    unknown = isinstance(error, CommitOutcomeUnknownError)
    cancelled.txdeco_committed = None if unknown else error is None  # type: ignore[attr-defined]
    cancelled.__context__ = error
    return cancelled


async def _aftermath(
    session: AsyncSession, error: BaseException, evidence: Evidence | None, deadline: float | None
) -> BaseException | None:
    """Clean up after a COMMIT that failed, and find out what became of it where that was asked for."""
    await roll_back(session)
    if isinstance(error, CommitOutcomeUnknownError) and evidence is not None:
        return await evidence.settle(error, deadline)
    return error


def _ending(error: BaseException | None) -> str:
    if error is None:
        return "the transaction committed"
    if isinstance(error, CommitOutcomeUnknownError):
        return "it is unknown whether the transaction committed"
    return f"the transaction rolled back ({type(error).__name__})"


def _meaning(error: BaseException, function: str, *, late: bool) -> BaseException:
    """Tell apart what a failing COMMIT means: rolled back for certain, or anybody's guess."""
    if late:
        unknown = CommitOutcomeUnknownError(function, "no answer to COMMIT came before the deadline")
        unknown.__cause__ = error
        return unknown
    if isinstance(error, UnexpectedRollbackError):
        error.function = function
    if isinstance(error, (TxdecoError, InterfaceError)):  # the driver did not send it: the connection was gone before
        return error
    if isinstance(error, (DBAPIError, OSError)) and driver.is_fatal(error):
        unknown = CommitOutcomeUnknownError(function, "the connection was lost during COMMIT")
        unknown.__cause__ = error
        return unknown
    return conflict(error, function) or error


def conflict(error: BaseException, function: str) -> SerializationError | DeadlockError | None:
    """Return what SQLSTATE 40001 and 40P01 leave the owner of a transaction as; None for any other error."""
    state = driver.sqlstate(error)
    raised: SerializationError | DeadlockError
    if state == SerializationError.sqlstate:
        raised = SerializationError(function)
    elif state == DeadlockError.sqlstate:
        raised = DeadlockError(function)
    else:
        return None
    raised.__cause__ = error
    return raised


async def roll_back(session: AsyncSession) -> None:
    """Roll the session's outermost transaction back, to the end and without a word: another error is on its way.

    Where even that fails, or takes too long, the connection is dropped, which rolls back as surely.

    Raises:
        asyncio.CancelledError: the task was cancelled meanwhile; the rollback is done all the same.
        SystemExit, KeyboardInterrupt: they came meanwhile; the connection is dropped.
    """
    ledger, sync = ledger_of(session), session.sync_session
    if not sync.in_transaction():
        return
    if not ledger.watches:
        end_rollback(sync, ledger)
        return
    outcome = await finish(session.run_sync(end_rollback, ledger), until=no_later())
    cancelled = outcome.cancelled
    if outcome.error is not None:
        log.warning("a rollback failed; its connection is dropped", exc_info=outcome.error)
        cancelled = await drop_connections(session) or cancelled
        raise_if_exit(outcome.error)
    if cancelled is not None:
        raise cancelled


def no_later() -> float:
    """Return when a rollback has taken too long, on the clock of the event loop."""
    return asyncio.get_running_loop().time() + ROLLBACK_PATIENCE


async def drop_connections(session: AsyncSession) -> asyncio.CancelledError | None:
    """Drop the session's connections, whatever runs on them; return a cancellation that came meanwhile."""
    outcome = await finish(session.run_sync(end_connection, ledger_of(session)))
    if outcome.error is not None:
        log.warning("a connection could not be dropped", exc_info=outcome.error)
        raise_if_exit(outcome.error)
    return outcome.cancelled


def raise_if_exit(error: BaseException) -> None:
    """Raise *error* again if it ends the process: cleaning up may swallow its own failures, but not that."""
    if not isinstance(error, (Exception, asyncio.CancelledError)):
        raise error


def end_rollback(sync: Session, ledger: Ledger) -> None:
    """Roll back for txdeco: the hooks are not the session's to run."""
    ledger.expected = True
    try:
        type(sync).rollback(sync)
    finally:
        ledger.expected = False


def end_connection(sync: Session, ledger: Ledger) -> None:
    """Drop the session's connections, which rolls back whatever they were doing."""
    ledger.expected = True
    state = sync._close_state  # pyright: ignore[reportPrivateUsage]
    try:
        for connection in list(ledger.watches):
            if not connection.closed:  # first of all: the session would begin by rolling savepoints back, and wait
                connection.invalidate()
        type(sync).invalidate(sync)
    finally:
        ledger.expected = False
        sync._close_state = state  # it is not for this to say that the session is closed for good  # pyright: ignore[reportPrivateUsage]


async def conclude(
    session: AsyncSession,
    error: BaseException | None,
    *,
    function: str,
    close: Close | None = None,
) -> None:
    """End what is left of a provided session: commit on success, else roll back; then *close* it, and run the hooks.

    Closed first, since a hook that used the session would begin a transaction that nobody ends.

    Raises:
        UnexpectedRollbackError: nothing could be committed, though *error* is None.
        ConcurrentSessionUseError: another task is still inside a scope of the session.
        ConnectionUnavailableError: in place of an *error* that is SQLAlchemy's pool timeout.
    """
    ledger = ledger_of(session)
    try:
        await unwind(ledger)
    except asyncio.CancelledError as cancelled:
        await _roll_back_and_settle(session, cancelled, close)
        raise
    if ledger.scopes:
        raced = ConcurrentSessionUseError(function, ledger.scopes[0].function)
        await break_up(session, tuple(ledger.scopes), f"{function}, which provides its session, has ended around it")
        if error is None:
            raise raced
        return
    if error is None:
        try:
            await send_pending(session, function=function)
            asked_for = ledger.rollback_only
            if not asked_for and session.sync_session.in_transaction():
                await commit(session, function=function)
        except BaseException as raised:
            await settle_failed(session, raised, close=close)
            raise
        if not asked_for:
            await settle_hooks(ledger, committed=True, close=close)
            return
    await _roll_back_and_settle(session, error, close)
    if isinstance(error, PoolTimeoutError):
        raise no_connection(error, session, function)


async def send_pending(session: AsyncSession, *, function: str) -> None:
    """Flush what a provided session is about to commit. One that was told to roll back is left as it is.

    Raises:
        UnexpectedRollbackError: nothing of its transaction can be committed.
    """
    ledger, sync = ledger_of(session), session.sync_session
    transaction = sync.get_transaction()
    if ledger.rollback_only:
        return
    _refuse_lost(ledger, transaction, function)
    if transaction is not None and not driver.is_clean(sync):
        await session.flush()
        if not ledger.rollback_only:  # which may have been asked for meanwhile
            _refuse_lost(ledger, transaction, function)


def _refuse_lost(ledger: Ledger, transaction: SessionTransaction | None, function: str) -> None:
    if ledger.doomed is not None:
        raise doomed_by(ledger.doomed, function)
    if transaction is not None and (ledger.failure is not None or not transaction.is_active):
        raise swallowed(ledger, function, transaction)


async def _roll_back_and_settle(session: AsyncSession, error: BaseException | None, close: Close | None) -> None:
    cancelled: asyncio.CancelledError | None = None
    try:
        await roll_back(session)
    except asyncio.CancelledError as meanwhile:
        cancelled = meanwhile
    await settle_hooks(ledger_of(session), committed=False, close=close, error=error)
    if cancelled is not None:
        raise cancelled


async def break_up(session: AsyncSession, scopes: Sequence[Scope], why: str) -> None:
    """Roll back what other tasks are in the middle of: their *scopes* are told *why* when they end.

    Raises:
        asyncio.CancelledError: the task was cancelled meanwhile; everything is done all the same.
    """
    ledger = ledger_of(session)
    for scope in scopes:
        scope.broken = why
    hooks, ledger.hooks = ledger.hooks, []
    guards.seal(session.sync_session)  # they stay in the ledger until they leave: the session is still theirs
    cancelled = await drop_connections(session)
    await run_hooks(hooks, committed=False)
    if cancelled is not None:
        raise cancelled


def doomed_by(doom: Doom, function: str) -> UnexpectedRollbackError:
    """Return the error for a transaction that is doomed, though nobody has raised."""
    error = UnexpectedRollbackError(function, doom.why)
    error.__cause__ = doom.error
    return error


async def settle_failed(session: AsyncSession, raised: BaseException, *, close: Close | None = None) -> None:
    """Clean up after `commit` raised: roll back what is left, and run the hooks that fit the outcome."""
    ledger = ledger_of(session)
    committed = getattr(raised, "txdeco_committed", False)
    if committed is None or isinstance(raised, CommitOutcomeUnknownError):
        ledger.hooks = []
        log.warning("the outcome of a COMMIT is unknown: no hook runs")
        await roll_back(session)
    elif committed:
        await finish_hooks(settle_hooks(ledger, committed=True, close=close, error=raised))
    else:
        await _roll_back_and_settle(session, raised, close)


async def finish_hooks(hooks: Coroutine[Any, Any, None]) -> None:
    """Run the hooks of a call that was cancelled while it committed: another cancellation tells nothing new."""
    after = await finish(hooks)
    if after.error is not None and not isinstance(after.error, asyncio.CancelledError):
        log.error("what follows a COMMIT failed", exc_info=after.error)


async def settle_hooks(
    ledger: Ledger, *, committed: bool, since: int = 0, close: Close | None = None, error: BaseException | None = None
) -> None:
    """Run the hooks of the transaction that has just ended: all but those that were registered before it began.

    The session is closed first, because of *error* where there is one: it is what the call raises.
    """
    if len(ledger.hooks) > since:
        if close is not None:
            await close(error, committed=committed)
        hooks = ledger.hooks[since:]
        del ledger.hooks[since:]
        await run_hooks(hooks, committed=committed)


@event.listens_for(Engine, "commit")
def _refuse_lost_commit(connection: Connection) -> None:
    """Look a last time whether something has failed: while the session was flushed, or in a user's `before_commit`."""
    watch = watch_of(connection)
    if watch is None or watch.autocommit or watch.ledger.failure is None:
        return
    ledger = watch.ledger
    if ledger.expected or ledger.managed or ledger.hooks or ledger.released:
        raise swallowed(ledger, ledger.scopes[-1].function if ledger.scopes else "session.commit()")


@event.listens_for(Session, "before_commit")
def _refuse_untrue_commit(sync: Session) -> None:
    """Users may commit a provided session, or one that scopes have worked in; they are told what cannot be."""
    ledger = ledger_of(sync)
    dropped = None if ledger.expected or not ledger.suspended else dropped_in(ledger)
    if dropped is not None:
        raise dropped
    if ledger.expected or ledger.scopes or sync.get_nested_transaction() is not None:
        return
    refusal = _refusal(ledger)
    ledger.released = {}  # nobody has forgotten them; if they cannot be committed, an error says so
    if refusal is not None:
        raise refusal


def _refusal(ledger: Ledger) -> UnexpectedRollbackError | None:
    if ledger.doomed is not None:
        return doomed_by(ledger.doomed, "session.commit()")
    if ledger.rollback_only:
        return UnexpectedRollbackError("session.commit()", "set_rollback_only() was called in this transaction")
    if ledger.failure is not None and (ledger.managed or ledger.hooks or ledger.released):
        return swallowed(ledger, "session.commit()")
    return None

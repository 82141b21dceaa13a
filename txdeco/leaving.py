"""What leaving a scope does: commit, release or roll back, and say truthfully which it was."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from txdeco import ambient, driver
from txdeco.callsites import site
from txdeco.commits import (
    break_up,
    commit,
    conflict,
    doomed_by,
    drop_connections,
    end_commit,
    finish_hooks,
    no_connection,
    no_later,
    raise_if_exit,
    roll_back,
    settle_hooks,
    swallowed,
)
from txdeco.errors import (
    CommitOutcomeUnknownError,
    ConcurrentSessionUseError,
    LockTimeoutError,
    SessionOwnershipError,
    TransactionTimeoutError,
    UnexpectedRollbackError,
)
from txdeco.ledger import Doom, open_savepoints, run_script
from txdeco.propagation import Action
from txdeco.stages import unwind
from txdeco.uninterrupted import finish
from txdeco.verification import Evidence

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from txdeco.scopes import Scope

__all__ = ["leave", "undo_savepoint"]

T = TypeVar("T")

_JOINED_FAILED = "a scope that had joined this transaction failed, and its error was caught"


async def leave(scope: Scope, error: BaseException | None) -> None:
    """End *scope*, whose body has returned, or raised *error*. Returning lets *error* pass on unchanged."""
    passing = error
    try:
        if scope.ledger.suspended:
            await unwind(scope.ledger, upto=scope)
    except asyncio.CancelledError as cancelled:
        error = cancelled
    if scope.entry is not None:
        ambient.pop(scope.entry)
        scope.entry = None
    late = scope.own_deadline and scope.deadline is not None and await scope.deadline.stop(error)
    raised: BaseException | None = None
    try:
        raised = await _end(scope, error, late=late)
    except BaseException as failed:
        raised = failed
        raise
    finally:
        scope.detach()
        if scope.span is not None:
            scope.span.end(raised, action=scope.action.name.lower())
        if scope.opened is not None:
            await scope.opened.close(raised, committed=raised is None and not scope.rollback_only)
    if raised is not None and raised is not passing:
        raise raised


def _end(scope: Scope, error: BaseException | None, *, late: bool) -> Coroutine[Any, Any, BaseException | None]:
    """End the scope's part of the transaction; what is awaited is what its call raises, None where it returns."""
    if scope.broken is not None or scope.ledger.scopes[-1] is not scope:
        return _break(scope, error)
    if late and (error is None or isinstance(error, asyncio.CancelledError)):
        late_error = TransactionTimeoutError(scope.function, scope.spec.timeout or 0.0)
        late_error.__cause__ = error
        error, scope.late = late_error, True
    if scope.owner:
        return _leave_owner(scope, error)
    if scope.action is Action.SAVEPOINT:
        return _leave_savepoint(scope, error)
    if scope.action is Action.JOIN:
        return _leave_joined(scope, error)
    return _leave_autocommit(scope, error)


def _wants_commit(scope: Scope, error: BaseException | None) -> bool:
    """Tell whether the body ended in a way that commits. Past its deadline nothing does."""
    return error is None or (not scope.late and isinstance(error, scope.spec.no_rollback_for))


def _refusal(scope: Scope, error: BaseException | None) -> UnexpectedRollbackError | None:
    """Return why a scope that wants to commit cannot."""
    nested, ledger = scope.nested, scope.ledger
    refusal: UnexpectedRollbackError | None = None
    if scope.doomed is not None:
        refusal = doomed_by(scope.doomed, scope.function)
    elif ledger.failure is not None or (nested is not None and not nested.is_active):
        refusal = swallowed(ledger, scope.function, nested)
    elif scope.root is not None:
        now = scope.session.sync_session.get_transaction()
        if now is not scope.root:
            refusal = UnexpectedRollbackError(scope.function, "its transaction was ended inside it")
        elif not scope.root.is_active:
            refusal = swallowed(ledger, scope.function, scope.root)
    elif scope.action is Action.AUTOCOMMIT and _flushed_badly(scope):
        refusal = swallowed(ledger, scope.function)
    if refusal is not None and error is not None and refusal.__cause__ is None:
        refusal.__cause__ = error
    return refusal


def _flushed_badly(scope: Scope) -> bool:
    """Tell whether a flush failed: SQLAlchemy has rolled back by itself, and sends nothing more."""
    sync = scope.session.sync_session
    innermost = sync.get_nested_transaction() or sync.get_transaction()
    return innermost is not None and not innermost.is_active


# Owners ---------------------------------------------------------------------------------------------------------------


async def _leave_owner(scope: Scope, error: BaseException | None) -> BaseException | None:
    if not _wants_commit(scope, error):
        return await _rolled_back(scope, error, becomes=_translated(scope, error))
    refusal, sync = _refusal(scope, error), scope.session.sync_session
    if refusal is None and not scope.rollback_only and not driver.is_clean(sync):
        try:
            await _in_time(scope, scope.session.flush())
        except BaseException as failed:
            return await _commit_failed(scope, failed, error)
        refusal = _refusal(scope, error)
    if scope.rollback_only:
        return await _rolled_back(scope, None, becomes=error)
    if refusal is not None:
        return await _rolled_back(scope, refusal, becomes=_from_exception(refusal, error))
    try:
        evidence = await _in_time(scope, Evidence.gather(scope.session)) if scope.spec.verify_commit else None
        until = None if scope.deadline is None else scope.deadline.at
        if until is not None and scope.own_deadline and asyncio.get_running_loop().time() >= until:
            raise TransactionTimeoutError(scope.function, scope.spec.timeout or 0.0)
        await commit(scope.session, function=scope.function, deadline=until, evidence=evidence)
    except BaseException as failed:
        return await _commit_failed(scope, failed, error)
    if scope.ledger.hooks:
        await _after(scope, None, committed=True)
    return error


def _in_time(scope: Scope, work: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return *work*, which can still be undone, bound by the deadline that the scope has of its own, if it has one."""
    if not scope.own_deadline or scope.deadline is None:
        return work
    return scope.deadline.bound(work, scope.function)


def _from_exception(refusal: UnexpectedRollbackError, error: BaseException | None) -> UnexpectedRollbackError:
    """Where an exception was to be re-raised after the COMMIT, the refusal comes from that one."""
    if error is not None and refusal.__cause__ is not error:
        refusal.__context__ = refusal.__cause__
        refusal.__cause__ = error
    return refusal


async def _rolled_back(
    scope: Scope, error: BaseException | None, *, becomes: BaseException | None, own: bool = False
) -> BaseException | None:
    """Roll back because of *error* (None: it was asked for), clean up, and return what the call raises."""
    again = scope.turn is not None and scope.turn.decide(error, own=own)
    cancelled: asyncio.CancelledError | None = None
    try:
        await roll_back(scope.session)
    except asyncio.CancelledError as meanwhile:
        cancelled, again = meanwhile, False
    if scope.loaded is not None:
        scope.loaded.restore(scope.session.sync_session, clean=again)
    if again:
        del scope.ledger.hooks[scope.hooks_before :]
    else:
        await _after(scope, becomes, committed=False)
    if cancelled is not None:
        raise cancelled
    return becomes


async def _commit_failed(scope: Scope, failed: BaseException, error: BaseException | None) -> BaseException:
    committed = getattr(failed, "txdeco_committed", False)
    if committed is None or isinstance(failed, CommitOutcomeUnknownError):
        del scope.ledger.hooks[scope.own_hooks :]  # nobody knows which of them should run
        return failed
    if committed:
        await finish_hooks(_after(scope, failed, committed=True))
        return failed
    if error is not None and failed.__cause__ is None:
        failed.__context__ = error
    return await _rolled_back(scope, failed, becomes=_translated(scope, failed), own=True) or failed


async def _after(scope: Scope, raised: BaseException | None, *, committed: bool) -> None:
    """The transaction has ended, and the call raises *raised*: run its hooks outside of it."""
    scope.detach()
    if scope.turn is not None:
        scope.turn.end()
    close = None if scope.opened is None else scope.opened.close
    await settle_hooks(scope.ledger, committed=committed, since=scope.own_hooks, close=close, error=raised)


def _translated(scope: Scope, error: BaseException | None) -> BaseException | None:
    """Return *error* as it leaves the scope: by the names of txdeco where they say more than the SQLSTATE."""
    if isinstance(error, PoolTimeoutError):
        return no_connection(error, scope.session, scope.function)
    if not isinstance(error, DBAPIError):
        return error
    state = driver.sqlstate(error)
    better: BaseException | None = conflict(error, scope.function) if scope.owner else None
    if state == "55P03" and scope.lock_timeout is not None and _waited(scope) >= scope.lock_timeout * 0.9:
        better = _lock_timeout(scope)  # and not a NOWAIT of the user's own
    elif _deadline_passed(scope) and (state in {"57014", "25P04"} or driver.is_fatal(error)):
        better = TransactionTimeoutError(scope.function, scope.spec.timeout or 0.0)
    if better is None:
        return error
    better.__cause__ = error
    return better


def _deadline_passed(scope: Scope) -> bool:
    """Tell whether the scope's own deadline has passed; the server's clock may be a little ahead."""
    return scope.own_deadline and scope.deadline is not None and scope.deadline.left <= 0.02


def _waited(scope: Scope) -> float:
    """Return how long ago the last statement of the scope began, in seconds."""
    started = max((watch.started for watch in scope.ledger.watches.values()), default=0.0)
    return monotonic() - started


def _lock_timeout(scope: Scope) -> LockTimeoutError:
    hint = f"In {scope.function}"
    if scope.opened is not None and scope.inside:
        hint += ": a scope around it in this task may hold the lock, and would never release it while it waits"
    return LockTimeoutError(("what the statement wanted",), "A lock", _waited(scope), hint=hint)


# Savepoints and joined scopes -----------------------------------------------------------------------------------------


async def _leave_savepoint(scope: Scope, error: BaseException | None) -> BaseException | None:
    if not _wants_commit(scope, error):
        await undo_savepoint(scope)
        return _translated(scope, error)
    if scope.rollback_only:
        await undo_savepoint(scope)
        return error
    refusal = _refusal(scope, error)
    if refusal is not None:
        await undo_savepoint(scope)
        return _from_exception(refusal, error)
    try:
        await _in_time(scope, _release(scope))
    except BaseException as failed:
        await undo_savepoint(scope)
        return _translated(scope, failed)
    _note_release(scope)
    return error


def _note_release(scope: Scope) -> None:
    """The work now hangs on somebody who may forget to commit it; that of inner scopes hangs on the outer ones."""
    if scope.undeclared and scope.ledger.scopes[0] is scope:
        scope.ledger.released[site(scope.function)] = None


async def _release(scope: Scope) -> None:
    nested, sync = scope.nested, scope.session.sync_session
    if nested is None:
        return
    if nested not in scope.ledger.begun and driver.is_clean(sync):
        nested.commit()  # the server has not seen it, so nothing is sent
        return
    if scope.restore and driver.rides_along(sync):
        for watch in scope.ledger.watches.values():
            watch.farewell = ";".join(scope.restore)
    elif scope.restore:
        await run_script(scope.session, ";".join(scope.restore))
    await scope.session.run_sync(lambda _: nested.commit())


async def undo_savepoint(scope: Scope) -> None:
    """Roll back to the scope's savepoint, if it has one; where that fails, drop the connection: nothing may commit."""
    nested = scope.nested
    if nested is None or nested.session is None:
        return
    outcome = await finish(scope.session.run_sync(lambda _: nested.rollback()), until=no_later())
    cancelled = outcome.cancelled
    if outcome.error is not None:
        scope.bearer.broken = f"its savepoint could not be rolled back: {outcome.error or 'no answer came'}"
        cancelled = await drop_connections(scope.session) or cancelled
        raise_if_exit(outcome.error)
    if cancelled is not None:
        raise cancelled


async def _leave_joined(scope: Scope, error: BaseException | None) -> BaseException | None:
    bearer, sync = scope.bearer, scope.session.sync_session
    if error is not None and not _wants_commit(scope, error):
        bearer.doomed = bearer.doomed or Doom(_JOINED_FAILED, error, open_savepoints(sync))
        return _translated(scope, error)
    if not bearer.rollback_only and (scope.ledger.failure is not None or _flushed_badly(scope)):
        refusal = _from_exception(swallowed(scope.ledger, scope.function), error)
        bearer.doomed = bearer.doomed or Doom(_JOINED_FAILED, refusal, open_savepoints(sync))
        return refusal
    if scope.restore and scope.ledger.failure is None:
        try:
            await _in_time(scope, run_script(scope.session, ";".join(scope.restore)))
        except BaseException as failed:
            bearer.doomed = bearer.doomed or Doom(_JOINED_FAILED, failed, open_savepoints(sync))
            return _translated(scope, failed)
    if not bearer.rollback_only:
        _note_release(scope)
    return error


async def _leave_autocommit(scope: Scope, error: BaseException | None) -> BaseException | None:
    raised, committed = error, _wants_commit(scope, error)
    refusal = _refusal(scope, error) if committed else None
    if refusal is not None:
        raised, committed = _from_exception(refusal, error), False
    if committed:
        try:
            await _in_time(scope, scope.session.run_sync(end_commit, scope.ledger))
        except BaseException as failed:
            raised, committed = _translated(scope, failed), False
            if isinstance(raised, (TransactionTimeoutError, asyncio.CancelledError)) or driver.is_fatal(failed):
                del scope.ledger.hooks[scope.own_hooks :]  # nobody knows whether what was under way is stored
    if not committed:
        await roll_back(scope.session)
    await _after(scope, raised, committed=committed)
    return raised


# Another task is still inside -----------------------------------------------------------------------------------------


async def _break(scope: Scope, error: BaseException | None) -> BaseException | None:
    """The scopes of one session did not end in order: roll everything back, never commit half of it."""
    if scope.broken is not None:
        return error or SessionOwnershipError(scope.function, scope.broken)
    scopes = scope.ledger.scopes
    place = scopes.index(scope)
    later = scopes[place + 1 :]
    for each in scopes[:place]:
        each.broken = f"{later[0].function}, inside it, outlived the scope that it was called from"
    await break_up(scope.session, later, f"{scope.function}, around it, has ended while it was still open")
    return error or ConcurrentSessionUseError(scope.function, later[0].function)

"""What a refused lock is called: which one it was, how long it was waited for, and who has it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from txdeco import driver
from txdeco.errors import LockTimeoutError, MisuseError, PropagationError, UnsupportedError
from txdeco.locking.blockers import Holders, holders_of_rows, holders_of_tables
from txdeco.locking.tables import shown
from txdeco.locking.taking import LOCK_NOT_AVAILABLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncConnection

    from txdeco.errors import TxdecoError
    from txdeco.locking.taking import Taking
    from txdeco.locking.wanted import WantedRows

__all__ = ["refusal", "repeatable_read"]

log = logging.getLogger("txdeco.locks")

_DIVISION_BY_ZERO = "22012"  # what the checks in our scripts raise
_WRONG_OBJECT_TYPE = "42809"
_READ_ONLY_TRANSACTION = "25006"


async def refusal(error: DBAPIError, taking: Taking, rows: Sequence[WantedRows], function: str) -> TxdecoError | None:
    """Return our error for a database error that came out of taking locks; None if it is something else."""
    match driver.sqlstate(error):
        case state if state == LOCK_NOT_AVAILABLE:
            waited = taking.waited
            await taking.recover(error)
            return await _timeout(taking, rows, waited)
        case state if state == _DIVISION_BY_ZERO and (taking.keys or taking.tables):
            await taking.recover(error)
            return await _check_failed(taking, function)
        case state if state == _WRONG_OBJECT_TYPE and taking.tables:
            return _no_table(taking, function)
        case state if state == _READ_ONLY_TRANSACTION:
            return _read_only(taking, rows, function)
        case _:
            return None


async def _timeout(taking: Taking, rows: Sequence[WantedRows], waited: float) -> LockTimeoutError:
    refused = [(key.shown, key.mode, -number) for number, key in enumerate(taking.keys, 1)]
    refused += [(shown(each.table), each.mode.value, number) for number, each in enumerate(taking.tables, 1)]
    try:
        connection = await taking.scope.session.connection()
        await connection.exec_driver_sql("SET LOCAL lock_timeout = 100")  # whoever asks may not have to wait again
        if not taking.done:
            holders = await holders_of_tables(connection, taking.names, taking.tables, taking.keys, waited)
        else:
            refused, holders = await _of_rows(connection, taking, rows, waited)
    except SQLAlchemyError:
        log.debug("who holds the lock could not be found out", exc_info=True)
        holders = Holders()
    held = [each for each in refused if each[2] in holders] or refused
    return LockTimeoutError(tuple(name for name, _, _ in held), held[0][1], waited, holders.all)


async def _of_rows(
    connection: AsyncConnection, taking: Taking, rows: Sequence[WantedRows], waited: float
) -> tuple[list[tuple[str, str, int]], Holders]:
    """Look at the classes of rows in the order they were locked in: the first with a holder is the one."""
    refused: list[tuple[str, str, int]] = []
    for wanted in rows:
        asked = [(wanted.shown(key), f"FOR {wanted.mode.value}", number) for number, key in enumerate(wanted.keys, 1)]
        refused = refused or asked
        holders = await holders_of_rows(connection, taking.names, wanted, waited)
        if holders:
            return asked, holders
    return refused, Holders()


async def _check_failed(taking: Taking, function: str) -> TxdecoError:
    connection = await taking.scope.session.connection()
    if taking.keys:
        level = (await connection.exec_driver_sql("SHOW transaction_isolation")).scalar_one()
        if level == "repeatable read":
            return repeatable_read(function)
    return _no_table(taking, function)


def repeatable_read(function: str) -> MisuseError:
    """Return the error for an advisory lock at REPEATABLE READ, where it would protect what was read too early."""
    return MisuseError(
        function,
        "at REPEATABLE READ the SELECT of an advisory lock takes the snapshot before the lock is granted",
        "Use READ COMMITTED, or SERIALIZABLE with retry, or advisory_lock(source, key) around the call",
    )


def _no_table(taking: Taking, function: str) -> UnsupportedError:
    names = ", ".join(shown(wanted.table) for wanted in taking.tables)
    return UnsupportedError(
        f"{function}: LOCK TABLE {names}",
        "one of them is a view: PostgreSQL would lock the tables behind it in an order of its own, or nothing",
        "Name the tables that the view reads",
    )


def _read_only(taking: Taking, rows: Sequence[WantedRows], function: str) -> PropagationError | UnsupportedError:
    """Name what the server grants to nobody who only reads: row locks; on a standby, strong table locks as well."""
    classes = ", ".join(each.mapper.class_.__name__ for each in rows)
    outer = taking.scope.ledger.reader
    if taking.done and outer is not None:
        return PropagationError(
            function,
            f"it locks rows of {classes}, and {outer.function} declared its transaction read-only",
            "Leave read_only out there, or lock in a transaction of its own: give the lock a source, "
            "or use propagation='requires_new'",
        )
    return UnsupportedError(
        f"{function}: a lock on {', '.join(filter(None, (*(shown(each.table) for each in taking.tables), classes)))}",
        "the transaction is read-only, by the engine's options or the server's, or because the server is a standby",
        "Lock on a connection that may write",
    )

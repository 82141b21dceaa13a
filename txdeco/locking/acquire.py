"""All locks of one call, taken as the last step of entering its scope: advisory keys, tables, then rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError

from txdeco.commits import conflict
from txdeco.locking import order, rows
from txdeco.locking.isolation import isolation_of
from txdeco.locking.refusals import refusal, repeatable_read
from txdeco.locking.tables import names_for
from txdeco.locking.taking import Taking
from txdeco.locking.wanted import advisory_wanted, rows_wanted, tables_wanted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from txdeco.locking.plan import LockPlan
    from txdeco.scopes import Scope

__all__ = ["Acquisition"]


class Acquisition:
    """The locks of one call. It is a scope's preamble: called with the scope, it takes them.

    Attributes:
        function: who takes them, for errors.
        plan: what was declared.
        keys: the advisory locks.
        timeout: the deadline of all of them, in seconds.
        rows: once taken, the rows of each `RowLock` of the plan, in the order of its keys.
    """

    __slots__ = ("_arguments", "function", "keys", "plan", "rows", "timeout")

    def __init__(self, plan: LockPlan, arguments: Mapping[str, Any], *, function: str) -> None:
        """Complete *plan* by the *arguments* of a call, by the names of the parameters.

        Raises:
            MisuseError: an argument leads to no key.
        """
        self.plan = plan
        self._arguments = arguments
        self.keys = advisory_wanted(plan.advisory, arguments, where=function)
        self.function = function
        self.timeout = plan.timeout
        self.rows: list[list[Any]] = []

    async def __call__(self, scope: Scope) -> None:
        """Take the locks in *scope*.

        Raises:
            LockTimeoutError: one was not granted in time.
            RowNotFoundError: a row is not there.
            LockOrderError: the lock order watch is on, and somebody takes two of them the other way round.
            MisuseError: the transaction cannot hold them.
            UnsupportedError: the database or its driver has no such locks, or a table is a view.
        """
        plan, function = self.plan, self.function
        names = names_for(scope.session, what=function)
        self._refuse_misuse(scope)
        tables = tables_wanted(plan, names)
        wanted, asked = rows_wanted(plan.rows, self._arguments, names, where=function)
        if order.watching is not None:
            order.watching.acquiring(scope.session.sync_session, function, self.keys, tables, wanted)
        taking = Taking(scope, names, self.keys, tables, timeout=plan.timeout, rows_follow=bool(wanted))
        found: dict[Any, dict[tuple[Any, ...], Any]] = {}
        try:
            await taking.take(patient=any(lock.patient for lock in plan.tables))
            for each in wanted:
                found[each.mapper] = await rows.lock(each, taking, last=each is wanted[-1])
        except DBAPIError as error:
            refused = await refusal(error, taking, wanted, function)
            if refused is None and not scope.owner and len(scope.ledger.scopes) == 1:
                refused = conflict(error, function)  # no scope around this one will say it
            if refused is None:
                raise
            raise refused from error
        self.rows = [
            [found[lock.mapper][key] for key in keys if key in found.get(lock.mapper, ())]
            for lock, keys in zip(plan.rows, asked, strict=True)
        ]

    def _refuse_misuse(self, scope: Scope) -> None:
        if self.keys and isolation_of(scope) == "REPEATABLE READ":
            raise repeatable_read(self.function)

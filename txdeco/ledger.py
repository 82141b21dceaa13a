"""What is known of one session, and of each connection it uses: kept by SQLAlchemy's events, read by the scopes.

Three things cannot be asked of PostgreSQL afterwards, so they are written down as they happen: the first database
error that aborted the transaction (asyncpg drops the answer to COMMIT), what was executed before anybody declared a
transaction, and whether released work was ever committed.
"""

from __future__ import annotations

import re
import weakref
from asyncio import CancelledError
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import Session

from txdeco import driver
from txdeco.callsites import warn
from txdeco.errors import MisuseError, UncommittedWorkWarning
from txdeco.reading import leaves_nothing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import SessionTransaction

    from txdeco.hooks import Hook
    from txdeco.scopes import Scope
    from txdeco.stages import Stage

_KEY = "txdeco.ledger"
_WATCH = "_txdeco_watch"
_ENDS = re.compile(
    r"""\s*(COMMIT|END|ABORT|BEGIN|START\s+TRANSACTION|PREPARE\s+TRANSACTION
        |ROLLBACK(?!\s+(WORK\s+|TRANSACTION\s+)?TO\b))\b""",
    re.I | re.VERBOSE,
)
SCRIPT = "txdeco_script"
_SAVEPOINT_COMMANDS = ("SAVEPOINT ", "RELEASE SAVEPOINT ", "ROLLBACK TO SAVEPOINT ")


class Failure:
    """A database error that aborted a transaction at a certain depth of savepoints."""

    __slots__ = ("depth", "error", "watch")

    def __init__(self, error: BaseException, watch: Watch | None = None) -> None:
        self.error = error
        self.watch = watch
        self.depth = 0 if watch is None else watch.depth

    def swallowed_at(self) -> str | None:
        """Return where the error was caught: the outermost frame that its traceback has reached."""
        trace = self.error.__traceback__
        if trace is None:
            return None
        code = trace.tb_frame.f_code
        return f"{code.co_filename}:{trace.tb_lineno} in {code.co_qualname}"


class Doom:
    """Why a transaction must not commit although nobody may raise, and the savepoints whose rollback would heal it."""

    __slots__ = ("error", "lasting", "savepoints", "why")

    def __init__(
        self,
        why: str,
        error: BaseException | None,
        savepoints: Sequence[SessionTransaction] = (),
        *,
        lasting: bool = False,
    ) -> None:
        self.why = why
        self.error = error
        self.savepoints = savepoints
        self.lasting = lasting  # what was lost was in a transaction that is over: a later scope does not heal it


class Rider:
    """A script that rides along with the next SAVEPOINT (the *levels*-th one) in its round trip."""

    __slots__ = ("error", "levels", "script")

    def __init__(self, script: str, levels: int) -> None:
        self.script = script
        self.levels = levels
        self.error: BaseException | None = None

    def send(self, context: Any, savepoint: str) -> None:
        """Send both; if the script fails, go back to the savepoint, which then stands as if it had come alone."""
        try:
            driver.send_simple(context, f"{savepoint};{self.script}")
        except Exception as error:
            connection = context.root_connection
            if driver.is_fatal(error) or driver.is_closed(connection):
                raise
            driver.send_simple(context, f"ROLLBACK TO {savepoint}")
            self.error = driver.wrapped(error, self.script, context.dialect)


class Watch:
    """What happened on one connection since its session began to use it."""

    __slots__ = ("autocommit", "begins", "depth", "farewell", "ledger", "started", "statements")

    def __init__(self, ledger: Ledger, transaction: SessionTransaction, *, autocommit: bool) -> None:
        self.ledger = ledger
        self.begins = weakref.ref(transaction)
        self.autocommit = autocommit
        self.depth = 0
        self.statements: set[str] = set()
        self.farewell: str | None = None
        self.started = monotonic()  # when its last statement began

    @property
    def is_beginning(self) -> bool:
        """Whether SQLAlchemy's event `after_begin` is under way: what it sets, it sets in every transaction."""
        doing = getattr(self.begins(), "_current_fn", None)
        return getattr(doing, "__name__", None) == "_connection_for_bind"

    @property
    def is_flushing(self) -> bool:
        """Whether the statement comes from a flush: whose work that is, the stages tell."""
        return bool(getattr(getattr(self.begins(), "session", None), "_flushing", False))


class Ledger:
    """What txdeco knows of one session. There is exactly one, in `session.info`."""

    __slots__ = (
        "begun",
        "closed",
        "committed",
        "doomed",
        "expected",
        "failure",
        "gate",
        "hooks",
        "keeper",
        "last_error",
        "managed",
        "rehearsal",
        "released",
        "rider",
        "rollback_only",
        "scopes",
        "source",
        "suspended",
        "uses",
        "watches",
        "written",
    )

    def __init__(self) -> None:
        self.source: Any = None  # where txdeco opened the session from; None for one that users made
        self.managed = False  # provided by txdeco, which commits what is left
        self.rehearsal = False  # a session of `rolled_back_session`: nothing it does is ever really committed
        self.closed: str | None = None  # why it can never be used again
        self.scopes: list[Scope] = []  # declared and open, the innermost last
        self.suspended: list[Stage] = []  # async generators whose consumers have their turn
        self.uses = 0  # how often they did more than read
        self.hooks: list[Hook] = []  # registered in this transaction, in order
        self.keeper: Callable[[Session, bool], None] | None = None  # runs the hooks when users end the transaction
        self.doomed: Doom | None = None  # a joined scope failed in a transaction without a scope
        self.rollback_only = False
        self.written = False  # the transaction that nobody declared has done more than read
        self.released: dict[str, None] = {}  # whose work is in a transaction that nobody declared, each once, in order
        self.watches: dict[Connection, Watch] = {}
        self.failure: Failure | None = None  # the error that made a COMMIT impossible, unless a savepoint undid it
        self.last_error: Failure | None = None  # the last one of this transaction, undone or not
        self.begun: set[SessionTransaction] = set()  # those the server knows of
        self.rider: Rider | None = None
        self.gate: Callable[[], Awaitable[None]] | None = None  # asked before COMMIT; raises if nobody wants it now
        self.expected = False  # txdeco itself is ending the transaction
        self.committed = False  # the outermost transaction has just committed

    @property
    def reader(self) -> Scope | None:
        """The outermost scope that declared the transaction read-only; those for locks inside only share it."""
        return next((scope for scope in self.scopes if scope.spec.read_only), None)

    def statements(self) -> set[str]:
        """Return the texts executed since the transaction began and before anybody declared one."""
        return {text for watch in self.watches.values() for text in watch.statements}

    def forget_transaction(self) -> None:
        """Start afresh: the outermost transaction has ended."""
        for connection in self.watches:
            connection.__dict__.pop(_WATCH, None)
        self.watches.clear()
        self.begun.clear()
        self.released = {}
        self.written = False
        self.failure = self.last_error = None
        if not (self.expected and self.doomed is not None and self.doomed.lasting):
            self.doomed = None
        self.committed = False
        if not (self.managed and self.expected):  # a scope has ended its own transaction, not the block that is meant
            self.rollback_only = False


def open_savepoints(session: Session | None) -> list[SessionTransaction]:
    """Return the savepoints that are open, the innermost first."""
    steps: list[SessionTransaction] = []
    step = None if session is None else session.get_nested_transaction()
    while step is not None:
        if step.nested:
            steps.append(step)
        step = step.parent
    return steps


def ledger_of(session: AsyncSession | Session) -> Ledger:
    """Return the ledger of *session*, opened at the first call."""
    sync = session if isinstance(session, Session) else session.sync_session
    info = sync.info  # an AsyncSession's own `info` is a longer way there
    ledger: Ledger | None = info.get(_KEY)
    if ledger is None:
        ledger = info[_KEY] = Ledger()
    return ledger


def watch_of(connection: Connection) -> Watch | None:
    """Return the watch over *connection*, or None where no session uses it."""
    return connection.__dict__.get(_WATCH)


@event.listens_for(Session, "after_begin")
def _connection_taken(session: Session, transaction: SessionTransaction, connection: Connection) -> None:
    if not connection.dialect.is_async:
        return
    ledger = ledger_of(session)
    ledger.begun.add(transaction)
    if connection not in ledger.watches:
        watch = Watch(ledger, transaction, autocommit=driver.is_autocommit(connection))
        connection.__dict__[_WATCH] = ledger.watches[connection] = watch


@event.listens_for(Session, "before_flush")
def _flushing(session: Session, context: Any, instances: Any) -> None:
    ledger: Ledger | None = session.info.get(_KEY)
    if ledger is not None and ledger.suspended:
        for stage in ledger.suspended:
            stage.flush()


@event.listens_for(Session, "after_commit")
def _committed(session: Session) -> None:
    ledger: Ledger | None = session.info.get(_KEY)
    if ledger is not None and session.get_nested_transaction() is None:
        ledger.released = {}
        ledger.committed = True


@event.listens_for(Session, "after_rollback")
def _rolled_back(session: Session) -> None:
    """A rollback was asked for, or an error made it so: what is lost is not lost unnoticed, as it is by `close`."""
    ledger: Ledger | None = session.info.get(_KEY)
    if ledger is not None and session.get_nested_transaction() is None:
        ledger.released = {}


@event.listens_for(Session, "after_soft_rollback")
def _savepoint_rolled_back(session: Session, previous: SessionTransaction) -> None:
    ledger: Ledger | None = session.info.get(_KEY)
    if ledger is None or not previous.nested:
        return
    ledger.hooks = [hook for hook in ledger.hooks if previous not in hook.savepoints]
    bearers: list[Ledger | Scope] = [ledger, *ledger.scopes]
    for bearer in bearers:
        if bearer.doomed is not None and previous in bearer.doomed.savepoints:
            bearer.doomed = None


@event.listens_for(Session, "after_transaction_end")
def _transaction_ended(session: Session, transaction: SessionTransaction) -> None:
    ledger: Ledger | None = session.info.get(_KEY)
    if ledger is None:
        return
    if transaction.parent is not None:
        ledger.begun.discard(transaction)
        return
    released, committed = {} if ledger.rollback_only else ledger.released, ledger.committed
    ledger.forget_transaction()
    if released:
        _warn_of_lost_work(released)
    if not ledger.expected:
        for stage in tuple(ledger.suspended):
            stage.vanish()
    if ledger.keeper is not None and not ledger.expected and not ledger.scopes:  # a scope runs its hooks when it ends
        ledger.keeper(session, committed)


def _warn_of_lost_work(released: dict[str, None]) -> None:
    warn(
        f"{', '.join(released)} released work into a transaction that nobody declared, and the session closed without "
        "a commit: the work is lost. Commit the session, or call it before anything else is written, so that it owns "
        "its transaction",
        UncommittedWorkWarning,
    )


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def _executing(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    watch = watch_of(connection)
    if watch is None or statement.startswith(_SAVEPOINT_COMMANDS):
        return statement, parameters
    watch.started = monotonic()
    if watch.ledger.suspended:
        watch.ledger.uses += not (watch.is_flushing or leaves_nothing(statement))
    if watch.ledger.scopes:
        if _ENDS.match(statement) and not watch.autocommit and not context.execution_options.get(SCRIPT):
            raise _ended_inside(statement.split(None, 1)[0].upper())
        return statement, parameters
    if not watch.is_beginning:
        watch.statements.add(statement)
    return statement, parameters


@event.listens_for(Engine, "commit")
def _committing(connection: Connection) -> None:
    watch = watch_of(connection)
    if watch is not None and watch.ledger.scopes and not watch.ledger.expected and not watch.autocommit:
        raise _ended_inside("connection.commit()")


def _ended_inside(what: str) -> MisuseError:
    return MisuseError(
        what,
        "it would end the transaction of a declared scope from inside",
        "Leave the scope to commit; raise an exception, or call set_rollback_only(), to roll back",
    )


@event.listens_for(Engine, "savepoint")
def _savepoint(connection: Connection, name: str | None) -> None:
    if (watch := watch_of(connection)) is not None:
        watch.depth += 1


@event.listens_for(Engine, "rollback_savepoint")
def _rollback_savepoint(connection: Connection, name: str, context: Any) -> None:
    if (watch := watch_of(connection)) is not None:
        failure = watch.ledger.failure
        if failure is not None and failure.watch is watch and failure.depth >= watch.depth:
            watch.ledger.failure = None
        watch.depth -= 1
        watch.farewell = None


@event.listens_for(Engine, "release_savepoint")
def _release_savepoint(connection: Connection, name: str, context: Any) -> None:
    if (watch := watch_of(connection)) is not None:
        watch.depth -= 1


@event.listens_for(Engine, "handle_error")
def _error(context: Any) -> None:
    connection: Any = context.connection
    watch = None if connection is None else watch_of(connection)
    if watch is None or connection is None:
        return
    origin = context.original_exception
    if isinstance(origin, CancelledError):
        driver.close_cancelled(connection)
    if watch.ledger.failure is not None:
        return
    if driver.from_server(origin) or context.is_disconnect:
        error = context.sqlalchemy_exception or origin
        watch.ledger.last_error = Failure(error, watch)
        if not watch.autocommit:
            watch.ledger.failure = watch.ledger.last_error


@event.listens_for(Engine, "do_execute_no_params")
def _send_script(cursor: Any, statement: str, context: Any) -> bool | None:
    if context.dialect.driver != "asyncpg" or not context.execution_options.get(SCRIPT):
        return None
    driver.send_simple(context, statement)
    return True


@event.listens_for(Engine, "do_execute")
def _send_savepoint(cursor: Any, statement: str, parameters: Any, context: Any) -> bool | None:
    if parameters or not statement.startswith(_SAVEPOINT_COMMANDS) or context.dialect.driver != "asyncpg":
        return None
    watch = watch_of(context.root_connection)
    if watch is None:
        return None
    rider = watch.ledger.rider
    if statement.startswith("SAVEPOINT ") and rider is not None:
        rider.levels -= 1
        if rider.levels == 0:
            watch.ledger.rider = None
            rider.send(context, statement)
            return True
    elif statement.startswith("RELEASE ") and watch.farewell is not None:
        statement, watch.farewell = f"{statement};{watch.farewell}", None
    driver.send_simple(context, statement)
    return True


async def run_script(session: AsyncSession, script: str) -> None:
    """Send several commands in one round trip inside the session's transaction.

    BEGIN goes first where the server has not seen it; where the innermost savepoint has not been sent either, it rides
    along in the same round trip. The simple protocol knows no parameters: identifiers come from the dialect's
    preparer, numbers from `int`, anything else has no place in a script.

    Raises:
        sqlalchemy.exc.DBAPIError: a command failed; the innermost savepoint, or else the transaction, is aborted.
    """
    ledger = ledger_of(session)
    ledger.uses += 1
    levels = _savepoints_to_send(session.sync_session, ledger)
    if levels and driver.rides_along(session.sync_session):
        rider = ledger.rider = Rider(script, levels)
        try:
            await session.connection()
        finally:
            ledger.rider = None
        if rider.error is not None:
            raise rider.error
        return
    connection = await session.connection()
    await connection.exec_driver_sql(script, execution_options={SCRIPT: True, "no_parameters": True})


def _savepoints_to_send(session: Session, ledger: Ledger) -> int:
    """Count the savepoints that SQLAlchemy has begun and the server has not seen: they are sent at the first use."""
    count, step = 0, session.get_nested_transaction()
    while step is not None and step.parent is not None and step not in ledger.begun:
        count += bool(step.nested)
        step = step.parent
    return count

"""What only the DBAPI driver can say or do: the single module that knows asyncpg and psycopg apart.

SQLAlchemy prepares every statement, which costs a round trip more per connection and new text, and sends BEGIN lazily.
A script goes through PostgreSQL's simple query protocol instead: any number of commands in one round trip, warm and
cold (https://www.postgresql.org/docs/current/protocol-flow.html). It still runs as a SQLAlchemy statement, taken over
in an event (see the ledger), so that logging, error handling and the care for cancelled statements stay SQLAlchemy's.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import concurrency

from txdeco.uninterrupted import finish

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection

await_ = getattr(concurrency, "await_", None) or concurrency.await_only  # the name before SQLAlchemy 2.1

LOST = frozenset({"08000", "08001", "08003", "08004", "08006", "08P01", "57P01", "57P02", "57P03", "57P05"})


def sqlstate(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a database error, wrapped by SQLAlchemy or raw; None for anything else."""
    origin = getattr(error, "orig", None) or error
    state = getattr(origin, "sqlstate", None)
    return state if isinstance(state, str) else None


def from_server(error: BaseException | None) -> bool:
    """Tell whether the server itself reported *error*: an error of the driver (a bad parameter) aborts nothing."""
    origin = getattr(error, "orig", None) or error
    if getattr(getattr(origin, "diag", None), "severity", None) is not None:  # psycopg
        return True
    cause = getattr(origin, "__cause__", None) or origin
    return getattr(cause, "severity", None) is not None


def is_fatal(error: BaseException | None) -> bool:
    """Tell whether *error* ended the connection, so that what it interrupted may have happened or not."""
    if sqlstate(error) in LOST or getattr(error, "connection_invalidated", False):
        return True
    origin = getattr(error, "orig", None) or error
    return isinstance(origin, OSError) or ("asyncpg" in type(origin).__module__ and not from_server(error))


def is_raw(error: BaseException) -> bool:
    """Tell whether *error* comes from server or driver as it is: SQLAlchemy 2.0 wraps none of those of connecting."""
    return sqlstate(error) is not None or is_fatal(error)


def is_postgresql(session: Session) -> bool:
    """Tell whether *session* speaks to PostgreSQL; a session with several binds is judged by what it would say."""
    dialect = dialect_of(session)
    return dialect is not None and dialect.name == "postgresql"


def dialect_of(session: Session) -> Any:
    """Return the dialect of the session's one bind, or None where there are several."""
    bind = bind_of(session)
    return None if bind is None else bind.dialect


def bind_of(session: Session) -> Any:
    """Return the session's one bind, an `Engine` or a `Connection`, or None where there are, or may be, several."""
    own = session.__dict__
    if own.get("_Session__binds") or own.get("binds") or type(session).get_bind is not Session.get_bind:
        return None
    return session.bind


def is_used_up(bind: Any) -> bool:
    """Tell whether the pool of *bind* has no connection to give, not even a new one."""
    pool = bind.pool
    return (
        isinstance(pool, QueuePool)
        and pool.checkedin() == 0
        and pool.overflow() >= getattr(pool, "_max_overflow", 0) >= 0
    )


def is_unreachable(error: BaseException, bind: Any) -> bool:
    """Tell of a connection that was not had in time whether it was the server that did not answer, not a full pool."""
    return bind is not None and not isinstance(error, PoolTimeoutError) and not is_used_up(bind.engine)


def is_autocommit(bind: Any) -> bool:
    """Tell whether connections of *bind* are in AUTOCOMMIT unless they are told otherwise."""
    level = bind.get_execution_options().get("isolation_level") or getattr(
        bind.dialect, "_on_connect_isolation_level", None
    )
    return level is not None and str(level).upper() == "AUTOCOMMIT"


def is_clean(session: Session) -> bool:
    """Tell whether nothing waits to be flushed: SQLAlchemy's own check, for building `new` and `dirty` takes longer."""
    return session._is_clean()  # pyright: ignore[reportPrivateUsage]


def holds_instances(session: Session) -> bool:
    """Tell whether *session* has any instances, pending ones included."""
    return bool(session.identity_map or session._new or session._deleted)  # pyright: ignore[reportPrivateUsage]


def is_closed(connection: Connection) -> bool:
    """Tell whether the driver already knows that the connection is gone, so that nothing can be sent on it."""
    if connection.invalidated or connection.closed:
        return True
    closed = getattr(connection.connection.driver_connection, "is_closed", None)
    return bool(closed()) if callable(closed) else False


def close_cancelled(connection: Connection) -> None:
    """Close a connection whose statement was cancelled, to the end. Runs in SQLAlchemy's greenlet.

    SQLAlchemy closes it too, but stops at a second cancellation; anyio's cancel scopes deliver one at every await. The
    backend would then go on with its statement, and keep its locks, as if nobody had left.
    """
    if connection.invalidated or connection.closed or connection.dialect.driver != "asyncpg":
        return
    until = asyncio.get_running_loop().time() + 2  # where the server cannot be heard
    await_(finish(connection.connection.driver_connection.close(), until=until))  # type: ignore[union-attr]


def supports_scripts(dialect: Any) -> bool:
    """Tell whether several commands can be sent in one round trip."""
    return dialect is not None and dialect.name == "postgresql" and dialect.driver in {"asyncpg", "psycopg"}


def rides_along(session: Session) -> bool:
    """Tell whether a script can share the round trip of a SAVEPOINT."""
    dialect = dialect_of(session)
    return dialect is not None and dialect.name == "postgresql" and dialect.driver == "asyncpg"


def send_simple(context: Any, script: str) -> None:
    """Send *script* in one round trip, after BEGIN where SQLAlchemy has not sent it yet. Runs in SQLAlchemy's greenlet.

    Raises:
        sqlalchemy.exc.DBAPIError: as any statement of SQLAlchemy would, once it has left the event.
    """
    adapter = context.root_connection.connection.dbapi_connection

    async def send(connection: Any) -> None:
        async with adapter._execute_mutex:
            await _begin(adapter)
            try:
                await connection.execute(script)
            except Exception as error:
                adapter._handle_exception(error)

    adapter.run_async(send)


async def _begin(adapter: Any) -> None:
    started = adapter._started if hasattr(adapter, "_started") else adapter._transaction is not None
    if not started:
        await adapter._start_transaction()


def wrapped(error: BaseException, statement: str, dialect: Any) -> BaseException:
    """Return *error* as SQLAlchemy would raise it for *statement*."""
    base = dialect.loaded_dbapi.Error if hasattr(dialect, "loaded_dbapi") else dialect.dbapi.Error
    if not isinstance(error, base):
        return error
    raised: BaseException = DBAPIError.instance(statement, None, error, base, dialect=dialect)
    raised.__cause__ = error
    return raised


def server_pid(connection: Any) -> int | None:
    """Return the process id that the server, or a pooler in between, gave the driver's *connection* when it began."""
    ask: Callable[[], int] | None = getattr(connection, "get_server_pid", None)  # asyncpg
    if ask is not None:
        return int(ask())
    info: Any = getattr(connection, "info", None)  # psycopg
    pid: int | None = getattr(info, "backend_pid", None)
    return pid


def on_end(connection: Any, callback: Callable[[Any], None]) -> Callable[[], None]:
    """Have *callback* called when the driver's *connection* ends, however it does; return what takes that back.

    Only asyncpg can tell. For other drivers this does nothing.
    """
    add = getattr(connection, "add_termination_listener", None)
    if not callable(add):
        return lambda: None
    add(callback)
    return lambda: connection.remove_termination_listener(callback)

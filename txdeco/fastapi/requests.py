"""The session of one request: opened by `Depends(get_db)`, committed before the response starts.

FastAPI unwinds two exit stacks for a request. The one of the *function scope* ends when the handler has returned and
its result is serialised, before the response is sent; the one of the *request scope*, where a plain `Depends` with
`yield` lives, ends after the response was sent. The unit of work is put onto the first one by hand, so that a plain
`Depends(get_db)` commits in time. FastAPI documents what `scope="function"` does, but not where it keeps the stack;
therefore the order is proved on a throw-away application before the first request is served.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import sys
from collections.abc import Hashable
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, cast, get_args

import anyio
import fastapi
from fastapi.params import Depends
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from txdeco import driver
from txdeco.commits import send_pending
from txdeco.errors import MisuseError, SessionOwnershipError, UnsupportedError
from txdeco.fastapi.clients import Client
from txdeco.ledger import ledger_of
from txdeco.sessions import provide

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session
    from starlette.types import Message, Receive, Scope

    from txdeco.dependencies import DatabaseDependency

_STACK = "fastapi_function_astack"
_WORK = "txdeco.work"
_TOO_OLD = "Install fastapi>=0.121.1"
_UNKNOWN = "Install a release of FastAPI that txdeco names as tested, and report this one"
_OTHERWISE = (
    "Open a session of its own for what runs beside or after the handler: "
    "`async with create_db_context(source)() as session`; a dependency that needs the session in its teardown is "
    'declared with scope="function"'
)


@functools.cache
def signature_for_fastapi() -> inspect.Signature:
    """Return the signature that makes FastAPI pass the request, which leaves no trace in OpenAPI."""
    if "scope" not in inspect.signature(Depends).parameters:
        raise _unsupported("has no function scope for dependencies", _TOO_OLD)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter("connection", kind, annotation=HTTPConnection)])


async def open_for_request(connection: HTTPConnection, dependency: DatabaseDependency) -> AsyncSession:
    """Return the session of the request behind *connection*, opened at the first call; its function scope ends it."""
    stack = _function_stack(connection)
    await _prove_order()
    work: _Work | None = connection.scope.get(_WORK)
    if work is None or work.stack is not stack:
        work = connection.scope[_WORK] = _Work(connection, stack)
    unit = work.unit_of(dependency)
    if unit is not None and not _asks_for_several(connection, dependency):
        return unit.session
    endpoint = connection.scope.get("endpoint")
    _refuse_plain_def(connection, endpoint, dependency)
    return await stack.enter_async_context(_Unit(work, dependency, f"{_name(endpoint)} through Depends(get_db)"))


def _function_stack(connection: HTTPConnection) -> AsyncExitStack[Any]:
    stack: AsyncExitStack[Any] | None = connection.scope.get(_STACK)
    if not isinstance(stack, AsyncExitStack):
        raise _unsupported("keeps no exit stack for the function scope of a request", _TOO_OLD)
    return stack


class _Work:
    """What one request has to commit, and who waits for it. It is in the request's scope until all of it has ended."""

    __slots__ = ("_client", "_open", "_scope", "_settled", "stack")

    def __init__(self, connection: HTTPConnection, stack: AsyncExitStack[Any]) -> None:
        self.stack = stack
        self._scope = connection.scope
        self._client = Client(connection) if isinstance(connection, Request) else None
        self._open: list[_Unit] = []
        self._settled = False  # one of several is being committed: the others must follow

    def unit_of(self, dependency: DatabaseDependency) -> _Unit | None:
        return next((unit for unit in self._open if unit.dependency is dependency), None)

    def add(self, unit: _Unit) -> None:
        self._open.append(unit)
        if self._client is not None:
            ledger_of(unit.session).gate = self._client.stay
            self._client.listen()

    async def remove(self, unit: _Unit) -> None:
        self._open.remove(unit)
        ledger_of(unit.session).gate = None
        if self._open:
            return
        if self._scope.get(_WORK) is self:
            del self._scope[_WORK]
        if self._client is not None:  # whoever sends the response may listen now
            await self._client.leave()

    async def settle(self) -> None:
        """Find what would keep one of several databases from committing, before the first of them does."""
        if len(self._open) == 1 or self._settled:
            return
        for unit in reversed(self._open):
            await unit.flush()
        ledgers = [ledger_of(unit.session) for unit in self._open]
        if self._client is not None and any(ledger.watches for ledger in ledgers):
            await self._client.stay()
        for ledger in ledgers:
            ledger.gate = None
        self._settled = True


class _Unit:
    """A unit of work that ends undisturbed.

    By then a task may run that has the session and should not: FastAPI starts the body of a server-sent-events handler
    before the function scope ends. And anyio's cancel scopes, unlike a task's `cancel`, cancel again at every await.
    """

    __slots__ = ("_around", "_function", "_unit", "_work", "dependency", "session")

    session: AsyncSession

    def __init__(self, work: _Work, dependency: DatabaseDependency, function: str) -> None:
        self._work = work
        self._function = function
        self._unit = provide(dependency.source, function=function)
        self._around = sys.exception()  # is being handled around the whole request
        self.dependency = dependency

    async def __aenter__(self) -> AsyncSession:
        self.session = await self._unit.__aenter__()
        self._work.add(self)
        return self.session

    async def flush(self) -> None:
        """Send what the session has not sent yet, unless nothing of it is going to be committed."""
        await send_pending(self.session, function=self._function)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        swallowed_error, refusal = sys.exception(), None
        if error is None and swallowed_error is not self._around:
            error = swallowed_error  # by a dependency on the way out: the handler has failed
        if error is None:
            try:
                self._refuse_open_generators()
                await self._work.settle()
            except BaseException as found:
                error = refusal = found
        await self._end(error)
        if refusal is not None:
            raise refusal

    def _refuse_open_generators(self) -> None:
        """Refuse to undo silently what a declared generator has done: a dependency, or a loop that was not finished."""
        ledger = ledger_of(self.session)
        nothing_kept = driver.is_clean(self.session.sync_session) and not ledger.hooks
        for stage in ledger.suspended:
            scope = stage.scope
            if scope is None or stage.dropped or (scope.read_only and nothing_kept):
                continue
            if stage.may_be_closed(ledger.scopes):
                raise MisuseError(
                    scope.function,
                    "it is still open when the work of the request ends, and would be rolled back: it is a dependency "
                    "with `yield`, which FastAPI ends after the response, or an iteration that was not finished",
                    'Declare the dependency with Depends(..., scope="function"); iterate to the end, or close it with '
                    "contextlib.aclosing(); declare what only reads with read_only=True",
                )

    async def _end(self, error: BaseException | None) -> None:
        session = self.session
        ending = _ending.set(True)
        _seal(session.sync_session)
        try:
            with anyio.CancelScope(shield=True):
                try:
                    await self._unit.__aexit__(None if error is None else type(error), error, None)
                finally:
                    await self._work.remove(self)
        finally:
            _ending.reset(ending)
            if ledger_of(session).closed is None:  # its source keeps it, and may give it out again
                _unseal(session.sync_session)


_SEALED = ("_connection_for_bind", "_autobegin_t")
# set for what ends a unit: tasks that are older do not have it
_ending: contextvars.ContextVar[bool] = contextvars.ContextVar("txdeco.fastapi.ending", default=False)


def _seal(session: Session) -> None:
    """Refuse whatever would send something or begin anew through *session*, but for what ends its unit."""
    for method in _SEALED:
        setattr(session, method, _Seal(session, getattr(session, method)))


def _unseal(session: Session) -> None:
    for method in _SEALED:
        del session.__dict__[method]


class _Seal:
    __slots__ = ("_method", "_session")

    def __init__(self, session: Session, method: Callable[..., Any]) -> None:
        self._session = session
        self._method = method

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not _ending.get() or not self._session.in_transaction():  # a hook would begin anew, and lose its work
            raise SessionOwnershipError("session", "the request that it belongs to has ended", _OTHERWISE)
        return self._method(*args, **options)


def _asks_for_several(connection: HTTPConnection, dependency: DatabaseDependency) -> bool:
    """Tell whether somebody in this route asked FastAPI not to share what *dependency* gives (`use_cache=False`)."""
    overrides = getattr(connection.scope.get("app"), "dependency_overrides", {})
    pending = [getattr(connection.scope.get("route"), "dependant", None)]
    while pending:
        asked = pending.pop()
        if asked is not None:
            if not asked.use_cache and overrides.get(asked.call, asked.call) is dependency:
                return True
            pending.extend(asked.dependencies)
    return False


def _refuse_plain_def(connection: HTTPConnection, endpoint: Any, dependency: DatabaseDependency) -> None:
    """Refuse a `def` handler that takes the session itself: in its thread it cannot await, and would do nothing."""
    look = _asked_for_by_plain_def if isinstance(endpoint, Hashable) else _asked_for_by_plain_def.__wrapped__
    wanted = () if endpoint is None else look(endpoint)
    overrides = getattr(connection.scope.get("app"), "dependency_overrides", {}) if wanted else {}
    if any(overrides.get(call, call) is dependency for call in wanted):
        raise MisuseError(
            where=_name(endpoint),
            why="it is a plain `def`, which FastAPI runs in a thread, and takes an AsyncSession, which it cannot await",
            fix="Make it `async def`",
        )


@functools.lru_cache(maxsize=4096)
def _asked_for_by_plain_def(endpoint: Callable[..., Any]) -> tuple[Any, ...]:
    """Return what the parameters of *endpoint* depend on; nothing if it is async, and so may have a session."""
    if _is_async(endpoint) or _is_async(getattr(endpoint, "__call__", None)):  # noqa: B004 - a callable object's own
        return ()
    try:
        parameters = inspect.signature(endpoint, eval_str=True).parameters.values()
    except NameError:  # an annotation that only type checkers can read
        parameters = inspect.signature(endpoint).parameters.values()
    annotations = [getattr(p.annotation, "__value__", p.annotation) for p in parameters]  # looks into a `type` alias
    marks = [p.default for p in parameters] + [mark for each in annotations for mark in get_args(each)[1:]]
    return tuple(mark.dependency for mark in marks if isinstance(mark, Depends))


def _is_async(call: Any) -> bool:
    while isinstance(call, functools.partial):
        call = call.func
    call = inspect.unwrap(call) if callable(call) else call
    # 3.11 has no inspect.markcoroutinefunction: asyncio's marker is what FastAPI looks for there
    marked = getattr(call, "_is_coroutine", None) is not None
    return marked or inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call)


def _name(endpoint: Any) -> str:
    name = getattr(endpoint, "__qualname__", None) or type(endpoint).__qualname__
    return f"{getattr(endpoint, '__module__', None) or '?'}.{name}"


class _ProbeError(Exception):
    """Raised where a COMMIT would fail."""


_TEAPOT = 418  # no route answers with it
_proved = False


async def _prove_order() -> None:
    """See once in a process that an error at the end of the function scope becomes the error response."""
    global _proved
    if _proved:
        return
    if not Client(Request({"type": "http"})).listens:
        raise _unsupported("has a Starlette whose Request keeps its `receive` elsewhere", _UNKNOWN)
    # a task with a context of its own: nothing of the running request shows in the trial, or the other way round
    starts = await asyncio.create_task(_trial(), context=contextvars.Context())
    if starts != [_TEAPOT]:
        raise _unsupported(
            f"does not end the function scope of a request before its response starts (its trial answered {starts})",
            _UNKNOWN,
        )
    _proved = True


async def _trial() -> list[int]:
    """Serve one request whose function scope fails at its end; return the statuses that were sent."""
    app = fastapi.FastAPI(openapi_url=None)
    starts: list[int] = []

    async def fail() -> None:
        raise _ProbeError

    async def answer(request: Request, error: Exception) -> Response:
        return Response(status_code=_TEAPOT)

    async def handler(request: Request) -> str:
        request.scope[_STACK].push_async_callback(fail)
        return "success"

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            starts.append(message["status"])

    app.add_exception_handler(_ProbeError, answer)
    app.add_api_route("/", handler, methods=["GET"])
    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": "/", "raw_path": b"/", "query_string": b"", "root_path": "", "headers": [],
        "client": None, "server": ("txdeco", 80),
    }  # fmt: skip
    with suppress(Exception):  # what goes wrong shows in what was sent
        async with asyncio.timeout(5):
            await app(scope, cast("Receive", anyio.sleep_forever), send)  # there is no body to receive
    return starts


def _unsupported(why: str, fix: str) -> UnsupportedError:
    return UnsupportedError("Depends(get_db)", f"FastAPI {fastapi.__version__} {why}", fix)

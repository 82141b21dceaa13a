"""Which parameter is the session, and how the arguments of a call are read and completed."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from typing import TYPE_CHECKING, Annotated, Any, NewType, Optional, TypeVar

import pytest
import wrapt
from fastapi import Depends
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session
from typing_extensions import TypeAliasType

from txdeco import injected, injects_session
from txdeco.arguments import Arguments, Shape
from txdeco.errors import MisuseError
from txdeco.locking.templates import Path
from txdeco.signatures import INJECTED, find_session, parameters_of, without

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession as OnlyForCheckers


class OwnSession(AsyncSession):
    """A session class of a user."""


Bound = TypeVar("Bound", bound=AsyncSession)
Free = TypeVar("Free")
Statement = TypeAliasType("Statement", AsyncSession)  # `type Statement = AsyncSession`
OneOf = TypeVar("OneOf", AsyncSession, OwnSession)
New = NewType("New", AsyncSession)
Dep = Annotated[AsyncSession, Depends(lambda: None)]
SESSION = AsyncSession()
OTHER = AsyncSession()


def shape_of(function: Any, *, injects: bool = True, rows: tuple[str, ...] = (), path: str | None = None) -> Shape:
    parameters = parameters_of(function, "transactional")
    if path is not None:
        return Shape(parameters, None, Path.parse(path, where="test"))
    return Shape(parameters, find_session(parameters), None, injects, rows)


async def class_(db: AsyncSession) -> None: ...
async def own(db: OwnSession) -> None: ...
async def union(db: AsyncSession | None) -> None: ...
async def optional(db: Optional[AsyncSession]) -> None: ...  # noqa: UP045
async def annotated(db: Annotated[AsyncSession, Depends(lambda: None)]) -> None: ...
async def alias(db: Dep) -> None: ...
async def variable(db: Bound) -> None: ...
async def new(db: New) -> None: ...
async def scoped(db: async_scoped_session[AsyncSession]) -> None: ...
async def quoted(db: "AsyncSession") -> None: ...  # noqa: UP037
async def unresolvable(db: somewhere.AsyncSession | None) -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def in_annotated(db: Annotated[AsyncSession, Missing()]) -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def in_optional(db: Optional[somewhere.AsyncSession]) -> None: ...  # type: ignore[name-defined]  # noqa: F821, UP045


async def half_quoted(db: Optional["AsyncSession"]) -> None: ...  # noqa: UP045, UP037
async def constrained(db: OneOf) -> None: ...
async def type_statement(db: Statement) -> None: ...
async def nested_quotes(db: "Missing | 'AsyncSession'") -> None: ...  # type: ignore[name-defined]  # noqa: F821, UP037


ANNOTATED = [half_quoted, constrained, nested_quotes, class_, own, union, optional, annotated, alias, variable, new]
ANNOTATED += [scoped, quoted, unresolvable, in_annotated, in_optional, type_statement]


@pytest.mark.parametrize("function", ANNOTATED, ids=lambda function: function.__name__)
def test_a_parameter_annotated_as_a_session_is_the_session(function: Any) -> None:
    """However `AsyncSession` is spelt in an annotation, the parameter is found, importable or not."""
    assert find_session(parameters_of(function, "transactional")) == "db"


def test_without_an_annotation_the_name_decides() -> None:
    """A parameter named session is the session where its annotation does not say otherwise."""

    async def bare(session, n): ...  # type: ignore[no-untyped-def]
    async def anything(n: int, session: Any) -> None: ...
    async def unknown(session: OnlyForCheckers) -> None: ...
    async def cookie(session: dict[str, str]) -> None: ...
    async def none_at_all(n: int, sessions: dict[str, AsyncSession]) -> None: ...

    async def no_annotation(session: ") not Python (") -> None: ...  # type: ignore[valid-type]  # noqa: F722
    async def a_call(session: "Missing()") -> None: ...  # type: ignore[valid-type]  # noqa: F821, UP037
    async def free(session: Free) -> None: ...  # type: ignore[valid-type]

    by_name = (bare, anything, unknown, no_annotation, a_call, free)
    assert {find_session(parameters_of(function, "transactional")) for function in by_name} == {"session"}

    async def number(session: int | None) -> None: ...

    for function in (cookie, none_at_all, number):
        assert find_session(parameters_of(function, "transactional")) is None


def test_of_two_sessions_one_must_be_called_session() -> None:
    """Several annotated parameters are refused unless one of them has the name."""

    async def clear(archive: AsyncSession, session: AsyncSession) -> None: ...
    async def unclear(source: AsyncSession, target: AsyncSession) -> None: ...

    assert find_session(parameters_of(clear, "transactional")) == "session"
    with pytest.raises(MisuseError, match=r"unclear.*source, target.*session=\"source\""):
        find_session(parameters_of(unclear, "transactional"))


def test_a_synchronous_session_is_refused() -> None:
    """`session: Session` is a mistake that is named when the function is decorated."""

    async def wrong(session: Session) -> None: ...

    with pytest.raises(MisuseError, match="synchronous Session"):
        find_session(parameters_of(wrong, "transactional"))


def complete(function: Any, *args: Any, injects: bool = True, **kwargs: Any) -> tuple[Any, inspect.BoundArguments]:
    """Do what a decorator does with a call; return the session it saw, and what reaches the function."""
    shape = shape_of(function, injects=injects)
    call = Arguments(shape, None, args, kwargs)
    session = call.session()
    if injects and session is None:
        call.put(str(shape.session), SESSION)
    bound = inspect.signature(function).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return session, bound


async def first(session: AsyncSession, n: int, k: int = 0) -> None: ...
async def middle(n: int, session: AsyncSession, k: int = 0) -> None: ...
async def last(n: int, k: int = 0, session: AsyncSession | None = None) -> None: ...
async def keyword(n: int, k: int = 0, *, session: AsyncSession = INJECTED) -> None: ...
async def only_positional(session: AsyncSession, n: int, /, k: int = 0) -> None: ...
async def rest(session: AsyncSession, n: int, *k: int) -> None: ...


@pytest.mark.parametrize("function", [first, middle, last, keyword, only_positional, rest])
def test_the_session_is_filled_in_where_callers_do_not_see_it(function: Any) -> None:
    """Positional arguments mean the parameters that callers see, wherever the session stands among them."""
    session, bound = complete(function, 1, 2)
    assert session is None
    k = (2,) if function is rest else 2
    assert (bound.arguments["n"], bound.arguments["k"], bound.arguments["session"]) == (1, k, SESSION)


@pytest.mark.parametrize("function", [first, middle, last, only_positional, rest])
def test_an_explicit_session_wins_by_position(function: Any) -> None:
    """A session in its own place is taken for it."""
    args: list[Any] = [1, 2]
    place = list(inspect.signature(function).parameters).index("session")
    args.insert(place, OTHER)
    session, bound = complete(function, *args)
    assert session is OTHER
    assert bound.arguments["n"] == 1
    assert bound.arguments["session"] is OTHER


@pytest.mark.parametrize("function", [first, middle, last, keyword, rest])
def test_an_explicit_session_wins_by_name(function: Any) -> None:
    """A session by name leaves the positions to the others."""
    session, bound = complete(function, 1, session=OTHER)
    assert session is OTHER
    assert (bound.arguments["n"], bound.arguments["session"]) == (1, OTHER)


@pytest.mark.parametrize("nothing", [None, INJECTED])
def test_none_and_injected_say_nothing(nothing: Any) -> None:
    """None and `INJECTED` are the same as leaving the session out, by name and by position."""
    for session, bound in (
        complete(first, nothing, 1, 2),
        complete(first, 1, session=nothing),
        complete(last, 1, 2, nothing),
        complete(keyword, 1, session=nothing),
    ):
        assert session is None
        assert (bound.arguments["n"], bound.arguments["session"]) == (1, SESSION)


def test_a_default_that_is_no_session_says_nothing() -> None:
    """``session=Depends(get_db)`` called outside of FastAPI is a call without a session."""

    async def handler(session: AsyncSession = Depends(lambda: None)) -> None: ...

    assert complete(handler)[0] is None
    assert complete(handler, injects=False)[0] is None


def test_a_session_of_another_type_is_refused() -> None:
    """The error names the function, the parameter and the type."""
    for call in (
        lambda: complete(first, 1, session="x"),
        lambda: complete(first, "x", 1, 2),
        lambda: complete(first, Session(), 1, injects=False),
    ):
        with pytest.raises(MisuseError, match=r"first: session is no AsyncSession: it is of type"):
            call()


def test_injected_without_injection_is_refused() -> None:
    """The sentinel never reaches a body: not by the default, not by an argument."""
    with pytest.raises(MisuseError, match="Add @injects_session"):
        complete(keyword, 1, injects=False)
    with pytest.raises(MisuseError, match="nothing was injected"):
        _ = INJECTED.execute
    assert pickle.loads(pickle.dumps(INJECTED)) is INJECTED is copy.deepcopy(INJECTED)
    assert repr(INJECTED) == "INJECTED"
    assert not hasattr(INJECTED, "__await__")


def test_what_type_checkers_see_is_never_made() -> None:
    """Decorated functions are wrapt's wrappers at run time."""
    assert set(injected.__all__) == {"InjectedFunction", "InjectedMethod", "SessionInjector"}
    assert type(injects_session(first)).__mro__[1] is wrapt.FunctionWrapper


async def test_a_parameter_may_have_any_name() -> None:
    """The wrapper itself takes no argument by name: `self`, for one, reaches a plain function."""

    @injects_session
    async def plain(session: AsyncSession, **names: object) -> dict[str, object]:
        return names

    names = {name: name for name in ("self", "wrapped", "instance", "args", "kwargs")}
    assert await plain(session=OTHER, **names) == names


def test_one_argument_too_many_is_a_type_error_at_the_call() -> None:
    """As with any function; before anything is opened."""
    with pytest.raises(TypeError, match=r"first\(\) takes 2 positional arguments but 4 were given"):
        complete(first, OTHER, 1, 2, 3)


def test_of_two_sessions_by_position_the_number_of_arguments_tells() -> None:
    """One session alone is the visible one."""

    async def copy(session: AsyncSession, archive: AsyncSession) -> None: ...

    session, bound = complete(copy, OTHER)
    assert (session, bound.arguments) == (None, {"session": SESSION, "archive": OTHER})
    session, bound = complete(copy, SESSION, OTHER)
    assert (session, bound.arguments) == (SESSION, {"session": SESSION, "archive": OTHER})


def test_a_missing_argument_is_a_type_error() -> None:
    """Where a key needs it, Python's own words are used."""
    call = Arguments(shape_of(first), None, (), {})
    with pytest.raises(TypeError, match=r"first\(\) missing required argument: 'n'"):
        _ = call["n"]
    assert call["k"] == 0
    assert dict(Arguments(shape_of(first), None, (OTHER, 1), {})) == {"session": OTHER, "n": 1, "k": 0}
    assert len(call) == 3


def test_a_path_leads_to_the_session() -> None:
    """``session="self.session"`` reads an attribute of a parameter; a bound method's self counts as one."""

    class Service:
        def __init__(self, session: Any) -> None:
            self.session = session

        async def work(self, n: int) -> None: ...

    shape = shape_of(Service.work, path="self.session")
    assert Arguments(shape, Service(OTHER), (1,), {}).session() is OTHER
    assert Arguments(shape, None, (Service(None), 1), {}).session() is None
    assert Arguments(shape_of(Service(OTHER).work, path="self.session"), None, (1,), {}).session() is OTHER
    with pytest.raises(MisuseError, match=r"self\.session is no AsyncSession: it is of type builtins\.int"):
        Arguments(shape, Service(5), (1,), {}).session()


def test_a_partial_keeps_what_it_has_bound() -> None:
    """A session bound in a `functools.partial` is explicit, by position and by name."""
    by_position = functools.partial(first, OTHER)
    assert Arguments(shape_of(by_position, injects=False), None, (1,), {}).session() is None
    by_name = functools.partial(first, session=OTHER)
    assert complete(by_name, n=1)[0] is OTHER


def test_rows_are_filled_in_and_cannot_be_handed_in() -> None:
    """Parameters of ``into=`` are out of sight of callers as the session is."""

    async def ship(order: Any, order_id: int, session: AsyncSession, note: str = "") -> None: ...

    shape = shape_of(ship, rows=("order",))
    assert str(without(inspect.signature(ship), shape.filled)) == "(order_id: 'int', note: 'str' = '') -> 'None'"
    call = Arguments(shape, None, (5, "x"), {})
    call.put("order", "row")
    call.put("session", SESSION)
    assert call.args == ["row", 5, SESSION, "x"]
    with pytest.raises(MisuseError, match="into='order' fills it"):
        Arguments(shape, None, (5,), {"order": "mine"})


KINDS = st.sampled_from([inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD,
                         inspect.Parameter.KEYWORD_ONLY])  # fmt: skip


@given(
    kinds=st.lists(KINDS, min_size=1, max_size=5).map(sorted),
    place=st.integers(0, 4),
    positional=st.integers(0, 4),
    explicit=st.sampled_from(["no", "by name", "by position"]),
)
def test_every_call_that_the_visible_signature_allows_reaches_the_function(
    kinds: list[Any], place: int, positional: int, explicit: str
) -> None:
    """For any signature and any way to call it, each argument arrives at its own parameter."""
    place %= len(kinds)
    names = ["session" if index == place else f"p{index}" for index in range(len(kinds))]

    async def function(*args: Any, **kwargs: Any) -> None: ...

    parameters = [inspect.Parameter(name, kind) for name, kind in zip(names, kinds, strict=True)]
    function.__signature__ = full = inspect.Signature(parameters)  # type: ignore[attr-defined]
    seen = full if explicit == "by position" else without(full, ["session"])
    args, kwargs = [], {}
    for index, parameter in enumerate(seen.parameters.values()):
        value = OTHER if parameter.name == "session" else parameter.name
        must = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        if must or (parameter.kind is not inspect.Parameter.KEYWORD_ONLY and index < positional):
            args.append(value)
        else:
            kwargs[parameter.name] = value
    if explicit == "by name":
        if parameters[place].kind is inspect.Parameter.POSITIONAL_ONLY:
            return
        kwargs["session"] = OTHER
    given_session, bound = complete(function, *args, **kwargs)
    assert given_session is (None if explicit == "no" else OTHER)
    expected = {name: (given_session or SESSION) if name == "session" else name for name in names}
    assert bound.arguments == expected

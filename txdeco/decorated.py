"""The object that a decorator makes of a function, with a plan around it. The only place that imports wrapt."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

from wrapt import BoundFunctionWrapper, FunctionWrapper

from txdeco.errors import MisuseError
from txdeco.execution import runner
from txdeco.plans import plan_of
from txdeco.signatures import parameters_of, without

if TYPE_CHECKING:
    from txdeco.declarations import Declaration, Part
    from txdeco.plans import Plan
    from txdeco.signatures import Parameters

__all__ = ["declare", "refuse_bare"]


def _bound_to(method: Any) -> Any:
    return getattr(method.__wrapped__, "__self__", method._self_owner)


class _Bound(BoundFunctionWrapper):  # type: ignore[type-arg]
    """A decorated function bound to an instance or a class."""

    @property
    def __func__(self) -> Any:
        """The decorated function: what `inspect.signature` reads, which then leaves out `self`."""
        return self._self_parent

    def __eq__(self, other: object) -> bool:
        """Compare as bound methods do: the same function, bound to the same object."""
        if type(other) is not _Bound:
            return False
        return self._self_parent is other._self_parent and _bound_to(self) is _bound_to(other)

    def __ne__(self, other: object) -> bool:
        return not self == other  # wrapt has one of its own

    def __hash__(self) -> int:
        return hash((id(self._self_parent), id(_bound_to(self))))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (_bound_to(self), self.__name__)


class _Decorated(FunctionWrapper):  # type: ignore[type-arg]
    """A function with a plan around it. It holds what was declared, and nothing of any call."""

    __bound_function_wrapper__ = _Bound

    def __init__(self, target: Any, parameters: Parameters, parts: tuple[Part, ...]) -> None:
        plan = plan_of(parameters, parts)
        run: Any = runner(plan)
        super().__init__(target, run)
        self._self_run = run
        self._self_bound_to = getattr(target, "__self__", None)
        self._self_parts = parts
        self._self_plan: Plan = plan
        self._self_signature = without(parameters.signature, plan.shape.filled)

    @classmethod
    def decorate(cls, target: Any, declaration: Declaration) -> Any:
        """Decorate *target*; a target that is decorated already gets one plan of both, around the same function.

        What binds is turned inside out, so that bound and unbound look the same: a classmethod is decorated inside.
        """
        parts: tuple[Part, ...] = ()
        if type(target) is cls:
            parts, target = target._self_parts, target.__wrapped__
        elif type(target) in (classmethod, staticmethod):
            return type(target)(cls.decorate(target.__func__, declaration))
        elif type(target) is _Bound:
            return cls.decorate(target._self_parent, declaration).__get__(target._self_instance, target._self_owner)
        elif type(target) is MethodType and hasattr(target.__func__, "__get__"):
            return cls.decorate(target.__func__, declaration).__get__(target.__self__, type(target.__self__))
        parameters = parameters_of(target, declaration.decorator)
        return cls(target, parameters, (*parts, declaration.part(parameters)))

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call it unbound, as wrapt would, which asks the function anew each time to what it may be bound."""
        return self._self_run(self.__wrapped__, self._self_bound_to, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return self._self_signature

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__qualname__  # as a function: by its name

    def __eq__(self, other: object) -> bool:
        """Compare as functions do: FastAPI, for one, keeps the results of dependencies by their function."""
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other  # wrapt has one of its own

    def __hash__(self) -> int:
        return id(self)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def declare(declaration: Declaration, target: Any = None) -> Any:
    """Decorate *target*; where there is none yet, return what will."""

    def decorate(function: Any) -> Any:
        return _Decorated.decorate(function, declaration)

    return decorate if target is None else decorate(target)


def refuse_bare(first: Any, decorator: str, usage: str) -> None:
    """Refuse ``@locks`` without arguments: it would take the function for the first of them."""
    if inspect.isroutine(first) or type(first) is _Decorated:
        name = f"{first.__module__}.{first.__qualname__}"
        raise MisuseError(name, f"@{decorator} was applied without its arguments", f"Write {usage}")

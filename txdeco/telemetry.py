"""Spans for OpenTelemetry, where the application uses it; where it does not, one look into a dictionary.

``txdeco.scope`` spans a declared scope, locks and COMMIT included; ``txdeco.attempt`` one attempt of a call that may be
retried; ``txdeco.lock`` the wait for locks. Their attributes begin with ``txdeco.``.
"""

from __future__ import annotations

import sys
from enum import Enum
from functools import cache
from typing import Any

__all__ = ["Span", "span", "start"]


class Span:
    """An open span that is the current one of its context."""

    __slots__ = ("_span", "_token", "_trace")

    def __init__(self, trace: Any, name: str, attributes: dict[str, Any]) -> None:
        from opentelemetry import context

        self._trace = trace
        self._span = trace.get_tracer("txdeco").start_span(name, attributes=attributes)
        self._token = context.attach(trace.set_span_in_context(self._span))

    def end(self, error: BaseException | None, **attributes: Any) -> None:
        """End the span; an error becomes its status."""
        from opentelemetry import context

        self._span.set_attributes(_named(attributes))
        if error is not None:
            self._span.record_exception(error)
            self._span.set_status(self._trace.StatusCode.ERROR, type(error).__name__)
        self._span.end()
        context.detach(self._token)


def start(name: str, **attributes: Any) -> Span | None:
    """Start a span, or return None where the application does not trace."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None or not _is_heard(trace):
        return None  # the API may be there, but nobody listens
    return Span(trace, name, _named(attributes))


def _is_heard(trace: Any) -> bool:
    """Tell whether the application has set a provider."""
    if _tells_by_name(trace):
        return trace._TRACER_PROVIDER is not None
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


@cache
def _tells_by_name(trace: Any) -> bool:
    """Ask in the API's own way, once: it reads the environment each time, which costs more than a scope's own work."""
    trace.get_tracer_provider()  # sets the provider that the environment names, if it names one
    return hasattr(trace, "_TRACER_PROVIDER")


def _named(attributes: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in attributes.items() if value is not None}
    return {f"txdeco.{name}": value.value if isinstance(value, Enum) else value for name, value in given.items()}


class span:
    """Span the block, where the application traces."""

    __slots__ = ("_span",)

    def __init__(self, name: str, **attributes: Any) -> None:
        self._span = start(name, **attributes)

    def __enter__(self) -> None:
        """Nothing: the span has begun."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """End the span; an error becomes its status."""
        if self._span is not None:
            self._span.end(error)

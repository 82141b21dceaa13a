"""What can be seen of a running application: spans for OpenTelemetry, and logs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
from opentelemetry.trace import StatusCode
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from support.models import Account
from txdeco import (
    INJECTED,
    Retry,
    SerializationError,
    get_transaction,
    injects_session,
    locks,
    telemetry,
    transactional,
)
from txdeco.testing import failing_attempts

Maker = async_sessionmaker[AsyncSession]


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """An application that traces: its own provider, which is taken away again afterwards."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


def by_name(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    """Return the finished spans of one name, in the order in which they began."""
    return sorted((s for s in exporter.get_finished_spans() if s.name == name), key=lambda s: s.start_time or 0)


async def test_each_attempt_has_a_span_with_its_scope_below(maker: Maker, exporter: InMemorySpanExporter) -> None:
    """A call that is retried once leaves two attempts, each the parent of one scope, the first of them an error."""

    @transactional(retry=Retry(attempts=3, delay=0.001))
    @injects_session(maker)
    async def book(*, session: AsyncSession = INJECTED) -> None:
        session.add(Account(id=1))

    with failing_attempts(1):
        await book()
    attempts, scopes = by_name(exporter, "txdeco.attempt"), by_name(exporter, "txdeco.scope")
    assert [span.attributes["txdeco.attempt"] for span in attempts if span.attributes] == [1, 2]
    assert [span.status.status_code for span in attempts] == [StatusCode.ERROR, StatusCode.UNSET]
    assert [span.parent.span_id for span in scopes if span.parent] == [span.context.span_id for span in attempts]
    assert scopes[1].attributes is not None
    assert scopes[1].attributes["txdeco.function"].endswith("book")  # type: ignore[union-attr]


async def test_waiting_for_locks_has_a_span_inside_its_scope(maker: Maker, exporter: InMemorySpanExporter) -> None:
    """The wait for declared locks is a span of its own, below the scope."""

    @locks(Account, mode="SHARE")
    @injects_session(maker)
    async def read(*, session: AsyncSession = INJECTED) -> None:
        return None

    await read()
    (scope,), (lock,) = by_name(exporter, "txdeco.scope"), by_name(exporter, "txdeco.lock")
    assert lock.parent is not None
    assert lock.parent.span_id == scope.context.span_id


async def test_a_failed_scope_has_its_error_in_the_span(maker: Maker, exporter: InMemorySpanExporter) -> None:
    """An exception that rolls a scope back is the status of its span, and the span is no longer the current one."""
    async with maker() as session:
        with pytest.raises(ValueError, match="no"):
            async with get_transaction(session):
                raise ValueError("no")
    (scope,) = by_name(exporter, "txdeco.scope")
    assert scope.status.status_code is StatusCode.ERROR
    assert not trace.get_current_span().get_span_context().is_valid


class FailingSampler(Sampler):
    """A part of the application's tracing that has a bug."""

    def should_sample(self, *_: object, **__: object) -> SamplingResult:
        """Raise."""
        raise RuntimeError("of the sampler")

    def get_description(self) -> str:
        """Name it."""
        return "failing"


async def test_a_tracer_that_fails_leaves_the_session_as_it_was(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error comes out of the scope that it kept from being entered, and the session is its user's again."""
    provider = TracerProvider(sampler=FailingSampler())
    async with maker() as session:
        with monkeypatch.context() as patched:
            patched.setattr(trace, "_TRACER_PROVIDER", provider)
            with pytest.raises(RuntimeError, match="of the sampler"):
                await get_transaction(session).__aenter__()
        await session.execute(text("SELECT 1"))
        await session.commit()


@pytest.mark.parametrize("by_name", [True, False], ids=["by the name of the provider", "asking the API"])
def test_nothing_is_traced_where_nobody_listens(monkeypatch: pytest.MonkeyPatch, *, by_name: bool) -> None:
    """Without a provider of the application no span is made; from when it has set one, there is."""
    monkeypatch.setattr(telemetry, "_tells_by_name", lambda _: by_name)
    assert telemetry.start("txdeco.scope") is None
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", TracerProvider())
    span = telemetry.start("txdeco.scope")
    assert span is not None
    span.end(None)


def test_the_provider_that_the_environment_names_is_used() -> None:
    """``OTEL_PYTHON_TRACER_PROVIDER`` is read by the API at the first question: txdeco asks it."""
    script = """
import opentelemetry.trace
from txdeco import telemetry
assert telemetry.start("txdeco.scope") is not None
"""
    environment = {**os.environ, "OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_a_retry_is_logged_with_fields(maker: Maker, caplog: pytest.LogCaptureFixture) -> None:
    """A retried attempt is logged under txdeco.retries: function, attempt and SQLSTATE are fields of the record."""

    @transactional(retry=Retry(attempts=2, delay=0.001), source=maker)
    async def book() -> None:
        return None

    caplog.set_level(logging.INFO, logger="txdeco")
    with failing_attempts(2), pytest.raises(SerializationError) as raised:
        await book()
    (record,) = [each for each in caplog.records if each.name == "txdeco.retries"]
    assert (record.txdeco_attempt, record.txdeco_sqlstate) == (1, "40001")  # type: ignore[attr-defined]
    assert record.txdeco_function.endswith("book")  # type: ignore[attr-defined]
    assert raised.value.attempts == 2


async def test_spans_cost_no_statement(maker: Maker, exporter: InMemorySpanExporter) -> None:
    """A traced scope that touches nothing stays without a connection."""
    async with maker() as session:
        async with get_transaction(session):
            pass
        assert not session.in_transaction()
        await session.execute(text("SELECT 1"))

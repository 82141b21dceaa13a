"""A transaction with one SELECT, beside the same written by hand and beside the peer, in one run:
``python tests/benchmarks/bench_transactions.py``.

Each time is the median over many short blocks, each ratio that over the pairs of blocks of one round; the blocks of a
round are in random order, so that whatever else the machine does meets all alike. Round trips are counted by a proxy on
the wire.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from sqlalchemy import literal, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for tests/support

from fastapi_toolsets.db import Database

from support.wire import Wire
from txdeco import INJECTED, injects_session, transactional
from txdeco.testing import embedded_postgres

ROUNDS, CALLS = 250, 20
QUERY = select(literal(1))
Call = Callable[[], Awaitable[object]]


def contestants(engine: AsyncEngine) -> dict[str, Call]:
    """Return the same transaction, written in several ways."""
    maker = async_sessionmaker(engine)
    peer = Database(engine=engine)

    async def by_hand() -> None:
        async with maker() as session, session.begin():
            await session.execute(QUERY)

    @transactional
    @injects_session(maker)
    async def txdeco(*, session: AsyncSession = INJECTED) -> None:
        await session.execute(QUERY)

    @transactional(isolation="SERIALIZABLE", read_only=True, deferrable=True)
    @injects_session(maker)
    async def with_characteristics(*, session: AsyncSession = INJECTED) -> None:
        await session.execute(QUERY)

    @transactional
    @injects_session(maker)
    async def untouched(*, session: AsyncSession = INJECTED) -> None:
        return None

    async def fastapi_toolsets() -> None:
        async with peer.begin() as session:
            await session.execute(QUERY)

    return {
        "by hand": by_hand,
        "txdeco": txdeco,
        "txdeco, SERIALIZABLE READ ONLY DEFERRABLE": with_characteristics,
        "txdeco, untouched": untouched,
        "fastapi-toolsets": fastapi_toolsets,
    }


async def times(calls: dict[str, Call]) -> dict[str, list[float]]:
    """Return the time of one call of each, in microseconds, round by round."""
    blocks: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5 * CALLS):
            await call()
    for _ in range(ROUNDS):
        for name, call in random.sample(list(calls.items()), len(calls)):
            started = time.perf_counter()
            for _ in range(CALLS):
                await call()
            blocks[name].append((time.perf_counter() - started) / CALLS * 1e6)
    return blocks


def ratio(measured: dict[str, list[float]], name: str, to: str) -> float:
    """Return how long *name* takes as a share of *to*."""
    return statistics.median(mine / other for mine, other in zip(measured[name], measured[to], strict=True))


async def round_trips(url: str) -> dict[str, int]:
    """Return the round trips of one warm call of each."""
    counted = {}
    async with Wire(url) as wire:
        engine = create_async_engine(wire.url, pool_size=1, max_overflow=0)
        for name, call in contestants(engine).items():
            await call()
            await call()
            wire.forget()
            await call()
            counted[name] = wire.round_trips
        await engine.dispose()
    return counted


async def main() -> int:
    """Measure, print, and return the exit code."""
    with embedded_postgres() as url:
        engine = create_async_engine(url, pool_size=1, max_overflow=0)
        measured = await times(contestants(engine))
        await engine.dispose()
        counted = await round_trips(url)
    for name, microseconds in measured.items():
        print(f"{name:45} {statistics.median(microseconds):8.0f} µs {counted[name]:3d} round trips")
    to_hand = ratio(measured, "txdeco", "by hand")
    to_peer = ratio(measured, "txdeco", "fastapi-toolsets")
    print(f"txdeco / by hand          {to_hand:.3f}   (to reach: 0.95)")
    print(f"txdeco / fastapi-toolsets {to_peer:.3f}   (to reach: 0.55)")
    return 0 if to_hand <= 0.95 and to_peer <= 0.55 and counted["txdeco"] == 3 else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

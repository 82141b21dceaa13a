"""Waiting for rows, beside the peer and beside the same by hand: ``python tests/benchmarks/bench_watching.py``.

For 1, 100, 1,000 and 5,000 waiters on distinct rows: how long after COMMIT a waiter returns, what the waiting costs
while nothing happens (statements, connections, CPU of both sides), how late 2,000 waiters hear of one deadline, and
what the trigger costs writers. Each run has a process of its own for the waiters and one for the writer, with the
machine's monotonic clock. ``--waiters 1,100``, ``--only polling,push`` and ``--skip-writes`` make it shorter,
``--waiters ""`` leaves the waiters out; ``--plot docs/images/watching.svg`` draws the latencies.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from txdeco.testing.embedded import Server
from txdeco.watching import create_watch_sql, drop_watch_sql, wait_for_row_change

INTERVAL = 0.5
IDLE = 3.0  # seconds over which the cost of waiting is measured
PGBENCH = ("pgbench", "/usr/lib/postgresql/*/bin/pgbench")


class Base(DeclarativeBase):
    """One table."""


class Order(Base):
    """What is waited for."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    status: Mapped[str]
    note: Mapped[str]
    total: Mapped[int]


async def by_hand(session: AsyncSession, key: int) -> None:
    """What people write."""
    before = (await session.get_one(Order, key)).total
    while True:
        await session.commit()
        await asyncio.sleep(INTERVAL)
        if (await session.get_one(Order, key, populate_existing=True)).total != before:
            await session.commit()
            return


async def peer(session: AsyncSession, key: int) -> None:
    """fastapi-toolsets."""
    from fastapi_toolsets.db import wait_for_row_change as wait

    await wait(session, Order, key, interval=INTERVAL)


async def ours(session: AsyncSession, key: int) -> None:
    """txdeco; whether it is polling or push is the trigger's business."""
    await wait_for_row_change(session, Order, key, interval=INTERVAL)


CONTESTANTS: dict[str, Callable[[AsyncSession, int], Awaitable[None]]] = {
    "by hand": by_hand,
    "peer": peer,
    "polling": ours,
    "push": ours,
}


# -- the waiters' process


async def wait_in_process(url: str, contestant: str, waiters: int) -> dict[str, Any]:
    """Have *waiters* wait, measure what that costs, have the writer write, and return what was measured."""
    settings = {"application_name": "waiters"}
    engine = create_async_engine(
        url, pool_size=20, max_overflow=0, pool_timeout=600, connect_args={"server_settings": settings}
    )
    statements = 0

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    maker = async_sessionmaker(engine, expire_on_commit=False)
    sessions = [maker() for _ in range(waiters)]
    returned: dict[int, list[float]] = {}
    wait = CONTESTANTS[contestant]

    async def work(session: AsyncSession, key: int) -> None:
        while True:
            await wait(session, key)
            returned.setdefault(key, []).append(time.monotonic())

    tracemalloc.start()
    memory = tracemalloc.get_traced_memory()[0]
    tasks = [asyncio.create_task(work(session, at + 1)) for at, session in enumerate(sessions)]
    await _settle(lambda: statements, waiters if contestant in {"by hand", "peer"} else 1)
    memory = tracemalloc.get_traced_memory()[0] - memory
    tracemalloc.stop()
    await asyncio.sleep(3 * INTERVAL)
    result: dict[str, Any] = {"memory": memory / waiters} if contestant in {"polling", "push"} else {}
    result |= await _idle(engine, lambda: statements)
    changes = await _changes(url, waiters, contestant)
    await asyncio.sleep(2 * INTERVAL if contestant in {"polling", "push"} or waiters < 1000 else 16 * INTERVAL)
    late = _late(changes, returned)
    result |= {"p50": _quantile(late, 0.5), "p99": _quantile(late, 0.99), "seen": len(late), "changes": len(changes)}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await engine.dispose()
    return result


async def _settle(count: Callable[[], int], least: int) -> None:
    """Return once everybody has read at least once; the machine may take its time."""
    end = time.monotonic() + 60
    while count() < least and time.monotonic() < end:
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)


async def _idle(engine: AsyncEngine, count: Callable[[], int]) -> dict[str, float]:
    before, cpu, began = count(), time.process_time(), time.monotonic()
    server = _server_cpu()
    connections = 0
    async with create_async_engine(engine.url).connect() as probe:
        while time.monotonic() - began < IDLE:
            await asyncio.sleep(IDLE / 20)
            query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'waiters' AND state <> 'idle'"
            connections = max(connections, await probe.scalar(text(query)) or 0)
            await probe.rollback()
        await probe.invalidate()
    passed = time.monotonic() - began
    return {
        "statements": (count() - before) / passed,
        "busy": connections,
        "pooled": engine.pool.checkedin() + engine.pool.checkedout(),  # type: ignore[attr-defined]
        "client": (time.process_time() - cpu) / passed,
        "server": (_server_cpu() - server) / passed,
    }


async def _changes(url: str, waiters: int, contestant: str) -> list[tuple[int, float, float]]:
    """Have another process change rows one by one; return which, when it sent the COMMIT and when that was answered."""
    number, pause = 100, 0.03
    if contestant == "push":
        number = 300  # the slowest of one hundred says what the machine did meanwhile
    elif waiters == 1:
        number, pause = 10, INTERVAL * 1.6
    arguments = [sys.executable, __file__, "--write", url, str(waiters), str(number), str(pause)]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    out, _ = await process.communicate()
    return [(int(key), float(sent), float(done)) for key, sent, done in (line.split() for line in out.splitlines())]


def _late(changes: list[tuple[int, float, float]], returned: dict[int, list[float]]) -> list[float]:
    """Return the seconds from the COMMIT's answer to the waiter's return; a waiter can be told before the writer."""
    late = []
    for key, sent, done in changes:
        after = [at for at in returned.get(key, ()) if at >= sent]
        if after:
            late.append(max(0.0, min(after) - done))
    return sorted(late)


def _quantile(values: list[float], q: float) -> float:
    return values[math.ceil(len(values) * q) - 1] * 1000 if values else float("nan")


def _server_cpu() -> float:
    """Return the CPU seconds of the server and all its backends so far."""
    postmaster = int(os.environ["BENCH_SERVER"])
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(path.parent.name) == postmaster:
            ticks += sum(map(int, fields[11:15]))
        elif int(fields[1]) == postmaster:
            ticks += sum(map(int, fields[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


async def write_in_process(url: str, waiters: int, number: int, pause: float) -> None:
    """Change rows, each in a transaction of its own."""
    engine = create_async_engine(url)
    keys: list[int] = []
    while len(keys) < number:  # no row again before all had their turn
        keys += random.sample(range(1, waiters + 1), min(number - len(keys), waiters))
    async with engine.connect() as connection:
        for key in keys:
            await connection.execute(text("UPDATE orders SET total = total + 1 WHERE id = :key"), {"key": key})
            sent = time.monotonic()
            await connection.commit()
            print(key, sent, time.monotonic(), flush=True)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
    await engine.dispose()


# -- one deadline for many


def deadlines(server: Server) -> bool:
    """Print how late waiters with one deadline return; tell whether all of them do in time."""
    waiters, limit = 2000, 50.0
    asyncio.run(_prepare(server.url(), waiters, drop_watch_sql(Order)))
    held = True
    for _ in range(3):
        arguments = [sys.executable, __file__, "--expire", server.url(), str(waiters)]
        out = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
        late = json.loads(out.splitlines()[-1])
        print(
            f"{waiters} waiters, one deadline: return {late[0]:.1f} ms after it the first, "
            f"{statistics.median(late):.1f} median, {_quantile(late, 0.99) / 1000:.1f} p99, {late[-1]:.1f} the last",
            flush=True,
        )
        held = held and late[0] >= -limit and late[-1] <= limit
    return held


async def expire_in_process(url: str, waiters: int) -> list[float]:
    """Have *waiters* wait until one moment, in vain; return how many milliseconds after it each has returned."""
    engine = create_async_engine(url)
    maker = async_sessionmaker(engine, expire_on_commit=False)
    late: list[float] = []
    deadline = time.monotonic() + 2.0

    async def work(session: AsyncSession, key: int) -> None:
        try:
            await wait_for_row_change(session, Order, key, interval=INTERVAL, timeout=deadline - time.monotonic())
        except TimeoutError:
            late.append((time.monotonic() - deadline) * 1000)

    await asyncio.gather(*(work(maker(), at + 1) for at in range(waiters)))
    await engine.dispose()
    return sorted(late)


# -- the writers


def writing(server: Server) -> None:
    """Print the rate of single-row updates by 16 pgbench clients while nobody waits, with the trigger and without."""
    found = [path for pattern in PGBENCH[1:] for path in sorted(Path("/").glob(pattern.lstrip("/")))]
    if not found:
        print("no pgbench on this machine: the cost of writing was not measured")
        return
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "update.sql"
        script.write_text("\\set id random(1, 5000)\nUPDATE orders SET total = total + 1 WHERE id = :id;\n")
        kinds = [
            ("no trigger", drop_watch_sql(Order)),
            ("trigger on all columns", create_watch_sql(Order)),
            ("trigger on the column written", create_watch_sql(Order, columns=["total"])),
            ("trigger on another column", create_watch_sql(Order, columns=["status"])),
        ]
        command = [found[-1], "-n", "-c", "16", "-j", "1", "-t", "500", "-M", "prepared", "-f", script]
        for _ in range(40):  # many short runs, each time in another order: the machine has moods
            random.shuffle(kinds)
            for name, sql in kinds:
                asyncio.run(_prepare(server.url(), 5000, sql))
                run = subprocess.run([*command, server.url(driver="")], capture_output=True, text=True, check=True)
                rates.setdefault(name, []).append(float(re.search(r"tps = ([\d.]+)", run.stdout)[1]))  # type: ignore[index]
    for name, values in sorted(rates.items()):
        ratio = statistics.median(value / base for value, base in zip(values, rates["no trigger"], strict=True))
        print(f"{name:30} {statistics.median(values):9.0f} updates/s   {ratio:.2f} of the rate without")


async def _prepare(url: str, rows: int, *statements: str) -> None:
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("TRUNCATE orders"))
        await connection.execute(
            text(f"INSERT INTO orders SELECT i, 'new', 'x', 0 FROM generate_series(1, {int(rows)}) i")
        )
        for statement in statements:
            await connection.exec_driver_sql(statement)
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("VACUUM ANALYZE orders"))
    await engine.dispose()


# -- all of it


def main() -> int:
    """Measure, print a table, and return 1 where a figure of the contract is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--waiters", default="1,100,1000,5000")
    parser.add_argument("--only", default=",".join(CONTESTANTS))
    parser.add_argument("--skip-writes", action="store_true")
    parser.add_argument("--only-writes", action="store_true")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[int, dict[str, Any]]] = {}
    with Server({}, None) as server:
        os.environ["BENCH_SERVER"] = str(server.pid)
        print(
            f"{'waiters':>7} {'':9} {'p50 ms':>8} {'p99 ms':>8} {'st./s':>7} {'conn.':>5} {'client':>7} {'server':>7}"
        )
        for waiters in map(int, filter(None, options.waiters.split(",") if not options.only_writes else ())):
            for name in options.only.split(","):
                trigger = create_watch_sql(Order) if name == "push" else drop_watch_sql(Order)
                asyncio.run(_prepare(server.url(), waiters, trigger))
                arguments = [sys.executable, __file__, "--wait", server.url(), name, str(waiters)]
                out = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
                row = results.setdefault(name, {})[waiters] = json.loads(out.splitlines()[-1])
                print(
                    f"{waiters:7} {name:9} {row['p50']:8.1f} {row['p99']:8.1f} {row['statements']:7.1f} "
                    f"{row['pooled']:5} {row['client']:7.1%} {row['server']:7.1%}"
                    + (f"   {row['memory'] / 1024:.1f} KiB a waiter" if waiters >= 1000 and "memory" in row else "")
                    + (f"   {row['seen']} of {row['changes']} seen" if row["seen"] < row["changes"] else ""),
                    flush=True,
                )
        in_time = options.only_writes or deadlines(server)
        if not options.skip_writes:
            writing(server)
    if options.plot:
        from plots import latencies

        options.plot.write_text(latencies(results))
    return 0 if in_time and _holds(results) else 1


def _holds(results: dict[str, dict[int, dict[str, Any]]]) -> bool:
    polling, push = (results.get(name, {}).get(5000) for name in ("polling", "push"))
    return (
        polling is None
        or (
            polling["statements"] <= 2 / INTERVAL * 1.1
            and polling["pooled"] <= 1
            and polling["p99"] <= INTERVAL * 1150
            and polling["memory"] <= 8192
        )
    ) and (push is None or (push["p50"] <= 3 and push["p99"] <= 10))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--wait"]:
        measured = asyncio.run(wait_in_process(sys.argv[2], sys.argv[3], int(sys.argv[4])))
        print(json.dumps(measured))
    elif sys.argv[1:2] == ["--expire"]:
        print(json.dumps(asyncio.run(expire_in_process(sys.argv[2], int(sys.argv[3])))))
    elif sys.argv[1:2] == ["--write"]:
        asyncio.run(write_in_process(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])))
    else:
        sys.exit(main())

"""What the costs of `run` consist of: the table behind docs/performance.md.

- What gevent's and Python's own pieces cost, which `run` is made of.
- CPU time per operation of 1,000 callers in a closed loop in batches of 1 to 1,000, and what follows for an operation
  and for a batch: the cost is near to *operation* + *batch* ÷ *size*.
- The functions in which that time goes by, sampled: once with all callers in one batch, once with a batch for each.
  What C code takes is counted for the Python function that goes on after it: a switch for what runs first when a caller
  is woken, which is of gevent's `wait`.
- What a lone caller's operation costs over PostgreSQL, in CPU time of this process and in time, beside what the same
  change costs as a transaction.
- What a window spares where callers come by themselves, so many a second, and wait for nobody: CPU time, batches, and
  the latency that it costs.

Turns are interleaved; each figure is the median of the turns (least to most).

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.parts [--short] [--json FILE]``. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections import Counter as Tally
from contextvars import copy_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gevent import monkey

monkey.patch_all()

import gevent
import psycopg
from gevent.event import AsyncResult
from gevent.queue import SimpleQueue
from greenlet import greenlet

from benchmarks.as_served import as_served
from benchmarks.overhead import CALLERS, batched, floor
from benchmarks.ways import Atomic, Batches, ForUpdate, begin_at_zero, check, create_tables, server_settings, spread
from tests.support.servers import postgres_url

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

SIZES = (1, 2, 4, 10, 40, 200, 1000)
KEY = "lone"

WINDOWS = (0.0, 0.001, 0.01, 0.05)
RATE, KEYS = 1000, 20
"""Callers that come in a second, and on how many keys."""


# -- pieces -------------------------------------------------------------------------------------------------


def _wake_one() -> None:
    result: AsyncResult[None] = AsyncResult()
    gevent.get_hub().loop.run_callback(result.set)
    result.wait()


def _with_timeout() -> None:
    with gevent.Timeout(5):
        pass


def pieces() -> dict[str, Callable[[], object]]:
    """What to call for each."""
    queue: SimpleQueue[None] = SimpleQueue()
    context = copy_context()
    parent = greenlet.getcurrent()

    def bounce() -> None:
        while True:
            parent.switch()

    other = greenlet(bounce)
    return {
        "time.monotonic()": time.monotonic,
        "copy_context()": copy_context,
        "context.copy().run(f)": lambda: context.copy().run(int),
        "AsyncResult()": AsyncResult,
        "SimpleQueue: put and get": lambda: queue.put(None) or queue.get(),  # type: ignore[func-returns-value]
        "a greenlet switch and back": other.switch,
        "with gevent.Timeout(5)": _with_timeout,
        "blocked on an AsyncResult and woken by the hub": _wake_one,
        "gevent.spawn and join": lambda: gevent.spawn(int).join(),
    }


def nanoseconds(call: Callable[[], object], seconds: float) -> float:
    """CPU time of one call, and the loop around it, which is about 25 ns."""
    count = 100
    while True:
        begun = time.process_time()
        for _ in range(count):
            call()
        took = time.process_time() - begun
        if took >= seconds:
            return took / count * 1e9
        count *= 2


# -- by the size of the batches -----------------------------------------------------------------------------


def fitted(costs: dict[int, float]) -> tuple[float, float]:
    """What an operation costs, and what a batch does: least squares of their relative errors."""
    # cost × weight = operation × weight + batch × weight ÷ size, with a weight of 1 ÷ cost
    rows = [(1 / cost, 1 / size / cost) for size, cost in costs.items()]
    aa, ab, bb = (sum(row[one] * row[other] for row in rows) for one, other in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    return (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant


# -- functions ----------------------------------------------------------------------------------------------


class Samples:
    """Looks every millisecond of CPU time at where the process is; a context manager."""

    def __init__(self) -> None:
        """Start with none."""
        # -- mutable state ---------------------------------------------------------------------------------
        self.functions: Tally[str] = Tally()

    def __enter__(self) -> Tally[str]:
        """Begin, and give what is counted."""
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
        return self.functions

    def __exit__(self, *error: object) -> None:
        """End."""
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _look(self, _: int, frame: FrameType | None) -> None:
        if frame is None:
            self.functions["the hub"] += 1
            return
        parts = Path(frame.f_code.co_filename).parts
        packages = [at for at, part in enumerate(parts) if part in {"geventbatch", "gevent", "benchmarks"}]
        if packages:
            self.functions[f"{'/'.join(parts[packages[-1] :])}: {frame.f_code.co_qualname}"] += 1
        else:
            self.functions["elsewhere"] += 1


def functions(keys: int, operations: int) -> dict[str, float]:
    """Nanoseconds per operation in each function."""
    cost = batched(operations, CALLERS, keys, 0)
    with Samples() as found:
        batched(operations, CALLERS, keys, 0)
    return {name: number / found.total() * cost * 1e9 for name, number in found.most_common()}


# -- over a database ----------------------------------------------------------------------------------------


def over_database(url: str, turns: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Microseconds of CPU time, and milliseconds, of a lone caller, for each way and turn."""
    create_tables(url)
    begin_at_zero(url, [KEY])
    found: dict[str, list[tuple[float, float]]] = {}
    with (
        psycopg.connect(url, autocommit=True) as connection,
        Atomic(url, 1) as atomic,
        ForUpdate(url, 1) as for_update,
        Batches(url, "lock") as lock,
        Batches(url, "version") as version,
    ):
        ways: dict[str, Callable[[], object]] = {
            "SELECT 1": lambda: connection.execute("SELECT 1"),
            "one atomic UPDATE": lambda: atomic.add(KEY),
            "SELECT … FOR UPDATE, UPDATE, COMMIT": lambda: for_update.add(KEY),
            "a batch, mode lock": lambda: lock.add(KEY),
            "a batch, mode version": lambda: version.add(KEY),
        }
        for turn in range(turns + 1):
            for name, call in ways.items():
                taken = _lone(call, seconds)
                if turn:  # the first one is to warm up
                    found.setdefault(name, []).append(taken)
    return found


def _lone(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    count, cpu, begun = 0, time.process_time(), time.perf_counter()
    while (took := time.perf_counter() - begun) < seconds:
        call()
        count += 1
    return (time.process_time() - cpu) / count * 1e6, took / count * 1e3


class Open(NamedTuple):
    """What came of callers who come so many a second."""

    microseconds: float
    """CPU time of an operation."""
    batches: float
    """In a second."""
    p50: float
    p99: float
    """Milliseconds."""


def by_themselves(url: str, window: float, seconds: float) -> Open:
    """Have them come."""
    keys = [f"key{number}" for number in range(KEYS)]
    begin_at_zero(url, keys)
    latencies: list[float] = []
    with Batches(url, "lock", window) as way:

        def call(number: int, due: float) -> None:
            way.add(keys[number % KEYS])
            latencies.append(time.perf_counter() - due)

        cpu, begun = time.process_time(), time.perf_counter()
        callers = []
        for number in range(int(RATE * seconds)):
            due = begun + number / RATE
            while (early := due - time.perf_counter()) > 0:
                gevent.sleep(max(early, 0.001))
            callers.append(gevent.spawn(call, number, due))
        gevent.joinall(callers, raise_error=True)
        cpu, took = time.process_time() - cpu, time.perf_counter() - begun
        gevent.sleep(0.01)  # until the last metric has been looked at
        batches = len(way.inside)
    check(url, way.table, len(callers))
    ordered = sorted(latencies)
    p50, p99 = (ordered[len(ordered) * percent // 100] * 1e3 for percent in (50, 99))
    return Open(cpu / len(callers) * 1e6, batches / took, p50, p99)


# -- the tables ---------------------------------------------------------------------------------------------


def measure_pieces(turns: int, seconds: float) -> dict[str, list[float]]:
    """Print and give them."""
    calls = pieces()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            found[name].append(nanoseconds(call, seconds))
    print("pieces, ns of CPU time each")
    for name, each in found.items():
        print(f"  {name:<48}{spread(each, ',.0f')}")
    return found


def measure_sizes(turns: int, operations: int) -> dict[str, list[float]]:
    """Likewise."""
    found: dict[str, list[float]] = {}
    for _ in range(turns):
        of_sizes = {size: batched(operations, CALLERS, CALLERS // size, 0) * 1e9 for size in SIZES}
        operation, batch = fitted(of_sizes)
        costs = {"the floor: all blocked on one AsyncResult": floor(operations, CALLERS) * 1e9}
        costs |= {f"batches of {size:,}": cost for size, cost in of_sizes.items()}
        costs |= {"so an operation": operation, "so a batch": batch}
        for name, cost in costs.items():
            found.setdefault(name, []).append(cost)
    print(f"\n{CALLERS:,} callers in a closed loop, in memory, ns of CPU time per operation")
    for name, some in found.items():
        print(f"  {name:<48}{spread(some, ',.0f')}")
    return found


def measure_functions(operations: int) -> dict[int, dict[str, float]]:
    """Likewise, the first dozen."""
    found = {keys: functions(keys, operations) for keys in (1, CALLERS)}
    for keys, costs in found.items():
        print(f"\nfunctions, in batches of {CALLERS // keys:,}, ns of CPU time per operation")
        for name, cost in list(costs.items())[:12]:
            print(f"  {name:<60}{cost:,.0f}")
    return found


def measure_database(turns: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Likewise."""
    url = postgres_url()
    print(f"\na lone caller over PostgreSQL ({server_settings(url)})")
    found = over_database(url, turns, seconds)
    for name, taken in found.items():
        cpu, whole = zip(*taken, strict=True)
        print(f"  {name:<40}{spread(cpu, ',.0f') + ' µs of CPU':<36}{spread(whole, '.2f')} ms")
    return found


def measure_windows(turns: int, seconds: float) -> dict[float, list[Open]]:
    """Likewise."""
    url = postgres_url()
    found: dict[float, list[Open]] = {window: [] for window in WINDOWS}
    for _ in range(turns):
        for window, some in found.items():
            some.append(by_themselves(url, window, seconds))
    print(f"\n{RATE:,} callers a second, who come by themselves, on {KEYS} keys")
    print(f"  {'':<12}{'µs of CPU per operation':<32}{'batches/s':<26}{'p50 ms':<24}p99 ms")
    for window, some in found.items():
        cpu, batches, p50, p99 = zip(*some, strict=True)
        cells = f"{spread(cpu, ',.0f'):<32}{spread(batches, ',.0f'):<26}{spread(p50, '.1f'):<24}{spread(p99, '.1f')}"
        print(f"  {f'{window * 1000:g} ms':<12}{cells}")
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    chosen = parser.parse_args()
    turns, operations, seconds = (1, 10_000, 0.02) if chosen.short else (5, 50_000, 0.2)
    print(as_served())
    everything: dict[str, Any] = {
        "pieces": measure_pieces(turns, seconds),
        "sizes": measure_sizes(turns, operations),
        "functions": measure_functions(operations * 4),
        "database": measure_database(turns, seconds * 5),
        "windows": measure_windows(turns, seconds * 10),
    }
    if chosen.json:
        chosen.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()

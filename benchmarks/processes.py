"""Several processes on one database: what each way of changing a contended row reaches.

4 processes, each with 1, 5, 25 and 50 callers in a closed loop, on one row and on ten rows of PostgreSQL (fsync and
synchronous_commit on); directly, and 1 ms of round trip away, behind a proxy that delays. Per request, with psycopg
and its pool (a small one and a large one): read the version and retry, `SELECT … FOR UPDATE`, one atomic
`UPDATE … WHERE`. Against batches of `SQLAlchemyStore.documents`: in mode "lock", in mode "version", and with all
callers of a row in the one process that its key is routed to. Ratios are to the better of the two pools.

The ways take turns in one run; each figure is the median of the turns (least to most). After each turn the counters
in the database are compared with the operations that were answered. Callers, proxy and server share the machine's
cores.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.processes [--short]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from gevent import monkey

monkey.patch_all()

import gevent

from benchmarks.as_served import as_served
from benchmarks.away import away, round_trip
from benchmarks.ways import (
    Atomic,
    Batches,
    ForUpdate,
    Retry,
    Way,
    begin_at_zero,
    check,
    create_tables,
    server_settings,
    spread,
)
from geventbatch import worker_number_for_key
from tests.support.servers import postgres_url

if TYPE_CHECKING:
    from collections.abc import Callable

PROCESSES = 4
AWAY = 0.001
"""Seconds of round trip that the proxy adds."""

WARM_UP = 0.3
"""Seconds of each turn that are not counted."""


class Job(NamedTuple):
    """What one process does in one turn."""

    way: str
    url: str
    pool: int
    """Connections, of a way that does not batch."""
    callers: list[str]
    """The key of each."""
    seconds: float


class Done(NamedTuple):
    """What came of it."""

    answered: int
    """Operations, those of the warm-up too."""
    replays: int
    failures: dict[str, int]
    latencies: list[int]
    """Microseconds of each operation that was counted."""


RETRY, ATOMIC, ROUTED = "version, retry", "UPDATE … WHERE", "batches, routed"

WAYS: dict[str, Callable[[Job], Way]] = {
    RETRY: lambda job: Retry(job.url, job.pool),
    "SELECT … FOR UPDATE": lambda job: ForUpdate(job.url, job.pool),
    ATOMIC: lambda job: Atomic(job.url, job.pool),
    "batches, lock": lambda job: Batches(job.url, "lock"),
    "batches, version": lambda job: Batches(job.url, "version"),
    ROUTED: lambda job: Batches(job.url, "version"),
}
PER_REQUEST = tuple(WAYS)[:3]


# -- in a process of its own --------------------------------------------------------------------------------


def work() -> None:
    """Do one job after another, as standard input says."""
    as_served()
    for line in sys.stdin:
        job = Job(*json.loads(line))
        with WAYS[job.way](job) as way:
            print("ready", flush=True)
            sys.stdin.readline()
            done = _run(way, job)
        print(json.dumps(done._replace(replays=way.replays)), flush=True)


def _run(way: Way, job: Job) -> Done:
    answered = 0
    failures: Counter[str] = Counter()
    latencies: list[int] = []
    counted_from = time.perf_counter() + WARM_UP
    end = counted_from + job.seconds

    def call(key: str) -> None:
        nonlocal answered
        while (begun := time.perf_counter()) < end:
            try:
                way.add(key)
            except Exception as error:  # noqa: BLE001 - what failed is a column of the table
                failures[repr(error)] += 1
                continue
            answered += 1
            now = time.perf_counter()
            if counted_from <= now < end:
                latencies.append(int((now - begun) * 1e6))

    gevent.joinall([gevent.spawn(call, key) for key in job.callers], raise_error=True)
    return Done(answered, 0, failures, latencies)


# -- the parent, which says what to do ----------------------------------------------------------------------


class Child:
    """A process that works."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.processes", "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def prepare(self, job: Job) -> None:
        """Have it connect, and then say that it is ready."""
        self._say(json.dumps(job))

    def wait_until_ready(self) -> None:
        """Wait for that."""
        if self._hear() != "ready\n":
            raise AssertionError("a process has ended")

    def go(self) -> None:
        """Have it begin."""
        self._say("go")

    def done(self) -> Done:
        """Wait for what came of it."""
        return Done(*json.loads(self._hear()))

    def end(self) -> None:
        """Have it end."""
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


class Turn(NamedTuple):
    """What all processes together reached in one turn."""

    rate: float
    p50: float
    p99: float
    replays: float
    """Per operation."""
    failures: int


@dataclass
class Benchmark:
    """Where, and for how long."""

    url: str
    children: list[Child]
    turns: int
    seconds: float
    heads: tuple[str, ...] = field(
        default=("", "operations/s", "× retry", "× UPDATE", "p50 ms", "p99 ms", "replays/op", "failed"), init=False
    )

    def table(self, url: str, keys: int, callers: int) -> None:
        """Print a line for each way."""
        cases = [(way, pool) for way in PER_REQUEST for pool in sorted({min(callers, 2), min(callers, 20)})]
        cases += [(way, 0) for way in WAYS if way not in PER_REQUEST]
        turns: dict[tuple[str, int], list[Turn]] = {case: [] for case in cases}
        for _ in range(self.turns):
            for way, pool in cases:
                turns[way, pool].append(self.turn(way, url, pool, keys, callers))
        against = [
            max((_rates(turns[case]) for case in cases if case[0] == way), key=statistics.median)
            for way in (RETRY, ATOMIC)
        ]
        print(f"\n{PROCESSES} × {callers} callers")
        for (way, pool), some in turns.items():
            rates = _rates(some)
            cells = [
                spread(rates, ",.0f"),
                *(spread([one / other for one, other in zip(rates, best, strict=True)], ".2f") for best in against),
                f"{statistics.median(turn.p50 for turn in some):.1f}",
                f"{statistics.median(turn.p99 for turn in some):.1f}",
                f"{statistics.median(turn.replays for turn in some):.3f}",
                f"{sum(turn.failures for turn in some):,}",
            ]
            print(COLUMNS.format(f"  {way}{f', pool of {pool}' if way in PER_REQUEST else ''}", *cells), flush=True)

    def turn(self, way: str, url: str, pool: int, keys: int, callers: int) -> Turn:
        """Have all processes do it at once."""
        names = [f"key{number}" for number in range(keys)]
        begin_at_zero(self.url, names)
        for child, chosen in zip(self.children, _callers(way, names, callers), strict=True):
            child.prepare(Job(way, url, pool, chosen, self.seconds))
        for child in self.children:
            child.wait_until_ready()
        for child in self.children:
            child.go()
        done = [child.done() for child in self.children]
        failures = sum(sum(one.failures.values()) for one in done)
        check(self.url, "counters" if way in PER_REQUEST else "documents", sum(one.answered for one in done), failures)
        latencies = sorted(latency for one in done for latency in one.latencies) or [0]
        for one in done:
            for error in one.failures:
                print(f"  {way}: {error}", file=sys.stderr)
        return Turn(
            rate=len(latencies) / self.seconds,
            p50=latencies[len(latencies) // 2] / 1000,
            p99=latencies[len(latencies) * 99 // 100] / 1000,
            replays=sum(one.replays for one in done) / max(1, sum(one.answered for one in done)),
            failures=failures,
        )


def _callers(way: str, names: list[str], callers: int) -> list[list[str]]:
    """The keys of the callers of each process."""
    everybody = [names[caller % len(names)] for caller in range(callers * PROCESSES)]
    if way == ROUTED:
        return [
            [key for key in everybody if worker_number_for_key(key, PROCESSES) == process]
            for process in range(PROCESSES)
        ]
    return [
        everybody[process::PROCESSES] if len(names) == 1 else _spread(everybody, process)
        for process in range(PROCESSES)
    ]


def _spread(everybody: list[str], process: int) -> list[str]:
    """Each process has callers on as many keys as it can."""
    share = len(everybody) // PROCESSES
    return everybody[process * share : (process + 1) * share]


def _rates(turns: list[Turn]) -> list[float]:
    return [turn.rate for turn in turns]


COLUMNS = "{:<34}{:>26}{:>26}{:>23}{:>9}{:>9}{:>12}{:>8}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each, and fewer callers")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        work()
        return
    turns, seconds, numbers = (1, 0.3, (5, 50)) if chosen.short else (3, 1.0, (1, 5, 25, 50))
    url = postgres_url()
    create_tables(url)
    print(server_settings(url), as_served(), sep="\n")
    children = [Child() for _ in range(PROCESSES)]
    benchmark = Benchmark(url, children, turns, seconds)
    try:
        for seconds_away in (0, AWAY):
            with away(url, seconds_away) as reached:
                for keys in (1, 10):
                    taken = round_trip(reached) * 1000
                    print(f"\n{keys} key{'s' * (keys > 1)}, {seconds_away * 1000:g} ms away (SELECT 1: {taken:.2f} ms)")
                    print(COLUMNS.format(*benchmark.heads))
                    for callers in numbers:
                        benchmark.table(reached, keys, callers)
    finally:
        for child in children:
            child.end()


if __name__ == "__main__":
    main()

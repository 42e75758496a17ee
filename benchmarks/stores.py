"""What a batch costs over each store, in each mode, on each server.

For every case of the contract suite whose server is here: round trips of a batch of one operation (counted by a TCP
proxy between store and server), milliseconds of a lone caller, and operations per second of 100 callers in a closed
loop on one key, with natural batching. The last two also with a millisecond added each way. All of it passes through
the proxy, in this one process, so the figures are for comparing with each other. Each is the median (least to most) of
several turns.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.stores [--short]``. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, Any

from gevent import monkey

monkey.patch_all()

import gevent

from benchmarks.as_served import as_served
from tests.support import pgbouncer
from tests.support.adapters.base import cases

if TYPE_CHECKING:
    from geventbatch import Processor
    from tests.support.adapters.base import Adapter, Case

CALLERS = 100
DELAY = 0.001
"""Seconds that each way takes longer in the second half of the table."""


def lone(adapter: Adapter, processor: Processor[Any], seconds: float) -> float:
    """Milliseconds of one caller's operation, with nobody beside it."""
    count, begun = 0, time.perf_counter()
    while (took := time.perf_counter() - begun) < seconds:
        processor.run("key", adapter.add, 1)
        count += 1
    return took / count * 1000


def crowd(adapter: Adapter, processor: Processor[Any], seconds: float) -> float:
    """Operations per second of all callers in a closed loop on one key."""
    count, end = 0, time.perf_counter() + seconds

    def call() -> None:
        nonlocal count
        while time.perf_counter() < end:
            processor.run("key", adapter.add, 1)
            count += 1

    begun = time.perf_counter()
    gevent.joinall([gevent.spawn(call) for _ in range(CALLERS)], raise_error=True)
    return count / (time.perf_counter() - begun)


def round_trips(adapter: Adapter, processor: Processor[Any]) -> str:
    """Of one batch, on a connection that is there."""
    if adapter.proxy is None:
        return "-"
    processor.run("key", adapter.add, 1)
    before = adapter.proxy.round_trips
    processor.run("key", adapter.add, 1)
    return str(adapter.proxy.round_trips - before)


def measure(case: Case, turns: int, seconds: float) -> None:
    """Print the case's line."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        adapter = stack.enter_context(case.opens(stack.enter_context(case.fresh(directory))))
        processor = stack.enter_context(adapter.processor(missing="make"))
        trips = round_trips(adapter, processor)
        columns = []
        for delay in (0.0, DELAY) if adapter.proxy is not None else (0.0,):
            if adapter.proxy is not None:
                adapter.proxy.delay = delay
            crowd(adapter, processor, seconds / 4)
            columns.append(spread([lone(adapter, processor, seconds) for _ in range(turns)], ".2f"))
            columns.append(spread([crowd(adapter, processor, seconds) for _ in range(turns)], ",.0f"))
    print(f"{case.name:<44} {trips:>5}  " + "  ".join(f"{column:<24}" for column in columns).rstrip(), flush=True)


def spread(values: list[float], form: str) -> str:
    """The median, and between what it lies."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer and shorter turns")
    turns, seconds = (1, 0.2) if parser.parse_args().short else (5, 0.5)
    print(as_served())
    heads = ["lone caller, ms", f"{CALLERS} callers, per second", "with 1 ms each way: ms", "per second"]
    print(f"{'store, mode, server':<44} {'trips':>5}  " + "  ".join(f"{head:<24}" for head in heads).rstrip())
    for case in cases():
        if "pgbouncer" in case.name and not Path(pgbouncer.COMMAND).exists():
            print(f"{case.name:<44} left out: pgbouncer is not here")
        elif "mariadb" in case.name and not (which("mariadbd") or os.environ.get("GEVENTBATCH_TEST_MARIADB_URL")):
            print(f"{case.name:<44} left out: mariadbd is not here")
        else:
            measure(case, turns, seconds)


if __name__ == "__main__":
    main()

"""How cost and memory grow with keys and callers.

CPU time per operation of `Processor.run`, in a closed loop with an in-memory resource and natural batching: 1,000
callers who go round 1 to 100,000 keys, each key's turn coming again when all others have had theirs; and 100 to 20,000
callers on a hundred keys. Each measurement is a process of its own, which also says how much of its CPU time the
garbage collector took, how much memory it had before, at the most and after the load (greenlets gone, collected), and
how many objects the collector tracks for each operation that waits.

They take turns in one run; each figure is the median of the turns (least to most).

Run it from the repository: ``python -m benchmarks.growth [--short] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from gevent import monkey

monkey.patch_all()

import gevent
from gevent.event import Event

from benchmarks.overhead import Counter
from benchmarks.ways import spread
from geventbatch import Processor


class Grown(NamedTuple):
    """What one process measured."""

    nanoseconds: float
    """CPU time of an operation."""
    collecting: float
    """The garbage collector's part of it."""
    before: float
    """MiB of memory."""
    most: float
    after: float
    tracked: float
    """Objects for each operation that waits."""


class Collections:
    """The CPU time of the garbage collector."""

    def __init__(self) -> None:
        """Watch it from now on."""
        self.seconds = 0.0
        self._begun = 0.0
        gc.callbacks.append(self._watch)

    def _watch(self, phase: str, _: object) -> None:
        if phase == "start":
            self._begun = time.process_time()
        else:
            self.seconds += time.process_time() - self._begun


def resident() -> float:
    """MiB of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmRSS")


def measure(callers: int, keys: int, operations: int) -> Grown:
    """Have *callers* run about as many *operations* on *keys*."""
    counters = [Counter() for _ in range(keys)]
    rounds = max(3, operations // callers)
    processor = Processor(load_resource=counters.__getitem__, min_duration=0, max_duration=60)
    for _ in range(100):
        gevent.spawn(processor.run, 0, Counter.add, 0).join()
    gc.collect()
    before, collections = resident(), Collections()
    start = Event()

    def call(number: int) -> None:
        start.wait()
        for turn in range(rounds):
            processor.run((number + turn * callers) % keys, Counter.add, 1)

    greenlets = [gevent.spawn(call, number) for number in range(callers)]
    gevent.sleep(0)
    collections.seconds, begun = 0.0, time.process_time()
    start.set()
    gevent.joinall(greenlets, raise_error=True)
    cpu, collecting = time.process_time() - begun, collections.seconds
    most = resident()
    greenlets.clear()
    gc.collect()
    after = resident()
    if sum(counter.value for counter in counters) != callers * rounds:
        raise AssertionError("operations were lost")
    return Grown(cpu / (callers * rounds) * 1e9, collecting / cpu, before, most, after, tracked(min(callers, 1000)))


def tracked(callers: int) -> float:
    """How many objects the collector tracks more for each caller that waits for a batch of its own."""
    release = Event()

    def load(_: int) -> Counter:
        release.wait()
        return Counter()

    processor = Processor(load_resource=load, min_duration=0, max_duration=60, max_batches=1)
    gc.collect()
    before = len(gc.get_objects())
    greenlets = [gevent.spawn(processor.run, number, Counter.add, 1) for number in range(callers)]
    gevent.sleep(0.1)
    number = (len(gc.get_objects()) - before) / callers
    release.set()
    gevent.joinall(greenlets, raise_error=True)
    processor.stop()
    return number


COLUMNS = "{:>8}{:>9}  {:<28}{:<24}{:<22}{:>10}{:>9}{:>9}{:>10}"


def show(callers: int, keys: int, grown: list[Grown], first: list[Grown]) -> None:
    """Print a line, and the ratio to the first of its kind in the same turns."""
    cells = [
        spread([one.nanoseconds for one in grown], ",.0f"),
        spread([one.nanoseconds / other.nanoseconds for one, other in zip(grown, first, strict=True)], ".2f"),
        spread([one.collecting * 100 for one in grown], ".0f") + " %",
        *(f"{sorted(getattr(one, name) for one in grown)[len(grown) // 2]:,.1f}" for name in Grown._fields[2:]),
    ]
    print(COLUMNS.format(f"{callers:,}", f"{keys:,}", *cells), flush=True)


def in_a_process(callers: int, keys: int, operations: int) -> Grown:
    """Measure it there."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", "--measure", str(callers), str(keys), str(operations)],
        stdout=subprocess.PIPE,
        check=True,
    )
    return Grown(*json.loads(ended.stdout))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    parser.add_argument("--measure", nargs=3, type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(*chosen.measure)))
        return
    turns, operations = (1, 20_000) if chosen.short else (5, 200_000)
    by_keys = [(1000, keys) for keys in (1000, 1, 64, 10_000, 100_000)]
    by_callers = [(callers, 100) for callers in (100, 1000, 5000, 10_000, 20_000)]
    heads = ("ns per operation", "× the first line's", "garbage collector", "MiB first", "most", "after", "tracked")
    everything = []
    for cases in (by_keys, by_callers):
        print()
        print(COLUMNS.format("callers", "keys", *heads))
        grown: dict[tuple[int, int], list[Grown]] = {case: [] for case in cases}
        for _ in range(turns):
            for case, some in grown.items():
                some.append(in_a_process(*case, operations))
        for (callers, keys), some in grown.items():
            show(callers, keys, some, grown[cases[0]])
            everything.append({"callers": callers, "keys": keys, "turns": [one._asdict() for one in some]})
    if chosen.json:
        chosen.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()

"""How cost and memory grow with keys and callers.

CPU time per operation of `Processor.run`, in a closed loop with an in-memory resource and natural batching: 1,000
callers who go round 1 to 100,000 keys, each key's turn coming again when all others have had theirs; 100 to 20,000
callers on a hundred keys; and 10,000 callers on as many keys with other settings of the garbage collector.

Each measurement is a process of its own, which also says how much of its CPU time the garbage collector took, how many
objects it tracks for each operation that waits, and how much memory the process had: before the load, at the most,
after it (greenlets gone, collected), when malloc was told to give back what it does not use (`malloc_trim`, on Linux),
and after two more such loads and that. And how many objects of this library are left when the processor has stopped.

Last, how late a timer of 1 ms is meanwhile: in a process that has imported an ORM and a framework, 10,000 callers come
within a second and go round 10,000 keys. With the garbage collector as it is, frozen, and as the integrations of
servers leave it; beside the longest pass of the collector, in its CPU time, since a busy machine makes timers late too.

They take turns in one run; each figure is the median of the turns (least to most).

Run it from the repository: ``python -m benchmarks.growth [--short] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gevent import monkey

monkey.patch_all()

import gevent
from gevent.event import Event

from benchmarks.overhead import Counter
from benchmarks.ways import spread
from geventbatch import Processor
from geventbatch._core.pair import save_nothing
from geventbatch.integrations._collector import freeze_loaded

if TYPE_CHECKING:
    from collections.abc import Callable


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
    trimmed: float
    thrice: float
    tracked: float
    """Objects for each operation that waits."""
    left: float
    """Objects of ours when the processor has stopped."""


class Collections:
    """The CPU time of the garbage collector."""

    def __init__(self) -> None:
        """Watch it from now on."""
        self.seconds = 0.0
        self.longest = 0.0
        self._begun = 0.0
        gc.callbacks.append(self._watch)

    def _watch(self, phase: str, _: object) -> None:
        if phase == "start":
            self._begun = time.process_time()
        else:
            passed = time.process_time() - self._begun
            self.seconds += passed
            self.longest = max(self.longest, passed)


def resident() -> float:
    """MiB of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("/proc/self/status has no VmRSS")


def trim() -> None:
    """Have malloc give back what it does not use, where it knows how."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def ours() -> int:
    """How many objects of the library's classes the collector knows."""
    gc.collect()
    return sum(str(type(one).__module__).startswith("geventbatch") for one in gc.get_objects())


def frozen(threshold: int) -> None:
    """Leave what there is out of all collections, and have fewer of them."""
    gc.freeze()
    gc.set_threshold(threshold, 20, 100)


COLLECTORS: dict[str, Callable[[], object]] = {
    "as it is": gc.enable,
    "freeze": gc.freeze,
    "10,000": partial(gc.set_threshold, 10_000, 20, 100),
    "freeze, 10,000": partial(frozen, 10_000),
    "freeze, 50,000": partial(frozen, 50_000),
    "off": gc.disable,
    "as a worker starts": freeze_loaded,
}
"""What can be said to the garbage collector once an application has been loaded."""


class Load:
    """*callers* who run about as many operations on *keys*."""

    def __init__(self, callers: int, keys: int, operations: int) -> None:
        """Have all workers there are, once each."""
        self._counters = [Counter() for _ in range(keys)]
        self._callers = callers
        self._rounds = max(3, operations // callers)
        self.processor = Processor(
            load_resource=self._counters.__getitem__, save_resource=save_nothing, min_duration=0, max_duration=60
        )
        for key in range(min(keys, 1000)):
            gevent.spawn(self.processor.run, key, Counter.add, 0).join()

    @property
    def operations(self) -> int:
        """Of one load."""
        return self._callers * self._rounds

    def run(self, collections: Collections) -> tuple[float, float, float]:
        """Give its CPU seconds, those of the collector, and the memory at its end."""
        before = self._counted()
        start = Event()

        def call(number: int) -> None:
            start.wait()
            for turn in range(self._rounds):
                self.processor.run((number + turn * self._callers) % len(self._counters), Counter.add, 1)

        greenlets = [gevent.spawn(call, number) for number in range(self._callers)]
        gevent.sleep(0)
        collections.seconds, begun = 0.0, time.process_time()
        start.set()
        gevent.joinall(greenlets, raise_error=True)
        cpu, collecting = time.process_time() - begun, collections.seconds
        if self._counted() - before != self.operations:
            raise AssertionError("operations were lost")
        return cpu, collecting, resident()

    def _counted(self) -> int:
        return sum(counter.value for counter in self._counters)


def measure(callers: int, keys: int, operations: int, collector: str) -> Grown:
    """Have a load three times; of the first one tell all."""
    at_first = ours()
    load = Load(callers, keys, operations)
    trim()
    COLLECTORS[collector]()
    gc.collect()
    before, collections = resident(), Collections()
    cpu, collecting, most = load.run(collections)
    gc.collect()
    after = resident()
    trim()
    trimmed = resident()
    for _ in range(2):
        load.run(collections)
    gc.collect()
    trim()
    thrice = resident()
    nanoseconds = cpu / load.operations * 1e9
    load.processor.stop()
    gevent.sleep(0.01)  # its workers end
    del load
    gc.unfreeze()
    left = ours() - at_first
    return Grown(nanoseconds, collecting / cpu, before, most, after, trimmed, thrice, tracked(min(callers, 1000)), left)


def tracked(callers: int) -> float:
    """How many objects the collector tracks more for each caller that waits for a batch of its own."""
    release = Event()

    def load(_: int) -> Counter:
        release.wait()
        return Counter()

    processor = Processor(
        load_resource=load, save_resource=save_nothing, min_duration=0, max_duration=60, max_batches=1
    )
    gc.collect()
    before = len(gc.get_objects())
    greenlets = [gevent.spawn(processor.run, number, Counter.add, 1) for number in range(callers)]
    gevent.sleep(0.1)
    number = (len(gc.get_objects()) - before) / callers
    release.set()
    gevent.joinall(greenlets, raise_error=True)
    processor.stop()
    return number


class Late(NamedTuple):
    """How late a timer was while *callers* came and ran operations, in ms."""

    worst: float
    most: float
    """The 99th percentile."""
    longest: float
    """CPU time of the collector's longest pass."""
    operations: float
    """A second."""


TIMER = 0.001


def lateness(callers: int, seconds: float, collector: str) -> Late:
    """Have *callers* come, 100 at a time, and go round as many keys."""
    for name in ("flask", "sqlalchemy.orm"):  # an application
        import_module(name)
    counters = [Counter() for _ in range(callers)]
    processor = Processor(load_resource=counters.__getitem__, save_resource=save_nothing, min_duration=0)
    COLLECTORS[collector]()
    collections, late = Collections(), list[float]()
    over = time.monotonic() + seconds

    def call(number: int) -> None:
        while time.monotonic() < over:
            processor.run(number, Counter.add, 1)
            number = (number + 1) % callers

    def watch() -> None:
        while (due := time.monotonic() + TIMER) < over:
            gevent.sleep(TIMER)
            late.append((time.monotonic() - due) * 1000)

    greenlets: list[Any] = [gevent.spawn(watch)]
    for number in range(callers):
        greenlets.append(gevent.spawn(call, number))
        if number % 100 == 99:
            gevent.sleep(0.01)
    gevent.joinall(greenlets, raise_error=True)
    processor.stop()
    operations = sum(counter.value for counter in counters) / seconds
    return Late(max(late), statistics.quantiles(late, n=100)[-1], collections.longest * 1000, operations)


COLUMNS = "{:>8}{:>9}{:>16}  {:<28}{:<24}{:<22}{:>10}{:>9}{:>9}{:>9}{:>9}{:>10}{:>7}"
HEADS = (
    "ns per operation",
    "× the first line's",
    "garbage collector",
    "MiB first",
    "most",
    "after",
    "trimmed",
    "thrice",
)


class Case(NamedTuple):
    """What is measured."""

    callers: int
    keys: int
    collector: str = "as it is"


def show(case: Case, grown: list[Grown], first: list[Grown]) -> None:
    """Print a line, and the ratio to the first of its kind in the same turns."""
    cells = [
        spread([one.nanoseconds for one in grown], ",.0f"),
        spread([one.nanoseconds / other.nanoseconds for one, other in zip(grown, first, strict=True)], ".2f"),
        spread([one.collecting * 100 for one in grown], ".0f") + " %",
        *(f"{statistics.median(getattr(one, name) for one in grown):,.1f}" for name in Grown._fields[2:-1]),
        f"{max(one.left for one in grown):,.0f}",
    ]
    print(COLUMNS.format(f"{case.callers:,}", f"{case.keys:,}", case.collector, *cells), flush=True)


def in_a_process(case: Case, operations: int) -> Grown:
    """Measure it there."""
    return Grown(*_printed_by("--measure", *case[:2], operations, case.collector))


def _printed_by(option: str, *arguments: object) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.growth", option, json.dumps(arguments)]
    found: list[float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def show_lateness(turns: int, seconds: float) -> list[dict[str, object]]:
    """Print how late a timer is; return what was measured."""
    callers = 10_000
    found: dict[str, list[Late]] = {name: [] for name in ("as it is", "freeze", "as a worker starts", "off")}
    for _ in range(turns):
        for collector, some in found.items():
            some.append(Late(*_printed_by("--lateness", callers, seconds, collector)))
    columns = "{:>8}{:>20}{:>24}{:>24}{:>28}{:>28}"
    heads = ("late, worst ms", "p99 ms", "longest pass, CPU ms", "operations/s")
    print("\n" + columns.format("callers", "collector", *heads))
    for collector, some in found.items():
        cells = [
            spread([getattr(one, name) for one in some], form)
            for name, form in (("worst", ".0f"), ("most", ".0f"), ("longest", ".1f"), ("operations", ",.0f"))
        ]
        print(columns.format(f"{callers:,}", collector, *cells), flush=True)
    return [
        {"callers": callers, "collector": collector, "late": [one._asdict() for one in some]}
        for collector, some in found.items()
    ]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--lateness", type=json.loads, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.lateness:
        print(json.dumps(lateness(*chosen.lateness)))
        return
    if chosen.measure:
        print(json.dumps(measure(*chosen.measure)))
        return
    turns, operations = (1, 10_000) if chosen.short else (3, 60_000)
    by_keys = [Case(1000, keys) for keys in (1000, 1, 64, 10_000, 100_000)]
    by_callers = [Case(callers, 100) for callers in (100, 1000, 5000, 10_000, 20_000)]
    by_collector = [Case(10_000, 10_000, collector) for collector in COLLECTORS]
    everything = []
    for cases in (by_keys, by_callers, by_collector):
        print()
        print(COLUMNS.format("callers", "keys", "collector", *HEADS, "tracked", "left"))
        grown: dict[Case, list[Grown]] = {case: [] for case in cases}
        for _ in range(turns):
            for case, some in grown.items():
                some.append(in_a_process(case, operations))
        for case, some in grown.items():
            show(case, some, grown[cases[0]])
            everything.append(case._asdict() | {"turns": [one._asdict() for one in some]})
    everything += show_lateness(turns, 2 if chosen.short else 6)
    if chosen.json:
        chosen.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()

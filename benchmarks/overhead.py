"""What `run` costs beyond its callers: CPU time per operation against the floor.

1,000 callers in a closed loop, an in-memory resource, `min_duration` 0 and 0.001, on 1, 64 and 1,000 keys. The floor is
what the same callers cost who block on one shared `AsyncResult` a round, with nothing else done. Floor and library take
turns in one run, since the speed of a machine drifts; each ratio is that of one turn, printed as median (least to
most).

Run it from the repository: ``python -m benchmarks.overhead [--short]``. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING

from gevent import monkey

monkey.patch_all()

import gevent
from gevent.event import AsyncResult, Event

from geventbatch import COMPILED, Processor
from geventbatch._core.pair import save_nothing

if TYPE_CHECKING:
    from collections.abc import Callable

CALLERS = 1000


class Counter:
    """An in-memory resource."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int) -> int:
        """Be an operation that does next to nothing."""
        self.value += amount
        return self.value


def floor(operations: int, callers: int) -> float:
    """CPU seconds per operation of *callers* that block on one shared AsyncResult a round."""
    rounds = max(1, operations // callers)
    box: list[AsyncResult[None]] = [AsyncResult()]

    def call() -> None:
        for _ in range(rounds):
            box[0].wait()

    greenlets = [gevent.spawn(call) for _ in range(callers)]
    gevent.sleep(0)
    begun = time.process_time()
    for _ in range(rounds):
        shared, box[0] = box[0], AsyncResult()
        shared.set()
        gevent.sleep(0)
        gevent.sleep(0)
    gevent.joinall(greenlets, raise_error=True)
    return (time.process_time() - begun) / (rounds * callers)


def batched(operations: int, callers: int, keys: int, min_duration: float) -> float:
    """CPU seconds per operation of *callers* in a closed loop on *keys*."""
    counters = [Counter() for _ in range(keys)]
    rounds = max(1, operations // callers)
    processor = Processor(
        load_resource=counters.__getitem__, save_resource=save_nothing, min_duration=min_duration, max_duration=30
    )
    start = Event()

    def call(key: int) -> None:
        start.wait()
        for _ in range(rounds):
            processor.run(key, Counter.add, 1)

    greenlets = [gevent.spawn(call, caller % keys) for caller in range(callers)]
    gevent.sleep(0)
    begun = time.process_time()
    start.set()
    gevent.joinall(greenlets, raise_error=True)
    took = time.process_time() - begun
    processor.stop()
    if sum(counter.value for counter in counters) != rounds * callers:
        raise AssertionError("operations were lost")
    return took / (rounds * callers)


def longest_gap(callers: int = CALLERS, work: float = 100e-6, rounds: int = 5) -> float:
    """The longest time that a 1 ms timer of the hub was kept waiting while woken callers each work, in seconds."""
    processor: Processor[list[int]] = Processor(
        load_resource=lambda _: [], save_resource=save_nothing, min_duration=0, max_duration=30
    )
    longest = 0.0
    done = False

    def tick() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not done:
            gevent.sleep(0.001)
            now = time.perf_counter()
            longest = max(longest, now - last)
            last = now

    def call() -> None:
        for _ in range(rounds):
            processor.run("key", list.append, 1)
            until = time.perf_counter() + work
            while time.perf_counter() < until:
                pass

    ticker = gevent.spawn(tick)
    gevent.joinall([gevent.spawn(call) for _ in range(callers)], raise_error=True)
    done = True
    ticker.join()
    processor.stop()
    return longest


def memory_per_batch(batches: int = 2000) -> tuple[float, float]:
    """Bytes that an open batch with one caller takes, and a caller that only waits (of Python's own allocations)."""
    there: list[int] = []
    all_there = Event()

    def come(number: int) -> list[int]:
        there.append(number)
        if len(there) == batches:
            all_there.set()
        return []

    def wait(number: int) -> None:
        come(number)
        AsyncResult().wait()

    def grown(call: Callable[[int], object]) -> float:
        there.clear()
        all_there.clear()
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        greenlets = [gevent.spawn(call, number) for number in range(batches)]
        all_there.wait()
        gevent.sleep(0)  # the last one goes on, and waits
        gc.collect()
        size = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        gevent.killall(greenlets)
        return size / batches

    processor: Processor[list[int]] = Processor(
        load_resource=come, save_resource=save_nothing, min_duration=900, max_duration=1000
    )
    plain = grown(wait)
    whole = grown(lambda number: processor.run(number, list.append, 1))
    processor.stop()
    return whole, plain


def spread(values: list[float], form: str) -> str:
    """The median, and between what it lies."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer turns, and nothing above 1,000 keys")
    short = parser.parse_args().short
    turns, operations = (3, 20_000) if short else (9, 100_000)
    print(f"geventbatch {'compiled' if COMPILED else 'in pure Python'}\n")
    print(f"{'callers':>8} {'keys':>7} {'window':>7}  {'× the floor':<24} {'ns per operation':<28}")
    cases = [(CALLERS, keys, window, operations) for window in (0, 0.001) for keys in (1, 64, 1000)]
    if not short:
        cases += [(keys, keys, 0, 3 * keys) for keys in (10_000, 100_000)]
    for callers, keys, window, count in cases:
        batched(count // 4, callers, keys, window)
        costs, ratios = [], []
        for _ in range(turns if callers == CALLERS else 3):
            least = floor(count, callers)
            cost = batched(count, callers, keys, window)
            costs.append(cost * 1e9)
            ratios.append(cost / least)
        print(
            f"{callers:>8,} {keys:>7,} {window:>7}  {spread(ratios, '.2f'):<24} {spread(costs, ',.0f'):<28}", flush=True
        )
    gaps = [longest_gap() * 1e3 for _ in range(turns)]
    print(f"\nlongest gap of a 1 ms timer, 1,000 woken callers with 100 µs of work each: {spread(gaps, '.1f')} ms")
    if not short:
        whole, plain = memory_per_batch()
        print(f"memory of an open batch with one caller: {whole:,.0f} bytes; of a caller that only waits: {plain:,.0f}")
        print(f"most memory of this whole run: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")


if __name__ == "__main__":
    main()

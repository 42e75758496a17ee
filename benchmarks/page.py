"""What the page for one's own admin costs: each batch that it counts, and each time that it is shown.

- CPU time of the page per batch, when all are of one key and when each is of another one.
- CPU time of a batch in `run`, on an in-memory resource, without a watcher and with one that does nothing: what the
  metric of a batch costs, which is made for any watcher. With one caller each operation is a batch of its own.
- Milliseconds of one answer, without a batch and with 10,000 live keys, 100 of them hanging.

The forms take turns; a figure is the least of the turns, since other programs can only add to it. Run it from the
repository: ``python -m benchmarks.page [--short]``. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from gevent import monkey

monkey.patch_all()

import gevent
from gevent.event import Event

from geventbatch import BatchMetric, Processor, _seam
from geventbatch._core.pair import save_nothing
from geventbatch.integrations.page import Page

KEYS = 10_000


class Counter:
    """An in-memory resource."""

    value = 0

    def add(self, amount: int) -> int:
        """Be an operation that does next to nothing."""
        self.value += amount
        return self.value


def shown_to_all(processors: list[Processor[Any]]) -> Page:
    """Give a page of *processors*."""
    return Page(allow=lambda _: True, processors=processors)


class Idle:
    """A watcher that does nothing."""

    def publish(self, metric: object) -> None:
        """Leave it."""

    def close(self) -> None:
        """Likewise."""


def cpu_of_page(batches: int, keys: int) -> float:
    """CPU seconds of the page per batch."""
    processor: Processor[None] = Processor(min_duration=0)
    page = shown_to_all([processor])
    (watcher,) = (held() for held in processor._subscriptions)  # noqa: SLF001 - what the processor shows its batches
    assert watcher is not None
    metrics = [metric_of(f"key {number % keys}") for number in range(batches)]
    begun = time.process_time()
    for metric in metrics:
        watcher.publish(metric)
    spent = time.process_time() - begun
    del page
    return spent / batches


def metric_of(key: str) -> BatchMetric:
    """Give one of a batch that was saved."""
    return BatchMetric(
        key=key,
        started_at=time.time(),
        operation_count=10,
        load_duration=0.01,
        save_duration=0.01,
        total_duration=0.03,
        attempts=1,
        error=None,
        queue_wait=0.01,
        window=0.01,
        apply_duration=0.01,
        conflicts=0,
        raised=0,
        withdrawn=0,
        waiting_at_close=10,
        phase=None,
        operation_name="Counter.add",
    )


def cpu_of_batch(callers: int, rounds: int, *, watched: bool) -> float:
    """CPU seconds per batch."""
    counter = Counter()
    with Processor(
        load_resource=lambda _: counter, save_resource=save_nothing, min_duration=0, max_duration=30
    ) as processor:
        idle = Idle()
        if watched:
            _seam.watch(processor, idle)

        def call() -> None:
            for _ in range(rounds):
                processor.run("hot", Counter.add, 1)

        begun = time.process_time()
        gevent.joinall([gevent.spawn(call) for _ in range(callers)], raise_error=True)
        return (time.process_time() - begun) / processor.stats().batches_total


def answer_with(keys: int, times: int) -> float:
    """Seconds of an answer while so many keys have live batches."""
    let_go = Event()
    processor: Processor[None] = Processor(
        load_resource=lambda _: let_go.wait() and None,
        save_resource=save_nothing,
        min_duration=0,
        max_duration=60,
        max_batches=100,
    )
    page = shown_to_all([processor])
    callers = [gevent.spawn(processor.run, key, lambda _: None) for key in range(keys)]
    gevent.sleep(1.5)
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        page.answer({"REQUEST_METHOD": "GET"})
        taken.append(time.perf_counter() - begun)
    let_go.set()
    gevent.joinall(callers, raise_error=True)
    processor.stop()
    return min(taken)


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="to see that it works")
    short = parser.parse_args().short
    turns, operations, times = (3, 2_000, 5) if short else (15, 20_000, 50)
    for keys in (1, operations):
        spent = min(cpu_of_page(operations, keys) for _ in range(turns))
        print(f"the page counts a batch of one of {keys:>6,} keys in {spent * 1e6:.1f} µs")
    for callers in (1, 100):
        rounds = operations // callers
        took = [
            (cpu_of_batch(callers, rounds, watched=False), cpu_of_batch(callers, rounds, watched=True))
            for _ in range(turns)
        ]
        none, idle = (min(column) for column in zip(*took, strict=True))
        print(
            f"a batch of {callers:>3} operations takes {none * 1e6:.1f} µs, and {(idle - none) * 1e6:.1f} µs more with "
            "any watcher"
        )
    for keys in (0, KEYS):
        print(f"one answer with {keys:>6,} live keys: {answer_with(keys, times) * 1e3:.1f} ms")


if __name__ == "__main__":
    main()

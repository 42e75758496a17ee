"""What watchers cost a batch: nobody watches, somebody reads a subscription, Prometheus.

Each batch has one operation, and load, operation and save do next to nothing; so there is nothing in it but what it
costs to have one, and a watcher costs as much of it as ever it can. The ways take turns, in one process; a figure is
the median (least to most) of the turns, in µs of CPU for each batch. With several processes
(``PROMETHEUS_MULTIPROC_DIR``) Prometheus' metrics are in files: that is a process of its own.

Run it from the repository: ``python -m benchmarks.watching [--short]``. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from gevent import monkey

monkey.patch_all()

import gevent

from geventbatch import Processor
from geventbatch.integrations import prometheus

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def apply(resource: None) -> None:
    """The operation."""


def unwatched() -> Processor[None]:
    """Have nobody watch it."""
    processor: Processor[None] = Processor(min_duration=0)
    processor._subscriptions.clear()  # noqa: SLF001 - Prometheus watches every one by now
    return processor


def subscribed() -> Processor[None]:
    """Have a greenlet read its metrics."""
    processor = unwatched()
    metrics = processor.subscribe_batch_metrics()
    gevent.spawn(lambda: [None for _ in metrics])
    return processor


def in_prometheus() -> Processor[None]:
    """Have it in the default registry."""
    return Processor(min_duration=0)


WAYS: dict[str, Callable[[], Processor[None]]] = {
    "nobody watches": unwatched,
    "a subscription": subscribed,
    "Prometheus": in_prometheus,
}


def measure(processor: Processor[None], seconds: float) -> float:
    """Give the seconds of CPU that a batch takes."""
    batches, taken, begun = 0, 0.0, time.process_time()
    with processor:
        while taken < seconds:
            for _ in range(100):
                processor.run("key", apply)
            batches += 100
            taken = time.process_time() - begun
    return taken / batches


def show(*, turns: int, seconds: float) -> None:
    """Print a line for each way."""
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way, made in WAYS.items():
            taken[way].append(measure(made(), seconds) * 1e6)
    print("several processes" if FOLDER in os.environ else "one process")
    for way, costs in taken.items():
        print(f"  {way:20} {statistics.median(costs):6.1f} ({min(costs):.1f} to {max(costs):.1f})", flush=True)


def main() -> None:
    """Measure it in this process, and in one whose metrics are in files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=__doc__)
    parser.add_argument("--short", action="store_true", help="to see that it works")
    short: Any = parser.parse_args().short
    prometheus.watch()
    show(turns=2 if short else 15, seconds=0.05 if short else 0.5)
    if FOLDER not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.watching", *(["--short"] if short else [])]
            subprocess.run(command, env={**os.environ, FOLDER: folder}, check=True)


if __name__ == "__main__":
    main()

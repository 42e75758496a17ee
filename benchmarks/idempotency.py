"""What idempotency keys cost: batches of 1, 100 and 1,000 operations, with keys and without.

Every operation adds 1 to the total of one resource, and returns it; so there is next to nothing in a batch but what it
costs to have one, and each key costs as much of it as ever it can. Every key is a new one. A turn with keys and a turn
without follow each other, in one process, without a proxy; a figure is the median (least to most) of the turns. What a
batch takes is its part of the time of a turn, from the calls of `run` to the answers.

Run it from the repository: ``python -m benchmarks.idempotency [--short]``. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gevent import monkey

monkey.patch_all()

import gevent

from benchmarks.stores import spread
from tests.adapters.base import cases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch import Processor
    from tests.adapters.base import Adapter, Case

CASES = (
    "sqlalchemy-document-lock-postgresql",
    "sqlalchemy-mapped-lock-postgresql",
    "django-lock-postgresql",
    "redis",
)

SIZES = (1, 100, 1000)

_numbers = count()


def turn(adapter: Adapter, processor: Processor[Any], size: int, batches: int, *, keyed: bool) -> float:
    """Milliseconds of one of so many batches of *size* operations, one after the other."""
    prefix = f"8f14e45f-ceea-467f-a83c-{next(_numbers):08x}"  # as long as a UUID
    gc.collect()
    begun = time.perf_counter()

    def call(number: int) -> None:
        for batch in range(batches):
            key = f"{prefix}{batch * size + number:04x}" if keyed else None
            processor.run("key", adapter.add, 1, idempotency_key=key)

    gevent.joinall([gevent.spawn(call, number) for number in range(size)], raise_error=True)
    return (time.perf_counter() - begun) / batches * 1000


@contextmanager
def opened(case: Case, size: int) -> Iterator[tuple[Adapter, Processor[Any]]]:
    """A fresh place, and a processor whose batches close as soon as all callers are in them."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        adapter = stack.enter_context(case.opens(stack.enter_context(case.fresh(directory))))
        processor = stack.enter_context(adapter.processor(missing="make", max_batch_size=size, min_duration=0))
        yield adapter, processor


def measure(case: Case, size: int, turns: int, operations: int) -> None:
    """Print a line."""
    batches = max(2, operations // size)
    with opened(case, size) as (adapter, processor):
        metrics = processor.subscribe_batch_metrics()
        for keyed in (False, True):
            turn(adapter, processor, size, batches, keyed=keyed)
        plain, with_keys = [], []
        for _ in range(turns):
            plain.append(turn(adapter, processor, size, batches, keyed=False))
            with_keys.append(turn(adapter, processor, size, batches, keyed=True))
        processor.stop()
        sizes = [metric.operation_count for metric in metrics]
    more = [100 * (keyed / bare - 1) for keyed, bare in zip(with_keys, plain, strict=True)]
    each = 1000 * (statistics.median(with_keys) - statistics.median(plain)) / size
    print(
        f"{case.name:<36} {size:>5,} {statistics.mean(sizes):>7,.0f}  {spread(plain, '.2f'):<22} "
        f"{spread(with_keys, '.2f'):<22} {spread(more, '+.0f'):<18} {each:>7.1f}",
        flush=True,
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer and shorter turns")
    turns, operations = (3, 1000) if parser.parse_args().short else (9, 10_000)
    print(
        f"{'store, mode, server':<36} {'size':>5} {'batches':>7}  {'without, ms':<22} {'with keys, ms':<22} "
        f"{'more, %':<18} {'µs each':>7}"
    )
    for case in cases():
        for size in SIZES if case.name in CASES else ():
            measure(case, size, turns, operations if size > 1 else operations // 10)


if __name__ == "__main__":
    main()

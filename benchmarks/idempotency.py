"""What idempotency keys cost: batches of 1, 100 and 1,000 operations, with keys and without.

Every operation adds 1 to the total of one resource, and returns it; so there is next to nothing in a batch but what it
costs to have one, and each key costs as much of it as ever it can. Every key is a new one. A turn with keys and a turn
without follow each other, in one process, without a proxy; a figure is the median (least to most) of the turns. What a
batch takes is its part of the time of a turn, from the calls of `run` to the answers.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.idempotency [--short]``. It measures, and asserts nothing.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gevent import monkey

monkey.patch_all()

import gevent

from benchmarks.as_served import as_served
from benchmarks.stores import spread
from geventbatch import Processor
from geventbatch.stores import DjangoStore, RedisStore, SQLAlchemyStore
from geventbatch.stores.django._connections import close_idle
from tests.support.adapters import sqlalchemy
from tests.support.adapters.django import TABLES
from tests.support.django_project.bank.models import Outcome, Purse
from tests.support.django_project.start import database, options_of, place
from tests.support.redis_server import connected, redis_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    import sqlalchemy as sa

SIZES = (1, 100, 1000)

_numbers = count()


Store = Callable[[Any], AbstractContextManager[Any]]


def add_to_document(document: dict[str, int], amount: int) -> int:
    """The operation, on a document."""
    document["total"] += amount
    return document["total"]


def add_to_row(row: Any, amount: int) -> int:
    """The same, on an instance of a mapped class or a model."""
    row.total += amount
    return int(row.total)


@contextmanager
def documents(directory: Path) -> Iterator[Store]:
    """SQLAlchemy's, on PostgreSQL."""
    with sqlalchemy.fresh("postgresql", directory) as address, engine(address) as one:
        yield SQLAlchemyStore.documents(
            one, "documents", missing=lambda _: {"total": 0}, idempotency=sqlalchemy.OUTCOMES
        )


@contextmanager
def mapped(directory: Path) -> Iterator[Store]:
    """Likewise."""
    with sqlalchemy.fresh("postgresql", directory) as address, engine(address) as one:
        yield SQLAlchemyStore.mapped(
            one,
            sqlalchemy.Purse,
            by="name",
            missing=lambda name: sqlalchemy.Purse(name=name, total=0),
            idempotency=sqlalchemy.OUTCOMES,
        )


@contextmanager
def engine(address: str) -> Iterator[sa.Engine]:
    """One that is disposed of."""
    one = sqlalchemy.PostgresPlace(address).engine(None)
    yield one
    one.dispose()


@contextmanager
def models(directory: Path) -> Iterator[Store]:
    """Django's, on PostgreSQL."""
    with (
        place("postgresql", directory, models=TABLES) as address,
        database(address, create=False, options=options_of(address)) as alias,
    ):
        yield DjangoStore(
            Purse,
            by="name",
            missing=lambda name: Purse(name=name),
            using=alias,
            idempotency=Outcome,
        )
        close_idle(alias)


@contextmanager
def hashes(directory: Path) -> Iterator[Store]:  # noqa: ARG001 - as the others
    """Redis's."""
    with connected(redis_url()) as client:
        yield RedisStore(client, missing=lambda _: {"total": 0})
        client.flushdb()


STORES: dict[str, tuple[Callable[[Path], AbstractContextManager[Store]], Callable[..., int]]] = {
    "SQLAlchemy, documents": (documents, add_to_document),
    "SQLAlchemy, mapped": (mapped, add_to_row),
    "Django": (models, add_to_row),
    "Redis": (hashes, add_to_document),
}


def turn(run: Callable[..., int], operation: Callable[..., int], size: int, batches: int, *, keyed: bool) -> float:
    """Milliseconds of one of so many batches of *size* operations, one after the other."""
    prefix = f"8f14e45f-ceea-467f-a83c-{next(_numbers):04x}"
    gc.collect()
    begun = time.perf_counter()

    def call(number: int) -> None:
        for batch in range(batches):
            key = f"{prefix}{batch * size + number:08x}" if keyed else None  # as long as a UUID
            run("key", operation, 1, idempotency_key=key)

    gevent.joinall([gevent.spawn(call, number) for number in range(size)], raise_error=True)
    return (time.perf_counter() - begun) / batches * 1000


def measure(name: str, size: int, turns: int, batches: int) -> None:
    """Print a line."""
    opened, operation = STORES[name]
    with (
        tempfile.TemporaryDirectory() as directory,
        opened(Path(directory)) as store,
        # A window that no turn waits for: a batch is saved as soon as it is full.
        Processor(open_resource=store, min_duration=10, max_duration=30, max_batch_size=size) as processor,
    ):
        took: dict[bool, list[float]] = {False: [], True: []}
        for number in range(turns + 1):
            for keyed, all_of_them in took.items():
                milliseconds = turn(processor.run, operation, size, batches, keyed=keyed)
                if number:  # the first one warms up
                    all_of_them.append(milliseconds)
    without, with_keys = took.values()
    more = [100 * (keyed / bare - 1) for bare, keyed in zip(without, with_keys, strict=True)]
    each = 1000 * (statistics.median(with_keys) - statistics.median(without)) / size
    columns = [spread(without, ".2f"), spread(with_keys, ".2f"), spread(more, "+.0f")]
    print(f"{name:<22} {size:>5,}  " + " ".join(f"{column:<24}" for column in columns) + f" {each:>7.1f}", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer and shorter turns")
    turns, operations = (3, 1000) if parser.parse_args().short else (15, 10_000)
    print(as_served())
    heads = ["without, ms", "with keys, ms", "more, %"]
    print(f"{'store':<22} {'size':>5}  " + " ".join(f"{head:<24}" for head in heads) + f" {'µs each':>7}")
    for name in STORES:
        for size in SIZES:
            measure(name, size, turns, max(2, operations // size // (10 if size == 1 else 1)))


if __name__ == "__main__":
    main()

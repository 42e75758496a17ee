"""What an operation that raises costs: half of 1,000 callers are refused after they have changed the resource.

With `clean_errors`, which says that there is nothing to undo, and without, in turns, in one process. Every second
caller adds 1 to the total; the others do too, and raise. So each refusal has to be undone behind an operation that has
returned, which is the worst that there is. A batch has all 1,000 of them. What was saved is compared with what was
answered after each turn without `clean_errors`; with it the promise is false, and so is the total.

For each store: operations a second, without over with, the median (least to most) of the turns; and the CPU time that a
refusal takes more, by the cheapest turn of each, beside what it takes to decode and to encode the resource.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.refusals [--short]``. It measures, and asserts no time.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import tempfile
import time
import timeit
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gevent import monkey

monkey.patch_all()

import gevent

from benchmarks.as_served import as_served
from benchmarks.idempotency import engine
from benchmarks.stores import spread
from geventbatch import Processor
from geventbatch.stores import DjangoStore, RedisStore, SQLAlchemyStore
from geventbatch.stores._json import encode, encode_compact
from geventbatch.stores.django._connections import close_idle
from tests.support.adapters import sqlalchemy
from tests.support.adapters.django import TABLES
from tests.support.django_project.bank.models import Purse
from tests.support.django_project.start import database, options_of, place
from tests.support.redis_server import connected, redis_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

CALLERS = 1000
SIZES = {"16 B": 16, "1 KB": 1024, "20 KB": 20 * 1024}


class Opened(NamedTuple):
    """A store that is open."""

    options: dict[str, Any]
    """Of a processor."""
    copying: Callable[[], object] | None = None
    """Copies a resource as undoing does; None where it is a row."""


class NotEnough(Exception):
    """What is raised."""


def document(size: int) -> dict[str, Any]:
    """One whose JSON has about so many bytes."""
    made: dict[str, Any] = {"total": 0}
    names = iter(range(size))
    while len(json.dumps(made)) + 30 < size:
        made[f"seat {next(names):04}"] = {"passenger": "Ann"}
    return made


def of_document(resource: dict[str, Any], refused: bool) -> int:  # noqa: FBT001 - as `run` passes it
    """The operation, on a document."""
    resource["total"] += 1
    if refused:
        raise NotEnough
    return int(resource["total"])


def of_row(row: Any, refused: bool) -> int:  # noqa: FBT001 - as above
    """The same, on an instance of a mapped class or a model."""
    row.total += 1
    if refused:
        raise NotEnough
    return int(row.total)


# -- the stores -----------------------------------------------------------------------------------------------


@contextmanager
def pair(directory: Path, size: int) -> Iterator[Opened]:  # noqa: ARG001 - as the others
    """A load and save pair over a dict, copied by `copy.deepcopy`."""
    kept = {"key": document(size)}

    def load(key: str) -> dict[str, Any]:
        return copy.deepcopy(kept[key])

    yield Opened({"load_resource": load, "save_resource": kept.__setitem__}, lambda: copy.deepcopy(kept["key"]))


@contextmanager
def documents(directory: Path, size: int) -> Iterator[Opened]:
    """SQLAlchemy's, on PostgreSQL."""
    with sqlalchemy.fresh("postgresql", directory) as address, engine(address) as one:
        store = SQLAlchemyStore.documents(one, "documents", missing=lambda _: document(size))
        yield Opened({"open_resource": store}, both(document(size), encode))


@contextmanager
def hashes(directory: Path, size: int) -> Iterator[Opened]:  # noqa: ARG001 - as the others
    """Redis's."""
    with connected(redis_url()) as client:
        store: RedisStore[Any] = RedisStore(client, missing=lambda _: document(size))
        yield Opened({"open_resource": store}, both(document(size), encode_compact))
        client.flushdb()


@contextmanager
def mapped(directory: Path, size: int) -> Iterator[Opened]:  # noqa: ARG001 - as the others
    """SQLAlchemy's rows, on PostgreSQL."""
    with sqlalchemy.fresh("postgresql", directory) as address, engine(address) as one:
        store = SQLAlchemyStore.mapped(
            one, sqlalchemy.Purse, by="name", missing=lambda name: sqlalchemy.Purse(name=name, total=0)
        )
        yield Opened({"open_resource": store})


@contextmanager
def models(directory: Path, size: int) -> Iterator[Opened]:  # noqa: ARG001 - as the others
    """Django's rows, on PostgreSQL."""
    with (
        place("postgresql", directory, models=TABLES) as address,
        database(address, create=False, options=options_of(address)) as alias,
    ):
        store = DjangoStore(Purse, by="name", missing=lambda name: Purse(name=name), using=alias)
        yield Opened({"open_resource": store})
        close_idle(alias)


def both(resource: Any, encodes: Callable[[Any], str]) -> Callable[[], object]:
    """Encode it, and decode that."""
    return lambda: json.loads(encodes(resource))


class Case(NamedTuple):
    """A line."""

    store: str
    size: str
    opens: Callable[[Path, int], AbstractContextManager[Opened]]
    operation: Callable[[Any, bool], int]


CASES = [
    *(Case("documents", size, documents, of_document) for size in SIZES),
    *(Case("Redis", size, hashes, of_document) for size in SIZES),
    *(Case("pair", size, pair, of_document) for size in SIZES),
    Case("mapped", "columns", mapped, of_row),
    Case("Django", "columns", models, of_row),
]


# -- what is measured -----------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What one took."""

    seconds: float
    cpu: float
    answered: int


def turn(processor: Processor[Any], operation: Callable[[Any, bool], int], batches: int) -> Turn:
    """Have that many batches of all callers."""
    answered = 0

    def call(refused: bool) -> None:  # noqa: FBT001 - as above
        nonlocal answered
        for _ in range(batches):
            try:
                processor.run("key", operation, refused)
            except NotEnough:
                continue
            answered += 1

    gc.collect()
    begun, cpu = time.perf_counter(), time.process_time()
    gevent.joinall([gevent.spawn(call, bool(number % 2)) for number in range(CALLERS)], raise_error=True)
    return Turn(time.perf_counter() - begun, time.process_time() - cpu, answered)


ROW = "{:<10}  {:<8}  {:<27}{:<26}{:<28}{}"


def measure(case: Case, turns: int, batches: int) -> None:
    """Print the case's line."""
    # A window that no turn waits for: a batch is saved as soon as it is full.
    patient: dict[str, Any] = {"min_duration": 20, "max_duration": 60, "max_batch_size": CALLERS}
    found: list[tuple[Turn, Turn]] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        case.opens(Path(directory), SIZES.get(case.size, 0)) as opened,
        Processor(**opened.options, **patient, clean_errors=(NotEnough,)) as clean,
        Processor(**opened.options, **patient) as exact,
        Processor(**opened.options, min_duration=0, max_duration=60) as reading,
    ):
        for _ in range(turns + 1):
            promised = turn(clean, case.operation, batches)
            before = total_of(reading)
            undone = turn(exact, case.operation, batches)
            saved = total_of(reading) - before
            if saved != undone.answered:
                raise AssertionError(f"{case}: {undone.answered} were answered, but {saved} were saved")
            found.append((promised, undone))
        copied = taken(opened.copying) if opened.copying else None
    del found[0]  # which warmed up
    least, more = (min(one.cpu for one in some) for some in zip(*found, strict=True))
    seconds = (more - least) / (batches * CALLERS / 2)
    columns = [
        spread([promised.seconds / undone.seconds for promised, undone in found], ".2f"),
        f"{1e6 * seconds:,.2f}",
    ]
    columns += ["", ""] if copied is None else [f"{1e6 * copied:,.2f}", f"{seconds / copied:.2f}"]
    print(ROW.format(case.store, case.size, *columns).rstrip(), flush=True)


def total_of(processor: Processor[Any]) -> int:
    """The one that is saved."""
    return processor.run("key", total, read_only=True)


def total(resource: Any) -> int:
    """An operation that asks for it."""
    return int(resource["total"] if isinstance(resource, dict) else resource.total)


def taken(function: Callable[[], object]) -> float:
    """Seconds of CPU time that it takes, when nothing else is done."""
    timer = timeit.Timer(function, timer=time.process_time)
    number, _ = timer.autorange()
    return min(timer.repeat(3, number)) / number


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer and shorter turns")
    turns, batches = (5, 2) if parser.parse_args().short else (25, 2)
    print(as_served())
    heads = ["rate, × with clean_errors", "CPU µs for each refusal", "decode + encode, or a copy", "ratio"]
    print(ROW.format("store", "resource", *heads).rstrip())
    for case in CASES:
        measure(case, turns, batches)


if __name__ == "__main__":
    main()

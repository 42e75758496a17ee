"""What a batch through a store costs, beside what it replaces: 1, 2, 5, 20 and 100 operations, on 100 keys in turn.

Batches of `SQLAlchemyStore.documents` and `.mapped`, `SQLStore`, `DjangoStore` and `RedisStore`; beside the same
change alone: psycopg's `SELECT … FOR UPDATE` and an atomic `UPDATE`, a transaction of SQLAlchemy's ORM and one of
Django's that lock the row, one `EVALSHA` of redis-py that adds. One caller, and as many as the batch has operations,
who come to a key together. PostgreSQL, and Redis, are in processes of their own.

All take turns in one run; each figure is the median of the rounds (least to most), each ratio is of turns of the same
round. The sums in the databases are compared with the operations that were answered.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.batch_cost [--short] [--json FILE] [WAY …]``. It measures, and
asserts no time.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gevent import monkey

monkey.patch_all()

import gevent
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import sqlalchemy as sa
from psycogreen.gevent import gevent_wait_callback  # type: ignore[import-untyped] # likewise
from psycopg2.pool import ThreadedConnectionPool  # type: ignore[import-untyped] # likewise
from psycopg_pool import ConnectionPool
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from benchmarks.as_served import as_served
from benchmarks.ways import Atomic, ForUpdate, begin_at_zero, check, create_tables, server_settings, spread
from geventbatch import Processor
from geventbatch.stores import DjangoStore, RedisStore, SQLAlchemyStore, SQLStore
from geventbatch.stores.django._connections import close_idle
from tests.support.django_project.start import database
from tests.support.redis_server import connected, redis_url
from tests.support.servers import postgres_url

# Behind what sets Django up.
from django.db import models, transaction  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SIZES = (1, 2, 5, 20, 100)
KEYS: Final = tuple(f"key {number}" for number in range(100))

FOR_UPDATE_2 = "SELECT … FOR UPDATE, psycopg2"
FOR_UPDATE, UPDATE = "SELECT … FOR UPDATE, psycopg", "one atomic UPDATE, psycopg"
ORM, DJANGO, EVALSHA = "a transaction of SQLAlchemy's ORM", "a transaction of Django's", "one EVALSHA"


class _Base(DeclarativeBase):
    pass


class Counter(_Base):
    """A row, mapped by SQLAlchemy."""

    __tablename__ = "counters"
    key: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int]
    version: Mapped[int]


class CounterModel(models.Model):
    """The same row, as a model of Django's."""

    key: models.CharField[str, str] = models.CharField(max_length=20, primary_key=True)
    value: models.BigIntegerField[int, int] = models.BigIntegerField()
    version: models.BigIntegerField[int, int] = models.BigIntegerField()

    class Meta:
        """See Django."""

        app_label = "batch_cost"
        db_table = "counters"

    def __str__(self) -> str:
        return self.key


def add_to_document(document: dict[str, int]) -> int:
    """The operation, on a document."""
    document["value"] += 1
    return document["value"]


def add_to_row(row: Any) -> int:
    """The same, on an instance of a mapped class or a model."""
    row.value += 1
    return int(row.value)


class Alone(NamedTuple):
    """Each operation by itself: what batches are compared with."""

    name: str
    table: str
    add: Callable[[str], object]


class Batched(NamedTuple):
    """A store."""

    name: str
    table: str
    against: str
    """The name of what it replaces."""
    store: Any
    operation: Callable[[Any], int]


class Turn(NamedTuple):
    """What came of one, per operation."""

    microseconds: float
    """CPU time of this process."""
    rate: float
    """Operations a second."""


@dataclass
class Line:
    """What one of them cost."""

    name: str
    against: tuple[str, ...]
    size: int
    """Operations of a batch."""
    turns: list[Turn] = field(default_factory=list)


# -- the ways -----------------------------------------------------------------------------------------------


@contextmanager
def in_postgres(url: str) -> Iterator[tuple[list[Alone], list[Batched]]]:
    """Give those that have PostgreSQL below, and no ORM or SQLAlchemy's."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))

    def orm(key: str) -> None:
        with Session(engine) as session, session.begin():
            add_to_row(session.get(Counter, key, with_for_update=True))

    with ForUpdate(url, 1) as for_update, Atomic(url, 1) as atomic:
        yield (
            [
                Alone(FOR_UPDATE, "counters", for_update.add),
                Alone(UPDATE, "counters", atomic.add),
                Alone(ORM, "counters", orm),
            ],
            [
                Batched(
                    "documents",
                    "documents",
                    FOR_UPDATE,
                    SQLAlchemyStore.documents(engine, "documents"),
                    add_to_document,
                ),
                Batched("mapped", "counters", ORM, SQLAlchemyStore.mapped(engine, Counter), add_to_row),
            ],
        )
    engine.dispose()


@contextmanager
def without_orm(url: str) -> Iterator[tuple[list[Alone], list[Batched]]]:
    """Likewise, the store that takes the same statements; psycopg2 waits in gevent's way."""
    before: Any = psycopg2.extensions.get_wait_callback()
    psycopg2.extensions.set_wait_callback(gevent_wait_callback)
    pool, pool2 = ConnectionPool(url, min_size=1, max_size=1, open=True), ThreadedConnectionPool(1, 1, url)
    load = "SELECT value FROM counters WHERE key = %(key)s FOR UPDATE"
    save = "UPDATE counters SET value = %(value)s WHERE key = %(key)s"

    def alone(key: str) -> None:
        connection = pool2.getconn()
        cursor = connection.cursor()
        cursor.execute(load, {"key": key})
        cursor.execute(save, {"key": key, "value": cursor.fetchone()[0] + 1})
        connection.commit()
        pool2.putconn(connection)

    stores = [SQLStore(one, load=load, save=save, key=str) for one in (pool, pool2)]
    yield (
        [Alone(FOR_UPDATE_2, "counters", alone)],
        [
            Batched(f"SQL, {driver}", "counters", against, store, add_to_row)
            for driver, against, store in zip(("psycopg", "psycopg2"), (FOR_UPDATE, FOR_UPDATE_2), stores, strict=True)
        ],
    )
    pool.close()
    pool2.closeall()
    psycopg2.extensions.set_wait_callback(before)


@contextmanager
def in_django(url: str) -> Iterator[tuple[list[Alone], list[Batched]]]:
    """Likewise, Django's."""
    with database(url, create=False) as alias:

        def alone(key: str) -> None:
            with transaction.atomic(using=alias):
                row = CounterModel.objects.using(alias).select_for_update().get(key=key)
                add_to_row(row)
                row.save()

        store = DjangoStore(CounterModel, using=alias)
        yield [Alone(DJANGO, "counters", alone)], [Batched("Django", "counters", DJANGO, store, add_to_row)]
        close_idle(alias)


@contextmanager
def in_redis() -> Iterator[tuple[list[Alone], list[Batched]]]:
    """Likewise, those in Redis."""
    with connected(redis_url()) as client:
        client.flushdb()
        sha = client.script_load("return redis.call('HINCRBY', KEYS[1], 'value', 1)")
        store: RedisStore[Any] = RedisStore(client, missing=lambda _: {"value": 0})
        yield (
            [Alone(EVALSHA, "hashes", lambda key: client.evalsha(sha, 1, f"counter {key}"))],
            [Batched("Redis", "", EVALSHA, store, add_to_document)],
        )
        client.flushdb()


# -- turns --------------------------------------------------------------------------------------------------


def timed(call: Callable[[], object], operations: int) -> Turn:
    """Have it do so many."""
    begun, cpu = time.perf_counter(), time.process_time()
    call()
    cpu, took = time.process_time() - cpu, time.perf_counter() - begun
    return Turn(cpu / operations * 1e6, operations / took)


def each_key(add: Callable[[str], object], batches: int) -> None:
    """Add to one key after the other."""
    for number in range(batches):
        add(KEYS[number % len(KEYS)])


def together(add: Callable[[str], object], batches: int, callers: int) -> None:
    """The same, of so many who are at the same key."""
    if callers == 1:
        each_key(add, batches)
        return
    gevent.joinall([gevent.spawn(each_key, add, batches) for _ in range(callers)], raise_error=True)


def processor_of(store: Any, size: int) -> Processor[Any]:
    """Give one whose batches have *size* operations: with a window that no batch waits for, since it is full before."""
    if size == 1:
        return Processor(open_resource=store, min_duration=0, max_duration=60)
    return Processor(open_resource=store, min_duration=20, max_duration=60, max_batch_size=size)


def measure(
    alone: Sequence[Alone], batched: Sequence[Batched], rounds: int, batches: int, sizes: Sequence[int] = SIZES
) -> tuple[list[Line], dict[str, int]]:
    """Let them take turns; give also how many operations were answered, by table."""
    answered: dict[str, int] = {}
    lines = [Line(one.name, (), 1) for one in alone]
    # (what adds, and to where)
    ways: list[tuple[Callable[[str], object], str]] = [(one.add, one.table) for one in alone]
    with ExitStack() as stack:
        processors = []
        for one in batched:
            against = (one.against, UPDATE) if one.table else (one.against,)
            for size in sizes:
                processor = stack.enter_context(processor_of(one.store, size))
                processors.append((processor, size))
                lines.append(Line(one.name, against, size))
                ways.append((_adding(processor, one.operation), one.table))
        for number in range(rounds + 1):
            for line, (add, table) in zip(lines, ways, strict=True):
                operations = batches * line.size
                turn = timed(partial(together, add, batches, line.size), operations)
                answered[table] = answered.get(table, 0) + operations
                if number:  # the first round is to warm up
                    line.turns.append(turn)
        for processor, size in processors:
            told = processor.stats()
            if told.operations_total != told.batches_total * size:
                raise AssertionError(f"{told.batches_total} batches had {told.operations_total} operations")
    return lines, answered


def _adding(processor: Processor[Any], operation: Callable[[Any], int]) -> Callable[[str], object]:
    return lambda key: processor.run(key, operation)


def of_all(url: str, names: Sequence[str], rounds: int, batches: int, sizes: Sequence[int]) -> list[Line]:
    """Measure the stores of these names, or all, and compare the sums in PostgreSQL with what was answered."""
    create_tables(url)
    begin_at_zero(url, KEYS)
    with ExitStack() as stack:
        opened = [
            stack.enter_context(opens) for opens in (in_postgres(url), without_orm(url), in_django(url), in_redis())
        ]
        alone = [one for some, _ in opened for one in some]
        batched = [one for _, some in opened for one in some if not names or one.name in names]
        print(server_settings(url), as_served(), sep="\n")
        lines, answered = measure(alone, batched, rounds, batches, sizes)
    for table in ("counters", "documents"):
        check(url, table, answered.get(table, 0))
    return lines


# -- the table ----------------------------------------------------------------------------------------------

COLUMNS = "{:<36}{:>4}{:>24}{:>24}{:>28}  {:<24}{:<24}{:<24}{:<24}"


def show(lines: Sequence[Line]) -> None:
    """Print them: each beside what it replaces, and beside the atomic `UPDATE`."""
    heads = ("", "CPU µs of", "CPU µs of", "", "× what it replaces", "", "× UPDATE", "")
    print(COLUMNS.format("", *heads).rstrip())
    heads = ("of", "an operation", "a batch", "operations/s", "CPU", "rate", "CPU", "rate")
    print(COLUMNS.format("", *heads).rstrip())
    of_name = {line.name: line for line in lines if not line.against}
    for line in lines:
        cpu, rates = zip(*line.turns, strict=True)
        ratios = []
        for name in line.against:
            pairs = list(zip(line.turns, of_name[name].turns, strict=True))
            ratios.append(spread([mine.microseconds / its.microseconds for mine, its in pairs], ".2f"))
            ratios.append(spread([mine.rate / its.rate for mine, its in pairs], ".2f"))
        whole = spread([one * line.size for one in cpu], ",.0f") if line.against else ""
        cells = (line.size, spread(cpu, ",.0f"), whole, spread(rates, ",.0f"), *ratios, *[""] * (4 - len(ratios)))
        print(COLUMNS.format(line.name, *cells).rstrip(), flush=True)


def show_lone(lines: Sequence[Line]) -> None:
    """Print what a batch of one costs beside what it replaces."""
    of_name = {line.name: line for line in lines if not line.against}
    print("\na batch of one operation")
    print(f"{'':<24}{'what it replaces':<40}{'CPU, × that':>24}{'operations/s, × that':>26}")
    for line in lines:
        if line.against and line.size == 1:
            pairs = list(zip(line.turns, of_name[line.against[0]].turns, strict=True))
            cpu = spread([mine.microseconds / its.microseconds for mine, its in pairs], ".2f")
            rate = spread([mine.rate / its.rate for mine, its in pairs], ".2f")
            print(f"{line.name:<24}{line.against[0]:<40}{cpu:>24}{rate:>26}", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help='documents, mapped, "SQL, psycopg", "SQL, psycopg2", Django, Redis'
    )
    parser.add_argument("--short", action="store_true", help="fewer and shorter turns")
    parser.add_argument("--lone", action="store_true", help="only batches of one operation")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    chosen = parser.parse_args()
    rounds, batches = (1, 20) if chosen.short else (7, 200)
    lines = of_all(postgres_url(), chosen.ways, rounds, batches, (1,) if chosen.lone else SIZES)
    show(lines)
    show_lone(lines)
    if chosen.json:
        chosen.json.write_text(json.dumps([vars(line) for line in lines], indent=1))


if __name__ == "__main__":
    main()

"""SQLStore's rows that cannot be read: among many keys, the load of such a key has failed, and the others go on."""

from __future__ import annotations

from contextlib import contextmanager
from math import ceil, log2
from typing import TYPE_CHECKING, Any

import gevent
import psycopg
import pytest

from geventbatch import LoadFailed, Processor, ResourceMissing
from geventbatch.stores import SQLStore
from tests.support.callers import answer_of
from tests.support.sql_pools import database_with, pool_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TABLES = """
    CREATE TABLE raw (id int PRIMARY KEY, stock int NOT NULL, day date NOT NULL, amount text NOT NULL);
    INSERT INTO raw SELECT number, 10, '2026-01-01', '7' FROM generate_series(1, 500) AS number;
    CREATE VIEW shows AS SELECT id, stock, day, amount::int AS amount FROM raw
"""

BAD = {"day": "10000-01-01", "amount": "seven"}
"""By column: what the driver cannot read, and what the server cannot compute."""


@pytest.fixture
def database() -> Iterator[str]:
    """What libpq is told."""
    with database_with(TABLES) as told:
        yield told


@pytest.fixture(params=["psycopg", "psycopg2"])
def pool(request: pytest.FixtureRequest, database: str) -> Iterator[Any]:
    with pool_of(request.param, database) as pool:
        yield pool


def spoil(database: str, column: str, keys: Iterable[int]) -> None:
    with psycopg.connect(database) as connection:
        change = f"UPDATE raw SET {column} = %s WHERE id = ANY(%s)"  # noqa: S608 - a test's own words
        connection.execute(change.encode(), (BAD[column], [*keys]))


@contextmanager
def processor(pool: Any, column: str, window: float = 0, *, bulk: bool = True, **options: Any) -> Iterator[Any]:
    select = f"SELECT id, stock, {column} FROM shows WHERE"  # noqa: S608 - likewise
    statements = {
        "load": f"{select} id = %(key)s FOR UPDATE",
        "save": "UPDATE raw SET stock = %(stock)s WHERE id = %(key)s",
        "load_many": f"{select} id = ANY(%(keys)s) ORDER BY id FOR UPDATE",
    }
    store: Any = SQLStore(pool, **{**statements, **options})
    opens: dict[str, Any] = {"open_resources": store.open_resources} if bulk else {"open_resource": store}
    limits: dict[str, Any] = {"max_duration": 20, "workers": 1, "max_batches": 1, "max_bulk": 500}
    with Processor(**opens, min_duration=window, **limits) as made:
        yield made


def together(*calls: tuple[Any, ...]) -> list[Any]:
    callers = [gevent.spawn(answer_of, *call) for call in calls]
    gevent.joinall(callers)
    return [caller.value for caller in callers]


def sell(show: Any) -> int:
    show.stock -= 1
    return int(show.stock)


def sell_each(shows: Any) -> list[int]:
    return [sell(show) for show in shows]


def is_failed(answer: Any, key: int) -> bool:
    return type(answer) is LoadFailed and answer.retry_safe and answer.key == key


@pytest.mark.parametrize("window", [0, 0.05])
@pytest.mark.parametrize("column", BAD)
def test_of_a_bulk_only_the_keys_fail_whose_rows_cannot_be_read(
    pool: Any, database: str, column: str, window: float
) -> None:
    spoil(database, column, [1, 5])
    with processor(pool, column, window) as shows:
        for left in (9, 8):
            answers = dict(zip(range(1, 8), together(*((shows.run, key, sell) for key in range(1, 8))), strict=True))
            assert is_failed(answers.pop(1), 1)
            assert is_failed(answers.pop(5), 5)
            assert answers == dict.fromkeys([2, 3, 4, 6, 7], left)


@pytest.mark.parametrize("window", [0, 0.05])
@pytest.mark.parametrize("column", BAD)
def test_across_keys_only_the_operations_fail_that_need_a_row_that_cannot_be_read(
    pool: Any, database: str, column: str, window: float
) -> None:
    spoil(database, column, [1])
    with processor(pool, column, window, bulk=False) as shows:
        failed, one, several, alone = together(
            (shows.run_across, (1, 2), sell_each),
            (shows.run, 2, sell),
            (shows.run_across, (2, 3), sell_each),
            (shows.run, 1, sell),
        )
    assert is_failed(failed, 1)
    assert failed.keys == (1, 2)
    assert one == 9
    assert several == [8, 9]
    assert is_failed(alone, 1)


def test_neighbours_that_cannot_be_read_fail_and_the_others_go_on(pool: Any, database: str) -> None:
    spoil(database, "amount", range(1, 11))
    with processor(pool, "amount", 0.05) as shows:
        answers = together(*((shows.run, key, sell) for key in range(1, 101)))
    assert all(is_failed(answer, key) for key, answer in enumerate(answers[:10], 1))
    assert answers[10:] == [9] * 90


def test_among_many_keys_that_no_row_can_have_the_others_go_on(pool: Any) -> None:
    impossible = [f"show {number}" for number in range(10)]
    among = "SELECT id, stock FROM shows WHERE id = ANY(%(keys)s::int[]) ORDER BY id FOR UPDATE"
    with processor(pool, "day", 0.05, key=str, load_many=among) as shows:
        answers = together(*((shows.run, key, sell) for key in [*impossible, "1", "2"]))
    assert answers[10:] == [9, 9]
    for key, answer in zip(impossible, answers, strict=False):
        assert isinstance(answer, ResourceMissing)
        assert answer.key == key


# -- the number of loads -------------------------------------------------------------------------------------------


@pytest.fixture
def connections() -> list[Any]:
    """Those that the store has taken, one for each load."""
    return []


@pytest.fixture
def connect(database: str, connections: list[Any]) -> Any:
    def connect() -> Any:
        connections.append(psycopg.connect(database))
        return connections[-1]

    return connect


@pytest.mark.parametrize("count", [2, 4, 5, 100, 500])
@pytest.mark.parametrize("constant", ["1 / 0 AS nothing", "now() + 'never'::interval AS later"])
def test_a_load_that_fails_for_any_key_is_given_up_after_a_few(
    connect: Any, connections: list[Any], count: int, constant: str
) -> None:
    with processor(connect, constant, bulk=False) as shows:
        error = answer_of(shows.run_across, range(1, count + 1), sell_each)
    assert is_failed(error, 1)
    assert len(connections) <= min(2 * count, ceil(log2(count)) + 8)


@pytest.mark.parametrize("count", [5, 100, 500])
def test_a_row_that_cannot_be_read_is_found_by_halving(
    connect: Any, connections: list[Any], database: str, count: int
) -> None:
    spoil(database, "day", [count])
    with processor(connect, "day", bulk=False) as shows:
        error = answer_of(shows.run_across, range(1, count + 1), sell_each)
    assert is_failed(error, count)
    assert len(connections) <= 2 * ceil(log2(count)) + 2


def test_a_load_whose_halves_do_not_fail_has_failed_for_all_and_is_not_tried_again(
    connect: Any, connections: list[Any]
) -> None:
    where = "id = ANY(%(keys)s) AND 1 / (7 - cardinality(%(keys)s::int[])) IS NOT NULL"
    among = f"SELECT id, stock FROM shows WHERE {where} ORDER BY id FOR UPDATE"  # noqa: S608 - a test's own words
    with processor(connect, "day", bulk=False, load_many=among) as shows:
        error = answer_of(shows.run_across, range(1, 8), sell_each)
    assert is_failed(error, 1)
    assert isinstance(error.__cause__, psycopg.errors.DivisionByZero)
    assert len(connections) == 3


def test_a_load_without_its_column_is_tried_once(connect: Any, connections: list[Any]) -> None:
    with processor(connect, "colour", bulk=False) as shows:
        error = answer_of(shows.run_across, range(1, 101), sell_each)
    assert is_failed(error, 1)
    assert len(connections) == 1


def test_a_load_that_has_waited_for_too_long_is_tried_once(database: str, connect: Any, connections: list[Any]) -> None:
    def connect_impatient() -> Any:
        connection = connect()
        connection.execute("SET lock_timeout = 1")
        connection.commit()
        return connection

    with psycopg.connect(database) as other:
        other.execute("SELECT FROM raw WHERE id = 50 FOR UPDATE")
        with processor(connect_impatient, "day", bulk=False) as shows:
            error = answer_of(shows.run_across, range(1, 101), sell_each)
    assert is_failed(error, 1)
    assert isinstance(error.__cause__, psycopg.errors.LockNotAvailable)
    assert len(connections) == 1

"""SQLStore's constraints that the database checks at COMMIT: a save of many keys finds the culprit there too."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gevent
import psycopg
import psycopg2.errors  # type: ignore[import-untyped] # it has no types
import pytest

from geventbatch import Processor
from geventbatch.stores import SQLStore
from tests.support.callers import answer_of
from tests.support.sql_pools import database_with, pool_of

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLES = """
    CREATE TABLE shows (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, stock int NOT NULL,
        title text NOT NULL UNIQUE DEFERRABLE INITIALLY DEFERRED);
    CREATE TABLE outcomes (id varchar(300) COLLATE "C" PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, outcome text NOT NULL,
        expires bigint NOT NULL);
    INSERT INTO shows VALUES (1, 10, 'Faust'), (2, 10, 'Aida'), (3, 10, 'Tosca')
"""

VIOLATIONS = psycopg.errors.UniqueViolation, psycopg2.errors.UniqueViolation


@pytest.fixture
def database() -> Iterator[str]:
    """What libpq is told."""
    with database_with(TABLES) as told:
        yield told


@pytest.fixture(params=["psycopg", "psycopg2"])
def pool(request: pytest.FixtureRequest, database: str) -> Iterator[Any]:
    with pool_of(request.param, database) as pool:
        yield pool


@contextmanager
def processor(pool: Any, window: float = 0.05, *, bulk: bool = True) -> Iterator[Processor[Any]]:
    store: Any = SQLStore(
        pool,
        load="SELECT id, title, stock FROM shows WHERE id = %(key)s FOR UPDATE",
        save="UPDATE shows SET title = %(title)s, stock = %(stock)s WHERE id = %(key)s",
        load_many="SELECT id, title, stock FROM shows WHERE id = ANY(%(keys)s) ORDER BY id FOR UPDATE",
        missing=lambda key: SimpleNamespace(id=key, title=f"show {key}", stock=10),
        insert="INSERT INTO shows (id, title, stock) VALUES (%(key)s, %(title)s, %(stock)s)",
        idempotency="outcomes",
    )
    opens = {"open_resources": store.open_resources} if bulk else {"open_resource": store}
    with Processor(**opens, min_duration=window, max_duration=10, workers=1, max_batches=1) as made:
        yield made


def together(*calls: tuple[Any, ...], idempotency_key: str | None = None) -> list[Any]:
    """The answers of *calls*, the first of which has the *idempotency_key*."""
    names = [idempotency_key, *[None] * (len(calls) - 1)]
    callers = [gevent.spawn(answer_of, *call, idempotency_key=name) for call, name in zip(calls, names, strict=True)]
    gevent.joinall(callers)
    return [caller.value for caller in callers]


def asked(database: str, query: str) -> Any:
    with psycopg.connect(database) as connection:
        return connection.execute(query.encode()).fetchall()


def sell(show: Any) -> int:
    show.stock -= 1
    return int(show.stock)


def rename(show: Any, title: str) -> str:
    show.title = title
    return title


def rename_and_sell(shows: Any, title: str) -> int:
    rename(shows[0], title)
    return sell(shows[1])


@pytest.mark.parametrize("window", [0, 0.05])
@pytest.mark.parametrize("idempotency_key", ["once", None])
def test_of_a_bulk_only_the_operation_fails_that_a_constraint_refuses_at_commit(
    pool: Any, database: str, window: float, idempotency_key: str | None
) -> None:
    with processor(pool, window) as shows:
        run = shows.run
        refused, *others = together(
            (run, 2, rename, "Faust"), (run, 1, sell), (run, 3, sell), (run, 7, sell), idempotency_key=idempotency_key
        )
        assert isinstance(refused, VIOLATIONS)
        assert others == [9, 9, 9]
        assert run(2, rename, "Carmen", idempotency_key=idempotency_key) == "Carmen"
    found = asked(database, "SELECT id, title, stock FROM shows ORDER BY id")
    assert found == [(1, "Faust", 9), (2, "Carmen", 10), (3, "Tosca", 9), (7, "show 7", 9)]


@pytest.mark.parametrize("window", [0, 0.05])
def test_across_keys_only_the_operation_fails_that_a_constraint_refuses_at_commit(
    pool: Any, database: str, window: float
) -> None:
    with processor(pool, window, bulk=False) as shows:
        refused, *others = together(
            (shows.run_across, (2, 3), rename_and_sell, "Faust"),
            (shows.run, 3, sell),
            (shows.run_across, (3, 1), rename_and_sell, "Otello"),
            idempotency_key="once",
        )
    assert isinstance(refused, VIOLATIONS)
    assert others == [9, 9]
    found = asked(database, "SELECT id, title, stock FROM shows ORDER BY id")
    assert found == [(1, "Faust", 9), (2, "Aida", 10), (3, "Otello", 9)]


@pytest.mark.parametrize("window", [0, 0.05])
def test_an_outcome_that_is_found_at_commit_answers_its_operation_and_the_others_are_saved(
    pool: Any, database: str, window: float
) -> None:
    with processor(pool, window) as shows:
        assert shows.run(1, sell, idempotency_key="once") == 9
    with processor(pool, window) as shows:
        assert together((shows.run, 1, sell), (shows.run, 2, sell), idempotency_key="once") == [9, 9]
        assert asked(database, "SELECT stock FROM shows ORDER BY id") == [(9,), (9,), (10,)]
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE outcomes SET expires = 0")
        assert together((shows.run, 1, sell), (shows.run, 2, sell), idempotency_key="once") == [8, 8]
    assert asked(database, "SELECT stock FROM shows ORDER BY id") == [(8,), (8,), (10,)]


def test_a_new_row_that_another_process_was_faster_to_insert_is_found_at_commit(pool: Any, database: str) -> None:
    tries = []

    def sell_late(show: Any) -> int:
        tries.append(show.title)
        if len(tries) == 1:
            with psycopg.connect(database) as connection:
                connection.execute("INSERT INTO shows VALUES (7, 5, 'Salome')")
        return sell(show)

    with processor(pool) as shows:
        assert together((shows.run, 7, sell_late), (shows.run, 1, sell)) == [4, 9]
    assert tries == ["show 7", "Salome"]
    assert asked(database, "SELECT stock FROM shows WHERE id IN (1, 7) ORDER BY id") == [(9,), (4,)]

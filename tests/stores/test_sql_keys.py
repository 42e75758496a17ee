"""SQLStore's keys: one that no row can have is missing, and a load that fails for another reason has failed."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pymysql
import pytest

from geventbatch import LoadFailed, Processor, ResourceMissing, SaveFailed
from geventbatch.stores import SQLStore
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.servers import wait_until
from tests.support.sql_pools import database_with, pool_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FAUST = UUID("52bd6ea1-0750-40fa-9964-cc1c89274938")

TABLES = """
    CREATE TYPE size AS ENUM ('S', 'M');
    CREATE TABLE shows (id uuid PRIMARY KEY, size size NOT NULL, number int NOT NULL, title text NOT NULL,
        stock int NOT NULL, day date NOT NULL);
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'the disk is full' USING ERRCODE = '53100'; END $$;
    CREATE TRIGGER refuse BEFORE UPDATE ON shows FOR EACH ROW WHEN (NEW.title = 'the disk is full')
        EXECUTE FUNCTION refuse();
    INSERT INTO shows VALUES ('52bd6ea1-0750-40fa-9964-cc1c89274938', 'S', 1, 'Faust', 10, '9999-01-01'),
        ('f0b3a1d2-3c5e-4f6a-8b7c-9d0e1f2a3b4c', 'M', 2, 'Aida', 10, '9999-01-01')
"""

LOAD = "SELECT {} FROM shows WHERE {} FOR UPDATE"


@pytest.fixture(params=["psycopg", "psycopg2"])
def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    with database_with(TABLES) as told, pool_of(request.param, told) as pool:
        yield pool


@contextmanager
def processor(pool: Any, column: str = "number", select: str = "number, title", **options: Any) -> Iterator[Any]:
    """One whose rows are found by a *column*."""
    where = options.pop("where", f"{column} = %(key)s")
    among = options.pop("among", f"{column} = ANY(%(keys)s)")
    store: Any = SQLStore(
        pool,
        load=LOAD.format(select, where),
        save=f"UPDATE shows SET title = %(title)s WHERE {column} = %(key)s",  # noqa: S608 - a test's own words
        load_many=LOAD.format(select, f"{among} ORDER BY {column}"),
        **options,
    )
    with Processor(open_resource=store, min_duration=0, max_duration=10) as made:
        yield made


def titles(rows: Any) -> list[str]:
    return [row.title for row in rows]


# -- the key is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "key"),
    [
        ("id", "none"),  # no uuid
        ("size", "XXL"),  # no value of the enum
        ("number", "Faust"),  # no number
        ("number", "9" * 12),  # no int
        ("number", "it's"),  # is quoted
        ("number", "żółw 7"),  # characters and bytes are counted apart
        ("title", "a\0b"),  # no text
    ],
)
def test_a_key_that_the_database_or_the_driver_refuses_is_missing(pool: Any, column: str, key: str) -> None:
    with processor(pool, column, f"{column}, 'ä' AS a, title", key=str) as shows:
        error = answer_of(shows.run, key, titles)
    assert isinstance(error, ResourceMissing)
    assert f"no row can have the key {key!r}" in str(error.__cause__)


def test_of_many_keys_the_one_that_the_database_refuses_is_missing(pool: Any) -> None:
    with processor(pool, "id", "id, title", key=str, among="id = ANY(%(keys)s::uuid[])") as shows:
        assert shows.run_across([str(FAUST)], titles) == ["Faust"]
        error = answer_of(shows.run_across, [str(FAUST), "none"], titles)
    assert isinstance(error, ResourceMissing)
    assert error.key == "none"
    assert str(error.__cause__).startswith("no row can have the key 'none'")


# -- the load fails, whatever the key is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("select", "where"),
    [
        ("number, title, title::int AS n", "number = %(key)s"),
        ("number, title, number / (stock - 10) AS n", "number = %(key)s"),
        ("number, title", "number = %(key)s AND day < 'never'"),
        ("number, title, 'never'::date AS day", "number = %(key)s"),
        ("number, title, day + 300000 AS day", "number = %(key)s"),  # a day that datetime does not have
    ],
)
@pytest.mark.parametrize("across", [False, True])
def test_a_load_that_fails_for_another_reason_than_its_key_has_failed_and_is_logged(
    pool: Any, caplog: pytest.LogCaptureFixture, select: str, where: str, *, across: bool
) -> None:
    among = where.replace("= %(key)s", "= ANY(%(keys)s)")
    with processor(pool, select=select, where=where, among=among) as shows:
        error = answer_of(shows.run_across, [1, 2], titles) if across else answer_of(shows.run, 1, titles)
    assert isinstance(error, LoadFailed)
    assert not isinstance(error, ResourceMissing)
    wait_until(lambda: errors_in(caplog))


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# -- types of keys -------------------------------------------------------------------------------------------------


def test_a_key_may_be_a_uuid(pool: Any) -> None:
    def name(show: Any) -> str:
        show.title += "!"
        return str(show.title)

    with processor(pool, "id", "id, title", key=UUID) as shows:
        assert shows.run(FAUST, name) == "Faust!"
        assert shows.run(str(FAUST).upper(), name) == "Faust!!"
        assert shows.run_across([FAUST], titles) == ["Faust!!"]
        assert isinstance(answer_of(shows.run, uuid4(), name), ResourceMissing)


@pytest.mark.mariadb
def test_mariadb_s_error_of_a_value_that_the_load_computes_is_no_missing_row(tmp_path: Path) -> None:
    with fresh("mariadb", tmp_path) as address:
        place: Any = PLACES["mariadb"](address)

        def connect() -> Any:
            user = {"user": place.url.username or "root", "password": place.url.password or ""}
            where = place.endpoint()
            at = {"unix_socket": where} if isinstance(where, str) else dict(zip(("host", "port"), where, strict=True))
            return pymysql.connect(database=place.database, charset="utf8mb4", **user, **at)

        connection = connect()
        connection.cursor().execute("CREATE TABLE shows (number int PRIMARY KEY, title varchar(50), stock bigint)")
        connection.cursor().execute("INSERT INTO shows VALUES (1, 'Faust', %s)", (2**62,))
        connection.commit()
        connection.close()
        with processor(connect, select="number, title, stock * 8 AS n") as shows:
            error = answer_of(shows.run, 1, titles)
    assert isinstance(error, LoadFailed)
    assert not isinstance(error, ResourceMissing)
    assert error.__cause__ is not None
    assert error.__cause__.args[0] == 1690


# -- messages ------------------------------------------------------------------------------------------------------


def test_a_missing_key_is_told_alike_by_itself_and_among_several(pool: Any) -> None:
    with processor(pool) as shows:
        alone, across = answer_of(shows.run, 9, titles), answer_of(shows.run_across, [1, 9], titles)
    assert str(alone.__cause__) == str(across.__cause__) == "there is no 9 in shows"
    assert across.key == 9


def test_several_rows_that_cannot_be_saved_are_named(pool: Any) -> None:
    def rename(rows: Any) -> None:
        for row in rows:
            row.title = "the disk is full"

    with processor(pool) as shows:
        error = answer_of(shows.run_across, [1, 2], rename)
    assert isinstance(error, SaveFailed)
    assert str(error.__cause__).startswith("2 rows of shows (keys 1, 2) was not saved, nothing was written: ")

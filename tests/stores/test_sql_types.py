"""SQLStore keeps every common type of a column: what operations leave alone is saved as it was."""

# ruff: noqa: S608 - the statements are made of the names above

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import psycopg
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import psycopg2.extras  # type: ignore[import-untyped] # likewise
import pymysql
import pytest
from psycopg.rows import dict_row, namedtuple_row

from geventbatch import Processor
from geventbatch.stores import SQLStore
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.sql_pools import database_with, psycopg2_waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

OLD, NEW = "Faust", "Aida"

POSTGRESQL = {
    "title": ("text", f"'{OLD}'"),
    "small": ("smallint", "7"),
    "big": ("bigint", "9007199254740993"),
    "price": ("numeric(10, 4)", "9.5"),
    "ratio": ("double precision", "0.1"),
    "code": ("char(4)", "'ab'"),
    "flag": ("bool", "true"),
    "day": ("date", "'2026-12-01'"),
    "clock": ("time", "'10:00:00.5'"),
    "clock_there": ("timetz", "'10:00+05:30'"),
    "moment": ("timestamptz", "'2026-12-01 10:00:00.000001+05:30'"),
    "moment_here": ("timestamp", "'2026-12-01 10:00'"),
    "span": ("interval", "'1 day 02:03:04'"),
    "number": ("uuid", "'52bd6ea1-0750-40fa-9964-cc1c89274938'"),
    "plain": ("json", """'{"a": [1, null]}'"""),
    "extra": ("jsonb", """'{"a": [1, null]}'"""),
    "logo": ("bytea", r"'\x00ff5c27'"),
    "no_logo": ("bytea", "NULL"),
    "logos": ("bytea[]", r"ARRAY['\x00ff'::bytea, NULL, '\x5c']"),
    "seats": ("int[]", "'{1,NULL,3}'"),
    "no_seats": ("int[]", "'{}'"),
    "words": ("text[]", """'{"a, b",NULL,"c\\"d"}'"""),
    "prices": ("numeric[]", "'{1.50,2}'"),
    "nothing": ("text", "NULL"),
    "size": ("size", "'S'"),
    "address": ("inet", "'10.0.0.1'"),
    "net": ("cidr", "'10.0.0.0/8'"),
    "among": ("int4range", "'[1,4)'"),
}
"""The columns on PostgreSQL: the type of each, and a value."""

MARIADB = {
    "title": ("varchar(50)", f"'{OLD}'"),
    "big": ("bigint", "9007199254740993"),
    "price": ("decimal(10, 4)", "9.5"),
    "ratio": ("double", "0.1"),
    "code": ("char(36)", "'52bd6ea1-0750-40fa-9964-cc1c89274938'"),
    "flag": ("bool", "true"),
    "day": ("date", "'2026-12-01'"),
    "clock": ("time(6)", "'-30:00:00.5'"),
    "moment": ("timestamp(6) NULL", "'2026-12-01 10:00:00.000001'"),
    "moment_here": ("datetime", "'2026-12-01 10:00'"),
    "founded": ("year", "1994"),
    "extra": ("json", """'{"a": [1, null]}'"""),
    "logo": ("blob", "x'00ff5c27'"),
    "mark": ("binary(4)", "x'00ff5c27'"),
    "bits": ("bit(3)", "b'101'"),
    "nothing": ("text", "NULL"),
    "size": ("enum('S', 'M')", "'S'"),
    "colours": ("set('red', 'blue')", "'red,blue'"),
}
"""The same on MariaDB."""


def table(columns: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """The statements that create it with one row."""
    types = ", ".join(f"{name} {kind}" for name, (kind, _) in columns.items())
    values = ", ".join(value for _, value in columns.values())
    return f"CREATE TABLE things (id int PRIMARY KEY, {types})", f"INSERT INTO things VALUES (1, {values})"


def statements(columns: Mapping[str, tuple[str, str]], among: str) -> dict[str, Any]:
    """Those of a store, which write all columns."""
    names, pairs = ", ".join(columns), ", ".join(f"{name} = %({name})s" for name in columns)
    return {
        "load": f"SELECT id, {names} FROM things WHERE id = %(key)s FOR UPDATE",
        "load_many": f"SELECT id, {names} FROM things WHERE id {among} ORDER BY id FOR UPDATE",
        "save": f"UPDATE things SET {pairs} WHERE id = %(key)s",
    }


def rename(thing: Any) -> Any:
    if isinstance(thing, dict):
        thing["title"] = NEW
        return thing["logo"]
    thing.title = NEW
    return thing.logo


def rename_and_fail(thing: Any) -> None:
    rename(thing)
    raise LookupError


def changed(store: Any, form: str) -> list[Any]:
    opens = {"open_resources": store.open_resources} if form == "many" else {"open_resource": store}
    with Processor(**opens, min_duration=0.01, max_duration=10) as things:
        operations = (rename_and_fail, rename)
        return [one.get() for one in [gevent.spawn(answer_of, things.run, 1, operation) for operation in operations]]


# -- PostgreSQL ----------------------------------------------------------------------------------------------------


@pytest.fixture
def database() -> Iterator[str]:
    """What libpq is told."""
    with database_with("CREATE TYPE size AS ENUM ('S', 'M')") as told:
        with psycopg.connect(told) as connection:
            for statement in table(POSTGRESQL):
                connection.execute(statement.encode())
        yield told


@contextmanager
def dicts_as_json() -> Iterator[None]:
    """Have psycopg2 make JSON of a dict."""
    key = dict, psycopg2.extensions.ISQLQuote
    psycopg2.extensions.register_adapter(dict, psycopg2.extras.Json)
    try:
        yield
    finally:
        del psycopg2.extensions.adapters[key]


def by_psycopg(told: str, **options: Any) -> psycopg.Connection[Any]:
    connection: Any = psycopg.connect(told, **options)
    connection.adapters.register_dumper(dict, psycopg.types.json.JsonbDumper)
    return connection  # type: ignore[no-any-return] # its rows have any form


CONNECTS: dict[str, Callable[[str], Any]] = {
    "psycopg": by_psycopg,
    "psycopg with dicts": partial(by_psycopg, row_factory=dict_row),
    "psycopg with named tuples": partial(by_psycopg, row_factory=namedtuple_row),
    "psycopg2": psycopg2.connect,
    "psycopg2 with dicts": partial(psycopg2.connect, cursor_factory=psycopg2.extras.RealDictCursor),
    "psycopg2 with named tuples": partial(psycopg2.connect, cursor_factory=psycopg2.extras.NamedTupleCursor),
}


@pytest.mark.parametrize("form", ["one key", "many"])
@pytest.mark.parametrize("row", [None, dict])
@pytest.mark.parametrize("driver", CONNECTS)
def test_columns_that_no_operation_changes_stay_as_they_were(database: str, driver: str, row: Any, form: str) -> None:
    def texts() -> Any:
        with psycopg.connect(database, row_factory=dict_row) as connection:
            names = ", ".join(f"{name}::text" for name in POSTGRESQL)
            return connection.execute(f"SELECT {names} FROM things".encode()).fetchone()

    before = texts()
    assert before["title"] == OLD
    of_psycopg2 = driver.startswith("psycopg2")
    with psycopg2_waits(), dicts_as_json() if of_psycopg2 else nullcontext():
        store: Any = SQLStore(partial(CONNECTS[driver], database), row=row, **statements(POSTGRESQL, "= ANY(%(keys)s)"))
        failed, logo = changed(store, form)
    assert isinstance(failed, LookupError)
    assert logo == b"\x00\xff\\'"
    assert texts() == {**before, "title": NEW}


def test_what_the_user_has_psycopg2_make_of_bytea_is_left_alone(database: str) -> None:
    def connect() -> Any:
        connection = psycopg2.connect(database)
        as_text = psycopg2.extensions.new_type((17,), "TEXT", lambda value, _: value)
        psycopg2.extensions.register_type(as_text, connection)
        return connection

    store: Any = SQLStore(
        connect,
        load="SELECT logo FROM things WHERE id = %s FOR UPDATE",
        save="UPDATE things SET logo = %(logo)s WHERE id = %(key)s",
    )
    with psycopg2_waits(), Processor(open_resource=store, min_duration=0, max_duration=10) as things:
        assert things.run(1, lambda thing: thing.logo) == r"\x00ff5c27"


# -- MariaDB -------------------------------------------------------------------------------------------------------


@pytest.mark.mariadb
@pytest.mark.parametrize("form", ["one key", "many"])
@pytest.mark.parametrize("row", [None, dict])
def test_columns_that_no_operation_changes_stay_as_they_were_on_mariadb(tmp_path: Path, row: Any, form: str) -> None:
    def sent(statement: str) -> Any:
        connection = connect()
        try:
            with connection.cursor() as cursor:
                cursor.execute(statement)
                connection.commit()
                return cursor.fetchall()
        finally:
            connection.close()

    with fresh("mariadb", tmp_path) as address:
        place: Any = PLACES["mariadb"](address)
        where = place.endpoint()
        at: Any = {"unix_socket": where} if isinstance(where, str) else dict(zip(("host", "port"), where, strict=True))
        user = {"user": place.url.username or "root", "password": place.url.password or ""}
        connect = partial(pymysql.connect, database=place.database, charset="utf8mb4", **user, **at)
        for statement in table(MARIADB):
            sent(statement)
        others = ", ".join(f"HEX(CONCAT({name}, ''))" for name in MARIADB if name != "title")
        before = sent(f"SELECT {others} FROM things")
        failed, logo = changed(SQLStore(connect, row=row, **statements(MARIADB, "IN %(keys)s")), form)
        assert isinstance(failed, LookupError)
        assert logo == b"\x00\xff\\'"
        assert sent(f"SELECT {others} FROM things") == before
        assert sent("SELECT title FROM things") == ((NEW,),)

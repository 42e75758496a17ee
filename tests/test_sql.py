"""What the errors of SQL drivers mean for a batch, and how its statements are bounded (geventbatch/stores/_sql.py)."""

from __future__ import annotations

import sqlite3

import psycopg
import pymysql
import pytest
import sqlalchemy as sa

from geventbatch import Conflict, NotSaved, Rejected
from geventbatch.stores import _sql
from geventbatch.stores._sql import Kind


def postgres(state: str | None, parent: type[psycopg.Error] = psycopg.OperationalError) -> psycopg.Error:
    error = parent(f"{parent.__name__} with {state}")
    error.sqlstate = state
    return error


def mysql(code: int, parent: type[pymysql.Error] = pymysql.OperationalError) -> pymysql.Error:
    return parent(code, "it failed")


def sqlite(statement: str) -> sqlite3.Error:
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE TABLE t (x INTEGER NOT NULL)")
        connection.execute(statement)
    except sqlite3.Error as error:
        return error
    finally:
        connection.close()
    raise AssertionError(statement)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (postgres("40001"), Kind.CONFLICT),
        (postgres("40P01"), Kind.CONFLICT),
        (postgres("23505"), Kind.REJECTED),
        (postgres("22001"), Kind.REJECTED),
        (postgres("57014"), Kind.TIMEOUT),
        (postgres("55P03"), Kind.TIMEOUT),
        (postgres("25P02"), Kind.POISONED),
        (postgres("57P01"), Kind.LOST),
        (postgres("08006"), Kind.LOST),
        (postgres(None), Kind.LOST),
        (postgres(None, psycopg.InterfaceError), Kind.LOST),
        (postgres(None, psycopg.DataError), Kind.REJECTED),
        (postgres("42P01", psycopg.ProgrammingError), Kind.OTHER),
        (mysql(1213), Kind.CONFLICT),
        (mysql(1020), Kind.CONFLICT),
        (mysql(1205), Kind.TIMEOUT),
        (mysql(1969), Kind.TIMEOUT),
        (mysql(1062, pymysql.IntegrityError), Kind.REJECTED),
        (mysql(4025), Kind.REJECTED),
        (mysql(9999, pymysql.DataError), Kind.REJECTED),
        (mysql(2013), Kind.LOST),
        (mysql(0, pymysql.InterfaceError), Kind.LOST),
        (mysql(1146, pymysql.ProgrammingError), Kind.OTHER),
        (sqlite("INSERT INTO t VALUES (NULL)"), Kind.REJECTED),
        (sqlite("SELECT * FROM nowhere"), Kind.OTHER),
        (LookupError("no error of a driver"), Kind.OTHER),
    ],
    ids=str,
)
def test_an_error_means_the_same_bare_and_in_the_wrapper_of_an_orm(error: Exception, kind: Kind) -> None:
    assert _sql.kind(error) is kind
    wrapped = sa.exc.DBAPIError.instance("SELECT 1", {}, error, type(error))
    assert _sql.kind(wrapped) is kind
    other = RuntimeError("as Django does it")
    other.__cause__ = error
    assert _sql.kind(other) is kind


def test_a_busy_sqlite_is_a_conflict(tmp_path: object) -> None:
    one, other = (sqlite3.connect(f"{tmp_path}/busy.sqlite", timeout=0) for _ in range(2))
    one.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError) as raised:
        other.execute("BEGIN IMMEDIATE")
    assert _sql.kind(raised.value) is Kind.CONFLICT
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (postgres("40001"), Conflict),
        (postgres("23505"), Rejected),
        (postgres("25P02"), Rejected),
        (postgres("57014"), NotSaved),
        (postgres(None), NotSaved),
        (LookupError("no error of a driver"), NotSaved),
    ],
    ids=str,
)
def test_whatever_comes_before_commit_says_that_nothing_was_written(error: Exception, expected: type[NotSaved]) -> None:
    found = _sql.not_saved(error, "ICE 1")
    assert type(found) is expected
    assert "'ICE 1' was not saved, nothing was written" in str(found)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (postgres("40001"), Conflict),
        (postgres("23503"), Rejected),  # a deferred constraint
        (postgres("53100"), NotSaved),  # the server has answered: it has not committed
        (postgres("57P01"), type(None)),
        (postgres(None), type(None)),
        (mysql(1213), Conflict),
        (mysql(2013), type(None)),
        (mysql(1180), type(None)),
    ],
    ids=str,
)
def test_what_comes_out_of_commit_is_told_to_be_not_saved_only_when_it_certainly_is(
    error: Exception, expected: type[object]
) -> None:
    assert type(_sql.of_commit(error, "ICE 1")) is expected


@pytest.mark.parametrize("remaining", [0.001, 0.01, 0.2, 1.0, 5.0, 60.0])
def test_a_server_is_bounded_to_less_than_what_remains_and_never_to_nothing(remaining: float) -> None:
    milliseconds = _sql.bound_milliseconds(remaining)
    assert 1 <= milliseconds <= max(1, remaining * 1000)
    assert milliseconds >= int(remaining * 1000 * 0.85)
    assert _sql.postgres_bound(remaining) == f"SET LOCAL statement_timeout = {milliseconds}"
    assert int(_sql.mysql_lock_bound(remaining).rpartition(" ")[2]) >= 1


def test_a_statement_is_found_behind_the_bound_of_mariadb() -> None:
    statement = "SELECT 1 FOR UPDATE"
    assert _sql.without_prefix(_sql.mariadb_prefix(1.5) + statement) == statement
    assert _sql.without_prefix(statement) == statement

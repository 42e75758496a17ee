"""What the errors of SQL drivers mean for a batch, and how its statements are bounded (geventbatch/stores/_sql)."""

from __future__ import annotations

import sqlite3

import pg8000.dbapi  # type: ignore[import-untyped] # it has no types
import psycopg
import psycopg2  # type: ignore[import-untyped] # likewise
import pymysql
import pytest
import sqlalchemy as sa
from mysql.connector import errors as connector_errors

from geventbatch import Conflict, NotSaved, Rejected
from geventbatch.stores._sql import bounds, errors
from geventbatch.stores._sql.errors import Kind


def postgres(state: str | None, parent: type[psycopg.Error] = psycopg.OperationalError) -> psycopg.Error:
    error = parent(f"{parent.__name__} with {state}")
    error.sqlstate = state
    return error


def mysql(code: int, parent: type[pymysql.Error] = pymysql.OperationalError) -> pymysql.Error:
    return parent(code, "it failed")


def pg8000_error(state: str, parent: type[Exception] = pg8000.dbapi.ProgrammingError) -> Exception:
    return parent({"S": "ERROR", "C": state, "M": f"it failed with {state}"})


def connector(code: int, state: str | None = None) -> Exception:
    """As mysql-connector-python makes it of a packet of the server."""
    error = connector_errors.get_mysql_exception(code, "it failed", state)
    assert isinstance(error, connector_errors.Error)
    return error


def sqlite(statement: str, *parameters: object) -> sqlite3.Error:
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE TABLE t (x INTEGER NOT NULL)")
        connection.execute(statement, parameters)
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
        (postgres(None, psycopg.DataError), Kind.UNSENT),
        (postgres(None, psycopg.ProgrammingError), Kind.UNSENT),
        (postgres("42P01", psycopg.ProgrammingError), Kind.REFUSED),
        (postgres("42501", psycopg.ProgrammingError), Kind.REFUSED),  # a policy
        (postgres("54000"), Kind.REFUSED),  # too long for an index
        (postgres("P0001", psycopg.DatabaseError), Kind.REFUSED),  # RAISE
        (postgres("42804", psycopg.ProgrammingError), Kind.REFUSED),
        (postgres("53100"), Kind.UNABLE),
        (postgres("58030"), Kind.UNABLE),
        (postgres("XX001", psycopg.InternalError), Kind.UNABLE),
        (postgres("25006", psycopg.InternalError), Kind.UNABLE),
        (postgres("26000"), Kind.CONFLICT),  # behind a pooler
        (postgres("42P05", psycopg.ProgrammingError), Kind.CONFLICT),
        (psycopg2.OperationalError("server closed the connection unexpectedly"), Kind.LOST),
        (psycopg2.DatabaseError("server closed the connection unexpectedly, in an answer"), Kind.LOST),
        (psycopg2.ProgrammingError("can't adapt type 'closed'"), Kind.UNSENT),
        (pg8000_error("23505"), Kind.REJECTED),
        (pg8000_error("40P01"), Kind.CONFLICT),
        (pg8000_error("57014", pg8000.dbapi.DatabaseError), Kind.TIMEOUT),
        (pg8000_error("P0001"), Kind.REFUSED),
        (pg8000.dbapi.InterfaceError("network error"), Kind.LOST),
        (pg8000.dbapi.InterfaceError("in failed transaction block"), Kind.POISONED),
        (mysql(1213), Kind.CONFLICT),
        (mysql(1020), Kind.CONFLICT),
        (mysql(1205), Kind.TIMEOUT),
        (mysql(1969), Kind.TIMEOUT),
        (mysql(1062, pymysql.IntegrityError), Kind.REJECTED),
        (mysql(4025), Kind.REJECTED),
        (mysql(9999, pymysql.DataError), Kind.REJECTED),
        (mysql(1644), Kind.REJECTED),  # SIGNAL
        (mysql(1021), Kind.UNABLE),
        (mysql(2013), Kind.LOST),
        (mysql(2059), Kind.LOST),
        (mysql(0, pymysql.InterfaceError), Kind.LOST),
        (mysql(1146, pymysql.ProgrammingError), Kind.REFUSED),
        (pymysql.ProgrammingError("closed"), Kind.UNSENT),
        (connector(1062, "23000"), Kind.REJECTED),
        (connector(4025, "23000"), Kind.REJECTED),
        (connector(1213, "40001"), Kind.CONFLICT),
        (connector(1205, "HY000"), Kind.TIMEOUT),
        (connector(1644, "45000"), Kind.REJECTED),
        (connector(2013), Kind.LOST),
        (connector_errors.OperationalError("MySQL Connection not available"), Kind.LOST),
        (connector_errors.ProgrammingError("Python type set cannot be converted"), Kind.UNSENT),
        (sqlite("INSERT INTO t VALUES (NULL)"), Kind.REJECTED),
        (sqlite("SELECT * FROM nowhere"), Kind.REFUSED),
        (sqlite("INSERT INTO t VALUES (?)", {}), Kind.UNSENT),
        (LookupError("no error of a driver"), Kind.OTHER),
    ],
    ids=str,
)
def test_an_error_means_the_same_bare_and_in_the_wrapper_of_an_orm(error: Exception, kind: Kind) -> None:
    assert errors.kind(error) is kind
    wrapped = sa.exc.DBAPIError.instance("SELECT 1", {}, error, type(error))
    assert errors.kind(wrapped) is kind
    other = RuntimeError("as Django does it")
    other.__cause__ = error
    assert errors.kind(other) is kind


def test_a_busy_sqlite_is_a_conflict(tmp_path: object) -> None:
    one, other = (sqlite3.connect(f"{tmp_path}/busy.sqlite", timeout=0) for _ in range(2))
    one.execute("BEGIN IMMEDIATE")
    with pytest.raises(sqlite3.OperationalError) as raised:
        other.execute("BEGIN IMMEDIATE")
    assert errors.kind(raised.value) is Kind.CONFLICT
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (postgres("40001"), Conflict),
        (postgres("23505"), Rejected),
        (postgres("25P02"), Rejected),
        (postgres("P0001"), Rejected),
        (postgres(None, psycopg.ProgrammingError), Rejected),  # of a value
        (postgres("53100"), NotSaved),
        (postgres("57014"), NotSaved),
        (postgres(None), NotSaved),
        (LookupError("no error of a driver"), NotSaved),
    ],
    ids=str,
)
def test_whatever_comes_before_commit_says_that_nothing_was_written(error: Exception, expected: type[NotSaved]) -> None:
    found = errors.not_saved(error, "ICE 1")
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
        (postgres("P0001"), Rejected),  # a deferred trigger
        (postgres(None, psycopg.DataError), Rejected),
        (pg8000_error("23503"), Rejected),
        (pg8000.dbapi.InterfaceError("in failed transaction block"), Rejected),
        (pg8000.dbapi.InterfaceError("network error"), type(None)),
        (mysql(1213), Conflict),
        (mysql(3101), Conflict),
        (mysql(2013), type(None)),
        (mysql(1180), type(None)),
        (mysql(1146), type(None)),
        (connector(1213, "40001"), Conflict),
        (connector(2013), type(None)),
    ],
    ids=str,
)
def test_what_comes_out_of_commit_is_told_to_be_not_saved_only_when_it_certainly_is(
    error: Exception, expected: type[object]
) -> None:
    assert type(errors.of_commit(error, "ICE 1")) is expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (postgres("40001"), Conflict),
        (postgres("42P01"), NotSaved),  # its table is not there
        (postgres("25P02"), NotSaved),
        (postgres(None), NotSaved),
    ],
    ids=str,
)
def test_what_is_said_to_a_statement_of_the_stores_own_blames_no_operation(
    error: Exception, expected: type[NotSaved]
) -> None:
    assert type(errors.of_store(error, "ICE 1")) is expected


@pytest.mark.parametrize("remaining", [0.001, 0.01, 0.2, 1.0, 5.0, 60.0])
def test_a_server_is_bounded_to_less_than_what_remains_and_never_to_nothing(remaining: float) -> None:
    milliseconds = bounds.bound_milliseconds(remaining)
    assert 1 <= milliseconds <= max(1, remaining * 1000)
    assert milliseconds >= int(remaining * 1000 * 0.85)
    assert bounds.postgres_bound(remaining) == f"SET LOCAL statement_timeout = {milliseconds}"
    assert int(bounds.mysql_lock_bound(remaining).rpartition(" ")[2]) >= 1


@pytest.mark.parametrize(
    ("error", "ended"),
    [
        (mysql(1213), True),
        (mysql(1020), True),
        (mysql(1614), True),
        (pymysql.OperationalError(1305, "SAVEPOINT sa_savepoint_1 does not exist"), True),
        (pymysql.OperationalError(1305, "FUNCTION shop.SAVEPOINT does not exist"), False),
        (connector_errors.get_mysql_exception(1305, "SAVEPOINT one does not exist", "42000"), True),
        (connector(1213, "40001"), True),
        (mysql(1205), False),
        (mysql(1062), False),
        (postgres("40P01"), False),
    ],
    ids=repr,
)
def test_it_is_known_when_mysql_has_ended_the_whole_transaction(error: Exception, ended: bool) -> None:
    assert errors.has_ended(error) is ended
    assert errors.has_ended(sa.exc.DBAPIError.instance("SELECT 1", {}, error, type(error))) is ended


def test_what_django_makes_of_a_constraint_of_mysql_is_known_though_it_has_no_cause() -> None:
    from django.db.utils import IntegrityError

    def replace(*args: object) -> None:
        try:
            raise mysql(4025)
        except pymysql.OperationalError as error:
            raise IntegrityError(*(args or error.args))  # noqa: B904 - as Django does

    with pytest.raises(IntegrityError) as raised:
        replace()
    assert errors.kind(raised.value) is Kind.REJECTED
    with pytest.raises(IntegrityError) as raised:
        replace("of something else")
    assert errors.kind(raised.value) is Kind.OTHER


@pytest.mark.parametrize(
    ("mariadb", "statement", "bounded"),
    [
        (False, "SELECT 1", "SELECT /*+ MAX_EXECUTION_TIME(900) */ 1"),
        (False, "/* by */ select 1", "/* by */ select /*+ MAX_EXECUTION_TIME(900) */ 1"),
        (False, "UPDATE t SET x = 1", "UPDATE t SET x = 1"),
        (True, "/* by */ UPDATE t", "SET STATEMENT max_statement_time=0.900 FOR /* by */ UPDATE t"),
        (True, "SAVEPOINT one", "SAVEPOINT one"),
        (True, "(SELECT 1) UNION (SELECT 2)", "(SELECT 1) UNION (SELECT 2)"),
    ],
)
def test_a_statement_of_mysql_is_bounded_whatever_comment_stands_before_it(
    mariadb: bool, statement: str, bounded: str
) -> None:
    assert bounds.bounded_mysql(statement, 1.0, mariadb=mariadb) == bounded


def test_a_statement_is_found_behind_the_bound_of_mariadb() -> None:
    statement = "SELECT 1 FOR UPDATE"
    assert bounds.without_prefix(bounds.mariadb_prefix(1.5) + statement) == statement
    assert bounds.without_prefix(statement) == statement

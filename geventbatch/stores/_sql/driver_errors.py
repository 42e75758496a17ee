"""The meaning of a SQL driver's error for a batch: `kind`, bare or in an ORM's wrapper. Imports no vendor.

Known are psycopg, psycopg2, pg8000, sqlite3, PyMySQL, mysqlclient, mysql-connector-python and MariaDB's connector.

A server's error is the fault of the operation whose statement raised it, unless it is known to concern the connection,
the time, or a conflict.
"""

from __future__ import annotations

import re
import sqlite3
import sys
import warnings
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator


class Kind(Enum):
    """The meaning of a database error for a batch."""

    CONFLICT = "somebody else was faster"
    """A deadlock, a serialization failure, a busy SQLite: nothing was written, so a replay is right."""

    REJECTED = "the database refused what the operations made"
    """A constraint, or a value that no column takes."""

    REFUSED = "the database refused a statement"
    """Any other error that is not known to concern all operations: a trigger, a policy, a limit."""

    UNSENT = "the driver refused a value, and sent nothing"

    TIMEOUT = "the database gave up a statement"
    """Its own bound for a statement or a lock, or a cancellation from outside."""

    POISONED = "an earlier statement of the transaction has failed"
    """PostgreSQL refuses everything until ROLLBACK; an operation has swallowed the first error."""

    LOST = "the connection is lost"

    UNABLE = "the server cannot write now"
    """Its disk is full, its memory is used up, it is read-only."""

    OTHER = "an error that the store does not know"


OF_OPERATION: Final = frozenset({Kind.REJECTED, Kind.REFUSED, Kind.UNSENT, Kind.POISONED})
"""The kinds that are an operation's fault."""

POSTGRES_DRIVERS: Final = frozenset({"psycopg", "psycopg2", "pg8000"})
MYSQL_DRIVERS: Final = frozenset({"pymysql", "MySQLdb", "mysql", "mariadb"})
"""The first part of the name of a driver's module."""

_UNKNOWN_DRIVER: Final = (
    "{store}: geventbatch does not know the errors of {driver}. So a constraint that one operation violates fails its "
    "whole batch, a deadlock and a raced insert are not replayed, and after a COMMIT that raised it is unknown whether "
    "anything was saved. Use a driver that it knows (psycopg, psycopg2, pg8000, PyMySQL, mysqlclient, "
    "mysql-connector-python, MariaDB's connector, sqlite3); or live with that, and silence this RuntimeWarning."
)

_STATES: Final = {
    "40002": Kind.REJECTED,  # transaction_integrity_constraint_violation
    "40003": Kind.LOST,  # statement_completion_unknown
    "25006": Kind.UNABLE,  # read_only_sql_transaction: a standby
    "25P02": Kind.POISONED,  # in_failed_sql_transaction
    "25P03": Kind.LOST,  # idle_in_transaction_session_timeout
    "25P04": Kind.LOST,  # transaction_timeout
    "26000": Kind.CONFLICT,  # behind a pooler: the session does not know our prepared statement
    "42P05": Kind.CONFLICT,  # behind a pooler: the session has another one of that name
    "55P03": Kind.TIMEOUT,  # lock_not_available
    "57014": Kind.TIMEOUT,  # query_canceled
    "57P01": Kind.LOST,  # admin_shutdown
    "57P02": Kind.LOST,  # crash_shutdown
    "57P03": Kind.LOST,  # cannot_connect_now
    "57P04": Kind.LOST,  # database_dropped
    "57P05": Kind.LOST,  # idle_session_timeout
}

_CLASSES: Final = {
    "08": Kind.LOST,  # connection exceptions
    "22": Kind.REJECTED,  # a value that is too long, out of range, no valid text
    "23": Kind.REJECTED,  # constraints
    "28": Kind.UNABLE,  # not let in
    "40": Kind.CONFLICT,  # serialization failures, deadlocks
    "44": Kind.REJECTED,  # WITH CHECK OPTION
    "53": Kind.UNABLE,  # disk, memory, connections
    "57": Kind.UNABLE,  # an operator
    "58": Kind.UNABLE,  # input and output
    "F0": Kind.UNABLE,  # configuration
    "XX": Kind.UNABLE,  # internal errors
}

_MYSQL: Final = {
    1020: Kind.CONFLICT,  # record has changed since last read (MariaDB's snapshot isolation)
    1213: Kind.CONFLICT,  # deadlock
    1412: Kind.CONFLICT,  # table definition has changed
    1614: Kind.CONFLICT,  # deadlock in XA
    3058: Kind.CONFLICT,  # deadlock of user locks
    3101: Kind.CONFLICT,  # rolled back in COMMIT: another node of the group was faster
    1205: Kind.TIMEOUT,  # lock wait timeout
    1317: Kind.TIMEOUT,  # query interrupted
    1969: Kind.TIMEOUT,  # MariaDB's max_statement_time
    3024: Kind.TIMEOUT,  # MySQL's max_execution_time
    3572: Kind.TIMEOUT,  # NOWAIT
    1048: Kind.REJECTED,  # column cannot be null
    1062: Kind.REJECTED,  # duplicate entry
    1153: Kind.REJECTED,  # longer than max_allowed_packet
    1216: Kind.REJECTED,  # no referenced row
    1217: Kind.REJECTED,  # row is referenced
    1264: Kind.REJECTED,  # out of range
    1292: Kind.REJECTED,  # incorrect value
    1364: Kind.REJECTED,  # no default value
    1365: Kind.REJECTED,  # division by 0
    1366: Kind.REJECTED,  # incorrect value for a column
    1406: Kind.REJECTED,  # too long
    1451: Kind.REJECTED,  # row is referenced
    1452: Kind.REJECTED,  # no referenced row
    1526: Kind.REJECTED,  # no partition for it
    1557: Kind.REJECTED,  # foreign duplicate key
    1586: Kind.REJECTED,  # duplicate entry
    1644: Kind.REJECTED,  # SIGNAL
    1690: Kind.REJECTED,  # out of range
    3140: Kind.REJECTED,  # invalid JSON
    3819: Kind.REJECTED,  # CHECK
    4025: Kind.REJECTED,  # MariaDB's CHECK
    0: Kind.LOST,  # PyMySQL: the connection is closed
    1053: Kind.LOST,  # server shutdown
    1077: Kind.LOST,  # normal shutdown
    1079: Kind.LOST,  # shutdown complete
    1152: Kind.LOST,  # aborted connection
    1158: Kind.LOST,  # error reading
    1159: Kind.LOST,  # timeout reading
    1160: Kind.LOST,  # error writing
    1161: Kind.LOST,  # timeout writing
    1184: Kind.LOST,  # aborted connection
    1927: Kind.LOST,  # connection was killed
    4031: Kind.LOST,  # idle for too long
    **dict.fromkeys(
        [
            *[3, 28, 1015, 1021, 1026, 1030, 1114],  # files, the disk, a full table
            *[1037, 1038, 1041, 1135, 1206],  # memory, threads, locks
            *[1040, 1044, 1045, 1049, 1129, 1130, 1203, 1226],  # connections, and the right to make some
            *[1047, 1290, 1297, 1792, 1836],  # a node of a cluster, read-only
        ],
        Kind.UNABLE,
    ),
}

_CLIENTS_OWN: Final = range(2_000, 3_000)
"""Codes that MySQL's client libraries raise by themselves, when the connection does not work."""

_NO_SAVEPOINT: Final = 1305
"""MySQL: there is no procedure, function, or savepoint of that name."""

_LOCK_TIMEOUT: Final = 1205
"""MySQL rolls back the statement, or, with ``innodb_rollback_on_timeout``, the whole transaction."""

_ENDED: Final = frozenset({1020, 1213, 1614, 3101})
"""Codes with which MySQL has rolled back the whole transaction."""

_SQLITE: Final = {
    sqlite3.SQLITE_BUSY: Kind.CONFLICT,
    sqlite3.SQLITE_LOCKED: Kind.CONFLICT,
    sqlite3.SQLITE_CONSTRAINT: Kind.REJECTED,
    sqlite3.SQLITE_TOOBIG: Kind.REJECTED,
    sqlite3.SQLITE_MISMATCH: Kind.REJECTED,
    sqlite3.SQLITE_INTERRUPT: Kind.TIMEOUT,
    **dict.fromkeys(
        [
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_NOMEM,
            sqlite3.SQLITE_NOTADB,
            sqlite3.SQLITE_PERM,
            sqlite3.SQLITE_PROTOCOL,
            sqlite3.SQLITE_READONLY,
        ],
        Kind.UNABLE,
    ),
}

_SCHEMA: Final = frozenset({"3F000", "42703", "42P01"})
"""SQLSTATEs: there is no such schema, column, table."""

_NO_RIGHT: Final = "42501"
_ASKS_FOR_RIGHT: Final = "aclcheck_error"
"""The function of PostgreSQL's that raises it for a right."""

_MYSQL_SCHEMA: Final = frozenset({1054, 1142, 1143, 1146})
"""There is no such column, right to a table, right to a column, table."""

_MYSQL_RIGHTS: Final = frozenset({1142, 1143})
"""Codes whose message names the table last, behind the user."""

_QUOTED: Final = re.compile(r"['`]([^'`]*)['`]")

_SQLITE_SCHEMA: Final = ("no such table", "no such column", " has no column named ")

_SQLITE_NOT_COMMITTED: Final = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY}
"""Codes with which COMMIT has failed: SQLite has rolled back, or will."""

_NAMES: Final = {
    "PipelineAborted": Kind.POISONED,
    "IntegrityError": Kind.REJECTED,
    "DataError": Kind.UNSENT,
    "ProgrammingError": Kind.UNSENT,
    "NotSupportedError": Kind.UNSENT,
    "InterfaceError": Kind.LOST,
    "OperationalError": Kind.LOST,
}
"""Classes of errors that a driver raises by itself, without a code; the most exact first."""

_OF_ANY_DRIVER: Final = {"IntegrityError": Kind.REJECTED, "DataError": Kind.REJECTED}
"""Classes of errors of an unknown driver."""

_FAILED_BLOCK: Final = "in failed transaction block"
"""pg8000's own message when the server has taken COMMIT for ROLLBACK."""


def kind(error: BaseException) -> Kind:
    """Return what *error*, a driver's or an ORM's around it, means."""
    found = [known for one in chain(error) if (known := _kind_of_one(one)) is not None]
    return found[0] if found else Kind.OTHER


def is_duplicate(error: BaseException) -> bool:
    """Return whether *error* says that a unique key is taken."""
    for one in chain(error):
        if isinstance(one, sqlite3.Error):
            return getattr(one, "sqlite_errorcode", 0) in {
                sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
                sqlite3.SQLITE_CONSTRAINT_UNIQUE,
                sqlite3.SQLITE_CONSTRAINT_ROWID,
            }
        if _vendor(one) in MYSQL_DRIVERS:  # their errors may have an SQLSTATE too, which is less exact
            return _mysql_code(one) in {1062, 1586}
        if state(one) is not None:
            return state(one) == "23505"
    return False


def tell_of_driver(store: str, driver: str) -> None:
    """Warn, when a store is made, of a driver whose errors are unknown."""
    frame, ours = sys._getframe(), 1  # noqa: SLF001 - count the innermost frames that are ours
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("geventbatch."):
        frame, ours = frame.f_back, ours + 1
    warnings.warn(_UNKNOWN_DRIVER.format(store=store, driver=driver), RuntimeWarning, stacklevel=ours)


def lacks_something(error: BaseException) -> bool:
    """Return whether a column, a table or a right is missing, if only in a trigger or a function."""
    return any(map(_lacks_something, chain(error)))


def is_of_schema(error: BaseException, statement: str | None = None) -> bool:
    """Return whether *statement* itself lacks a column, a table or a right, so that it fails whatever the data are.

    What a trigger or a function lacks, it may need for some data only. PostgreSQL gives a context then. MySQL names
    what is missing: a name that *statement* has too is taken for its own, as is any if the statement is not known
    (SQLAlchemy's errors have it). SQLite compiles the triggers of a statement with it, for all data.
    """
    for one in chain(error):
        statement = statement or getattr(one, "statement", None)
        if _lacks_something(one):
            if _vendor(one) in MYSQL_DRIVERS:
                return statement is None or _names(statement, _missing_in_mysql(one))
            return _diagnostic(one, "W", "context") is None
    return False


def _lacks_something(error: BaseException) -> bool:
    if isinstance(error, sqlite3.Error):  # a trigger's RAISE may say the same, with another code
        return _sqlite_code(error) == sqlite3.SQLITE_ERROR and any(told in str(error) for told in _SQLITE_SCHEMA)
    if _vendor(error) in MYSQL_DRIVERS:
        return _mysql_code(error) in _MYSQL_SCHEMA
    found = state(error)
    # A row that a policy refuses has the state of a missing right.
    return found in _SCHEMA or (found == _NO_RIGHT and _diagnostic(error, "R", "source_function") == _ASKS_FOR_RIGHT)


def _missing_in_mysql(error: BaseException) -> str:
    """Return the name of the missing column or table, or of the table to which a right is missing."""
    quoted: list[str] = _QUOTED.findall(_mysql_text(error)) or [""]
    return quoted[-1 if _mysql_code(error) in _MYSQL_RIGHTS else 0].rpartition(".")[2]


def _names(statement: str, name: str) -> bool:
    return bool(name) and re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", statement, re.IGNORECASE) is not None


def has_ended(error: BaseException) -> bool:
    """Return whether MySQL has ended the whole transaction with *error*, so that the next statement begins another."""
    return any(
        _vendor(one) in MYSQL_DRIVERS and (_mysql_code(one) in _ENDED or _is_of_savepoint(one)) for one in chain(error)
    )


def may_have_ended(error: BaseException) -> bool:
    """Return whether *error* is MySQL's 1205, which may end the transaction, as the server is configured."""
    return any(_vendor(one) in MYSQL_DRIVERS and _mysql_code(one) == _LOCK_TIMEOUT for one in chain(error))


def has_refused_commit(error: BaseException) -> bool:
    """Return whether *error* is the server's answer to COMMIT, so that it has not committed."""
    found = kind(error)
    if found in {Kind.CONFLICT, Kind.REJECTED, Kind.POISONED, Kind.UNSENT}:
        return True
    return found is not Kind.LOST and any(
        state(one) is not None or (isinstance(one, sqlite3.Error) and _sqlite_code(one) in _SQLITE_NOT_COMMITTED)
        for one in chain(error)
    )


def state(error: BaseException) -> str | None:
    """Return PostgreSQL's SQLSTATE of *error*; None if it is not from the server."""
    vendor = _vendor(error)
    found: Any = None
    if vendor == "pg8000":
        fields = error.args[0] if error.args else None
        found = fields.get("C") if isinstance(fields, dict) else None
    elif vendor not in MYSQL_DRIVERS:
        found = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return found if isinstance(found, str) else None


def message(error: BaseException) -> str:
    """Return the server's message, without the statement that it quotes, and without details."""
    return _diagnostic(error, "M", "message_primary") or ""


def table_of(error: BaseException) -> str | None:
    """Return the table whose row PostgreSQL has refused."""
    return _diagnostic(error, "t", "table_name")


def _diagnostic(error: BaseException, field: str, attribute: str) -> str | None:
    """Return a *field* of PostgreSQL's error, which libpq's drivers have as an *attribute*."""
    for one in chain(error):
        if _vendor(one) == "pg8000" and one.args and isinstance(one.args[0], dict):
            return one.args[0].get(field)
        told = getattr(getattr(one, "diag", None), attribute, None)
        if isinstance(told, str):
            return told
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it wraps: SQLAlchemy's has an `orig`, Django's a cause."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        orig = getattr(one, "orig", None)
        one = orig if isinstance(orig, BaseException) else one.__cause__ or _replaced(one)


def _replaced(error: BaseException) -> BaseException | None:
    """Return the constraint's error that Django's MySQL backend has replaced by *error*, without a cause."""
    before = error.__context__
    is_django = type(error).__module__.startswith("django.db.") and before is not None
    return before if is_django and before is not None and before.args == error.args else None


def _kind_of_one(error: BaseException) -> Kind | None:
    if isinstance(error, sqlite3.Error):
        return _kind_in_sqlite(error)
    vendor = _vendor(error)
    if vendor in MYSQL_DRIVERS:
        return _kind_in_mysql(error)
    if vendor in POSTGRES_DRIVERS:
        found = state(error)
        if found is not None:
            return _STATES.get(found) or _CLASSES.get(found[:2], Kind.REFUSED)
        # Without a state it is not from the server: the connection failed, or the driver has refused a value.
        return Kind.POISONED if str(error) == _FAILED_BLOCK else _kind_by_name(error)
    if {"Error", "DatabaseError"} <= {parent.__name__ for parent in type(error).__mro__} and not _is_wrapper(error):
        return next((found for name, found in _OF_ANY_DRIVER.items() if _is_named(error, name)), Kind.OTHER)
    return None


def _kind_in_sqlite(error: sqlite3.Error) -> Kind:
    code = _sqlite_code(error)
    if code >= 0:
        return _SQLITE.get(code, Kind.REFUSED)
    # Raised by Python's driver: for a value, or a connection that is closed.
    return Kind.LOST if str(error).startswith("Cannot operate on a closed") else Kind.UNSENT


def _kind_in_mysql(error: BaseException) -> Kind:
    code = _mysql_code(error)
    if code in _MYSQL:
        return _MYSQL[code]
    if _is_of_savepoint(error):
        return Kind.CONFLICT
    if code in _CLIENTS_OWN:
        return Kind.LOST
    if code > 0:
        return Kind.REJECTED if any(_is_named(error, name) for name in _OF_ANY_DRIVER) else Kind.REFUSED
    return _kind_by_name(error)


def _is_of_savepoint(error: BaseException) -> bool:
    """Return whether a savepoint is gone, which only happens with its transaction."""
    return _mysql_code(error) == _NO_SAVEPOINT and _mysql_text(error).startswith("SAVEPOINT ")


def _kind_by_name(error: BaseException) -> Kind:
    found = next((found for name, found in _NAMES.items() if _is_named(error, name)), None)
    # psycopg2 raises a bare DatabaseError when the server goes away in the middle of an answer.
    return found or (Kind.LOST if type(error).__name__ == "DatabaseError" else Kind.OTHER)


def _is_named(error: BaseException, name: str) -> bool:
    return any(parent.__name__ == name for parent in type(error).__mro__)


def _is_wrapper(error: BaseException) -> bool:
    return _vendor(error) in {"sqlalchemy", "django"}


def _vendor(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _mysql_code(error: BaseException) -> int:
    code = getattr(error, "errno", None) if _vendor(error) in {"mysql", "mariadb"} else None
    if code is None and error.args:
        code = error.args[0]
    return code if isinstance(code, int) else -1


def _mysql_text(error: BaseException) -> str:
    told = getattr(error, "msg", None) or (error.args[1] if len(error.args) > 1 else str(error))
    return str(told)


def _sqlite_code(error: sqlite3.Error) -> int:
    """Return the primary code; -1 for an error that Python's driver has raised by itself."""
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF

"""What all SQL databases and their drivers have in common, whichever ORM stands before them. Imports no vendor.

- `kind` says what an error of a driver means, bare or in an ORM's wrapper. The drivers: psycopg, psycopg2, sqlite3,
  PyMySQL, mysqlclient.
- `not_saved` makes of an error before COMMIT what a scope raises, `of_commit` of one that came out of COMMIT.
- `postgres_bound` and its neighbours give the statements with which a server ends a slow statement before the deadline.
"""

from __future__ import annotations

import sqlite3
from decimal import Decimal
from enum import Enum
from math import ceil
from typing import TYPE_CHECKING, Final

from geventbatch.errors import Conflict, NotSaved, Rejected
from geventbatch.stores import _statements

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

forbidden: Final = _statements.forbidden


class Kind(Enum):
    """What an error of a database means for a batch."""

    CONFLICT = "somebody else was faster"
    """A deadlock, a serialization failure, a busy SQLite: all again is right, since nothing was written."""

    REJECTED = "the database refused what the operations made"
    """A constraint, or a value that no column takes."""

    TIMEOUT = "the database gave up a statement"
    """Its own bound for a statement or a lock, or somebody cancelled it."""

    POISONED = "an earlier statement of the transaction has failed"
    """PostgreSQL refuses everything until ROLLBACK; somebody swallowed the error that says why."""

    LOST = "the connection is lost"

    OTHER = "an error that the store does not know"


# -- what an error means --------------------------------------------------------------------------------------

_STATES: Final = {
    "40001": Kind.CONFLICT,  # serialization_failure
    "40P01": Kind.CONFLICT,  # deadlock_detected
    "40002": Kind.REJECTED,  # transaction_integrity_constraint_violation
    "40003": Kind.LOST,  # statement_completion_unknown
    "25P02": Kind.POISONED,  # in_failed_sql_transaction
    "25P03": Kind.LOST,  # idle_in_transaction_session_timeout
    "25P04": Kind.LOST,  # transaction_timeout
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
    "44": Kind.REJECTED,  # WITH CHECK OPTION
}

_MYSQL: Final = {
    1020: Kind.CONFLICT,  # record has changed since last read (MariaDB's snapshot isolation)
    1213: Kind.CONFLICT,  # deadlock
    1614: Kind.CONFLICT,  # deadlock in XA
    1205: Kind.TIMEOUT,  # lock wait timeout
    1317: Kind.TIMEOUT,  # query interrupted
    1969: Kind.TIMEOUT,  # MariaDB's max_statement_time
    3024: Kind.TIMEOUT,  # MySQL's max_execution_time
    3572: Kind.TIMEOUT,  # NOWAIT
    3058: Kind.CONFLICT,  # deadlock of user locks
    1048: Kind.REJECTED,  # column cannot be null
    1062: Kind.REJECTED,  # duplicate entry
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
    1690: Kind.REJECTED,  # out of range
    3140: Kind.REJECTED,  # invalid JSON
    3819: Kind.REJECTED,  # CHECK
    4025: Kind.REJECTED,  # MariaDB's CHECK
    0: Kind.LOST,  # PyMySQL: the connection is closed
    1053: Kind.LOST,  # server shutdown
    1077: Kind.LOST,  # normal shutdown
    1079: Kind.LOST,  # shutdown complete
    1152: Kind.LOST,  # aborted connection
    1184: Kind.LOST,  # aborted connection
    1927: Kind.LOST,  # connection was killed
    2002: Kind.LOST,  # cannot connect
    2003: Kind.LOST,  # cannot connect
    2006: Kind.LOST,  # server has gone away
    2013: Kind.LOST,  # lost connection during query
    2014: Kind.LOST,  # commands out of sync
    2027: Kind.LOST,  # malformed packet
    2055: Kind.LOST,  # lost connection
    4031: Kind.LOST,  # idle for too long
}

_MYSQL_DRIVERS: Final = ("pymysql", "MySQLdb")

_SQLITE: Final = {
    sqlite3.SQLITE_BUSY: Kind.CONFLICT,
    sqlite3.SQLITE_LOCKED: Kind.CONFLICT,
    sqlite3.SQLITE_CONSTRAINT: Kind.REJECTED,
    sqlite3.SQLITE_TOOBIG: Kind.REJECTED,
    sqlite3.SQLITE_MISMATCH: Kind.REJECTED,
    sqlite3.SQLITE_INTERRUPT: Kind.TIMEOUT,
}

_SQLITE_NOT_COMMITTED: Final = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY}
"""COMMIT fails, and SQLite has rolled back or will."""

_NAMES: Final = {
    "PipelineAborted": Kind.POISONED,
    "IntegrityError": Kind.REJECTED,
    "DataError": Kind.REJECTED,
    "InterfaceError": Kind.LOST,
}
"""For errors that a driver makes by itself, without a code; in the order of how exact they are."""


def kind(error: BaseException) -> Kind:
    """What *error*, a driver's or an ORM's around it, means."""
    return next((found for one in _chain(error) if (found := _kind_of_one(one)) is not None), Kind.OTHER)


def is_duplicate(error: BaseException) -> bool:
    """Whether *error* says that a unique key is taken."""
    for one in _chain(error):
        if isinstance(one, sqlite3.Error):
            return getattr(one, "sqlite_errorcode", 0) in {
                sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY,
                sqlite3.SQLITE_CONSTRAINT_UNIQUE,
                sqlite3.SQLITE_CONSTRAINT_ROWID,
            }
        if _vendor(one) in _MYSQL_DRIVERS:  # whose errors may have an SQLSTATE too, which is less exact
            return _mysql_code(one) in {1062, 1586}
        if state(one) is not None:
            return state(one) == "23505"
    return False


def state(error: BaseException) -> str | None:
    """The SQLSTATE that PostgreSQL gave *error*, if it was the server's."""
    found = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return found if isinstance(found, str) else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it wraps: SQLAlchemy's has an `orig`, Django's a cause."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        orig = getattr(one, "orig", None)
        one = orig if isinstance(orig, BaseException) else one.__cause__


def _kind_of_one(error: BaseException) -> Kind | None:
    if isinstance(error, sqlite3.Error):
        if _is_named(error, "InterfaceError"):  # a value of a type that it does not take
            return Kind.REJECTED
        return _SQLITE.get(_sqlite_code(error)) or _kind_by_name(error)
    vendor = _vendor(error)
    if vendor in _MYSQL_DRIVERS:
        return _MYSQL.get(_mysql_code(error)) or _kind_by_name(error)
    if vendor in {"psycopg", "psycopg2"}:
        found = state(error)
        if found is not None:
            return _STATES.get(found) or _CLASSES.get(found[:2], Kind.OTHER)
        # Without a state it is not from the server: the connection failed, or the driver refused a value.
        return _kind_by_name(error) or (Kind.LOST if _is_named(error, "OperationalError") else Kind.OTHER)
    return None


def _kind_by_name(error: BaseException) -> Kind | None:
    return next((found for name, found in _NAMES.items() if _is_named(error, name)), None)


def _is_named(error: BaseException, name: str) -> bool:
    return any(parent.__name__ == name for parent in type(error).__mro__)


def _vendor(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _mysql_code(error: BaseException) -> int:
    code = error.args[0] if error.args else None
    return code if isinstance(code, int) else -1


def _sqlite_code(error: sqlite3.Error) -> int:
    """The primary code; an error that Python's driver has made by itself has none."""
    code = getattr(error, "sqlite_errorcode", None)
    return -1 if code is None else code & 0xFF


# -- what a scope raises ---------------------------------------------------------------------------------------


def not_saved(error: BaseException, key: Hashable) -> NotSaved:
    """What a scope raises (``from`` *error*) for an error that came before COMMIT was sent: nothing was written."""
    found = kind(error)
    why = f"{key!r} was not saved, nothing was written: {found.value} ({_first_line(error)})"
    if found is Kind.CONFLICT:
        return Conflict(why)
    if found in {Kind.REJECTED, Kind.POISONED}:
        return Rejected(why)
    return NotSaved(why)


def of_commit(error: BaseException, key: Hashable) -> NotSaved | None:
    """The same for an error that came out of COMMIT. None when nobody can tell from it whether that was carried out."""
    found = kind(error)
    if found in {Kind.CONFLICT, Kind.REJECTED, Kind.POISONED} or _refused(error, found):
        return not_saved(error, key)
    return None


def _refused(error: BaseException, found: Kind) -> bool:
    """Whether the server has answered COMMIT by an error, so that it has not committed."""
    if found is Kind.LOST:
        return False
    return any(
        state(one) is not None or (isinstance(one, sqlite3.Error) and _sqlite_code(one) in _SQLITE_NOT_COMMITTED)
        for one in _chain(error)
    )


def of_operation(error: BaseException, key: Hashable) -> NotSaved | None:
    """What `operation_raised` makes of an error that an operation's own SQL may have caused. None: it is no such thing.

    After a `Rejected` the operation is out, also where it is the statement before that failed: a transaction that has
    failed saves nothing.
    """
    found = kind(error)
    return None if found is Kind.OTHER else not_saved(error, key)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# -- bounds on the server --------------------------------------------------------------------------------------

_MARGIN: Final = 0.1
"""Seconds, at the most, by which the server gives up before the batch does, so that its answer still comes."""


def bound_seconds(remaining: float) -> float:
    """Seconds that a server may take for a statement of a batch that has *remaining* seconds left. At least 0.001."""
    return max(0.001, remaining - min(_MARGIN, remaining / 10))


def bound_milliseconds(remaining: float) -> int:
    """The same in milliseconds; never 0, which databases take for "no limit"."""
    return max(1, int(bound_seconds(remaining) * 1000))


def postgres_bound(remaining: float) -> str:
    """Bound the statements of this transaction, each with its waits for locks, and none after it."""
    return f"SET LOCAL statement_timeout = {bound_milliseconds(remaining)}"


_LAST_CRASH: Final = (
    "extract(epoch FROM CASE WHEN current_setting('server_version_num')::int < 150000 THEN pg_postmaster_start_time() "
    "ELSE coalesce(pg_stat_get_bgwriter_stat_reset_time(), pg_postmaster_start_time()) END)"
)
"""Another number after each crash of PostgreSQL, which gives away again the ids of transactions that it has lost.

Statistics are reset by a crash, that of one backend too, and kept when the server is stopped in order. Before
PostgreSQL 15 they are read from a file, which takes too long.
"""


def postgres_bound_and_xid(remaining: float) -> str:
    """The same, and give the transaction's id (in the second column) to ask `postgres_outcome` for, in one."""
    return (
        f"SELECT set_config('statement_timeout', '{bound_milliseconds(remaining)}', true), "
        f"pg_current_xact_id() || ' ' || {_LAST_CRASH} AS pg_current_xact_id"
    )


def postgres_outcome(xid: str) -> str:
    """Ask for 'committed', 'aborted', 'in progress', or NULL when it is too long ago, or a crash may have swallowed it.

    The server refuses to answer while no transaction has that id; it may be starting up, or have crashed.
    """
    number, last_crash = xid.split()
    return (
        f"SELECT CASE WHEN status <> 'committed' OR {_LAST_CRASH} = {Decimal(last_crash)} THEN status END "  # noqa: S608 - of numbers
        f"FROM (SELECT pg_xact_status(CAST('{int(number)}' AS xid8)) AS status) AS asked"
    )


_PREFIX: Final = "SET STATEMENT"


def mariadb_prefix(remaining: float) -> str:
    """Put before a statement (no batch of them), it bounds that one, its waits for locks too, and leaves no trace."""
    return f"{_PREFIX} max_statement_time={bound_seconds(remaining):.3f} FOR "


def without_prefix(statement: str) -> str:
    """The statement that `mariadb_prefix` was put before, if it was."""
    return statement.partition(" FOR ")[2] if statement.startswith(_PREFIX) else statement


def mysql_hint(remaining: float) -> str:
    """Put behind the word SELECT, it bounds that statement. MySQL bounds no others, but by their waits for locks."""
    return f"/*+ MAX_EXECUTION_TIME({bound_milliseconds(remaining)}) */"


def mysql_lock_bound(remaining: float) -> str:
    """Bound the waits for locks of this session, in whole seconds, until it is set again (to DEFAULT)."""
    return f"SET SESSION innodb_lock_wait_timeout = {max(1, ceil(bound_seconds(remaining)))}"

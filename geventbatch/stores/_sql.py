"""What all SQL databases and their drivers have in common, whichever ORM stands before them. Imports no vendor.

- `kind` says what an error of a driver means, bare or in an ORM's wrapper (`_driver_errors`).
- `not_saved` makes of an error before COMMIT what a scope raises, `of_commit` of one that came out of COMMIT;
  `_commit.settle` finds out what became of that.
- `forbidden` says why an operation may not send a statement (`_statements`).
- `postgres_bound` and its neighbours give the statements with which a server ends a slow statement before the deadline.
"""

from __future__ import annotations

from decimal import Decimal
from math import ceil
from secrets import token_hex
from typing import TYPE_CHECKING, Final

from geventbatch._shown import said, shown
from geventbatch.errors import Conflict, NotSaved, Rejected
from geventbatch.stores._driver_errors import (
    OF_OPERATION,
    Kind,
    chain,
    has_ended,
    has_refused_commit,
    is_duplicate,
    kind,
    may_have_ended,
    message,
    state,
    table_of,
    tell_of_driver,
)
from geventbatch.stores._statements import first_word, forbidden, start

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = [
    "BEGIN",
    "LEVEL",
    "MARK",
    "MYSQL_ENDS",
    "READ_COMMITTED",
    "SEPARATOR",
    "Kind",
    "bound_milliseconds",
    "bound_seconds",
    "bounded_mysql",
    "chain",
    "first_word",
    "forbidden",
    "has_ended",
    "has_no_xmin",
    "is_duplicate",
    "is_marked",
    "kind",
    "mariadb_prefix",
    "may_have_ended",
    "mysql_hint",
    "mysql_lock_bound",
    "mysql_read_committed",
    "not_saved",
    "of_commit",
    "of_store",
    "postgres_bound",
    "postgres_bound_and_xid",
    "postgres_outcome",
    "start",
    "state",
    "table_of",
    "tell_of_driver",
    "what_it_means",
    "without_prefix",
]


# -- what a scope raises ---------------------------------------------------------------------------------------


def not_saved(error: BaseException, key: Hashable) -> NotSaved:
    """What a scope raises (``from`` *error*) for an error that came before COMMIT was sent: nothing was written."""
    found = kind(error)
    why = f"{shown(key)} was not saved, nothing was written: {found.value} ({_first_line(error)})"
    if found is Kind.CONFLICT:
        return Conflict(why)
    return Rejected(why) if found in OF_OPERATION else NotSaved(why)


def of_store(error: BaseException, key: Hashable) -> NotSaved:
    """The same for a statement of the store's own, which has nothing of what operations made: none is to blame."""
    found = not_saved(error, key)
    return found if isinstance(found, Conflict) else NotSaved(*found.args)


def of_commit(error: BaseException, key: Hashable) -> NotSaved | None:
    """The same for an error that came out of COMMIT. None when nobody can tell from it whether that was carried out."""
    return not_saved(error, key) if has_refused_commit(error) else None


def what_it_means(error: BaseException, key: Hashable, *, committing: bool = False) -> NotSaved | None:
    """What a store of one's own raises (``from`` *error*) for an error of a database: what its scopes are to say.

    Known are psycopg, psycopg2, pg8000, sqlite3, PyMySQL, mysqlclient, mysql-connector-python and MariaDB's connector,
    bare or in the wrapper of SQLAlchemy, of Django or of any ORM that raises its error ``from`` the driver's.

    Args:
        error: What was raised.
        key: That of the resource, for the message.
        committing: Whether it came out of COMMIT. Else COMMIT has not been sent, and nothing was written.

    Returns:
        A `Conflict` (a deadlock, a serialization failure: all is replayed), a `Rejected` (a constraint, a value that
        the database or the driver refuses: an operation is to blame), another `NotSaved` (the connection, the time);
        None when nobody can tell: then raise *error* itself, and callers are told that it is unknown.
    Switches: no.
    """
    if committing:
        return of_commit(error, key)
    return None if kind(error) is Kind.OTHER else not_saved(error, key)


def _first_line(error: BaseException) -> str:
    text = said(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


# -- several statements in one message -------------------------------------------------------------------------

MARK: Final = f"the row is another one {token_hex(8)}"
"""In the error of a statement that fails by intention. It is another one in each process, so that no text of a user's
looks like it."""

_NO_NUMBER: Final = "22P02"
"""The SQLSTATE of a text that is to be a number, as *MARK* is."""


def is_marked(error: BaseException) -> bool:
    """Whether *error* is that of a statement that fails by intention, with *MARK*."""
    return any(state(one) == _NO_NUMBER for one in chain(error)) and MARK in message(error)


_NO_COLUMN: Final = "42703"


def has_no_xmin(error: BaseException) -> bool:
    """Whether *error* says that what was to be loaded has no `xmin`: it is no table, but a view."""
    return any(state(one) == _NO_COLUMN for one in chain(error)) and "xmin" in message(error)


SEPARATOR: Final = "\n; "
"""Between several statements in one message. Each begins on a line of its own: the one before may end in a comment."""


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


LEVEL: Final = "read committed"
"""As PostgreSQL calls it. In small letters: then only a COMMIT reads so, for who looks at what is sent."""

READ_COMMITTED: Final = f"SET TRANSACTION ISOLATION LEVEL {LEVEL}"
"""For a transaction in which nothing was sent yet."""

BEGIN: Final = f"BEGIN ISOLATION LEVEL {LEVEL}"
"""For one that locks its row: what it reads behind that is not older."""


def postgres_bound_and_xid(remaining: float, *, level: bool = False, backend: bool = False) -> str:
    """The same, and give the transaction's id (in the second column) to ask `postgres_outcome` for, in one.

    With *level*, give its level of isolation in the third; with *backend*, the server's process in the last.
    """
    more = ", current_setting('transaction_isolation')" if level else ""
    more += ", pg_backend_pid()" if backend else ""
    return (
        f"SELECT set_config('statement_timeout', '{bound_milliseconds(remaining)}', true), "
        f"pg_current_xact_id() || ' ' || {_LAST_CRASH} AS pg_current_xact_id{more}"
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


def bounded_mysql(statement: str, remaining: float, *, mariadb: bool) -> str:
    """*statement* with its bound, where it can have one."""
    begin, word = start(statement), first_word(statement)
    if "(" in statement[:begin]:  # a UNION: neither of the two fits
        return statement
    if mariadb:
        return mariadb_prefix(remaining) + statement if word in _BOUNDED else statement
    if word != "SELECT":
        return statement
    behind = begin + len(word)
    return f"{statement[:behind]} {mysql_hint(remaining)}{statement[behind:]}"


_BOUNDED: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE"})


def without_prefix(statement: str) -> str:
    """The statement that `mariadb_prefix` was put before, if it was."""
    return statement.partition(" FOR ")[2] if statement.startswith(_PREFIX) else statement


def mysql_hint(remaining: float) -> str:
    """Put behind the word SELECT, it bounds that statement. MySQL bounds no others, but by their waits for locks."""
    return f"/*+ MAX_EXECUTION_TIME({bound_milliseconds(remaining)}) */"


MYSQL_ENDS: Final = "SELECT @@innodb_rollback_on_timeout"
"""Asks whether a wait for a lock that was too long has ended the whole transaction."""


def mysql_read_committed(*, mariadb: bool) -> str:
    """Have the session be READ COMMITTED from now on, but where a log of statements is kept, which takes no such."""
    name = "tx_isolation" if mariadb else "transaction_isolation"
    of_statements = "@@log_bin AND @@binlog_format = 'STATEMENT'"
    return f"SET SESSION {name} = IF({of_statements}, @@{name}, 'READ-COMMITTED')"


def mysql_lock_bound(remaining: float) -> str:
    """Bound the waits for locks of this session, in whole seconds, until it is set again (to DEFAULT)."""
    return f"SET SESSION innodb_lock_wait_timeout = {max(1, ceil(bound_seconds(remaining)))}"

"""SQL texts that bound statements on the server, begin a transaction, and ask for its outcome. Imports no vendor."""

from __future__ import annotations

from decimal import Decimal
from functools import lru_cache
from math import ceil
from typing import Final

from geventbatch.stores._sql.statements import REMEMBERED, first_word, start

SEPARATOR: Final = "\n; "
"""Between several statements in one message. A new line, since the statement before may end in a comment."""


_MARGIN: Final = 0.1
"""Seconds at most by which the server gives up before the batch, so that its answer still arrives."""


def bound_seconds(remaining: float) -> float:
    """Return the seconds (at least 0.001) for a statement of a batch that has *remaining* seconds left."""
    return max(0.001, remaining - min(_MARGIN, remaining / 10))


def bound_milliseconds(remaining: float) -> int:
    """Return `bound_seconds` in milliseconds; never 0, which databases take for "no limit"."""
    return max(1, int(bound_seconds(remaining) * 1000))


def postgres_bound(remaining: float) -> str:
    """Bound each statement of this transaction, with its waits for locks. Ends with the transaction."""
    return f"SET LOCAL statement_timeout = {bound_milliseconds(remaining)}"


_LAST_CRASH: Final = (
    "extract(epoch FROM CASE WHEN current_setting('server_version_num')::int < 150000 THEN pg_postmaster_start_time() "
    "ELSE coalesce(pg_stat_get_bgwriter_stat_reset_time(), pg_postmaster_start_time()) END)"
)
"""Returns a different number after each crash of PostgreSQL, which reuses the ids of transactions lost in a crash.

A crash, even of one backend, resets the statistics; an orderly shutdown keeps them. Before PostgreSQL 15 they are
read from a file, which takes too long.
"""


XID: Final = f"pg_current_xact_id() || ' ' || {_LAST_CRASH}"
"""Returns the id for `postgres_outcome`."""

LEVEL: Final = "read committed"
"""PostgreSQL's name of the level. Lower case, so that only a COMMIT matches a search for "COMMIT" in what is sent."""

READ_COMMITTED: Final = f"SET TRANSACTION ISOLATION LEVEL {LEVEL}"
"""Sets the level of a transaction in which nothing was sent yet."""

BEGIN: Final = f"BEGIN ISOLATION LEVEL {LEVEL}"
"""Begins a transaction that locks its row, so that later statements read nothing older than the lock."""


def postgres_bound_and_xid(remaining: float, *, level: bool = False, backend: bool = False) -> str:
    """Return a SELECT that bounds this transaction's statements; its second column is the id for `postgres_outcome`.

    With *level*, its third column is the isolation level; with *backend*, its last is the pid of the server process.
    """
    more = ", current_setting('transaction_isolation')" if level else ""
    more += ", pg_backend_pid()" if backend else ""
    return (
        f"SELECT set_config('statement_timeout', '{bound_milliseconds(remaining)}', true), "
        f"{XID} AS pg_current_xact_id{more}"
    )


def postgres_outcome(xid: str) -> str:
    """Return a SELECT of 'committed', 'aborted', 'in progress', or NULL: too long ago, or lost in a crash.

    The server raises while no transaction has that id: it may be starting up, or have crashed.
    """
    number, last_crash = xid.split()
    return (
        f"SELECT CASE WHEN status <> 'committed' OR {_LAST_CRASH} = {Decimal(last_crash)} THEN status END "  # noqa: S608 - of numbers
        f"FROM (SELECT pg_xact_status(CAST('{int(number)}' AS xid8)) AS status) AS asked"
    )


_PREFIX: Final = "SET STATEMENT"


def mariadb_prefix(remaining: float) -> str:
    """Return the prefix that bounds one statement, with its waits for locks (no executemany), and leaves no trace."""
    return f"{_PREFIX} max_statement_time={bound_seconds(remaining):.3f} FOR "


def bounded_mysql(statement: str, remaining: float, *, mariadb: bool) -> str:
    """Return *statement* with its bound, if it can have one."""
    place = (_remembered if len(statement) <= REMEMBERED else _place)(statement, mariadb)
    if place is None:
        return statement
    if mariadb:
        return mariadb_prefix(remaining) + statement
    return f"{statement[:place]} {mysql_hint(remaining)}{statement[place:]}"


def _place(statement: str, mariadb: bool) -> int | None:  # noqa: FBT001 - `lru_cache` is quicker so
    """Return where the bound of *statement* is put into it; None if it can have none."""
    begin, word = start(statement), first_word(statement)
    if "(" in statement[:begin]:  # a UNION: neither of the two fits
        return None
    if mariadb:
        return 0 if word in _BOUNDED else None
    return begin + len(word) if word == "SELECT" else None


_remembered: Final = lru_cache(maxsize=512)(_place)


_BOUNDED: Final = frozenset({"SELECT", "INSERT", "UPDATE", "DELETE", "REPLACE"})


def without_prefix(statement: str) -> str:
    """Return *statement* without the prefix of `mariadb_prefix`."""
    return statement.partition(" FOR ")[2] if statement.startswith(_PREFIX) else statement


def mysql_hint(remaining: float) -> str:
    """Return the hint that bounds a SELECT. MySQL bounds no other statements, except by their waits for locks."""
    return f"/*+ MAX_EXECUTION_TIME({bound_milliseconds(remaining)}) */"


MYSQL_ENDS: Final = "SELECT @@innodb_rollback_on_timeout"
"""Asks whether a lock wait timeout has rolled back the whole transaction."""


def mysql_read_committed(*, mariadb: bool) -> str:
    """Set the session to READ COMMITTED, except on a server whose binary log is of statements, which refuses it."""
    name = "tx_isolation" if mariadb else "transaction_isolation"
    of_statements = "@@log_bin AND @@binlog_format = 'STATEMENT'"
    return f"SET SESSION {name} = IF({of_statements}, @@{name}, 'READ-COMMITTED')"


def mysql_lock_bound(remaining: float) -> str:
    """Bound the lock waits of this session, in whole seconds, until it is set again (to DEFAULT)."""
    return f"SET SESSION innodb_lock_wait_timeout = {max(1, ceil(bound_seconds(remaining)))}"

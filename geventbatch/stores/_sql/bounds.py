"""How a server is made to end a slow statement before the deadline; how a transaction begins, what tells its end.

Imports no vendor.
"""

from __future__ import annotations

from decimal import Decimal
from math import ceil
from typing import Final

from geventbatch.stores._sql.statements import first_word, start

SEPARATOR: Final = "\n; "
"""Between several statements in one message. Each begins on a line of its own: the one before may end in a comment."""


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

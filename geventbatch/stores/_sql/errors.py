"""The errors that a scope raises for errors of a SQL database, under any ORM. Imports no vendor.

- `kind` tells what a driver's error means, bare or in an ORM's wrapper (`driver_errors`).
- `not_saved` returns what a scope raises for an error before COMMIT, `of_commit` for an error of COMMIT itself;
  `commit.resolve` finds out what became of that.
- `MARK` marks the error of a statement that fails on purpose.
"""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING, Final

from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, NotSaved, Rejected
from geventbatch.stores._conflict import changed
from geventbatch.stores._sql.driver_errors import (
    OF_OPERATION,
    Kind,
    chain,
    has_ended,
    has_refused_commit,
    is_duplicate,
    is_of_schema,
    kind,
    lacks_something,
    may_have_ended,
    message,
    state,
    table_of,
    tell_of_driver,
)

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = [
    "MARK",
    "OF_OPERATION",
    "Kind",
    "as_not_saved",
    "chain",
    "changed",
    "has_ended",
    "has_no_xmin",
    "inserted",
    "is_duplicate",
    "is_marked",
    "is_of_schema",
    "kind",
    "may_have_ended",
    "not_saved",
    "of_commit",
    "of_save",
    "of_store",
    "state",
    "table_of",
    "tell_of_driver",
]


def not_saved(error: BaseException, key: Hashable) -> NotSaved:
    """Return what a scope raises ``from`` *error*, which came before COMMIT was sent: nothing was written."""
    found = kind(error)
    why = f"{shown(key)} was not saved, nothing was written: {found.value} ({_first_line(error)})"
    if found is Kind.CONFLICT:
        return Conflict(why)
    if found not in OF_OPERATION:
        return NotSaved(why)
    refused = Rejected(why)
    refused.of_schema = lacks_something(error)
    return refused


def of_save(refused: NotSaved, error: BaseException | None, statement: str | None = None) -> NotSaved:
    """Return *refused*, for *error* of a save that was the store's own *statement*, whatever operations were in it.

    If that fails for any data, it is no operation's fault: no operation is to be looked for.
    """
    if error is None or not (isinstance(refused, Rejected) and is_of_schema(error, statement)):
        return refused
    found = NotSaved(*refused.args)
    found.__cause__ = refused.__cause__
    return found


def of_store(error: BaseException, key: Hashable) -> NotSaved:
    """Return what a scope raises for an error of the store's own statement, which is no operation's fault."""
    found = not_saved(error, key)
    return found if isinstance(found, Conflict) else NotSaved(*found.args)


def of_commit(error: BaseException, key: Hashable) -> NotSaved | None:
    """Return what a scope raises for an error of COMMIT; None if it does not tell whether COMMIT was carried out."""
    return not_saved(error, key) if has_refused_commit(error) else None


def inserted(key: Hashable) -> Conflict:
    """Return the `Conflict` of a save whose new row is there already."""
    return Conflict(f"{shown(key)} was not saved, nothing was written: somebody else has inserted it meanwhile")


def as_not_saved(error: BaseException, key: Hashable, *, committing: bool = False) -> NotSaved | None:
    """Return what a store of your own is to raise ``from`` *error*, an error of a database.

    Known are psycopg, psycopg2, pg8000, sqlite3, PyMySQL, mysqlclient, mysql-connector-python and MariaDB's connector,
    bare or in the wrapper of SQLAlchemy, of Django or of any ORM that raises its error ``from`` the driver's.

    Args:
        error: The exception.
        key: The resource's key, for the message.
        committing: Whether it came out of COMMIT. Otherwise COMMIT was not sent, and nothing was written.

    Returns:
        A `Conflict` (a deadlock, a serialization failure: the batch is replayed), a `Rejected` (a constraint, a value
        that the database or the driver refuses: an operation's fault), another `NotSaved` (the connection, the time);
        None if the error does not tell: then raise *error* itself, and callers are told that the outcome is unknown.
    Switches: no.
    """
    if committing:
        return of_commit(error, key)
    return None if kind(error) is Kind.OTHER else not_saved(error, key)


def _first_line(error: BaseException) -> str:
    text = said(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


MARK: Final = f"the row is another one {token_hex(8)}"
"""In the error of a statement that fails on purpose. Random in each process, so that no user's text contains it."""

_NO_NUMBER: Final = "22P02"
"""The SQLSTATE of a text that is no number, as `MARK`."""


def is_marked(error: BaseException) -> bool:
    """Return whether a statement that fails on purpose, with `MARK`, has raised *error*."""
    return any(state(one) == _NO_NUMBER for one in chain(error)) and MARK in message(error)


_NO_COLUMN: Final = "42703"


def has_no_xmin(error: BaseException) -> bool:
    """Return whether *error* says that the relation has no `xmin`: it is a view, no table."""
    return any(state(one) == _NO_COLUMN for one in chain(error)) and "xmin" in message(error)

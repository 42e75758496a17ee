"""What a scope raises for an error of a SQL database, whichever ORM stands before it. Imports no vendor.

- `kind` says what an error of a driver means, bare or in an ORM's wrapper (`driver_errors`).
- `not_saved` makes of an error before COMMIT what a scope raises, `of_commit` of one that came out of COMMIT;
  `commit.settle` finds out what became of that.
- `MARK` tells the error of a statement that fails by intention.
"""

from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING, Final

from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, NotSaved, Rejected
from geventbatch.stores._sql.driver_errors import (
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

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = [
    "MARK",
    "Kind",
    "as_not_saved",
    "chain",
    "has_ended",
    "has_no_xmin",
    "is_duplicate",
    "is_marked",
    "kind",
    "may_have_ended",
    "not_saved",
    "of_commit",
    "of_store",
    "state",
    "table_of",
    "tell_of_driver",
]


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


def as_not_saved(error: BaseException, key: Hashable, *, committing: bool = False) -> NotSaved | None:
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

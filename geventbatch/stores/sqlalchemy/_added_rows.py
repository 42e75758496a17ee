"""Inserts the rows of `Batch.add_row` in bulk with the save, in the order in which they were added."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from sqlalchemy import Insert, Table, insert, inspect
from sqlalchemy.orm import Session
from sqlalchemy.orm.state import InstanceState

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection


def insert_rows(connection: Connection, rows: Sequence[object], session: Session | None = None) -> None:
    """Insert *rows* in the transaction of *connection*: instances first, through *session* or one of their own.

    Each is a mapped instance, a pair of a `Table` (or a mapped class) and the dictionary of its values, or an `insert`
    statement. Neighbours of one table and with the same columns go into one statement.
    """
    if not rows:
        return
    instances = [row for row in rows if is_instance(row)]
    if instances:
        used = Session(connection) if session is None else session
        used.add_all(instances)
        used.flush()
    for table, pairs in groupby((row for row in rows if not is_instance(row)), _group):
        if table is None:
            for statement in pairs:
                connection.execute(_statement(statement))
        else:
            connection.execute(insert(table[0]).inline(), [dict(_pair(pair)[1]) for pair in pairs])


def insert_rows_in_savepoint(connection: Connection, rows: Sequence[object]) -> None:
    """Insert *rows* after a savepoint, so that a session's failure does not roll back the whole transaction."""
    if not any(is_instance(row) for row in rows):
        insert_rows(connection, rows)
        return
    with Session(connection, join_transaction_mode="create_savepoint", expire_on_commit=False) as session:
        insert_rows(connection, rows, session)
        session.commit()


def is_instance(row: object) -> bool:
    """Return whether *row* is an instance of a mapped class."""
    # The first question is the quick one; it is asked of each row, several times.
    return type(row) is not tuple and isinstance(inspect(row, raiseerr=False), InstanceState)


def _group(row: object) -> tuple[Any, tuple[str, ...]] | None:
    if isinstance(row, Insert):
        return None
    table, values = _pair(row)
    return table, tuple(values)


def _pair(row: object) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(row, tuple) and len(row) == 2 and (isinstance(row[0], (Table, type))):  # noqa: PLR2004 - a pair
        return row
    raise TypeError(
        f"add_row() was given {shown(row)}: pass a mapped instance, a pair of a Table and a dict, or an insert() "
        "statement"
    )


def _statement(row: object) -> Insert:
    if isinstance(row, Insert):
        return row.inline()  # the server's primary keys are not needed
    raise TypeError(row)

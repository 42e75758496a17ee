"""The table of outcomes of a store without an ORM: its statements for either database, and how it is created."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from geventbatch._safe_repr import named
from geventbatch.stores._sql.outcomes import ID_LENGTH, OutcomeTable
from geventbatch.stores.sql._transaction import is_mysql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.stores.sql._connections import Connections

_PART: Final = r"(?:[\w$]+|\"[^\"%]+\"|`[^`%]+`)"
_NAME: Final = re.compile(rf"{_PART}(?:\.{_PART})?")

_PATIENCE: Final = 30.0
"""Seconds to wait for a connection, where no batch does."""


class Statements(NamedTuple):
    """The statements of one table in either database."""

    postgresql: OutcomeTable
    mysql: OutcomeTable


def statements(name: Any, seconds: float) -> Statements:
    """Check the option ``idempotency``, and return the statements of the table of that *name*."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise TypeError(f"idempotency is {named(name)}, but must be the name of a table, or None")
    return Statements(OutcomeTable(name, "postgresql", seconds), OutcomeTable(name, "mysql", seconds))


def create(table: Statements, connections: Connections) -> None:
    """Create the table, unless it exists. Several processes may do so at once. Switches: yes."""
    for last in (False, True):
        try:
            with _sending(connections) as driver:
                for text in _CREATE[is_mysql(driver)]:
                    driver.cursor().execute(text.format(name=table.postgresql.name, index=_index(table)))
        except Exception:  # another process has created it at the same time
            if last:
                raise
        else:
            return


def purge(table: Statements, connections: Connections, limit: int) -> int:
    """Delete so many expired outcomes as *limit* at the most, and return their number. Switches: yes."""
    with _sending(connections) as driver:
        outcomes = table.mysql if is_mysql(driver) else table.postgresql

        def send(text: str, parameters: Any) -> Any:
            cursor = driver.cursor()
            cursor.execute(text, parameters)
            return cursor

        return outcomes.purge(send, limit)


@contextmanager
def _sending(connections: Connections) -> Iterator[Any]:
    """Yield the driver's connection, and commit. Switches: yes."""
    lent = connections.lend(lambda: _PATIENCE)
    try:
        driver = connections.raw(lent)
        yield driver
        driver.commit()
    except BaseException:
        connections.discard(lent)
        raise
    connections.take_back(lent)


def _index(table: Statements) -> str:
    return re.sub(r"\W", "_", table.postgresql.name.rpartition(".")[2].strip('"`')) + "_expires"


_CREATE: Final = {
    False: (
        (
            f'CREATE TABLE IF NOT EXISTS {{name}} (id varchar({ID_LENGTH}) COLLATE "C" PRIMARY KEY, '
            "outcome text NOT NULL, expires bigint NOT NULL)"
        ),
        # Rows expire roughly in the order of their insertion, for which this kind of an index costs nothing.
        "CREATE INDEX IF NOT EXISTS {index} ON {name} USING brin (expires)",
    ),
    True: (
        (
            f"CREATE TABLE IF NOT EXISTS {{name}} (id varchar({ID_LENGTH}) CHARACTER SET ascii COLLATE ascii_bin "
            "PRIMARY KEY, outcome longtext CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL, expires bigint NOT NULL"
            ", INDEX {index} (expires))"
        ),
    ),
}

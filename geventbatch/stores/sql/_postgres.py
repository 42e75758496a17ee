"""A batch's transaction on PostgreSQL: which statements are one message, and what became of a COMMIT."""

from __future__ import annotations

import re
from abc import abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from geventbatch.stores._sql import bounds, commit, errors
from geventbatch.stores._sql.driver_errors import message as driver_message
from geventbatch.stores._sql.joined import checked, insert_of_a_row
from geventbatch.stores.sql._transaction import (
    SAVEPOINT,
    Change,
    Save,
    Transaction,
    grouped,
    lost,
    remaining,
    unfit,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from geventbatch.errors import NotSaved

_LOST: Final = re.compile(rf"(\d+) {errors.MARK} (\d+)")

_DATA_EXCEPTION: Final = "22"
"""The class of the SQLSTATEs of values."""

SEPARATOR: Final = bounds.SEPARATOR.encode()


@lru_cache(maxsize=1000)
def _checked(text: str, number: int) -> str:
    return checked(f"{text}\n RETURNING 1", 1, f"{errors.MARK} {number}")


class PostgresTransaction(Transaction):
    """PostgreSQL. A statement that finds another number of rows than one fails, so that COMMIT may be behind it."""

    # -- mutable state ---------------------------------------------------------------------------------------
    xid: str | None = None  # to ask what became of the transaction
    _changes: Sequence[Change] = ()  # that are being written
    asked: tuple[bytes, dict[str, Any]] | None = None  # the message that loads, once it is made, and its parameters

    unmade: tuple[type[Exception], ...]
    """What the driver raises for a value of which it makes no text."""
    unfit: tuple[type[Exception], ...]
    """What it raises for a statement whose parameters it cannot put in."""

    @abstractmethod
    def decoded(self, message: bytes) -> str:
        """Return *message* as a text. Switches: no."""

    @abstractmethod
    def texts(self, query: str, every: Iterable[Any]) -> list[bytes]:
        """Return *query* with each of these parameters. Switches: no."""

    def text(self, query: str, parameters: dict[str, Any]) -> bytes:
        """Return *query* with these parameters. Switches: no."""
        return self.texts(query, [parameters])[0]

    def status(self) -> int | None:
        """Return the transaction's status, as `commit.transaction_status` does. Switches: no."""
        return commit.transaction_status(self.driver)

    def is_idle(self) -> bool:
        return self.status() == commit.IDLE

    def begin_again(self) -> None:
        if self.is_idle():  # else the driver has begun by itself
            self.send(bounds.BEGIN, None)

    def is_usable(self) -> bool:
        return self.status() not in {commit.ACTIVE, commit.UNKNOWN, None}

    def refuses_key(self, error: Exception) -> bool:
        if self.asked is None:
            return isinstance(error, self.unmade)
        message, parameters = self.asked
        place = int(getattr(getattr(error, "diag", None), "statement_position", None) or 0)
        if not place or not (errors.state(error) or "").startswith(_DATA_EXCEPTION):
            return False
        told = self.decoded(message)  # the place is counted in characters, from 1
        values = [self.decoded(self.text(f"%({name})s", parameters)) for name in parameters]
        # Elsewhere it is a constant of the statement, which fails for any key; and an error of a row has no place.
        return any(told.startswith(value, at) for value in values for at in range(max(place - len(value), 0), place))

    def has_refused_commit(self) -> bool:
        return self.status() == commit.IDLE  # a refused statement of the same message leaves a failed transaction

    def is_at_fault(self, change: Change) -> bool:
        try:
            self.fetch(f"EXPLAIN {change.statement.text}", change.parameters)  # it locks no row, and runs no trigger
        except Exception as error:
            return errors.is_of_schema(error)
        return False

    def was_not_committed(self) -> bool:
        return commit.was_not_committed(self.driver)

    def not_saved(self, error: Exception) -> NotSaved:
        if errors.is_marked(error) and (found := _LOST.search(driver_message(error))) is not None:
            return lost(self._changes[int(found[2])], int(found[1]))
        return super().not_saved(error)

    def ask_outcome(self) -> bool | None:
        if self.xid is None:
            return None
        return commit.postgres_fate(self.xid, self._once, remaining())

    def _once(self, question: str) -> str | None:
        try:
            with self.connections.beside(self.key) as lent:
                driver = self.connections.raw(lent)
                cursor = driver.cursor()
                cursor.execute(question)
                (row,) = cursor.fetchall()
                driver.rollback()
        except Exception:
            return commit.NO_ANSWER
        status: str | None = row["status"] if isinstance(row, dict) else row[0]
        return status

    def statements(self, save: Save) -> list[bytes]:
        """Return the statements of a save, with their values. Switches: no."""
        self._changes = save.changes
        found = [bounds.postgres_bound(remaining()).encode()]
        if save.stays:
            found.append(SAVEPOINT.encode())
        if save.recording is not None:
            text, parameters = save.recording.statement()
            found += self.texts(text, [parameters])
        for number, change in enumerate(save.changes):
            found.append(self.text(_checked(change.statement.text, number), change.parameters))
        for text, every in grouped(save.rows, mysql=False) if save.rows else ():
            try:
                found += self._of_rows(text, every)
            except self.unfit as error:
                raise unfit(text, error) from error
        return found

    def _of_rows(self, text: str, every: Sequence[Any]) -> list[bytes]:
        inserts = insert_of_a_row(text) if len(every) > 1 and "%" not in text.partition("(")[0] else None
        if inserts is None:
            return self.texts(text, every)
        head, values = inserts
        return [self.texts(head, [None])[0] + b", ".join(self.texts(values, every))]

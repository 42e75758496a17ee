"""A table of outcomes: the results of operations that had an idempotency key. Imports no vendor.

It has three columns: ``id``, a digest of the resource's name followed by the idempotency key; ``outcome``, as in
`Batch.outcomes`; and ``expires``, in whole seconds of Unix time. An expired row counts as absent.

An insert of an id that another transaction has inserted waits until that transaction has ended. So if two batches have
the same key at the same time, in any processes, one is saved, and the other one finds its outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import blake2b
from math import ceil
from typing import TYPE_CHECKING, Any, Final

from geventbatch._check_values import check_seconds
from geventbatch._idempotency.value_text import encode
from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, NotSaved, Repeated
from geventbatch.stores._sql import errors

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

ID_LENGTH: Final = 300
"""Characters: 32 of a digest, a colon, 255 of an idempotency key."""

DAY: Final = 86_400.0
"""Seconds: the default of ``idempotency_ttl``."""

_DIGEST: Final = 33
_QUOTES: Final = '"`'
_AT_ONCE: Final = 500
"""Parameters of one IN. Old versions of SQLite have a limit of 999."""

Send = Callable[[str, Any], Any]
"""Sends a statement with a tuple of parameters, or a list of tuples. Returns what has ``rowcount`` and ``fetchall()``:
a cursor of the DB-API, say."""


@dataclass(frozen=True)
class OutcomeTable:
    """The table's statements, in the form of a DB-API driver."""

    name: str
    """The table's name, quoted, with its schema."""
    vendor: str
    """'postgresql', 'sqlite', 'mysql', or any other."""
    seconds: float
    """How long an outcome is kept."""
    mark: str = "%s"
    """The driver's placeholder of a parameter."""

    def insert(self, count: int) -> str:
        """Return the statement that inserts *count* rows."""
        mark = self.mark
        rows = f"VALUES {', '.join([f'({mark}, {mark}, {mark})'] * count)}"
        if self.vendor == "postgresql" and count > 1:
            # Two texts for all rows: in arrays, a driver written in Python would convert each element.
            arrays = ", ".join([f"string_to_array({mark}, chr(10))"] * 2)
            rows = f"SELECT {mark} || i, o, {mark} FROM unnest({arrays}) AS r(i, o)"
        return f"INSERT INTO {self.name} (id, outcome, expires) {rows}"

    def purge(self, send: Send, limit: int) -> int:
        """Delete up to *limit* expired rows in the caller's transaction, and return their number. Switches: yes."""
        mark, name = self.mark, self.name
        now = int(time.time())
        some = f"SELECT id FROM {name} WHERE expires <= {mark} LIMIT {mark}"
        if self.vendor == "postgresql":
            # An array, since PostgreSQL may run a subquery with LIMIT in an IN again for each row. Two purges do not
            # wait.
            some = f"ANY (ARRAY({some} FOR UPDATE SKIP LOCKED))"
            return int(send(f"DELETE FROM {name} WHERE id = {some}", (now, limit)).rowcount)
        if self.vendor == "sqlite":
            return int(send(f"DELETE FROM {name} WHERE id IN ({some})", (now, limit)).rowcount)
        if self.vendor == "mysql":
            return int(send(f"DELETE FROM {name} WHERE expires <= {mark} LIMIT {mark}", (now, limit)).rowcount)
        return int(send(f"DELETE FROM {name} WHERE expires <= {mark}", (now,)).rowcount)


def seconds_to_keep(seconds: Any, idempotency: object) -> float:
    """Check the option ``idempotency_ttl`` beside the option ``idempotency``, and return the seconds."""
    if seconds is None:
        return DAY
    if idempotency is None:
        raise TypeError(f"idempotency_ttl is {shown(seconds)}, but no outcomes are recorded: pass idempotency=… too")
    check_seconds("idempotency_ttl", seconds, positive=True)
    return float(seconds)


class Outcomes:
    """The outcomes of one resource."""

    def __init__(self, table: OutcomeTable, store: str, key: Hashable) -> None:
        """Name the resource at *key* in *store*: other stores may share the table."""
        try:
            name = encode([store, _canonical(key)])
        except Exception:  # the key's type is the user's own
            name = f"{store} {shown(key)}"
        self.key = key
        self.table = table
        self.prefix = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() + ":"

    def find(self, send: Send, keys: Iterable[str]) -> dict[str, str]:
        """Return the recorded outcomes of *keys*. Raises `Conflict` for a deadlock. Switches: yes."""
        mark, name = self.table.mark, self.table.name
        # A plain SELECT of MySQL's would return the rows as they were at the load.
        lock = " LOCK IN SHARE MODE" if self.table.vendor == "mysql" else ""
        wanted = [f"{self.prefix}{key}" for key in keys]
        found: dict[str, str] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ", ".join([mark] * len(some))
            query = f"SELECT id, outcome FROM {name} WHERE expires > {mark} AND id IN ({marks}){lock}"
            try:
                rows = send(query, (int(time.time()), *some)).fetchall()
            except Exception as error:
                if errors.kind(error) is errors.Kind.CONFLICT:
                    raise errors.not_saved(error, self.key) from error
                raise
            found |= {row[0][_DIGEST:]: row[1] for row in rows}
        return found


def _canonical(key: Hashable) -> Any:
    """Return a plain value that is the same for keys that are equal."""
    if isinstance(key, tuple):
        return tuple(map(_canonical, key))
    if isinstance(key, Decimal) and key.is_finite():
        return "decimal", *key.as_integer_ratio()
    if isinstance(key, datetime) and key.utcoffset() is not None:
        return key.astimezone(UTC)
    return key


class Recording:
    """The outcomes that one save records."""

    def __init__(self, outcomes: Outcomes, kept: Mapping[str, str]) -> None:
        """Take *kept*, by idempotency key, from `Batch.outcomes`."""
        self._outcomes = outcomes
        self._kept = kept

    def send(self, send: Send) -> None:
        """Insert all by one statement, which fails if one of them is there. Switches: yes."""
        table = self._outcomes.table
        if table.vendor == "sqlite":  # it limits the number of parameters
            send(table.insert(1), self._rows())
        else:
            send(*self.statement())

    def statement(self) -> tuple[str, tuple[object, ...]]:
        """Return that statement, and its parameters."""
        outcomes, kept = self._outcomes, self._kept
        insert = outcomes.table.insert(len(kept))
        if outcomes.table.vendor != "postgresql" or len(kept) == 1:
            return insert, tuple(value for row in self._rows() for value in row)
        keys = sorted(kept)
        return insert, (outcomes.prefix, self._expires(), "\n".join(keys), "\n".join([kept[key] for key in keys]))

    def check(
        self,
        error: BaseException,
        send: Send,
        roll_back: Callable[[], object],
        begin_to_write: Callable[[], object],
    ) -> NotSaved | None:
        """Return the `NotSaved` for *error* if our INSERT caused it (after rolling back), else None. Switches: yes.

        A save deletes expired outcomes only here, since a key rarely comes again after so long.
        """
        if not errors.is_duplicate(error):
            return None
        try:
            roll_back()
            return self._in_the_way(error, send, begin_to_write)
        except NotSaved:
            raise
        except Exception as failed:
            raise errors.of_store(failed, self._outcomes.key) from failed

    def _in_the_way(self, error: BaseException, send: Send, begin_to_write: Callable[[], object]) -> NotSaved | None:
        key, table = self._outcomes.key, self._outcomes.table
        found = self._outcomes.find(send, self._kept)
        if found:
            told = f"{shown(key)} was not saved: {len(found)} of its idempotency keys are recorded already"
            return Repeated(told, outcomes=found)
        begin_to_write()
        expired = [(row[0], int(time.time())) for row in self._rows()]
        deletion = f"DELETE FROM {table.name} WHERE id = {table.mark} AND expires <= {table.mark}"
        if send(deletion, expired).rowcount or self._is_ours(error):  # or another process has just deleted them
            return Conflict(f"{shown(key)} was not saved: outcomes were in the way that have expired")
        return None

    def _is_ours(self, error: BaseException) -> bool:
        """Return whether *error* names one of our ids; SQLite's names the column."""
        if (table := errors.table_of(error)) is not None:  # PostgreSQL reports it apart from the row's values
            return table == self._outcomes.table.name.rpartition(".")[2].strip(_QUOTES)
        told = said(getattr(error, "orig", error))
        column = f" {self._outcomes.table.name.rpartition('.')[2].strip(_QUOTES)}.id"
        return self._outcomes.prefix in told or column in told

    def _expires(self) -> int:
        return int(time.time()) + ceil(self._outcomes.table.seconds)

    def _rows(self) -> list[tuple[str, str, int]]:
        """Return the rows in the order of their keys, so that two saves never deadlock."""
        expires = self._expires()
        return [(f"{self._outcomes.prefix}{key}", self._kept[key], expires) for key in sorted(self._kept)]

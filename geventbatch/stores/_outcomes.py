"""A table of outcomes: what came of the operations that had an idempotency key. Imports no vendor.

It has three columns: ``id``, a digest of the resource's name and the idempotency key behind it; ``outcome``, as
`Batch.outcomes` has it; and ``expires``, in whole seconds of Unix time. A row that has expired counts as absent.

An insert that finds a row there waits until that one's transaction has ended. So of two batches that have the same key
at the same time, in whatever process, one is saved, and the other one finds what it has saved.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import ceil, inf
from typing import TYPE_CHECKING, Any, Final

from geventbatch._plain import REFUSALS, encode
from geventbatch.errors import Conflict, Repeated
from geventbatch.stores import _sql

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from geventbatch.errors import NotSaved

ID_LENGTH: Final = 300
"""Characters: 32 of a digest, a colon, 255 of an idempotency key."""

DAY: Final = 86_400.0
"""Seconds that outcomes are kept unless the user says otherwise."""

_DIGEST: Final = 33
_AT_ONCE: Final = 500
"""Parameters of one IN; SQLite has had a limit of 999."""

_REPEATED: Final = "idempotency keys are new of"
_TOLD: Final = re.compile(rf'"\d+ {_REPEATED} \d+"')


Send = Callable[[str, Any], Any]
"""Sends a statement, with a tuple of parameters, or a list of such tuples, and gives what
has a ``rowcount``, and a ``fetchall()``: a cursor of the DB-API, or more."""


@dataclass(frozen=True)
class OutcomeTable:
    """What is sent for it, in the form of a DB-API driver."""

    name: str
    """Quoted, with its schema."""
    vendor: str
    """'postgresql', 'sqlite', 'mysql', or any other."""
    seconds: float
    """That an outcome is kept."""
    mark: str = "%s"
    """That stands for a parameter."""

    @cached_property
    def add(self) -> str:
        """For PostgreSQL and SQLite: insert, or take the place of what has expired; leave what has not."""
        mark, name = self.mark, self.name
        rows = f"VALUES ({mark}, {mark}, {mark})"
        if self.vendor == "postgresql":
            # Two texts for all rows: of arrays, a driver in Python would convert each element.
            arrays = f"string_to_array({mark}, chr(10))"
            rows = f"SELECT i, o, {mark} FROM unnest({arrays}, {arrays}) AS r(i, o)"  # noqa: S608 - of ours
        return (
            f"INSERT INTO {name} (id, outcome, expires) {rows} ON CONFLICT (id) DO UPDATE "
            f"SET outcome = excluded.outcome, expires = excluded.expires WHERE {name}.expires <= {mark}"
        )

    def insert(self, count: int) -> str:
        """For any other: insert so many."""
        row = f"({', '.join([self.mark] * 3)})"
        return f"INSERT INTO {self.name} (id, outcome, expires) VALUES {', '.join([row] * count)}"  # noqa: S608 - ours

    def add_or_fail(self, count: int) -> str:
        """The same for PostgreSQL: a statement that fails unless all are new, and so keeps a COMMIT from happening."""
        return (
            f"WITH added AS ({self.add} RETURNING 1) SELECT CASE count(*) WHEN {count} THEN 1 "  # noqa: S608 - ours
            f"ELSE CAST(count(*) || ' {_REPEATED} {count}' AS integer) END FROM added"
        )

    def purge(self, send: Send, limit: int) -> int:
        """Delete some that have expired; give how many. In a transaction of the caller's. Switches: yes."""
        mark, name = self.mark, self.name
        now = int(time.time())
        if self.vendor in {"postgresql", "sqlite"}:
            # So that two of them at once do not wait for each other.
            skip = " FOR UPDATE SKIP LOCKED" if self.vendor == "postgresql" else ""
            some = f"SELECT id FROM {name} WHERE expires <= {mark} LIMIT {mark}{skip}"  # noqa: S608 - ours
            return int(send(f"DELETE FROM {name} WHERE id IN ({some})", (now, limit)).rowcount)  # noqa: S608
        if self.vendor == "mysql":
            return int(send(f"DELETE FROM {name} WHERE expires <= {mark} LIMIT {mark}", (now, limit)).rowcount)  # noqa: S608
        return int(send(f"DELETE FROM {name} WHERE expires <= {mark}", (now,)).rowcount)  # noqa: S608


def seconds_to_keep(option: str, seconds: object) -> float:
    """Check an option that is a number of seconds."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{option} is {seconds!r}, but must be a number of seconds")
    if not 0 < seconds < inf:
        raise ValueError(f"{option} is {seconds!r}, but must be more than 0 seconds, and finite")
    return float(seconds)


class NotNew(Exception):
    """Some of what was to be recorded is there. Roll back what was inserted, then see `Recording.repeated`."""


class Outcomes:
    """The outcomes of one resource, in a table."""

    def __init__(self, table: OutcomeTable, store: str, key: Hashable) -> None:
        """Of the resource at *key* in *store*: other stores may share the table."""
        try:
            name = encode([store, key])
        except REFUSALS:  # a key of a type of the user's own
            name = f"{store} {key!r}"
        self.key = key
        self.table = table
        self.prefix = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() + ":"

    def find(self, send: Send, keys: Iterable[str]) -> dict[str, str]:
        """Those of *keys* that are recorded, and have not expired. Switches: yes."""
        mark, name = self.table.mark, self.table.name
        # Else MySQL would show them as they were at the load.
        lock = " LOCK IN SHARE MODE" if self.table.vendor == "mysql" else ""
        wanted = [f"{self.prefix}{key}" for key in keys]
        found: dict[str, str] = {}
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            marks = ", ".join([mark] * len(some))
            query = f"SELECT id, outcome FROM {name} WHERE expires > {mark} AND id IN ({marks}){lock}"  # noqa: S608 - ours
            found |= {row[0][_DIGEST:]: row[1] for row in send(query, (int(time.time()), *some)).fetchall()}
        return found


class Recording:
    """What one save has to record."""

    def __init__(self, outcomes: Outcomes, kept: Mapping[str, str]) -> None:
        """By idempotency key, as `Batch.outcomes` has it."""
        self._outcomes = outcomes
        self._kept = kept
        self._now = int(time.time())
        self._expires = self._now + ceil(outcomes.table.seconds)

    def send(self, send: Send) -> None:
        """Insert it all, by one statement. Raises `NotNew` when some of it is there. Switches: yes."""
        table = self._outcomes.table
        if table.vendor == "postgresql":
            added = send(table.add, self._texts()).rowcount
        elif table.vendor == "sqlite":
            added = send(table.add, [(*row, self._now) for row in self._rows()]).rowcount
        else:
            added = self._insert(send)
        if added != len(self._kept):
            raise NotNew

    def checked(self) -> tuple[str, tuple[object, ...]]:
        """A statement for PostgreSQL that does the same, and fails when some of it is there: see `is_repeated`."""
        return self._outcomes.table.add_or_fail(len(self._kept)), self._texts()

    def repeated(self, send: Send) -> NotSaved:
        """What to raise when not all of it was new, and the transaction was rolled back. Switches: yes."""
        key = self._outcomes.key
        found = self._outcomes.find(send, self._kept)
        if not found:  # it has expired since then
            return Conflict(f"{key!r} was not saved: an idempotency key has expired just now")
        told = f"{key!r} was not saved: {len(found)} of its idempotency keys are recorded already"
        return Repeated(told, outcomes=found)

    # In the order of the keys, so that two of them never deadlock.

    def _texts(self) -> tuple[object, ...]:
        keys, prefix = sorted(self._kept), self._outcomes.prefix
        ids = prefix + f"\n{prefix}".join(keys)
        return self._expires, ids, "\n".join([self._kept[key] for key in keys]), self._now

    def _rows(self) -> list[tuple[str, str, int]]:
        return [(f"{self._outcomes.prefix}{key}", self._kept[key], self._expires) for key in sorted(self._kept)]

    def _insert(self, send: Send) -> int:
        """Where an insert cannot be told to take the place of what has expired: try, and look when it fails."""
        table, rows = self._outcomes.table, self._rows()
        insert = table.insert(len(rows)), tuple(value for row in rows for value in row)
        try:
            send(*insert)
        except Exception as error:
            if not _sql.is_duplicate(error):
                raise
            if self._outcomes.find(send, self._kept):
                return 0
            mark = table.mark
            expired = [(row[0], self._now) for row in rows]
            send(f"DELETE FROM {table.name} WHERE id = {mark} AND expires <= {mark}", expired)  # noqa: S608 - ours
            send(*insert)
        return len(rows)


def is_repeated(error: BaseException) -> bool:
    """Whether *error* is a `NotNew`, or of a statement that `Recording.checked` gave, and says the same."""
    return isinstance(error, NotNew) or _TOLD.search(str(error)) is not None

"""A table of outcomes: the results of operations that had an idempotency key. Imports no vendor.

It has three columns: ``id``, a digest of the resource's name followed by the idempotency key; ``outcome``, as in
`Batch.outcomes`; and ``expires``, in whole seconds of Unix time. An expired row counts as absent.

An insert of an id that another transaction has inserted waits until that transaction has ended. So if two batches have
the same key at the same time, in any processes, one is saved, and the other one finds its outcome.

A scope of many keys has the outcomes of all its batches in one `Recording` of `OutcomesOfBulk`, which sends one
statement. It sends that before all writes: a repeated operation is not judged by what it would change. Its ``recorded``
is `OutcomesOfBulk.find`. If `Recording.check` returns a `Repeated`, the transaction (or all since a savepoint) is
rolled back. The scope raises that `Repeated`: then all batches are replayed, without the repeated operations. Or it
leaves out the batches that `repeated_of` names, saves the others again, and raises `PartlySaved`.
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
from geventbatch.errors import Conflict, NotSaved, Repeated, named, recorded_already
from geventbatch.stores._sql import errors

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from geventbatch._core.batch import Batch

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
        self.key = key
        self.table = table
        self.prefix = f"{_digest(_text_of(store, key))}:"

    def rest_of(self, name: str) -> str:
        """Return what follows the prefix in the id of the outcome that has this *name* in `Batch.outcomes`."""
        return name

    def is_named(self, told: str, names: Iterable[str]) -> bool:  # noqa: ARG002 - for a child
        """Return whether *told*, a database's message, has the id of one of the outcomes of these *names*."""
        return self.prefix in told

    def find(self, send: Send, names: Iterable[str]) -> dict[str, str]:
        """Return the recorded outcomes of these *names*. Raises `Conflict` for a deadlock. Switches: yes."""
        mark, name = self.table.mark, self.table.name
        # A plain SELECT of MySQL's would return the rows as they were at the load.
        lock = " LOCK IN SHARE MODE" if self.table.vendor == "mysql" else ""
        name_of = {f"{self.prefix}{self.rest_of(name)}": name for name in names}
        wanted = list(name_of)
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
            other = next((row[0] for row in rows if row[0] not in name_of), None)
            if other is not None:
                raise NotSaved(
                    f"{shown(self.key)} was not saved, nothing was written: the database takes an id of the table of "
                    f"outcomes for the other id {shown(other)}. The column id of {name} has to be compared byte by "
                    "byte: give it a binary collation (MySQL: CHARACTER SET ascii COLLATE ascii_bin)"
                )
            found |= {name_of[row[0]]: row[1] for row in rows}
        return found


class OutcomesOfBulk(Outcomes):
    """The outcomes of the resources of a bulk. Their names are `OutcomeName`s."""

    def __init__(self, table: OutcomeTable, name: Hashable, place: Callable[[Any], tuple[str, Hashable]]) -> None:
        """Call the bulk *name* in messages.

        *place* returns the store of a key, and the key as its row has it: what `Outcomes` gets where the store opens
        that key alone.
        """
        self.key = name
        self.table = table
        self.prefix = ""
        self._place = place
        # -- mutable state ---------------------------------------------------------------------------------
        self._ids: dict[str, str] = {}  # by name
        self._texts: dict[Hashable, str] = {}  # by key

    def rest_of(self, name: Any) -> str:
        """Return the id of the outcome of this name."""
        found = self._ids.get(name)
        if found is None:
            texts = [self._text(key) for key in name.keys]
            told = "\n".join(["across", *sorted(texts)]) if name.across else texts[0]
            found = self._ids[name] = f"{_digest(told)}:{name.idempotency_key}"
        return found

    def is_named(self, told: str, names: Iterable[str]) -> bool:
        """Return whether *told* has the beginning of such an id; a long one may be cut off."""
        return any(self.rest_of(name)[:_DIGEST] in told for name in names)

    def _text(self, key: Hashable) -> str:
        found = self._texts.get(key)
        if found is None:
            found = self._texts[key] = _text_of(*self._place(key))
        return found


def outcomes_of(batches: Iterable[Batch]) -> dict[str, str]:
    """Return all outcomes of *batches*, of which a bulk has each once for each of its keys."""
    found: dict[str, str] = {}
    for batch in dict.fromkeys(batches):
        if batch.attempt is not None and batch.attempt.outcomes:
            found |= batch.attempt.outcomes
    return found


def repeated_of(batches: Iterable[Batch], found: Mapping[str, str]) -> dict[Batch, Repeated]:
    """Return the error of each of *batches* of which outcomes are *found*; leave out the others."""
    repeated: dict[Batch, Repeated] = {}
    for batch in dict.fromkeys(batches):
        its = {name: found[name] for name in batch.outcomes if name in found}
        if its:
            told = f"{named(batch.loads)} not saved: {recorded_already(its)}"
            repeated[batch] = Repeated(told, outcomes=its)
    return repeated


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _text_of(store: str, key: Hashable) -> str:
    """Return a text for the resource at *key* in *store*."""
    try:
        return f"[{encode(store)},{encode(_canonical(key))}]"
    except Exception:  # the key's type is the user's own
        return f"{store} {shown(key)}"


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
        """Take *kept*, by name, from `Batch.outcomes`."""
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
        rests = sorted([(outcomes.rest_of(name), text) for name, text in kept.items()])
        told = ["\n".join(column) for column in zip(*rests, strict=True)]
        return insert, (outcomes.prefix, self._expires(), *told)

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
        no_table = errors.is_of_schema(error) and self._table_name in said(getattr(error, "orig", error))
        if not (no_table or errors.is_duplicate(error)):
            return None
        try:
            roll_back()
            if no_table:  # or no right to it: no operation's fault
                return errors.of_store(error, self._outcomes.key)
            return self._in_the_way(error, send, begin_to_write)
        except NotSaved:
            raise
        except Exception as failed:
            raise errors.of_store(failed, self._outcomes.key) from failed

    def _in_the_way(self, error: BaseException, send: Send, begin_to_write: Callable[[], object]) -> NotSaved | None:
        key, table = self._outcomes.key, self._outcomes.table
        found = self._outcomes.find(send, self._kept)
        if found:
            told = f"{shown(key)} was not saved: {recorded_already(found)}"
            return Repeated(told, outcomes=found)
        begin_to_write()
        expired = [(row[0], int(time.time())) for row in self._rows()]
        deletion = f"DELETE FROM {table.name} WHERE id = {table.mark} AND expires <= {table.mark}"
        told = f"{shown(key)} was not saved: outcomes were in the way that have expired"
        if send(deletion, expired).rowcount:
            return Repeated(told, outcomes={})
        return Conflict(told) if self._is_ours(error) else None  # another process has just deleted them

    def _is_ours(self, error: BaseException) -> bool:
        """Return whether *error* names one of our ids; SQLite's names the column."""
        if (table := errors.table_of(error)) is not None:  # PostgreSQL reports it apart from the row's values
            return table == self._table_name
        told = said(getattr(error, "orig", error))
        column = f" {self._table_name}.id"
        return column in told or self._outcomes.is_named(told, self._kept)

    @property
    def _table_name(self) -> str:
        return self._outcomes.table.name.rpartition(".")[2].strip(_QUOTES)

    def _expires(self) -> int:
        return int(time.time()) + ceil(self._outcomes.table.seconds)

    def _rows(self) -> list[tuple[str, str, int]]:
        """Return the rows in the order of their keys, so that two saves never deadlock."""
        expires, outcomes = self._expires(), self._outcomes
        rests = sorted([(outcomes.rest_of(name), text) for name, text in self._kept.items()])
        return [(f"{outcomes.prefix}{rest}", text, expires) for rest, text in rests]


def refuse_repeated(key: Hashable, batch: Batch, recorded: Callable[[list[str]], Mapping[str, str]]) -> None:
    """Raise `Repeated` if outcomes of *batch* are recorded: a repeated operation is not judged by the new state.

    *recorded* asks the database. Switches: yes.
    """
    if not batch.outcomes:
        return
    try:
        found = recorded(list(batch.outcomes))
    except NotSaved:
        raise
    except Exception as error:
        raise errors.of_store(error, key) from error
    if found:
        raise Repeated(f"{shown(key)} was not saved: {recorded_already(found)}", outcomes=found)

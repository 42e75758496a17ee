"""Rows of many keys that are loaded together, locked in the order of their keys, and saved together.

All are saved in one transaction, or none. If the database refuses one, the processor saves parts of the bulk. If a row
cannot be read, the load of its key alone has failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._bulk.connected import by_component
from geventbatch._safe_repr import shown
from geventbatch.errors import ImpossibleKey, NothingToSave, NotSaved, PartlySaved, Repeated, ResourceMissing, named
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.outcomes import OutcomesOfBulk, Recording, outcomes_of, repeated_of
from geventbatch.stores.sql._resource import Resource
from geventbatch.stores.sql._transaction import Inserted, Save, load

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
    from types import TracebackType

    from geventbatch._core.batch import Batch
    from geventbatch.stores.sql._resource import Table
    from geventbatch.stores.sql._transaction import Change, Loaded, Transaction


_ALONE: Final = {int, UUID, bytes}
"""Types whose values a database takes for no others."""

_TRIES: Final = 4
"""Saves in one transaction, where new rows are there already, or outcomes are recorded."""

_FEW: Final = 4
"""Keys that may fail by themselves while no others could be loaded.

If one more does, the statement is taken to fail for any key. To find that out takes log2(keys) + 8 loads at the most;
to find one row among others that can be read, 2 * log2(keys).
"""


class Part(NamedTuple):
    """What is saved whole or not at all."""

    batch: Batch
    keys: list[Hashable]
    changes: list[Change]


class Several:
    """Names the transaction of several *keys* in messages."""

    __slots__ = ("_keys", "_table")

    def __init__(self, keys: Sequence[Hashable], table: str) -> None:
        self._keys = keys
        self._table = table

    def __repr__(self) -> str:
        return f"{len(self._keys)} rows of {self._table} ({named(tuple(self._keys))})"


class BulkRows:
    """The ``open_resources`` of a `Processor`: rows of many keys in one transaction."""

    all_or_nothing: Final = True
    """What operations have connected is saved together or not at all."""
    on_server: Final = True

    def __init__(self, table: Table, normalize: Callable[[Hashable], Hashable]) -> None:
        self._table = table
        self.keeps_outcomes: Final = table.outcomes is not None
        self.normalize_key: Final = normalize
        """Returns the value for a key, as `SQLStore.normalize_key` does."""
        self.__qualname__ = table.name

    def __repr__(self) -> str:
        return f"<rows in bulk of {self._table.name}>"

    def __call__(self, keys: Iterable[Hashable]) -> BulkScope:
        """Open the resources at *keys*: what a processor calls. Switches: no."""
        return BulkScope(self._table, list(keys), self.normalize_key)


class BulkScope:
    """Batches of many keys, one of each: entering loads their rows, exiting saves them."""

    takes_rows = True
    deletes_if = "pass delete= to the SQLStore, the DELETE of the row at %(key)s"

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction | None = None
    _has_read = False  # some keys could be loaded without those that could not

    def __init__(self, table: Table, keys: list[Hashable], normalize: Callable[[Hashable], Hashable]) -> None:
        self._table = table
        self._keys = keys
        self._normalize = normalize
        self._name = self._named(keys)
        self._loaded: dict[Hashable, Resource] = {}
        self._resources: dict[Hashable, Any] = {}

    @property
    def deletes(self) -> bool:
        """Return whether `Batch.delete` is obeyed."""
        return self._table.delete is not None

    def __enter__(self) -> dict[Hashable, Any]:
        try:
            self._load(self._keys)
        except BaseException as error:
            self._end(error)
            raise
        return self._resources

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        failed: dict[Hashable, Exception] = {}
        try:
            if error is None:
                failed = self._save()
        except BaseException as raised:
            self._end(raised)
            raise
        self._end(error, failed)
        if failed:
            raise PartlySaved(failed)

    def checkpoint(self) -> object:
        """Return a copy of the current key's resource. Raises `CannotUndo`. Switches: no."""
        return self._loaded[current_batch().key].checkpoint()

    def restore(self, checkpoint: object | None) -> Any:
        """Return the current key's resource as of *checkpoint*, or as loaded. Raises `CannotUndo`. Switches: no."""
        key = current_batch().key
        resource = self._resources[key] = self._loaded[key].restore(checkpoint)
        return resource

    def recorded(self, names: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these names. Switches: yes."""
        return self._outcomes().find(self._begun.send, names)

    # -- the load --------------------------------------------------------------------------------------------

    def _load(self, keys: list[Hashable]) -> None:
        if not keys:
            self._transaction, _ = load(self._table.connections, self._name, lambda _: None)
            return
        found = _tried(self._table, self._named(keys), keys)
        if not isinstance(found, Exception):
            self._transaction, loaded = found
            self._take(keys, loaded)
            return
        has_found = self._set_apart(keys, found)
        left = [key for key in keys if key not in self._resources]
        if has_found and len(left) < len(keys):  # else each can be loaded, but not all together
            self._load(left)
            return
        try:
            raise found
        finally:
            del found  # its traceback refers to this frame: no cycle

    def _set_apart(self, keys: list[Hashable], error: Exception) -> bool:
        """Put its *error* in place of the resource of each key that fails by itself, since *keys* fail together.

        They are found by loading each half. Return False if the statement is taken to fail for any key. Switches: yes.
        """
        if len(keys) == 1:
            self._resources[keys[0]] = error
            return self._has_read or self._count_unread() <= _FEW
        for half in (keys[::2], keys[1::2]):  # neighbours are often alike: the first ones to be alone lie far apart
            found = _tried(self._table, self._named(half), half)
            if not isinstance(found, Exception):
                self._has_read = True
                transaction, _ = found
                transaction.end(NothingToSave())
            elif not self._set_apart(half, found):
                return False
        return True

    def _count_unread(self) -> int:
        """Return how many rows could not be read. A key that is refused tells nothing of the statement."""
        return sum(not isinstance(one, ResourceMissing) for one in self._resources.values())

    def _take(self, keys: Iterable[Hashable], found: Loaded) -> None:
        """Make resources of the rows that were *found*, whose first column is the key."""
        rows = {self._key_of(row[0]): row for row in found.rows}
        asked = set(self._keys)
        others = [row[0] for key, row in rows.items() if key not in asked]
        if len(rows) < len(found.rows):
            raise ValueError(
                "load_many has found a key twice: its first column has to be the key, and each key has to have one row"
            )
        if others and not self._may_be_keys(others, found.rows):
            raise ValueError(
                f"load_many has found {shown(others[0])} in its first column, which has to be the key, as "
                f"{shown(self._keys[0])}"
            )
        for key in keys:
            if key not in rows and others:
                told = f"there is no {shown(key)} in {self._table.name}, but the database takes it for one of"
                self._resources[key] = ImpossibleKey(f"{told} {shown(others)}: use the key as its row has it", key=key)
                continue
            resource = Resource(self._table, key)
            try:
                self._resources[key] = resource.take(found.columns, rows.get(key))
                self._loaded[key] = resource
            except ResourceMissing as error:
                self._resources[key] = error.with_traceback(None)  # that would refer to all rows
            except Exception as error:
                self._resources[key] = error

    def _may_be_keys(self, others: Sequence[Any], rows: Iterable[Sequence[Any]]) -> bool:
        """Return whether the database may have taken some of the keys for the *others*, which are in the first column.

        It compares texts, moments and fractions in a way of its own; but if a key is in another column, that is its.
        """
        kind = type(self._keys[0])
        if kind in _ALONE or not isinstance(self._key_of(others[0]), kind):
            return False
        alike = {str(key).strip().casefold() for key in self._keys}
        asked = set(self._keys)
        return not any(
            str(row[0]).strip().casefold() not in alike and any(isinstance(one, kind) and one in asked for one in row)
            for row in rows
        )

    def _key_of(self, value: Any) -> Hashable:
        try:
            return self._normalize(value)
        except (TypeError, ValueError):
            return value  # type: ignore[no-any-return] # as the database has it

    # -- the save --------------------------------------------------------------------------------------------

    def _save(self) -> dict[Hashable, Exception]:
        """Save, and return the errors of those that were not saved."""
        failed: dict[Hashable, Exception] = {}
        parts: list[Part] = []
        bulk = batch_at_hand().bulk
        for batch, keys in by_component([key for key in self._loaded if key in bulk], bulk).items():
            changes = self._changes(batch, keys, failed)
            if changes is not None:
                parts.append(Part(batch, keys, changes))
        for tries in range(_TRIES, 0, -1):
            try:
                self._write(parts)
                break
            except Inserted as error:
                if tries == 1 or self._begun.is_over:
                    raise
                lost: dict[Hashable, Exception] = {key: errors.inserted(key) for key in error.keys}
            except Repeated as error:
                if tries == 1 or self._begun.is_over:
                    raise
                repeated = repeated_of([part.batch for part in parts], error.outcomes)
                lost = {part.keys[0]: repeated[part.batch] for part in parts if part.batch in repeated}
            failed |= lost
            parts = [part for part in parts if lost.keys().isdisjoint(part.keys)]
        return failed

    def _write(self, parts: list[Part]) -> None:
        changes = [change for part in parts for change in part.changes]
        changes.sort(key=lambda change: str(change.key))  # two processes insert in the same order
        outcomes = outcomes_of([part.batch for part in parts])
        rows = [row for part in parts for row in part.batch.rows]
        if not changes and not rows and not outcomes:
            return
        recording = Recording(self._outcomes(), outcomes) if outcomes else None
        stays = recording is not None or any(change.statement.option == "insert" for change in changes)
        self._begun.save(Save(changes, rows, recording, stays))

    def _changes(
        self, batch: Batch, keys: Sequence[Hashable], failed: dict[Hashable, Exception]
    ) -> list[Change] | None:
        """Return the changes of *keys*, which belong to *batch*; None if one is refused, which is put into *failed*."""
        found = []
        for key in keys:
            if key not in self._resources or not batch.completed:  # it was only read
                continue
            try:
                change = self._loaded[key].change(deleted=key in batch.deleted_keys)
            except Exception as error:
                failed[key] = self._repeated(batch) or error
                return None
            if change is not None:
                found.append(change)
        return found

    def _repeated(self, batch: Batch) -> Repeated | None:
        """Return the error of *batch* if outcomes are recorded: a repeated operation is not judged by the new state."""
        outcomes = outcomes_of([batch])
        if not outcomes:
            return None
        try:
            found = self.recorded(list(outcomes))
        except NotSaved:
            raise
        except Exception as error:
            raise errors.of_store(error, self._name) from error
        return repeated_of([batch], found).get(batch)

    # -- inside ----------------------------------------------------------------------------------------------

    def _named(self, keys: Sequence[Hashable]) -> Hashable:
        """Return what messages call the transaction of *keys*."""
        return keys[0] if len(keys) == 1 else Several(keys, self._table.name)

    @property
    def _begun(self) -> Transaction:
        assert self._transaction is not None  # noqa: S101 - entered
        return self._transaction

    def _outcomes(self) -> OutcomesOfBulk:
        return OutcomesOfBulk(self._table.outcomes_in(self._begun), self._name, lambda key: (self._table.name, key))

    def _end(self, error: BaseException | None, lost: Collection[Hashable] = ()) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction.end(error, lost)


def _tried(table: Table, name: Hashable, keys: list[Hashable]) -> tuple[Transaction, Loaded] | Exception:
    """Load the rows of *keys*, in a transaction called *name*. Return an error that may be of one key. Switches: yes.

    The traceback of that error refers to no scope, which has the error in place of a resource.
    """
    of_one = False

    def fetch(transaction: Transaction) -> Loaded:
        nonlocal of_one
        statement = table.load_many
        assert statement is not None  # noqa: S101 - else there is no bulk
        try:
            return transaction.fetch(statement.text, {"keys": keys})
        except Exception as error:
            of_one = _may_be_of_one(error, statement.text)
            raise

    try:
        return load(table.connections, name, fetch)
    except Exception as error:
        if not of_one:
            raise
        return error


def _may_be_of_one(error: Exception, statement: str) -> bool:
    """Return whether *error*, which *statement* has raised, may come of one key, or of one row: of its values.

    Then the server has refused something; or the driver, or a conversion of the user's, whose errors nobody knows.
    """
    kind = errors.kind(error)
    if kind is errors.Kind.OTHER:
        return not isinstance(error, OSError)
    return kind in errors.OF_OPERATION and not errors.is_of_schema(error, statement)

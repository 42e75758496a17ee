"""Instances of mapped classes at many keys: loaded together, and saved together in one transaction.

Each batch, of a key or of a component, has a session of its own on the transaction's connection: what its operations
find there, and what becomes of it, is as if it were alone. Operations send nothing that writes before the save. One
that would (a flush, a statement, a savepoint) has its batch applied again, in a transaction without others (`Apart`).

The save claims all rows first: it locks them in their order, and compares them with what was loaded. What is lost, is
lost with its batch only. If something of the rest is refused, nothing was written, and the next save has a savepoint
for each batch.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from geventbatch._batch import batch_at_hand
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NotSaved, PartlySaved, Rejected
from geventbatch.stores._sql import errors
from geventbatch.stores._sql.outcomes import OutcomesOfBulk, Recording, outcomes_of
from geventbatch.stores.sqlalchemy._added_rows import insert_rows
from geventbatch.stores.sqlalchemy._claims import claim_all
from geventbatch.stores.sqlalchemy._many_rows import ManyRows
from geventbatch.stores.sqlalchemy._mapped_part import MappedPart
from geventbatch.stores.sqlalchemy._mode import on_server
from geventbatch.stores.sqlalchemy._neighbours import Written, apart
from geventbatch.stores.sqlalchemy._rows_together import Changes, Updates
from geventbatch.stores.sqlalchemy._transaction import LostRow, Transaction, cause, is_doubtful
from geventbatch.stores.sqlalchemy._triggers import Triggers

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Hashable, Iterable, Iterator
    from types import TracebackType

    from geventbatch._core.batch import Batch
    from geventbatch.stores.sqlalchemy._mapping import Mapping


class BulkMapped:
    """The ``open_resources`` of a `Processor`: instances at many keys in one transaction, all saved or none."""

    all_or_nothing = True

    def __init__(
        self, mapping_of: Callable[[Any], Mapping], mappings: list[Mapping], normalize: Callable[[Any], Hashable]
    ) -> None:
        """Be of *mappings*, of which *mapping_of* returns the one of a key."""
        self._mapping_of = mapping_of
        self._name = " and ".join(mapping.name for mapping in mappings)
        self._normalize = normalize
        self._updates, self._triggers = Updates(), Triggers()
        self.on_server = on_server(mappings[0].engine)
        self.keeps_outcomes = mappings[0].outcomes is not None

    def __repr__(self) -> str:
        return f"<instances in bulk of {self._name}>"

    def __call__(self, keys: Iterable[Hashable]) -> BulkMappedScope:
        """Open the resources at *keys*: what a processor calls. Switches: no."""
        return BulkMappedScope(self._mapping_of, self._name, self._updates, self._triggers, list(keys))

    def normalize_key(self, key: Hashable) -> Hashable:
        """Return the columns' value for *key*, as `SQLAlchemyStore.normalize_key` does. Switches: no."""
        return self._normalize(key)


class BulkMappedScope:
    """Batches of many keys: entering loads their instances, exiting saves them."""

    takes_rows = True
    deletes = True
    restores_components = True
    """`checkpoint` and `restore` are of all keys of a component together."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _transaction: Transaction
    _resources: dict[Hashable, Any]

    def __init__(
        self,
        mapping_of: Callable[[Any], Mapping],
        name: str,
        updates: Updates,
        triggers: Triggers,
        keys: list[Hashable],
    ) -> None:
        self._updates, self._triggers = updates, triggers
        self._mapping_of = mapping_of
        self._keys = keys
        self._name = f"{len(keys)} instances of {name}" if len(keys) > 1 else keys[0]
        self._rows = ManyRows(mapping_of, str(self._name))
        self._parts: dict[Batch, MappedPart] = {}
        self._raced: MappedPart | None = None  # the only one, whose new row was refused

    def __enter__(self) -> dict[Hashable, Any]:
        try:
            transaction = self._rows.load(self._keys)
            if transaction is not None:
                self._transaction = transaction
                self._rows.give_away()
            self._resources = self._distribute(transaction)
        except BaseException as error:
            self._end(error)
            raise
        return self._resources

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._be_at_work()
        failed: dict[MappedPart, Exception] = {}
        try:
            if error is None:
                self._save(failed)
        except BaseException as raised:
            self._end(raised)
            if self._raced is not None and (conflict := self._raced.is_there_by_now()) is not None:
                raise conflict from raised.__cause__
            raise
        self._end(error, {key for part in failed for key in part.keys})
        if failed:
            self._look_again(failed)
            raise PartlySaved({key: error for part, error in failed.items() for key in part.keys})

    # -- operations ------------------------------------------------------------------------------------------

    @property
    def _part(self) -> MappedPart:
        return self._parts[batch_at_hand()]

    def operation_raised(self, error: Exception) -> NotSaved | None:
        """See `MappedWork.operation_raised`. Switches: no."""
        return self._part.operation_raised(error)

    def operation_returned(self) -> NotSaved | None:
        """See `MappedWork.operation_returned`. Switches: no."""
        return self._part.operation_returned()

    def copied(self, value: object) -> object:
        """See `MappedWork.copied`. Switches: no."""
        return self._part.copied(value)

    def owns(self, value: object) -> bool:
        """See `MappedWork.owns`. Switches: no."""
        return self._part.owns(value)

    def checkpoint(self) -> object:
        """Return a snapshot of the session of the batch at hand. Raises `CannotUndo`. Switches: no."""
        return self._part.checkpoint()

    def restore(self, checkpoint: object | None) -> Any:
        """Restore the session of the batch at hand. Raises `CannotUndo`. Switches: no."""
        return self._part.restore(checkpoint)

    # -- outcomes --------------------------------------------------------------------------------------------

    def recorded(self, names: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these names. Switches: yes."""
        connection = self._rows.connection
        before, connection.guard_at_hand = connection.guard_at_hand, self._rows.guard
        try:
            return self._outcomes().find(self._transaction.send, names)
        finally:
            connection.guard_at_hand = before

    def _outcomes(self) -> OutcomesOfBulk:
        table = self._mapping_of(self._keys[0]).outcomes
        assert table is not None  # noqa: S101 - else no operation has an idempotency key
        places = {key: place for part in self._parts.values() for key, place in part.places.items()}
        return OutcomesOfBulk(table, str(self._name), lambda key: places.get(key, ("", key)))

    def _recording(self, parts: Iterable[MappedPart]) -> Recording | None:
        kept = outcomes_of(part.batch for part in parts)
        return Recording(self._outcomes(), kept) if kept else None

    def _to_record(self, chosen: Container[MappedPart]) -> list[MappedPart]:
        """Return the parts that have outcomes. Of one that is not *chosen*, all operations have raised."""
        bulk = batch_at_hand().bulk
        saved = (self._parts[batch] for batch in dict.fromkeys(bulk.values()) if batch in self._parts)
        found = [part for part in saved if outcomes_of([part.batch])]
        for part in found:
            if part not in chosen:
                part.keys = [key for key, batch in bulk.items() if batch is part.batch]
        return found

    # -- load ------------------------------------------------------------------------------------------------

    def _distribute(self, transaction: Transaction | None) -> dict[Hashable, Any]:
        """Give each batch its instances, and return them by key."""
        batches = batch_at_hand().bulk
        shared = len(set(batches.values())) > 1
        resources: dict[Hashable, Any] = {}
        more: dict[tuple[Batch, int], list[Hashable]] = {}
        known = self._rows.known.known if self._rows.rows else {}
        for key in self._keys:
            row, mapping, batch = self._rows.rows.get(key), self._mapping_of(key), batches[key]
            if isinstance(row, Exception):
                resources[key] = row
                continue
            if transaction is None or (row is None and mapping.missing == "raise"):
                continue
            part = self._parts.get(batch) or self._part_of(batch, mapping, transaction, shared=shared)
            if row is None:
                resources[key] = _result(partial(part.make, mapping, key))
            elif mapping.rank in self._rows.more:
                more.setdefault((batch, mapping.rank), []).append(key)
            else:
                resources[key] = part.take(mapping, key, row[0], row[1:], known)
        for (batch, _), keys in more.items():
            resources |= self._parts[batch].load(self._mapping_of(keys[0]), keys)
        self._rows.rows = {}
        self._begin_operations()
        return resources

    def _part_of(self, batch: Batch, mapping: Mapping, transaction: Transaction, *, shared: bool) -> MappedPart:
        part = self._parts[batch] = MappedPart(mapping, batch, transaction, shared=shared)
        self._rows.connection.guards[batch] = part.guard
        return part

    def _begin_operations(self) -> None:
        """Guard the operations of each batch by itself."""
        for batch, part in list(self._parts.items()):
            if part.keys:
                part.begin()
            else:
                self._parts.pop(batch).close(saved=False)
        if self._rows.transaction is not None:
            self._rows.connection.guard_at_hand = None

    # -- save ------------------------------------------------------------------------------------------------

    def _save(self, failed: dict[MappedPart, Exception]) -> None:
        """Save, and add the errors of what was not saved to *failed*."""
        chosen: dict[MappedPart, list[Hashable]] = {}
        batches = batch_at_hand().bulk
        for key in self._keys:
            if key in self._resources and batches[key] in self._parts:
                chosen.setdefault(self._parts[batches[key]], []).append(key)
        for part, keys in chosen.items():
            part.narrow(keys, [key for key in part.batch.loads if key in batches and key not in self._resources])
        to_record = self._to_record(chosen)
        try:
            writing = self._claim(list(chosen), failed)
        except Exception as error:
            raise self._transaction.not_saved(error) from cause(error)
        to_record = [part for part in to_record if part not in failed]
        if writing or to_record or any(part.asked and part not in failed for part in chosen):
            self._write(writing, to_record, failed)

    def _claim(self, parts: list[MappedPart], failed: dict[MappedPart, Exception]) -> list[MappedPart]:
        """Lock and compare the rows of *parts*. Return those that have something to write, and have not lost a row."""
        writing = []
        for part in parts:
            if not part.is_idle():
                writing.append(part)
            elif not part.is_as_loaded():
                failed[part] = errors.changed(part.key)
        left_out = self._triggers.apart(writing, self._transaction.connection)
        left_out |= apart([part for part in writing if part not in left_out])
        failed |= left_out
        writing = [part for part in writing if part not in left_out] if left_out else writing
        if all(one.claimed for part in writing for one in part.compared):
            return writing
        self._transaction.before_writes()
        lost = {id(one) for one in claim_all(self._transaction, [one for part in writing for one in part.compared])}
        left = []
        for part in writing:
            changed = next((one for one in part.compared if id(one) in lost), None)
            if changed is None:
                left.append(part)
            else:
                failed[part] = errors.changed(changed.key)
        return left

    def _write(self, parts: list[MappedPart], to_record: list[MappedPart], failed: dict[MappedPart, Exception]) -> None:
        transaction = self._transaction
        saved = list(parts)
        written = Written(parts, self._triggers)
        transaction.committer = partial(self._commit, saved, written)
        doubtful = any(is_doubtful(part.batch) for part in parts)
        # One alone may have written before, when its operations ran: no savepoint would undo that.
        several = len({*parts, *to_record}) > 1
        if several and (doubtful or any(part.batch.rejections for part in parts)):
            transaction.write(partial(self._write_each, saved, to_record, failed, written), collected=False)
            return
        unheard = not parts or parts[0].has_only_our_listeners()  # all have those of the user's sessions
        joined = unheard and not doubtful and all(part.sends_no_more() for part in parts)
        collected = transaction.collects and joined
        try:
            transaction.write(partial(self._write_all, parts, written), self._recording(to_record), collected=collected)
        except LostRow as lost:
            raise Conflict(f"{shown(self._name)} were not saved, nothing was written: a row was not found") from lost
        except Rejected as refused:
            raced = [part for part in parts if part.may_be_raced(refused.__cause__)]
            if raced and not several:
                self._raced = raced[0]
            elif raced:
                raise Conflict(*refused.args) from refused.__cause__  # the next save finds out whose row it is
            raise

    def _write_all(self, parts: list[MappedPart], written: Written) -> None:
        """Write *parts*: together what has only changed, then one after the other."""
        changes = Changes(self._updates)
        rows: list[object] = []
        others = []
        # All have the listeners of the user's sessions. What was refused is judged as a flush sends it.
        quick = bool(parts) and parts[0].has_only_our_listeners() and not any(part.batch.rejections for part in parts)
        for part in parts:
            found = part.plain_changes(self._updates) if quick else None
            if found is None:
                others.append(part)
            else:
                changes.add(found)
                rows += part.rows
        changes.send(self._transaction)
        insert_rows(self._transaction.connection, rows)
        for part in others:
            with self._at_hand(part):
                part.write()
            written.check(part)

    def _write_each(
        self,
        parts: list[MappedPart],
        to_record: list[MappedPart],
        failed: dict[MappedPart, Exception],
        written: Written,
    ) -> None:
        """Write each of *parts* after a savepoint, with its outcomes. Take out those that are refused or lost."""
        connection, transaction = self._transaction.connection, self._transaction
        for part in dict.fromkeys([*parts, *to_record]):
            recording = self._recording([part])
            with self._at_hand(part):
                part.leave_transaction()
                with transaction.holding_back():
                    savepoint = connection.begin_nested()
                try:
                    if recording is not None:
                        recording.send(transaction.send)
                    if part in parts:
                        part.write()
                        written.check(part)
                except Exception as error:
                    refused = self._refused(error)
                    if part in parts:
                        parts.remove(part)
                    if savepoint.is_active:
                        savepoint.rollback()
                    failed[part] = self._repeated(refused, recording) or refused
                    continue
                with transaction.holding_back():
                    savepoint.commit()

    def _repeated(self, refused: NotSaved, recording: Recording | None) -> NotSaved | None:
        """Return the error in place of *refused* if the INSERT of outcomes has caused that."""
        if recording is None or not isinstance(refused, Rejected) or refused.__cause__ is None:
            return None
        return recording.check(refused.__cause__, self._transaction.send, lambda: None, lambda: None)

    def _refused(self, error: Exception) -> NotSaved:
        """Return the error of one part alone. Raise what ends the transaction."""
        ended = self._transaction.ended()
        if ended is not None:
            raise ended
        if isinstance(error, (Conflict, Rejected)):
            return error
        refused = self._transaction.not_saved(error)
        if not isinstance(refused, Rejected):
            raise refused from cause(error)
        refused.__cause__ = cause(error)
        return refused

    def _commit(self, parts: list[MappedPart], written: Written) -> None:
        """Commit, with what the user's listeners of the sessions do before and after."""
        # All have the listeners of the user's sessions: operations cannot add any.
        for part in parts if parts and not parts[0].has_only_our_listeners() else ():
            with self._at_hand(part):
                part.prepare_commit()
            written.check(part)
        self._transaction.connection.commit()
        raised: Exception | None = None
        for part in parts if parts and parts[0].hears_commit() else ():
            try:
                part.has_committed()
            except Exception as error:
                raised = raised or error
        if raised is not None:
            raise raised

    def _look_again(self, failed: dict[MappedPart, Exception]) -> None:
        """Tell a new row that another process was faster to insert from one that is refused."""
        for part, error in failed.items():
            if isinstance(error, Rejected) and part.may_be_raced(error.__cause__):
                conflict = part.is_there_by_now()
                if conflict is not None:
                    conflict.__cause__ = error.__cause__
                    failed[part] = conflict

    # -- the connection --------------------------------------------------------------------------------------

    def _be_at_work(self) -> None:
        """Take the connection and the sessions over from the operations."""
        for part in self._parts.values():
            part.guard.ours = True
        if self._rows.transaction is not None:
            self._rows.connection.guard_at_hand = self._rows.guard

    @contextmanager
    def _at_hand(self, part: MappedPart) -> Iterator[None]:
        connection = self._rows.connection
        before, connection.guard_at_hand = connection.guard_at_hand, part.guard
        try:
            yield
        finally:
            connection.guard_at_hand = before

    def _end(self, error: BaseException | None, lost: Collection[Hashable] = ()) -> None:
        transaction = self.__dict__.pop("_transaction", None)
        try:
            if transaction is not None:
                transaction.end(error, lost)
        finally:
            for part in self._parts.values():
                part.close(saved=error is None, lost=lost)
            self._rows.close(saved=error is None, lost=lost)


def _result(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        return error

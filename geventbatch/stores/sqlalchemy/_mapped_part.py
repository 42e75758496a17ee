"""A part of a transaction that many batches share: the session of one batch, of a key or of a component."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm.attributes import instance_state

from geventbatch.errors import named
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import errors
from geventbatch.stores.sqlalchemy._added_rows import is_instance
from geventbatch.stores.sqlalchemy._change_tracker import tracker_of
from geventbatch.stores.sqlalchemy._claims import compare_all
from geventbatch.stores.sqlalchemy._guard import Guard
from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource
from geventbatch.stores.sqlalchemy._loaded_resources import LoadedResources, all_of
from geventbatch.stores.sqlalchemy._mapped_work import MappedWork, made
from geventbatch.stores.sqlalchemy._session_snapshot import snapshot_of_load

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Sequence

    import sqlalchemy as sa
    from sqlalchemy.orm import InstanceState

    from geventbatch._core.batch import Batch
    from geventbatch.errors import Conflict
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._rows_together import Updates
    from geventbatch.stores.sqlalchemy._session import BatchSession
    from geventbatch.stores.sqlalchemy._transaction import Transaction


class _Keys:
    """The keys of a component, for messages: those of the operation at hand, or outside of operations all."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __repr__(self) -> str:
        return named(self._batch.keys)


class MappedPart(MappedWork):
    """The work of one batch in a shared transaction."""

    # -- mutable state ---------------------------------------------------------------------------------------
    keys: list[Hashable]  # loaded; at the save: to be saved
    rows: Sequence[object]  # to insert with the save
    places: dict[Hashable, tuple[str, Hashable]]  # by key: the store and the row's own key, if outcomes are recorded
    _deleted: Sequence[LoadedResource]  # to delete with the save
    _read: Sequence[LoadedResource]  # the rest was judged by them

    def __init__(self, mapping: Mapping, batch: Batch, transaction: Transaction, *, shared: bool) -> None:
        """Belong to *batch*; hold nothing yet. *shared*: there are other parts."""
        keys = batch.loads
        super().__init__(mapping, keys[0] if len(keys) == 1 else _Keys(batch))
        self.batch = batch
        self._transaction = transaction
        # A failed flush rolls the session's transaction back, and so the one that it has joined.
        session = mapping.sessions(bind=transaction.connection, join_transaction_mode="rollback_only")
        self._session = cast("BatchSession", session)
        self._guard = Guard(mapping, self._key, self._session, transaction)
        self._guard.shared = shared
        self._session.begin_watch(self._guard)
        self.keys, self.rows, self._deleted, self._read, self.places = [], (), (), (), {}
        if len(keys) > 1:
            self._loaded = LoadedResources(mapping, self._key, self._session)

    @property
    def key(self) -> Hashable:
        """The key, or the keys, for messages."""
        return self._key

    @property
    def guard(self) -> Guard:
        """Its guard."""
        return self._guard

    # -- load --------------------------------------------------------------------------------------------------

    def take(self, mapping: Mapping, key: Hashable, instance: Any, token: Sequence[Any], known: dict[Any, Any]) -> Any:
        """Take *instance*, which another session has loaded and given away, with what is *known* of it. Return it."""
        self._session.adopt(instance)
        if known and (state := instance_state(instance)) in known:
            tracker = tracker_of(self._session, self._mapping)
            tracker.known = tracker.known or {}  # the empty one is shared
            tracker.known[state] = known[state]
        return self._hold(mapping, key, instance, token)

    def load(self, mapping: Mapping, keys: list[Hashable]) -> dict[Hashable, Any]:
        """Load the rows at *keys* into its own session, since their load brings more. Switches: yes."""
        rows = self._session.execute(*mapping.load_all([mapping.own_key(key) for key in keys])).unique().all()
        found = match(mapping, keys, rows)
        held: dict[Hashable, Any] = {}
        for key in keys:
            row = found.get(key)
            held[key] = errors.changed(key) if row is None else self._hold(mapping, key, row[0], row[1:])
        return held

    def make(self, mapping: Mapping, key: Hashable) -> Any:
        """Make the resource at *key*, which is missing."""
        resource = made(mapping, key)
        self._session.add(resource)
        return self._hold(mapping, key, resource, None)

    def _hold(self, mapping: Mapping, key: Hashable, resource: Any, token: Sequence[Any] | None) -> Any:
        loaded = LoadedResource(mapping, key, self._session, resource, token, batch=self.batch)
        if isinstance(self.__dict__.get("_loaded"), LoadedResources):
            cast("LoadedResources", self._loaded).add(key, loaded)
        else:
            self._loaded = loaded
        self.keys.append(key)
        if mapping.outcomes is not None:
            self.places[key] = mapping.outcome_place, key if token is None else mapping.key_of(resource, key)
        return resource

    def begin(self) -> None:
        """Begin to guard operations, after the load."""
        self._first = snapshot_of_load(self._guard, self._loaded)
        self._guard.begin(self._loaded)

    # -- save --------------------------------------------------------------------------------------------------

    def narrow(self, keys: Iterable[Hashable], read: Iterable[Hashable] = ()) -> None:
        """Save the resources at *keys*, and no others; those at *read* have only been read. Raises a `NotSaved`."""
        self.keys = list(keys)
        self.rows = self.batch.rows
        if isinstance(self._loaded, LoadedResources):
            self._loaded.narrow(self.keys)
            self._read = self._loaded.at(read)
        deleted = self.batch.deleted_keys
        self._deleted = [one for one in self.loaded if one.key in deleted] if deleted else ()
        unfit = self._guard.unfit()
        if unfit is not None:
            raise unfit
        self._loaded.flag_mutated()

    @property
    def loaded(self) -> Sequence[LoadedResource]:
        """The resources to save."""
        return all_of(self._loaded)

    @property
    def compared(self) -> Sequence[LoadedResource]:
        """The resources to save, and those by which they were judged."""
        return [*self.loaded, *self._read] if self._read else self.loaded

    def beside(self) -> Iterable[InstanceState[Any]]:
        """Return the rows beside its resources that its flush is to change, as far as is known before it."""
        return self._loaded.beside()  # type: ignore[no-any-return]

    @property
    def asked(self) -> bool:
        """Return whether an operation has sent a query, which may have called what writes."""
        return self._guard.asked

    @property
    def deletes(self) -> bool:
        """Return whether it deletes a resource."""
        return bool(self._deleted)

    def is_idle(self) -> bool:
        """Return whether there is nothing to write."""
        return not (self.rows or self._deleted or self._guard.wrote or self._loaded.changes())

    def is_as_loaded(self) -> bool:
        """Return whether its queries, if any, and the load have seen one state of its rows. Switches: yes."""
        return not self.must_compare or compare_all(self._transaction, self.loaded)

    def sends_no_more(self) -> bool:
        """Return whether all statements of its save can be sent together with others and COMMIT, but for listeners."""
        return self._needs_no_answer(self.rows) and not self._deleted

    def plain_changes(self, updates: Updates) -> list[tuple[Mapping, Any, dict[str, Any]]] | None:
        """Return the changed values of its rows; None if its flush has to do more than to write them."""
        session = self._session
        if not self.keys:
            return []
        if self._deleted or self._guard.acted or session._new or session._deleted:  # noqa: SLF001 - as in `is_untouched`
            return None
        if any(is_instance(row) for row in self.rows):
            return None
        if not self._mapping.locking and (self.rows or self._loaded.changes()):
            self._loaded.touch()
        self._loaded.count()
        mapping_of = {id(one.resource): one.mapping for one in self.loaded}
        found = []
        for instance in session.touched():
            mapping = mapping_of.get(id(instance))
            values = None if mapping is None else updates.changed_values(mapping, instance)
            if mapping is None or values is None:
                return None
            if values:
                found.append((mapping, instance_state(instance), values))
        for one in self.loaded:
            one.refuse_values()
        return found

    def write(self) -> None:
        """Send its changes. Raises a `NotSaved`, or the database's error. Switches: yes."""
        late = self._deleted and self._loaded.adds()
        if self._deleted and not late:
            self._delete()
        self._end_savepoints()
        if self.rows or self._guard.wrote:
            self._touch()
        if late:
            self._flush(())
            self._delete()
        self._flush(self.rows)

    def leave_transaction(self) -> None:
        """Have the session join the savepoint at hand with its next statement, so that it rolls back to that only."""
        begun: Any = self._session.get_transaction()
        begun._connections.clear()  # noqa: SLF001 - it controls neither the one nor the other

    def prepare_commit(self) -> None:
        """Do what a session does before COMMIT: call the user's listeners, and flush what they have changed."""
        begun: Any = self._session.get_transaction()
        begun._prepare_impl()  # noqa: SLF001 - it is public for two phases only

    def has_committed(self) -> None:
        """Do what a session does after COMMIT."""
        self._session.commit()

    def hears_commit(self) -> bool:
        """Return whether a listener of the user's hears that its session has committed."""
        return bool(list(self._session.dispatch.after_commit))

    def may_be_raced(self, error: BaseException | None) -> bool:
        """Return whether *error* may be due to another process, which has inserted a new row."""
        is_duplicate = isinstance(error, IntegrityError) and errors.is_duplicate(error)
        return is_duplicate and any(one.identity is None for one in self.loaded)

    def is_there_by_now(self) -> Conflict | None:
        """Return the `Conflict` if another process has inserted a new row, or cannot be asked. Switches: yes."""
        for one in self.loaded:
            if one.identity is None:
                there = True  # unless the query succeeds: the replay will see
                with suppress(DBAPIError), one.mapping.connect(one.key) as connection:
                    there = self._is_there(one, connection)
                if there:
                    return errors.inserted(one.key)
        return None

    @staticmethod
    def _is_there(one: LoadedResource, connection: sa.Connection) -> bool:
        return connection.execute(one.mapping.look, one.mapping.parameters(one.key)).first() is not None

    def _is_inserted(self) -> bool:
        connection = self._transaction.connection
        return all(self._is_there(one, connection) for one in self.loaded if one.identity is None)

    def _touch(self) -> None:
        self._loaded.flag_mutated()
        connection = self._transaction.connection
        for one in self.loaded:
            if self._guard.rewrote and not one.mapping.locking and not self._is_there(one, connection):
                self._session.expunge(one.resource)  # a statement of an operation has deleted the row
            else:
                one.touch()

    def _delete(self) -> None:
        session = self._session
        for one in self._deleted:
            if one.resource in session.new:
                session.expunge(one.resource)
            elif one.resource in session:
                session.delete(one.resource)

    def close(self, *, saved: bool, lost: Collection[Hashable] = ()) -> None:
        """Close the session."""
        self._guard.ours = True
        try:
            give_back(self._key, self._session.close, saved=saved, lost=lost)
        finally:
            self._session.end_watch()


def match(mapping: Mapping, keys: Iterable[Hashable], rows: Iterable[Any]) -> dict[Hashable, Any]:
    """Return *rows*, each an instance and its token, by key. Those of no key in its exact form are left out."""
    asked = {mapping.own_key(key): key for key in keys}
    found: dict[Hashable, Any] = {}
    for row in rows:
        values = instance_state(row[0]).dict
        own: Any = tuple([values.get(one.key) for one in mapping.by])
        own = own if len(mapping.by) > 1 else own[0]
        if own in asked:
            found[asked[own]] = row
    return found

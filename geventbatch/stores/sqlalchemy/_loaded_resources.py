"""The resources of a component: the rows of several keys in one session. It has what `LoadedResource` has of one."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm.attributes import instance_state

from geventbatch._batch import batch_at_hand
from geventbatch._core.halving import current_part
from geventbatch._core.operation import STARTED
from geventbatch.stores._sql import errors
from geventbatch.stores.sqlalchemy._claims import claim_all
from geventbatch.stores.sqlalchemy._dirty_rows import DirtyRows, to_change

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    import sqlalchemy as sa
    from sqlalchemy.orm import InstanceState

    from geventbatch.errors import Conflict
    from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession
    from geventbatch.stores.sqlalchemy._transaction import Transaction


class LoadedResources:
    """The resources of one component, by key."""

    def __init__(self, mapping: Mapping, name: Hashable, session: BatchSession) -> None:
        """Hold none yet; *mapping* is of any of the classes, *name* is for messages."""
        self.mapping = mapping
        self._name = name
        self._session = session
        # -- mutable state ---------------------------------------------------------------------------------
        self._by_key: dict[Hashable, LoadedResource] = {}
        self._ids: set[int] = set()
        self._saved: list[LoadedResource] | None = None  # set by the save: others have not changed
        self._aside: list[Any] = []  # new resources that no operation has had, while a flush runs
        self.claimed = mapping.locking

    def add(self, key: Hashable, loaded: LoadedResource) -> None:
        """Take the resource at *key*."""
        if not self._by_key:
            self.tracker = loaded.tracker
        self._by_key[key] = loaded
        self._ids.add(id(loaded.resource))

    @cached_property
    def _dirty_rows(self) -> DirtyRows:
        return DirtyRows(self.mapping, self._session, self.tracker)

    def narrow(self, keys: Iterable[Hashable]) -> None:
        """Save those at *keys* and no others."""
        self._saved = [self._by_key[key] for key in keys]

    def at(self, keys: Iterable[Hashable]) -> list[LoadedResource]:
        """Return those at *keys*, as far as they were loaded."""
        return [self._by_key[key] for key in keys if key in self._by_key]

    @property
    def saved(self) -> list[LoadedResource]:
        """Those that are to be saved: all, until the save narrows them."""
        return list(self._by_key.values()) if self._saved is None else self._saved

    @property
    def resources(self) -> tuple[Any, ...]:
        """The resources."""
        return tuple([one.resource for one in self._by_key.values()])

    @property
    def is_new(self) -> bool:
        """Return whether one had no row when it was loaded."""
        return any(one.is_new for one in self._by_key.values())

    def reads_computed(self) -> bool:
        """Note that an operation may have read what the database computes. Return False if it computes nothing."""
        found = [one.reads_computed() for one in self._by_key.values()]
        return any(found)

    def has(self, instance: object) -> bool:
        """Return whether *instance* is one of the resources."""
        return id(instance) in self._ids

    def changes(self) -> bool:
        """Return whether the session has something to write."""
        return self._any.changes()

    def beside(self) -> Iterable[InstanceState[Any]]:
        """See `LoadedResource.beside`."""
        session = self._session
        return () if session.is_untouched() else to_change(session, self.has, session.touched())

    def copier_of(self, value: object) -> Callable[[Any], Any] | None:
        """See `LoadedResource.copier_of`."""
        return self._any.copier_of(value)

    def adds(self) -> bool:
        """Return whether something unflushed was added or moved, which the cascade of a deletion would not find."""
        return self._any.adds(self.has)

    def operation_returned(
        self, transaction: Transaction, assigned: Sequence[tuple[InstanceState[Any], str]], *, wrote: bool
    ) -> None:
        """See `LoadedResource.operation_returned`, for the resources of the operation at hand."""
        for one in self._at_hand():
            one.operation_returned(transaction, assigned, wrote=wrote)
            assigned = []

    def operation_raised(self) -> None:
        """Ask to be called after the next operation too. Switches: no."""
        for one in self._at_hand():
            one.operation_raised()

    def _at_hand(self) -> list[LoadedResource]:
        return [self._by_key[key] for key in batch_at_hand().keys if key in self._by_key]

    def flag_mutated(self) -> None:
        """Flag for SQLAlchemy the changes that it does not see by itself."""
        self.tracker.flag(self._session)

    def has_flushed(self) -> None:
        """Note that what was flushed is now as in the database."""
        if self._aside:
            with self._session.silence():
                self._session.add_all(self._aside)
            self._aside = []
        self._dirty_rows.are_ours(self.tracker.has_flushed())

    def rolled_back(self) -> None:
        """Note a rollback to a savepoint: what the database has is unknown now."""
        for one in self._by_key.values():
            one.rolled_back()
        self._dirty_rows.rolled_back()

    def flushes(self, transaction: Transaction, *, rewrote: bool = False) -> None:
        """See `LoadedResource.flushes`."""
        if self._session.new:
            self._put_aside()
        for one in self._by_key.values():
            one.refuse_values()
        dirty = list(self._session.dirty)
        self.tracker.flushes(self._session, dirty)
        changed = self._dirty_rows.changed(self.has, dirty, transaction)
        if changed is not None and not rewrote:
            what = f"the {changed.class_.__name__} {changed.identity}"
            raise errors.changed(self._name, what=what, since="it was read")

    def _put_aside(self) -> None:
        """Take new resources out of the flush that begins whose keys no operation has, of those that count so far."""
        touched = {one.key for one in self._saved} if self._saved is not None else _touched()
        new = [
            one.resource
            for key, one in self._by_key.items()
            if key not in touched and one.resource in self._session.new
        ]
        if new:
            with self._session.silence():
                self._session._expunge_states(map(instance_state, new), to_transient=True)  # noqa: SLF001 - see `_many_rows`
            self._aside = new if self._saved is None else []

    def touch(self) -> None:
        """Without a lock, make the flush write the row of each key, if it writes anything."""
        for one in self.saved:
            one.touch()

    def count(self) -> None:
        """Count up the versions of the rows that the flush writes."""
        for one in self._by_key.values():
            one.count()

    def is_raced(self) -> bool:
        """Return whether a new row, if it was there before its flush, was inserted by another process."""
        return any(one.is_raced() for one in self._by_key.values())

    def inserts(self, table: object) -> bool:
        """Return whether an INSERT into *table* may be of a new row."""
        return any(one.inserts(table) for one in self._by_key.values())

    def claim(self, transaction: Transaction) -> None:
        """Lock the rows, once, and raise a `Conflict` unless all are as loaded."""
        if not self.claimed:
            if claim_all(transaction, self.saved):
                raise self.conflict()
            self.claimed = True

    def are_as_read(self, transaction: Transaction, connection: sa.Connection | None = None) -> bool:
        """See `LoadedResource.are_as_read`."""
        return self._dirty_rows.are_as_read(connection or transaction.connection, may_look=transaction.leaves_out)

    def conflict(self) -> Conflict:
        """Return the error of a save that finds another row than was loaded."""
        return errors.changed(self._name)

    @property
    def _any(self) -> LoadedResource:
        return next(iter(self._by_key.values()))


def _touched() -> set[Hashable]:
    """Return the keys of the operation at hand, and of those that have returned before it."""
    batch = batch_at_hand()
    touched = set(batch.keys)
    if batch.attempt is not None:
        for one in current_part(batch.attempt):
            if one.state == STARTED and one.error is None:
                touched.update(getattr(one.callable, "keys", ()))
    return touched


def all_of(loaded: LoadedResource | LoadedResources) -> Sequence[LoadedResource]:
    """Return the resources of *loaded* that are to be saved."""
    return loaded.saved if isinstance(loaded, LoadedResources) else (loaded,)

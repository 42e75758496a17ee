"""The resource of a batch as loaded: what has changed since, in the session and in the database."""

from __future__ import annotations

from copy import deepcopy
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm.attributes import flag_modified, instance_state

from geventbatch._batch import Batch, batch_at_hand, current_batch
from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, Rejected
from geventbatch.stores._object_contents import is_in
from geventbatch.stores._sql import errors
from geventbatch.stores.sqlalchemy._bound_values import exact
from geventbatch.stores.sqlalchemy._change_tracker import tracker_of
from geventbatch.stores.sqlalchemy._computed import forget, is_incomplete
from geventbatch.stores.sqlalchemy._dirty_rows import DirtyRows, history_of, to_change
from geventbatch.stores.sqlalchemy._loaded_values import assigned_attributes
from geventbatch.stores.sqlalchemy._transaction import LostRow, is_doubtful

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from sqlalchemy.orm import InstanceState, Mapper

    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession
    from geventbatch.stores.sqlalchemy._transaction import Transaction


class LoadedResource:
    """The resource of one batch, as it was loaded, or made by ``missing``."""

    # -- mutable state ---------------------------------------------------------------------------------------
    claimed: bool  # the row is locked, and as it was loaded
    counted: bool  # the version was counted up for this batch
    _written: bool  # the row is written, or will be by the next flush

    def __init__(  # noqa: PLR0913 - of many, each one is told which batch is its own
        self,
        mapping: Mapping,
        key: Hashable,
        session: BatchSession,
        resource: Any,
        token: Sequence[Any] | None,
        *,
        batch: Batch | None = None,
    ) -> None:
        """Take *resource* as loaded, with the values of the mapping's `token`; None: ``missing`` has made it.

        It is of *batch*, or of the batch at hand.
        """
        self.mapping = mapping
        self.key = key
        self._session = session
        self.resource = resource
        self.claimed = mapping.locking
        self._written = self.counted = False
        self.identity: tuple[Any, ...] | None = None  # primary key of the loaded row; None: there was none
        self.tracker = tracker_of(session, mapping)
        self._found_by = self._finding()
        if mapping.has_computed or token is None:
            (batch or current_batch()).ask_scope(first=True)
        if token is not None:
            self.identity = instance_state(resource).identity
            self.token = tuple(token)
            self.tracker.sees(resource)

    @cached_property
    def _dirty_rows(self) -> DirtyRows:
        return DirtyRows(self.mapping, self._session, self.tracker)

    @property
    def resources(self) -> tuple[Any, ...]:
        """The resource."""
        return (self.resource,)

    @property
    def is_new(self) -> bool:
        """Return whether it had no row when it was loaded."""
        return self.identity is None

    def reads_computed(self) -> bool:
        """Note that an operation may have read what the database computes. Return False if it computes nothing."""
        if self.mapping.has_computed:
            self.mapping.reads_computed = True
        return self.mapping.has_computed

    def has(self, instance: object) -> bool:
        """Return whether *instance* is the resource."""
        return instance is self.resource

    def changes(self) -> bool:
        """Return whether the session has something to write."""
        session = self._session
        if session.is_untouched():
            return False
        return bool(session.new or session.deleted or any(session.is_modified(one) for one in session.touched()))

    def beside(self) -> Iterable[InstanceState[Any]]:
        """Return the other rows that a flush is to change, as far as is known before it."""
        session = self._session
        return () if session.is_untouched() else to_change(session, self.has, session.touched())

    def copier_of(self, value: object) -> Callable[[Any], Any] | None:
        """Return what copies *value*, if it is mutable and in a column of any instance of the session; else None."""
        for instance in (*self._session.new, *self._session.identity_map.values()):
            state: InstanceState[Any] = instance_state(instance)
            columns = self.mapping.columns_of(state.mapper)
            for name in columns.changing:
                found = state.dict.get(name)
                if found is value:
                    return deepcopy if name in columns.composites else columns.in_place[name].copied
                if name in columns.of_objects and is_in(value, found):
                    return deepcopy
        return None

    def adds(self, is_resource: Callable[[object], bool] | None = None) -> bool:
        """Return whether something unflushed was added or moved, which the cascade of a deletion would not find."""
        session, has = self._session, is_resource or self.has
        return any(not has(one) for one in session.new) or any(
            state.committed_state.keys() & state.mapper.relationships.keys()
            for state in (instance_state(one) for one in (*session.new, *session.dirty))
        )

    def operation_returned(
        self, transaction: Transaction, assigned: Sequence[tuple[InstanceState[Any], str]], *, wrote: bool
    ) -> None:
        """Replace values that the current operation has changed by what a load would return, for later operations.

        These are the attributes that the database computes, and the *assigned* ones, as the database keeps them.
        *wrote*: the operation itself has flushed or sent a statement, so something has changed. Switches: no.
        """
        state: InstanceState[Any] = instance_state(self.resource)
        is_new = state.key is None and state.pending
        if is_new:
            assigned = [*assigned, *assigned_attributes(state, self.mapping.columns_of(state.mapper).as_loaded)]
        for one, name in assigned:
            if not self.tracker.make_as_loaded(one, name, transaction.zone):
                current_batch().cut()
        if not (is_new or self.mapping.has_computed):
            return
        batch = batch_at_hand()
        if is_new and not batch.stepwise and is_incomplete(state):
            batch.cut()
        batch.ask_scope()
        if self.mapping.has_computed:
            self.flag_mutated()
            if wrote or self.changes():
                forget(self.mapping, self._session)
                if not transaction.writes_anywhere and self.mapping.reads_computed:
                    batch.cut()

    def operation_raised(self) -> None:
        """Ask to be called after the next operation too. Switches: no."""
        if self.mapping.has_computed or instance_state(self.resource).pending:
            current_batch().ask_scope()

    def flag_mutated(self) -> None:
        """Flag for SQLAlchemy the changes that it does not see by itself."""
        self.tracker.flag(self._session)

    def has_flushed(self) -> None:
        """Note that what was flushed is now as in the database."""
        self._dirty_rows.are_ours(self.tracker.has_flushed())

    def rolled_back(self) -> None:
        """Note a rollback to a savepoint: what the database has is unknown now."""
        self.tracker.forget()
        self._written = False
        self._dirty_rows.rolled_back()

    def flushes(self, transaction: Transaction, *, rewrote: bool = False) -> None:
        """Raise a `Conflict`, as a flush begins, if another process has changed a row that it is to write.

        If an operation *rewrote* rows by a statement of its own, that may be the reason: nothing is raised.
        """
        self.refuse_values()
        dirty = self._session.touched()
        self.tracker.flushes(self._session, dirty)
        changed = self._dirty_rows.changed(self.has, dirty, transaction)
        if changed is not None and not rewrote:
            what = f"the {changed.class_.__name__} {changed.identity}"
            raise errors.changed(self.key, what=what, since="it was read")

    def count(self) -> None:
        """Count the version up, once, if the flush that begins writes the row."""
        mapping, session, resource = self.mapping, self._session, self.resource
        if mapping.version is None or mapping.counts_itself or self.counted or resource in session.deleted:
            return
        if resource in session.dirty and session.is_modified(resource):
            self.counted = True
            setattr(resource, mapping.version, getattr(resource, mapping.version) + 1)

    def is_raced(self) -> bool:
        """Return whether its row, if one was there before a flush of it, was inserted by another process."""
        return self.identity is None and not instance_state(self.resource).persistent

    def inserts(self, table: object) -> bool:
        """Return whether an INSERT into *table* may be of its row."""
        return self.identity is None and table in instance_state(self.resource).mapper.tables

    def refuse_values(self) -> None:
        """Refuse assigned values that cannot be saved: another key, no value of an Enum, a SQL expression."""
        state: InstanceState[Any] = instance_state(self.resource)
        columns = self.mapping.columns_of(state.mapper)
        enums, values, found_by = columns.enums, state.dict, self._found_by
        for name in state.committed_state:  # the changed ones
            if name not in columns.named or name not in values:
                continue
            value = values[name]
            if name in found_by and value != found_by[name]:
                error = ValueError(
                    f"an operation on {shown(self.key)} has changed {name}, by which the operations behind it are to "
                    "find the row: do it outside of a batch"
                )
                raise Rejected(str(error)) from error
            if name in enums and isinstance(value, str) and value not in enums[name] and not isinstance(value, Enum):
                error = ValueError(
                    f"{shown(value)} of {name} is no value of its Enum: it could not be read back (assign one of "
                    f"{sorted(enums[name])})"
                )
                raise Rejected(f"{shown(self.key)} was not saved: {said(error)}") from error
            if hasattr(value, "__clause_element__") or isinstance(value, sa.ClauseElement):
                raise Rejected(
                    f"{shown(self.key)} was not saved: an operation has assigned the SQL expression {shown(value)} to "
                    f"{name}, but must assign a value"
                )

    def _finding(self) -> dict[str, Any]:
        """Return the values by which a load finds the row and its class."""
        values = instance_state(self.resource).dict
        return {name: values[name] for name in self.mapping.finding if name in values}

    def touch(self) -> None:
        """Without a lock, make the flush write the row too if it writes only other rows.

        Otherwise another process that has loaded the same state would not notice.
        """
        mapping, session = self.mapping, self._session
        if self._written or mapping.locking or self.identity is None or self.resource not in session:
            return
        self._written = True
        if self.resource in session.deleted or self._updates():
            return
        counted = (*mapping.mapper.primary_key, mapping.mapper.version_id_col)
        others = (
            name
            for name, column in mapping.columns.items()
            if not any(column is one for one in counted) and getattr(column, "computed", None) is None
        )
        name = mapping.version or next(others, None)
        if name is not None:
            getattr(self.resource, name)  # loads it
            flag_modified(self.resource, name)

    def _updates(self) -> bool:
        """Return whether a flush writes the row itself; a change of a relationship alone may be in other rows."""
        state: InstanceState[Any] = instance_state(self.resource)
        changed = self.mapping.columns.keys() & state.committed_state.keys()
        return any(history_of(state, name).has_changes() for name in changed)

    def claim(self, transaction: Transaction) -> None:
        """Lock the row, once, and raise a `Conflict` unless it is as loaded."""
        if self.claimed:
            return
        if self.identity is not None:
            transaction.begin_to_write()
            if self.mapping.token:
                try:
                    transaction.change(self.mapping.claim, self._row_as_loaded())
                except LostRow:
                    if not (is_doubtful(batch_at_hand()) and self.is_there(transaction.connection)):
                        raise
                    # A policy hides the row from the lock, and from the write: the flush will say so.
            else:
                self._compare_all(transaction.connection)
        self.claimed = True

    def compare(self, connection: sa.Connection) -> None:
        """Raise a `Conflict` unless the row, which was not locked, is as loaded."""
        if self.claimed or self.identity is None:
            return
        if not self.mapping.token:
            self._compare_all(connection)
        elif not self.is_there(connection):
            raise self.conflict()

    def is_there(self, connection: sa.Connection) -> bool:
        """Return whether the row is as loaded, by its token."""
        return connection.execute(self.mapping.look_at, self._row_as_loaded()).first() is not None

    def _row_as_loaded(self) -> dict[str, Any]:
        return {f"_{i}": value for i, value in enumerate((*(self.identity or ()), *self.token))}

    def are_as_read(self, transaction: Transaction, connection: sa.Connection | None = None) -> bool:
        """Return whether no other process can have changed the other rows that a flush did not find."""
        return self._dirty_rows.are_as_read(connection or transaction.connection, may_look=transaction.leaves_out)

    def needs_no_answer(self) -> bool:
        """Return whether the row is claimed, or will be by a statement that fails by itself if the row has changed."""
        return self.claimed or bool(self.mapping.token)

    def _compare_all(self, connection: sa.Connection) -> None:
        mapper: Mapper[Any] = instance_state(self.resource).mapper
        select = self.mapping.compare(mapper, tuple(self.seen))
        row = connection.execute(select, {f"_{i}": part for i, part in enumerate(self.identity or ())}).one_or_none()
        if row is None or not self.is_same(row):
            raise self.conflict()

    @property
    def seen(self) -> dict[str, Any]:
        """The loaded values of its columns, which a save compares."""
        return self.tracker.seen[instance_state(self.resource)]

    def is_same(self, row: Sequence[Any]) -> bool:
        """Return whether *row* has the loaded values, in the order of `seen`."""
        in_place = self.mapping.columns_of(instance_state(self.resource).mapper).in_place
        return not any(
            in_place[name].differ(seen, value) if name in in_place else exact(seen) != exact(value)
            for (name, seen), value in zip(self.seen.items(), row, strict=True)
        )

    def conflict(self) -> Conflict:
        """Return the error of a save that finds another row than was loaded."""
        return errors.changed(self.key)

"""What one batch has loaded of a mapped class's row, and what has changed since: here, and in the database."""

from __future__ import annotations

from copy import deepcopy
from enum import Enum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm.attributes import flag_modified, instance_state

from geventbatch._processor import current_batch
from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, Rejected
from geventbatch.stores._object_contents import is_in
from geventbatch.stores.sqlalchemy._bound_values import exact
from geventbatch.stores.sqlalchemy._change_tracker import tracker_of
from geventbatch.stores.sqlalchemy._computed import forget, is_incomplete
from geventbatch.stores.sqlalchemy._dirty_rows import DirtyRows
from geventbatch.stores.sqlalchemy._loaded_values import given as of_new
from geventbatch.stores.sqlalchemy._transaction import LostRow, is_doubtful

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from sqlalchemy.orm import InstanceState, Mapper, Session

    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._transaction import Transaction


class LoadedResource:
    """The resource of one batch, as it was loaded; or made, where there was no row."""

    # -- mutable state ---------------------------------------------------------------------------------------
    claimed: bool  # the row is ours to write
    _written: bool  # and it is written, or is by the flush to come

    def __init__(
        self, mapping: Mapping, key: Hashable, session: Session, resource: Any, token: Sequence[Any] | None
    ) -> None:
        """Take what was loaded, with what the mapping's `token` was; None: the resource was made, there is no row."""
        self._mapping = mapping
        self._key = key
        self._session = session
        self.resource = resource
        self.claimed = mapping.locking
        self._written = False
        self.identity: tuple[Any, ...] | None = None  # of the row that was loaded; None: there was none
        self._tracker = tracker_of(session, mapping)
        self._found_by = self._finding()
        self._dirty_rows = DirtyRows(mapping, session, self._tracker)
        if mapping.has_computed or token is None:
            current_batch().ask_scope(first=True)
        if token is not None:
            self.identity = instance_state(resource).identity
            self._token = tuple(token)
            self._tracker.sees(resource)

    def changes(self) -> bool:
        """Whether the session has something to write."""
        session = self._session
        return bool(session.new or session.deleted or any(session.is_modified(one) for one in session.dirty))

    def copier_of(self, value: object) -> Callable[[Any], Any] | None:
        """What copies *value*, if it may be changed in place in a column of the resource, or of what else there is."""
        for instance in (*self._session.new, *self._session.identity_map.values()):
            state: InstanceState[Any] = instance_state(instance)
            columns = self._mapping.columns_of(state.mapper)
            for name in columns.changing:
                found = state.dict.get(name)
                if found is value:
                    return deepcopy if name in columns.composites else columns.in_place[name].copied
                if name in columns.of_objects and is_in(value, found):
                    return deepcopy
        return None

    def adds(self) -> bool:
        """Whether something was added that is not in the database, or moved, so that a deletion would not find it."""
        session = self._session
        return any(one is not self.resource for one in session.new) or any(
            state.committed_state.keys() & state.mapper.relationships.keys()
            for state in (instance_state(one) for one in (*session.new, *session.dirty))
        )

    def operation_returned(
        self, transaction: Transaction, given: list[tuple[InstanceState[Any], str]], *, wrote: bool
    ) -> None:
        """Have the operations behind the one at hand find what a load would give of what it has changed.

        That is what the database computes, and the values that it was *given*, as the database keeps them. What it
        *wrote* itself, by a flush or a statement, has changed something too.
        Switches: no.
        """
        state: InstanceState[Any] = instance_state(self.resource)
        is_new = state.key is None and state.pending
        if is_new:
            given = [*given, *of_new(state, self._mapping.columns_of(state.mapper).as_loaded)]
        for one, name in given:
            if not self._tracker.make_as_loaded(one, name, transaction.zone):
                current_batch().cut()
        if not (is_new or self._mapping.has_computed):
            return
        batch = current_batch()
        if is_new and not batch.stepwise and is_incomplete(state):
            batch.cut()
        batch.ask_scope()
        if self._mapping.has_computed:
            self.flag_mutated()
            if wrote or self.changes():
                forget(self._mapping, self._session)
                if not transaction.writes_anywhere and self._mapping.reads_computed:
                    batch.cut()

    def operation_raised(self) -> None:
        """See to those behind an operation that has raised too. Switches: no."""
        if self._mapping.has_computed or instance_state(self.resource).pending:
            current_batch().ask_scope()

    def flag_mutated(self) -> None:
        """Tell SQLAlchemy of what was changed so that it does not see it by itself."""
        self._tracker.flag(self._session)

    @property
    def mapping(self) -> Mapping:
        """Of its store."""
        return self._mapping

    def known(self) -> dict[InstanceState[Any], dict[str, Any]]:
        """What the database has of what can change in place, as far as that is known."""
        return self._tracker.known.copy()

    def taken(self) -> dict[InstanceState[Any], dict[str, Any]]:
        """What columns have got of composites, for `put_known_back`."""
        return self._tracker.taken.copy()

    def put_known_back(
        self, known: dict[InstanceState[Any], dict[str, Any]], taken: dict[InstanceState[Any], dict[str, Any]]
    ) -> None:
        """It is that again, which `known` and `taken` gave."""
        self._tracker.known = known.copy()
        self._tracker.taken = taken.copy()

    def has_flushed(self) -> None:
        """What was flushed is now as it is in the database."""
        self._dirty_rows.are_ours(self._tracker.has_flushed())

    def rolled_back(self) -> None:
        """A savepoint: nobody knows any more what the database has."""
        self._tracker.forget()
        self._written = False
        self._dirty_rows.rolled_back()

    def flushes(self, transaction: Transaction, *, rewrote: bool = False) -> None:
        """A flush begins: it is a `Conflict` when somebody else has changed what it is to write beside the resource.

        Where the operation *rewrote* rows by a statement of its own, it may have been that.
        """
        self._refuse_values()
        dirty = list(self._session.dirty)
        self._tracker.flushes(self._session, dirty)
        changed = self._dirty_rows.changed(self.resource, dirty, transaction)
        if changed is not None and not rewrote:
            raise Conflict(
                f"{shown(self._key)} was not saved: somebody else changed the {changed.class_.__name__} "
                f"{changed.identity} since it was read"
            )

    def _refuse_values(self) -> None:
        """An expression that one operation has assigned would be lost in that of the next one."""
        state: InstanceState[Any] = instance_state(self.resource)
        columns = self._mapping.columns_of(state.mapper)
        enums, values, found_by = columns.enums, state.dict, self._found_by
        for name in state.committed_state:  # which have changed
            if name not in columns.named or name not in values:
                continue
            value = values[name]
            if name in found_by and value != found_by[name]:
                error = ValueError(
                    f"an operation on {shown(self._key)} has changed {name}, by which the operations behind it are to "
                    "find the row: do it outside of a batch"
                )
                raise Rejected(str(error)) from error
            if name in enums and isinstance(value, str) and value not in enums[name] and not isinstance(value, Enum):
                error = ValueError(
                    f"{shown(value)} of {name} is no value of its Enum: it could not be read back (assign one of "
                    f"{sorted(enums[name])})"
                )
                raise Rejected(f"{shown(self._key)} was not saved: {said(error)}") from error
            if hasattr(value, "__clause_element__") or isinstance(value, sa.ClauseElement):
                raise Rejected(
                    f"{shown(self._key)} was not saved: an operation has assigned the SQL expression {shown(value)} to "
                    f"{name}, but must assign a value"
                )

    def _finding(self) -> dict[str, Any]:
        """The attributes by which a load finds the row, and knows its class."""
        values = instance_state(self.resource).dict
        return {name: values[name] for name in self._mapping.finding if name in values}

    def touch(self) -> None:
        """Where nobody is kept out by a lock, have the row changed too when only something beside it is.

        Else another process that has loaded the same would not notice.
        """
        mapping, session = self._mapping, self._session
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
            getattr(self.resource, name)  # so that it is loaded
            flag_modified(self.resource, name)

    def _updates(self) -> bool:
        """Whether a flush writes the row itself: what has come to it by a relationship alone may be in other rows."""
        state: InstanceState[Any] = instance_state(self.resource)
        changed = self._mapping.columns.keys() & state.committed_state.keys()
        return any(state.attrs[name].history.has_changes() for name in changed)

    def claim(self, transaction: Transaction) -> None:
        """Lock the row, once, and see that it is as it was loaded: else it is a `Conflict`."""
        if self.claimed:
            return
        if self.identity is not None:
            transaction.begin_to_write()
            if self._mapping.token:
                mapping = self._mapping
                names = [f"_{i}" for i in range(len(self.identity) + len(self._token))]
                parameters = dict(zip(names, (*self.identity, *self._token), strict=True))
                try:
                    transaction.change(mapping.claim, parameters)
                except LostRow:
                    if not (is_doubtful(current_batch()) and self.is_there(transaction.connection)):
                        raise
                    # A policy keeps it from being locked, and from being written: the flush will say so.
            else:
                self._compare_all(transaction.connection)
        self.claimed = True

    def compare(self, connection: sa.Connection) -> None:
        """See that the row is as it was loaded, where nobody was kept out: else it is a `Conflict`."""
        if self.claimed or self.identity is None:
            return
        if not self._mapping.token:
            self._compare_all(connection)
        elif not self.is_there(connection):
            raise self.conflict()

    def is_there(self, connection: sa.Connection) -> bool:
        """Whether the row is as it was loaded, where there is a token."""
        names = [f"_{i}" for i in range(len(self.identity or ()) + len(self._token))]
        parameters = dict(zip(names, (*(self.identity or ()), *self._token), strict=True))
        return connection.execute(self._mapping.look_at, parameters).first() is not None

    def are_as_read(self, transaction: Transaction, connection: sa.Connection | None = None) -> bool:
        """Whether nobody else can have changed the rows beside that a flush has not found. It looks on *connection*."""
        return self._dirty_rows.are_as_read(connection or transaction.connection, may_look=transaction.leaves_out)

    def needs_no_answer(self) -> bool:
        """Whether the row is claimed, or will be by a statement that fails by itself where it is another one."""
        return self.claimed or bool(self._mapping.token)

    def _compare_all(self, connection: sa.Connection) -> None:
        mapper: Mapper[Any] = instance_state(self.resource).mapper
        select = self._mapping.compare(mapper, tuple(self._tracker.seen))
        row = connection.execute(select, {f"_{i}": part for i, part in enumerate(self.identity or ())}).one_or_none()
        if row is None or not self._is_same(mapper, row):
            raise self.conflict()

    def _is_same(self, mapper: Mapper[Any], row: Sequence[Any]) -> bool:
        in_place = self._mapping.columns_of(mapper).in_place
        return not any(
            in_place[name].differ(seen, value) if name in in_place else exact(seen) != exact(value)
            for (name, seen), value in zip(self._tracker.seen.items(), row, strict=True)
        )

    def conflict(self) -> Conflict:
        """What a save is that finds another row than was loaded."""
        return Conflict(f"{shown(self._key)} was not saved: somebody else changed it since it was loaded")

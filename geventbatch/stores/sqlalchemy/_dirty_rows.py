"""Rows other than the resource that a flush is to change: locked, and compared with what the batch has read.

They are not locked when they are read, and an operation writes values that it has derived from what it has read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
from sqlalchemy.orm import LoaderCallableStatus, PassiveFlag, RelationshipDirection
from sqlalchemy.orm.attributes import get_history, instance_state

from geventbatch.stores.sqlalchemy._bound_values import exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sqlalchemy.orm import InstanceState, Mapper, Session
    from sqlalchemy.orm.attributes import History

    from geventbatch.stores.sqlalchemy._change_tracker import ChangeTracker
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._transaction import Transaction


class DirtyRows:
    """The dirty rows of one batch, beside its resource's."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _ours: dict[InstanceState[Any], int]  # compared or written in this transaction; within so many savepoints
    _counted: list[sa.Select[Any]]  # of what the flush at hand leaves to SQLAlchemy: finds it with the version it had

    def __init__(self, mapping: Mapping, session: Session, tracker: ChangeTracker) -> None:
        self._mapping = mapping
        self._session = session
        self._tracker = tracker
        self._ours = {}
        self._counted = []

    def changed(
        self, is_resource: Callable[[object], bool], dirty: Iterable[object], transaction: Transaction
    ) -> InstanceState[Any] | None:
        """Lock the *dirty* rows except resources', and return the first one that another process has changed.

        Rows with a `version_id_col` are left to SQLAlchemy.
        """
        by_mapper: dict[Mapper[Any], list[InstanceState[Any]]] = {}
        self._counted = []
        for state in to_change(self._session, is_resource, dirty):
            if state.mapper.version_id_col is not None:
                self._counted.append(_with_version(state))
            elif state not in self._ours:
                by_mapper.setdefault(state.mapper, []).append(state)
        if by_mapper:
            transaction.begin_to_write()
        for mapper, states in by_mapper.items():
            found = self._compare(transaction.connection, mapper, states)
            if found is not None:
                return found
            self.are_ours(states)
        return None

    def are_as_read(self, connection: sa.Connection, *, may_look: bool) -> bool:
        """Return whether no other process can have changed the rows that a flush has not found.

        If there are rows with versions, which are not locked, that takes a query for each (with *may_look*).
        """
        return not self._counted or (may_look and all(connection.execute(one).first() for one in self._counted))

    def are_ours(self, states: Iterable[InstanceState[Any]]) -> None:
        """Note that the rows of *states* are locked until this transaction ends."""
        depth = self._depth()
        for state in states:
            self._ours.setdefault(state, depth)

    def rolled_back(self) -> None:
        """Note a rollback to a savepoint, which has released the locks taken since."""
        depth = self._depth()
        self._ours = {state: when for state, when in self._ours.items() if when <= depth}

    def _depth(self) -> int:
        depth, nested = 0, self._session.get_nested_transaction()
        while nested is not None and nested.nested:
            depth, nested = depth + 1, nested.parent
        return depth

    def _compare(
        self, connection: sa.Connection, mapper: Mapper[Any], states: list[InstanceState[Any]]
    ) -> InstanceState[Any] | None:
        columns = self._mapping.columns_of(mapper)
        read = {cast("Any", state.key)[1]: (state, self._read(state)) for state in states}
        names = [name for name in columns.named if any(name in values for _, values in read.values())]
        key: Any = mapper.primary_key
        select = sa.select(*key, *[columns.named[name] for name in names]).select_from(mapper.selectable)
        rows = connection.execute(
            select.where(sa.tuple_(*key).in_(read) if len(key) > 1 else key[0].in_([one[0] for one in read]))
            .order_by(*key)
            .with_for_update(of=list(mapper.tables), key_share=True)
        )
        there = {tuple(row[: len(key)]): row[len(key) :] for row in rows}
        for identity, (state, values) in read.items():
            row = there.get(identity)
            if row is None:
                return state
            for name, value in zip(names, row, strict=True):
                if name in values and self._differs(state, name, values[name], value):
                    return state
        return None

    def _read(self, state: InstanceState[Any]) -> dict[str, Any]:
        """Return the values read of a row, as far as still known; for a mutable value, its bound form."""
        columns = self._mapping.columns_of(state.mapper)
        values = {**state.dict, **state.committed_state}
        known = self._tracker.known.get(state, {})
        read = {
            name: values[name]
            for name in columns.named.keys() - columns.in_place.keys()
            if name in values and not isinstance(values[name], LoaderCallableStatus)
        }
        return {**read, **known}

    def _differs(self, state: InstanceState[Any], name: str, read: Any, value: Any) -> bool:
        columns = self._mapping.columns_of(state.mapper)
        if name in columns.in_place:
            return columns.in_place[name].differ(read, value)
        return bool(exact(read) != exact(value))


def to_change(
    session: Session, is_resource: Callable[[object], bool], dirty: Iterable[object]
) -> Iterator[InstanceState[Any]]:
    """Yield the rows that a flush is to change, except resources, unless they have joined or left a collection."""
    for instance in dirty:
        state: InstanceState[Any] = instance_state(instance)
        if not is_resource(instance) and session.is_modified(instance, include_collections=False):
            yield state
        for name in state.committed_state.keys() & state.mapper.relationships.keys():
            relation = state.mapper.relationships[name]
            if relation.direction is RelationshipDirection.ONETOMANY and not relation.viewonly:
                yield from _moved(state, name)
    for instance in session.deleted:
        if not is_resource(instance):
            yield instance_state(instance)


def _moved(state: InstanceState[Any], relation: str) -> Iterator[InstanceState[Any]]:
    """Yield the instances that have joined or left a collection: their foreign key changes."""
    history = history_of(state, relation)
    for child in (*(history.added or ()), *(history.deleted or ())):
        found = instance_state(child)
        if found.persistent:
            yield found


def history_of(state: InstanceState[Any], name: str) -> History:
    """Return what has changed of the attribute *name*, and load nothing.

    `InstanceState.attrs` would tell it too, but holds the state, and is held by it.
    """
    return get_history(state.obj(), name, PassiveFlag.PASSIVE_NO_INITIALIZE)


def _with_version(state: InstanceState[Any]) -> sa.Select[Any]:
    """Return a SELECT that finds the row of *state* if it has the version that was read."""
    mapper: Any = state.mapper
    column = mapper.version_id_col
    name = mapper.get_property_by_column(column).key
    is_row = [part == value for part, value in zip(mapper.primary_key, cast("Any", state.key)[1], strict=True)]
    version = state.committed_state.get(name, state.dict.get(name))
    return sa.select(column).select_from(mapper.selectable).where(*is_row, column == version)

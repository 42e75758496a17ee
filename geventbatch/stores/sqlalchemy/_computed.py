"""Attributes that the database computes from rows: after a change, the loaded values are outdated.

These are generated columns, `column_property`, and `viewonly` relationships. SQLAlchemy loads them once. An operation
behind one that has changed something has to find them as if that had been saved. So they are loaded again, after a
flush; or, on a database where operations write nothing, the batch is cut there, once an operation has read one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.collections import collection_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy.orm import InstanceState, Mapper

    from geventbatch.stores.sqlalchemy._mapping import Mapping


UNHELD: Final = ("dynamic", "write_only")
"""Lazy modes of relationships that have no collection in memory: each access is a query."""

_foreign_keys: Final[WeakKeyDictionary[Mapper[Any], frozenset[str]]] = WeakKeyDictionary()
"""The foreign key attributes of each class."""


def has_computed(mapper: Mapper[Any]) -> bool:
    """Return whether *mapper*, or one that its relationships lead to, has computed attributes."""
    seen: set[Mapper[Any]] = set()
    todo = [mapper]
    while todo:
        found = todo.pop()
        if found not in seen:
            seen.add(found)
            todo += [*found.self_and_descendants, *[relation.mapper for relation in found.relationships]]
    return any(of_row(found) or of_all(found) for found in seen)


def of_row(mapper: Mapper[Any]) -> frozenset[str]:
    """Return the attributes that are computed from the row's other columns, when the row is written."""
    return frozenset(
        attribute.key
        for attribute in mapper.column_attrs
        for column in attribute.columns
        if isinstance(column, sa.Column) and (column.computed is not None or column.server_onupdate is not None)
    )


def of_all(mapper: Mapper[Any]) -> frozenset[str]:
    """Return the attributes that are computed when they are read, from any rows."""
    expressions = {
        attribute.key for attribute in mapper.column_attrs if not isinstance(attribute.columns[0], sa.Column)
    }
    return frozenset(expressions | {relation.key for relation in mapper.relationships if relation.viewonly})


def is_incomplete(state: InstanceState[Any]) -> bool:
    """Return whether a new row will have values that its instance lacks: keys, and defaults of either side."""
    return any(
        isinstance(column, sa.Column)
        and attribute.key not in state.dict
        and (
            column.default is not None
            or column.server_default is not None
            or column is getattr(column.table, "autoincrement_column", None)
        )
        for attribute in state.mapper.column_attrs
        for column in attribute.columns
    )


def forget(mapping: Mapping, session: Session) -> None:
    """Expire the computed attributes that may have changed with what the session has changed."""
    for instance, names in _stale(mapping, session):
        Session.expire(session, instance, names)


def _stale(mapping: Mapping, session: Session) -> Iterator[tuple[object, list[str]]]:
    for instance in list(session.identity_map.values()):
        state: InstanceState[Any] = instance_state(instance)
        columns = mapping.columns_of(state.mapper)
        names = columns.of_all | columns.of_row if state.modified else columns.of_all
        loaded = [name for name in names if name in state.dict]
        if loaded:
            yield instance, loaded


def is_stale(
    session: Session, added: Sequence[object], assigned: Sequence[tuple[InstanceState[Any], str]], *, deleted: bool
) -> bool:
    """Return whether a loaded relationship does not show a change that bypassed it.

    An operation has *deleted* something by the session, *added* something with a foreign key, or *assigned* a foreign
    key.
    """
    for state, name in assigned:
        if is_foreign_key(state, name) and _has_changed(state, name):
            return True
    if not added and not deleted:
        return False
    keyed = [one for one in added if has_foreign_key(sa.inspect(one))]
    if not keyed and not deleted:
        return False
    return any(
        misses(state, relation, keyed, session)
        for state in session.identity_map.all_states()
        for relation in state.mapper.relationships
        if relation.key in state.dict and not relation.viewonly
    )


def misses(state: InstanceState[Any], relation: Any, keyed: list[object], session: Session) -> bool:
    """Return whether the loaded *relation* of *state* shows a deleted instance, or lacks a child among *keyed*."""
    if relation.lazy in UNHELD:
        return False
    value = state.dict[relation.key]
    members = list(collection_adapter(value)) if relation.uselist else [value]
    if any(one is not None and _is_gone(one, session) for one in members):
        return state.obj() not in session.deleted
    shown = {id(one) for one in members}
    return any(
        isinstance(one, relation.mapper.class_) and id(one) not in shown and _refers(sa.inspect(one), state, relation)
        for one in keyed
    )


def _is_gone(instance: object, session: Session) -> bool:
    state: InstanceState[Any] = sa.inspect(instance)
    return instance in session.deleted or state.deleted or state.was_deleted


def _refers(child: InstanceState[Any], parent: InstanceState[Any], relation: Any) -> bool:
    """Return whether the foreign key of *child* is *parent*'s key."""
    if relation.secondary is not None:
        return False
    pairs = [
        (parent.mapper.get_property_by_column(local).key, child.mapper.get_property_by_column(remote).key)
        for local, remote in relation.local_remote_pairs
    ]
    return all(child.dict.get(theirs) == parent.dict.get(own) is not None for own, theirs in pairs)


def has_foreign_key(state: InstanceState[Any]) -> bool:
    """Return whether the instance has a foreign key that is not None."""
    return any(
        state.dict.get(attribute.key) is not None and is_foreign_key(state, attribute.key)
        for attribute in state.mapper.column_attrs
    )


def is_foreign_key(state: InstanceState[Any], name: str) -> bool:
    """Return whether the attribute *name* is a foreign key."""
    mapper = state.mapper
    found = _foreign_keys.get(mapper)
    if found is None:
        columns = {one.key: one.columns[0] for one in mapper.column_attrs}
        found = _foreign_keys[mapper] = frozenset(
            key for key, column in columns.items() if isinstance(column, sa.Column) and column.foreign_keys
        )
    return name in found


def _has_changed(state: InstanceState[Any], name: str) -> bool:
    return state.persistent and state.committed_state.get(name, state.dict.get(name)) != state.dict.get(name)

"""Attributes that the database computes of the rows as they are: what operations read of them is not what they were.

A generated column, a `column_property`, a relationship that is only looked at: SQLAlchemy loads them once. What is
behind an operation that has changed something finds them as if that had been saved: they are loaded anew, behind a
flush; or, where operations write nothing, the batch is cut there, once some operation has read such a thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.collections import collection_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import InstanceState, Mapper

    from geventbatch.stores.sqlalchemy._mapping import Mapping


UNHELD: Final = ("dynamic", "write_only")
"""Relationships of which SQLAlchemy keeps no collection: each look at them is a query."""

_foreign_keys: Final[WeakKeyDictionary[Mapper[Any], frozenset[str]]] = WeakKeyDictionary()
"""The attributes of the classes that have one."""


def has_computed(mapper: Mapper[Any]) -> bool:
    """Whether *mapper*, or one that its relationships lead to, has such attributes."""
    seen: set[Mapper[Any]] = set()
    todo = [mapper]
    while todo:
        found = todo.pop()
        if found not in seen:
            seen.add(found)
            todo += [*found.self_and_descendants, *[relation.mapper for relation in found.relationships]]
    return any(of_row(found) or of_all(found) for found in seen)


def of_row(mapper: Mapper[Any]) -> frozenset[str]:
    """The attributes that are computed of the row's other columns: when the row is written."""
    return frozenset(
        attribute.key
        for attribute in mapper.column_attrs
        for column in attribute.columns
        if isinstance(column, sa.Column) and (column.computed is not None or column.server_onupdate is not None)
    )


def of_all(mapper: Mapper[Any]) -> frozenset[str]:
    """Those that are computed when they are read, of whatever they ask for."""
    expressions = {
        attribute.key for attribute in mapper.column_attrs if not isinstance(attribute.columns[0], sa.Column)
    }
    return frozenset(expressions | {relation.key for relation in mapper.relationships if relation.viewonly})


def is_incomplete(state: InstanceState[Any]) -> bool:
    """Whether a new row will have more than its instance has: keys and defaults, of this side or of the server."""
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
    """Have what is computed of what the session has changed loaded anew when it is read."""
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
    session: Session, added: list[object], assigned: list[tuple[InstanceState[Any], str]], *, deleted: bool
) -> bool:
    """Whether a relationship that is loaded does not show what an operation has done without it.

    That is: *deleted* something by the session, *added* something with a foreign key, or *assigned* one.
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
    """Whether *relation* of *state*, which is loaded, shows what is deleted, or not what has its key by now."""
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
    """Whether *child* has the key of *parent*."""
    if relation.secondary is not None:
        return False
    pairs = [
        (parent.mapper.get_property_by_column(local).key, child.mapper.get_property_by_column(remote).key)
        for local, remote in relation.local_remote_pairs
    ]
    return all(child.dict.get(theirs) == parent.dict.get(own) is not None for own, theirs in pairs)


def has_foreign_key(state: InstanceState[Any]) -> bool:
    """Whether the instance has one that is not None."""
    return any(
        state.dict.get(attribute.key) is not None and is_foreign_key(state, attribute.key)
        for attribute in state.mapper.column_attrs
    )


def is_foreign_key(state: InstanceState[Any], name: str) -> bool:
    """Whether the attribute *name* is one."""
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

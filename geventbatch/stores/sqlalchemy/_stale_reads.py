"""Stale reads: loaded values that the current operation, run alone, would have loaded after its own changes.

A loaded relationship does not show a change that bypasses it: a row that is added or moved by its foreign key, or
deleted by the session. Nor do instances show what a statement does. If an operation reads them after such a change, it
finds, alone, what the database has; here, what earlier operations have loaded. So the values are removed while such an
operation runs. If it reads them, it is applied again, to the next load; if not, they are put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.orm.attributes import instance_state

from geventbatch.stores.sqlalchemy._computed import UNHELD, has_foreign_key, is_foreign_key, misses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.orm import InstanceState, Mapper


_EAGER: Final = ("joined", False, "subquery", "selectin", "immediate")
"""Lazy modes of relationships that are loaded with the instance."""


class StaleReads:
    """The stale reads of one attempt's operations."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _aside: list[tuple[InstanceState[Any], str, Any, bool]]  # removed for the current operation; whether it had changes
    _expired: list[tuple[InstanceState[Any], list[str]]]  # since the current operation has sent a statement
    _written: bool  # a removed value with changes was flushed: whether it was read since then is unknown

    def __init__(self, session: Session, resources: Iterable[object]) -> None:
        """Except the values that were loaded with *resources*: an operation alone finds them loaded too."""
        self._session = session
        self._eager: dict[InstanceState[Any], set[str]] = {}  # by resource
        for state in map(instance_state, resources):
            relationships = state.mapper.relationships
            self._eager[state] = {one.key for one in relationships if one.lazy in _EAGER}
            if state.key is None:  # new: it has what ``missing`` has set
                self._eager[state] |= relationships.keys() & state.dict.keys()
        self._aside, self._expired, self._written = [], [], False

    def has_added(self, instance: object) -> None:
        """Note that the current operation has added *instance*."""
        if has_foreign_key(sa.inspect(instance)):
            self._put_aside(lambda state, relation: self._misses(state, relation, [instance]))

    def has_deleted(self) -> None:
        """Note that the current operation has deleted something by the session."""
        self._put_aside(lambda state, relation: self._misses(state, relation, []))

    def assigns(self, child: InstanceState[Any], name: str) -> None:
        """Note that the current operation assigns the attribute *name* of *child*."""
        mapper = child.mapper
        if not is_foreign_key(child, name):
            return
        column = mapper.attrs[name].columns[0]

        def concerns(state: InstanceState[Any], relation: Any) -> bool:
            if relation.viewonly:
                return False
            if state is child and column in relation.local_columns:
                return True
            return bool(relation.mapper.common_parent(mapper) and column in relation.remote_side)

        self._put_aside(concerns)

    def writes(self) -> None:
        """Note that the current operation flushes: ``viewonly`` relationships may have changed."""
        self._put_aside(lambda _, relation: bool(relation.viewonly))

    def flushes(self) -> None:
        """Put back, before a flush, what has changes to write."""
        for state, name, value, changed in self._aside:
            if changed and name not in state.dict:
                state.dict[name] = value
                self._written = True

    def executes(self, statement: str | None) -> None:
        """Note that the operation sends *statement*, which may change the tables that it names. None may change any."""
        for state in self._session.identity_map.all_states():
            names = [
                relation.key
                for relation in self._loaded_of(state)
                if statement is None or names_table(statement, relation.mapper)
            ]
            unheld = {one.key for one in state.mapper.relationships if one.lazy in UNHELD}
            if state not in self._eager and (statement is None or names_table(statement, state.mapper)):
                names = [name for name in state.manager if name in state.dict and name not in unheld]
            instance = state.obj()
            if not names or instance is None:
                continue
            if state.modified:  # by itself: earlier changes are flushed
                self._written = True
            else:
                Session.expire(self._session, instance, names)
                self._expired.append((state, names))

    def end_operation(self) -> bool:
        """Put the removed values back, and return whether the operation that has ended has made a stale read."""
        found, self._written = self._written, False
        for state, name, value, changed in self._aside:
            if name in state.dict or changed != (name in state.committed_state):
                found = True
            elif state.session is self._session:
                state.dict[name] = value
        found = found or any(name in state.dict for state, names in self._expired for name in names)
        self._aside, self._expired = [], []
        return found

    def _put_aside(self, concerns: Callable[[InstanceState[Any], Any], bool]) -> None:
        for state in self._session.identity_map.all_states():
            for relation in self._loaded_of(state):
                if concerns(state, relation):
                    name = relation.key
                    self._aside.append((state, name, state.dict.pop(name), name in state.committed_state))

    def _misses(self, state: InstanceState[Any], relation: Any, added: list[object]) -> bool:
        return not relation.viewonly and misses(state, relation, added, self._session)

    def _loaded_of(self, state: InstanceState[Any]) -> list[Any]:
        """Return the loaded relationships, without those loaded with the resource."""
        eager = self._eager.get(state, ())
        relations = (one for one in state.mapper.relationships if one.lazy not in UNHELD)
        return [one for one in relations if one.key in state.dict and one.key not in eager]


def names_table(statement: str, mapper: Mapper[Any]) -> bool:
    """Return whether *statement* names a table of *mapper*."""
    return any(getattr(table, "name", "") in statement for table in mapper.tables)

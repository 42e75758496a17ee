"""Tracks the database's values of a session's instances, so that a flush writes every value that differs.

SQLAlchemy tracks assignments, compared by `==`, and changes in place only of types that report them. Here, the bound
forms of all mutable values are kept at each load and after each flush.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import event
from sqlalchemy.orm.attributes import flag_modified, instance_state, set_attribute

from geventbatch._safe_repr import said, shown
from geventbatch.stores.sqlalchemy._bound_values import exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from datetime import tzinfo

    from sqlalchemy.orm import InstanceState, Session

    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession

_NAME: Final = "_change_tracker"
"""The key of a session's tracker in its ``__dict__``."""

_NOTHING: Final[dict[Any, Any]] = {}
"""An empty dict that nobody changes: few trackers need one of their own."""


class ChangeTracker:
    """Tracks the instances in one session."""

    # -- mutable state ---------------------------------------------------------------------------------------
    # The dict of one instance, in these two, is never changed once complete: copies of the whole share it.
    known: dict[InstanceState[Any], dict[str, Any]]  # the bound forms in the database, of mutable columns
    taken: dict[InstanceState[Any], dict[str, Any]]  # the bound forms taken from composites that were changed in place
    seen: dict[InstanceState[Any], dict[str, Any]]  # all columns of each resource, as first loaded
    _flushed: Sequence[InstanceState[Any]]  # being flushed

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self.known = self.taken = self.seen = _NOTHING
        self._flushed = ()

    def sees(self, resource: object) -> None:
        """Keep the loaded values of *resource*, which the save compares with the database."""
        state: InstanceState[Any] = instance_state(resource)
        self.seen = self.seen or {}
        self.seen[state] = {} if self._mapping.sees_all else _NOTHING
        self._see(state, None)

    def has_loaded(self, state: InstanceState[Any], names: Iterable[str] | None = None) -> None:
        """Note that the attributes *names* of *state*, or all, are now as in the database."""
        bound = self._mapping.columns_of(state.mapper).in_place
        if bound:
            values = state.dict
            self.known = self.known or {}
            known = self.known[state] = {**self.known.get(state, {})}
            for name in bound if names is None else bound.keys() & names:
                if name in values:
                    known[name] = self._exact(state, name, values[name])
        if state in self.seen:
            self._see(state, names)

    def flag(self, session: BatchSession) -> None:
        """Flag for SQLAlchemy the values that were changed in place, or to one that is only equal."""
        for state, known in list(self.known.items()):
            instance = state.obj()
            if instance is not None and instance in session and instance not in session.new:
                self._flag_in_place(state, instance, known)
        for instance in session.touched():
            self._flag_loose(instance_state(instance), instance)

    def make_as_loaded(self, state: InstanceState[Any], name: str, zone: Callable[[], tzinfo | None]) -> bool:
        """Replace the value assigned to *name* by its loaded form. Return False if that is uncertain."""
        columns, values = self._mapping.columns_of(state.mapper), state.dict
        if name not in values:
            return True
        value = values[name]
        known = columns.as_loaded[name]
        found = known(value, zone() if known.zoned else None)
        values[name] = found
        if columns.composites and exact(found) != exact(value):
            for composite, parts in columns.composites.items():
                if name in parts:  # it is made of them again
                    values.pop(composite, None)
        return known.knows(value)

    def flushes(self, session: Session, dirty: Iterable[object]) -> None:
        """Note the instances that the flush that begins may write."""
        self._flushed = [instance_state(instance) for instance in (*session.new, *dirty)]

    def has_flushed(self) -> Sequence[InstanceState[Any]]:
        """Note that the flushed instances are now as in the database, and return them."""
        flushed, self._flushed = self._flushed, ()
        for state in flushed:
            self.has_loaded(state)
        return flushed

    def forget(self) -> None:
        """Forget, after a rollback to a savepoint, what the database has: the resource is then written whole."""
        for state in list(self.known):
            if state in self.seen:
                self.known[state] = {}
            else:
                del self.known[state]

    def _flag_in_place(self, state: InstanceState[Any], instance: object, known: dict[str, Any]) -> None:
        columns = self._mapping.columns_of(state.mapper)
        values = state.dict
        for name, parts in columns.composites.items():
            if values.get(name) is not None:
                self._take_parts(state, instance, name, parts)
        for name, bound in columns.in_place.items():
            if name in values and (name not in known or bound.differ(known[name], values[name])):
                flag_modified(instance, name)

    def _take_parts(self, state: InstanceState[Any], instance: object, name: str, parts: tuple[str, ...]) -> None:
        """Set the columns of a composite from its object, if that was changed in place and they were not."""
        columns, known, values = self._mapping.columns_of(state.mapper), self.known[state], state.dict
        self.taken = self.taken or {}
        taken = self.taken[state] = {**self.taken.get(state, {})}
        for part, value in zip(parts, parts_of(values[name]), strict=True):
            bound = columns.in_place[part]
            if part not in values or part not in known:
                continue
            unchanged = not bound.differ(known[part], values[part])
            if not unchanged and part in taken:  # an operation's own assignment would count
                unchanged = not bound.differ(taken[part], values[part])
            if unchanged and bound.differ(bound.exact(values[part]), value):
                set_attribute(instance, part, value)
                taken[part] = bound.exact(value)

    def _flag_loose(self, state: InstanceState[Any], instance: object) -> None:
        loose = self._mapping.columns_of(state.mapper).loose
        for name in loose & state.committed_state.keys():
            before, now = state.committed_state[name], state.dict.get(name)
            if before == now and exact(before) != exact(now):
                flag_modified(instance, name)

    def _see(self, state: InstanceState[Any], names: Iterable[str] | None) -> None:
        if self._mapping.sees_all:
            columns = self._mapping.columns_of(state.mapper)
            known, seen = self.known.get(state, {}), self.seen[state] or {}
            self.seen[state] = seen
            for name in columns.named if names is None else columns.named.keys() & names:
                if name in state.dict and name not in seen:
                    seen[name] = known[name] if name in columns.in_place else state.dict[name]

    def _exact(self, state: InstanceState[Any], name: str, value: Any) -> Any:
        columns = self._mapping.columns_of(state.mapper)
        try:
            return columns.in_place[name].exact(value)
        except Exception as error:
            raise TypeError(
                f"whether {columns.named[name]} of {state.class_.__name__} has changed cannot be told: "
                f"{shown(value)} can neither be bound nor pickled ({said(error)}); give its type a process_bind_param"
            ) from error


def parts_of(composite: Any) -> tuple[Any, ...]:
    """Return the values of a composite's columns."""
    if hasattr(composite, "__composite_values__"):
        return tuple(composite.__composite_values__())
    return tuple(getattr(composite, name) for name in composite.__dataclass_fields__)


def track_loads(sessions: Any, mapping: Mapping) -> None:
    """Track the loads of all sessions that *sessions*, a `sessionmaker`, makes."""

    def has_loaded(session: Session, instance: object) -> None:
        tracker_of(session, mapping).has_loaded(instance_state(instance))

    event.listen(sessions, "loaded_as_persistent", has_loaded)


def tracker_of(session: Session, mapping: Mapping) -> ChangeTracker:
    """Return the tracker of *session*."""
    own: dict[str, Any] = vars(session)
    if _NAME not in own:
        own[_NAME] = ChangeTracker(mapping)
    return cast("ChangeTracker", own[_NAME])


def track_refreshes(entity: type) -> None:
    """Track refreshes of instances of *entity* too."""
    if not event.contains(entity, "refresh", _has_refreshed):
        event.listen(entity, "refresh", _has_refreshed, raw=True, propagate=True)


def _has_refreshed(state: InstanceState[Any], _: object, names: Iterable[str] | None) -> None:
    session = state.session
    found = None if session is None else vars(session).get(_NAME)
    if found is not None:
        found.has_loaded(state, names)

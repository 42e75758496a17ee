"""What the database has of the instances in a batch's session, so that a flush writes what differs from it.

SQLAlchemy knows what was assigned, by `==`; of what was changed in place it knows only where a type tells it. Here, of
the values that can change in place, what the columns' types bind is kept at each load and after each flush.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy import event
from sqlalchemy.orm.attributes import flag_modified, instance_state, set_attribute

from geventbatch._safe_repr import said, shown
from geventbatch.stores.sqlalchemy._bound_values import exact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import tzinfo

    from sqlalchemy.orm import InstanceState, Session

    from geventbatch.stores.sqlalchemy._mapping import Mapping

_NAME: Final = "_change_tracker"
"""Where a session has it."""


class ChangeTracker:
    """The instances in one session of a batch."""

    # -- mutable state ---------------------------------------------------------------------------------------
    # Of those two, a dict of an instance is never changed once it is complete: copies of the whole share it.
    known: dict[InstanceState[Any], dict[str, Any]]  # what the database has of the columns that can change in place
    taken: dict[InstanceState[Any], dict[str, Any]]  # what columns have got of composites that were changed in place
    seen: dict[str, Any]  # of all columns of the resource, as they were loaded first
    _resource: InstanceState[Any] | None
    _flushed: list[InstanceState[Any]]  # what is being flushed

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self.known, self.taken, self.seen, self._resource, self._flushed = {}, {}, {}, None, []

    def sees(self, resource: object) -> None:
        """Keep what was loaded of *resource*, to be compared with what is in the database when it is saved."""
        self._resource = instance_state(resource)
        self._see(self._resource, None)

    def has_loaded(self, state: InstanceState[Any], names: Iterable[str] | None = None) -> None:
        """Its attributes *names*, or all, are now as they are in the database."""
        bound = self._mapping.columns_of(state.mapper).in_place
        if bound:
            values = state.dict
            known = self.known[state] = {**self.known.get(state, {})}
            for name in bound if names is None else bound.keys() & names:
                if name in values:
                    known[name] = self._exact(state, name, values[name])
        if state is self._resource:
            self._see(state, names)

    def flag(self, session: Session) -> None:
        """Tell SQLAlchemy of what was changed in place, or to what it believes to be the same."""
        for state, known in list(self.known.items()):
            instance = state.obj()
            if instance is not None and instance in session and instance not in session.new:
                self._flag_in_place(state, instance, known)
        for instance in session.dirty:
            self._flag_loose(instance_state(instance), instance)

    def make_as_loaded(self, state: InstanceState[Any], name: str, zone: Callable[[], tzinfo | None]) -> bool:
        """Have attribute *name* be what a load would give of what was assigned to it. False where nobody knows."""
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
        """A flush begins, which may write what is *dirty*: what is to be known when it has ended."""
        self._flushed = [instance_state(instance) for instance in (*session.new, *dirty)]

    def has_flushed(self) -> list[InstanceState[Any]]:
        """What was flushed, which is given, is now as it is in the database."""
        flushed, self._flushed = self._flushed, []
        for state in flushed:
            self.has_loaded(state)
        return flushed

    def forget(self) -> None:
        """After a savepoint nobody knows any more what the database has: the resource is written as it is."""
        for state in list(self.known):
            if state is self._resource:
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
        """Have the columns of a composite as the object is, if it was changed in place and they were not."""
        columns, known, values = self._mapping.columns_of(state.mapper), self.known[state], state.dict
        taken = self.taken[state] = {**self.taken.get(state, {})}
        for part, value in zip(parts, parts_of(values[name]), strict=True):
            bound = columns.in_place[part]
            if part not in values or part not in known:
                continue
            unchanged = not bound.differ(known[part], values[part])
            if not unchanged and part in taken:  # and not by an operation itself, which would be what counts
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
            known = self.known.get(state, {})
            for name in columns.named if names is None else columns.named.keys() & names:
                if name in state.dict and name not in self.seen:
                    self.seen[name] = known[name] if name in columns.in_place else state.dict[name]

    def _exact(self, state: InstanceState[Any], name: str, value: Any) -> Any:
        columns = self._mapping.columns_of(state.mapper)
        try:
            return columns.in_place[name].exact(value)
        except Exception as error:
            raise TypeError(
                f"whether {columns.named[name]} of {state.class_.__name__} has changed cannot be told: "
                f"{shown(value)} can "
                f"neither be bound nor pickled ({said(error)}); give its type a process_bind_param"
            ) from error


def parts_of(composite: Any) -> tuple[Any, ...]:
    """The values of the columns of a composite."""
    if hasattr(composite, "__composite_values__"):
        return tuple(composite.__composite_values__())
    return tuple(getattr(composite, name) for name in composite.__dataclass_fields__)


def track_loads(sessions: Any, mapping: Mapping) -> None:
    """Have the sessions that *sessions*, a `sessionmaker`, makes watch what they load."""

    def has_loaded(session: Session, instance: object) -> None:
        tracker_of(session, mapping).has_loaded(instance_state(instance))

    event.listen(sessions, "loaded_as_persistent", has_loaded)


def tracker_of(session: Session, mapping: Mapping) -> ChangeTracker:
    """What *session*, one of `watch`'s, has loaded."""
    own: dict[str, Any] = vars(session)
    if _NAME not in own:
        own[_NAME] = ChangeTracker(mapping)
    return cast("ChangeTracker", own[_NAME])


def track_refreshes(entity: type) -> None:
    """Have what is loaded anew of instances of *entity* tracked too."""
    if not event.contains(entity, "refresh", _has_refreshed):
        event.listen(entity, "refresh", _has_refreshed, raw=True, propagate=True)


def _has_refreshed(state: InstanceState[Any], _: object, names: Iterable[str] | None) -> None:
    session = state.session
    found = None if session is None else vars(session).get(_NAME)
    if found is not None:
        found.has_loaded(state, names)

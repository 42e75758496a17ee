"""A snapshot of a session in memory, to restore when an operation has raised.

It has everything that a flush or an operation may find: the instances, and which are new; their values, and the loaded
ones; the members of collections; and attributes that are not mapped. SQLAlchemy itself goes back only together with a
transaction, and then forgets what was changed before it. So its internal state is restored here.

What was sent to the database since the snapshot cannot be undone in memory: restoring raises `CannotUndo`.
"""

from __future__ import annotations

from operator import attrgetter, itemgetter
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType
from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.ext.mutable import MutableBase
from sqlalchemy.orm.collections import collection_adapter
from sqlalchemy.orm.state import PendingCollection

from geventbatch._safe_repr import said, shown
from geventbatch._values.slots import HEAP_TYPE, put_in_slots, slotted
from geventbatch.errors import CannotUndo
from geventbatch.stores._object_contents import ATOMS
from geventbatch.stores.sqlalchemy._copies import Copies

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy.orm import InstanceState

    from geventbatch.stores.sqlalchemy._bound_values import Columns
    from geventbatch.stores.sqlalchemy._guard import Guard
    from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource
    from geventbatch.stores.sqlalchemy._loaded_resources import LoadedResources

_FEW: Final = 4
"""Number of instances whose loaded state is always kept, since that costs next to nothing."""

_ADAPTER: Final = "_sa_adapter"
_BASES: Final[tuple[tuple[type[Any], Any], ...]] = ((list, list.copy), (set, set().union), (dict, dict.copy))
_FUNCTIONS: Final = frozenset({FunctionType, BuiltinFunctionType, attrgetter, itemgetter})
_NOTHING: Final[dict[Any, Any]] = {}
"""An empty dict that nobody changes."""
_NO_NAMES: Final[frozenset[str]] = frozenset()


def snapshot_of_load(guard: Guard, loaded: LoadedResource | LoadedResources) -> SessionSnapshot | None:
    """Return a snapshot of what was loaded; None if that is much, and no operation of this store needed one yet."""
    mapping = loaded.mapping
    if not mapping.keeps and len(guard.session.identity_map) > _FEW:
        return None
    copies = mapping.keeps or loaded.is_new
    return SessionSnapshot(guard, loaded, plain=copies, columns=copies)


class SessionSnapshot:
    """One session, as it was when this was made."""

    __slots__ = (
        "_added",
        "_columns",
        "_copied",
        "_copies",
        "_deleted",
        "_guard",
        "_held",
        "_identities",
        "_is_known",
        "_known",
        "_loaded",
        "_nested",
        "_new",
        "_plain",
        "_session",
        "_taken",
        "_writes",
    )

    def __init__(self, guard: Guard, loaded: LoadedResource | LoadedResources, *, plain: bool, columns: bool) -> None:
        """Copy mutable values: *plain* attributes (no part of the mapping), and *columns*.

        A value that is not copied is known to be unchanged, or made again from the bound form, or cannot be restored.
        """
        self._guard = guard
        self._loaded = loaded
        session = self._session = guard.session
        self._writes = guard.writes
        self._nested = session.get_nested_transaction()
        # Nothing is in most of these: what is empty is shared.
        self._new: dict[InstanceState[Any], Any] = session._new.copy() or _NOTHING  # noqa: SLF001 - for its order
        self._deleted: dict[InstanceState[Any], Any] = session._deleted.copy() or _NOTHING  # noqa: SLF001
        self._added = list(guard.added) if guard.added else ()
        self._known: dict[Any, Any] = loaded.tracker.known.copy() or _NOTHING
        self._taken: dict[Any, Any] = loaded.tracker.taken.copy() or _NOTHING
        self._identities: dict[Any, InstanceState[Any]] = session.identity_map._dict.copy()  # noqa: SLF001
        columns_of = loaded.mapping.columns_of
        self._held: dict[InstanceState[Any], _Held] = {}
        for state in (*self._new, *self._identities.values()):
            instance = state.obj()
            if instance is not None:  # else it was garbage collected
                self._held[state] = _Held(state, instance, columns_of(state.manager.mapper), composites=columns)
        self._plain, self._columns = plain, columns
        self._is_known = False  # it is known that it can be restored
        self._copied: Sequence[InstanceState[Any]] = ()
        self._copies: Copies | None = None  # of their mutable values
        if plain or columns:
            self._copy()

    def restore(self) -> None:
        """Restore the session. Raises `CannotUndo` before it has changed anything. Switches: no."""
        self._check()
        instead = self._from_copies()
        if not self._columns:
            for state, held in self._held.items():
                made = self._made(held)
                if made:
                    instead[state] = {**made, **instead.get(state, {})}
        self._take_out()
        session = self._session
        modified = session.identity_map._modified  # noqa: SLF001
        modified.clear()
        for state, held in self._held.items():
            held.put_back(instead.get(state, _NOTHING))
            if state.modified and state.key is not None:
                modified.add(state)
        if self._new or session._new:  # noqa: SLF001
            session._new.clear()  # noqa: SLF001
            session._new.update(self._new)  # noqa: SLF001
        self._guard.added = list(self._added)
        tracker = self._loaded.tracker
        tracker.known, tracker.taken = self._known.copy(), self._taken.copy()

    def put_plain_back(self) -> None:
        """Restore the attributes that are not mapped; all others are unchanged, or will be loaded."""
        instead = self._from_copies()
        self._take_out()
        for state, held in self._held.items():
            held.put_plain_back(instead.get(state, _NOTHING))

    def _check(self) -> None:
        guard, session = self._guard, self._session
        if guard.writes != self._writes or session.get_nested_transaction() is not self._nested:
            raise self._refused("something was written, flushed, or executed that may write")
        if session._deleted.keys() != self._deleted.keys():  # noqa: SLF001
            raise self._refused("something was deleted")
        if self._is_known:
            return
        for held in self._held.values():
            if held.opaque is not None:
                raise self._refused(held.opaque)
            if not self._plain and (found := held.changing(plain=True, columns=False)):
                self._loaded.mapping.keeps = True
                raise self._refused(
                    f"{next(iter(found))} of {held.state.class_.__name__} was not copied when it was loaded", once=True
                )
        self._is_known = True

    def _refused(self, why: str, *, once: bool = False) -> CannotUndo:
        told = f"what operations on {shown(self._guard.key)} have done cannot be undone in memory: {why}"
        return CannotUndo(told, once=once)

    def _take_out(self) -> None:
        """Expunge what has come into the session since, and put back what has left it."""
        session, held = self._session, self._held
        new = [state for state in session._new if state not in held]  # noqa: SLF001
        if new:
            session._expunge_states(new, to_transient=True)  # noqa: SLF001 - the public method cascades
        there = session.identity_map._dict  # noqa: SLF001
        if there != self._identities:
            loaded = [state for state in there.values() if state not in held]
            session._expunge_states(loaded)  # noqa: SLF001
            there.update({key: state for key, state in self._identities.items() if state in held})

    # -- what can change in place -------------------------------------------------------------------------------

    def _copy(self) -> None:
        """Copy all values together, so that one object in two places stays one."""
        changing: dict[InstanceState[Any], dict[str, Any]] = {}
        for state, held in self._held.items():
            found = held.changing(plain=self._plain, columns=self._columns)
            if found:
                changing[state] = found
        if not changing:
            return
        self._copied = list(changing)
        kept: list[object] = [one for held in self._held.values() for one in held.kept()]
        try:
            self._copies = Copies(list(changing.values()), self._session, *kept)
        except CannotUndo:
            raise
        except Exception as error:
            raise self._refused(f"it cannot be copied ({said(error)})") from error

    def _from_copies(self) -> dict[InstanceState[Any], dict[str, Any]]:
        if self._copies is None:
            return {}
        try:
            return dict(zip(self._copied, self._copies.copy(), strict=True))
        except Exception as error:
            raise self._refused(f"it cannot be copied ({said(error)})") from error

    def _made(self, held: _Held) -> dict[str, Any]:
        """Return, as loaded, the column values that operations have changed in place."""
        columns = held.columns.in_place
        if not columns:
            return _NOTHING
        known, made = self._known.get(held.state, {}), {}
        for name, bound in columns.items():
            value = held.values.get(name)
            if type(value) in ATOMS:
                continue
            if name in known and not bound.differ(known[name], value):
                continue
            try:
                made[name] = _coerced(name, value, bound.loaded(known[name]))
            except Exception as error:
                self._loaded.mapping.keeps = True
                raise self._refused(
                    f"{name} was changed in place, and was not copied when it was loaded", once=True
                ) from error
        return made


class _Held:
    """One instance's values, and SQLAlchemy's state of it."""

    __slots__ = (
        "_collections",
        "_committed",
        "_expired",
        "_instance",
        "_is_flat",
        "_notes",
        "columns",
        "opaque",
        "slotted",
        "state",
        "values",
    )

    def __init__(self, state: InstanceState[Any], instance: object, columns: Columns, *, composites: bool) -> None:
        self.state = state
        self.columns = columns
        self._instance = instance  # keeps it alive
        self.opaque: str | None = None  # why it cannot be restored
        self.values: dict[str, Any] = vars(instance).copy()
        if columns.composites and not composites:  # they are made from their columns again
            for composite in columns.composites:
                self.values.pop(composite, None)
        self.slotted = slotted(columns.slots, instance) if columns.slots else _NOTHING
        notes = self._notes = state.__dict__.copy()
        self._is_flat = dict not in map(type, notes.values())
        if not self._is_flat:
            self._notes = _copied(notes)
        self._committed: dict[str, Any] = state.committed_state.copy() or _NOTHING
        self._expired = frozenset(state.expired_attributes) if state.expired_attributes else _NO_NAMES
        self._collections: Sequence[Any] = ()
        for name in columns.collections:
            if (found := self.values.get(name)) is not None:
                self._collections = [*self._collections, self._collection(found)]
        if "_empty_collections" in notes:
            empty = [self._collection(found) for found in self._notes["_empty_collections"].values()]
            self._collections = [*self._collections, *empty]
        for name in columns.dynamic:
            if name in self._committed:
                self.opaque = "a dynamic relationship has changed"

    def put_back(self, instead: dict[str, Any]) -> None:
        """Restore all, with the values of *instead* in place of its own."""
        state = self.state
        values = state.dict
        for name in instead:
            before = values.get(name)
            if isinstance(before, MutableBase):
                before._parents.pop(state, None)  # noqa: SLF001 - it reports no changes any more
        if self.columns.slots:
            instead = self._put_slots_back(instead)
        values.clear()
        values.update(self.values)
        for name, value in instead.items():
            values[name] = value
            if isinstance(value, MutableBase):
                cast("Any", value)._parents[state] = name  # noqa: SLF001 - as SQLAlchemy does where it loads
        state.__dict__ = self._notes.copy() if self._is_flat else _copied(self._notes)
        state.committed_state = self._committed.copy()
        state.expired_attributes = set(self._expired)
        for collection, adapter, is_empty, members, own in self._collections:
            vars(collection).clear()
            vars(collection).update(own)
            adapter.invalidated, adapter.empty = False, is_empty
            _refill(collection, members)

    def kept(self) -> Iterator[object]:
        """Yield the objects that keep their identity."""
        yield self._instance
        for collection, *_ in self._collections:
            yield collection

    def plain(self) -> dict[str, Any]:
        """Return the attributes that are not mapped."""
        mapped = self.columns.mapped
        return {name: value for name, value in self.values.items() if name not in mapped} | self.slotted

    def changing(self, *, plain: bool, columns: bool) -> dict[str, Any]:
        """Return the mutable values, of *plain* attributes and of *columns*."""
        values, found = self.values, {}
        if plain and (self.slotted or not values.keys() <= self.columns.mapped):
            found = {name: value for name, value in self.plain().items() if type(value) not in ATOMS}
        for name in self.columns.changing if columns else ():
            if type(values.get(name)) not in ATOMS:
                found[name] = values[name]
        return found

    def put_plain_back(self, instead: dict[str, Any]) -> None:
        """Restore the attributes that are not mapped."""
        instead = self._put_slots_back(instead)
        values, mapped = self.state.dict, self.columns.mapped
        for name in [name for name in values if name not in mapped]:
            del values[name]
        for name, value in self.plain().items():
            if name not in self.slotted:
                values[name] = instead.get(name, value)

    def _put_slots_back(self, instead: dict[str, Any]) -> dict[str, Any]:
        """Restore the slots, and return the rest of *instead*."""
        slots = self.columns.slots
        put_in_slots(slots, self._instance, {name: instead.get(name, one) for name, one in self.slotted.items()})
        return {name: value for name, value in instead.items() if name not in slots}

    def _collection(self, collection: Any) -> tuple[Any, Any, bool, Any, dict[str, Any]]:
        own = getattr(collection, "__dict__", _NOTHING)
        if any(not _is_fixed(value) for name, value in own.items() if name != _ADAPTER):
            self.opaque = f"a {type(collection).__name__} has attributes of its own"
        members = _members(collection)
        if members is None:
            self.opaque = f"the members of a {type(collection).__name__} are not known"
        adapter = collection_adapter(collection)
        return collection, adapter, adapter.empty, members, dict(own)


def _is_fixed(value: object) -> bool:
    """Return whether *value*, an attribute of a collection, is immutable: a key function, say."""
    kind = type(value)
    return kind in ATOMS or kind in _FUNCTIONS or (callable(value) and kind.__module__.startswith("sqlalchemy."))


def _members(collection: Any) -> Any:
    """Return the members of *collection*, by its built-in base class; None if it has other state than a dict."""
    kinds = type(collection).__mro__
    for base, copy in _BASES:
        if base in kinds:
            others = [one for one in kinds if one is not base and one is not object]
            return None if any(_has_more(one) for one in others) else copy(collection)
    return None


def _has_more(kind: type) -> bool:
    is_written_in_c = not kind.__flags__ & HEAP_TYPE
    return is_written_in_c or any(isinstance(slot, MemberDescriptorType) for slot in vars(kind).values())


def _refill(collection: Any, members: Any) -> None:
    """Set the members without SQLAlchemy's events, since its state is restored too."""
    if isinstance(collection, list):
        list.__setitem__(collection, slice(None), members)
    elif isinstance(collection, set):
        set.clear(collection)
        set.update(collection, members)
    else:
        dict.clear(collection)
        dict.update(collection, members)


def _copied(notes: dict[str, Any]) -> dict[str, Any]:
    """Copy the ``__dict__`` of an `InstanceState`, with its mutable values."""
    found = {name: dict(value) if type(value) is dict else value for name, value in notes.items()}
    if "_pending_mutations" in found:
        found["_pending_mutations"] = {name: _of(one) for name, one in found["_pending_mutations"].items()}
    return found


def _of(pending: PendingCollection) -> PendingCollection:
    found = PendingCollection()
    for one in pending.added_items:
        found.added_items.add(one)
    for one in pending.deleted_items:
        found.deleted_items.add(one)
    return found


def _coerced(name: str, before: Any, value: Any) -> Any:
    """Return *value* in the type of *before*, as SQLAlchemy would load it."""
    if isinstance(before, MutableBase):
        value = type(before).coerce(name, value)
    if type(value) is not type(before):
        raise TypeError(f"{type(value)} is made of it, and it was {type(before)}")
    return value

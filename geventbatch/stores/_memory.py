"""What the session of a batch has in memory at one moment, to go back to when an operation has raised.

That is everything that a flush, or an operation, may find there: the instances and which of them are new, their values
and what was loaded of those, what is in their collections, and what are no columns at all. SQLAlchemy itself goes back
with a transaction only, and forgets then what was changed before it. So its own books are put back here.

What was sent to the database in between cannot be gone back from in memory: that is a `CannotUndo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from sqlalchemy.ext.mutable import MutableBase
from sqlalchemy.orm.state import PendingCollection

from geventbatch._shown import shown
from geventbatch.errors import CannotUndo
from geventbatch.stores._copies import ATOMS, Copies

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.orm import InstanceState

    from geventbatch.stores._conduct import Conduct
    from geventbatch.stores._loaded import Loaded

_FEW: Final = 4
"""Instances of which it costs nothing that counts to keep what was loaded."""

_OWN: Final = "_sa_instance_state"
_ADAPTER: Final = "_sa_adapter"
_BASES: Final = (list, set, dict)


def first(conduct: Conduct, loaded: Loaded) -> Memory | None:
    """Of what was loaded. None where that is much and no operation of this store has raised yet."""
    mapping = loaded.mapping
    if not mapping.keeps and len(conduct.session.identity_map) > _FEW:
        return None
    copies = mapping.keeps or loaded.identity is None
    return Memory(conduct, loaded, plain=copies, columns=copies)


class Memory:
    """Of one session, as it was when this was made."""

    def __init__(self, conduct: Conduct, loaded: Loaded, *, plain: bool, columns: bool) -> None:
        """Copy what can change in place: of what is *plain* (no attribute of the mapping), and of the *columns*.

        What is not copied is known to have stayed the same, or made again of what the database has; or not to be had.
        """
        self._conduct = conduct
        self._loaded = loaded
        session = self._session = conduct.session
        self._writes = conduct.writes
        self._nested = session.get_nested_transaction()
        self._new = dict(session._new)  # noqa: SLF001 - nothing public gives it in order
        self._deleted = set(session._deleted)  # noqa: SLF001
        self._added = conduct.added()
        self._known = loaded.known()
        self._identities: dict[Any, InstanceState[Any]] = {}
        states = list(self._new)
        for key, state in list(session.identity_map._dict.items()):  # noqa: SLF001 - weak: some may be gone
            if state.obj() is not None:
                self._identities[key] = state
                states.append(state)
        self._held = {state: _Held(state, composites=columns) for state in states}
        self._plain, self._columns = plain, columns
        self._copies: dict[InstanceState[Any], dict[str, Any]] = {}
        if plain or columns:
            self._copies = self._copied(
                {state: self._changing(held, plain=plain, columns=columns) for state, held in self._held.items()}
            )

    def restore(self) -> None:
        """Have the session be as it was. Raises `CannotUndo`, having changed nothing that is used on. Switches: no."""
        self._check()
        copies = self._copied(self._copies)
        made = {} if self._columns else {state: self._made(held) for state, held in self._held.items()}
        self._take_out()
        session = self._session
        session.identity_map._dict.update(self._identities)  # noqa: SLF001
        for state, held in self._held.items():
            held.put_back({**made.get(state, {}), **copies.get(state, {})})
        session._new.clear()  # noqa: SLF001
        session._new.update(self._new)  # noqa: SLF001
        modified = session.identity_map._modified  # noqa: SLF001
        modified.clear()
        modified.update(state for state in self._identities.values() if state.modified)
        self._conduct.put_added_back(self._added)
        self._loaded.put_known_back(self._known)

    def put_plain_back(self) -> None:
        """The same of what the database knows nothing of, where all else is as it was, or will be loaded."""
        copies = self._copied(self._copies)
        self._take_out()
        for state, held in self._held.items():
            held.put_plain_back(copies.get(state, {}))

    def _check(self) -> None:
        conduct, session = self._conduct, self._session
        if conduct.writes != self._writes or session.get_nested_transaction() is not self._nested:
            raise self._refused("something was written, flushed, or executed that may write")
        if set(session._deleted) != self._deleted:  # noqa: SLF001
            raise self._refused("something was deleted")
        for held in self._held.values():
            if held.opaque is not None:
                raise self._refused(held.opaque)
            if not self._plain and (name := held.changing()) is not None:
                self._loaded.mapping.keeps = True
                raise self._refused(f"{name} of {held.state.class_.__name__} was not copied when it was loaded")

    def _refused(self, why: str) -> CannotUndo:
        return CannotUndo(f"what operations on {shown(self._conduct.key)} have done cannot be undone in memory: {why}")

    def _take_out(self) -> None:
        """What has come into the session since."""
        session = self._session
        new = [state for state in session._new if state not in self._held]  # noqa: SLF001
        session._expunge_states(new, to_transient=True)  # noqa: SLF001 - the public one takes others with it
        loaded = [state for state in session.identity_map.all_states() if state not in self._held]
        session._expunge_states(loaded)  # noqa: SLF001

    # -- what can change in place -------------------------------------------------------------------------------

    def _changing(self, held: _Held, *, plain: bool, columns: bool) -> dict[str, Any]:
        found = held.plain() if plain else {}
        if columns:
            own = self._loaded.mapping.columns_of(held.state.mapper)
            found |= {name: held.values[name] for name in (*own.in_place, *own.composites) if name in held.values}
        return {name: value for name, value in found.items() if type(value) not in ATOMS}

    def _copied(self, values: dict[InstanceState[Any], dict[str, Any]]) -> dict[InstanceState[Any], dict[str, Any]]:
        """All together, so that what was one object in two places is so again."""
        if not any(values.values()):
            return values
        copies = Copies(self._session, *[one for held in self._held.values() for one in held.kept()])
        try:
            return {
                state: {name: copies.copy(value) for name, value in named.items()} for state, named in values.items()
            }
        except CannotUndo:
            raise
        except Exception as error:
            raise self._refused(f"it cannot be copied ({error})") from error

    def _made(self, held: _Held) -> dict[str, Any]:
        """What operations have changed in place of the columns, as it was loaded."""
        columns = self._loaded.mapping.columns_of(held.state.mapper).in_place
        if not columns:
            return {}
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
                raise self._refused(f"{name} was changed in place, and was not copied when it was loaded") from error
        return made


class _Held:
    """What one instance had, and what SQLAlchemy had noted of it."""

    def __init__(self, state: InstanceState[Any], *, composites: bool) -> None:
        self.state = state
        self._instance = state.obj()  # so that it stays
        self.opaque: str | None = None  # why it cannot be put back
        self.values: dict[str, Any] = dict(state.dict)
        if not composites:  # they are made of their columns again
            for composite in state.mapper.composites:
                self.values.pop(composite.key, None)
        self._notes = _copied_notes(state.__dict__)
        self._committed = dict(state.committed_state)
        self._expired = set(state.expired_attributes)
        self._collections = [
            self._collection(found)
            for name in state.manager._collection_impl_keys  # noqa: SLF001 - nothing else tells them
            if (found := self.values.get(name)) is not None
        ]
        if "_empty_collections" in self._notes:
            self._collections += [self._collection(found) for found in self._notes["_empty_collections"].values()]
        if any(hasattr(value, "added_items") for value in self._committed.values()):
            self.opaque = "a dynamic relationship has changed"

    def put_back(self, instead: dict[str, Any]) -> None:
        """All of it, but for some values *instead*."""
        state, values = self.state, self.state.dict
        for name in instead:
            before = values.get(name)
            if isinstance(before, MutableBase):
                before._parents.pop(state, None)  # noqa: SLF001 - it tells of no change any more
        values.clear()
        values.update(self.values)
        for name, value in instead.items():
            values[name] = value
            if isinstance(value, MutableBase):
                cast("Any", value)._parents[state] = name  # noqa: SLF001 - as SQLAlchemy does where it loads
        state.__dict__.clear()
        state.__dict__.update(_copied_notes(self._notes))
        state.committed_state.clear()
        state.committed_state.update(self._committed)
        state.expired_attributes.clear()
        state.expired_attributes.update(self._expired)
        for collection, adapter, is_empty, members, own in self._collections:
            vars(collection).clear()
            vars(collection).update(own)
            adapter.invalidated, adapter.empty = False, is_empty
            _refill(collection, members)

    def kept(self) -> Iterator[object]:
        """What stays the same object."""
        yield self._instance
        for collection, *_ in self._collections:
            yield collection

    def plain(self) -> dict[str, Any]:
        """What the mapping does not know."""
        mapped = self.state.manager
        return {name: value for name, value in self.values.items() if name not in mapped and name != _OWN}

    def changing(self) -> str | None:
        """Which of that can change in place."""
        return next((name for name, value in self.plain().items() if type(value) not in ATOMS), None)

    def put_plain_back(self, instead: dict[str, Any]) -> None:
        """What the mapping does not know, alone."""
        values, mapped = self.state.dict, self.state.manager
        for name in [name for name in values if name not in mapped and name != _OWN]:
            del values[name]
        values.update({name: instead.get(name, value) for name, value in self.plain().items()})

    def _collection(self, collection: Any) -> tuple[Any, Any, bool, Any, dict[str, Any]]:
        own = vars(collection)
        if any(type(value) not in ATOMS and not callable(value) for name, value in own.items() if name != _ADAPTER):
            self.opaque = f"a {type(collection).__name__} has attributes of its own"
        base = next((base for base in _BASES if isinstance(collection, base)), None)
        if base is None:
            self.opaque = f"what is in a {type(collection).__name__} is not known"
        adapter = own[_ADAPTER]
        return collection, adapter, adapter.empty, base and base(collection), dict(own)


def _refill(collection: Any, members: Any) -> None:
    """Without SQLAlchemy's noticing: its books are put back too."""
    if isinstance(collection, list):
        list.__setitem__(collection, slice(None), members)
    elif isinstance(collection, set):
        set.clear(collection)
        set.update(collection, members)
    else:
        dict.clear(collection)
        dict.update(collection, members)


def _copied_notes(notes: dict[str, Any]) -> dict[str, Any]:
    """What an `InstanceState` notes: with what changes in it."""
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
    """*value* as SQLAlchemy would have loaded it where *before* was."""
    if isinstance(before, MutableBase):
        value = type(before).coerce(name, value)
    if type(value) is not type(before):
        raise TypeError(f"{type(value)} is made of it, and it was {type(before)}")
    return value

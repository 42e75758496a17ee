"""The state of a resource in memory at one moment, kept so that it can be restored any number of times.

The values of columns and other attributes are copied. An object that others may hold too (the instance itself, its
`_state`, model instances that it leads to, query sets, files) stays the same object, and its content is restored. A
document is kept as a pickle, as in the loaded state.
"""

from __future__ import annotations

import copy
import pickle
from enum import Enum
from functools import cache
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from django.core.files import File
from django.db.models import Model, QuerySet
from django.db.models.base import ModelState
from django.db.models.fields.files import FieldFile
from django.db.models.manager import BaseManager
from django.utils.functional import LazyObject, Promise

from geventbatch._safe_repr import said, shown
from geventbatch._values.slots import put_in_slots, slots_of, slotted
from geventbatch.errors import CannotUndo
from geventbatch.stores.django._as_loaded import documents
from geventbatch.stores.django._changes import BUILT_IN, IMMUTABLE, pickled

if TYPE_CHECKING:
    from collections.abc import Hashable
    from types import MemberDescriptorType

_FIXED: Final = (
    BaseManager,
    BuiltinFunctionType,
    Enum,
    FunctionType,
    ModuleType,
    Promise,
    type,
)
"""Types whose instances hold nothing that an operation would change."""
_FIXED_IN: Final = frozenset({"fractions", "ipaddress", "psycopg.types.range", "psycopg2._range", "re", "zoneinfo"})
"""Modules of such types."""
_SHARED: Final = (File, LazyObject, Model, ModelState, QuerySet)
_NONE: Final[Any] = object()


class Memory:
    """The memory of one resource."""

    __slots__ = ("_documents", "_model", "_others", "_state", "_values")

    def __init__(
        self,
        model: type[Model],
        values: dict[str, Any],
        state: dict[str, Any],
        documents: dict[str, bytes],
        others: list[tuple[object, dict[str, Any]]] | None = None,
    ) -> None:
        """Keep these; called by `of` and `as_loaded`."""
        self._model = model
        self._values = values
        self._state = state
        self._documents = documents
        self._others = others  # None: `_values` holds nothing that can be changed

    @classmethod
    def of(cls, instance: Model, model: type[Model]) -> Memory:
        """Return the present memory of *instance*, whose model is *model*. Switches: no.

        Raises:
            CannotUndo: A value cannot be copied.
        """
        found = attributes(instance, model)
        state = {**vars(found["_state"])}
        values, pickles, mutable = _sorted(found, documents(model))
        if not state.get("fields_cache"):
            state.pop("fields_cache", None)
            if not mutable:
                return cls(model, values, state, pickles)
        copies = _Copies([instance, found["_state"]])
        try:
            state = {name: copies.of(value) for name, value in state.items()}
            values |= {name: copies.of(value) for name, value in mutable.items()}
            return cls(model, values, state, pickles, copies.others())
        except Exception as error:
            raise CannotUndo(
                f"what an operation changes in a {model.__name__} cannot be undone in memory: a value of it cannot be "
                f"copied ({said(error)})"
            ) from error

    @classmethod
    def as_loaded(
        cls, found: dict[str, Any], state: dict[str, Any], loaded: dict[str, object], model: type[Model]
    ) -> Memory:
        """Return the memory of an instance as it was loaded: attributes *found*, of the state *loaded*. Switches: no.

        Raises:
            CannotUndo: Operations may have changed an attribute that was not copied.
        """
        values, pickles = {}, {}
        for name, value in found.items():
            kept = loaded.get(name)
            if type(value) in IMMUTABLE or name == "_state" or _is_fixed(value):
                values[name] = value
            elif type(value) in BUILT_IN and type(kept) is bytes:
                pickles[name] = kept
            elif isinstance(value, FieldFile) and type(kept) is str:
                values[name] = kept  # `FieldFile` is made anew from the name
            else:
                raise CannotUndo(
                    f"an operation's change of {shown(name)} of a {model.__name__}, a {type(value).__name__}, cannot "
                    "be undone in memory: it was not copied at the load"
                )
        return cls(model, values, state, pickles)

    def put_back(self, instance: Model) -> None:
        """Restore it in *instance*. Switches: no."""
        values, state = self._values, self._state
        if self._others is not None:
            copies = _Copies([instance, values["_state"], *(other for other, _ in self._others)])
            values = {name: copies.of(value) for name, value in values.items()}
            state = {name: copies.of(value) for name, value in state.items()}
            for other, kept in self._others:
                _put(other, type(other), {name: copies.of(value) for name, value in kept.items()})
        if self._documents:
            values = {**values, **{name: pickle.loads(text) for name, text in self._documents.items()}}  # noqa: S301
        _put(instance, self._model, values)
        _replace(vars(vars(instance)["_state"]), state)


def attributes(instance: Model, model: type[Model]) -> dict[str, Any]:
    """Return all attributes of *instance*, those in slots of the classes of *model* too. Switches: no."""
    slots = _slots(model)
    return {**vars(instance), **slotted(slots, instance)} if slots else vars(instance)


def _put(one: Any, kind: type, values: dict[str, Any]) -> None:
    """Replace all attributes of *one*, as `attributes` returns them, by *values*."""
    slots = _slots(kind) if issubclass(kind, Model) else None
    if slots:
        put_in_slots(slots, one, {name: values[name] for name in slots if name in values})
        values = {name: value for name, value in values.items() if name not in slots}
    _replace(vars(one), values)


def forget(instance: Model, model: type[Model], names: set[str]) -> None:
    """Delete the attributes *names*, as `attributes` returns them. Switches: no."""
    values, slots = vars(instance), _slots(model)
    for name in names:
        if name in slots:
            slots[name].__delete__(instance)
        else:
            del values[name]


@cache
def _slots(model: Hashable) -> dict[str, MemberDescriptorType]:
    found: Any = model
    return slots_of(found)


def _sorted(
    found: dict[str, Any], of_documents: frozenset[str]
) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Any]]:
    """Sort values into three: keep as they are, keep as a pickle, copy."""
    values, pickles, mutable = {}, {}, {}
    for name, value in found.items():
        if type(value) in IMMUTABLE or name == "_state" or _is_fixed(value):
            values[name] = value
        elif name in of_documents and type(value) in BUILT_IN and (text := pickled(value)) is not None:
            pickles[name] = text
        else:
            mutable[name] = value
    return values, pickles, mutable


def _replace(found: dict[str, Any], kept: dict[str, Any]) -> None:
    """Make *found* equal to *kept*, in place."""
    found.update(kept)
    if len(found) != len(kept):
        for name in found.keys() - kept.keys():
            del found[name]


def _is_fixed(value: Any) -> bool:
    if type(value) is memoryview:
        return value.readonly
    kind: Any = type(value)
    return _is_fixed_kind(kind)


@cache
def _is_fixed_kind(kind: Hashable) -> bool:
    found: Any = kind
    return found is object or issubclass(found, _FIXED) or found.__module__ in _FIXED_IN


class _Copies:
    """Copies that share what the originals share, and lead to the same model instances."""

    def __init__(self, same: list[Any]) -> None:
        """Do not copy the objects in *same*."""
        # -- mutable state ---------------------------------------------------------------------------------
        self._known: dict[int, Any] = {id(one): one for one in same}
        self._others: list[tuple[Any, dict[str, Any]]] = []  # objects that stay the same, and their content

    def others(self) -> list[tuple[object, dict[str, Any]]]:
        """Return the other objects to restore, each with its content."""
        return self._others

    def of(self, value: Any) -> Any:
        """Return a copy of *value*, or *value* itself."""
        kind = type(value)
        if kind in IMMUTABLE or _is_fixed(value):
            return value
        found = self._known.get(id(value), _NONE)
        if found is not _NONE:
            return found
        copied = _COPIERS.get(kind)
        if copied is not None:
            return copied(self, value)
        if issubclass(kind, _SHARED):
            self._keep(value, kind)
            return value
        return copy.deepcopy(value, self._known)

    def _keep(self, value: Any, kind: type[Any]) -> None:
        """Do not copy *value*, but keep its content."""
        self._known[id(value)] = value
        values = vars(value)
        if issubclass(kind, LazyObject):  # such as `request.user`
            wrapped = values.get("_wrapped")
            if issubclass(type(wrapped), Model):
                self.of(wrapped)
            return
        kept: dict[str, Any] = {}
        self._others.append((value, kept))
        deep = issubclass(kind, Model | ModelState)
        if issubclass(kind, Model):
            values = attributes(value, kind)
        for name, part in values.items():
            kept[name] = self.of(part) if deep or name == "_result_cache" else part

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        copied = self._known[id(value)] = {}
        for name, part in value.items():
            copied[self.of(name)] = self.of(part)
        return copied

    def _list(self, value: list[Any]) -> list[Any]:
        copied = self._known[id(value)] = []
        copied.extend(map(self.of, value))
        return copied

    def _set(self, value: set[Any]) -> set[Any]:
        copied = self._known[id(value)] = set(map(self.of, value))
        return copied

    def _tuple(self, value: Any) -> Any:
        """Return a copy of a tuple or frozenset, or *value* itself if no part of it was copied."""
        parts = [*map(self.of, value)]
        if all(one is other for one, other in zip(parts, value, strict=True)):
            return value
        return self._known.setdefault(id(value), type(value)(parts))


_COPIERS: Final[dict[Any, Any]] = {
    dict: _Copies._dict,
    frozenset: _Copies._tuple,
    list: _Copies._list,
    set: _Copies._set,
    tuple: _Copies._tuple,
}

"""Attributes of a row that the database, or the ORM at a save, computes; and reads of them."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from geventbatch.testing._values import changeable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def reads_of_computed(resource: Any) -> Iterator[list[str]]:
    """Yield a list, to which each read of a computed attribute of *resource* is added, by its path.

    Only instances of mapped classes and of Django's models have such attributes.
    """
    found: list[str] = []
    paths = {id(one): path for one, path in changeable(resource, "resource").values()}
    kinds = {type(one) for one, _ in changeable(resource, "resource").values()}
    with ExitStack() as stack:
        for kind in kinds:
            for name in computed_of(kind):
                stack.enter_context(_watching(kind, name, partial(_note, found, paths, name)))
        yield found


def _note(found: list[str], paths: dict[int, str], name: str, instance: object) -> None:
    where = f"{paths.get(id(instance))}.{name}"
    if id(instance) in paths and where not in found:
        found.append(where)


def computed_of(kind: type) -> set[str]:
    """Return the names of the attributes of *kind* that only a save sets."""
    options: Any = getattr(kind, "_meta", None)
    if hasattr(options, "concrete_fields"):
        return {field.attname for field in options.concrete_fields if _is_computed(field)}
    sqlalchemy: Any = sys.modules.get("sqlalchemy")
    mapper: Any = None if sqlalchemy is None else sqlalchemy.inspect(kind, raiseerr=False)
    if not hasattr(mapper, "column_attrs"):
        return set()
    from geventbatch.stores.sqlalchemy import _computed

    set_by_updates = {one.key for one in mapper.column_attrs if getattr(one.columns[0], "onupdate", None) is not None}
    return {*_computed.of_row(mapper), *_computed.of_all(mapper), *set_by_updates}


def _is_computed(field: Any) -> bool:
    if getattr(field, "generated", False) or getattr(field, "auto_now", False):
        return True
    return not type(field).pre_save.__module__.startswith("django.")  # a user's own field


@contextmanager
def _watching(kind: type, name: str, note: Callable[[object], None]) -> Iterator[None]:
    """Call *note* whenever the attribute *name* of an instance is read."""
    own = vars(kind).get(name)
    # Past the metaclass, which would map the attribute.
    type.__setattr__(kind, name, _Watched(getattr(kind, name, None) if own is None else own, name, note))
    try:
        yield
    finally:
        if own is None:
            type.__delattr__(kind, name)
        else:
            type.__setattr__(kind, name, own)


class _Watched:
    """Replaces an attribute's descriptor."""

    def __init__(self, inner: Any, name: str, note: Callable[[object], None]) -> None:
        self._inner = inner
        self._name = name
        self._note = note

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self._inner.__get__(None, owner)
        self._note(instance)
        if not hasattr(type(self._inner), "__set__") and self._name in vars(instance):
            return vars(instance)[self._name]
        return self._inner.__get__(instance, owner)

    def __set__(self, instance: Any, value: object) -> None:
        if hasattr(type(self._inner), "__set__"):
            self._inner.__set__(instance, value)
        else:
            vars(instance)[self._name] = value

    def __delete__(self, instance: Any) -> None:
        if hasattr(type(self._inner), "__delete__"):
            self._inner.__delete__(instance)
        else:
            del vars(instance)[self._name]

"""The class of a resource while operations run: `save` and `delete` are left to the scope of its batch.

Run alone, each operation would have an instance of its own. So what an operation reads through the instance (related
objects, cached properties) is forgotten before the next operation, which reads it anew.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from django.core.exceptions import FieldDoesNotExist
from django.db.models.base import ModelBase
from django.utils.functional import cached_property

from geventbatch._batch import current_batch
from geventbatch._safe_repr import shown
from geventbatch.stores.django._as_loaded import ask_scope, in_class, scope_at_hand, watched
from geventbatch.stores.django._memory import attributes, forget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.db.models import Model


@cache
def instance_class(model: type[Model]) -> type[Model]:
    """Return *model* with some methods overridden: the class of a resource while operations run.

    Django does not know this class, so a copy or an unpickled resource is an ordinary instance of *model* again.
    """
    methods: dict[str, Any] = {
        "save": _save_later,
        "asave": _asave_later,
        "delete": _delete_later,
        "adelete": _adelete_later,
        "refresh_from_db": _refresh,
        "arefresh_from_db": _arefresh,
    }
    methods |= watched(model)
    methods |= {name: _Watched(found) for name, found in _relations(model)}
    methods |= {name: _Computed(in_class(model, name)) for name in _computed(model)}
    methods |= {"__new__": staticmethod(_making(model)), "__class__": property(lambda _: model, set_class)}
    names = {"__module__": model.__module__, "__qualname__": model.__qualname__, "__doc__": model.__doc__}
    made: Any = type.__new__(_InstanceType, model.__name__, (model,), {**methods, **names})
    return cast("type[Model]", made)


class _InstanceType(ModelBase):
    """The type of such a class: `isinstance` and calls of ``type(self)`` work as with the model itself."""

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.__mro__[1])


def _making(model: type[Model]) -> Callable[..., Model]:
    def make(_: object, *values: object, **named: object) -> Model:
        """Make an ordinary instance, as ``type(self)(…)`` and class methods of the model do."""
        return model(*values, **named)

    return make


def set_class(self: Model, kind: type[Model]) -> None:
    """Set the class of an instance, past its `__setattr__`, which would take it for an operation's. Switches: no."""
    vars(object)["__class__"].__set__(self, kind)


# -- save, delete, refresh_from_db ------------------------------------------------------------------------------


def _save_later(self: Model, *args: object, **options: object) -> None:
    """Do nothing but note the call: the store saves when all operations have run. Switches: no."""
    _check_using(self, "save", args[2] if len(args) > 2 else options.get("using"))  # noqa: PLR2004 - the third
    with suppress(RuntimeError):  # in a greenlet that the operation has started
        scope_at_hand().save_asked(self)


async def _asave_later(self: Model, *args: object, **options: object) -> None:
    _save_later(self, *args, **options)


def _delete_later(self: Model, using: object = None, *_: object, **__: object) -> tuple[int, dict[str, int]]:
    """Tell the store to delete the row when the operation has returned. Switches: no."""
    _check_using(self, "delete", using)
    current_batch().delete(scope_at_hand().key_of(self))
    return 1, {self._meta.label: 1}


async def _adelete_later(self: Model, *args: object, **options: object) -> tuple[int, dict[str, int]]:
    return _delete_later(self, *args, **options)


def _refresh(self: Model, using: str | None = None, fields: Any = None, **options: Any) -> None:
    """Load deferred fields. Refuse to reload others, which would undo earlier operations. Switches: yes."""
    _check_using(self, "refresh_from_db", using)
    if fields is None or any(_is_loaded(self, name) for name in fields):
        raise RuntimeError(
            "refresh_from_db() on the resource of a batch would undo what the operations before this one have changed: "
            "the batch has loaded it just now, so leave the call out"
        )
    parent: Any = type(self).__mro__[1]
    parent.refresh_from_db(self, using=using, fields=fields, **options)


async def _arefresh(self: Model, using: str | None = None, fields: Any = None, **options: Any) -> None:
    _refresh(self, using=using, fields=fields, **options)


def _is_loaded(instance: Model, name: str) -> bool:
    """Return whether the column *name* is loaded. A foreign key may be meant by either of its names."""
    try:
        field: Any = instance._meta.get_field(name)
    except FieldDoesNotExist:
        return name in vars(instance)
    return field.concrete and getattr(field, "attname", name) in vars(instance)


def _check_using(instance: Model, method: str, using: object) -> None:
    if using is not None and using != instance._state.db:
        raise RuntimeError(
            f"{method}(using={shown(using)}) on the resource of a batch, which is of the database "
            f"{shown(instance._state.db)}: what a batch does is in one transaction"
        )


# -- objects read through the instance --------------------------------------------------------------------------


class _Computed:
    """Replaces a `cached_property`: its first use has the scope look at the operation."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def __get__(self, instance: Model | None, owner: type[Model]) -> Any:
        if instance is not None:
            ask_scope()
        return self._found.__get__(instance, owner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


class _Watched(_Computed):
    """Replaces the descriptor of a related object likewise, also when one is assigned."""

    def __set__(self, instance: Model, value: Any) -> None:
        ask_scope()
        self._found.__set__(instance, value)


def _relations(model: type[Model]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the descriptor of each related object."""
    names = [field.name for field in (*model._meta.concrete_fields, *model._meta.private_fields) if field.is_relation]
    names += [one.get_accessor_name() for one in model._meta.related_objects if one.one_to_one]
    for name in names:
        found = in_class(model, name)
        if hasattr(found, "__get__") and hasattr(found, "__set__"):
            yield name, found


@cache
def _computed(model: type[Model]) -> tuple[str, ...]:
    """Return the names of the model's cached properties."""
    kinds = (cached_property, functools.cached_property)
    names = dict.fromkeys(name for parent in model.__mro__ for name in vars(parent))
    return tuple(name for name in names if isinstance(in_class(model, name), kinds))


@cache
def _columns(model: type[Model]) -> frozenset[str]:
    return frozenset([field.attname for field in model._meta.concrete_fields])


def take_related(instance: Model) -> None:
    """Take the keys of related objects that were saved after they were assigned, as `save` does first.

    Raises:
        ValueError: One of them is not saved.
    Switches: no.
    """
    if vars(instance._state).get("fields_cache"):
        prepare: Any = cast("Any", instance)._prepare_related_fields_for_save
        prepare(operation_name="save")


def forget_read(instance: Model, model: type[Model], before: dict[str, Any]) -> None:
    """Forget related objects and all attributes that are neither columns nor in *before*. Switches: no."""
    vars(instance._state).pop("fields_cache", None)
    forget(instance, model, attributes(instance, model).keys() - before.keys() - _columns(model))

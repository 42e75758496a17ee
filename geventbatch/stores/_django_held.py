"""The class of a resource while operations run: `save` and `delete` are left to the scope of its batch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, cast

from django.db.models.base import ModelBase

from geventbatch._processor import current_batch

if TYPE_CHECKING:
    from django.db.models import Model


@cache
def held_class(model: type[Model]) -> type[Model]:
    """The class of a resource while operations run: *model*, but for two methods. Django does not know it.

    So a copy of the resource, or what comes out of its pickle, is an ordinary instance of *model* again.
    """
    methods = {"save": _save_later, "delete": _delete_later, "refresh_from_db": _refresh}
    names = {"__module__": model.__module__, "__qualname__": model.__qualname__, "__doc__": model.__doc__}
    made: Any = type.__new__(ModelBase, model.__name__, (model,), {**methods, **names})
    return cast("type[Model]", made)


def _save_later(self: Model, *_: object, **__: object) -> None:
    """Do nothing: the store saves when all operations have run. Switches: no."""


def _refresh(self: Model, using: str | None = None, fields: Any = None, **options: Any) -> None:
    """Load deferred fields; not all, which would undo what the operations before have changed. Switches: yes."""
    if fields is None or any(name in vars(self) for name in fields):  # a deferred one is not there
        raise RuntimeError(
            "refresh_from_db() on the resource of a batch would undo what the operations before this one have changed: "
            "the batch has loaded it just now"
        )
    parent: Any = type(self).__mro__[1]
    parent.refresh_from_db(self, using=using, fields=fields, **options)


def _delete_later(self: Model, *_: object, **__: object) -> tuple[int, dict[str, int]]:
    """Have the store delete it when the operation has returned. Switches: no."""
    current_batch().delete()
    return 1, {self._meta.label: 1}

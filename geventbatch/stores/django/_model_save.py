"""A model's `save` and `delete`: whether they are Django's or its own, and which arguments they take."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from django.db.models import Model

from geventbatch.stores._sql.statements import first_word
from geventbatch.stores.django._statements import tables_of, writes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from django.db.backends.base.base import BaseDatabaseWrapper

_STEPS = ("save", "save_base", "_save_table", "_do_update", "_do_insert")


@cache
def has_own_save(model: type[Model]) -> bool:
    """Return whether saving runs code of the model's own, which may compute columns. Switches: no."""
    return any(getattr(model, step) is not getattr(Model, step) for step in _STEPS)


@contextmanager
def has_to_write(model: type[Model], connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Raise `RuntimeError` at the end of this block if no statement in it has written to a table of *model*.

    A `save` of the model's own may decide not to save, and so drop the changes of all operations of the batch.
    """
    if not has_own_save(model):
        yield
        return
    found: list[object] = []

    def look(execute: Callable[..., Any], sql: Any, *rest: Any) -> Any:
        text = str(sql)
        if not found and (first_word(text) == "CALL" or (writes(text) and tables_of(model).search(text))):
            found.append(sql)
        return execute(sql, *rest)

    wrappers: list[Any] = connection.execute_wrappers
    wrappers.insert(0, look)  # first, before ours puts something in front of the statement
    try:
        yield
    finally:
        wrappers.remove(look)
    if not found:
        raise RuntimeError(
            f"save() of {model.__name__} has written nothing, although fields have changed: raise an error in it, so "
            "that the operation's caller is told"
        )


@cache
def takes(method: Callable[..., Any], argument: str) -> bool:
    """Return whether *method* takes *argument* by name. Switches: no."""
    found = signature(method).parameters.values()
    return any(one.kind is Parameter.VAR_KEYWORD or one.name == argument for one in found)


def check_save(model: type[Model], *, inserts: bool) -> None:
    """Raise `TypeError` if the model's `save` lacks an argument that the store needs. Switches: no."""
    wanted = ("using", "force_insert") if inserts else ("using",)
    missing = [argument for argument in wanted if not takes(model.save, argument)]
    if missing:
        raise TypeError(
            f"{model.__name__}.save() takes no {' and no '.join(missing)}, by which a store saves: define it as "
            "def save(self, *args, **kwargs), and give them to super().save()"
        )

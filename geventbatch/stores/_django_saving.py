"""What a model's `save` and `delete` are: Django's, or its own."""

from __future__ import annotations

from functools import cache
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any

from django.db.models import Model

if TYPE_CHECKING:
    from collections.abc import Callable

_STEPS = ("save", "save_base", "_save_table", "_do_update", "_do_insert")


@cache
def has_own_save(model: type[Model]) -> bool:
    """Whether saving runs code of the model's own, which may compute columns. Switches: no."""
    return any(getattr(model, step) is not getattr(Model, step) for step in _STEPS)


@cache
def takes(method: Callable[..., Any], argument: str) -> bool:
    """Whether *method* can be given *argument* by its name. Switches: no."""
    found = signature(method).parameters.values()
    return any(one.kind is Parameter.VAR_KEYWORD or one.name == argument for one in found)


def check_save(model: type[Model], *, inserts: bool) -> None:
    """Raise `TypeError` where the store cannot tell `save` what to do. Switches: no."""
    wanted = ("using", "force_insert") if inserts else ("using",)
    missing = [argument for argument in wanted if not takes(model.save, argument)]
    if missing:
        raise TypeError(
            f"{model.__name__}.save() takes no {' and no '.join(missing)}, by which a store saves: define it as "
            "def save(self, *args, **kwargs), and give them to super().save()"
        )

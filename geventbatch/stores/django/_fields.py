"""Look-ups of a model's fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.exceptions import FieldDoesNotExist
from django.db.models import Field, ForeignKey, IntegerField

from geventbatch._safe_repr import shown

if TYPE_CHECKING:
    from django.db.models import Model


def pk_fields(model: type[Model]) -> list[Field[Any, Any]]:
    """Return the fields of the primary key, several if it is composite (since Django 5.2). Switches: no."""
    found: Any = getattr(model._meta, "pk_fields", [model._meta.pk])
    return list(found)


def check_names(model: type[Model]) -> None:
    """Raise `ValueError` at a name with a %, which Django cannot send with parameters. Switches: no."""
    fields = model._meta.concrete_fields
    names = [*(field.model._meta.db_table for field in fields), *(field.column for field in fields)]
    for name in names:
        if name is not None and "%" in name:
            raise ValueError(
                f"{model._meta.label} has the name {shown(name)}, which Django cannot send: it has a % in it"
            )


def version_field(model: type[Model], version: str) -> Field[Any, Any]:
    """Return the field that counts the saves. Raises `ValueError` if it cannot. Switches: no."""
    field = column(model, "version", version)
    if not isinstance(field, IntegerField):
        raise ValueError(  # noqa: TRY004 - the name is of the right type
            f"version is {shown(version)}, but must name an integer field of {model._meta.label}"
        )
    return field


def column(model: type[Model], argument: str, name: str) -> Field[Any, Any]:
    """Return the field *name* of *model*, given as *argument*. Raises `ValueError` at no column. Switches: no."""
    try:
        field: object = model._meta.get_field(name)
    except FieldDoesNotExist:
        field = None
    if not isinstance(field, Field) or not field.concrete:
        raise ValueError(f"{argument} is {shown(name)}, which is no column of {model._meta.label}")
    return field


def referenced(field: Field[Any, Any]) -> Field[Any, Any]:
    """Return the column that *field* refers to in the end; *field* itself if it is no foreign key. Switches: no."""
    while isinstance(field, ForeignKey):
        field = field.target_field
    return field

"""Values that the database computes: a `GeneratedField`'s for the present state, and database defaults of a new row."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any

from django.db.models import CharField, DecimalField, ExpressionWrapper, Model, TextField, Value
from django.db.models.functions import Cast
from django.db.models.sql import Query
from django.db.transaction import atomic

from geventbatch._safe_repr import said, shown
from geventbatch.errors import Undecided
from geventbatch.stores.django._changes import comparable, differ

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models import Field


class Generated:
    """The generated columns of the row of one attempt."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection = connection
        # -- mutable state ---------------------------------------------------------------------------------
        self._known: dict[str, tuple[list[object], Any]] = {}  # of each: the values of its source fields, and its own
        self._refused: Exception | None = None

    def note(self, instance: Model, loaded: dict[str, object]) -> None:
        """Remember the loaded values. Switches: no."""
        for field in generated_fields(type(instance)):
            of = [loaded[other.attname] for other in generated_from(field).values()]
            self._known[field.attname] = of, vars(instance)[field.attname]

    def value(self, instance: Model, field: Any) -> Any:
        """Return the database's value for *field* now. Switches: yes, if its source fields have changed."""
        others, values = generated_from(field), vars(instance)
        now = [comparable(other, values.get(other.attname), self._connection) for other in others.values()]
        known = self._known.get(field.attname)
        if known is not None and not any(map(differ, known[0], now)):
            return known[1]
        given = {name: (values.get(other.attname), other) for name, other in others.items()}
        try:
            with self._undone_if_refused():
                (found,) = evaluate(self._connection, [(field.expression, field.output_field)], given)
        except Exception as error:
            self._refused = error
            raise
        self._known[field.attname] = now, found
        return found

    def refused(self, key: object) -> Undecided | None:
        """Return an `Undecided`, once, if the database has refused to compute a value; else None. Switches: no.

        An earlier operation may have caused the refusal.
        """
        error, self._refused = self._refused, None
        if error is None:
            return None
        verdict = Undecided(f"{shown(key)} was not saved, nothing was written: {said(error)}")
        verdict.__cause__ = error
        return verdict

    def _undone_if_refused(self) -> AbstractContextManager[object]:
        """Return a savepoint on PostgreSQL, which takes no further statement after an error."""
        postgres = self._connection.vendor == "postgresql"
        return atomic(using=self._connection.alias) if postgres else nullcontext()


@cache
def generated_fields(model: type[Model]) -> tuple[Field[Any, Any], ...]:
    """Return the fields of *model* that the database computes from others. Switches: no."""
    return tuple(field for field in model._meta.concrete_fields if getattr(field, "generated", False))


@cache
def generated_from(field: Any) -> Mapping[str, Field[Any, Any]]:
    """Return the fields that the expression of a `GeneratedField` reads, by their names in it. Switches: no."""
    meta = field.model._meta
    names = dict.fromkeys(reference[0] for reference in field.model._get_expr_references(field.expression))
    return {name: meta.pk if name == "pk" else meta.get_field(name) for name in names}


def evaluate(
    connection: BaseDatabaseWrapper,
    wanted: Sequence[tuple[Any, Field[Any, Any]]],
    given: Mapping[str, tuple[Any, Field[Any, Any]]],
) -> list[Any]:
    """Return what the database computes for the *wanted* expressions over the *given* values, as field values.

    It reads from no table, and writes nothing. Switches: yes.
    """
    query: Any = Query(None)  # as Django's own Q.check does
    for name, (value, field) in given.items():
        known = Value(value, field)
        query.add_annotation(Cast(known, field) if connection.vendor == "postgresql" else known, name, select=False)
    for number, (expression, field) in enumerate(wanted):
        query.add_annotation(_as_column(ExpressionWrapper(expression, field), field, connection), f"wanted_{number}")
    found = next(iter(query.get_compiler(using=connection.alias).results_iter()))
    return [_with_places(value, field) for value, (_, field) in zip(found, wanted, strict=True)]


def _as_column(expression: Any, field: Field[Any, Any], connection: BaseDatabaseWrapper) -> Any:
    """Cast to the type of the column, as the database does when it stores a value.

    A text of limited length is not cast on PostgreSQL: that would cut off what the column refuses.
    """
    is_text = isinstance(field, CharField | TextField)
    converts = {"postgresql": not is_text, "sqlite": is_text}.get(connection.vendor, False)
    return Cast(expression, field) if converts else expression


def _with_places(value: Any, field: Field[Any, Any]) -> Any:
    """Round a decimal number to the places of its column."""
    if value is None or not isinstance(field, DecimalField) or field.decimal_places is None:
        return value
    return round(value, field.decimal_places)

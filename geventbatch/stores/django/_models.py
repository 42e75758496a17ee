"""The models of one store, by the names that begin their keys if there are several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from django.db.models import Model

from geventbatch._safe_repr import shown
from geventbatch.stores._sql.keys import hint_of_several

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from geventbatch.stores.django._model_rows import ModelRows

M = TypeVar("M", bound=Model)


class Models(Generic[M]):
    """Finds the model of a key."""

    def __init__(self, by_name: Mapping[str | None, ModelRows[M]]) -> None:
        """Keep them. The only model of a store has the name None, and keys without a name."""
        self.by_name = dict(by_name)
        self.any = next(iter(self.by_name.values()))
        """One of them: all share the database, its pool and the outcomes."""
        self.in_order = sorted(self.by_name.values(), key=lambda rows: rows.model._meta.db_table)
        """All, in the order in which every process locks them."""
        tables = [table for rows in self.in_order for table in tables_of(rows.model)]
        self.share_rows = len(set(tables)) < len(tables)
        """True if keys of two models may name one row, at least that of a common parent."""

    def __repr__(self) -> str:
        return " and ".join(f"{one.model._meta.label} by {one.row_key.name}" for one in self.by_name.values())

    def of(self, key: Any) -> ModelRows[M]:
        """Return the rows of the model of the normalised *key*. Switches: no."""
        return self.any if self.any.name is None else self.by_name[(key if self.any.tenant is None else key[1])[0]]

    def normalize(self, key: Hashable) -> Hashable:
        """Return *key* in the type of its column, behind the tenant if there are several. Switches: as ``tenant``.

        Raises:
            TypeError: Its type cannot be such a key.
            ValueError: Its type can, and its value is none.
        """
        tenant = self.any.tenant
        found = self._normalized(key)
        return found if tenant is None else (tenant(), found)

    def _normalized(self, key: Any) -> Hashable:
        if self.any.name is None:
            return self.any.row_key.normalize(key)
        names = ", ".join(repr(name) for name in self.by_name)
        if not isinstance(key, tuple | list) or len(key) != 2:  # noqa: PLR2004 - a name and a key
            raise TypeError(
                f"{shown(key)} is no key of {self!r}: it must be a pair of a name, of {names}, and a key"
                f"{hint_of_several(key, self.by_name)}"
            )
        name, part = key
        if not isinstance(name, str) or name not in self.by_name:
            raise ValueError(
                f"{shown(key)} is no key of {self!r}: its first part must be one of {names}"
                f"{hint_of_several(key, self.by_name)}"
            )
        return name, self.by_name[name].row_key.normalize(part)


def tables_of(model: type[Model]) -> dict[str, type[Model]]:
    """Return the names of the tables of *model* and of its parents, each with its model. Switches: no."""
    meta = model._meta
    return {one._meta.db_table: one for one in (meta.concrete_model or model, *meta.get_parent_list())}

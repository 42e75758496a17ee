"""Rows of many keys: the ``open_resources`` of a `DjangoStore`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from django.db.models import Model

from geventbatch.stores.django._bulk_scope import BulkScope

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from geventbatch.stores.django import DjangoStore
    from geventbatch.stores.django._models import Models

M = TypeVar("M", bound=Model)


class ModelBulks(Generic[M]):
    """Loads and saves the rows of many keys in one transaction."""

    all_or_nothing = True

    def __init__(self, store: DjangoStore[M], models: Models[M]) -> None:
        """Open the rows of *store*, whose *models* these are."""
        self._store = store
        self._models = models
        self.keeps_outcomes = store.keeps_outcomes
        self.on_server = store.on_server

    def __repr__(self) -> str:
        return f"<rows in bulk of {self._store!r}>"

    def __call__(self, keys: Iterable[Hashable]) -> BulkScope:
        """Return the scope of a bulk on the rows at *keys*. Switches: no."""
        return BulkScope(self._models, list(keys))

    def normalize_key(self, key: Any) -> Hashable:
        """Return *key* as `DjangoStore.normalize_key` does. Switches: no."""
        return self._store.normalize_key(key)

    def admit(self, key: Any) -> bool:
        """Return what `DjangoStore.admit` does, or raise. Switches: the first time, to connect."""
        return self._store.admit(key)

    def stopped(self) -> None:
        """Close the store's idle connections. Switches: no."""
        self._store.stopped()

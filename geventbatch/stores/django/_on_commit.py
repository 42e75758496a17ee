"""Callbacks that operations have given to `on_commit`: called when their batch was saved and answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch._watch import log

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from django.db.backends.base.base import BaseDatabaseWrapper


def call_back(callbacks: Sequence[Callable[[], object]], key: Any) -> None:
    """Call each, even if another one raises. Switches: as they do."""
    for callback in callbacks:
        try:
            callback()
        except Exception as error:
            told = "an on_commit callback of the batch of key %s, which was saved, failed"
            log.error(told, key, error=error)


def take(connection: BaseDatabaseWrapper) -> list[Callable[[], object]]:
    """Take the callbacks given to `on_commit` by operations, signals and the model's `save`. Switches: no."""
    taken: list[Callable[[], object]] = [entry[1] for entry in connection.run_on_commit]
    connection.run_on_commit = []
    return taken

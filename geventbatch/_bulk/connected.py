"""Keys of a bulk that operations have connected: a store saves them together or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

KeyT = TypeVar("KeyT", bound="Hashable")
BatchT = TypeVar("BatchT", bound="Hashable")


def by_component(keys: Iterable[KeyT], bulk: Mapping[KeyT, BatchT]) -> dict[BatchT, list[KeyT]]:
    """Return *keys* by their batch in *bulk* (`Batch.bulk`), which connected keys share; all in the given order."""
    found: dict[BatchT, list[KeyT]] = {}
    for key in keys:
        found.setdefault(bulk[key], []).append(key)
    return found

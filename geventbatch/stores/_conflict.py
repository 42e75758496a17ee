"""The `Conflict` of a save whose resource another writer has changed. Imports no vendor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict

if TYPE_CHECKING:
    from collections.abc import Hashable


def changed(
    key: Hashable, kind: type[Conflict] = Conflict, *, what: str = "it", since: str = "it was loaded"
) -> Conflict:
    """Return the `Conflict` of a save that did not find *what* as it was *since*. Nothing was written."""
    return kind(f"{shown(key)} was not saved, nothing was written: somebody else changed {what} since {since}")

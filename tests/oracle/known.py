"""What the oracle has found and nobody has mended yet. To be empty: whatever stays is a line of docs/as-if-alone.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.oracle.example import Example


@dataclass(frozen=True)
class Known:
    """One of them: it is passed over where its patterns are found."""

    why: str
    source: str = ""
    """In model and operations."""
    told: str = ""
    """In what the judge says."""


KNOWN: tuple[Known, ...] = (
    Known(
        "core: an operation that raised behind one that is thrown out keeps its error, whatever brought it",
        told=r"in a batch \('raised', '(builtins\.\w+Error|tests\.oracle\.judge\.\w+)'",
    ),
    Known(
        "mapped operations: one that flushes is told what those before it have brought",
        source=r"(session\(r\)|\.other|computed|double|set_by_server|children|deferred)",
        told=r"in a batch \('raised', 'sqlalchemy\.exc\.\w+'",
    ),
    Known(
        "mapped operations: on SQLite nothing is flushed before a query, a refresh or an expire",
        source=r"^sqlite.*session\(r\)\.",
    ),
)


def known(example: Example, told: str) -> Known | None:
    """The one that *told* is about."""
    source = f"{example.server}\n{example.model}\n{example.calls}\n{example.options}"
    for one in KNOWN:
        if re.search(one.source, source, re.DOTALL) and re.search(one.told, told, re.DOTALL):
            return one
    return None

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
        "the bare error of a column's type, in place of the StatementError around it",
        told=r"StatementError'\), in a batch \('raised', '(builtins|decimal)",
    ),
    Known(
        "an operation is judged by what a refused one before it has left",
        told=r"in a batch \('raised', '(builtins\.\w+Error|tests\.oracle\.judge|sqlalchemy)",
    ),
    Known("refused for all by an error that is not recognised", told="SaveFailed"),
    Known("what is not flushed is forgotten, or not seen by a query", source=r"session\(r\)\."),
    Known(
        "what operations have violated is not told to them",
        told=r"alone \('raised', 'sqlalchemy.exc.\w+'\), in a batch",
    ),
)


def known(example: Example, told: str) -> Known | None:
    """The one that *told* is about."""
    source = f"{example.model}\n{example.calls}\n{example.options}"
    for one in KNOWN:
        if re.search(one.source, source, re.DOTALL) and re.search(one.told, told, re.DOTALL):
            return one
    return None

"""What the oracle has found and nobody has mended yet. To be empty: whatever stays is a line of docs/as-if-alone.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.oracle.example import Example


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
        "by design (docs/as-if-alone.md): save() of the resource writes nothing, and so nothing is said to it there",
        source=r"models\.Model.*r\.save\(\)",
        told=r"alone \('raised', '(django\.db\.utils|builtins)\.",
    ),
    Known(
        "by design (docs/as-if-alone.md): rows of add_row are inserted with the save, and no query finds them before",
        source=r"add_row\(.*(select_from\(Other\)|sa\.update\(Other\)|others\(\)\.)",
    ),
    Known(
        "by design (docs/as-if-alone.md): of two wrong values the driver refuses one before it sends the other",
        source=r"chr\(0\)",
        told=r"alone \(.raised., .sqlalchemy\.exc\.IntegrityError.\), in a batch "
        r".*\s+DataError\('\(psycopg\.DataError\) PostgreSQL text fields cannot contain NUL",
    ),
    Known(
        "by design (docs/as-if-alone.md): who was refused stays so, though another state is loaded for the others",
        source=r"^(postgresql|mariadb)\n.*\ndef during_",
        told=r"operation \d+: alone \('raised', '[\w.]+\.(Clean|Dirty)', '(enough|much)'\), "
        r"in a batch \('raised', '(django|sqlalchemy|builtins)\.",
    ),
    Known(
        "not mended: what is expired and read behind a wrong value flushes that, which is told before a raise",
        source=r"^(postgresql|mariadb)\n.*2\*\*40",
        told=r"operation \d+: alone \('raised', '[\w.]+\.(Clean|Dirty)', '(enough|much)'\), "
        r"in a batch \('raised', 'sqlalchemy\.exc\.DataError'\)",
    ),
    Known(
        "by design (docs/as-if-alone.md): what is computed of a row that the operation itself has changed is of both",
        source=r"^(postgresql|mariadb)\n.*\nclass Thing\(.*"
        r"def \w+\(r\):\n(    [^\n]*\n)*    +r\.n [+-]?= [^\n]*\n(    [^\n]*\n)*[^\n]*r\.(computed|double)",
    ),
)


def known(example: Example, told: str) -> Known | None:
    """The one that *told* is about."""
    source = f"{example.server}\n{example.model}\n{example.calls}\n{example.options}"
    for one in KNOWN:
        if re.search(one.source, source, re.DOTALL) and re.search(one.told, told, re.DOTALL):
            return one
    return None

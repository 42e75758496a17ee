"""PostgreSQL tables that may silently leave out a row that is written to them.

A trigger (RETURN NULL), a rule, a policy, a partition or a view may do so. The catalogue is asked once a minute, in a
message that is sent anyway. Until it has answered, and for such tables, the written rows are counted before COMMIT,
which makes the message a third slower in PostgreSQL. A trigger made in between shows in the number of written rows.
"""

from __future__ import annotations

from math import inf
from typing import Final

from geventbatch._core.clock import clock as _clock

_TRUSTED: Final = 60.0
"""Seconds until the next look."""

# Triggers: BEFORE (2) or INSTEAD OF (64), of INSERT (4) or UPDATE (16). A statement's trigger may write too.
LOOK: Final = (
    "SELECT coalesce((SELECT relkind = 'r' AND NOT (relhasrules OR relrowsecurity OR relhassubclass) AND NOT EXISTS "
    "(SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = pg_class.oid AND tgenabled <> 'D' "
    "AND tgtype & 66 <> 0 AND tgtype & 20 <> 0) "
    "FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass(%s)), false)"
)
"""Asks whether a table, whose quoted name is the parameter, takes every row that it does not refuse."""

_known: Final[dict[tuple[str, str], tuple[bool, float]]] = {}
"""By database alias and table: whether it takes every row, and until which monotonic second that holds."""


def takes_all(alias: str, table: str) -> bool | None:
    """Return whether *table* takes every row that it does not refuse. None: ask by `LOOK`. Switches: no."""
    found, until = _known.get((alias, table), (None, inf))
    return found if _clock.monotonic() < until else None


def note(alias: str, table: str, *, answer: bool) -> None:
    """Remember the *answer* to `LOOK`. Switches: no."""
    _known[alias, table] = answer, _clock.monotonic() + _TRUSTED


def distrust(alias: str, table: str) -> None:
    """Remember for good that the table has left out a row. Switches: no."""
    _known[alias, table] = False, inf

"""Whether a table of PostgreSQL's may leave out a row that is written to it, and say nothing.

A trigger (RETURN NULL), a rule, a policy, a partition or a view may. Its catalogue is asked once a minute, in a message
that is sent anyway; until then, and where one may, what goes with COMMIT is counted before it. That costs PostgreSQL a
third of the time of the message. A trigger that is made in between is found by the number of rows that were written.
"""

from __future__ import annotations

from math import inf
from typing import Final

from geventbatch._core.clock import clock as _clock

_TRUSTED: Final = 60.0
"""Seconds until the next look."""

# Triggers: BEFORE (2) or INSTEAD OF (64), of INSERT (4) or UPDATE (16). One for each statement may write too.
LOOK: Final = (
    "SELECT coalesce((SELECT relkind = 'r' AND NOT (relhasrules OR relrowsecurity OR relhassubclass) AND NOT EXISTS "
    "(SELECT FROM pg_catalog.pg_trigger WHERE tgrelid = pg_class.oid AND tgenabled <> 'D' "
    "AND tgtype & 66 <> 0 AND tgtype & 20 <> 0) "
    "FROM pg_catalog.pg_class WHERE oid = pg_catalog.to_regclass(%s)), false)"
)
"""Asks whether a table, whose quoted name is the parameter, takes every row that it does not refuse."""

_known: Final[dict[tuple[str, str], tuple[bool, float]]] = {}
"""Of a database's alias and a table: whether it takes every row, and until when that holds."""


def takes_all(alias: str, table: str) -> bool | None:
    """Whether *table* takes every row that it does not refuse. None: ask `LOOK`. Switches: no."""
    found, until = _known.get((alias, table), (None, inf))
    return found if _clock.monotonic() < until else None


def note(alias: str, table: str, *, answer: bool) -> None:
    """Remember what `LOOK` has found. Switches: no."""
    _known[alias, table] = answer, _clock.monotonic() + _TRUSTED


def distrust(alias: str, table: str) -> None:
    """It has left a row out all the same. Switches: no."""
    _known[alias, table] = False, inf

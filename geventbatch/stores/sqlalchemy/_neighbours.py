"""Which batches cannot share a transaction: each would overwrite what the other has written, and nobody would notice.

In transactions of their own, the later one would find that the row has changed. In one, the row is locked already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.orm.attributes import instance_state

from geventbatch._safe_repr import shown
from geventbatch.errors import Apart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import InstanceState

    from geventbatch.stores.sqlalchemy._mapped_part import MappedPart
    from geventbatch.stores.sqlalchemy._triggers import Triggers

Row = tuple[Any, Any]
"""A table, and the primary key of a row of it."""


def row_of(state: InstanceState[Any]) -> Row | None:
    """Return the row of *state*; None if it has none yet."""
    return None if state.key is None else (state.mapper.base_mapper.local_table, state.key[1])


def rows_of(part: MappedPart) -> set[Row | None]:
    """Return the rows that are resources of *part*, to be saved or compared."""
    return {row_of(instance_state(one.resource)) for one in part.compared} - {None}


def apart(parts: Sequence[MappedPart]) -> dict[MappedPart, Exception]:
    """Return those of *parts* that write a row of an earlier one, or one that an earlier one writes, as far as known.

    What a flush adds (a cascade, a listener's change) is found behind it: see `Written`.
    """
    beside = {part: found for part in parts if (found := {row_of(state) for state in part.beside()} - {None})}
    left: dict[MappedPart, Exception] = {}
    if not beside or len(parts) < 2:  # noqa: PLR2004 - there are no others
        return left
    own: dict[Any, MappedPart] = {}
    written: dict[Any, MappedPart] = {}
    for part in parts:
        mine, others = rows_of(part), beside.get(part, set())
        both = [row for row in mine if row in written] + [row for row in others - mine if row in written or row in own]
        if both:
            left[part] = _apart(part, both[0], own.get(both[0]) or written[both[0]])
            continue
        own.update(dict.fromkeys(mine, part))
        written.update(dict.fromkeys(others - mine, part))
    return left


class Written:
    """The rows that the flushes of some parts have written."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _by_row: dict[Any, MappedPart] | None  # resources too, written or not; None: only resources were written

    def __init__(self, parts: Sequence[MappedPart], triggers: Triggers) -> None:
        """Hold those of none of *parts* yet."""
        self._parts = list(parts)
        self._triggers = triggers
        self._by_row = None

    def check(self, part: MappedPart) -> None:
        """Raise `Apart` if the flush of *part* has written a row that is another part's too, or may have."""
        written = part.guard.take_written()
        if len(self._parts) > 1:
            self._triggers.check(part, written - {None})
        if not written - rows_of(part):
            return
        if self._by_row is None:
            self._by_row = {row: one for one in self._parts for row in rows_of(one)}
        for row in written:
            owner = self._by_row.setdefault(row, part)
            if owner is not part:
                raise _apart(part, row, owner)


def _apart(part: MappedPart, row: Row | None, other: MappedPart) -> Apart:
    table, key = row or ("row", ())
    told = f"{shown(part.key)} was not saved, nothing was written: the row {key} of {table} is written for "
    return Apart(f"{told}{shown(other.key)} too; it is applied again, in a transaction of its own", keys=part.keys)

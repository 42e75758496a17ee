"""The rows of several keys, looked at as one by the guard of the operations that change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch.errors import TooEarly

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from geventbatch.stores.django._row import Row


class Rows:
    """Answers for all rows what a `Row` answers for itself."""

    def __init__(self, rows: Mapping[Any, Row[Any]]) -> None:
        """Be of *rows*, by key."""
        self._by_key = rows
        self._rows = list(rows.values())
        self.locks = any(row.locks for row in self._rows)
        """True if the load locks the rows."""

    @property
    def claimed(self) -> tuple[bool, ...]:
        """Of each row: whether it was locked after the load, and was unchanged then."""
        return tuple([row.claimed for row in self._rows])

    @claimed.setter
    def claimed(self, values: tuple[bool, ...]) -> None:
        for row, value in zip(self._rows, values, strict=True):
            row.claimed = value

    def verify(self) -> None:
        """Verify each row: see `Row.verify`. Switches: yes."""
        for row in self._rows:
            row.verify()

    def now(self) -> dict[str, object]:
        """Return the values of all rows as the transaction sees them. Switches: yes."""
        found: dict[str, object] = {}
        for number, row in enumerate(self._rows):
            found |= {f"{number} {name}": value for name, value in row.now().items()}
        return found

    def is_lost_with(self, deleted: Sequence[Hashable]) -> bool:
        """Return whether unsaved changes are lost if the keys in *deleted* are. Switches: no."""
        return any(self._by_key[key].differs() for key in deleted if key in self._by_key)

    def is_named_in(self, statement: str) -> bool:
        """Return whether *statement* names a table of theirs. Switches: no."""
        return any(row.is_named_in(statement) for row in self._rows)

    def misleads(self, query: str, params: Any) -> bool:
        """Return whether *query* may read any of them without its unsaved changes. Switches: no."""
        return any(row.is_named_in(query) and row.misleads(query, params) for row in self._rows)

    def refused(self, key: object) -> TooEarly | None:
        """Return why the database has refused to compute a generated value, once, or None. Switches: no.

        An earlier operation may have caused that: it is found when those before are saved by themselves.
        """
        verdicts = [verdict for row in self._rows if (verdict := row.refused(key)) is not None]
        if not verdicts:
            return None
        found = TooEarly(*verdicts[0].args)
        found.__cause__ = verdicts[0].__cause__
        return found

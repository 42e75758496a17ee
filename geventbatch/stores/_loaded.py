"""What one batch has loaded of a mapped class's row, and what has changed since: here, and in the database."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.orm.attributes import flag_modified

from geventbatch.errors import Conflict, Rejected

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from sqlalchemy.orm import InstanceState, Session

    from geventbatch.stores._mapping import Mapping


class Loaded:
    """The resource of one batch, as it was loaded; or made, where there was no row."""

    # -- mutable state ---------------------------------------------------------------------------------------
    claimed: bool  # the row is ours to write
    _mutable: dict[str, Any]  # copies of what was loaded and can change without SQLAlchemy's knowing

    def __init__(
        self, mapping: Mapping, key: Hashable, session: Session, resource: Any, token: Sequence[Any] | None
    ) -> None:
        """Take what was loaded, with what the mapping's `token` was; None: the resource was made, there is no row."""
        self._mapping = mapping
        self._key = key
        self._session = session
        self.resource = resource
        self.claimed = mapping.locking
        self.identity: tuple[Any, ...] | None = None  # of the row that was loaded; None: there was none
        self._mutable = {}
        if token is not None:
            self.identity = sa.inspect(resource).identity
            loaded = self._values()
            self._mutable = _copies(loaded)
            # What a save compares, where it has to; and what was loaded of that.
            self._compared = mapping.token or tuple(mapping.columns[name] for name in loaded)
            self._token = tuple(token) or tuple({**loaded, **self._mutable}.values())

    def changes(self) -> bool:
        """Whether the session has something to write."""
        session = self._session
        return bool(session.new or session.deleted or any(session.is_modified(one) for one in session.dirty))

    def flag_mutated(self) -> None:
        """Tell SQLAlchemy of lists and dictionaries that were changed in place, which it does not see by itself."""
        if self.resource not in self._session:
            return
        for name, value in self._values().items():
            if isinstance(value, (list, dict, set, bytearray)) and (
                name not in self._mutable or self._mutable[name] != value  # or nobody knows what the database has
            ):
                flag_modified(self.resource, name)

    def has_flushed(self) -> None:
        """What can change in place is now as it is in the database."""
        self._mutable = _copies(self._values())

    def rolled_back(self) -> None:
        """A savepoint: nobody knows any more what the database has."""
        self._mutable = {}

    def refuse_expressions(self) -> None:
        """An expression that one operation has assigned would be lost in that of the next one."""
        for name, value in self._values().items():
            if hasattr(value, "__clause_element__") or isinstance(value, sa.ClauseElement):
                raise Rejected(
                    f"{self._key!r} was not saved: an operation has assigned the SQL expression {value!r} to "
                    f"{name}, but must assign a value"
                )

    def touch(self) -> None:
        """Where nobody is kept out by a lock, have the row changed too when only something beside it is.

        Else another process that has loaded the same would not notice.
        """
        mapping, session = self._mapping, self._session
        if mapping.locking or self.identity is None or self.resource not in session:
            return
        if self.resource in session.deleted or session.is_modified(self.resource, include_collections=False):
            return
        counted = (*mapping.mapper.primary_key, mapping.mapper.version_id_col)
        others = (
            name
            for name, column in mapping.columns.items()
            if not any(column is one for one in counted) and getattr(column, "computed", None) is None
        )
        name = mapping.version or next(others, None)
        if name is not None:
            getattr(self.resource, name)  # so that it is loaded
            flag_modified(self.resource, name)

    def claim(self, connection: sa.Connection) -> None:
        """Lock the row, once, and see that it is as it was loaded: else it is a `Conflict`."""
        if self.claimed:
            return
        if self.identity is not None:
            mapper = self._mapping.mapper
            is_row = (column == value for column, value in zip(mapper.primary_key, self.identity, strict=True))
            claim = sa.select(*self._compared).select_from(mapper.selectable).where(*is_row)
            row = connection.execute(claim.with_for_update(of=mapper.local_table, key_share=True)).one_or_none()
            if row is None or tuple(row) != self._token:
                raise self.conflict()
        self.claimed = True

    def conflict(self) -> Conflict:
        """What a save is that finds another row than was loaded."""
        return Conflict(f"{self._key!r} was not saved: somebody else changed it since it was loaded")

    def _values(self) -> dict[str, Any]:
        """Of the columns that are loaded."""
        state: InstanceState[Any] = sa.inspect(self.resource)
        return {name: state.dict[name] for name in self._mapping.columns if name in state.dict}


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    """Of those that can change in place."""
    return {name: deepcopy(value) for name, value in values.items() if isinstance(value, (list, dict, set, bytearray))}

"""Loads the rows of many keys together, and gives each to the session of its batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm.attributes import instance_state

from geventbatch._batch import batch_at_hand
from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict
from geventbatch.stores._give_back import give_back
from geventbatch.stores._sql import errors
from geventbatch.stores.sqlalchemy._batch_connection import SharedConnection
from geventbatch.stores.sqlalchemy._change_tracker import tracker_of
from geventbatch.stores.sqlalchemy._guard import Guard
from geventbatch.stores.sqlalchemy._key_columns import folds
from geventbatch.stores.sqlalchemy._load import load_each
from geventbatch.stores.sqlalchemy._mapped_part import match
from geventbatch.stores.sqlalchemy._mapping import table_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Sequence

    from geventbatch.stores.sqlalchemy._change_tracker import ChangeTracker
    from geventbatch.stores.sqlalchemy._mapping import Mapping
    from geventbatch.stores.sqlalchemy._session import BatchSession
    from geventbatch.stores.sqlalchemy._transaction import Transaction

_MOST = 5_000
"""Keys of one statement: drivers and servers bound the number of parameters."""


class ManyRows:
    """The rows of many keys, in a session of their own until they are given away."""

    # -- mutable state ---------------------------------------------------------------------------------------
    connection: SharedConnection
    guard: Guard  # of the session: what goes through it is the library's own work
    _session: BatchSession

    def __init__(self, mapping_of: Callable[[Any], Mapping], name: str) -> None:
        """Load nothing yet; *name* is for messages."""
        self._mapping_of = mapping_of
        self._name = name
        self.transaction: Transaction | None = None
        self.rows: dict[Hashable, Any] = {}
        """By key: the instance with its token; or the error of its load."""
        self.more: set[int] = set()
        """The ranks of the classes whose load brings more than the rows."""

    @property
    def known(self) -> ChangeTracker:
        """What is known of the loaded instances."""
        return tracker_of(self._session, self._mapping_of(next(iter(self.rows))))

    def load(self, keys: list[Any]) -> Transaction | None:
        """Load, and return the transaction; None if each of *keys* has failed. Switches: yes."""
        try:
            self.transaction, self.rows = self._load(keys)
        except DBAPIError as error:
            if not (errors.has_no_xmin(error) and self._forget_tokens(keys)):
                raise
            self.transaction, self.rows = self._load(keys)
        return self.transaction

    def give_away(self) -> None:
        """Expunge all, so that other sessions can take them."""
        with self._session.silence():
            self._session._expunge_states(self._session.identity_map.all_states())  # noqa: SLF001 - the public cascades

    def close(self, *, saved: bool, lost: Collection[Hashable] = ()) -> None:
        """Close the session."""
        session = self.__dict__.pop("_session", None)
        if session is not None:
            try:
                give_back(self._name, session.close, saved=saved, lost=lost)
            finally:
                session.end_watch()

    # -- inside ----------------------------------------------------------------------------------------------

    def _load(self, keys: list[Any]) -> tuple[Transaction | None, dict[Hashable, Any]]:
        return load_each(self._begin, self._fetch, keys, lambda key: self._mapping_of(key).question_of_many(key))

    def _begin(self, keys: Sequence[Any]) -> Transaction:
        mapping = self._mapping_of(keys[0])
        transaction = mapping.transaction(mapping.engine, self._name)
        self.close(saved=False)  # of a first try
        session = mapping.sessions(bind=transaction.connection, join_transaction_mode="rollback_only")
        self._session = cast("BatchSession", session)
        self.guard = Guard(mapping, self._name, self._session, transaction)
        self._session.begin_watch(self.guard)
        self.connection = SharedConnection.share(transaction.connection, self.guard)
        return transaction

    def _fetch(self, keys: Sequence[Any], transaction: Transaction) -> dict[Hashable, Any]:
        found: dict[Hashable, Any] = {}
        for mapping, some in self._by_mapping(keys):
            rows: dict[Hashable, Any] = {}
            for first in range(0, len(some), _MOST):
                part = some[first : first + _MOST]
                try:
                    rows |= self._fetch_of(mapping, part, transaction)
                except (ValueError, TypeError, LookupError):  # of a column's type, for some row
                    rows |= {key: row for key in part if (row := self._fetch_one(mapping, key)) is not None}
            if mapping.shares_rows:
                self._leave_once(rows, found)
            if self._has_more(rows):
                self.more.add(mapping.rank)
            found |= rows
        return found

    def _fetch_of(self, mapping: Mapping, keys: list[Any], transaction: Transaction) -> dict[Hashable, Any]:
        own = [mapping.own_key(key) for key in keys]
        if mapping.lock is not None:
            transaction.precede(*mapping.lock_all(own))
        rows = self._session.execute(*mapping.load_all(own)).unique().all()
        found = match(mapping, keys, rows)
        unmatched = [key for key in keys if key not in found]
        if unmatched and (len(rows) > len(found) or any(folds(cast("Any", one)) for one in mapping.by)):
            self._match(mapping, unmatched, found)
        return found

    def _match(self, mapping: Mapping, unmatched: list[Any], found: dict[Hashable, Any]) -> None:
        """Ask which row each of *unmatched* is, as the database may take several keys for one.

        The key that is in the row's own form has it first. A bulk has each row once.
        """
        taken = {id(row[0]): key for key, row in found.items()}
        for key in unmatched:
            row = self._fetch_one(mapping, key)
            if row is None or isinstance(row, Exception):
                if row is not None:
                    found[key] = row
            elif id(row[0]) in taken:
                found[key] = _same_row(key, taken[id(row[0])], "as the row does")
            else:
                taken[id(row[0])] = key
                found[key] = row

    def _leave_once(self, rows: dict[Hashable, Any], found: dict[Hashable, Any]) -> None:
        """Leave in *rows* those that keys of other classes have not *found*: two classes may have the same rows."""
        taken = {_identity(row): key for key, row in found.items() if not isinstance(row, Exception)}
        for key, row in rows.items():
            if not isinstance(row, Exception) and _identity(row) in taken:
                rows[key] = _same_row(key, taken[_identity(row)], "by one of the classes")

    def _fetch_one(self, mapping: Mapping, key: Any) -> Any:
        try:
            return self._session.execute(mapping.load, mapping.parameters(key)).unique().one_or_none()
        except (ValueError, TypeError, LookupError) as error:
            undecoded = ValueError(f"the {mapping.name} {shown(key)} cannot be decoded: {said(error)}")
            undecoded.__cause__ = error
            return undecoded

    def _has_more(self, rows: dict[Hashable, Any]) -> bool:
        relations: dict[Any, frozenset[str]] = {}
        for row in rows.values():
            if not isinstance(row, Exception):
                state: Any = instance_state(row[0])
                mapper = state.manager.mapper
                if mapper not in relations:
                    relations[mapper] = frozenset(mapper.relationships.keys())
                if not relations[mapper].isdisjoint(state.dict):
                    return True
        return False

    def _forget_tokens(self, keys: list[Any]) -> bool:
        """Compare all columns, from now on, of what has no xmin, as a view. Return whether there was one."""
        found = False
        for mapping, some in self._by_mapping(keys):
            if mapping.token:
                try:
                    with mapping.connect(some[0]) as connection:
                        connection.execute(sa.select(*mapping.token).select_from(mapping.mapper.selectable).limit(0))
                except DBAPIError as error:
                    if errors.has_no_xmin(error):
                        mapping.forget_token()
                        found = True
        return found

    def _by_mapping(self, keys: Sequence[Any]) -> list[tuple[Mapping, list[Any]]]:
        """Return *keys* by class, in the order in which all processes load and lock them."""
        groups: dict[int, tuple[Mapping, list[Any]]] = {}
        for key in keys:
            mapping = self._mapping_of(key)
            groups.setdefault(mapping.rank, (mapping, []))[1].append(key)
        return [groups[rank] for rank in sorted(groups)]


def _identity(row: Any) -> tuple[str, Any]:
    """Return the table and the primary key of a loaded row."""
    state: Any = instance_state(row[0])
    return table_of(state.mapper), state.key[1]


def _same_row(key: Hashable, other: Hashable, how: str) -> Exception:
    """Return the error of *key*, which names the row that *other* has; *how* to name it always."""
    told = f"{shown(key)} names the same row as {shown(other)}"
    bulk = batch_at_hand().bulk
    if bulk[key] is not bulk[other]:
        return Conflict(f"{told}, of the same bulk")
    # A replay would find the same.
    return ValueError(f"{told}, which operations connect with it: always name it {how}")

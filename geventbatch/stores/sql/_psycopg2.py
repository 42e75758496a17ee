"""A batch's transaction through psycopg2: three round trips, since it returns the last answer of a message only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from psycopg2.extensions import connection as Connection  # type: ignore[import-untyped]  # noqa: N812 - it has no types
from psycopg2.extensions import cursor as Cursor  # noqa: N812 - likewise

from geventbatch.errors import NotSaved
from geventbatch.stores._sql import bounds, commit
from geventbatch.stores.sql._postgres import SEPARATOR, PostgresTransaction
from geventbatch.stores.sql._transaction import Loaded, remaining

if TYPE_CHECKING:
    from collections.abc import Iterable

    from geventbatch.stores.sql._transaction import Save

_BEGIN: Final = bounds.BEGIN.encode()


class Psycopg2Transaction(PostgresTransaction):
    """One message begins and loads, the second one writes and asks for the transaction's id, the third commits."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _has_begun = False

    def texts(self, query: str, every: Iterable[Any]) -> list[bytes]:
        cursor = self._cursor()
        return [cursor.mogrify(query, parameters) for parameters in every]

    def fetch(self, text: str, parameters: Any) -> Loaded:
        cursor = self._cursor()
        if self._has_begun:
            cursor.execute(text, parameters)
        else:
            self._has_begun = True
            before = [_BEGIN, bounds.postgres_bound(remaining()).encode()]
            cursor.execute(SEPARATOR.join([*before, *self.texts(text, [parameters])]))
        return Loaded(tuple([column[0] for column in cursor.description or ()]), cursor.fetchall())

    def send(self, text: str, parameters: Any) -> Any:
        cursor = self._cursor()
        if isinstance(parameters, list):
            cursor.executemany(text, parameters)
        else:
            cursor.execute(text, parameters)
        return cursor

    def write(self, save: Save) -> None:
        statements = self.statements(save)
        cursor = self._cursor()
        cursor.execute(SEPARATOR.join([*statements, bounds.postgres_bound_and_xid(remaining()).encode()]))
        self.xid = cursor.fetchone()[1]
        self.commit_is_sent()
        cursor.execute("COMMIT")
        if cursor.statusmessage != "COMMIT":
            raise NotSaved("the server has rolled back")

    def roll_back(self) -> None:
        if commit.transaction_status(self.driver) != commit.IDLE:
            self._cursor().execute("ROLLBACK")  # its `rollback` does nothing, since it does not know of our BEGIN

    def _cursor(self) -> Any:
        return Connection.cursor(self.driver, cursor_factory=Cursor)

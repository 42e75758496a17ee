"""A batch's transaction through psycopg 3: BEGIN, bounds and SELECT are one round trip, and the save is another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.rows import tuple_row

from geventbatch.stores._sql import bounds, commit
from geventbatch.stores._sql.psycopg_text import join_each
from geventbatch.stores.sql._postgres import SEPARATOR, PostgresTransaction
from geventbatch.stores.sql._transaction import Loaded, remaining

if TYPE_CHECKING:
    from collections.abc import Iterable

    from geventbatch.stores.sql._transaction import Save

_BEGIN: Final = bounds.BEGIN.encode()


class PsycopgTransaction(PostgresTransaction):
    """Nothing is prepared on the server: behind a pooler, another client may have the session by then."""

    # -- mutable state ---------------------------------------------------------------------------------------
    _before: list[bytes] | None  # to send with the first statement

    def begin(self) -> None:
        super().begin()
        self._encoding = self.driver.info.encoding
        self._before = [_BEGIN, bounds.postgres_bound_and_xid(remaining()).encode()]

    def texts(self, query: str, every: Iterable[Any]) -> list[bytes]:
        return [text.encode(self._encoding) for text in join_each(self.driver, query, every)]

    def fetch(self, text: str, parameters: Any) -> Loaded:
        cursor = psycopg.Cursor(self.driver, row_factory=tuple_row)
        before, self._before = self._before, None
        if before is None:
            cursor.execute(text.encode(), parameters, prepare=False)
        else:
            cursor.execute(SEPARATOR.join([*before, *self.texts(text, [parameters])]), prepare=False)
            cursor.nextset()
            self.xid = cursor.fetchall()[0][1]
            cursor.nextset()
        return Loaded(tuple([column.name for column in cursor.description or ()]), cursor.fetchall())

    def send(self, text: str, parameters: Any) -> psycopg.Cursor[Any]:
        cursor = psycopg.Cursor(self.driver, row_factory=tuple_row)
        if isinstance(parameters, list):
            cursor.executemany(text.encode(), parameters)
            return cursor
        return cursor.execute(text.encode(), parameters, prepare=False)

    def write(self, save: Save) -> None:
        message = SEPARATOR.join([*self.statements(save), b"COMMIT"])
        self.driver.pgconn.socket  # noqa: B018 - raises where the connection is closed
        self.commit_is_sent()
        psycopg.Cursor(self.driver).execute(message, prepare=False)

    def roll_back(self) -> None:
        if commit.transaction_status(self.driver) != commit.IDLE:
            self.driver.rollback()

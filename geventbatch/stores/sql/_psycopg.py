"""A batch's transaction through psycopg 3: BEGIN, bounds and SELECT are one round trip, and the save is another."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg.adapt import Transformer
from psycopg.rows import tuple_row

from geventbatch.stores._sql import bounds, commit
from geventbatch.stores._sql.joined import Text
from geventbatch.stores._sql.libpq import exchange
from geventbatch.stores._sql.psycopg_text import join_each
from geventbatch.stores.sql._postgres import SEPARATOR, PostgresTransaction
from geventbatch.stores.sql._transaction import UNFIT, Loaded, remaining

if TYPE_CHECKING:
    from collections.abc import Iterable

    from geventbatch.stores.sql._transaction import Save

_BEGIN: Final = bounds.BEGIN.encode()
_NAME: Final = re.compile(r"%\((\w+)\)s")


class PsycopgTransaction(PostgresTransaction):
    """Nothing is prepared on the server: behind a pooler, another client may have the session by then."""

    unmade = (psycopg.DataError, UnicodeEncodeError)
    unfit = (*UNFIT, psycopg.ProgrammingError)

    # -- mutable state ---------------------------------------------------------------------------------------
    _has_begun = False

    def begin(self) -> None:
        self._encoding = self.driver.info.encoding
        self._transformer = Transformer(self.driver)

    def decoded(self, message: bytes) -> str:
        return message.decode(self._encoding)

    def text(self, query: str, parameters: dict[str, Any]) -> bytes:
        found = _text(query).of(parameters, self._transformer)  # in a fraction of a cursor's time
        return self.texts(query, [parameters])[0] if found is None else found.encode(self._encoding)

    def texts(self, query: str, every: Iterable[Any]) -> list[bytes]:
        return [text.encode(self._encoding) for text in join_each(self.driver, query, every)]

    def fetch(self, text: str, parameters: dict[str, Any]) -> Loaded:
        message = self.text(text, parameters)
        if not self._has_begun:
            self._has_begun = True
            message = SEPARATOR.join([_BEGIN, bounds.postgres_bound_and_xid(remaining()).encode(), message])
            self.asked = message, parameters
        *before, result = exchange(self.driver, message)
        if before:
            self.xid = (before[-1].get_value(0, 1) or b"").decode()
        columns = [(result.fname(number) or b"").decode(self._encoding) for number in range(result.nfields)]
        self._transformer.set_pgresult(result)
        return Loaded(tuple(columns), self._transformer.load_rows(0, result.ntuples, tuple))

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
        exchange(self.driver, message)

    def roll_back(self) -> None:
        if commit.transaction_status(self.driver) != commit.IDLE:
            self.driver.rollback()

    def restore(self) -> None:
        pass


@lru_cache(maxsize=1000)
def _text(query: str) -> Text:
    return Text(query, dict.fromkeys(_NAME.findall(query)))

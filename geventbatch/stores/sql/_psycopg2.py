"""A batch's transaction through psycopg2, which returns the last answer of a message only."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from psycopg2 import BINARY, ProgrammingError  # type: ignore[import-untyped] # it has no types
from psycopg2.extensions import (  # type: ignore[import-untyped] # it has no types
    BINARYARRAY,
    TRANSACTION_STATUS_IDLE,
    ISQLQuote,
    adapters,
    cursor,
    encodings,
    new_array_type,
    new_type,
    register_adapter,
    register_type,
    string_types,
)
from psycopg2.extras import UUID_adapter  # type: ignore[import-untyped] # likewise

from geventbatch._safe_repr import shown
from geventbatch.errors import NotSaved
from geventbatch.stores._sql import bounds
from geventbatch.stores.sql._postgres import SEPARATOR, PostgresTransaction
from geventbatch.stores.sql._transaction import UNFIT, Loaded, remaining

if TYPE_CHECKING:
    from collections.abc import Iterable

    from geventbatch.stores.sql._transaction import Save

_BEGIN: Final = bounds.BEGIN.encode()

if (UUID, ISQLQuote) not in adapters:
    register_adapter(UUID, UUID_adapter)  # else it refuses any key that is one; rows are read as before


def _bytes(value: Any, used: Any) -> bytes | None:
    found = BINARY(value, used)
    return None if found is None else bytes(found)


_BYTES: Final = new_type(BINARY.values, "BYTES", _bytes)

_CASTS: Final = (
    (BINARY, _BYTES),
    (BINARYARRAY, new_array_type(BINARYARRAY.values, "BYTES[]", _BYTES)),
)
"""What makes memoryviews of bytea, which cannot be copied, and what makes bytes in its place."""


class Psycopg2Transaction(PostgresTransaction):
    """One message begins and loads, with the transaction's id in the rows; another one writes and commits."""

    unmade = (ValueError,)  # for a NUL; or a UnicodeEncodeError
    unfit = (*UNFIT, ProgrammingError)

    # -- mutable state ---------------------------------------------------------------------------------------
    _has_begun = False
    _autocommit: bool  # as the user's connection has it

    def begin(self) -> None:
        self._autocommit = self.driver.autocommit
        if not self._autocommit:
            self.driver.autocommit = True  # leaves BEGIN to us: the driver would wait for its own
        self._cursor: Any = cursor(self.driver)
        own = self.driver.string_types
        for given, bare in _CASTS:
            for oid in given.values:
                if own.get(oid, string_types[oid]) is given:  # else the user has said what to make of it
                    register_type(bare, self._cursor)

    def restore(self) -> None:
        if not self._autocommit:
            self.driver.autocommit = False

    def status(self) -> int:
        found: int = self.driver.get_transaction_status()  # without an object for `info`
        return found

    def decoded(self, message: bytes) -> str:
        return message.decode(encodings[self.driver.encoding])

    def text(self, query: str, parameters: dict[str, Any]) -> bytes:
        found: bytes = self._cursor.mogrify(query, parameters)
        return found

    def texts(self, query: str, every: Iterable[Any]) -> list[bytes]:
        mogrify = self._cursor.mogrify
        return [mogrify(query, parameters) for parameters in every]

    def fetch(self, text: str, parameters: dict[str, Any]) -> Loaded:
        used = self._cursor
        if self._has_begun:
            used.execute(text, parameters)
            return Loaded(tuple([column.name for column in used.description or ()]), used.fetchall())
        self._has_begun = True
        load = used.mogrify(_with_xid(text), parameters)
        message = SEPARATOR.join([_BEGIN, bounds.postgres_bound(remaining()).encode(), load])
        self.asked = message, parameters
        used.execute(message)
        rows = used.fetchall()
        self.xid, is_found = rows[0][:2]
        found = [row[2:] for row in rows] if is_found else []
        return Loaded(tuple([column.name for column in used.description[2:]]), found)

    def send(self, text: str, parameters: Any) -> Any:
        (self._cursor.executemany if isinstance(parameters, list) else self._cursor.execute)(text, parameters)
        return self._cursor

    def write(self, save: Save) -> None:
        message = SEPARATOR.join([*self.statements(save), b"COMMIT"])
        if self.driver.closed:
            raise NotSaved(f"{shown(self.key)} was not saved, nothing was written: the connection is closed")
        self.commit_is_sent()
        self._cursor.execute(message)
        if self._cursor.statusmessage != "COMMIT":
            raise NotSaved(f"{shown(self.key)} was not saved, nothing was written: the server has rolled back")

    def roll_back(self) -> None:
        if self.status() != TRANSACTION_STATUS_IDLE:
            self._cursor.execute("ROLLBACK")  # its `rollback` does nothing, since it does not know of our BEGIN


@lru_cache(maxsize=1000)
def _with_xid(load: str) -> str:
    """Return a SELECT of the transaction's id, of whether there is a row, and of the rows of *load*, if any."""
    return (
        f"SELECT * FROM (SELECT {bounds.XID}) AS begun LEFT JOIN "  # noqa: S608 - of the user's statement
        f"(SELECT true, loaded.* FROM ({load}\n) AS loaded) AS found ON true"
    )

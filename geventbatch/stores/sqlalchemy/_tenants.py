"""The option ``prepare_connection``: sets a tenant's schema, role or row policy on a batch's connection."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from sqlalchemy import Connection, Engine

    from geventbatch.stores.sqlalchemy._transaction import Transaction

_SET: Final = re.compile(
    r"\s*SET\s+(?:SESSION\s+(?!AUTHORIZATION\b|CHARACTERISTICS\b)|(?!SESSION\b|LOCAL\b|TRANSACTION\b|CONSTRAINTS\b))",
    re.IGNORECASE,
)


def prepare(connection: Connection, key: Hashable, hook: Callable[[Connection, Any], object]) -> None:
    """Call *hook* inside the transaction; on PostgreSQL, its settings end with it. Switches: as *hook* does."""
    event.listen(connection, "before_cursor_execute", _set_locally, retval=True)
    try:
        hook(connection, key)
    finally:
        event.remove(connection, "before_cursor_execute", _set_locally)


def prepared(
    begin: Callable[[Engine, Hashable], Transaction], hook: Callable[[Connection, Any], object] | None
) -> Callable[[Engine, Hashable], Transaction]:
    """Return *begin*, followed by a call of *hook*."""
    if hook is None:
        return begin

    def begin_prepared(engine: Engine, key: Hashable) -> Transaction:
        transaction = begin(engine, key)
        try:
            transaction.prepare = partial(prepare, transaction.connection, key, hook)
            transaction.prepare()
        except BaseException as error:
            transaction.end(error)
            raise
        return transaction

    return begin_prepared


def _set_locally(
    connection: Connection, _: object, statement: str, parameters: Any, __: object, ___: object
) -> tuple[str, Any]:
    if connection.dialect.name == "postgresql" and _SET.match(statement):
        statement = _SET.sub("SET LOCAL ", statement, count=1)
    return statement, parameters

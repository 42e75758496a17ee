"""Resources in a SQL database, through SQLAlchemy: documents of one table, or instances of the user's mapped classes."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import sqlalchemy as sa

from geventbatch.stores._documents import (
    Documents,
    DocumentScope,
    KeyText,
    Statements,
    StateText,
    create_table,
    documents_table,
)
from geventbatch.stores._key import normalize_all
from geventbatch.stores._transaction import Transaction, transaction_class

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from contextlib import AbstractContextManager

    from sqlalchemy.types import TypeEngine

__all__ = ["SQLAlchemyStore"]

Mode = Literal["lock", "version"]


class SQLAlchemyStore:
    def __init__(
        self,
        open_scope: Callable[[Hashable], AbstractContextManager[Any]],
        columns: list[tuple[str, type | None]],
        table: sa.Table,
        create: Callable[[], None],
        mode: Mode,
    ) -> None:
        self.table: Final = table
        self.mode: Final[Mode] = mode
        self._open_scope = open_scope
        self._columns = columns
        self._create = create

    @classmethod
    def documents(
        cls,
        engine: sa.Engine,
        table: str,
        *,
        encode: Callable[[Any], Any] = json.dumps,
        decode: Callable[[Any], Any] = json.loads,
        mode: Mode | None = None,
        missing: Any = "raise",
        metadata: sa.MetaData | None = None,
        schema: str | None = None,
        key_type: TypeEngine[Any] | None = None,
        state_type: TypeEngine[Any] | None = None,
        pipeline: bool = True,
    ) -> Self:
        chosen = _mode(engine, mode)
        shown = documents_table(
            table,
            sa.MetaData() if metadata is None else metadata,
            key_type or KeyText(),
            state_type or StateText(),
            schema,
        )
        transaction = transaction_class(engine, pipeline=pipeline)
        documents = Documents(
            engine,
            transaction,
            Statements(shown, engine.dialect.name, locking=chosen == "lock"),
            shown.fullname,
            encode,
            decode,
            missing,
        )
        return cls(
            partial(DocumentScope, documents),
            [_column(shown.c.key)],
            shown,
            partial(create_table, engine, shown),
            chosen,
        )

    def __call__(self, key: Hashable) -> AbstractContextManager[Any]:
        return self._open_scope(key)

    def normalize_key(self, key: Hashable) -> Hashable:
        return normalize_all(key, self._columns)

    def create_table(self) -> None:
        self._create()


def _mode(engine: sa.Engine, mode: Mode | None) -> Mode:
    has_locks = engine.dialect.name != "sqlite"
    if mode is None:
        return "lock" if has_locks else "version"
    return mode


def _column(column: sa.Column[Any]) -> tuple[str, type | None]:
    try:
        kind: type | None = column.type.python_type
    except NotImplementedError:
        kind = None
    return str(column), kind

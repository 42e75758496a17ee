"""The parts of a `SQLAlchemyStore`, as `documents` or `mapped` puts them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from contextlib import AbstractContextManager

    import sqlalchemy as sa

    from geventbatch.stores._reuse import Kept
    from geventbatch.stores._sql.outcomes import OutcomeTable
    from geventbatch.stores.sqlalchemy._bulk_documents import BulkDocuments
    from geventbatch.stores.sqlalchemy._mode import Mode

ResourceT = TypeVar("ResourceT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts(Generic[ResourceT]):
    """The parts of a store."""

    open_scope: Callable[[Any], AbstractContextManager[ResourceT]]
    engine: sa.Engine
    table: sa.Table
    columns: Sequence[sa.ColumnElement[Any]]
    """The columns of the key."""
    mode: Mode
    idempotency: sa.Table | None = None
    outcomes: OutcomeTable | None = None
    kept: Kept[Any] | None = None
    bulk: BulkDocuments | None = None
    tenant: Callable[[], Hashable] | None = None

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
    from geventbatch.stores.sqlalchemy._mapped_bulk import BulkMapped
    from geventbatch.stores.sqlalchemy._mode import Mode

ResourceT = TypeVar("ResourceT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts(Generic[ResourceT]):
    """The parts of a store."""

    open_scope: Callable[[Any], AbstractContextManager[ResourceT]]
    engine: sa.Engine
    table: sa.Table
    normalized: Callable[[Any], Hashable]
    """Returns the form of a key that its columns have."""
    mode: Mode
    tables: Sequence[sa.Table] = ()
    """All tables, if there are several."""
    idempotency: sa.Table | None = None
    outcomes: OutcomeTable | None = None
    kept: Kept[Any] | None = None
    bulk: BulkDocuments | BulkMapped | None = None
    tenant: Callable[[], Hashable] | None = None

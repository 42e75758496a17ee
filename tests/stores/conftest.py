from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.db.backends.utils import CursorWrapper

from geventbatch.stores._sql import bounds

if TYPE_CHECKING:
    from tests.support.mapped import Bed


@pytest.fixture
def bed(opened_bed: Bed) -> Bed:
    """The module's database, with nothing in its tables."""
    opened_bed.clear()
    return opened_bed


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that Django sends from now on."""
    statements: list[str] = []
    execute = CursorWrapper._execute  # type: ignore[attr-defined]

    def remember(self: Any, sql: Any, *args: Any) -> Any:
        statements.extend(bounds.without_prefix(one).removeprefix("WITH written AS (") for one in str(sql).split("; "))
        return execute(self, sql, *args)

    monkeypatch.setattr(CursorWrapper, "_execute", remember)
    return statements

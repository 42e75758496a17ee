"""Behind a pooler the next transaction is in another session: nothing that a batch leaves there may be needed later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from geventbatch import Processor, current_batch
from geventbatch.stores import SQLAlchemyStore
from tests.adapters.sqlalchemy import PLACES, Entry, Purse, fresh

if TYPE_CHECKING:
    from pathlib import Path


def add(purse: Purse) -> int:
    current_batch().add_row((Entry, {"text": f"{purse.name} {purse.total}"}))
    purse.total += 1
    return purse.total


def add_to_document(document: dict[str, int]) -> int:
    current_batch().add_row((Entry, {"text": f"document {document['n']}"}))
    document["n"] += 1
    return document["n"]


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("form", ["document", "mapped"])
def test_batches_prepare_no_statement_and_leave_the_drivers_setting_as_it_was(
    tmp_path: Path, mode: Any, pipeline: bool, form: str
) -> None:
    with fresh("postgresql", tmp_path) as address:
        engine = PLACES["postgresql"](address).engine(None, pool_size=1, max_overflow=0)
        options: Any = {"mode": mode, "pipeline": pipeline}
        if form == "document":
            store: Any = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {"n": 0}, **options)
        else:
            store = SQLAlchemyStore.mapped(
                engine, Purse, by="name", missing=lambda key: Purse(name=key, total=0), **options
            )
        operation: Any = add_to_document if form == "document" else add
        with Processor(open_resource=store, min_duration=0, max_duration=20) as processor:
            assert [processor.run("a", operation) for _ in range(8)] == list(range(1, 9))
        with engine.connect() as connection:
            assert connection.scalars(sa.text("SELECT statement FROM pg_prepared_statements")).all() == []
            driver: Any = connection.connection.driver_connection
            assert driver.prepare_threshold == 5
        engine.dispose()

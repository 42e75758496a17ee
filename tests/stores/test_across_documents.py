"""Documents that operations across keys connect, in columns of objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.stores.test_stores import all_of, spawned
from tests.support.adapters.base import TooLittle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("mode", ["version", None])
def test_what_an_operation_that_raised_has_changed_in_place_is_not_saved_with_what_it_was_connected_with(
    tmp_path: Path, mode: Any
) -> None:
    def refused(accounts: tuple[Any, ...]) -> None:
        accounts[1]["total"] = 1000
        raise TooLittle(0)

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'it.db'}")
    store = SQLAlchemyStore.documents(
        engine, "accounts", mode=mode, encode=lambda one: one, decode=lambda one: one, state_type=sa.JSON()
    )
    store.create_table()
    with engine.begin() as connection:
        states = [{"key": key, "state": {"total": 10}, "version": 1} for key in "abc"]
        connection.execute(sa.insert(store.table), states)
    with Processor(open_resources=store.open_resources, min_duration=0, max_batches=1) as processor:
        callers = [
            spawned(processor.run_across, [*"ab"], lambda accounts: accounts[0].update(total=9)),
            spawned(processor.run_across, [*"bc"], refused),
        ]
        assert isinstance(all_of(callers)[1], TooLittle)
    with engine.begin() as connection:
        found = connection.execute(sa.select(store.table.c.state).order_by(store.table.c.key)).scalars().all()
    assert found == [{"total": 9}, {"total": 10}, {"total": 10}]
    engine.dispose()

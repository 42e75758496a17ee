"""What a trigger leaves out of the save of documents is the error of the operation that it is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from sqlalchemy.pool import NullPool

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.adapters.sqlalchemy import PLACES, fresh
from tests.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import sqlalchemy as sa

FUNCTION = """
    CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.state LIKE '%%bad%%' THEN RETURN NULL; END IF; RETURN NEW; END $$
"""
TRIGGER = "CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE ON left_out FOR EACH ROW EXECUTE FUNCTION leave_out()"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    with fresh("postgresql", tmp_path) as address:
        engine = PLACES["postgresql"](address).engine(None, poolclass=NullPool)
        yield engine
        engine.dispose()


def store_of(engine: sa.Engine, **options: Any) -> SQLAlchemyStore[Any]:
    store = SQLAlchemyStore.documents(engine, "left_out", missing=lambda _: {"all": []}, **options)
    store.create_table()
    with engine.begin() as connection:
        for statement in (FUNCTION, TRIGGER):
            connection.exec_driver_sql(statement)
    return store


def put(document: dict[str, Any], what: str) -> int:
    document["all"].append(what)
    return len(document["all"])


def put_all(processor: Processor[Any], *runs: tuple[str, str]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, put, what) for key, what in runs]
    return [caller.get() for caller in callers]


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("bulk", [True, False])
def test_a_change_that_a_trigger_leaves_out_fails_its_own_operation_only(
    engine: sa.Engine, bulk: bool, pipeline: bool
) -> None:
    store = store_of(engine, pipeline=pipeline)
    how: Any = {"open_resources": store.open_resources} if bulk else {"open_resource": store}
    with Processor[Any](**how, min_duration=0.05, max_duration=20) as processor:
        assert put_all(processor, ("a", "1"), ("b", "1"), ("c", "1")) == [1, 1, 1]
        answers = put_all(processor, ("a", "2"), ("b", "bad"), ("b", "2"), ("c", "2"))
        assert (answers[0], answers[2], answers[3]) == (2, 2, 2)
        assert isinstance(answers[1], RuntimeError)
        assert "the database has left it out" in str(answers[1])
        assert [processor.run(key, lambda document: document["all"]) for key in "abc"] == [["1", "2"]] * 3

"""The rows of `Batch.add_row` on PostgreSQL: as many as neighbours of one table are go into one statement."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert

from geventbatch import Processor, current_batch
from geventbatch.stores import SQLAlchemyStore
from tests.support.callers import answer_of
from tests.support.servers import database

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

METADATA = sa.MetaData()

LINES = sa.Table(
    "lines",
    METADATA,
    sa.Column("id", sa.BigInteger, primary_key=True),
    sa.Column("text", sa.Text),
    sa.Column("amount", sa.Float),
    sa.Column("details", JSONB),
)

_TRIGGER = """
CREATE TABLE statements (number serial);
CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql
  AS 'BEGIN INSERT INTO statements DEFAULT VALUES; RETURN NULL; END';
CREATE TRIGGER counting AFTER INSERT ON lines FOR EACH STATEMENT EXECUTE FUNCTION count_it()
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    with database("postgresql", tmp_path) as url:
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
        store = SQLAlchemyStore.documents(engine, "documents", metadata=METADATA)
        store.create_table()
        METADATA.create_all(engine)
        with engine.begin() as connection:
            connection.exec_driver_sql(_TRIGGER)
        yield engine
        engine.dispose()


def saved(engine: sa.Engine, rows: list[Any]) -> tuple[list[Any], int]:
    """Add one row by each operation of a batch. Give what is in the table then, and the number of statements."""

    def add(document: list[int], number: int) -> None:
        document.append(number)
        current_batch().add_row(rows[number])

    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: [])
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        gevent.joinall([gevent.spawn(processor.run, "k", add, one) for one in range(len(rows))], raise_error=True)
    with engine.begin() as connection:
        columns = (LINES.c.text, LINES.c.amount, LINES.c.details)
        found = [tuple(row) for row in connection.execute(sa.select(*columns).order_by(LINES.c.id))]
        return found, connection.scalar(sa.text("SELECT count(*) FROM statements")) or 0


def test_rows_of_one_table_are_one_statement_in_their_order_whatever_they_hold(engine: sa.Engine) -> None:
    values = [
        ("plain", 1.5, {"a": 1}),
        ("it's (a) 100 %s; -- \\ \" ) VALUES (", -0.0, {"q'": ["(", "%(x)s"]}),
        (None, 0.1, None),
        ("", 1e300, {"é": "…"}),
    ]
    rows = [(LINES, dict(zip(("text", "amount", "details"), one, strict=True))) for one in values]
    found, statements = saved(engine, rows)
    assert found == values
    assert str(found[1][1]) == "-0.0"
    assert statements == 1


def test_rows_with_other_columns_between_them_are_statements_of_their_own(engine: sa.Engine) -> None:
    texts: list[Any] = [(LINES, {"text": text}) for text in "abde"]
    found, statements = saved(engine, [*texts[:2], (LINES, {"text": "c", "amount": 1.0}), *texts[2:]])
    assert [row[0] for row in found] == ["a", "b", "c", "d", "e"]
    assert statements == 3


def test_a_row_whose_column_is_gone_is_told_in_the_log_once_a_minute_and_a_broken_constraint_is_not(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLAlchemyStore.documents(engine, "documents", metadata=sa.MetaData(), missing=lambda _: {})

    def add(resource: dict[str, Any], **values: Any) -> None:
        current_batch().add_row((LINES, values))

    with Processor(open_resource=store, min_duration=0, max_duration=10, name="ledger") as processor:
        processor.run("k", partial(add, id=7))
        broken = answer_of(processor.run, "k", partial(add, id=7))
        assert isinstance(broken, sa.exc.IntegrityError)
        assert not hasattr(broken, "__notes__")
        gevent.sleep(0)
        assert caplog.records == []
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE lines RENAME COLUMN text TO said")
        callers = [gevent.spawn(answer_of, processor.run, "k", partial(add, text="a")) for _ in range(3)]
        gevent.joinall(callers)
        assert [type(caller.value) for caller in callers] == [sa.exc.ProgrammingError] * 3
        for caller in callers:
            (note,) = vars(caller.value)["__notes__"]
            assert note.startswith(
                "The store refused an operation on key 'k': nothing of it was saved. A column, a table"
            )
        gevent.sleep(0)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("ledger: batch of key 'k': the store refused an operation, which no constraint did: ")
    assert "UndefinedColumn" in told


def test_statements_that_are_given_as_rows_stay_what_they_are(engine: sa.Engine) -> None:
    statement = insert(LINES).values(id=7, text="once").on_conflict_do_nothing()
    found, statements = saved(engine, [statement, statement])
    assert [row[0] for row in found] == ["once"]
    assert statements == 2

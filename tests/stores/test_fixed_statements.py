"""Documents through psycopg: what is sent is compiled once, and SQLAlchemy executes only what somebody listens to."""

from __future__ import annotations

import json
import logging
from datetime import date
from decimal import Decimal
from itertools import count
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.adapt import Transformer
from sqlalchemy import event
from sqlalchemy.dialects.postgresql import JSONB

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores._sql.joined import named
from tests.support.adapters.sqlalchemy import PostgresPlace, fresh

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    with fresh("postgresql", tmp_path) as address:
        engine = PostgresPlace(address).engine(None)
        yield engine
        engine.dispose()


def processor(engine: sa.Engine, table: str = "fixed", **options: Any) -> Processor[Any]:
    store = SQLAlchemyStore.documents(engine, table, missing=lambda _: {"total": 0}, **options)
    store.create_table()
    return Processor(
        open_resource=store,
        min_duration=0,
        max_duration=20,
        max_attempts=1,
        worker_number_for_key=lambda key, workers: hash(key) % workers,
    )


def add(document: dict[str, Any]) -> int:
    document["total"] += 1
    return int(document["total"])


def put(document: dict[str, Any], text: str) -> str | None:
    before = document.get("text")
    document["text"] = text
    return before


STATES: dict[str, dict[str, Any]] = {
    "text": {},
    "JSON": {"state_type": sa.JSON()},
    "JSONB": {"state_type": JSONB()},
    "bytes": {
        "state_type": sa.LargeBinary(),
        "encode": lambda resource: json.dumps(resource).encode(),
        "decode": json.loads,
    },
}


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("state", STATES)
def test_sqlalchemy_executes_nothing_of_a_batch(
    engine: sa.Engine, mode: Any, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with processor(engine, mode=mode, **STATES[state]) as opened:
        monkeypatch.delattr(sa.Connection, "execute")
        assert [opened.run("k", add) for _ in range(3)] == [1, 2, 3]
        monkeypatch.undo()
        assert opened.run("k", add, read_only=True) == 4


TEXTS = ["%", "%%", "%s", "%(_key)s", "'", "\\", "\\'", "''", '"', "\n; --", "é", "日本", "🚂", "{}", "$1", ""]


@pytest.mark.parametrize("key_type", [None, sa.Text()])
def test_odd_texts_come_back_as_they_were_saved(engine: sa.Engine, key_type: Any) -> None:
    with processor(engine, **({} if key_type is None else {"key_type": key_type})) as opened:
        assert [opened.run(text, put, text) for text in TEXTS] == [None] * len(TEXTS)
        assert [opened.run(text, put, "") for text in TEXTS] == TEXTS


@pytest.mark.parametrize("key", [0.1, -0.0, 1e300])
def test_a_key_that_is_a_float_is_not_rounded(engine: sa.Engine, key: float) -> None:
    with processor(engine, key_type=sa.Double()) as opened:
        assert [opened.run(key, add) for _ in range(2)] == [1, 2]


QUERIES = {
    "UPDATE x SET a = %(a)s, b = '%%' WHERE c = %(b)s AND d = %(a)s": True,
    "SELECT '%%(a)s', '%%%%', %(a)s, '%%%%s'": True,
    "SELECT '%%'": True,
    "SELECT %%%(a)s%%": True,
    "SELECT %(a)t, %(b)s": False,
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(
    "values",
    [
        {"a": "it's %s", "b": None},
        {"a": b"\\", "b": True},
        {"a": [1, 2], "b": Decimal("-0.10")},
        {"a": date(2026, 1, 1), "b": UUID(int=1)},
    ],
    ids=str,
)
def test_values_are_put_into_a_statement_as_psycopg_does(engine: sa.Engine, query: str, values: dict[str, Any]) -> None:
    text = named(query)
    assert (text is not None) is QUERIES[query]
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        by_psycopg = psycopg.ClientCursor(driver).mogrify(query, values)
        assert text is None or text.of(values, Transformer(driver)) == by_psycopg


@pytest.mark.parametrize(
    "name",
    ["before_execute", "after_execute", "before_cursor_execute", "after_cursor_execute", "begin", "commit"],
)
def test_a_listener_that_is_added_later_is_called(engine: sa.Engine, name: str) -> None:
    called = []
    with processor(engine) as opened:
        opened.run("k", add)
        event.listen(engine, name, lambda *_: called.append(name))
        opened.run("k", add)
        assert called
        assert opened.run("k", add) == 3


def test_a_listener_beside_those_of_the_library_is_called(engine: sa.Engine) -> None:
    told: list[str] = []

    class Base(sa.orm.DeclarativeBase):
        pass

    class Row(Base):
        __tablename__ = "rows_beside"
        id: sa.orm.Mapped[int] = sa.orm.mapped_column(primary_key=True)

    SQLAlchemyStore.mapped(engine, Row)  # listens to the engine
    with processor(engine) as opened:
        opened.run("k", add)
        event.listen(engine, "before_cursor_execute", lambda *about: told.append(about[2]))
        opened.run("k", add)
    assert any("FOR UPDATE" in statement for statement in told)
    assert any(statement.startswith("UPDATE fixed") for statement in told)


def test_a_log_of_the_engine_has_every_statement(engine: sa.Engine, caplog: pytest.LogCaptureFixture) -> None:
    with processor(engine) as opened:
        opened.run("k", add)
        with caplog.at_level(logging.INFO, "sqlalchemy.engine.Engine"):
            opened.run("k", add)
    assert any("FOR UPDATE" in record.getMessage() for record in caplog.records)
    assert any("UPDATE fixed" in record.getMessage() for record in caplog.records)


def test_values_that_a_column_makes_in_python_are_made_for_each_save(engine: sa.Engine) -> None:
    made = count(1)
    metadata = sa.MetaData()
    sa.Table(
        "fixed",
        metadata,
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("saves", sa.Integer, default=lambda: next(made), onupdate=lambda: next(made)),
    )
    with processor(engine, metadata=metadata) as opened:
        for _ in range(3):
            opened.run("k", add)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT saves FROM fixed")).scalar_one() == 3


def test_a_message_that_does_not_fit_into_the_socket_arrives(engine: sa.Engine) -> None:
    large = "x" * 20_000_000
    with processor(engine) as opened:
        assert opened.run("k", put, large) is None
        assert opened.run("k", put, "") == large

"""A missing column, table or right in a store's own statement is no operation's fault: `SaveFailed`, and a log line."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import gevent
import psycopg
import pytest
import sqlalchemy as sa
from django.db import connections
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import Processor, SaveFailed, current_batch
from geventbatch.stores import SQLAlchemyStore, SQLStore
from geventbatch.stores._sql.errors import is_of_schema
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support import mariadb
from tests.support.callers import answer_of
from tests.support.django_accounts import account_in, deposit, processing
from tests.support.django_project.bank.models import Outcome
from tests.support.servers import database

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CALLERS = 20


class Base(DeclarativeBase): ...


class Show(Base):
    __tablename__ = "shows"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]


LOAD = "SELECT id, stock FROM shows WHERE id = %s FOR UPDATE"
SAVE = "UPDATE shows SET stock = %(stock)s WHERE id = %(key)s"


def sell(show: Any) -> None:
    show.stock -= 1


def put(document: dict[str, int]) -> None:
    document["stock"] = document.get("stock", 0) + 1


def sell_with_row(table: str, show: Any) -> None:
    show.stock -= 1
    current_batch().add_row((f"INSERT INTO {table} (id) VALUES (%(id)s)", {"id": show.stock}))  # noqa: S608 - a test's


@contextmanager
def shows(directory: Path) -> Iterator[sa.Engine]:
    with database("postgresql", directory) as url:
        engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
        Base.metadata.create_all(engine)
        SQLAlchemyStore.documents(engine, "documents").create_table()
        with engine.begin() as connection:
            connection.execute(sa.insert(Show).values(id=1, stock=1000))
            connection.exec_driver_sql("INSERT INTO documents (key, state, version) VALUES ('1', '{}', 1)")
        yield engine
        engine.dispose()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    with shows(tmp_path) as engine:
        yield engine


@pytest.fixture
def reader(engine: sa.Engine) -> Iterator[str]:
    """A role, which all databases of the server have."""
    name = f"reader_{uuid4().hex}"
    with connect(engine, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name}")
        yield name
        connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


def connect(engine: sa.Engine, **options: Any) -> psycopg.Connection:
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(url, **options)


def answers(store: Any, operation: Any, key: object = 1, **options: Any) -> list[Any]:
    with Processor(open_resource=store, min_duration=0.01, max_duration=30, name="shows") as processor:
        callers = [gevent.spawn(answer_of, partial(processor.run, key, operation, **options)) for _ in range(CALLERS)]
        return [caller.get() for caller in callers]


@pytest.mark.parametrize("form", ["SQLStore", "documents"])
def test_all_callers_of_a_batch_are_told_at_once_and_the_batch_is_not_halved(
    engine: sa.Engine, reader: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    with engine.begin() as connection:
        for statement in (
            f"GRANT SELECT ON shows, documents TO {reader}",
            f"GRANT UPDATE (key) ON documents TO {reader}",  # FOR UPDATE needs it
            f"GRANT UPDATE (id) ON shows TO {reader}",
        ):
            connection.exec_driver_sql(statement)
    as_reader = sa.create_engine(engine.url, connect_args={"options": f"-c role={reader}"})
    stores = {
        "SQLStore": SQLStore(lambda: connect(engine, options=f"-c role={reader}"), load=LOAD, save=SAVE),
        "documents": SQLAlchemyStore.documents(as_reader, "documents"),
    }
    with caplog.at_level(logging.WARNING, "geventbatch"):
        found = answers(stores[form], sell if form == "SQLStore" else put, 1)
        gevent.sleep(0)
    as_reader.dispose()
    assert [type(one) for one in found] == [SaveFailed] * CALLERS
    assert {one.retry_safe for one in found} == {True}
    assert "permission denied" in str(found[0])
    assert [(record.levelname, "callers answered with it: 20" in record.getMessage()) for record in caplog.records] == [
        ("ERROR", True)
    ]


def test_a_table_of_an_operations_own_row_concerns_that_operation_only_and_each_table_is_told(
    engine: sa.Engine, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLStore(lambda: connect(engine), load=LOAD, save=SAVE)
    with (
        caplog.at_level(logging.WARNING, "geventbatch"),
        Processor(open_resource=store, min_duration=0.01, max_duration=30, name="two tables") as processor,
    ):
        operations = [sell, partial(sell_with_row, "nowhere"), partial(sell_with_row, "elsewhere"), sell]
        callers = [gevent.spawn(answer_of, processor.run, 1, operation) for operation in operations]
        found = [caller.get() for caller in callers]
        gevent.sleep(0)
    assert found[::3] == [None, None]
    assert [type(one) for one in found[1:3]] == [psycopg.errors.UndefinedTable] * 2
    told = [record.getMessage() for record in caplog.records]
    assert [next(name for name in ("nowhere", "elsewhere") if name in line) for line in told] == [
        "nowhere",
        "elsewhere",
    ]
    with engine.connect() as connection:
        assert connection.scalar(sa.select(Show.stock)) == 998


@pytest.mark.parametrize("form", ["documents", "mapped", "SQLStore", "Django"])
def test_a_missing_table_of_outcomes_is_told_as_no_operations_fault(form: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        if form == "Django":
            alias = stack.enter_context(account_in("postgresql", tmp_path))
            with connections[alias].cursor() as cursor:
                cursor.execute(f"DROP TABLE {Outcome._meta.db_table}")
            processor: Any = stack.enter_context(processing(alias, idempotency=Outcome))
            failed = answer_of(partial(processor.run, "a", deposit, 1, idempotency_key="k"))
        else:
            engine = stack.enter_context(shows(tmp_path))
            table = idempotency_table("nowhere")
            stores: dict[str, Callable[[], Any]] = {
                "documents": lambda: SQLAlchemyStore.documents(engine, "documents", idempotency=table),
                "mapped": lambda: SQLAlchemyStore.mapped(engine, Show, idempotency=table),
                "SQLStore": lambda: SQLStore(lambda: connect(engine), load=LOAD, save=SAVE, idempotency="nowhere"),
            }
            processor = stack.enter_context(Processor(open_resource=stores[form](), min_duration=0))
            operation = put if form == "documents" else sell
            failed = answer_of(partial(processor.run, 1, operation, idempotency_key="k"))
    assert type(failed) is SaveFailed
    assert failed.retry_safe
    assert "does not exist" in str(failed)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT gone FROM shows", True),
        ("SELECT 1 FROM nowhere", True),
        ("SELECT 1 FROM nowhere.shows", True),
        ("SET ROLE {reader}; UPDATE shows SET stock = 1", True),
        ("SET ROLE {reader}; INSERT INTO own VALUES (2)", False),  # a policy refuses that row
        ("INSERT INTO shows VALUES (1, 1)", False),
        ("SELECT 1 / 0", False),
    ],
)
def test_what_is_of_the_schema_on_postgresql(engine: sa.Engine, reader: str, statement: str, expected: bool) -> None:
    with connect(engine, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE own (id int); ALTER TABLE own ENABLE ROW LEVEL SECURITY; CREATE POLICY one ON own "
            f"USING (id = 1); GRANT INSERT ON own TO {reader}; GRANT SELECT ON shows TO {reader}"
        )
        with pytest.raises(psycopg.Error) as raised:
            connection.execute(statement.format(reader=reader))
    assert is_of_schema(raised.value) is expected


@pytest.mark.parametrize("server", ["sqlite", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def test_what_is_of_the_schema_on_sqlite_and_mariadb(tmp_path: Path, server: str) -> None:
    url = sa.make_url(f"sqlite:///{tmp_path}/shows")
    if server == "mariadb":
        url = sa.make_url(mariadb.url()).set(drivername="mysql+pymysql")
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        if server == "mariadb":
            connection.exec_driver_sql("USE test")
        connection.exec_driver_sql("CREATE TEMPORARY TABLE shows (id int, stock int, CHECK (stock > 0))")
        for statement, expected in (
            ("SELECT gone FROM shows", True),
            ("INSERT INTO shows (gone) VALUES (1)", True),
            ("SELECT 1 FROM nowhere", True),
            ("INSERT INTO shows VALUES (1, -1)", False),
        ):
            with pytest.raises(sa.exc.DBAPIError) as raised:
                connection.exec_driver_sql(statement)
            assert is_of_schema(raised.value) is expected
    engine.dispose()

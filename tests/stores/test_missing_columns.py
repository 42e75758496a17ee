"""A missing column, table or right in a store's own statement is no operation's fault: `SaveFailed`, and a log line."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import gevent
import psycopg
import psycopg2  # type: ignore[import-untyped] # it has no types
import pymysql
import pytest
import sqlalchemy as sa
from django.db import connections
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import LoadFailed, Processor, SaveFailed, current_batch
from geventbatch.stores import SQLAlchemyStore, SQLStore
from geventbatch.stores._sql.driver_errors import lacks_something
from geventbatch.stores._sql.errors import chain, is_of_schema, state
from geventbatch.stores.sqlalchemy import _engines, idempotency_table
from tests.support import mariadb
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.django_accounts import account_in, deposit, processing
from tests.support.django_project.bank.models import Outcome
from tests.support.servers import database
from tests.support.sql_pools import psycopg2_waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CALLERS = 20


class Base(DeclarativeBase): ...


class Show(Base):
    __tablename__ = "shows"
    id: Mapped[int] = mapped_column(primary_key=True)
    stock: Mapped[int]


AUDIT = sa.Table("audit", Base.metadata, sa.Column("text", sa.String))
NOWHERE = sa.Table("nowhere", sa.MetaData(), sa.Column("text", sa.String))

LOAD = "SELECT id, stock FROM shows WHERE id = %s FOR UPDATE"
SAVE = "UPDATE shows SET stock = %(stock)s WHERE id = %(key)s"


def sell(show: Any) -> None:
    show.stock -= 1


def put(document: dict[str, int]) -> None:
    document["stock"] = document.get("stock", 0) + 1


def sell_with_row(table: str, show: Any) -> None:
    show.stock -= 1
    current_batch().add_row((f"INSERT INTO {table} (id) VALUES (%(id)s)", {"id": show.stock}))  # noqa: S608 - a test's


def sell_with_audit(show: Any) -> None:
    sell(show)
    current_batch().add_row(("INSERT INTO audit (text) VALUES (%(text)s)", {"text": "sold"}))


def put_with(table: sa.Table, document: dict[str, int]) -> None:
    put(document)
    current_batch().add_row((table, {"text": "put"}))


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


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with rows beside"])
@pytest.mark.parametrize("form", ["SQLStore", "documents"])
def test_all_callers_of_a_batch_are_told_at_once_and_the_batch_is_not_halved(
    engine: sa.Engine, reader: str, form: str, caplog: pytest.LogCaptureFixture, *, beside: bool
) -> None:
    with engine.begin() as connection:
        for statement in (
            f"GRANT SELECT ON shows, documents TO {reader}",
            f"GRANT UPDATE (key) ON documents TO {reader}",  # FOR UPDATE needs it
            f"GRANT UPDATE (id) ON shows TO {reader}",
            f"GRANT INSERT ON audit TO {reader}",
        ):
            connection.exec_driver_sql(statement)
    as_reader = sa.create_engine(engine.url, connect_args={"options": f"-c role={reader}"})
    stores = {
        "SQLStore": SQLStore(lambda: connect(engine, options=f"-c role={reader}"), load=LOAD, save=SAVE),
        "documents": SQLAlchemyStore.documents(as_reader, "documents"),
    }
    operations: dict[str, Any] = {"SQLStore": sell, "documents": put}
    if beside:
        operations = {"SQLStore": sell_with_audit, "documents": partial(put_with, AUDIT)}
    with caplog.at_level(logging.WARNING, "geventbatch"):
        found = answers(stores[form], operations[form], 1)
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


def test_a_missing_table_of_a_row_beside_a_document_is_the_error_of_who_adds_it(engine: sa.Engine) -> None:
    store = SQLAlchemyStore.documents(engine, "documents")
    with Processor(open_resource=store, min_duration=0.01, max_duration=30) as processor:
        operations = [put, partial(put_with, NOWHERE), partial(put_with, AUDIT)]
        callers = [gevent.spawn(answer_of, processor.run, 1, operation) for operation in operations]
        first, refused, last = [caller.get() for caller in callers]
        alone = answer_of(processor.run, 1, partial(put_with, NOWHERE))
    assert (first, last) == (None, None)
    assert [type(one) for one in (refused, alone)] == [sa.exc.ProgrammingError] * 2
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT state::json ->> 'stock' FROM documents").scalars().all() == ["2"]
        assert connection.scalars(sa.select(AUDIT.c.text)).all() == ["put"]


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


# -- in a trigger --------------------------------------------------------------------------------------------------

STATES = {"table": "42P01", "column": "42703", "right": "42501", "raised": "42P01"}
"""The SQLSTATE of what the trigger says, by the kind of a resource."""

KIND = "SELECT id, stock, kind FROM shows WHERE id {} FOR UPDATE"
SAVE_KIND = "UPDATE shows SET stock = %(stock)s, kind = %(kind)s WHERE id = %(key)s"

NOTES = """
    ALTER TABLE shows ADD kind text NOT NULL DEFAULT 'plain';
    INSERT INTO shows VALUES (2, 1000);
    ALTER TABLE documents ADD kind text GENERATED ALWAYS AS (state::jsonb ->> 'kind') STORED;
    CREATE TABLE notes (id int);
    CREATE FUNCTION note_as_another() RETURNS void LANGUAGE sql SECURITY DEFINER AS 'INSERT INTO notes VALUES (1)';
    ALTER FUNCTION note_as_another() OWNER TO pg_monitor;
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        CASE NEW.kind
            WHEN 'table' THEN INSERT INTO nowhere VALUES (1);
            WHEN 'column' THEN UPDATE notes SET gone = 1;
            WHEN 'right' THEN PERFORM note_as_another();
            WHEN 'raised' THEN RAISE EXCEPTION USING ERRCODE = 'undefined_table';
            ELSE NULL;
        END CASE;
        RETURN NULL;
    END $$;
    CREATE TRIGGER note AFTER UPDATE ON shows FOR EACH ROW EXECUTE FUNCTION note();
    CREATE TRIGGER note AFTER UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION note()
"""


def take_one(resource: Any) -> int:
    if isinstance(resource, dict):
        resource["stock"] = resource.get("stock", 1000) - 1
        return int(resource["stock"])
    resource.stock -= 1
    return int(resource.stock)


def be(resource: Any, kind: str) -> None:
    if isinstance(resource, dict):
        resource["kind"] = kind
    else:
        resource.kind = kind


def delete(_: object) -> None:
    current_batch().delete()


def together(processor: Processor[Any], *calls: tuple[Any, ...]) -> list[Any]:
    return [one.get() for one in [gevent.spawn(answer_of, processor.run, *call) for call in calls]]


def state_of(answer: Any) -> str | None:
    return next((found for one in chain(answer) if (found := state(one)) is not None), None)


@contextmanager
def over(form: str, engine: sa.Engine) -> Iterator[Processor[Any]]:
    """A processor of documents, or of rows, by a driver."""
    what, _, driver = form.partition(" by ")
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with ExitStack() as stack:
        if driver == "psycopg2":
            stack.enter_context(psycopg2_waits())
        if what == "documents":
            own = engine
            if driver == "pg8000":
                socket = f"{engine.url.query['host']}/.s.PGSQL.{engine.url.port or 5432}"
                bare = engine.url.difference_update_query(["host"]).set(host=None, port=None)
                own = sa.create_engine(bare.set(drivername="postgresql+pg8000"), connect_args={"unix_sock": socket})
            elif driver == "psycopg2":
                own = sa.create_engine(engine.url.set(drivername="postgresql+psycopg2"))
            stack.callback(own.dispose)
            stack.callback(_engines._known.pop, own, None)  # or check_setup() names its driver until it is collected
            store: Any = SQLAlchemyStore.documents(own, "documents")
        else:
            connects: Any = {"psycopg": psycopg.connect, "psycopg2": psycopg2.connect}[driver]
            many = KIND.format("= ANY(%(keys)s) ORDER BY id")
            store = SQLStore(partial(connects, url), load=KIND.format("= %(key)s"), save=SAVE_KIND, load_many=many)
        opens = {"open_resources": store.open_resources} if what == "rows in bulk" else {"open_resource": store}
        yield stack.enter_context(Processor(**opens, min_duration=0.05, max_duration=30, workers=1))


@pytest.mark.parametrize(
    "form",
    [
        *("rows by psycopg", "rows by psycopg2", "rows in bulk by psycopg"),
        *("documents by psycopg", "documents by psycopg2", "documents by pg8000"),
    ],
)
def test_what_a_trigger_lacks_is_the_error_of_whose_value_needs_it(engine: sa.Engine, form: str) -> None:
    with connect(engine, autocommit=True) as connection:
        connection.execute(NOTES)
    key = 2 if "bulk" in form else 1
    with over(form, engine) as processor:
        for number, (kind, expected) in enumerate(STATES.items()):
            first, refused, last = together(processor, (1, take_one), (key, be, kind), (1, take_one))
            assert (first, last) == (999 - 2 * number, 998 - 2 * number)
            assert (isinstance(refused, SaveFailed), state_of(refused)) == (False, expected)
            assert "may be missing" in refused.__notes__[0]


@pytest.mark.parametrize("form", ["SQLStore", "documents"])
def test_a_missing_right_to_delete_is_the_error_of_who_deletes(engine: sa.Engine, reader: str, form: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"GRANT SELECT, UPDATE ON shows, documents TO {reader}")
    as_reader = sa.create_engine(engine.url, connect_args={"options": f"-c role={reader}"})
    rows = partial(connect, engine, options=f"-c role={reader}")
    stores: dict[str, Any] = {
        "SQLStore": SQLStore(rows, load=LOAD, save=SAVE, delete="DELETE FROM shows WHERE id = %(key)s"),
        "documents": SQLAlchemyStore.documents(as_reader, "documents"),
    }
    with Processor(open_resource=stores[form], min_duration=0.05, max_duration=30) as processor:
        first, refused, last = together(processor, (1, take_one), (1, delete), (1, take_one))
    as_reader.dispose()
    assert (first, last) == (999, 998)
    assert (isinstance(refused, SaveFailed), state_of(refused)) == (False, "42501")


def test_a_missing_right_to_insert_fails_no_key_of_the_bulk_that_is_there(engine: sa.Engine, reader: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(f"GRANT SELECT, UPDATE ON shows TO {reader}")
    store: Any = SQLStore(
        partial(connect, engine, options=f"-c role={reader}"),
        load=LOAD,
        save=SAVE,
        load_many="SELECT id, stock FROM shows WHERE id = ANY(%(keys)s) ORDER BY id FOR UPDATE",
        missing=lambda key: {"id": key, "stock": 10},
        row=dict,
        insert="INSERT INTO shows (id, stock) VALUES (%(key)s, %(stock)s)",
    )
    with Processor(open_resources=store.open_resources, min_duration=0.05, max_duration=30) as processor:
        there, new = together(processor, (1, take_one), (3, take_one))
    assert there == 999
    assert (type(new), state_of(new.__cause__)) == (SaveFailed, "42501")


def test_what_a_function_lacks_for_one_row_fails_the_load_of_its_key_alone(engine: sa.Engine) -> None:
    with connect(engine, autocommit=True) as connection:
        connection.execute("""
            CREATE FUNCTION looked_up(id int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN
                IF id = 2 THEN RETURN (SELECT count(*) FROM nowhere); END IF;
                RETURN 1;
            END $$;
            INSERT INTO shows VALUES (2, 1000)
        """)
    many = "SELECT id, stock, looked_up(id) FROM shows WHERE id = ANY(%(keys)s) ORDER BY id FOR UPDATE"
    store: Any = SQLStore(partial(connect, engine), load=LOAD, save=SAVE, load_many=many)
    with Processor(open_resources=store.open_resources, min_duration=0.05, max_duration=30) as processor:
        fine, failed = together(processor, (1, take_one), (2, take_one))
    assert fine == 999
    assert (type(failed), state_of(failed.__cause__)) == (LoadFailed, "42P01")


@pytest.mark.parametrize(
    ("does", "fails"),
    [("INSERT INTO nowhere VALUES (1)", SaveFailed), ("SELECT RAISE(ABORT, 'no such table')", IntegrityError)],
)
def test_sqlite_compiles_a_trigger_with_the_statement_so_that_what_it_lacks_fails_any_value(
    tmp_path: Path, does: str, fails: type[Exception]
) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/shows")
    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {})
    store.create_table()
    with Processor(open_resource=store, min_duration=0.05, max_duration=30) as processor:
        processor.run("1", put)
        with engine.begin() as connection:
            trigger = f"CREATE TRIGGER note AFTER UPDATE ON documents WHEN NEW.state LIKE '%bad%' BEGIN {does}; END"
            connection.exec_driver_sql(trigger)
        batched = together(processor, ("1", put), ("1", be, "bad"))
        processor.batching = False
        alone = [answer_of(processor.run, "1", put), answer_of(processor.run, "1", be, "bad")]
    engine.dispose()
    plain = SaveFailed if fails is SaveFailed else type(None)
    assert [type(one) for one in batched] == [type(one) for one in alone] == [plain, fails]


IN_MARIADB = """
    CREATE TABLE notes (id int);
    CREATE TRIGGER note AFTER UPDATE ON shows FOR EACH ROW
        IF NEW.kind = 'table' THEN INSERT INTO nowhere VALUES (1);
        ELSEIF NEW.kind = 'column' THEN UPDATE notes SET gone = 1;
        ELSEIF NEW.kind = 'stock' THEN UPDATE notes SET stock = 1;
        END IF
"""


@pytest.mark.mariadb
def test_what_a_trigger_lacks_on_mariadb_is_told_by_its_name(tmp_path: Path) -> None:
    with fresh("mariadb", tmp_path) as address:
        place: Any = PLACES["mariadb"](address)
        user = {"user": place.url.username or "root", "password": place.url.password or ""}
        where = place.endpoint()
        at: Any = {"unix_socket": where} if isinstance(where, str) else dict(zip(("host", "port"), where, strict=True))
        connects = partial(pymysql.connect, database=place.database, **user, **at)
        lent = connects(autocommit=True)
        with lent.cursor() as cursor:
            cursor.execute("CREATE TABLE shows (id int PRIMARY KEY, stock int, kind varchar(20))")
            cursor.execute("INSERT INTO shows VALUES (1, 1000, 'plain')")
            for statement in IN_MARIADB.split(";\n", 1):
                cursor.execute(statement)
        lent.close()
        store: Any = SQLStore(connects, load=KIND.format("= %(key)s"), save=SAVE_KIND)
        with Processor(open_resource=store, min_duration=0.05, max_duration=30) as processor:
            for kind, stock in (("table", 999), ("column", 997)):
                first, refused, last = together(processor, (1, take_one), (1, be, kind), (1, take_one))
                assert (first, last) == (stock, stock - 1)
                assert isinstance(refused, pymysql.Error)
            all_fail = together(processor, (1, take_one), (1, be, "stock"))
    assert [type(one) for one in all_fail] == [SaveFailed] * 2


@pytest.mark.parametrize(
    ("code", "told", "expected"),
    [
        (1146, "Table 'test.shows' doesn't exist", True),
        (1146, "Table 'test.shows_notes' doesn't exist", False),
        (1146, "told by a SIGNAL", False),
        (1054, "Unknown column 'stock' in 'field list'", True),
        (1054, "Unknown column 'shows.kind' in 'where clause'", True),
        (1054, "Unknown column 'gone' in 'field list'", False),
        (1142, "UPDATE command denied to user 'app'@'localhost' for table `test`.`shows`", True),
        (1142, "INSERT command denied to user 'shows'@'localhost' for table 'notes'", False),
        (1143, "UPDATE command denied to user 'app'@'localhost' for column 'stock' in table 'shows'", True),
    ],
)
def test_what_is_missing_on_mysql_is_of_the_statement_if_that_has_its_name(
    code: int, told: str, expected: bool
) -> None:
    error = pymysql.ProgrammingError(code, told)
    assert is_of_schema(error, SAVE_KIND) is expected
    wrapped = sa.exc.DBAPIError.instance(SAVE_KIND, {}, error, pymysql.Error)
    assert is_of_schema(wrapped) is expected
    assert lacks_something(wrapped)

"""What SQLStore refuses of an operation's rows beside, changes and options, and what it advises."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gevent
import psycopg
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import psycopg2.extras  # type: ignore[import-untyped] # likewise
import psycopg2.pool  # type: ignore[import-untyped] # likewise
import pymysql
import pytest
from pymysql.constants.SERVER_STATUS import SERVER_STATUS_IN_TRANS

from geventbatch import LoadFailed, Processor, ResourceMissing, SaveFailed, current_batch
from geventbatch.errors import ImpossibleKey
from geventbatch.stores import SQLStore
from geventbatch.stores.sql._statements import inserts, is_several
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.servers import wait_until
from tests.support.sql_pools import database_with, pool_of, psycopg2_waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TABLES = """
    CREATE TABLE stock (id int PRIMARY KEY, wh text NOT NULL, qty int NOT NULL, extra jsonb NOT NULL DEFAULT '{}');
    CREATE TABLE log (text text, wh text);
    INSERT INTO stock VALUES (1, 'N', 100), (2, 'S', 100)
"""
LOAD = "SELECT id, wh, qty FROM stock WHERE id = %s FOR UPDATE"
SAVE = "UPDATE stock SET qty = %(qty)s WHERE id = %(key)s"
MANY = "SELECT {} FROM stock WHERE {} ORDER BY id FOR UPDATE"
INSERT = "INSERT INTO log (text) VALUES (%(text)s)"


@pytest.fixture
def database() -> Iterator[str]:
    """What libpq is told."""
    with database_with(TABLES) as told:
        yield told


@pytest.fixture(params=["psycopg", "psycopg2"])
def pool(request: pytest.FixtureRequest, database: str) -> Iterator[Any]:
    with pool_of(request.param, database) as pool:
        yield pool


@contextmanager
def processor(pool: Any, **options: Any) -> Iterator[Processor[Any]]:
    store: Any = SQLStore(pool, **{"load": LOAD, "save": SAVE, **options})
    with Processor(open_resource=store, min_duration=0, max_duration=10) as made:
        yield made


def asked(database: str, query: str) -> Any:
    with psycopg.connect(database) as connection:
        return connection.execute(query.encode()).fetchall()


def sell(row: Any) -> int:
    row.qty -= 1
    return int(row.qty)


# -- rows beside ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("INSERT INTO log (text) VALUES ('a')", True),
        ("  /* of the day */ insert into log values ('a') on conflict (text) do update set text = 'b'", True),
        ("WITH a AS (SELECT wh FROM stock WHERE id = 1) INSERT INTO log (wh) SELECT wh FROM a", True),
        ("WITH a (b) AS (SELECT 'x, insert into y'), c AS (SELECT 1) INSERT INTO log (wh) SELECT b FROM a", True),
        ("UPDATE log SET text = 'b'", False),
        ("DELETE FROM log", False),
        ("REPLACE INTO log VALUES ('a')", False),
        ("SELECT 1", False),
        ("WITH a AS (UPDATE stock SET qty = 0 RETURNING wh) INSERT INTO log (wh) SELECT wh FROM a", False),
        ("WITH a AS (SELECT 1) UPDATE log SET text = 'INSERT INTO'", False),
        ("WITH a AS (INSERT INTO log VALUES ('a') RETURNING text) DELETE FROM log", False),
    ],
)
def test_a_statement_inserts_if_that_is_all_it_does(text: str, *, is_one: bool) -> None:
    assert inserts(text) is is_one


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE log SET text = %(text)s WHERE text = 'nobody'",
        "UPDATE stock SET qty = qty - 10 WHERE id = 1 AND wh <> %(text)s",
        "DELETE FROM stock WHERE wh = %(text)s",
    ],
)
def test_a_row_beside_that_is_no_insert_is_its_operations_error(pool: Any, database: str, statement: str) -> None:
    def add(row: Any) -> int:
        current_batch().add_row((statement, {"text": "x"}))
        return sell(row)

    with processor(pool) as stock:
        error = answer_of(stock.run, 1, add)
        assert isinstance(error, ValueError)
        assert f"add_row() was given {statement!r}, but takes an INSERT only" in str(error)
        assert stock.run(1, sell) == 99
    assert asked(database, "SELECT qty FROM stock ORDER BY id") == [(99,), (100,)]


@pytest.mark.parametrize("more", ["DELETE FROM stock", "UPDATE stock SET qty = 0", INSERT])
def test_a_row_beside_that_is_several_statements_is_its_operations_error(pool: Any, database: str, more: str) -> None:
    def add(row: Any) -> int:
        current_batch().add_row((f"{INSERT}; {more}", {"text": "x"}))
        return sell(row)

    with processor(pool) as stock:
        error = answer_of(stock.run, 1, add)
        assert isinstance(error, ValueError)
        assert "which are several statements, but must be one: add each row by itself" in str(error)
        assert stock.run(1, sell) == 99
    assert asked(database, "SELECT qty FROM stock ORDER BY id") == [(99,), (100,)]
    assert asked(database, "SELECT text FROM log") == []


@pytest.mark.parametrize(
    ("text", "mysql", "expected"),
    [
        (f"{INSERT}; DELETE FROM log", False, True),  # noqa: S608 - a test's
        (f"{INSERT}/* ; */;;DELETE FROM log", False, True),  # noqa: S608 - a test's
        (f"{INSERT} ; -- ; of the day", False, False),
        ("INSERT INTO log (text) VALUES ('a; b'), ($$;$$), (E'\\';')", False, False),
        (r"INSERT INTO log (text) VALUES ('\';')", True, False),
        (r"INSERT INTO log (text) VALUES ('\'); DELETE FROM log -- '", False, True),
        ("INSERT INTO log (text) VALUES (1) # ; of the day", True, False),
    ],
)
def test_a_semicolon_in_a_literal_or_a_comment_or_at_the_end_begins_no_other_statement(
    text: str, *, mysql: bool, expected: bool
) -> None:
    assert is_several(text, mysql=mysql) is expected


def test_a_row_beside_may_end_in_a_semicolon_and_skip_or_count_up_a_row_that_is_there(pool: Any, database: str) -> None:
    def add(row: Any, *texts: str) -> int:
        for text in texts:
            current_batch().add_row((text, {"text": "a;b"}))
        return sell(row)

    with psycopg.connect(database) as connection:
        connection.execute("CREATE UNIQUE INDEX ON log (text)")
    with processor(pool) as stock:
        stock.run(1, add, f"{INSERT} ; -- the first;", f"{INSERT} ON CONFLICT DO NOTHING")
        stock.run(1, add, f"{INSERT} ON CONFLICT (text) DO UPDATE SET wh = 'again'")
    assert asked(database, "SELECT text, wh FROM log") == [("a;b", "again")]


def test_a_row_beside_without_one_of_its_parameters_names_its_statement(pool: Any, database: str) -> None:
    def add(row: Any, *parameters: Any) -> int:
        for each in parameters:
            current_batch().add_row(("INSERT INTO log (text, wh) VALUES (%(text)s, %(wh)s)", each))
        return sell(row)

    with processor(pool) as stock:
        for wrong in ([{"text": "a"}], [{"text": "a", "wh": "N"}, {"text": "b"}], [["a"]]):
            error = answer_of(stock.run, 1, add, *wrong)
            assert isinstance(error, ValueError)
            assert "add_row() was given 'INSERT INTO log (text, wh)" in str(error)
            assert "do not fit it" in str(error)
    assert asked(database, "SELECT count(*) FROM log") == [(0,)]


# -- the store's own statements ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one key", "with idempotency keys", "across"])
def test_a_misspelt_column_of_save_fails_the_batch_though_every_operation_adds_a_row(
    pool: Any, database: str, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    def add(found: Any) -> None:
        for row in found if form == "across" else [found]:
            sell(row)
            current_batch().add_row((INSERT, {"text": str(row.id)}))

    options: dict[str, Any] = {"save": SAVE.replace("SET qty", "SET qyt")}
    if form == "with idempotency keys":
        options["idempotency"] = "outcomes"
        SQLStore(pool, load=LOAD, save=SAVE, idempotency="outcomes").create_outcomes()
    with processor(pool, load_many=MANY.format("id, wh, qty", "id = ANY(%(keys)s)"), **options) as stock:
        metrics = stock.subscribe_batch_metrics()
        run: Any = partial(stock.run_across, [1, 2]) if form == "across" else partial(stock.run, 1)
        names = [{"idempotency_key": one} if form == "with idempotency keys" else {} for one in "abc"]
        callers = [gevent.spawn(answer_of, partial(run, add, **name)) for name in names]
        found = [caller.get() for caller in callers]
    assert [(type(one), one.retry_safe, "qyt" in str(one)) for one in found] == [(SaveFailed, True, True)] * 3
    assert {type(one.error) for one in metrics} == {SaveFailed}
    wait_until(lambda: any(record.levelno >= logging.ERROR for record in caplog.records))
    assert asked(database, "SELECT sum(qty) FROM stock") == [(200,)]
    assert asked(database, "SELECT count(*) FROM log") == [(0,)]


@pytest.mark.parametrize("idempotency_key", [None, "a"])
def test_a_misspelt_column_of_a_row_beside_is_the_error_of_who_adds_it(
    pool: Any, database: str, idempotency_key: str | None
) -> None:
    def add(row: Any, text: str) -> int:
        current_batch().add_row((text, {"text": "x"}))
        return sell(row)

    SQLStore(pool, load=LOAD, save=SAVE, idempotency="outcomes").create_outcomes()
    with processor(pool, idempotency="outcomes") as stock:
        wrong = partial(stock.run, 1, add, INSERT.replace("log (text", "log (txet"), idempotency_key=idempotency_key)
        calls = [partial(stock.run, 1, add, INSERT), wrong, partial(stock.run, 1, sell)]
        first, error, last = [one.get() for one in [gevent.spawn(answer_of, call) for call in calls]]
        alone = answer_of(wrong)
    assert (first, last) == (99, 98)
    for one in (error, alone):
        assert isinstance(one, (psycopg.Error, psycopg2.Error))
        assert "txet" in str(one)
    assert asked(database, "SELECT text FROM log") == [("x",)]


def test_a_parameter_of_save_that_no_column_has_is_named_with_those_that_there_are(pool: Any) -> None:
    save = SAVE.replace("%(qty)s", "%(qyt)s")
    with processor(pool, save=save) as stock:
        error = answer_of(stock.run, 1, sell)
    assert isinstance(error, LoadFailed)
    told = "save has the parameter %(qyt)s, but load selects no qyt: it selects id, wh, qty"
    assert str(error.__cause__) == told
    for row, operation in ((dict, lambda row: row.update(qty=1)), (SimpleNamespace, sell)):
        with processor(pool, save=save, row=row) as stock:
            error = answer_of(stock.run, 1, operation)
        assert isinstance(error, ValueError)
        assert f"save has the parameter %(qyt)s, but the {row.__name__} has no qyt: it has id, wh, qty" in str(error)


# -- load_many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["wh, id, qty", "qty + id AS qty, id"])
def test_a_load_of_many_rows_whose_first_column_is_no_key_fails_and_is_logged(
    pool: Any, caplog: pytest.LogCaptureFixture, columns: str
) -> None:
    with processor(pool, load_many=MANY.format(columns, "id = ANY(%(keys)s)")) as stock:
        error = answer_of(stock.run_across, [1, 2], len)
    assert isinstance(error, LoadFailed)
    assert not isinstance(error, ResourceMissing)
    assert "in its first column, which has to be the key, as 1" in str(error.__cause__)
    wait_until(lambda: any(record.levelno >= logging.ERROR for record in caplog.records))


def test_of_texts_another_column_than_the_keys_is_told_apart_from_a_key_that_is_written_otherwise(pool: Any) -> None:
    options: dict[str, Any] = {"key": str, "load": LOAD.replace("id =", "wh =")}
    options["save"] = SAVE.replace("id =", "wh =")
    wrong = MANY.format("'shelf ' || id AS shelf, wh, qty", "wh = ANY(%(keys)s)")
    with processor(pool, load_many=wrong, **options) as stock:
        error = answer_of(stock.run_across, ["N", "S"], len)
    assert "in its first column, which has to be the key, as 'N'" in str(error.__cause__)
    other = MANY.format("lower(wh) AS wh, qty", "wh = ANY(%(keys)s)")
    with processor(pool, load_many=other, **options) as stock:
        error = answer_of(stock.run_across, ["N", "S"], len)
    assert isinstance(error.__cause__, ImpossibleKey)


def test_a_load_of_many_rows_in_no_order_is_refused_when_the_store_is_made() -> None:
    with pytest.raises(ValueError, match="deadlock; write ORDER BY, with the column of the key, before FOR UPDATE"):
        SQLStore(lambda: None, load=LOAD, save=SAVE, load_many="SELECT id FROM stock WHERE id = ANY(%s) FOR UPDATE")


def test_a_key_of_several_columns_is_told_what_operations_on_several_keys_need() -> None:
    options: dict[str, Any] = {
        "load": "SELECT qty FROM stock WHERE wh = %(wh)s AND sku = %(sku)s FOR UPDATE",
        "save": "UPDATE stock SET qty = %(qty)s WHERE wh = %(wh)s AND sku = %(sku)s",
        "key": {"wh": str, "sku": int},
    }
    told = "give the table a column that is the key by itself"
    with pytest.raises(ValueError, match=told):
        SQLStore(lambda: None, **options, load_many="SELECT qty FROM stock WHERE (wh, sku) IN %(keys)s FOR UPDATE")
    with processor(lambda: None, **options) as stock:
        error = answer_of(stock.run_across, [("N", 1), ("S", 1)], len)
    assert isinstance(error, TypeError)
    assert told in str(error)


# -- what has changed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row.update(wh="W"), "save does not write it: add wh = %(wh)s to save"),
        (lambda row: row.update(colour="red"), "save does not write it: load selects no column of this name"),
        (lambda row: row.update(id=3), "id was changed, which is a part of the key: a row keeps its key"),
    ],
)
def test_a_change_that_is_not_saved_is_told_what_mends_it(
    pool: Any, change: Callable[[Any], object], told: str
) -> None:
    with processor(pool, row=dict) as stock:
        error = answer_of(stock.run, 1, change)
    assert told in str(error)


def test_a_column_of_json_is_written_through_psycopg2_by_an_adapter_of_dicts(database: str) -> None:
    def mark(row: Any) -> None:
        row.extra["seen"] = 1

    key = dict, psycopg2.extensions.ISQLQuote
    assert key not in psycopg2.extensions.adapters
    psycopg2.extensions.register_adapter(dict, psycopg2.extras.Json)
    try:
        with (
            psycopg2_waits(),
            processor(
                lambda: psycopg2.connect(database),
                load="SELECT extra FROM stock WHERE id = %s FOR UPDATE",
                save="UPDATE stock SET extra = %(extra)s WHERE id = %(key)s",
            ) as stock,
        ):
            stock.run(1, mark)
    finally:
        del psycopg2.extensions.adapters[key]
    assert asked(database, "SELECT extra FROM stock WHERE id = 1") == [({"seen": 1},)]


# -- connections ---------------------------------------------------------------------------------------------------


def test_a_function_that_returns_no_connection_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    def connect() -> None:
        """Forget to return it."""

    with processor(connect) as stock:
        error = answer_of(stock.run, 1, sell)
    assert isinstance(error.__cause__, TypeError)
    assert "connect" in str(error.__cause__)
    assert "returned None, but has to return a connection" in str(error.__cause__)
    wait_until(lambda: "returned None" in caplog.text)
    assert "has no attribute" not in caplog.text


def test_a_connection_of_pymysqls_that_is_in_a_transaction_is_refused() -> None:
    shared = pymysql.connect(defer_connect=True)
    shared.server_status = SERVER_STATUS_IN_TRANS
    with processor(lambda: shared) as stock:
        error = answer_of(stock.run, 1, sell)
    assert isinstance(error, LoadFailed)
    assert "returned a connection that is in a transaction" in str(error.__cause__)


@pytest.mark.mariadb
def test_work_that_is_open_on_a_connection_of_pymysqls_is_not_committed(tmp_path: Path) -> None:
    with stock_in_mariadb(tmp_path) as connect:
        shared, other = connect(), connect()
        cursor = other.cursor()
        shared.cursor().execute("UPDATE stock SET qty = 5 WHERE id = 2")
        with processor(lambda: shared) as stock:
            error = answer_of(stock.run, 1, sell)
            assert isinstance(error, LoadFailed)
            assert "returned a connection that is in a transaction" in str(error.__cause__)
            cursor.execute("SELECT qty FROM stock WHERE id = 2")
            assert cursor.fetchall() == ((100,),)
            shared.rollback()
            assert stock.run(1, sell) == 99
        other.close()


# -- the table of outcomes -----------------------------------------------------------------------------------------


@pytest.mark.mariadb
def test_a_table_of_outcomes_that_takes_two_ids_for_one_is_told_what_it_needs(tmp_path: Path) -> None:
    ddl = """
        CREATE TABLE stock (id int PRIMARY KEY, wh varchar(50) NOT NULL, qty int NOT NULL);
        INSERT INTO stock VALUES (1, 'N', 100);
        CREATE TABLE results (id varchar(300) PRIMARY KEY, outcome longtext NOT NULL, expires bigint NOT NULL)
    """
    with fresh("mariadb", tmp_path) as address:
        connect = connector(address)
        connection = connect()
        for statement in ddl.split(";"):
            connection.cursor().execute(statement)
        connection.commit()
        connection.close()
        with processor(connect, idempotency="results") as stock:
            assert stock.run(1, sell, idempotency_key="abc") == 99
            error = answer_of(stock.run, 1, sell, idempotency_key="Abc")
            assert stock.run(1, lambda row: row.qty) == 99
    assert "The column id of results has to be compared byte by byte" in str(error.__cause__)


@pytest.mark.mariadb
def test_a_row_beside_without_one_of_its_parameters_names_its_statement_on_mariadb(tmp_path: Path) -> None:
    def add(row: Any) -> int:
        current_batch().add_row(("INSERT INTO log (text, wh) VALUES (%(text)s, %(wh)s)", {"text": "a"}))
        return sell(row)

    with fresh("mariadb", tmp_path) as address:
        connect = connector(address)
        connection = connect()
        connection.cursor().execute("CREATE TABLE stock (id int PRIMARY KEY, wh varchar(50), qty int NOT NULL)")
        connection.cursor().execute("INSERT INTO stock VALUES (1, 'N', 100)")
        connection.commit()
        connection.close()
        with processor(connect) as stock:
            error = answer_of(stock.run, 1, add)
            assert stock.run(1, sell) == 99
    assert "add_row() was given 'INSERT INTO log (text, wh)" in str(error)
    assert "do not fit it: KeyError: 'wh'" in str(error)


@pytest.mark.mariadb
def test_a_misspelt_column_of_save_fails_the_batch_though_every_operation_adds_a_row_on_mariadb(tmp_path: Path) -> None:
    def add(row: Any, text: str) -> int:
        current_batch().add_row((text, {"text": "x"}))
        return sell(row)

    with stock_in_mariadb(tmp_path) as connect:
        with processor(connect, save=SAVE.replace("SET qty", "SET qyt")) as stock:
            failed = [answer_of(stock.run, 1, add, INSERT)]
        with processor(connect, save=f"{SAVE} OR id > %(key)s") as stock:
            failed.append(answer_of(stock.run, 1, sell))
        with processor(connect) as stock:
            wrong = INSERT.replace("log (text", "log (txet")
            calls = [partial(stock.run, 1, add, text) for text in (INSERT, wrong, INSERT)]
            first, error, last = [one.get() for one in [gevent.spawn(answer_of, call) for call in calls]]
            several = answer_of(stock.run, 1, add, f"{INSERT}; {INSERT}")
    assert [(type(one), one.retry_safe) for one in failed] == [(SaveFailed, True)] * 2
    assert "save has found 2 rows" in str(failed[1])
    assert (first, last) == (99, 98)
    assert isinstance(error, pymysql.Error)
    assert "which are several statements" in str(several)


@contextmanager
def stock_in_mariadb(directory: Path) -> Iterator[Callable[[], Any]]:
    """What connects to a database with the tables."""
    with fresh("mariadb", directory) as address:
        connect = connector(address)
        connection = connect()
        for statement in (
            "CREATE TABLE stock (id int PRIMARY KEY, wh varchar(50), qty int NOT NULL)",
            "CREATE TABLE log (text varchar(50))",
            "INSERT INTO stock VALUES (1, 'N', 100), (2, 'S', 100)",
        ):
            connection.cursor().execute(statement)
        connection.commit()
        connection.close()
        yield connect


def connector(address: str) -> Callable[[], Any]:
    """What connects to MariaDB at the *address* of a test's database."""
    place: Any = PLACES["mariadb"](address)
    where = place.endpoint()
    at = {"unix_socket": where} if isinstance(where, str) else dict(zip(("host", "port"), where, strict=True))
    user = {"user": place.url.username or "root", "password": place.url.password or ""}
    return lambda: pymysql.connect(database=place.database, charset="utf8mb4", **user, **at)

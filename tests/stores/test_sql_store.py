"""SQLStore by itself: the forms of a row, what it refuses, and connections as applications have them.

What it has in common with all stores is in test_stores, test_bulk_stores and test_stores_across.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gevent
import psycopg
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import psycopg2.extras  # type: ignore[import-untyped] # likewise
import psycopg2.pool  # type: ignore[import-untyped] # likewise
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from geventbatch import LoadFailed, Processor, SaveFailed, check_setup, current_batch
from geventbatch.stores import SQLStore
from tests.support.callers import answer_of
from tests.support.proxy import Proxy
from tests.support.psycopg_bench import without_tls
from tests.support.sql_pools import database_with, psycopg2_waits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing._proxy import Endpoint

ROOT = Path(__file__).parents[2]

TABLES = """
    CREATE TABLE shows (id int PRIMARY KEY, title text NOT NULL UNIQUE, stock int NOT NULL CHECK (stock >= 0),
        extra jsonb NOT NULL DEFAULT '{"seats": []}');
    CREATE TABLE seats (train text, number int, passenger text, PRIMARY KEY (train, number));
    CREATE TABLE log (id serial, text text UNIQUE);
    INSERT INTO shows VALUES (1, 'Faust', 10), (2, 'Aida', 10);
    INSERT INTO seats VALUES ('ICE 1', 7, NULL)
"""

LOAD = "SELECT id, title, stock FROM shows WHERE id = %(key)s FOR UPDATE"
SAVE = "UPDATE shows SET stock = %(stock)s WHERE id = %(key)s"
MANY = "SELECT id, title, stock FROM shows WHERE id = ANY(%(keys)s) ORDER BY id FOR UPDATE"
NEW = "INSERT INTO shows (id, title, stock) VALUES (%(key)s, %(title)s, %(stock)s)"
LOG = "INSERT INTO log (text) VALUES (%s)"


@dataclass
class Show:
    id: int
    title: str
    stock: int
    note: str = ""
    _seen: list[int] = field(default_factory=list)


@pytest.fixture
def database() -> Iterator[str]:
    """What libpq is told."""
    with database_with(TABLES) as told:
        yield told


@pytest.fixture
def pool(database: str) -> Iterator[ConnectionPool]:
    with ConnectionPool(database, min_size=0, max_size=4, open=True) as pool:
        yield pool


@pytest.fixture
def _psycopg2_waits() -> Iterator[None]:
    with psycopg2_waits():
        yield


@pytest.fixture
def pool2(database: str, _psycopg2_waits: None) -> Iterator[Any]:
    pool = psycopg2.pool.ThreadedConnectionPool(2, 2, database)
    yield pool
    pool.closeall()


@contextmanager
def processor(pool: Any, **options: Any) -> Iterator[Processor[Any]]:
    store: Any = SQLStore(pool, **{"load": LOAD, "save": SAVE, **options})
    with Processor(open_resource=store, min_duration=0, max_duration=10, workers=2) as made:
        yield made


def spawned(*call: Any) -> Any:
    return gevent.spawn(answer_of, *call)


def asked(database: str, query: str = "SELECT stock FROM shows WHERE id = 1") -> Any:
    with psycopg.connect(database) as connection:
        return connection.execute(query).fetchall()


def sell(show: Any, count: int = 1) -> int:
    show.stock -= count
    return int(show.stock)


# -- the form of a row ---------------------------------------------------------------------------------------------


def test_a_row_has_its_columns_as_attributes_and_no_others(pool: ConnectionPool, database: str) -> None:
    def misspell(show: Any) -> None:
        show.stok = 3

    with processor(pool) as shows:
        assert shows.run(1, sell) == 9
        assert shows.run(1, repr) == "Row(id=1, title='Faust', stock=9)"
        assert isinstance(answer_of(shows.run, 1, misspell), AttributeError)
    assert asked(database) == [(9,)]


def test_a_row_may_be_a_dict(pool: ConnectionPool, database: str) -> None:
    def sell_one(show: dict[str, Any]) -> dict[str, Any]:
        show["stock"] -= 1
        return show

    with processor(pool, row=dict) as shows:
        assert shows.run(1, sell_one) == {"id": 1, "title": "Faust", "stock": 9}
    assert asked(database) == [(9,)]


def test_a_row_may_be_of_a_class(pool: ConnectionPool, database: str) -> None:
    def look(show: Show) -> tuple[type, str]:
        show._seen.append(1)  # its own affair
        return type(show), show.title

    with processor(pool, row=Show) as shows:
        assert shows.run(1, look) == (Show, "Faust")
        assert shows.run(1, sell) == 9
    assert asked(database) == [(9,)]


@pytest.mark.parametrize(
    ("row", "change", "told"),
    [
        (None, lambda show: setattr(show, "title", "Tosca"), "title was changed, but save does not write it"),
        (Show, lambda show: setattr(show, "note", "sold out"), "note was changed, but save does not write it"),
        (SimpleNamespace, lambda show: setattr(show, "stok", 3), "stok was changed, but save does not write it"),
        (SimpleNamespace, lambda show: delattr(show, "stock"), "has lost"),
        (dict, lambda show: show.update(stok=3), "stok was changed, but save does not write it"),
        (dict, lambda show: show.clear(), "has lost 'id'"),
    ],
)
def test_a_change_that_save_does_not_write_is_the_error_of_its_operation_and_of_no_other(
    pool: ConnectionPool, database: str, row: Any, change: Callable[[Any], object], told: str
) -> None:
    def add(show: Any) -> None:
        if row is dict:
            show["stock"] += 1
        else:
            show.stock += 1

    with processor(pool, row=row) as shows:
        callers = [spawned(shows.run, 1, one) for one in (add, change, add)]
        first, error, last = [caller.get() for caller in callers]
    assert (first, last) == (None, None)
    assert isinstance(error, ValueError)
    assert told in str(error)
    assert asked(database) == [(12,)]


def test_a_row_that_was_not_changed_is_not_written(pool: ConnectionPool, database: str) -> None:
    before = asked(database, "SELECT xmin::text FROM shows WHERE id = 1")

    def there_and_back(show: Any) -> None:
        show.stock += 1
        show.stock -= 1

    with processor(pool) as shows:
        shows.run(1, there_and_back)
    assert asked(database, "SELECT xmin::text FROM shows WHERE id = 1") == before


def test_a_value_that_was_changed_in_place_is_written_and_undone(database: str) -> None:
    def take(show: Any, seat: int) -> list[int]:
        show.extra["seats"].append(seat)
        if seat > 9:
            raise LookupError(seat)
        return list(show.extra["seats"])

    with (
        ConnectionPool(database, min_size=0, max_size=2, open=True, configure=adapt_dicts) as pool,
        processor(
            pool,
            load="SELECT extra FROM shows WHERE id = %s FOR UPDATE",
            save="UPDATE shows SET extra = %(extra)s WHERE id = %(key)s",
        ) as shows,
    ):
        callers = [spawned(shows.run, 1, take, seat) for seat in (3, 10, 4)]
        first, error, last = [caller.get() for caller in callers]
    assert (first, last) == ([3], [3, 4])
    assert isinstance(error, LookupError)
    assert asked(database, "SELECT extra FROM shows WHERE id = 1") == [({"seats": [3, 4]},)]


def adapt_dicts(connection: psycopg.Connection) -> None:
    connection.adapters.register_dumper(dict, psycopg.types.json.JsonbDumper)


# -- keys and statements -------------------------------------------------------------------------------------------


def test_a_key_may_have_several_columns(pool: ConnectionPool, database: str) -> None:
    def take(seat: Any, passenger: str) -> None:
        seat.passenger = passenger

    with processor(
        pool,
        load="SELECT passenger FROM seats WHERE train = %(train)s AND number = %(number)s FOR UPDATE;",
        save="UPDATE seats SET passenger = %(passenger)s WHERE train = %(train)s AND number = %(number)s",
        key={"train": str, "number": int},
    ) as seats:
        seats.run(("ICE 1", "7"), take, "Ann")
    assert asked(database, "SELECT passenger FROM seats") == [("Ann",)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"load": "SELECT stock FROM shows WHERE id = %(key)s"}, "does not lock the row"),
        ({"load": f"{LOAD} SKIP LOCKED"}, "counts as missing"),
        ({"load": "SELECT stock FROM shows FOR UPDATE"}, "does not use %(key)s"),
        ({"load": "SELECT stock FROM shows WHERE id = %(id)s FOR UPDATE"}, "nothing is known for %(id)s"),
        ({"load": "SELECT stock FROM shows WHERE id = %s AND stock > %s FOR UPDATE"}, "more parameters than there are"),
        (
            {"load": "SELECT stock FROM shows WHERE id = %(key)s AND title LIKE 'F%' FOR UPDATE"},
            "write %% for a percent",
        ),
        ({"load": "UPDATE shows SET stock = 0 WHERE id = %(key)s"}, "begins with SELECT or WITH"),
        ({"save": "UPDATE shows SET stock = %s WHERE id = %s"}, "does not say which value it is"),
        ({"save": "UPDATE shows SET stock = %(stock)s"}, "does not use %(key)s"),
        ({"save": f"{SAVE}; TRUNCATE log"}, "several statements"),
        ({"save": f"{SAVE} RETURNING stock"}, "without RETURNING"),
        ({"save": "INSERT INTO shows VALUES (%(key)s)"}, "begins with UPDATE"),
        ({"missing": lambda _: {}}, "pass both, or neither"),
        (
            {
                "missing": lambda _: {},
                "insert": "INSERT INTO shows (id) VALUES (%(key)s) ON CONFLICT (id) DO UPDATE SET stock = 0",
            },
            "would overwrite a row",
        ),
        ({"key": {"a": int, "b": int}, "load_many": LOAD}, "load_many is"),
    ],
)
def test_statements_that_would_lose_something_are_refused_when_the_store_is_made(
    options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError) as raised:
        SQLStore(lambda: None, **{"load": LOAD, "save": SAVE, **options})
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pool": "postgresql://"}, "pool is 'postgresql://'"),
        ({"load": 5}, "load is 5"),
        ({"row": "Show"}, "row is 'Show'"),
        ({"key": list}, "must be one of"),
        ({"key": "id"}, "key is 'id'"),
        ({"idempotency": "outcomes; DROP"}, "idempotency is"),
        ({"idempotency_ttl": 60}, "no outcomes are recorded"),
        ({"name": 5}, "name is 5"),
        ({"missing": "make"}, "missing is 'make'"),
    ],
)
def test_options_of_wrong_types_are_refused_when_the_store_is_made(options: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError) as raised:
        SQLStore(**{"pool": lambda: None, "load": LOAD, "save": SAVE, **options})
    assert told in str(raised.value)


def test_a_save_that_finds_no_row_saves_nothing_and_says_so(pool: ConnectionPool, database: str) -> None:
    with processor(pool, save=f"{SAVE} AND stock < 5") as shows:
        error = answer_of(shows.run, 1, sell)
    assert isinstance(error, RuntimeError)
    assert "save has found 0 rows" in str(error)
    assert asked(database, "SELECT sum(stock) FROM shows") == [(20,)]


@pytest.mark.parametrize("form", ["one key", "many", "across"])
def test_a_save_that_finds_several_rows_fails_its_batch_and_no_other_and_says_what_to_mend(
    pool: ConnectionPool, database: str, form: str
) -> None:
    store: Any = SQLStore(pool, load=LOAD, save=f"{SAVE} OR (%(key)s = 1 AND id = 2)", load_many=MANY)
    opens = {"open_resources": store.open_resources} if form == "many" else {"open_resource": store}
    with Processor(**opens, min_duration=0.01, max_duration=10) as shows:
        if form == "across":
            calls: list[Any] = [(shows.run_across, [1, 2], lambda both: [sell(one) for one in both])] * 2
        else:
            calls = [(shows.run, 1, sell)] * 2
        callers = [spawned(*call) for call in calls]
        other = None if form == "across" else spawned(shows.run, 2, sell)
        found = [caller.get() for caller in callers]
        assert other is None or other.get() == 9
    assert [(type(one), one.retry_safe) for one in found] == [(SaveFailed, True)] * 2
    assert "save has found 2 rows, and has to find the one that was loaded. Compare its WHERE" in str(found[0])
    assert asked(database, "SELECT stock FROM shows ORDER BY id") == [(10,), (10 if other is None else 9,)]


def test_an_insert_of_several_rows_fails_its_batch(pool: ConnectionPool, database: str) -> None:
    new = f"{NEW}, (%(key)s + 1, 'another', 0)"
    made = {"id": 3, "title": "new", "stock": 10}
    with processor(pool, missing=lambda _: dict(made), row=dict, insert=new) as shows:
        error = answer_of(shows.run, 3, dict.copy)
    assert isinstance(error, SaveFailed)
    assert "insert has inserted 2 rows, and has to insert one" in str(error)
    assert asked(database, "SELECT count(*) FROM shows") == [(2,)]


def test_a_load_that_finds_several_rows_fails_by_name(pool: ConnectionPool) -> None:
    with processor(pool, load="SELECT id, title, stock FROM shows WHERE id >= %(key)s FOR UPDATE") as shows:
        error = answer_of(shows.run, 1, sell)
    assert isinstance(error, LoadFailed)
    assert "load has found 2 rows for the key 1" in str(error.__cause__)


def test_a_new_row_that_violates_another_constraint_than_its_keys_is_its_operations_error(
    pool: ConnectionPool, database: str
) -> None:
    def name(show: Any, title: str) -> None:
        show.title = title

    with processor(
        pool,
        missing=lambda key: SimpleNamespace(title=f"show {key}", stock=5),
        insert="INSERT INTO shows (id, title, stock) VALUES (%(key)s, %(title)s, %(stock)s)",
        save="UPDATE shows SET title = %(title)s, stock = %(stock)s WHERE id = %(key)s",
    ) as shows:
        error = answer_of(shows.run, 3, name, "Aida")
        assert shows.run(3, name, "Tosca") is None
    assert isinstance(error, psycopg.errors.UniqueViolation)
    assert asked(database, "SELECT title, stock FROM shows WHERE id = 3") == [("Tosca", 5)]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("a row", "pass a pair of an INSERT and its parameters"),
        ((LOG, "a"), "pass a pair of an INSERT and its parameters"),
        (("COMMIT", ()), "would begin or end the transaction"),
    ],
)
def test_a_row_beside_that_is_no_statement_of_the_batch_is_its_operations_error(
    pool: ConnectionPool, database: str, row: Any, told: str
) -> None:
    def add(show: Any, row: Any) -> int:
        current_batch().add_row(row)
        return sell(show)

    with processor(pool) as shows:
        callers = [spawned(shows.run, 1, add, one) for one in ((LOG, ["a"]), row, (LOG, ["b"]))]
        first, error, last = [caller.get() for caller in callers]
    assert (first, last) == (9, 8)
    assert told in str(error)
    assert asked(database, "SELECT text FROM log ORDER BY id") == [("a",), ("b",)]


# -- connections ---------------------------------------------------------------------------------------------------


def test_connections_may_have_rows_of_their_own_form_and_keep_their_settings(database: str) -> None:
    with ConnectionPool(database, kwargs={"row_factory": dict_row}, min_size=0, max_size=1, open=True) as pool:
        with processor(pool) as shows:
            assert shows.run(1, sell) == 9
        with pool.connection() as connection:
            assert not connection.autocommit
            assert repr(connection.execute("SELECT stock FROM shows WHERE id = 1").fetchone()) == "{'stock': 9}"


@pytest.mark.usefixtures("_psycopg2_waits")
def test_connections_of_psycopg2_may_have_rows_of_their_own_form_and_keep_their_settings(database: str) -> None:
    pool = psycopg2.pool.ThreadedConnectionPool(1, 1, database, cursor_factory=psycopg2.extras.RealDictCursor)
    try:
        with processor(pool) as shows:
            assert shows.run(1, sell) == 9
        connection = pool.getconn()
        assert not connection.autocommit
        cursor = connection.cursor()
        cursor.execute("SELECT stock FROM shows WHERE id = 1")
        assert dict(cursor.fetchone()) == {"stock": 9}
    finally:
        pool.closeall()


@pytest.mark.usefixtures("_psycopg2_waits")
def test_a_function_may_connect_for_each_batch(database: str) -> None:
    with processor(lambda: psycopg2.connect(database)) as shows:
        assert [shows.run(1, sell) for _ in range(2)] == [9, 8]


def test_a_connection_that_is_anothers_is_refused_and_left_alone(database: str) -> None:
    with psycopg.connect(database) as shared:
        shared.execute("UPDATE shows SET stock = 5 WHERE id = 2")
        with processor(lambda: shared) as shows:
            error = answer_of(shows.run, 1, sell)
        assert isinstance(error, LoadFailed)
        assert "is in a transaction" in str(error.__cause__)
    assert asked(database, "SELECT stock FROM shows WHERE id = 2") == [(5,)]


def test_one_connection_is_not_lent_to_two_batches(database: str) -> None:
    def wait(show: Any) -> None:
        answers.append(spawned(other.run, 2, sell).get())

    answers: list[Any] = []
    with psycopg.connect(database) as shared, ExitStack() as stack:
        store: Any = SQLStore(lambda: shared, load=LOAD, save=SAVE)
        shows, other = (stack.enter_context(Processor(open_resource=store, min_duration=0)) for _ in range(2))
        shows.run(1, wait)
    assert "returned a connection that another batch has" in str(answers[0].__cause__)


def test_a_driver_that_the_store_does_not_know_is_refused_by_name() -> None:
    with processor(lambda: sqlite3.connect(":memory:")) as shows:
        error = answer_of(shows.run, 1, sell)
    assert isinstance(error, LoadFailed)
    assert "must return a connection of psycopg 3, psycopg2 or PyMySQL" in str(error.__cause__)


def test_a_batch_waits_for_a_connection_of_a_pool_that_would_raise(pool2: Any, database: str) -> None:
    taken = [pool2.getconn() for _ in range(2)]
    with processor(pool2) as shows:
        caller = spawned(shows.run, 1, sell)
        caller.join(timeout=0.05)
        assert not caller.ready()
        for connection in taken:
            pool2.putconn(connection)
        assert caller.get() == 9


@pytest.mark.usefixtures("_psycopg2_waits")
@pytest.mark.parametrize(("driver", "trips"), [("psycopg", 2), ("psycopg2", 2)])
def test_a_batch_takes_few_round_trips(database: str, driver: str, trips: int) -> None:
    def sell_with_row(show: Any, text: str) -> int:
        current_batch().add_row((LOG, [text]))
        return sell(show)

    endpoint = server_of(database)
    with Proxy(endpoint) as proxy, ExitStack() as stack:
        through = make_conninfo(database, **without_tls((proxy.host, proxy.port)))
        pool: Any
        if driver == "psycopg":
            pool = stack.enter_context(ConnectionPool(through, min_size=0, max_size=1, open=True))
        else:
            pool = psycopg2.pool.ThreadedConnectionPool(1, 1, through)
            stack.callback(pool.closeall)
        shows = stack.enter_context(processor(pool, idempotency="outcomes"))
        store: Any = SQLStore(pool, load=LOAD, save=SAVE, idempotency="outcomes")
        store.create_outcomes()
        shows.run(1, sell)
        before = proxy.round_trips
        shows.run(1, sell_with_row, "a", idempotency_key="a")
        assert proxy.round_trips == before + trips
    assert asked(database) == [(8,)]


def server_of(database: str) -> Endpoint:
    told = psycopg.conninfo.conninfo_to_dict(database)
    port = int(told.get("port") or 5432)
    host = str(told["host"])
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)


@pytest.mark.parametrize(("when", "told"), [("used", "which are its parent's"), ("unused", "child 11")])
def test_a_child_of_a_fork_uses_no_connection_of_its_parents_pool(database: str, when: str, told: str) -> None:
    command = [sys.executable, "-m", "tests.support.programs.forked_pool", database, when]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    child, parent = sorted(ran.stdout.splitlines())
    assert told in child
    assert parent == "parent 11"


def test_a_value_is_found_as_it_was_assigned_until_the_save(pool: ConnectionPool, database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute(
            "CREATE TABLE prices (id int PRIMARY KEY, price numeric(10, 2)); INSERT INTO prices VALUES (1, 9.9)"
        )

    def add(row: Any) -> Decimal:
        row.price += Decimal("0.005")
        return Decimal(row.price)

    def misspell(row: Any) -> None:
        row.price = "much"

    def correct(row: Any) -> None:
        row.price = Decimal(1)

    load, save = (
        "SELECT id, price FROM prices WHERE id = %s FOR UPDATE",
        "UPDATE prices SET price = %(price)s WHERE id = %(key)s",
    )
    with processor(pool, load=load, save=save) as prices:
        alone = [prices.run(1, add) for _ in range(3)]
        prices.run(1, lambda row: setattr(row, "price", Decimal("9.9")))
        together = [one.get() for one in [spawned(prices.run, 1, add) for _ in range(3)]]
        assert alone == [Decimal(one) for one in ("9.905", "9.915", "9.925")]
        assert together == [Decimal(one) for one in ("9.905", "9.910", "9.915")]
        assert isinstance(answer_of(prices.run, 1, misspell), psycopg.DataError)
        assert [one.get() for one in [spawned(prices.run, 1, one) for one in (misspell, correct)]] == [None, None]


# -- outcomes ------------------------------------------------------------------------------------------------------


def test_the_table_of_outcomes_is_created_once_and_emptied_by_a_cron_job(pool2: Any, database: str) -> None:
    store: Any = SQLStore(pool2, load=LOAD, save=SAVE, idempotency="outcomes")
    for _ in range(2):
        store.create_outcomes()
    with Processor(open_resource=store, min_duration=0) as shows:
        assert [shows.run(1, sell, idempotency_key=key) for key in "aab"] == [9, 9, 8]
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE outcomes SET expires = 1")
    assert [store.purge_outcomes(limit=1) for _ in range(3)] == [1, 1, 0]


def test_an_expired_outcome_in_the_way_is_deleted_without_a_warning_of_the_servers(database: str) -> None:
    def listen(connection: psycopg.Connection) -> None:
        connection.add_notice_handler(lambda notice: told.append(str(notice.message_primary)))

    told: list[str] = []
    with ConnectionPool(database, min_size=0, max_size=1, open=True, configure=listen) as pool:
        store: Any = SQLStore(pool, load=LOAD, save=SAVE, idempotency="outcomes")
        store.create_outcomes()
        with Processor(open_resource=store, min_duration=0) as shows:
            assert shows.run(1, sell, idempotency_key="a") == 9
            with psycopg.connect(database) as connection:
                connection.execute("UPDATE outcomes SET expires = 1")
            assert shows.run(1, sell, idempotency_key="a") == 8
    assert told == []


def test_a_store_without_outcomes_has_none_to_create_or_purge() -> None:
    store = SQLStore(lambda: None, load=LOAD, save=SAVE)
    for call in (store.create_outcomes, store.purge_outcomes):
        with pytest.raises(ValueError, match="records no outcomes"):
            call()


def test_a_store_that_loads_no_many_rows_takes_no_operations_across_keys(pool: ConnectionPool) -> None:
    with processor(pool) as shows, pytest.raises(TypeError):
        shows.run_across([1, 2], len)


@pytest.mark.parametrize("form", ["one key", "many", "across", "alone"])
def test_a_store_without_delete_says_which_option_it_needs(pool: ConnectionPool, form: str) -> None:
    store: Any = SQLStore(pool, load=LOAD, save=SAVE, load_many=MANY)
    opens = {"open_resources": store.open_resources} if form in {"many", "alone"} else {"open_resource": store}
    told = "delete: the store of the processor shows deletes no resources: pass delete= to the SQLStore, the DELETE"
    with Processor(**opens, min_duration=0, max_duration=10, batching=form != "alone") as shows:
        call = (shows.run_across, [1, 2]) if form == "across" else (shows.run, 1)
        error = answer_of(*call, lambda _: current_batch().delete())
    assert isinstance(error, RuntimeError)
    assert str(error).startswith(told)


def test_a_processor_without_a_name_has_the_name_of_its_store(pool: ConnectionPool) -> None:
    for given, name in ((None, "shows"), ("seats of the opera", "seats of the opera")):
        store: Any = SQLStore(pool, load=LOAD, save=SAVE, load_many=MANY, name=given)
        for opens in ({"open_resource": store}, {"open_resources": store.open_resources}):
            with Processor(**opens, min_duration=0, max_duration=10) as made:
                assert made.name == name
            with Processor(**opens, min_duration=0, max_duration=10, name="mine") as made:
                assert made.name == "mine"


@pytest.mark.parametrize(
    ("where", "column"),
    [("id = %(key)s", "shows.id"), ('"id" = %(key)s', 'shows."id"'), ("lower(id) = lower(%(key)s)", "shows.key")],
)
def test_a_key_that_is_none_is_refused_by_the_name_of_its_column(pool: ConnectionPool, where: str, column: str) -> None:
    with processor(pool, save=SAVE.replace("id = %(key)s", where)) as shows:
        with pytest.raises(TypeError) as raised:
            shows.run(None, sell)
        assert str(raised.value).startswith(f"None is no key for the column {column}: it has values of type int")


def test_the_first_batch_of_a_new_row_gets_what_missing_returned_and_the_next_one_the_row(
    pool: ConnectionPool,
) -> None:
    made = {"title": "new", "stock": 100}
    options: dict[str, Any] = {
        "row": dict,
        "missing": lambda _: dict(made),
        "insert": "INSERT INTO shows (id, title, stock) VALUES (%(key)s, %(title)s, %(stock)s)",
    }
    with processor(pool, **options) as shows:
        assert shows.run(3, dict.copy) == made
        assert shows.run(3, dict.copy) == {"id": 3, **made}


@pytest.mark.parametrize("bulk", [False, True])
def test_a_batch_that_gets_no_connection_of_psycopgs_pool_tells_why_before_its_deadline(
    pool: ConnectionPool, *, bulk: bool
) -> None:
    store: Any = SQLStore(pool, load=LOAD, save=SAVE, load_many=MANY)
    opens = {"open_resources": store.open_resources} if bulk else {"open_resource": store}
    taken = [pool.getconn() for _ in range(4)]
    with Processor(**opens, min_duration=0, max_duration=0.5) as shows:
        with pytest.raises(LoadFailed, match=r"gave no connection within 0.45 s: batches have 0 of its 4") as raised:
            shows.run(1, sell)
        assert raised.value.retry_safe
        for connection in taken:
            pool.putconn(connection)
        assert shows.run(1, sell) == 9


def test_connections_of_a_pool_that_does_not_wait_are_first_come_first_served(pool2: Any) -> None:
    taken = [pool2.getconn() for _ in range(2)]
    got: list[int] = []
    with processor(
        pool2, missing=lambda key: {"id": key, "title": str(key), "stock": 9}, row=dict, insert=NEW
    ) as shows:
        shows.batching = False
        callers = [spawned(shows.run, key, lambda show: got.append(show["id"])) for key in range(3, 9)]
        gevent.idle()
        pool2.putconn(taken.pop())  # one for all of them
        gevent.joinall(callers)
        pool2.putconn(taken.pop())
    assert got == list(range(3, 9))


def test_a_batch_that_gets_no_connection_of_psycopg2s_pool_tells_why_before_its_deadline(pool2: Any) -> None:
    taken = [pool2.getconn() for _ in range(2)]
    store = SQLStore(pool2, load=LOAD, save=SAVE)
    with Processor(open_resource=store, min_duration=0, max_duration=3) as shows:
        error = answer_of(shows.run, 1, sell)
        for connection in taken:
            pool2.putconn(connection)
        assert isinstance(error, LoadFailed)
        assert "batches have 0 of its 2 connections. All of them were in use" in str(error)
        assert shows.run(1, sell) == 9


def test_check_setup_names_a_pool_that_is_smaller_than_max_batches(pool: ConnectionPool, pool2: Any) -> None:
    def told() -> list[str]:
        return [one.what for one in check_setup() if one.name == "pool-small"]

    store = SQLStore(pool2, load=LOAD, save=SAVE)
    with Processor(open_resource=store, min_duration=0, max_batches=2):
        assert told() == []
    with Processor(open_resource=store, min_duration=0, max_batches=3):
        (line,) = told()
    assert "has a max_batches of 3, but the pool of its SQLStore has 2 connections" in line
    with Processor(open_resource=SQLStore(pool, load=LOAD, save=SAVE), min_duration=0, max_batches=5) as shows:
        (line,) = told()
        shows.run(1, sell)
    assert "has a max_batches of 5, but the pool of its SQLStore has 4 connections" in line
    assert told() == []  # it is stopped

"""A store whose connections were used before the fork; two children and the parent go on at the same time.

    python -m tests.support.programs.forked_connections FORM ADDRESS WAY

Each child runs operations on a key of its own, and the parent goes on with what it had opened.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import ctypes
import os
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent

from geventbatch import LoadFailed, Processor, check_setup
from tests.support.children import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

TIMES = 20
warnings.simplefilter("ignore", RuntimeWarning)


def sqlalchemy(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    import sqlalchemy as sa

    from geventbatch.stores import SQLAlchemyStore

    engine = sa.create_engine(address, pool_size=4)
    store = SQLAlchemyStore.documents(engine, "counters", missing=lambda _: {"n": 0})
    store.create_table()  # as an application does where it is imported

    def use() -> object:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT 1").scalar()

    return store, use, add_to_document


def sqlalchemy_unused(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    """The same, but no connection of its engine is open at the fork."""
    import sqlalchemy as sa

    from geventbatch.stores import SQLAlchemyStore

    engine = sa.create_engine(address, pool_size=4)
    store = SQLAlchemyStore.documents(engine, "counters", missing=lambda _: {"n": 0})
    store.create_table()
    engine.dispose()

    def use() -> object:
        with engine.connect() as connection:
            return connection.exec_driver_sql("SELECT 1").scalar()

    return store, use, add_to_document


def django(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    from tests.support.django_project import start

    from django.db import connections  # isort: skip - after it is set up

    from geventbatch.stores import DjangoStore
    from tests.support.django_project.bank.models import Purse

    alias = "forked"
    connections.settings[alias] = {**start._settings(address), "OPTIONS": start.options_of(address)}
    store = DjangoStore(Purse, by="name", using=alias, missing=lambda key: Purse(name=key))

    def use() -> object:
        return Purse.objects.using(alias).count()

    use()
    return store, use, add_to_purse


def sql(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    """A pool of psycopg2 that has no connections yet, made as the page of `SQLStore` says."""
    import psycopg2.pool  # type: ignore[import-untyped] # it has no types
    from psycogreen.gevent import patch_psycopg  # type: ignore[import-untyped] # likewise

    patch_psycopg()
    address = address.replace("postgresql+psycopg:", "postgresql:").replace("+", "%20")  # as libpq reads it
    connection = psycopg2.connect(address)
    with connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE IF NOT EXISTS counters (id text PRIMARY KEY, n int)")
    connection.close()
    pool = psycopg2.pool.ThreadedConnectionPool(0, 8, address)
    pool.minconn = 8

    def use() -> object:
        lent = pool.getconn()
        with lent, lent.cursor() as cursor:
            cursor.execute("SELECT 1")
        pool.putconn(lent)
        return len(pool._pool)

    return counters(pool), use, add_to_document


def counters(pool: Any) -> Any:
    """Return a store of what `sql` has created."""
    from geventbatch.stores import SQLStore

    return SQLStore(
        pool,
        load="SELECT id, n FROM counters WHERE id = %s FOR UPDATE",
        save="UPDATE counters SET n = %(n)s WHERE id = %(key)s",
        insert="INSERT INTO counters (id, n) VALUES (%(key)s, %(n)s)",
        missing=lambda key: {"id": key, "n": 0},
        row=dict,
        key=str,
    )


def sql_closed(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    """A pool of psycopg 3 that each process opens for itself."""
    from psycopg_pool import ConnectionPool

    sql(address)
    pool = ConnectionPool(address.replace("postgresql+psycopg:", "postgresql:").replace("+", "%20"), open=False)
    return counters(pool), pool.open, add_to_document


def sql_used(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    """The same, but its pool has a connection at the fork."""
    store, use, add = sql(address)
    use()
    return store, use, add


def redis(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    import redis as driver

    from geventbatch.stores import RedisStore

    client = driver.Redis.from_url(address)
    store = RedisStore(client, missing=lambda _: {"n": 0})
    client.ping()
    return store, client.ping, add_to_document


def redis_cluster(address: str) -> tuple[Any, Callable[[], object], Callable[[Any], int]]:
    import redis as driver

    from geventbatch.stores import RedisStore, Reuse

    client = driver.RedisCluster.from_url(address)
    store = RedisStore(client, missing=lambda _: {"n": 0}, reuse_resource=Reuse())
    processor = Processor(open_resource=store, min_duration=0, max_duration=20)
    processor.run("of the parent", add_to_document)
    return store, partial(processor.run, "of the parent", add_to_document), add_to_document


def add_to_document(document: dict[str, int]) -> int:
    document["n"] += 1
    return document["n"]


def add_to_purse(purse: Any) -> int:
    purse.total += 1
    return int(purse.total)


def run_all(run: Callable[[], object], batching: bool) -> list[object]:
    if not batching:
        return [run() for _ in range(TIMES)]
    return [one.get() for one in [gevent.spawn(run) for _ in range(TIMES)]]


def child(store: Any, add: Callable[[Any], int], number: int, first: Callable[[], object] = lambda: None) -> None:
    """A key of its own, alone first, in the greenlet that has used the connection before the fork."""
    told = [problem.name for problem in check_setup()]
    first()
    answers: list[object] = []
    for batching in (False, True):
        processor = Processor(open_resource=store, min_duration=0, max_duration=20, batching=batching)
        answers += run_all(partial(processor.run, f"child {number}", add), batching)
    right = answers == list(range(1, 2 * TIMES + 1)) and [problem.name for problem in check_setup()] == told
    os.write(1, f"{told} {right}\n".encode())


def main(form: str, address: str, way: str) -> None:
    fork: Callable[[], int] = ctypes.PyDLL(None).fork if way == "in C" else os.fork
    forms = (sqlalchemy, sqlalchemy_unused, django, sql, sql_closed, sql_used, redis, redis_cluster)
    store, use, add = {one.__name__: one for one in forms}[form](address)
    children = []
    for number in (1, 2):
        pid = fork()
        if not pid:
            try:
                with gevent.Timeout(40):
                    for _ in range(2):  # after a fork in C, gevent has threads to resolve names at its second turn
                        gevent.sleep(0.01)
                    child(store, add, number, *([use] if form in {"sqlalchemy_unused", "sql_closed"} else []))
            except LoadFailed as error:
                os.write(1, f"{[problem.name for problem in check_setup()]} {error.__cause__}\n".encode())
            finally:
                os._exit(0)
        children.append(pid)
    for _ in range(3 * TIMES):
        use()
        gevent.sleep(0)
    for pid in children:
        wait_for(pid)
    use()
    os.write(1, f"parent {[problem.name for problem in check_setup()]}\n".encode())
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

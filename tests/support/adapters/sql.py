"""SQLStore in the contract suite: through psycopg and psycopg2 on PostgreSQL, and through PyMySQL on MariaDB."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import psycopg2.pool  # type: ignore[import-untyped] # likewise
import pymysql
import pytest
from psycogreen.gevent import gevent_wait_callback  # type: ignore[import-untyped] # likewise
from psycopg_pool import ConnectionPool

from geventbatch.stores import SQLStore
from tests.support import postgres_server
from tests.support.adapters.base import ELSEWHERE, Case, Missing, Step
from tests.support.adapters.sqlalchemy import PLACES, MappedAdapter, Place, Server, fresh
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

Driver = Literal["psycopg", "psycopg2", "pymysql"]

LOAD: Final = "SELECT name, total FROM purses WHERE name {} FOR UPDATE"
INSERT: Final = "INSERT INTO purses (name, total, version) VALUES (%(key)s, %(total)s, 0)"


@dataclass
class Account:
    """What operations get. Its column is a text, so that one can be there that is no number."""

    name: str
    total: int

    def __post_init__(self) -> None:
        self.total = int(self.total)


class SQLAdapter(MappedAdapter):
    """A store without an ORM; others go to the same tables through SQLAlchemy."""

    def __init__(self, place: Place, proxy: Proxy, pool: Pool) -> None:
        super().__init__(place, "lock", proxy, pipeline=True)
        self.pool = pool

    def store(self, *, missing: Missing = "raise") -> Any:
        making: dict[str, Any] = {}
        if missing == "make":
            making = {"missing": lambda key: Account(key, 0), "insert": INSERT}
        return SQLStore(
            self.pool.pool,
            load=LOAD.format("= %(key)s"),
            save="UPDATE purses SET total = %(total)s WHERE name = %(key)s",
            delete="DELETE FROM purses WHERE name = %s",
            load_many=LOAD.format(self.pool.among + " ORDER BY name"),
            row=Account,
            key=str,
            idempotency="outcomes",
            **making,
        )

    def row(self, text: str) -> Any:
        return "INSERT INTO entries (text) VALUES (%(text)s)", {"text": text}

    def insert(self, resource: Any, text: str) -> None:
        raise NotImplementedError

    def open_connections(self) -> int:
        with self.direct.connect() as connection:
            return self.place.count(connection, busy=False)

    def busy_connections(self) -> int:
        with self.direct.connect() as connection:
            return max(self.pool.lent(), self.place.count(connection, busy=True))


class Pool:
    """A pool as applications have it."""

    among = "= ANY(%(keys)s)"
    pool: Any

    def lent(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class PsycopgPool(Pool):
    def __init__(self, place: Any, proxy: Proxy, size: int) -> None:
        self.pool = ConnectionPool(kwargs=settings(place, proxy), min_size=0, max_size=size, open=True)

    def lent(self) -> int:
        stats = self.pool.get_stats()
        return int(stats["pool_size"] - stats["pool_available"])

    def close(self) -> None:
        self.pool.close()


class Psycopg2Pool(Pool):
    """It waits in gevent's way until it is closed."""

    def __init__(self, place: Any, proxy: Proxy, size: int) -> None:
        self._before = psycopg2.extensions.get_wait_callback()
        psycopg2.extensions.set_wait_callback(gevent_wait_callback)
        self.pool = psycopg2.pool.ThreadedConnectionPool(0, size, **settings(place, proxy))
        self.pool.minconn = size  # it keeps so many, and opens them when they are needed

    def lent(self) -> int:
        return len(self.pool._used)

    def close(self) -> None:
        self.pool.closeall()
        psycopg2.extensions.set_wait_callback(self._before)


class PyMySQLPool(Pool):
    """A function that returns one that is kept, or a new one."""

    among = "IN %(keys)s"

    def __init__(self, place: Any, proxy: Proxy, _: int) -> None:
        idle: list[Any] = []
        self._idle, self._lent = idle, 0
        url = place.url

        class Kept(pymysql.connections.Connection):  # type: ignore[misc] # it has no types
            def close(self) -> None:
                if self.open:
                    idle.append(self)

        def lend() -> Any:
            if idle:
                return idle.pop()
            how = {"user": url.username or "root", "password": url.password or "", "database": place.database}
            return Kept(host=proxy.host, port=proxy.port, charset="utf8mb4", **how)

        self.pool = lend

    def lent(self) -> int:
        return 0

    def close(self) -> None:
        while self._idle:
            self._idle.pop()._force_close()


POOLS: Final[dict[Driver, type[Any]]] = {"psycopg": PsycopgPool, "psycopg2": Psycopg2Pool, "pymysql": PyMySQLPool}


def settings(place: Any, proxy: Proxy) -> dict[str, Any]:
    """What libpq is told, so that the proxy sees what is sent. A pooler takes no options."""
    options = f"-c search_path={place.schema} -c synchronous_commit=off"
    return {
        **({} if place.server == "pgbouncer" else {"options": options}),
        "host": proxy.host,
        "port": proxy.port,
        "user": place.url.username,
        "password": place.url.password,
        "dbname": place.url.database,
        "application_name": place.name,
        "sslmode": "disable",
        "gssencmode": "disable",
    }


@contextmanager
def opened(driver: Driver, server: Server, address: str, *, bulk: bool) -> Iterator[Any]:
    """The adapter at *address*, through a proxy."""
    place: Any = PLACES[server](address)
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(place.endpoint()))
        pool = POOLS[driver](place, proxy, SQLAdapter.pool_size)
        stack.callback(pool.close)
        adapter = SQLAdapter(place, proxy, pool)
        adapter.bulk = bulk
        stack.callback(adapter.close)
        yield adapter


def _case(driver: Driver, server: Server = "postgresql", *, bulk: bool = False) -> Case:
    is_postgres = driver != "pymysql"
    steps: tuple[Step, ...] = ("load", "commit") if is_postgres else ("load", "save", "commit")
    return Case(
        name=f"sql-{driver}-{server}{'-bulk' if bulk else ''}",
        fresh=partial(fresh, server),
        opens=partial(opened, driver, server, bulk=bulk),
        has_across=bulk,
        has_locks=True,
        has_rows=True,
        has_proxy=True,
        can_corrupt=True,
        can_restart=driver == "psycopg" and server == "postgresql" and not bulk and postgres_server.GIVEN is None,
        knows_outcome=is_postgres,
        slow_steps=steps,
        nul_in_keys=not is_postgres,
        marks=(getattr(pytest.mark, server),) if server in ELSEWHERE else (pytest.mark.variants,) if bulk else (),
    )


CASES = (
    _case("psycopg"),
    _case("psycopg2"),
    _case("psycopg", bulk=True),
    _case("psycopg2", bulk=True),
    _case("psycopg", "pgbouncer"),
    _case("pymysql", "mariadb"),
    _case("pymysql", "mariadb", bulk=True),
)

"""The servers that are broken: where they are, what their messages look like, how they are hurt and read."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast
from uuid import uuid4

import gevent
import sqlalchemy as sa
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import NullPool

from tests.support import postgres_server, redis_server, servers
from tests.support.chaos.tables import ENTRIES, METADATA, add_line, documents
from tests.support.mariadb import MariaDBServer
from tests.support.redis_server import RedisServer
from tests.support.servers import wait_until

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

    from tests.support.chaos.clients import Entry
    from tests.support.proxy import Endpoint, Proxy

Found = dict[str, list[str]]
"""The entries of each key, in their order."""

Beside = dict[str, Counter[str]]
"""How many rows each key has for each name."""


class Place(Protocol):
    """One server, with what one round keeps there."""

    endpoint: Endpoint
    save: bytes
    """What is in the message that saves and commits, and in no other one."""
    saved: bytes
    """What is in the answer to it, when it was carried out."""
    load: bytes
    can_restart: bool
    locks: bool
    """Foreign writers lock what they write, and so there can be deadlocks."""

    def url(self, proxy: Proxy | None) -> str:
        """For the workers: through *proxy*, or straight."""
        ...

    def slow_down(self, seconds: float) -> None:
        """Have it take so long for each save."""
        ...

    def terminate(self, chance: random.Random) -> bool:
        """End one of its connections, if there is one."""
        ...

    def restart(self, chance: random.Random) -> str:
        """Have it stop, in order or by a crash, and start again. Gives what happened."""
        ...

    def settle(self) -> None:
        """Wait until nothing is going on there any more; the proxy has gone."""
        ...

    def move(self, entry: Entry, amount: int, held: float) -> str:
        """Move money as a foreign writer does, *held* seconds after each lock. Note in *entry* what came of it."""
        ...

    def deadlocks(self) -> int:
        """How many there were, as far as the server has not forgotten it."""
        ...

    def read(self) -> Found:
        """What is kept."""
        ...

    def read_beside(self) -> Beside | None:
        """The same as the rows beside the resources tell it; None where there are none."""
        ...


class SQLPlace:
    """What is the same on all SQL servers."""

    load = b"FROM resources"
    locks = True
    others: str
    """Selects its connections but this one."""
    _numbered = False
    """Its errors are told by a number, not by their type."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._resources = documents(engine, "lock", idempotent=False).table
        METADATA.create_all(engine)

    def settle(self) -> None:
        wait_until(lambda: not self._others())

    def read(self) -> Found:
        with self._engine.begin() as connection:
            return {row.key: json.loads(row.state) for row in connection.execute(sa.select(self._resources))}

    def read_beside(self) -> Beside:
        found: Beside = {}
        with self._engine.begin() as connection:
            for row in connection.execute(sa.select(ENTRIES)):
                found.setdefault(row.key, Counter())[row.name] += 1
        return found

    def move(self, entry: Entry, amount: int, held: float) -> str:
        entry.told = "refused"
        try:
            with self._engine.connect() as connection:
                return self._move(connection, entry, amount, held)
        except DBAPIError as error:
            number = error.orig.args[0] if self._numbered and error.orig is not None else ""
            return f"{entry.told}: {type(error.orig).__name__} {number}".rstrip()

    def _move(self, connection: sa.Connection, entry: Entry, amount: int, held: float) -> str:
        table = self._resources
        accounts: Found = {}
        for key in sorted(entry.keys, reverse=True):  # batches lock them in ascending order
            found = connection.scalar(sa.select(table.c.state).where(table.c.key == key).with_for_update())
            if found is None:
                return "refused: there is no such account yet"
            accounts[key] = json.loads(found)
            gevent.sleep(held)
        for key, put in zip(entry.keys, (-amount, amount), strict=True):
            add_line(accounts[key], entry.name, put)
            values = {"state": json.dumps(accounts[key]), "version": table.c.version + 1}
            connection.execute(sa.update(table).where(table.c.key == key).values(values))
            connection.execute(sa.insert(ENTRIES).values(key=key, name=entry.name))
        entry.told = "unknown"
        connection.commit()
        entry.told, entry.places = "saved", [len(accounts[key]) for key in entry.keys]
        return "saved"

    def _others(self) -> Sequence[int]:
        with self._engine.connect() as connection:
            return connection.scalars(sa.text(self.others)).all()


class PostgresPlace(SQLPlace):
    save = b"COMMIT"
    saved = b"COMMIT"
    others = (
        "SELECT pid FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
    )

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url).set(drivername="postgresql+psycopg")
        super().__init__(sa.create_engine(self._url, poolclass=NullPool))
        with self._engine.begin() as connection:  # or else most deadlines come before it notices a deadlock
            connection.exec_driver_sql(f"ALTER DATABASE \"{self._url.database}\" SET deadlock_timeout = '20ms'")
        self.can_restart = postgres_server.GIVEN is None
        port = self._url.port or 5432
        host = self._url.host
        self.endpoint: Endpoint = (host, port) if host else f"{cast('str', self._url.query['host'])}/.s.PGSQL.{port}"

    def url(self, proxy: Proxy | None) -> str:
        url = self._url
        if proxy is not None:
            url = url.difference_update_query(["host"]).set(host=proxy.host, port=proxy.port)
        return url.render_as_string(hide_password=False)

    def slow_down(self, seconds: float) -> None:
        with self._engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
                f"'BEGIN PERFORM pg_sleep({seconds:.3f}); RETURN NEW; END'"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER slowly BEFORE INSERT OR UPDATE ON resources FOR EACH ROW EXECUTE FUNCTION slowly()"
            )

    def terminate(self, chance: random.Random) -> bool:
        with suppress(OperationalError, IndexError):  # unless it is starting up, or has none
            pid = chance.choice(self._others())
            with self._engine.connect() as connection:
                return bool(connection.scalar(sa.text("SELECT pg_terminate_backend(:pid)"), {"pid": pid}))
        return False

    def restart(self, chance: random.Random) -> str:
        if chance.random() < 0.3:
            self._kill_one(chance)
            return "server crashed with one of its processes"
        if chance.random() < 0.5:
            postgres_server.restart("immediate")
            return "server crashed"
        postgres_server.restart()
        return "server restarted in order"

    def deadlocks(self) -> int:
        with self._engine.connect() as connection:
            found = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
            return int(connection.scalar(sa.text(found)) or 0)

    def _kill_one(self, chance: random.Random) -> None:
        """One of its processes, which makes it end all others and recover."""
        before = self._last_crash()
        with suppress(IndexError, ProcessLookupError):
            os.kill(chance.choice(self._others()), signal.SIGKILL)
            wait_until(lambda: self._last_crash() not in {None, before})

    def _last_crash(self) -> object:
        """What is another one after each crash; None while it does not answer."""
        with suppress(OperationalError), self._engine.connect() as connection:
            return connection.scalar(sa.text("SELECT pg_stat_get_bgwriter_stat_reset_time()"))
        return None


class MariaDBPlace(SQLPlace):
    save = b"\x03COMMIT"
    saved = b""
    can_restart = True
    _numbered = True
    others = (
        "SELECT id FROM information_schema.processlist "
        "WHERE db = database() AND id <> connection_id() AND user <> 'system user'"
    )

    def __init__(self, server: MariaDBServer) -> None:
        self._server = server
        self._name = f"chaos_{uuid4().hex}"
        self.endpoint: Endpoint = server.socket
        with self._at("").begin() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {self._name}")
        super().__init__(self._at(self._name))

    def url(self, proxy: Proxy | None) -> str:
        assert proxy is not None
        return f"mysql+pymysql://root@{proxy.host}:{proxy.port}/{self._name}"

    def slow_down(self, seconds: float) -> None:
        raise NotImplementedError

    def terminate(self, chance: random.Random) -> bool:
        with suppress(DBAPIError, IndexError):  # unless it is starting up, has none, or that one has just gone
            number = chance.choice(self._others())
            with self._engine.connect() as connection:
                connection.exec_driver_sql(f"KILL CONNECTION {number}")
                return True
        return False

    def restart(self, chance: random.Random) -> str:
        crash = chance.random() < 0.5
        self._server.restart(crash=crash)
        return "server crashed" if crash else "server restarted in order"

    def deadlocks(self) -> int:
        with self._engine.connect() as connection:
            return int(connection.exec_driver_sql("SHOW GLOBAL STATUS LIKE 'Innodb_deadlocks'").one()[1])

    def _at(self, database: str) -> sa.Engine:
        return sa.create_engine(sa.make_url(self._server.url).set(database=database), poolclass=NullPool)


class RedisPlace:
    save = b"PERSIST"
    saved = b":1"
    load = b"'value', 'version', 'saves')"
    locks = False

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self.can_restart = True
        self.endpoint: Endpoint = (server.host, server.port)
        with redis_server.connected(server.url) as client:
            client.flushall()

    def url(self, proxy: Proxy | None) -> str:
        return self._server.url if proxy is None else f"redis://{proxy.host}:{proxy.port}/0"

    def slow_down(self, seconds: float) -> None:
        raise NotImplementedError

    def terminate(self, chance: random.Random) -> bool:
        with redis_server.connected(self._server.url) as client:
            try:
                others = self._others(client)
                return bool(others) and bool(client.client_kill_filter(_id=chance.choice(others)))
            except RedisError:  # it is starting up, or that one has just gone
                return False

    def restart(self, chance: random.Random) -> str:
        del chance
        self._server.restart()
        return "server crashed"

    def settle(self) -> None:
        with redis_server.connected(self._server.url) as client:
            wait_until(lambda: not self._others(client))

    def read(self) -> Found:
        with redis_server.connected(self._server.url) as client:
            values = {name.decode(): client.hget(name, "value") for name in client.scan_iter(_type="hash")}
        return {key: json.loads(value) for key, value in values.items() if value is not None}

    def read_beside(self) -> None:
        return None

    def move(self, entry: Entry, amount: int, held: float) -> str:
        raise NotImplementedError

    def deadlocks(self) -> int:
        return 0

    def _others(self, client: Any) -> list[str]:
        return [one["id"] for one in client.client_list() if one["name"] != "tests"]


STORES: Final = (
    "postgres-lock",
    "postgres-version",
    "redis-version",
    "postgres-reuse",
    "redis-reuse",
    "postgres-mapped-lock",
    "postgres-mapped-version",
    "postgres-mapped-xmin",
    "transfers-postgres-lock",
    "transfers-postgres-version",
    "transfers-postgres-mapped-lock",
    "transfers-postgres-mapped-version",
    "transfers-mariadb-lock",
    "transfers-mariadb-version",
    "transfers-redis-version",
)
"""Server, form, and mode; after "transfers", entries are lines of accounts, most of them in several ones."""


def parts_of(name: str) -> tuple[str, bool]:
    """Give the store of one of `STORES`, and whether there are transfers."""
    return name.removeprefix("transfers-"), name.startswith("transfers-")


@contextmanager
def place_of(store: str) -> Iterator[Place]:
    """An empty one, for a store of that name."""
    if store.startswith("redis"):
        yield RedisPlace(_redis_server())
    elif store.startswith("mariadb"):
        yield MariaDBPlace(_mariadb_server())
    else:
        with servers.database("postgresql", Path()) as url:
            yield PostgresPlace(url)


# They acknowledge nothing that a crash could take back.


@cache
def _redis_server() -> RedisServer:
    return RedisServer("--appendfsync", "always")


@cache
def _mariadb_server() -> MariaDBServer:
    return MariaDBServer("--innodb-flush-log-at-trx-commit=2")

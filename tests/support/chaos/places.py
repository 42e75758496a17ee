"""The servers that are broken: where they are, what their messages look like, how they are hurt and read."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import sqlalchemy as sa
from redis.exceptions import RedisError
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tests.support import postgres_server, redis_server, servers
from tests.support.chaos.tables import ENTRIES, METADATA, documents
from tests.support.redis_server import RedisServer
from tests.support.servers import wait_until

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator, Sequence

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

    def read(self) -> Found:
        """What is kept."""
        ...

    def read_beside(self) -> Beside | None:
        """The same as the rows beside the resources tell it; None where there are none."""
        ...


class PostgresPlace:
    save = b"COMMIT"
    saved = b"COMMIT"
    load = b"FROM resources"

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url).set(drivername="postgresql+psycopg")
        self._engine = sa.create_engine(self._url, poolclass=NullPool)
        self.can_restart = postgres_server.GIVEN is None
        port = self._url.port or 5432
        host = self._url.host
        self.endpoint: Endpoint = (host, port) if host else f"{cast('str', self._url.query['host'])}/.s.PGSQL.{port}"
        self._resources = documents(self._engine, "lock", idempotent=False).table
        METADATA.create_all(self._engine)

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

    def _others(self) -> Sequence[int]:
        with self._engine.connect() as connection:
            return connection.scalars(sa.text(_OTHERS)).all()

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


_OTHERS: Final = (
    "SELECT pid FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
)


class RedisPlace:
    save = b"PERSIST"
    saved = b":1"
    load = b"'value', 'version', 'saves')"

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
)


@contextmanager
def place_of(store: str) -> Iterator[Place]:
    """An empty one, for a store of that name."""
    if store.startswith("redis"):
        yield RedisPlace(_redis_server())
    else:
        with servers.database("postgresql", Path()) as url:
            yield PostgresPlace(url)


_redis_servers: list[RedisServer] = []


def _redis_server() -> RedisServer:
    if not _redis_servers:
        # It acknowledges nothing that a crash could take back.
        _redis_servers.append(RedisServer("--appendfsync", "always"))
    return _redis_servers[0]

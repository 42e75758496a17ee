"""RedisStore in the contract suite: on a server, and on a cluster."""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import redis

from geventbatch.stores import RedisStore, Reuse
from tests.support.adapters.base import Adapter, Case, Missing, Step
from tests.support.proxy import Proxy
from tests.support.redis_server import GIVEN, cluster_url, connected, own_server, redis_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

Resource = dict[str, int]

SAVE: Final = b"if not as_loaded then return -i"
LOAD: Final = b"return redis.call('HMGET'"
"""In the scripts that save and load."""


class RedisAdapter(Adapter):
    """A prefix on a server, whose resources are JSON objects."""

    reuses = False
    commit_marker = SAVE
    commit_answer = b""

    def __init__(self, address: str, proxy: Proxy) -> None:
        self.address = address
        self.proxy: Proxy = proxy
        self._url, _, self._prefix = address.partition("#")
        self.direct = connected(self._url)
        """For what is done behind the store's back."""
        self.client = self._connected()

    def _connected(self, **options: Any) -> redis.Redis | redis.RedisCluster:
        return redis.Redis(host=self.proxy.host, port=self.proxy.port, client_name=self._prefix, **options)

    def connected_as(self, user: str, password: str) -> redis.Redis | redis.RedisCluster:
        """Another client."""
        return self._connected(username=user, password=password)

    def close(self) -> None:
        self.client.close()
        self.direct.close()

    def name(self, key: str) -> str:
        return self._prefix + key

    def store(self, *, missing: Missing = "raise") -> RedisStore[Resource]:
        return RedisStore(
            self.client,
            prefix=self._prefix,
            missing="raise" if missing == "raise" else _made,
            reuse_resource=Reuse() if self.reuses else None,
        )

    def add(self, resource: Resource, amount: int) -> int:
        resource["total"] += amount
        return resource["total"]

    def get(self, key: str) -> int | None:
        value = self.direct.hget(self.name(key), "value")
        return None if value is None else int(json.loads(value)["total"])

    def put(self, key: str, total: int) -> None:
        with self.direct.pipeline() as transaction:
            transaction.hset(self.name(key), "value", json.dumps({"total": total}))
            transaction.hincrby(self.name(key), "version", 1)
            transaction.execute()

    def remove(self, key: str) -> None:
        self.direct.delete(self.name(key))

    def corrupt(self, key: str) -> None:
        self.direct.hset(self.name(key), "value", b"\xff{")

    def outcomes(self) -> int:
        return sum(1 for _ in self._outcomes())

    def expire_outcomes(self) -> None:
        for name in self._outcomes():
            self.direct.pexpire(name, 0)

    def _outcomes(self) -> Iterator[Any]:
        return iter(self.direct.scan_iter(match=f"*{self._prefix}*:idempotency*:*", count=1000))

    def clear(self) -> None:
        _clear(self.direct, self._prefix)

    def slow(self, step: Step) -> AbstractContextManager[Callable[[], bool]]:
        return self._slow(LOAD if step == "load" else SAVE)

    @contextmanager
    def _slow(self, marker: bytes) -> Iterator[Callable[[], bool]]:
        with self.proxy.hold(marker) as rule:
            yield rule.reached

    def terminate(self) -> None:
        for line in self._connections():
            self.direct.execute_command("CLIENT", "KILL", "ID", line.split()[0].removeprefix("id="))

    def restart(self) -> None:
        own_server().restart()

    def open_connections(self) -> int:
        return len(self._connections())

    def busy_connections(self) -> int:
        return sum(len(pool._in_use_connections) for pool in self.pools())

    def pools(self) -> list[Any]:
        client: Any = self.client
        return [client.connection_pool]

    def _connections(self) -> list[str]:
        listed = self.direct.execute_command("CLIENT", "LIST", NEVER_DECODE=True)
        return [line for line in listed.decode().splitlines() if f" name={self._prefix} " in line]


class ReusingAdapter(RedisAdapter):
    """The same, with a store that keeps what it has saved."""

    reuses = True


class BulkAdapter(RedisAdapter):
    """The same, whose processors take the bulk form."""

    bulk = True


class ClusterAdapter(RedisAdapter):
    """The same on a cluster, whose client asks the nodes themselves where they are."""

    def _connected(self, **options: Any) -> redis.RedisCluster:
        proxied = (self.proxy.host, self.proxy.port)
        return redis.RedisCluster(*proxied, address_remap=lambda _: proxied, client_name=self._prefix, **options)

    def pools(self) -> list[Any]:
        client: Any = self.client
        return [node.redis_connection.connection_pool for node in client.get_nodes() if node.redis_connection]


class BulkClusterAdapter(ClusterAdapter):
    """And in bulk."""

    bulk = True


def _made(key: str) -> Resource:
    return {"total": 0}


@contextmanager
def _fresh(url: str) -> Iterator[str]:
    prefix = f"{uuid4().hex}:"
    yield f"{url}#{prefix}"
    with connected(url) as client:
        _clear(client, prefix)


def _clear(client: Any, prefix: str) -> None:
    for name in client.scan_iter(match=f"*{prefix}*", count=1000):
        client.delete(name)


@contextmanager
def _opened(kind: type[RedisAdapter], address: str) -> Iterator[RedisAdapter]:
    server = urlsplit(address)
    assert server.hostname is not None
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy((server.hostname, server.port or 6379)))
        adapter = kind(address, proxy)
        stack.callback(adapter.close)
        yield adapter


def _case(name: str, url: Callable[[], str], kind: type[RedisAdapter], *, can_restart: bool) -> Case:
    def fresh(_: Path) -> AbstractContextManager[str]:
        return _fresh(url())

    def opens(address: str) -> AbstractContextManager[Adapter]:
        return _opened(kind, address)

    return Case(
        name=name,
        fresh=fresh,
        opens=opens,
        has_across=kind is BulkAdapter,  # in a cluster, keys need a common tag
        has_proxy=True,
        can_corrupt=True,
        can_restart=can_restart,
        knows_outcome=True,
        slow_steps=("load", "commit"),
        nul_in_keys=True,
        longest_key=100_000,
        marks=(pytest.mark.variants,) if kind is BulkClusterAdapter else (),
    )


CASES = (
    _case("redis", redis_url, RedisAdapter, can_restart=GIVEN is None),
    _case("redis-reuse", redis_url, ReusingAdapter, can_restart=GIVEN is None),
    _case("redis-bulk", redis_url, BulkAdapter, can_restart=GIVEN is None),
    # A node that comes back keeps its cluster down for two seconds.
    _case("redis-cluster", cluster_url, ClusterAdapter, can_restart=False),
    _case("redis-cluster-bulk", cluster_url, BulkClusterAdapter, can_restart=False),
)

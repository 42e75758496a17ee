"""The stores of docs/own-stores.md on the bench, each with its server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import boto3
from playhouse.pool import PooledPostgresqlDatabase
from pony import orm
from psycogreen.gevent import patch_psycopg  # type: ignore[import-untyped] # it has no types
from psycopg.conninfo import conninfo_to_dict
from pymemcache.client.base import Client, PooledClient

from examples.stores import with_dynamodb, with_memcached, with_peewee, with_pony
from geventbatch.testing import StoreBench
from tests.support.psycopg_bench import PsycopgBench, without_tls
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing._proxy import Endpoint


HOST: Final = "127.0.0.1"

TABLE: Final = "accounts"
"""In DynamoDB."""


class PeeweeBench(PsycopgBench):
    """On the same table as psycopg."""

    load_marker = b'"t1"."balance" FROM "account"'

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        how = settings(self.database, server)
        database = PooledPostgresqlDatabase(
            how.pop("dbname"), prefer_psycopg3=True, max_connections=self.max_batches, timeout=20, **how
        )
        try:
            yield with_peewee.Accounts(database)
        finally:
            database.close_all()


class PonyBench(PsycopgBench):
    """On the same table as psycopg."""

    load_marker = b'FROM "account"'

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        patch_psycopg()
        database = orm.Database()
        row = with_pony.define(database)
        database.bind("postgres", **settings(self.database, server))
        database.generate_mapping()
        try:
            yield with_pony.Accounts(database, row)
        finally:
            database.disconnect()


def settings(database: str, server: Endpoint | None) -> dict[str, Any]:
    """What a driver is told that takes each thing by its name."""
    return {**conninfo_to_dict(database), **without_tls(server)}


class MemcachedBench(StoreBench):
    """A document has a total."""

    load_marker = b"gets "
    save_marker = b"cas "

    def __init__(self, port: int) -> None:
        self.server = (HOST, port)
        self._port = port

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        assert isinstance(server, tuple)
        store = with_memcached.Documents(server)
        try:
            yield store
        finally:
            store.stopped()

    def add(self, resource: dict[str, int], amount: int, /) -> int:
        resource["total"] = resource.get("total", 0) + amount
        return resource["total"]

    def get(self, key: str, /) -> int | None:
        with self._beside() as client:
            found = client.get(key)
            return None if found is None else json.loads(found)["total"]

    def put(self, key: str, total: int, /) -> None:
        with self._beside() as client:
            client.set(key, json.dumps({"total": total}), noreply=False)

    @contextmanager
    def _beside(self) -> Iterator[Client]:
        client = Client((HOST, self._port))
        yield client
        client.close()


@contextmanager
def memcached() -> Iterator[int]:
    """The port of a new one."""
    port = free_port()
    user = ["-u", "nobody"] if os.getuid() == 0 else []
    with running(["memcached", "-l", HOST, "-p", str(port), *user], port):
        yield port


class DynamoDBBench(StoreBench):
    """An account in a table of a local server."""

    load_marker = b"GetItem"
    save_marker = b"PutItem"

    def __init__(self, port: int) -> None:
        self.server = (HOST, port)
        self._port = port

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        assert isinstance(server, tuple)
        store = with_dynamodb.Accounts(TABLE, max_batches=self.max_batches, **at(*server))
        try:
            yield store
        finally:
            store._client.close()

    def add(self, resource: with_dynamodb.Account, amount: int, /) -> int:
        return resource.add(amount)

    def get(self, key: str, /) -> int | None:
        with client(self._port) as beside:
            item = beside.get_item(TableName=TABLE, Key={"name": {"S": key}}, ConsistentRead=True).get("Item")
            return None if item is None else int(item["balance"]["N"])

    def put(self, key: str, total: int, /) -> None:
        with client(self._port) as beside:
            beside.update_item(
                TableName=TABLE,
                Key={"name": {"S": key}},
                UpdateExpression="SET balance = :total ADD version :one",
                ExpressionAttributeValues={":total": {"N": str(total)}, ":one": {"N": "1"}},
            )


def at(host: str, port: int) -> dict[str, Any]:
    """What `boto3.client` is told."""
    return {
        "endpoint_url": f"http://{host}:{port}",
        "region_name": "eu-central-1",
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
    }


@contextmanager
def client(port: int) -> Iterator[Any]:
    """One that sends again what failed."""
    made = boto3.client("dynamodb", **at(HOST, port))
    yield made
    made.close()


@contextmanager
def dynamodb() -> Iterator[int]:
    """The port of a new one: moto's, which is from PyPI, with the table."""
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)], port):
        with client(port) as beside:
            beside.create_table(
                TableName=TABLE,
                KeySchema=[{"AttributeName": "name", "KeyType": "HASH"}],
                AttributeDefinitions=[{"AttributeName": "name", "AttributeType": "S"}],
                BillingMode="PAY_PER_REQUEST",
            )
        yield port


def free_port() -> int:
    """One that nobody listens at."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    """While in the block, it runs and listens."""

    def listens() -> bool:
        with socket.socket() as found:
            return found.connect_ex((HOST, port)) == 0

    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(listens)
        yield
    finally:
        server.kill()
        server.wait()


# -- what the page warns of ---------------------------------------------------------------------------------------


class SendsAgainBench(DynamoDBBench):
    """Its client is as boto3 makes it."""

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        with super().open_store(server) as store:
            store._client.close()
            assert isinstance(server, tuple)
            store._client = boto3.client("dynamodb", **at(*server))
            yield store


class AddsWithoutAskingBench(MemcachedBench):
    """It says nothing of ``noreply``."""

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        with super().open_store(server) as store:
            store._idle += [AsItComes((HOST, self._port)) for _ in range(self.max_batches)]
            yield store


class AsItComes(Client):  # type: ignore[misc] # pymemcache has no types
    """A client that is told nothing of ``noreply``."""

    def add(self, key: str, value: str, *, noreply: bool) -> Any:
        return super().add(key, value)


class PooledClientBench(MemcachedBench):
    """It lends what pymemcache's own pool gives."""

    @contextmanager
    def open_store(self, server: Endpoint | None, /) -> Iterator[Any]:
        assert isinstance(server, tuple)
        pool = PooledClient(server, max_pool_size=self.max_batches)

        class Store(with_memcached.Documents):
            @contextmanager
            def _lent(self) -> Iterator[Any]:
                yield pool

        try:
            yield Store(server)
        finally:
            for lost in pool.client_pool.used:
                lost.close()
            pool.close()

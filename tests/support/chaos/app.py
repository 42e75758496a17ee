"""The application that is broken on purpose: a list of entries at each key, to which a call appends one name.

A name that was applied twice is there twice. In SQL a row beside the resource has to tell the same story. If it is told
to, each entry is a line of an account, and calls move money between several of them.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import redis
import sqlalchemy as sa

from geventbatch import BatchError, BatchTimeout, Processor, current_batch
from geventbatch._batch import batch_at_hand
from geventbatch.integrations.wsgi import Answer, ErrorAnswers
from geventbatch.stores import RedisStore, Reuse
from tests.support.chaos.mutants import mutate
from tests.support.chaos.settings import DEADLINES, settings
from tests.support.chaos.tables import ENTRIES, Entries, Resource, add_line, documents, mapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIEnvironment

CONNECTIONS = 10
TOLD = settings()
PATIENCE = 3 if TOLD.store.startswith("mariadb") else 1
"""A save of many documents is as many round trips there, each of them through the proxy."""
POOLS: list[Any] = []
"""Of connections to the server."""


def open_resource() -> Any:
    """A store as the driver has named it."""
    server, *form, mode = TOLD.store.split("-")
    if server == "redis":
        ttl = 86_400.0 if TOLD.idempotent else None
        client = redis.Redis.from_url(TOLD.url)
        POOLS.append(client.connection_pool)
        reuse = Reuse() if mode == "reuse" else None
        return RedisStore(client, missing=lambda _: [], idempotency_ttl=ttl, reuse_resource=reuse)
    if server == "mariadb":
        told: dict[str, object] = {"connect_timeout": 2}
    else:  # unencrypted and unprepared, so that the proxy sees what is sent
        told = {"sslmode": "disable", "gssencmode": "disable", "prepare_threshold": None, "connect_timeout": 2}
    engine = sa.create_engine(TOLD.url, connect_args=told, pool_size=CONNECTIONS, max_overflow=0)
    POOLS.append(engine.pool)
    return (mapped if form else documents)(engine, mode, idempotent=TOLD.idempotent)


def connections() -> int:
    """How many there are to the server."""
    if TOLD.store.startswith("redis"):
        return sum(len(pool._available_connections) + len(pool._in_use_connections) for pool in POOLS)
    return sum(pool.checkedin() + pool.checkedout() for pool in POOLS)


if TOLD.mutant is not None:
    mutate(TOLD.mutant)


PROCESSORS: dict[str, Processor[Entries | Resource]] = {
    name: Processor(
        open_resource=open_resource(),
        min_duration=0,
        max_duration=seconds * PATIENCE,
        max_attempts=30,
        max_batches=CONNECTIONS,
        max_pending=TOLD.max_pending,
        max_batch_size=TOLD.max_batch_size,
    )
    for name, seconds in DEADLINES.items()
}


class InsufficientFunds(Exception):
    """What a transfer raises half-way."""


def add(resource: Entries | Resource, name: str) -> list[int]:
    """Give the place that it has: the first one is 1."""
    if TOLD.transfers:
        return move((resource,), name, 0)
    with entries_of(resource) as entries:
        entries.append(name)
    add_rows(name)
    return [len(entries)]


def move(resources: tuple[Entries | Resource, ...], name: str, amount: int, fails: bool = False) -> list[int]:
    """Take from the first account what each of the others gets, and give the places of the lines."""
    places = []
    for number, resource in enumerate(resources):
        if fails and number == len(resources) - 1:
            raise InsufficientFunds
        with entries_of(resource) as account:
            add_line(account, name, amount if number else -amount * (len(resources) - 1))
        places.append(len(account))
    add_rows(name)
    return places


@contextmanager
def entries_of(resource: Entries | Resource) -> Iterator[Entries]:
    """Give what is changed in place; an attribute sees only what is assigned."""
    entries = [*resource.state] if isinstance(resource, Resource) else resource
    yield entries
    if isinstance(resource, Resource):
        resource.state = entries


def add_rows(name: str) -> None:
    """Add the rows beside the resources that tell the same story."""
    batch = batch_at_hand()
    if TOLD.rows and getattr(batch.scope, "takes_rows", False):
        for key in batch.keys:
            batch.add_row((ENTRIES, {"key": key, "name": name}))


def remove(resource: Entries | Resource) -> None:
    current_batch().delete()


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    asked = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    processor: Any = PROCESSORS[asked["deadline"]]
    options = {name: asked[name] for name in ("start_timeout", "idempotency_key") if name in asked}
    keys, status, told = asked["keys"], "200 OK", {}
    try:
        if "name" not in asked:
            processor.run(*keys, remove, **options)
        elif len(keys) == 1:
            told["places"] = processor.run(*keys, add, asked["name"], **options)
        else:
            told["places"] = processor.run_across(
                keys, move, asked["name"], asked["amount"], asked.get("fails", False), **options
            )
    except InsufficientFunds:
        status, told = "409 Conflict", {"error": "InsufficientFunds", "retry_safe": True}
    body = json.dumps(told).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


class Answers(ErrorAnswers):
    """Tells clients, who count them, which error it was."""

    def answer(self, error: BatchError) -> Answer:
        phase = f" in {error.phase}" if isinstance(error, BatchTimeout) else ""
        return replace(super().answer(error), error=type(error).__name__ + phase)


app = Answers(application)

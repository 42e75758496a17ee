"""Stores of documents, and in Redis, of all kinds of states, and what operations do to those: for tests of undoing."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

from geventbatch import Processor
from geventbatch.stores import RedisStore, Reuse, SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.redis_server import connected, redis_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

METADATA = sa.MetaData()
EVENTS = sa.Table("events_undone", METADATA, sa.Column("id", sa.Integer, primary_key=True), sa.Column("text", sa.Text))


class InText(TypeDecorator[Any]):
    """JSON in a text, by a type of the user's own, which hands out what it has made of it."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return json.loads(value)


class OwnJSON(sa.JSON):
    """Of which nobody knows what it makes of a text."""

    cache_ok = True


class Train:
    """A resource of the user's own, with a state that is not saved."""

    def __init__(self, total: int = 0, seats: dict[str, list[str]] | None = None) -> None:
        self.total = total
        self.seats = seats or {}
        self.noted: list[str] = []

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def plain(self) -> dict[str, Any]:
        return {"total": self.total, "seats": self.seats}

    @staticmethod
    def encode(train: Train) -> str:
        return json.dumps(train.plain())

    @staticmethod
    def decode(text: str | bytes) -> Train:
        return Train(**json.loads(text))


def same(value: Any) -> Any:
    return value


KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "JSON": {"state_type": sa.JSON(), "encode": same, "decode": same},
    "JSONB": {"state_type": JSONB(), "encode": same, "decode": same},
    "own JSON": {"state_type": OwnJSON(), "encode": same, "decode": same},
    "JSON in text": {"state_type": InText(), "encode": same, "decode": same},
    "pickled": {"state_type": sa.PickleType(), "encode": same, "decode": same},
    "object": {"encode": Train.encode, "decode": Train.decode},
}


class Kind(NamedTuple):
    server: Any
    state: str = "text"
    mode: Any = None
    bulk: bool = False
    reuse: bool = False

    def __str__(self) -> str:
        how = (self.mode or "", "bulk" if self.bulk else "", "reuse" if self.reuse else "")
        return "-".join(part for part in (self.server, self.state, *how) if part).replace(" ", "_")


class Place:
    """A store of that kind, and what is saved."""

    def __init__(self, kind: Kind, open_store: Callable[..., Any]) -> None:
        self.kind = kind
        self._open_store = open_store
        self.attempts = 0
        self.batches = 0

    def store(self, **options: Any) -> Any:
        if self.kind.reuse:
            options["reuse_resource"] = Reuse()
        return self._open_store(**{"missing": self.made, **KINDS[self.kind.state], **options})

    def made(self, _: str) -> Any:
        return Train() if self.kind.state == "object" else {"total": 0, "seats": {}}

    @contextmanager
    def opened(self, store: Any = None, **options: Any) -> Iterator[Processor[Any]]:
        """A processor whose batches take as many operations as come in 50 ms; its attempts are counted."""
        store = self.store() if store is None else store
        opens: Any = {"open_resources": store.open_resources} if self.kind.bulk else {"open_resource": store}
        with Processor(**opens, **{"min_duration": 0.05, "max_duration": 30, **options}) as processor:
            metrics = processor.subscribe_batch_metrics()
            yield processor
            processor.stop()
            found = list(metrics)
        self.batches, self.attempts = len(found), sum(one.attempts for one in found)


def sql_place(kind: Kind, directory: Path) -> Iterator[Place]:
    with fresh(kind.server, directory) as address:
        engine = PLACES[kind.server](address).beside()

        def open_store(**options: Any) -> Any:
            outcomes = None if kind.bulk else idempotency_table("outcomes_undone")
            store = SQLAlchemyStore.documents(engine, "undone", mode=kind.mode, idempotency=outcomes, **options)
            store.create_table()
            return store

        METADATA.create_all(engine)
        place = Place(kind, open_store)
        place.engine = engine  # type: ignore[attr-defined]
        yield place
        engine.dispose()


def redis_place(kind: Kind) -> Iterator[Place]:
    with connected(redis_url()) as client:
        prefix = f"{uuid4().hex}:"
        yield Place(kind, lambda **options: RedisStore(client, prefix=prefix, **options))
        for name in client.scan_iter(f"*{prefix}*", count=1000):
            client.delete(name)


ALL = [
    *(Kind("sqlite", state) for state in KINDS),
    Kind("sqlite", bulk=True),
    Kind("sqlite", reuse=True),
    Kind("sqlite", "object", reuse=True),
    Kind("sqlite", "JSON", bulk=True),
    *(Kind("postgresql", state) for state in ("JSON", "JSONB", "text", "object", "own JSON")),
    Kind("postgresql", mode="version"),
    Kind("postgresql", "JSONB", mode="version"),
    Kind("postgresql", mode="version", reuse=True),
    Kind("postgresql", bulk=True),
    Kind("postgresql", "JSONB", mode="version", bulk=True),
    Kind("redis"),
    Kind("redis", "object"),
    Kind("redis", bulk=True),
    Kind("redis", "object", bulk=True),
    Kind("redis", reuse=True),
]
ON_MARIADB = [
    *(Kind("mariadb", state) for state in ("JSON", "text", "object", "JSON in text")),
    Kind("mariadb", mode="version", reuse=True),
    Kind("mariadb", "JSON", mode="version", bulk=True),
]


def over(*kinds: Kind) -> pytest.MarkDecorator:
    """Only over these."""
    return pytest.mark.parametrize("place", kinds, ids=str, indirect=True)


PARAMETERS = [*ALL, *(pytest.param(kind, marks=pytest.mark.mariadb) for kind in ON_MARIADB)]
"""Of a fixture."""


def opened_place(kind: Kind, directory: Path) -> Iterator[Place]:
    yield from redis_place(kind) if kind.server == "redis" else sql_place(kind, directory)


# -- operations -------------------------------------------------------------------------------------------------


class NotEnough(Exception):
    pass


def take(resource: Any, amount: int) -> int:
    resource["total"] -= amount
    if resource["total"] < 0:
        raise NotEnough(amount)
    return int(resource["total"])


def put(resource: Any, amount: int) -> int:
    resource["total"] += amount
    return int(resource["total"])


def book(resource: Any, seat: str, name: str) -> list[str]:
    found: list[str] = resource["seats"].setdefault(seat, [])
    found.append(name)
    return found


def spoil(resource: Any, seat: str) -> None:
    """Change everything, and raise."""
    resource["seats"][seat].clear()
    resource["seats"]["nobody's"] = resource["seats"].pop(seat)
    resource["total"] = {"of": resource["seats"]}
    resource["seats"] = [1, 2, {"deep": [resource["total"]]}]
    raise NotEnough(seat)


def look(resource: Any) -> Any:
    return copy.deepcopy({"total": resource["total"], "seats": resource["seats"]})


def together(processor: Processor[Any], *runs: tuple[Any, ...], key: str = "k") -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, *run) for run in runs]
    gevent.joinall(callers)
    return [caller.value for caller in callers]


def shown(answers: list[Any]) -> list[Any]:
    return [repr(answer) if isinstance(answer, Exception) else answer for answer in answers]

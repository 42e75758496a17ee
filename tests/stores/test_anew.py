"""A document that was deleted and made anew is another one, though its version begins again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from gevent.event import Event
from sqlalchemy.dialects.postgresql import JSONB

from geventbatch import Processor, current_batch
from geventbatch.stores import Reuse, SQLAlchemyStore
from tests.stores.test_stores import spawned
from tests.support.adapters.sqlalchemy import PLACES, fresh

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVERS = [
    "sqlite",
    "postgresql",
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.fixture(params=SERVERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    with fresh(request.param, tmp_path) as address:
        engine = PLACES[request.param](address).beside()
        yield engine
        engine.dispose()


def same(value: Any) -> Any:
    return value


KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "short text": {"state_type": sa.String(200)},
    "bytes": {
        "state_type": sa.LargeBinary(),
        "encode": lambda value: json.dumps(value).encode(),
        "decode": json.loads,
    },
    "pickle": {"state_type": sa.PickleType(), "encode": json.dumps, "decode": json.loads},
    "JSON": {"state_type": sa.JSON(), "encode": same, "decode": same},
    "JSONB": {"state_type": sa.JSON().with_variant(JSONB(), "postgresql"), "encode": same, "decode": same},
    "kept": {"reuse_resource": Reuse()},
}

OVER_KINDS = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in {"text", "pickle", "JSONB"} else pytest.mark.variants) for kind in KINDS],
)


def documents(engine: sa.Engine, kind: str) -> SQLAlchemyStore[Any]:
    store = SQLAlchemyStore.documents(engine, "anew", mode="version", missing=lambda _: [], **KINDS[kind])
    store.create_table()
    return store


def processor(store: SQLAlchemyStore[Any], form: str) -> Processor[Any]:
    opens: Any = {"open_resources": store.open_resources} if form == "bulk" else {"open_resource": store}
    return Processor(**opens, min_duration=0, max_duration=30)


def put(resource: list[str], mark: str) -> list[str]:
    resource.append(mark)
    return list(resource)


def delete(_: Any) -> None:
    current_batch().delete()


class Slow:
    """An operation that waits the first time, when it has been loaded for."""

    def __init__(self, then: Any) -> None:
        self.then = then
        self.loaded, self.goes_on = Event(), Event()

    def __call__(self, resource: Any) -> Any:
        self.loaded.set()
        self.goes_on.wait()
        return self.then(resource)


@pytest.mark.parametrize("form", ["one", "bulk"])
@OVER_KINDS
def test_a_batch_that_has_loaded_the_old_one_is_replayed(engine: sa.Engine, kind: str, form: str) -> None:
    store, other = documents(engine, kind), documents(engine, kind)  # of two processes
    slow = Slow(lambda resource: put(resource, "slow"))
    with processor(store, form) as one, processor(other, form) as two:
        one.run("k", put, "old")
        late = spawned(one.run, "k", slow)
        slow.loaded.wait()
        two.run("k", delete)
        two.run("k", put, "new")
        slow.goes_on.set()
        assert late.get() == ["new", "slow"]
        assert two.run("k", list) == ["new", "slow"]


@pytest.mark.parametrize("form", ["one", "bulk"])
@pytest.mark.parametrize("kind", ["text"])
def test_a_batch_that_was_to_delete_the_old_one_is_replayed(engine: sa.Engine, kind: str, form: str) -> None:
    store, other = documents(engine, kind), documents(engine, kind)
    seen: list[Any] = []

    def delete_what_is_old(resource: list[str]) -> None:
        seen.append(list(resource))
        if resource == ["old"]:
            current_batch().delete()

    slow = Slow(delete_what_is_old)
    with processor(store, form) as one, processor(other, form) as two:
        one.run("k", put, "old")
        late = spawned(one.run, "k", slow)
        slow.loaded.wait()
        two.run("k", delete)
        two.run("k", put, "new")
        slow.goes_on.set()
        late.get()
        assert seen == [["old"], ["new"]]
        assert two.run("k", list) == ["new"]


@pytest.mark.parametrize("kind", ["text", "JSON"])
def test_so_is_one_that_somebody_else_has_made_by_statements_of_his_own(engine: sa.Engine, kind: str) -> None:
    store = documents(engine, kind)
    slow = Slow(lambda resource: put(resource, "slow"))
    with processor(store, "one") as one:
        one.run("k", put, "old")
        late = spawned(one.run, "k", slow)
        slow.loaded.wait()
        with engine.begin() as connection:
            connection.execute(sa.delete(store.table))
            state: Any = ["new"] if kind == "JSON" else '["new"]'
            connection.execute(sa.insert(store.table).values(key="k", state=state, version=1))
        slow.goes_on.set()
        assert late.get() == ["new", "slow"]


@pytest.mark.parametrize("form", ["one", "bulk"])
@OVER_KINDS
def test_what_nobody_else_touches_is_saved_at_once(engine: sa.Engine, kind: str, form: str) -> None:
    with processor(documents(engine, kind), form) as one:
        metrics = one.subscribe_batch_metrics()
        for count in range(1, 5):
            assert len(one.run("k", put, f"ä\ud83d\ude00 {count} "[:1])) == count
        one.run("k", delete)
    assert [metric.attempts for metric in metrics] == [1] * 5

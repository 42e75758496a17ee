"""In a bulk too, whatever is said to a value of one key is the error of the operation that brought it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, IntegrityError

from geventbatch import Processor, ResourceMissing, current_batch
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVERS = [
    "sqlite",
    "postgresql",
    pytest.param("postgresql, statement by statement", marks=pytest.mark.variants),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]

KEYS = [f"n{number}" for number in range(40)]

METADATA = sa.MetaData()
NOTES = sa.Table("notes_of_bulks", METADATA, sa.Column("text", sa.String(20), primary_key=True))


class Place:
    def __init__(self, engine: sa.Engine, *, pipeline: bool) -> None:
        self.engine = engine
        self._pipeline = pipeline
        METADATA.create_all(engine)

    def store(self, mode: Any, **options: Any) -> SQLAlchemyStore[Any]:
        if self.engine.dialect.name == "sqlite":
            mode = "version"
        store = SQLAlchemyStore.documents(
            self.engine, "refused", mode=mode, missing=lambda _: {"n": 0}, pipeline=self._pipeline, **options
        )
        state = "state" if self.engine.dialect.name != "postgresql" else "CAST(state AS text)"
        store.table.append_constraint(sa.CheckConstraint(f"{state} NOT LIKE '%bad%'", name="nothing_bad"))
        store.create_table()
        return store


@pytest.fixture(params=SERVERS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    server, _, how = request.param.partition(", ")
    with fresh(server, tmp_path) as address:
        engine = PLACES[server](address).beside()
        yield Place(engine, pipeline=not how)
        engine.dispose()


def same(value: Any) -> Any:
    return value


def put(document: dict[str, Any], what: Any) -> int:
    document["n"] += 1
    document.setdefault("all", []).append(what)
    return int(document["n"])


def note(document: dict[str, Any], what: Any) -> int:
    current_batch().add_row((NOTES, {"text": what}))
    return put(document, "fine")


def together(opened: Processor[Any], runs: dict[str, list[tuple[Any, ...]]]) -> dict[str, list[Any]]:
    callers = {key: [gevent.spawn(answer_of, opened.run, key, *run) for run in some] for key, some in runs.items()}
    gevent.joinall([caller for some in callers.values() for caller in some])
    return {key: [caller.value for caller in some] for key, some in callers.items()}


def processor(store: SQLAlchemyStore[Any]) -> Processor[Any]:
    return Processor(open_resources=store.open_resources, min_duration=0.05, max_duration=30, workers=1, max_batches=1)


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("kind", ["text", "JSON"])
def test_many_keys_may_have_something_that_is_refused(place: Place, mode: str, kind: str) -> None:
    options: dict[str, Any] = {}
    if kind == "JSON":
        column: Any = JSONB() if place.engine.dialect.name == "postgresql" else sa.JSON()
        options = {"state_type": column, "encode": same, "decode": same}
    bad: list[Any] = ["bad", object(), {1: 2}, ("a",)]
    if place.engine.dialect.name == "postgresql" and kind == "JSON":
        bad += ["\0", "\ud800"]
    with processor(place.store(mode, **options)) as opened:
        for turn in (0, 1):
            runs = {
                key: [(put, "fine"), (put, bad[number % len(bad)]), (put, "fine")] if number % 3 else [(put, "fine")]
                for number, key in enumerate(KEYS)
            }
            answers = together(opened, runs)
            for number, key in enumerate(KEYS):
                if not number % 3:
                    assert answers[key] == [turn + 1]
                    continue
                first, refused, last = answers[key]
                assert (first, last) == (2 * turn + 1, 2 * turn + 2)
                assert isinstance(refused, (DBAPIError, TypeError)), refused
                assert isinstance(refused, TypeError) == (bad[number % len(bad)] not in ("bad", "\0", "\ud800"))


def test_rows_beside_one_key_are_refused_for_that_alone(place: Place) -> None:
    with processor(place.store("lock")) as opened:
        assert opened.run("first", note, "taken") == 1
        runs = {key: [(note, key if number % 4 else "taken"), (put, "fine")] for number, key in enumerate(KEYS)}
        answers = together(opened, runs)
        for number, key in enumerate(KEYS):
            if number % 4:
                assert answers[key] == [1, 2]
            else:
                assert isinstance(answers[key][0], DBAPIError)
                assert answers[key][1] == 1
    with place.engine.connect() as connection:
        texts = connection.scalars(sa.select(NOTES.c.text)).all()
    assert sorted(texts) == sorted(["taken", *(key for number, key in enumerate(KEYS) if number % 4)])


def test_a_key_that_is_not_there_is_missing_alone(place: Place) -> None:
    store = SQLAlchemyStore.documents(place.engine, "refused")
    place.store("lock")
    with processor(store) as opened:
        answers = together(opened, {key: [(put, 1)] for key in KEYS})
    assert {type(answer) for some in answers.values() for answer in some} == {ResourceMissing}


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_an_operation_with_an_idempotency_key_is_told_which_constraint_refuses_it_at_commit(
    tmp_path: Path, mode: Any
) -> None:
    def name(document: dict[str, Any], key: str) -> str:
        document["key"] = key
        return key

    with fresh("postgresql", tmp_path) as address:
        engine = PLACES["postgresql"](address).beside()
        outcomes = idempotency_table("outcomes_of_bulks")
        outcomes.create(engine)
        store = SQLAlchemyStore.documents(engine, "refused", mode=mode, idempotency=outcomes)
        store.table.append_constraint(sa.UniqueConstraint("state", deferrable=True, initially="DEFERRED"))
        store.create_table()
        with engine.begin() as connection:
            for key in ("first", "second"):
                connection.execute(store.table.insert(), {"key": key, "state": f'{{"key": "{key}"}}', "version": 1})
        with processor(store) as opened:
            error = answer_of(opened.run, "second", name, "first", idempotency_key="once")
            assert isinstance(error, IntegrityError)
            assert "duplicate key value violates unique constraint" in str(error)
            assert opened.run("second", name, "third", idempotency_key="once") == "third"
        engine.dispose()

"""The bulk forms of the stores: what is of many keys. For one key there is the contract (test_stores.py)."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

from geventbatch import LoadFailed, Processor, ResourceMissing, current_batch
from geventbatch.stores import RedisStore, Reuse, SQLAlchemyStore
from tests.stores.test_stores import (
    adapter,  # noqa: F401 - a fixture
    all_of,
    assert_as_good_as_new,
    class_of,
    delete,
    over,
    place,  # noqa: F401 - a fixture
    proxy_of,
    spawned,
)
from tests.support.adapters.sqlalchemy import PLACES, PostgresPlace, Purse, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.adapters.base import Adapter

over_bulk = over(lambda case: "bulk" in case.name)
over_unlocked = over(lambda case: "bulk" in case.name and not case.has_locks)

IN_ONE_MESSAGE = {
    "redis-bulk",
    "sqlalchemy-document-lock-postgresql-bulk",
    "sqlalchemy-document-version-postgresql-bulk",
}
"""Cases in which a save is one message."""

CLAIMED = {"sqlalchemy-mapped-lock-postgresql-bulk", "sqlalchemy-mapped-xmin-postgresql-bulk"}
"""Cases in which a save is one message, or two in mode "version"; unless rows are instances."""

LOADS = {"redis": b"'HMGET'", "sqlalchemy": b"FROM documents", "django": b"FROM ", "sql": b"FROM purses"}
"""By the first part of a case's name: what is in the message of a load."""

KEYS = [f"n{number}" for number in range(20)]


def bulk(adapter: Adapter, **options: Any) -> Processor[Any]:  # noqa: F811
    """A processor that runs all that comes together as one bulk."""
    return adapter.processor(**{"workers": 1, "max_batches": 1, **options})


def together(processor: Processor[Any], runs: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What the callers of these operations were told, one of each key, in one bulk."""
    callers = {key: spawned(processor.run, key, *run) for key, run in runs.items()}
    return dict(zip(callers, all_of(list(callers.values())), strict=True))


def put_all(adapter: Adapter, total: int = 10) -> None:  # noqa: F811
    for key in KEYS:
        adapter.put(key, total)


def totals(adapter: Adapter) -> list[int | None]:  # noqa: F811
    return [adapter.get(key) for key in KEYS]


class Between:
    """An operation of one key of a bulk that lets something happen between its load and its save, once."""

    def __init__(self, happens: Callable[[], object], then: Callable[[Any], Any]) -> None:
        self._happens: Callable[[], object] | None = happens
        self._then = then

    def __call__(self, resource: Any) -> Any:
        happens, self._happens = self._happens, None
        if happens is not None:
            gevent.spawn(happens).get()  # not as the operation, which may write to no other database
        return self._then(resource)


# -- together ---------------------------------------------------------------------------------------------------


@over(lambda case: case.name in {*IN_ONE_MESSAGE, *CLAIMED})
def test_many_keys_are_one_round_trip_for_the_load_and_one_for_the_save(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    with bulk(adapter) as processor:
        together(processor, dict.fromkeys(KEYS[:2], (adapter.add, 1)))  # the first one asks which tables have triggers
        before = proxy_of(adapter).round_trips
        answers = together(processor, dict.fromkeys(KEYS, (adapter.add, 1)))
        assert proxy_of(adapter).round_trips == before + adapter.trips
    assert list(answers.values()) == [*[12] * 2, *[11] * 18] == totals(adapter)


@over(lambda case: case.name in IN_ONE_MESSAGE and case.has_rows)
def test_rows_beside_many_keys_cost_no_round_trip_of_their_own(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    with bulk(adapter) as processor:
        processor.run(KEYS[0], adapter.add, 1)
        before = proxy_of(adapter).round_trips
        together(processor, {key: (adapter.add_with_row, 1, key) for key in KEYS})
        assert proxy_of(adapter).round_trips == before + 2
    assert sorted(adapter.rows()) == sorted(KEYS)


@over_bulk
def test_in_one_bulk_documents_are_made_and_changed_and_deleted_and_left_alone(adapter: Adapter) -> None:  # noqa: F811
    for key in KEYS[:15]:
        adapter.put(key, 10)
    runs: dict[str, tuple[Any, ...]] = dict.fromkeys(KEYS[:5], (adapter.add, 1))
    runs |= dict.fromkeys(KEYS[5:10], (delete,))
    runs |= dict.fromkeys(KEYS[10:15], (adapter.total,))
    runs |= dict.fromkeys(KEYS[15:], (adapter.add, 3))
    with bulk(adapter, missing="make") as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, runs)
    assert list(answers.values()) == [*[11] * 5, *[None] * 5, *[10] * 5, *[3] * 5]
    assert totals(adapter) == [*[11] * 5, *[None] * 5, *[10] * 5, *[3] * 5]
    assert [metric.attempts for metric in metrics] == [1] * 20


@over_bulk
def test_keys_of_whatever_characters_are_loaded_saved_made_and_deleted(adapter: Adapter) -> None:  # noqa: F811
    keys = ['"', "\\", '\\"', ",", "{}", "NULL", "it's", "a\nb", "Zürich 🚆", " lead", "$1", "%s", ":x", "%%", '","']
    for key in keys:
        adapter.put(key, 10)
    with bulk(adapter, missing="make") as processor:
        assert list(together(processor, dict.fromkeys(keys, (adapter.add, 1))).values()) == [11] * len(keys)
        assert [adapter.get(key) for key in keys] == [11] * len(keys)
        together(processor, dict.fromkeys(keys, (delete,)))
        assert [adapter.get(key) for key in keys] == [None] * len(keys)
        together(processor, dict.fromkeys(keys, (adapter.add, 3)))
        assert [adapter.get(key) for key in keys] == [3] * len(keys)


@over_bulk
def test_what_is_missing_and_what_cannot_be_decoded_fail_alone(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    adapter.remove(KEYS[3])
    adapter.corrupt(KEYS[7])
    with bulk(adapter) as processor:
        answers = list(together(processor, dict.fromkeys(KEYS, (adapter.add, 1))).values())
    assert isinstance(answers[3], ResourceMissing)
    assert isinstance(answers[7], LoadFailed)
    assert KEYS[7] in str(answers[7].__cause__)
    assert [answer for answer in answers if not isinstance(answer, Exception)] == [11] * 18
    adapter.put(KEYS[3], 11)
    adapter.put(KEYS[7], 11)
    assert totals(adapter) == [11] * 20


@over_bulk
def test_what_cannot_be_encoded_fails_alone(adapter: Adapter) -> None:  # noqa: F811
    def spoil(resource: Any) -> None:
        resource["total"] = object()

    put_all(adapter)
    with bulk(adapter) as processor:
        metrics = processor.subscribe_batch_metrics()
        *answers, spoiled = together(processor, dict.fromkeys(KEYS, (adapter.add, 1)) | {KEYS[-1]: (spoil,)}).values()
    assert [metric.attempts for metric in metrics] == [1] * 20
    assert answers == [11] * 19
    assert isinstance(spoiled, TypeError)
    assert totals(adapter) == [*answers, 10]


# -- who is faster ----------------------------------------------------------------------------------------------


@over_unlocked
def test_those_that_somebody_else_has_changed_are_replayed_and_the_others_are_not(adapter: Adapter) -> None:  # noqa: F811
    def change_some() -> None:
        adapter.put(KEYS[3], 100)
        adapter.put(KEYS[11], 200)

    put_all(adapter)
    runs: dict[str, tuple[Any, ...]] = dict.fromkeys(KEYS, (adapter.add, 1))
    runs[KEYS[0]] = (Between(change_some, lambda resource: adapter.add(resource, 1)),)
    with bulk(adapter, max_attempts=20) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = list(together(processor, runs).values())
    expected = [11] * 20
    expected[3], expected[11] = 101, 201
    assert answers == expected == totals(adapter)
    attempts = {metric.key: metric.attempts for metric in metrics}
    assert attempts == {key: 2 if key in {KEYS[3], KEYS[11]} else 1 for key in KEYS}


@over_unlocked
def test_those_that_somebody_else_has_deleted_are_missing_and_those_inserted_are_replayed(adapter: Adapter) -> None:  # noqa: F811
    def change_some() -> None:
        adapter.remove(KEYS[3])
        adapter.put("new", 100)

    put_all(adapter)
    runs: dict[str, tuple[Any, ...]] = dict.fromkeys([*KEYS, "new"], (adapter.add, 1))
    runs[KEYS[0]] = (Between(change_some, lambda resource: adapter.add(resource, 1)),)
    with bulk(adapter, missing="make", max_attempts=20) as processor:
        answers = together(processor, runs)
    assert answers == dict.fromkeys(KEYS, 11) | {KEYS[3]: 1, "new": 101}
    assert [*totals(adapter), adapter.get("new")] == list(answers.values())


@over(lambda case: case.name == "sqlalchemy-document-lock-postgresql-bulk")  # MariaDB locks what is not there too
def test_of_those_that_are_locked_a_new_one_that_somebody_inserts_is_replayed_alone(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    runs: dict[str, tuple[Any, ...]] = dict.fromkeys([*KEYS, "new"], (adapter.add, 1))
    inserted = Between(lambda: adapter.put("new", 100), lambda resource: adapter.add(resource, 1))
    runs[KEYS[0]] = (inserted,)
    with bulk(adapter, missing="make", max_attempts=20) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, runs)
    assert answers == dict.fromkeys(KEYS, 11) | {"new": 101}
    assert [*totals(adapter), adapter.get("new")] == list(answers.values())
    assert {metric.key for metric in metrics if metric.attempts > 1} == {"new"}


@over(lambda case: "bulk" in case.name and case.has_rows and not case.has_locks)
def test_rows_are_inserted_beside_those_that_are_saved_and_no_others(adapter: Adapter) -> None:  # noqa: F811
    def log(resource: Any, key: str) -> int:
        return adapter.add_with_row(resource, 0, f"{key} from {adapter.total(resource)}")

    put_all(adapter)
    runs: dict[str, tuple[Any, ...]] = {key: (log, key) for key in KEYS}
    runs[KEYS[0]] = (Between(lambda: adapter.put(KEYS[3], 100), lambda resource: log(resource, KEYS[0])),)
    with bulk(adapter, max_attempts=20) as processor:
        together(processor, runs)
    assert sorted(adapter.rows()) == sorted(f"{key} from {100 if key == KEYS[3] else 10}" for key in KEYS)


@over(lambda case: "bulk" in case.name and case.has_rows)
def test_a_row_that_violates_a_constraint_fails_its_own_key_only(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    texts = {key: key for key in KEYS} | {KEYS[13]: KEYS[2]}
    with bulk(adapter) as processor:
        answers = together(processor, {key: (adapter.add_with_row, 1, text) for key, text in texts.items()})
    culprits = [key for key, answer in answers.items() if isinstance(answer, Exception)]
    assert culprits == [KEYS[13]]
    assert class_of(answers[KEYS[13]]) == "IntegrityError"
    assert [adapter.get(key) for key in KEYS] == [10 if key in culprits else 11 for key in KEYS]
    assert sorted(adapter.rows()) == sorted(key for key in KEYS if key not in culprits)


@over(lambda case: "bulk" in case.name and case.has_rows and not case.has_locks)
def test_what_is_sent_again_since_some_have_lost_is_saved_whole_or_not_at_all(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    texts = {key: key for key in KEYS} | {KEYS[13]: KEYS[2]}
    runs: dict[str, tuple[Any, ...]] = {key: (adapter.add_with_row, 1, text) for key, text in texts.items()}
    first = Between(partial(adapter.put, KEYS[3], 100), lambda resource: adapter.add_with_row(resource, 1, KEYS[0]))
    with bulk(adapter, max_attempts=20) as processor:
        answers = together(processor, runs | {KEYS[0]: (first,)})
    assert class_of(answers[KEYS[13]]) == "IntegrityError"
    assert answers | {KEYS[13]: 10} == dict.fromkeys(KEYS, 11) | {KEYS[3]: 101, KEYS[13]: 10}
    assert totals(adapter) == list((answers | {KEYS[13]: 10}).values())
    assert sorted(adapter.rows()) == sorted(set(texts.values()))


@over_bulk
def test_processors_that_have_the_same_keys_at_once_lose_nothing_and_do_not_wait_for_each_other_in_a_circle(
    adapter: Adapter,  # noqa: F811
) -> None:
    dice = random.Random(7)
    put_all(adapter, 0)

    def call(processor: Processor[Any]) -> None:
        for _ in range(5):
            keys = [*KEYS, *(f"new {number}" for number in range(5))]
            dice.shuffle(keys)
            told = together(processor, dict.fromkeys(keys, (adapter.add, 1)))
            assert not [answer for answer in told.values() if isinstance(answer, Exception)]

    with (
        bulk(adapter, missing="make", max_attempts=200) as one,
        bulk(adapter, missing="make", max_attempts=200) as another,
    ):
        gevent.joinall([gevent.spawn(call, processor) for processor in (one, another)], raise_error=True)
    assert totals(adapter) == [10] * 20
    assert [adapter.get(f"new {number}") for number in range(5)] == [10] * 5


# -- when things break ------------------------------------------------------------------------------------------


@over(lambda case: case.name in {"redis-bulk", "redis-cluster-bulk"})
def test_what_is_no_hash_in_redis_fails_alone(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    redis_adapter: Any = adapter
    adapter.remove(KEYS[5])
    redis_adapter.direct.set(redis_adapter.name(KEYS[5]), "text")
    with bulk(adapter) as processor:
        answers = list(together(processor, dict.fromkeys(KEYS, (adapter.add, 1))).values())
    assert isinstance(answers.pop(5), LoadFailed)
    assert answers == [11] * 19


@over(lambda case: "bulk" in case.name and case.has_proxy)
def test_a_load_that_is_cut_off_is_tried_again(case: Any, adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    marker = b"FROM purses" if "mapped" in case.name else LOADS[case.name.partition("-")[0]]
    with bulk(adapter) as processor:
        processor.run(KEYS[0], adapter.total)
        rule = proxy_of(adapter).cut_before(marker)
        answers = together(processor, dict.fromkeys(KEYS, (adapter.add, 1)))
    assert rule.met == 1
    assert list(answers.values()) == [11] * 20 == totals(adapter)


@over(lambda case: "bulk" in case.name and case.has_proxy)
@pytest.mark.parametrize("changed", [False, True])
def test_when_the_answer_to_a_save_is_lost_every_key_is_told_the_truth(
    case: Any,
    adapter: Adapter,  # noqa: F811
    changed: bool,
) -> None:
    put_all(adapter, 9)
    proxy = proxy_of(adapter)
    with bulk(adapter, max_attempts=20) as processor:
        together(processor, dict.fromkeys(KEYS, (adapter.add, 1)))  # by whose marks a save in Redis is found
        for total, cut in ((11, proxy.cut_after), (12, proxy.cut_before)):
            rule = cut(adapter.commit_marker)
            runs: dict[str, tuple[Any, ...]] = dict.fromkeys(KEYS, (adapter.add, 1))
            if changed and not case.has_locks:
                here = total + 99
                put = partial(adapter.put, KEYS[3], here)
                runs[KEYS[0]] = (Between(put, lambda resource: adapter.add(resource, 1)),)
            answers = list(together(processor, runs).values())
            assert rule.met == 1
            found = totals(adapter)
            for answer, there in zip(answers, found, strict=True):
                assert answer == there or (isinstance(answer, Exception) and not case.knows_outcome)
            put_all(adapter, total)
    adapter.clear()
    assert_as_good_as_new(adapter)


# -- what is not there ------------------------------------------------------------------------------------------


def test_a_bulk_form_of_a_store_without_a_table_of_outcomes_refuses_an_idempotency_key_at_the_door() -> None:
    store = SQLAlchemyStore.documents(sa.create_engine("sqlite://"), "trains")
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=5) as processor:
        error = answer_of(processor.run, "k", dict.popitem, idempotency_key="a")
    assert isinstance(error, TypeError)
    assert "idempotency=…" in str(error)


def test_a_store_that_prepares_its_connections_for_each_key_has_no_bulk_form() -> None:
    store = SQLAlchemyStore.mapped(sa.create_engine("sqlite://"), Purse, prepare_connection=lambda *_: None)
    with pytest.raises(AttributeError, match="prepares the connection for each key"):
        _ = store.open_resources


def test_bulk_forms_say_of_what_they_are() -> None:
    import redis

    documents = SQLAlchemyStore.documents(sa.create_engine("sqlite://"), "trains")
    assert repr(documents.open_resources) == "<documents in bulk of trains>"
    mapped = SQLAlchemyStore.mapped(sa.create_engine("sqlite://"), Purse)
    assert repr(mapped.open_resources) == "<instances in bulk of Purse>"
    store: RedisStore[Any] = RedisStore(redis.Redis(), prefix="trains:")
    assert repr(store.open_resources) == f"<in bulk: {store!r}>"


# -- types of columns -------------------------------------------------------------------------------------------


class Short(TypeDecorator[str]):
    """A text of 80 characters, marked."""

    impl = sa.String(80)
    cache_ok = True

    @property
    def python_type(self) -> type[str]:
        return str

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str:
        return f"<{value}>"

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> str:
        return str(value[1:-1])


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    with fresh("postgresql", tmp_path) as address:
        found = PLACES["postgresql"](address)
        assert isinstance(found, PostgresPlace)
        engine = found.beside()
        with engine.begin() as connection:
            connection.execute(sa.text("DROP TABLE documents"))
        yield engine


def add_one(resource: list[int]) -> None:
    resource.append(1)


def same(value: Any) -> Any:
    return value


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize(
    "types",
    [
        {"key_type": sa.Integer()},
        {"key_type": Short()},
        {"state_type": Short()},
        {"state_type": sa.LargeBinary(), "encode": lambda value: repr(value).encode(), "decode": eval},
        {"state_type": JSONB(), "encode": same, "decode": same},
        {"state_type": sa.JSON(), "encode": same, "decode": same},
    ],
    ids=["integer key", "short key", "short state", "bytes", "JSONB", "JSON"],
)
def test_columns_may_have_any_type(engine: sa.Engine, mode: Any, types: dict[str, Any]) -> None:
    store = SQLAlchemyStore.documents(engine, "documents", mode=mode, missing=lambda _: {"total": 0}, **types)
    store.create_table()

    def add(resource: dict[str, Any], amount: int) -> int:
        resource["total"] += amount
        return int(resource["total"])

    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as processor:
        for total in (1, 2):
            answers = all_of([spawned(processor.run, key, add, 1) for key in ("1", "2", 3)])
            assert answers == [total] * 3
        assert all_of([spawned(processor.run, key, delete) for key in (1, "2")]) == [None] * 2
    with engine.begin() as connection:
        assert len(connection.execute(sa.select(store.table)).all()) == 1


def test_a_key_that_is_too_long_for_its_column_is_not_taken_for_a_shorter_one(engine: sa.Engine) -> None:
    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: [])
    store.create_table()
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as processor:
        processor.run("x" * 255, list.append, 1)
        assert isinstance(answer_of(processor.run, "x" * 256, list.append, 2), Exception)
        assert processor.run("x" * 255, len) == 1


def test_a_state_that_is_too_long_for_its_column_is_not_cut_off(engine: sa.Engine) -> None:
    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: [], state_type=Short())
    store.create_table()
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as processor:
        processor.run("k", list.append, 1)
        assert isinstance(answer_of(processor.run, "k", list.extend, [1] * 100), Exception)
        assert processor.run("k", lambda resource: resource) == [1]


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_rows_are_locked_in_the_order_of_their_keys(engine: sa.Engine, mode: Any) -> None:
    store = SQLAlchemyStore.documents(engine, "documents", mode=mode, missing=lambda _: [])
    store.create_table()
    sent = []
    sa.event.listen(engine, "before_cursor_execute", lambda *call: sent.append(call[2]))
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as processor:
        for operation in (add_one, add_one, delete):
            processor.run("k", operation)
    load, insert, _, update, _, deletion = (" ".join(statement.split()) for statement in sent)
    locked = "ORDER BY documents.key FOR UPDATE"
    assert load.endswith(locked) == (mode == "lock")
    assert "ORDER BY asked.key ON CONFLICT DO NOTHING" in insert
    assert f"{locked} OF documents)" in update
    assert f"{locked} OF documents)" in deletion


def test_beside_a_bulk_what_is_kept_by_the_store_of_one_key_is_compared(engine: sa.Engine) -> None:
    store = SQLAlchemyStore.documents(engine, "documents", mode="version", missing=lambda _: [], reuse_resource=Reuse())
    store.create_table()
    with (
        Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as many,
        Processor(open_resource=store, min_duration=0, max_duration=30) as one,
    ):
        for mark in range(0, 6, 2):
            many.run("k", list.append, mark)
            one.run("k", list.append, mark + 1)
        many.run("k", lambda _: current_batch().delete())
        many.run("k", list.append, 0)
        assert one.run("k", lambda resource: resource) == [0]


@over(lambda case: case.name == "sqlalchemy-document-version-postgresql-bulk")
def test_a_bulk_that_only_reads_writes_nothing(adapter: Adapter) -> None:  # noqa: F811
    put_all(adapter)
    rule = proxy_of(adapter).cut_before(b"COMMIT")
    with bulk(adapter) as processor:
        answers = together(processor, dict.fromkeys(KEYS, (adapter.total,)))
    assert list(answers.values()) == [10] * 20
    assert rule.met == 0

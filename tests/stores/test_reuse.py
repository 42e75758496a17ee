"""Stores that keep what they have saved (`reuse_resource`), beside the contract of all stores (test_stores.py).

There each such store is a case too, so that all of the contract is kept with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB

from geventbatch import LoadFailed, Processor, ResourceMissing
from geventbatch._core import process
from geventbatch._core.clock import clock
from geventbatch.stores import RedisStore, Reuse, SQLAlchemyStore
from geventbatch.stores._reuse import Kept
from tests.stores.test_stores import (
    Pause,
    adapter,  # noqa: F401 - a fixture
    all_of,
    assert_as_good_as_new,
    delete,
    keyed,
    over,
    place,  # noqa: F401 - a fixture
    processor,  # noqa: F401 - a fixture
    proxy_of,
    spawned,
)
from tests.support.adapters.base import TooLittle
from tests.support.adapters.redis import RedisAdapter
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from tests.support.adapters.base import Adapter

over_reusing = over(lambda case: "reuse" in case.name)
over_one_message = over(lambda case: case.name in {"sqlalchemy-document-reuse-postgresql", "redis-reuse"})


def trips(adapter: Adapter, run: Any, *args: Any) -> int:  # noqa: F811
    """How many round trips a batch takes, and with it nothing fails."""
    before = proxy_of(adapter).round_trips
    run("k", *args)
    return proxy_of(adapter).round_trips - before


@pytest.fixture
def warm(adapter: Adapter, processor: Processor[Any]) -> Processor[Any]:  # noqa: F811
    """A processor whose store has kept "k", with a total of 11."""
    assert processor.run("k", adapter.add, 1) == 11
    return processor


# -- what is skipped --------------------------------------------------------------------------------------------


@over_one_message
def test_a_batch_after_a_save_is_one_round_trip(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    assert [trips(adapter, warm.run, adapter.add, 1) for _ in range(3)] == [1, 1, 1]
    assert adapter.get("k") == 14


@over_one_message
def test_a_batch_that_changes_nothing_compares_and_what_is_kept_stays(
    adapter: Adapter,  # noqa: F811
    warm: Processor[Any],
) -> None:
    def refuse(resource: Any) -> None:
        raise LookupError("no")

    asked = [trips(adapter, warm.run, adapter.total)]
    asked += [trips(adapter, lambda *run: answer_of(warm.run, *run), refuse)]
    each = 1 if isinstance(warm._options.open_resource, RedisStore) else 2  # with the ROLLBACK, as ever
    assert [*asked, trips(adapter, warm.run, adapter.add, 1)] == [each, each, 1]
    assert adapter.get("k") == 12


@over_reusing
def test_what_an_operation_across_keys_has_saved_is_loaded_by_the_next_batch_and_costs_no_attempt(
    adapter: Adapter,  # noqa: F811
    warm: Processor[Any],
) -> None:
    metrics = warm.subscribe_batch_metrics()
    warm.run_across(["k"], lambda resources: adapter.add(resources[0], 1))
    assert [warm.run("k", adapter.add, 1) for _ in range(2)] == [13, 14]
    warm.stop()
    assert [metric.attempts for metric in metrics] == [1, 1, 1]
    assert adapter.get("k") == 14


@over_reusing
def test_no_batch_sees_the_resource_of_another_one(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    seen = warm.run("k", lambda resource: resource)
    adapter.add(seen, 1000)
    assert warm.run("k", adapter.add, 1) == 12
    assert adapter.get("k") == 12


@over_one_message
def test_a_store_that_was_not_told_to_keep_anything_loads(adapter: Adapter) -> None:  # noqa: F811
    adapter.put("k", 10)
    opened: Any = adapter
    if isinstance(opened, RedisAdapter):
        store: Any = RedisStore(opened.client, prefix=opened.name(""))
    else:
        store = SQLAlchemyStore.documents(opened.engine, "documents", mode="version")
    with Processor(open_resource=store, min_duration=0, max_duration=30) as plain:
        plain.run("k", adapter.add, 1)
        assert [trips(adapter, plain.run, adapter.add, 1) for _ in range(2)] == [2, 2]


@over_one_message
def test_a_batch_that_went_wrong_has_the_next_one_load(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    pause = Pause(lambda resource: adapter.add(resource, 1000))
    caller = spawned(warm.run, "k", pause)
    pause.reached.wait()
    worker: Any = next(iter(process.running))
    worker.kill()
    caller.join()
    assert trips(adapter, warm.run, adapter.add, 1) == 2
    assert adapter.get("k") == 12


@over_one_message
def test_when_its_processor_has_stopped_nothing_is_kept(adapter: Adapter) -> None:  # noqa: F811
    adapter.put("k", 10)
    store: Any = adapter.store()
    with Processor(open_resource=store, min_duration=0, max_duration=30) as stopping:
        stopping.run("k", adapter.add, 1)
        assert len(store._kept) == 1
    assert len(store._kept) == 0


# -- what somebody else has written -----------------------------------------------------------------------------


@over_reusing
def test_what_somebody_else_has_saved_since_is_loaded(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    metrics = warm.subscribe_batch_metrics()
    warm.run("k", adapter.add, 1)
    adapter.put("k", 100)
    assert warm.run("k", adapter.add, 1) == 101
    assert adapter.get("k") == 101
    warm.stop()
    assert [metric.attempts for metric in metrics] == [1, 2]


@over_reusing
def test_who_only_reads_is_told_what_somebody_else_has_saved(
    adapter: Adapter,  # noqa: F811
    warm: Processor[Any],
) -> None:
    adapter.put("k", 100)
    assert warm.run("k", adapter.total) == 100


@over_reusing
def test_an_operation_that_says_that_it_only_reads_is_told_so_too_and_saves_nothing(
    adapter: Adapter,  # noqa: F811
    warm: Processor[Any],
) -> None:
    adapter.put("k", 100)
    assert warm.run("k", adapter.total, read_only=True) == 100
    warm.run("k", adapter.add, 1)
    assert warm.run("k", adapter.add, 1, read_only=True) == 102  # which is a mistake
    assert adapter.get("k") == 101
    assert warm.run("k", adapter.total) == 101


@over_reusing
@pytest.mark.parametrize("clean_errors", [(Exception,), ()])
@pytest.mark.parametrize("idempotency_key", [None, "a"])
def test_no_error_is_answered_for_what_is_no_more(
    adapter: Adapter,  # noqa: F811
    clean_errors: Any,
    idempotency_key: str | None,
) -> None:
    adapter.put("k", 10)
    with adapter.processor(clean_errors=clean_errors) as processor:  # noqa: F811
        processor.run("k", adapter.add, 1)
        adapter.put("k", 100)
        assert keyed(processor, idempotency_key, adapter.take, 50) == 50
        error = answer_of(keyed, processor, idempotency_key and "b", adapter.take, 51)
    assert isinstance(error, TooLittle)
    assert adapter.get("k") == 50


@over_reusing
def test_an_operation_that_is_broken_costs_no_attempt_of_those_beside_it(adapter: Adapter) -> None:  # noqa: F811
    def break_off(resource: Any) -> None:
        adapter.add(resource, 1000)
        raise LookupError("half-way")

    adapter.put("k", 10)
    with adapter.processor(clean_errors=(), max_attempts=1, min_duration=0.02) as processor:  # noqa: F811
        processor.run("k", adapter.add, 1)
        callers = [spawned(processor.run, "k", *run) for run in ((adapter.add, 1), (break_off,), (adapter.add, 1))]
        first, broken, last = all_of(callers)
    assert (first, last) == (12, 13)
    assert isinstance(broken, LookupError)
    assert adapter.get("k") == 13


@over_reusing
def test_what_somebody_else_has_deleted_is_missing(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    adapter.remove("k")
    for operation in (adapter.total, lambda resource: adapter.take(resource, 1000), lambda r: adapter.add(r, 1)):
        assert isinstance(answer_of(warm.run, "k", operation), ResourceMissing)
    assert adapter.get("k") is None


@over_reusing
def test_what_was_deleted_is_not_kept(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    warm.run("k", delete)
    assert isinstance(answer_of(warm.run, "k", adapter.total), ResourceMissing)
    adapter.put("k", 5)
    assert warm.run("k", adapter.total) == 5


@over_reusing
def test_what_another_process_has_deleted_and_made_anew_is_another_one(adapter: Adapter) -> None:  # noqa: F811
    with adapter.processor(missing="make") as ours, adapter.processor(missing="make") as theirs:
        for run in range(3):
            assert ours.run("new", adapter.add, 1) == (1 if run == 0 else 6)
            theirs.run("new", delete)
            assert theirs.run("new", adapter.add, 5) == 5
        assert ours.run("new", adapter.total) == 5
    assert adapter.get("new") == 5


@over_reusing
def test_what_a_foreign_writer_has_deleted_and_made_anew_is_another_one(
    adapter: Adapter,  # noqa: F811
    processor: Processor[Any],  # noqa: F811
) -> None:
    assert processor.run("k", adapter.total) == 10
    adapter.remove("k")
    adapter.put("k", 100)
    assert processor.run("k", adapter.add, 1) == 101
    assert adapter.get("k") == 101


@over_reusing
def test_a_deletion_of_what_somebody_else_has_saved_is_of_that(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    def delete_if_it_is_empty(resource: Any) -> str:
        if adapter.total(resource):
            return "kept"
        delete(resource)
        return "deleted"

    warm.run("k", adapter.take, 11)
    adapter.put("k", 100)
    assert warm.run("k", delete_if_it_is_empty) == "kept"
    assert adapter.get("k") == 100


@over(lambda case: "reuse" in case.name and case.has_rows)
@pytest.mark.parametrize("amount", [0, 1])
def test_a_row_beside_what_somebody_else_has_saved_is_made_anew(
    adapter: Adapter,  # noqa: F811
    warm: Processor[Any],
    amount: int,
) -> None:
    def log(resource: Any) -> int:
        return adapter.add_with_row(resource, amount, f"from {adapter.total(resource)}")

    adapter.put("k", 100)
    assert warm.run("k", log) == 100 + amount
    assert warm.run("k", log if amount else adapter.total) == 100 + 2 * amount
    assert adapter.rows() == ["from 100", "from 101"][: amount + 1]


@over(lambda case: "reuse" in case.name and case.can_corrupt and not case.name.startswith("redis"))
def test_what_cannot_be_encoded_of_what_is_no_more_is_nobodys_fault(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    def spoil_what_is_small(resource: Any) -> int:
        if adapter.total(resource) < 50:
            resource["total"] = object()
            return 0
        return adapter.add(resource, 1)

    adapter.put("k", 100)
    assert warm.run("k", spoil_what_is_small) == 101
    adapter.put("k", 10)
    assert isinstance(answer_of(warm.run, "k", spoil_what_is_small), TypeError)


@over_reusing
def test_what_cannot_be_decoded_is_told_of_what_is_there(adapter: Adapter) -> None:  # noqa: F811
    adapter.put("k", 10)
    store: Any = adapter.store()
    with Processor(open_resource=store, min_duration=0, max_duration=30) as processor:  # noqa: F811
        processor.run("k", adapter.add, 1)
        until, kept = store._kept._entries["k"]
        store._kept._entries["k"] = until, spoiled(kept)
        assert processor.run("k", adapter.add, 1) == 12
        store._kept._entries["k"] = until, spoiled(kept)
        adapter.corrupt("k")
        assert isinstance(answer_of(processor.run, "k", adapter.total), LoadFailed)


def spoiled(kept: Any) -> Any:
    return kept._replace(state="{") if hasattr(kept, "state") else kept._replace(value=b"{")


# -- when things break ------------------------------------------------------------------------------------------


@over(lambda case: "reuse" in case.name and case.has_proxy)
def test_the_lost_answer_to_a_save_without_a_load_is_found_out(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    proxy = proxy_of(adapter)
    after = proxy.cut_after(adapter.commit_marker, adapter.commit_answer)
    assert warm.run("k", adapter.add, 1) == 12
    before = proxy.cut_before(adapter.commit_marker)
    assert warm.run("k", adapter.add, 1) == 13
    assert (after.met, before.met) == (1, 1)
    assert adapter.get("k") == 13
    assert_as_good_as_new(adapter)


@over(lambda case: case.name == "sqlalchemy-document-reuse-postgresql")
def test_a_save_without_a_load_begins_its_transaction(adapter: Adapter, warm: Processor[Any]) -> None:  # noqa: F811
    rule = proxy_of(adapter).cut_before(b"BEGIN\n; SET LOCAL")
    assert warm.run("k", adapter.add, 1) == 12
    assert rule.met == 1


@over(lambda case: "reuse" in case.name and case.has_proxy)
def test_a_save_that_arrives_after_its_batch_was_replayed_finds_another_version(
    adapter: Adapter,  # noqa: F811
    warm: Processor[Any],
) -> None:
    proxy = proxy_of(adapter)
    with proxy.hold(adapter.commit_marker) as rule:
        caller = spawned(warm.run, "k", adapter.add, 1)
        wait_until(rule.reached)
        adapter.terminate()
        wait_until(lambda: rule.waiting > 1 or caller.ready())
    assert caller.get() == 12
    assert adapter.get("k") == 12
    assert_as_good_as_new(adapter)


@over(lambda case: "reuse" in case.name and case.has_pool)
@pytest.mark.parametrize("reads", [False, True])
def test_connections_that_were_ended_at_rest_hurt_no_batch(
    adapter: Adapter,  # noqa: F811
    warm: Processor[Any],
    reads: bool,
) -> None:
    adapter.terminate()
    wait_until(lambda: adapter.open_connections() == 0)
    assert warm.run("k", adapter.total if reads else lambda resource: adapter.add(resource, 0) + 0) == 11
    assert warm.run("k", adapter.add, 1) == 12
    assert_as_good_as_new(adapter)


# -- its bounds -------------------------------------------------------------------------------------------------


class Now:
    """The time, as a test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(clock, "monotonic", lambda: self.seconds)


@pytest.fixture
def first_attempt(monkeypatch: pytest.MonkeyPatch) -> Any:
    class Running:
        attempts = 1

    monkeypatch.setattr("geventbatch.stores._reuse.batch_at_hand", lambda: Running)
    return Running


@pytest.mark.usefixtures("first_attempt")
def test_of_so_many_keys_those_are_kept_that_were_saved_last() -> None:
    kept: Kept[str] = Kept(Reuse(max_keys=2))
    for key in "abac":
        kept.put(key, key)
    assert [kept.take(key) for key in "abc"] == ["a", None, "c"]


@pytest.mark.usefixtures("first_attempt")
def test_what_is_older_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now = Now(monkeypatch)
    kept: Kept[str] = Kept(Reuse(max_age=60))
    for seconds, found in ((59, "state"), (60, None)):
        kept.put("k", "state")
        now.seconds += seconds
        assert kept.take("k") == found


def test_a_replay_uses_nothing_and_leaves_nothing(first_attempt: Any) -> None:
    kept: Kept[str] = Kept(Reuse())
    kept.put("k", "state")
    first_attempt.attempts = 2
    assert kept.take("k") is None
    first_attempt.attempts = 1
    assert kept.take("k") is None


@pytest.mark.usefixtures("first_attempt")
def test_in_a_child_of_a_fork_nothing_of_the_parents_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: Kept[str] = Kept(Reuse())
    kept.put("k", "of the parent")
    kept.put("l", "of the parent")
    monkeypatch.setattr(process.here, "epoch", process.here.epoch + 1)
    assert kept.take("k") is None
    kept.put("k", "of the child")
    assert [kept.take("k"), kept.take("l")] == ["of the child", None]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_keys": 0}, ValueError),
        ({"max_keys": True}, TypeError),
        ({"max_keys": 1.5}, TypeError),
        ({"max_age": 0}, ValueError),
        ({"max_age": float("inf")}, ValueError),
        ({"max_age": float("nan")}, ValueError),
        ({"max_age": "1"}, TypeError),
    ],
)
def test_bad_bounds_are_refused_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        Reuse(**options)


@pytest.mark.parametrize(
    ("url", "options", "error"),
    [
        ("postgresql+psycopg://", {"reuse_resource": Reuse()}, "mode='version'"),
        ("postgresql+psycopg://", {"reuse_resource": Reuse(), "mode": "lock"}, "mode='version'"),
        ("postgresql+psycopg://", {"reuse_resource": Reuse(), "mode": "version", "state_type": JSONB()}, "state_type"),
        ("sqlite://", {"reuse_resource": True}, "as Reuse()"),
    ],
)
def test_where_nothing_can_be_kept_that_is_said(url: str, options: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error.replace("(", r"\(").replace(")", r"\)")):
        SQLAlchemyStore.documents(sa.create_engine(url), "documents", **options)


def test_a_redis_store_says_too_what_it_takes() -> None:
    import redis

    with pytest.raises(TypeError, match="reuse_resource is True"):
        RedisStore(redis.Redis(), reuse_resource=True)  # type: ignore[arg-type]

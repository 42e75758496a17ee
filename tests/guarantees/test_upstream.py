"""What the suite of the Go library behind this design tests, and what its design gets wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import gevent
import pytest

from geventbatch import (
    BatchError,
    BatchMetric,
    BatchTimeout,
    LoadFailed,
    MetricSubscription,
    OperationCancelled,
    Processor,
    ProcessorOverloaded,
    ProcessorStopped,
    SaveFailed,
)
from tests.support.recording_store import FORMS, Store, add, answered_at, answers, do_nothing, only_once, raising

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime

OPERATIONS: Final = 1000


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param)


def hang(*args: object) -> None:
    gevent.sleep(100)


# Resources


def test_an_operation_gets_the_default_resource_when_there_is_none_to_load(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0.1)
    with processor:
        assert processor.run("k", lambda resource: (resource, "applied")) == (None, "applied")


def test_an_operation_gets_the_resource_that_was_loaded_for_its_key(store: Store) -> None:
    store.kept["a"], store.kept["b"] = ["of a"], ["of b"]
    with store.processor(min_duration=0.1) as processor:
        assert processor.run("a", list) == ["of a"]
        assert processor.run("b", list) == ["of b"]


def test_the_very_object_that_was_loaded_is_given_to_every_operation_and_to_the_save(clock: VirtualTime) -> None:
    seen: list[Any] = []
    loaded: list[str] = []
    processor = Processor(
        load_resource=lambda key: loaded, save_resource=lambda key, resource: seen.append(resource), min_duration=0.1
    )
    with processor:
        gevent.joinall([gevent.spawn(processor.run, "k", seen.append) for _ in range(3)])
        assert len(seen) == 4
        assert all(one is loaded for one in seen)


def test_a_modified_resource_is_saved(store: Store) -> None:
    store.kept["k"] = ["before"]
    with store.processor(min_duration=0.1) as processor:
        processor.run("k", add, "after")
        assert store.kept["k"] == ["before", "after"]


def test_a_resource_is_saved_under_its_own_key(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        gevent.joinall([gevent.spawn(processor.run, key, add, f"of {key}") for key in "abc"])
        assert store.kept == {"a": ["of a"], "b": ["of b"], "c": ["of c"]}


# Durations


@pytest.mark.parametrize("seconds", [0.02, 0.1, 3])
def test_a_batch_lasts_for_the_minimum_duration_given(store: Store, seconds: float) -> None:
    with store.processor(min_duration=seconds) as processor:
        processor.run("k", add, 1)
        assert store.clock.now() == seconds


def test_a_batch_lasts_for_a_tenth_of_a_second_by_default(store: Store) -> None:
    with store.processor() as processor:
        processor.run("k", add, 1)
        assert store.clock.now() == 0.1


@pytest.mark.parametrize(("window", "deadline"), [(None, 0.2), (0.1, 0.2), (3, 6), (0.05, 1.0), (0, 1.0)])
def test_a_batch_lasts_at_most_twice_its_window_by_default_or_a_second_where_that_is_too_short(
    store: Store, window: float | None, deadline: float
) -> None:
    options = {} if window is None else {"min_duration": window}
    with store.processor(**options) as processor:
        with pytest.raises(BatchTimeout):
            processor.run("k", hang)
        assert store.clock.now() == deadline


def test_a_batch_ends_after_a_long_operation(store: Store) -> None:
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        caller = store.call(processor, "k", store.apply, 1, 0.4)
        store.clock.advance(1)
        assert caller.at == 0.4


# Aborted batches


def test_a_load_error_aborts_the_batch(store: Store) -> None:
    error = OSError("no route")
    store.on_load = raising(error)
    with store.processor(min_duration=0.1) as processor:
        with pytest.raises(LoadFailed) as failed:
            processor.run("k", store.apply, 1)
        assert failed.value.__cause__ is error
        assert store.times("apply") == store.times("save") == []


def test_a_save_error_aborts_the_batch(store: Store) -> None:
    error = OSError("disk full")
    store.on_save = raising(error)
    with store.processor(min_duration=0.1) as processor:
        with pytest.raises(SaveFailed) as failed:
            processor.run("k", add, 1)
        assert failed.value.__cause__ is error


def test_a_load_timeout_aborts_the_batch(store: Store) -> None:
    store.on_load = hang
    with store.processor(min_duration=0.1, max_duration=0.3) as processor:
        with pytest.raises(BatchTimeout) as timeout:
            processor.run("k", store.apply, 1)
        assert (timeout.value.phase, timeout.value.retry_safe) == ("load", True)
        assert store.clock.now() == 0.3
        assert store.times("apply") == []


def test_a_save_timeout_aborts_the_batch(store: Store) -> None:
    store.on_save = hang
    with store.processor(min_duration=0.1, max_duration=0.3) as processor:
        with pytest.raises(BatchTimeout) as timeout:
            processor.run("k", add, 1)
        assert (timeout.value.phase, timeout.value.retry_safe) == ("save", False)
        assert store.clock.now() == 0.3


# Concurrency


def test_a_thousand_concurrent_operations_run_one_after_the_other(store: Store) -> None:
    inside = [0]
    most = [0]

    def increment(resource: list[int]) -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        value = resource.pop() if resource else 0
        gevent.sleep(0)
        resource.append(value + 1)
        inside[0] -= 1

    with store.processor(min_duration=0.1, max_duration=5) as processor:
        gevent.joinall([gevent.spawn(processor.run, "k", increment) for _ in range(OPERATIONS)], raise_error=True)
        assert store.kept["k"] == [OPERATIONS]
        assert most == [1]
        assert len(store.times("load")) == 1


def test_a_waiting_operation_can_be_cancelled(store: Store) -> None:
    store.load_time = 0.5
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        waits = store.call(processor, "k", add, "waits")
        with pytest.raises(OperationCancelled) as cancelled:
            processor.run("k", store.apply, "cancelled", start_timeout=0.2)
        assert store.clock.now() == 0.2
        assert cancelled.value.retry_safe
        assert isinstance(cancelled.value, TimeoutError)
        store.clock.advance(1)
        assert waits.answer == "waits"
        assert store.kept["k"] == ["waits"]
        assert store.times("apply") == []


def test_an_operation_that_has_started_can_no_longer_be_cancelled(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=5) as processor:
        assert processor.run("k", store.apply, "started", 1, start_timeout=0.2) == "started"
        assert store.clock.now() == 1


# Stop


def test_nothing_runs_after_stop(store: Store) -> None:
    processor = store.processor(min_duration=0.1)
    processor.run("k", add, 1)
    assert processor.stop()
    noted = list(store.log)
    with pytest.raises(ProcessorStopped):
        processor.run("k", store.apply, 2)
    store.clock.advance(10)
    assert store.log == noted


def test_stop_ends_an_open_window_early(store: Store) -> None:
    processor = store.processor(min_duration=10)
    caller = store.call(processor, "k", add, 1)
    store.clock.advance(1)
    assert processor.stop()
    assert store.clock.now() == 1
    assert caller.answer == 1


def test_stop_waits_for_the_save(store: Store) -> None:
    store.save_time = 0.5
    processor = store.processor(min_duration=0, max_duration=5)
    caller = store.call(processor, "k", add, 1)
    store.clock.advance(0.1)
    assert processor.stop()
    assert store.clock.now() == 0.5
    assert caller.answer == 1


# Metrics


def test_every_batch_gives_a_metric(store: Store) -> None:
    store.load_time, store.save_time = 0.02, 0.03
    with store.processor(min_duration=0.1) as processor:
        metrics = processor.subscribe_batch_metrics()
        store.clock.advance(5)
        for mark in range(3):
            store.call(processor, "k", add, mark)
        store.clock.advance(1)
    (metric,) = metrics
    assert (metric.key, metric.operation_count, metric.attempts, metric.error) == ("k", 3, 1, None)
    durations = metric.load_duration, metric.save_duration, metric.total_duration
    assert [round(seconds, 9) for seconds in durations] == [0.02, 0.03, 0.13]
    assert round(metric.started_at - 1_000_000_000, 6) == 5  # where virtual time begins


def test_the_metric_of_a_failed_batch_says_why(store: Store) -> None:
    store.on_load = only_once(raising(OSError("no route")))
    with store.processor(min_duration=0) as processor:
        metrics = processor.subscribe_batch_metrics()
        store.call(processor, "k", add, 1)
        store.clock.advance(1)
        processor.run("k", add, 1)
    failed, saved = metrics
    assert isinstance(failed.error, LoadFailed)
    assert failed.operation_count == 0
    assert saved.error is None


def test_every_subscriber_gets_every_metric(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        subscriptions = [processor.subscribe_batch_metrics() for _ in range(5)]
        for key in "abc":
            processor.run(key, add, 1)
    assert [[metric.key for metric in metrics] for metrics in subscriptions] == [["a", "b", "c"]] * 5


def test_a_subscription_after_stop_ends_at_once(store: Store) -> None:
    processor = store.processor(min_duration=0)
    processor.run("k", add, 1)
    processor.stop()
    assert list(processor.subscribe_batch_metrics()) == []


def test_a_subscription_ends_at_stop_after_the_last_metric(store: Store) -> None:
    def read(metrics: MetricSubscription) -> list[BatchMetric]:
        return list(metrics)

    processor = store.processor(min_duration=10)
    reader = gevent.spawn(read, processor.subscribe_batch_metrics())
    store.call(processor, "k", add, 1)
    store.clock.advance(1)
    assert not reader.dead
    processor.stop()
    reader.join(1)
    assert [metric.key for metric in reader.value or []] == ["k"]


# What upstream gets wrong: each of these its design would fail


def test_fifty_callers_on_a_dead_database_cost_one_load_and_the_last_is_told_as_soon_as_the_first(store: Store) -> None:
    store.load_time = 1
    store.on_load = raising(OSError("connection refused"))
    with store.processor(min_duration=0, max_duration=5, max_batch_size=1) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(50)]
        store.clock.advance(100)
        assert {type(error) for error in answers(callers)} == {LoadFailed}
        assert answered_at(callers) == [1.0] * 50
        assert len(store.times("load")) == 1


def test_of_thousands_of_operations_that_race_with_stop_none_runs_after_it_returned(store: Store) -> None:
    store.save_time = 0.001
    processor = store.processor(min_duration=0.001)
    outcomes: list[str] = []

    def one(number: int) -> None:
        gevent.sleep(number % 40 / 10_000)
        try:
            processor.run(number % 11, store.apply, number)
        except ProcessorStopped:
            outcomes.append("refused")
        else:
            outcomes.append("saved")

    callers = [gevent.spawn(one, number) for number in range(4000)]
    store.clock.advance(0.002)
    assert processor.stop() is True
    noted = len(store.log)
    gevent.joinall(callers)
    assert len(store.log) == noted
    assert outcomes.count("saved") == sum(map(len, store.kept.values())) == len(store.times("applied")) > 1000
    assert outcomes.count("refused") == 4000 - outcomes.count("saved") > 1000


def test_a_second_stop_is_no_error(store: Store) -> None:
    processor = store.processor()
    processor.run("k", add, 1)
    assert processor.stop() is True
    assert processor.stop() is True


def test_an_operation_that_arrives_during_a_save_does_not_wait_for_the_save_and_a_whole_new_window(
    store: Store,
) -> None:
    store.save_time = 0.5
    with store.processor(min_duration=0.4, max_duration=5) as processor:
        store.call(processor, "k", add, 1)
        store.clock.advance(0.41)  # saving, until 0.9
        arrived = store.call(processor, "k", add, 2)
        store.clock.advance(5)
        assert store.times("save") == [0.4, 0.9]  # its window, from 0.41 to 0.81, was over
        assert arrived.at == 1.4


@pytest.mark.parametrize("error", [ZeroDivisionError, AssertionError, RecursionError, MemoryError])
def test_an_operation_that_goes_wrong_takes_nobody_with_it(store: Store, error: type[Exception]) -> None:
    with store.processor(min_duration=0) as processor:
        wrong = store.call(processor, "k", raising(error()))
        others = [store.call(processor, "k", add, mark) for mark in range(10)]
        store.clock.advance(1)
        assert isinstance(wrong.error, error)
        assert answers(others) == store.kept["k"] == list(range(10))


def test_a_reader_of_metrics_that_never_reads_delays_nobody_and_holds_no_more_than_1024(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        unread = processor.subscribe_batch_metrics()
        for number in range(1500):
            processor.run(number % 3, do_nothing)
        assert store.clock.now() == 0
        assert unread.missed == 1500 - 1024
    assert len(list(unread)) == 1024


def test_what_waits_is_bounded_when_a_bound_is_given(store: Store) -> None:
    store.save_time = 1
    with store.processor(min_duration=0, max_duration=5, max_pending=10) as processor:
        callers = [store.call(processor, number % 4, add, number) for number in range(25)]
        store.clock.advance(0.5)
        refused = [caller for caller in callers if caller.answered]
        assert [type(caller.error) for caller in refused] == [ProcessorOverloaded] * 15
        assert all(isinstance(caller.error, BatchError) and caller.error.retry_safe for caller in refused)
        store.clock.advance(1)
        assert answers(callers[:10]) == list(range(10))
        assert processor.run("k", add, 1) == 1

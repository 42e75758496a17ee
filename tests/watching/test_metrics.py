"""`BatchMetric`, and subscriptions that cannot hurt (guarantee 16)."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import (
    BatchAborted,
    BatchError,
    BatchMetric,
    BatchTimeout,
    Conflict,
    LoadFailed,
    MetricSubscription,
    NotSaved,
    PartlySaved,
    Processor,
    SaveFailed,
)
from tests.support.callers import answer_of, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


def nothing(resource: object) -> None:
    """An operation."""


def sleeping(seconds: float) -> Callable[..., None]:
    def sleep(*args: object) -> None:
        gevent.sleep(seconds)

    return sleep


def raising(error: BaseException, seconds: float = 0) -> Callable[..., Any]:
    def raise_it(*args: object) -> None:
        gevent.sleep(seconds)
        raise error

    return raise_it


def metrics_of(*operations: Callable[[Any], Any], **options: Any) -> tuple[list[BatchMetric], list[Any]]:
    """The metrics of a processor that ran *operations* on one key at once, and what their callers were answered."""
    processor: Processor[Any] = Processor(**{"min_duration": 0, "max_duration": 50, **options})
    metrics = processor.subscribe_batch_metrics()
    callers = [gevent.spawn(answer_of, processor.run, "k", operation) for operation in operations]
    answers = [caller.get() for caller in callers]
    processor.stop()
    return list(metrics), answers


# BatchMetric


@pytest.mark.parametrize("batching", [True, False])
def test_a_metric_says_all_of_a_batch(clock: VirtualTime, batching: bool) -> None:
    clock.advance(7)
    metrics, _ = metrics_of(sleeping(0.5), load_resource=sleeping(1), save_resource=sleeping(2), batching=batching)
    assert metrics == [
        BatchMetric(
            key="k",
            started_at=1_000_000_007.0,
            operation_count=1,
            load_duration=1.0,
            save_duration=2.0,
            total_duration=3.5,
            attempts=1,
            error=None,
            queue_wait=0.0,
            window=0.0 if not batching else 1.0,
            apply_duration=0.5,
            conflicts=0,
            raised=0,
            withdrawn=0,
            waiting_at_close=1,
            phase=None,
            operation_name="sleeping.<locals>.sleep",
            keys=("k",),
        )
    ]


def test_a_metric_is_frozen_and_has_these_fields() -> None:
    names = [field.name for field in dataclasses.fields(BatchMetric)]
    assert names == [
        "key",
        "started_at",
        "operation_count",
        "load_duration",
        "save_duration",
        "total_duration",
        "attempts",
        "error",
        "queue_wait",
        "window",
        "apply_duration",
        "conflicts",
        "raised",
        "withdrawn",
        "waiting_at_close",
        "phase",
        "operation_name",
        "undone",
        "undo_duration",
        "keys",
        "bulk_keys",
    ]
    ((metric,), _) = metrics_of(nothing)
    for name in names:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(metric, name, 0)


def test_started_at_is_the_time_of_day() -> None:
    before = time.time()
    ((metric,), _) = metrics_of(nothing)
    assert before - 0.001 <= metric.started_at <= time.time()


def test_the_wait_for_its_turn_is_no_part_of_a_metric(clock: VirtualTime) -> None:
    with Processor(load_resource=sleeping(5), min_duration=0, max_duration=50, max_batches=1) as processor:
        metrics = processor.subscribe_batch_metrics()
        for key in "ab":
            gevent.spawn(processor.run, key, nothing)
        first, second = next(metrics), next(metrics)
    assert (first.total_duration, second.total_duration) == (5, 5)
    assert second.started_at == first.started_at + 5


def test_operation_count_is_of_the_started_operations_also_of_those_that_raised_or_were_withdrawn_after_it(
    clock: VirtualTime,
) -> None:
    processor: Processor[None] = Processor(
        load_resource=sleeping(1), save_resource=sleeping(1), min_duration=0, max_duration=50, clean_errors=(KeyError,)
    )
    metrics = processor.subscribe_batch_metrics()
    operations = [nothing, raising(KeyError()), raising(OSError()), nothing]
    callers = [gevent.spawn(answer_of, processor.run, "k", operation) for operation in operations]
    never = gevent.spawn(processor.run, "k", nothing)
    clock.advance(0.5)
    never.kill()
    clock.advance(2)  # in the save
    callers[0].kill()
    processor.stop()
    (metric,) = metrics
    assert metric.operation_count == 4


def test_durations_and_attempts_are_over_all_attempts(clock: VirtualTime) -> None:
    conflicts = [Conflict(), Conflict()]

    def save(key: str, resource: None) -> None:
        gevent.sleep(2)
        if conflicts:
            raise conflicts.pop()

    ((metric,), _) = metrics_of(nothing, nothing, load_resource=sleeping(1), save_resource=save)
    assert metric.attempts == 3
    assert metric.load_duration == pytest.approx(3)
    assert metric.save_duration == pytest.approx(6)
    assert 9 < metric.total_duration <= 9.015
    assert metric.operation_count == 2
    assert metric.error is None


def test_attempts_counts_the_loads_for_what_cannot_be_undone_too(clock: VirtualTime) -> None:
    ((metric,), _) = metrics_of(nothing, raising(OSError()), load_resource=lambda _: [], copy_resource=None)
    assert (metric.attempts, metric.operation_count, metric.error) == (2, 2, None)
    assert metric.undone == 1


def test_a_batch_with_nothing_to_save_has_a_metric_without_an_error(clock: VirtualTime) -> None:
    ((metric,), answers) = metrics_of(raising(KeyError()))
    assert isinstance(answers[0], KeyError)
    assert (metric.error, metric.operation_count, metric.save_duration) == (None, 1, 0)


@pytest.mark.parametrize(
    ("options", "operation", "kind", "retry_safe"),
    [
        ({"load_resource": raising(OSError())}, nothing, LoadFailed, True),
        ({"save_resource": raising(OSError())}, nothing, SaveFailed, False),
        ({"save_resource": raising(NotSaved())}, nothing, SaveFailed, True),
        ({}, sleeping(100), BatchTimeout, True),
        ({}, raising(gevent.GreenletExit()), BatchAborted, True),
    ],
)
def test_the_error_of_a_failed_batch_is_like_that_of_its_callers_and_none_of_theirs(
    clock: VirtualTime, options: dict[str, Any], operation: Callable[..., Any], kind: type[BatchError], retry_safe: bool
) -> None:
    ((metric,), answers) = metrics_of(operation, nothing, **options)
    assert type(metric.error) is kind
    assert metric.error.retry_safe is retry_safe
    assert str(metric.error) == str(answers[0])
    assert not any(metric.error is answer for answer in answers)


def test_the_time_of_a_load_or_a_save_that_failed_is_in_its_metric(clock: VirtualTime) -> None:
    ((metric,), _) = metrics_of(nothing, load_resource=raising(OSError(), 3))
    assert (metric.load_duration, metric.total_duration, metric.operation_count) == (3, 3, 0)
    ((metric,), _) = metrics_of(nothing, save_resource=raising(OSError(), 3))
    assert (metric.save_duration, metric.total_duration) == (3, 3)
    ((metric,), _) = metrics_of(nothing, load_resource=sleeping(100))
    assert (metric.load_duration, metric.total_duration) == (50, 50)
    ((metric,), _) = metrics_of(nothing, save_resource=sleeping(100))
    assert (metric.save_duration, metric.total_duration) == (50, 50)


def test_a_batch_that_never_began_has_no_metric_that_says_it_had(clock: VirtualTime) -> None:
    """Behind a load that fails, or left by everyone before its turn came."""
    clock.advance(100)
    metrics, answers = metrics_of(nothing, nothing, nothing, load_resource=raising(OSError(), 1), max_batch_size=1)
    assert [type(answer) for answer in answers] == [LoadFailed] * 3
    processor = Processor(load_resource=sleeping(1), min_duration=0, max_batches=1, max_duration=50)
    others = processor.subscribe_batch_metrics()
    kept, left = (gevent.spawn(processor.run, key, nothing) for key in "ab")
    clock.settle()
    left.kill()
    kept.get()
    processor.stop()
    for metric in [*metrics, *others]:
        assert metric.started_at >= 1_000_000_100
        assert metric.total_duration <= 1
    assert [metric for metric in metrics if metric.attempts] == metrics[:1]


def test_every_batch_has_one_metric_in_the_order_they_ended(clock: VirtualTime) -> None:
    with Processor(load_resource=gevent.sleep, min_duration=0, max_duration=50) as processor:
        metrics = processor.subscribe_batch_metrics()
        gevent.joinall([gevent.spawn(processor.run, seconds, nothing) for seconds in (4, 1, 3, 2)])
        processor.run(0, nothing)
    assert [metric.key for metric in metrics] == [1, 2, 3, 4, 0]


def test_queue_wait_is_from_the_opening_to_the_start_and_window_until_it_took_no_more(clock: VirtualTime) -> None:
    options: dict[str, Any] = {"load_resource": sleeping(1), "save_resource": sleeping(2), "max_duration": 50}
    with Processor(**options, min_duration=0) as processor:
        metrics = processor.subscribe_batch_metrics()
        gevent.spawn(processor.run, "k", nothing)
        clock.advance(1.5)  # in the save
        gevent.spawn(processor.run, "k", nothing)
        first, second = next(metrics), next(metrics)
    assert (first.queue_wait, first.window) == (0, 1)
    assert (second.queue_wait, second.window) == (1.5, 2.5)
    with Processor(**options, min_duration=4) as processor:
        metrics = processor.subscribe_batch_metrics()
        processor.run("k", nothing)
    assert next(metrics).window == 4


def test_waiting_at_close_is_of_the_callers_then_and_withdrawn_of_those_that_left_before_the_answers(
    clock: VirtualTime,
) -> None:
    with Processor(load_resource=sleeping(1), save_resource=sleeping(1), min_duration=0, max_duration=9) as processor:
        metrics = processor.subscribe_batch_metrics()
        callers = [gevent.spawn(processor.run, "k", nothing) for _ in range(5)]
        clock.advance(0.5)
        callers[0].kill()
        clock.advance(1)  # in the save
        callers[1].kill()
        metric = next(metrics)
    assert (metric.waiting_at_close, metric.withdrawn, metric.operation_count) == (4, 2, 4)


def test_a_batch_that_is_full_is_closed(clock: VirtualTime) -> None:
    metrics, _ = metrics_of(nothing, nothing, nothing, load_resource=sleeping(1), max_batch_size=2)
    assert [(metric.window, metric.waiting_at_close) for metric in metrics] == [(0, 2), (2, 1)]


def test_the_wait_for_a_replay_and_leaving_without_a_save_are_no_time_of_applying(clock: VirtualTime) -> None:
    conflicts = [Conflict(), Conflict()]

    class Scope:
        def __enter__(self) -> None:
            gevent.sleep(1)

        def __exit__(self, kind: object, error: object, traceback: object) -> None:
            if kind is not None:
                gevent.sleep(8)
            elif conflicts:
                raise conflicts.pop()

    ((metric,), _) = metrics_of(sleeping(0.5), raising(OSError()), open_resource=lambda _: Scope())
    assert (metric.attempts, metric.conflicts, metric.raised) == (6, 2, 1)  # what raised is applied after each conflict
    assert metric.load_duration == pytest.approx(6)
    assert metric.apply_duration == pytest.approx(3)
    assert metric.save_duration == 0
    assert 33 < metric.total_duration < 33.1
    assert metric.undone == 3
    assert metric.undo_duration == pytest.approx(3 * (0.5 + 8 + 1))  # the attempt that was given up, and the load after


def test_the_wait_for_a_replay_that_the_deadline_ended_is_no_time_of_loading(clock: VirtualTime) -> None:
    def conflict(*_: object) -> None:
        clock.advance(49.999999)
        raise Conflict

    ((metric,), _) = metrics_of(nothing, save_resource=conflict)
    assert metric.load_duration == metric.apply_duration == 0
    assert (metric.phase, metric.conflicts) == ("save", 1)


def test_raised_is_of_the_operations_whose_callers_got_what_they_raised(clock: VirtualTime) -> None:
    operations = [nothing, raising(KeyError()), raising(OSError())]
    ((metric,), _) = metrics_of(*operations, clean_errors=(KeyError,))
    assert (metric.raised, metric.operation_count) == (2, 3)
    ((metric,), _) = metrics_of(*operations, save_resource=raising(ValueError()))
    assert (metric.raised, metric.operation_count) == (0, 3)


@pytest.mark.parametrize(
    ("options", "operation", "phase"),
    [
        ({"load_resource": raising(OSError())}, nothing, "load"),
        ({"load_resource": raising(Conflict()), "max_attempts": 2}, nothing, "load"),
        ({"load_resource": raising(gevent.GreenletExit())}, nothing, "load"),
        ({"load_resource": sleeping(99)}, nothing, "load"),
        ({}, sleeping(99), "operations"),
        ({}, raising(gevent.GreenletExit()), "operations"),
        ({"save_resource": raising(OSError())}, nothing, "save"),
        ({"save_resource": raising(Conflict()), "max_attempts": 2}, nothing, "save"),
        ({"save_resource": raising(gevent.GreenletExit())}, nothing, "save"),
        ({"save_resource": sleeping(99)}, nothing, "save"),
    ],
)
def test_the_phase_of_a_failed_batch_is_what_it_was_doing(
    clock: VirtualTime, options: dict[str, Any], operation: Callable[..., Any], phase: str
) -> None:
    ((metric,), _) = metrics_of(operation, **options)
    assert metric.phase == phase


def test_operation_name_is_what_all_operations_of_the_batch_are_called(clock: VirtualTime) -> None:
    class Called:
        def __call__(self, resource: object) -> None:
            pass

    for operations, name in (
        ([nothing, nothing], "nothing"),
        ([functools.partial(nothing), nothing], "nothing"),
        ([nothing, sleeping(0)], None),
        ([Called(), Called()], f"{Called.__qualname__}"),
    ):
        ((metric,), _) = metrics_of(*operations)
        assert metric.operation_name == name


class Anything:
    """An operation that gives itself for any attribute, as mocks and proxies do, or raises *error*."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __call__(self, _resource: None) -> int:
        return 1

    def __getattr__(self, name: str) -> Anything:
        if self.error is not None:
            raise self.error
        return self


@pytest.mark.parametrize("error", [None, LookupError("no such attribute")])
def test_an_operation_whose_attributes_are_endless_or_raise_is_named_by_its_class(
    clock: VirtualTime, error: Exception | None
) -> None:
    with Processor(min_duration=0) as processor:
        metrics = processor.subscribe_batch_metrics()
        assert processor.run("key", Anything(error)) == 1
        assert next(metrics).operation_name == "Anything"


def test_operation_name_is_that_of_what_stands_for_an_operation_with_a_start_timeout_or_an_idempotency_key(
    clock: VirtualTime,
) -> None:
    class Keeps:
        keeps_outcomes = True

        def __call__(self, key: str) -> AbstractContextManager[None]:
            return nullcontext()

    for options, extra in (
        ({"batching": False}, {"start_timeout": 5}),
        ({"open_resource": Keeps()}, {"idempotency_key": "x"}),
    ):
        processor: Processor[None] = Processor(min_duration=0, **options)
        metrics = processor.subscribe_batch_metrics()
        processor.run("k", nothing, **extra)
        processor.stop()
        assert next(metrics).operation_name == "nothing"


def test_the_batches_of_a_bulk_have_metrics_of_their_own_with_the_times_of_the_bulk(clock: VirtualTime) -> None:
    lost = [PartlySaved({"b": Conflict()})]

    def load(keys: list[str]) -> dict[str, None]:
        gevent.sleep(1)
        return dict.fromkeys(keys)

    def save(_: object) -> None:
        gevent.sleep(2)
        if lost:
            raise lost.pop()

    with Processor(load_resources=load, save_resources=save, min_duration=0, max_duration=50) as processor:
        metrics = processor.subscribe_batch_metrics()
        for key in "ab":
            gevent.spawn(processor.run, key, sleeping(0.5))
        a, b = next(metrics), next(metrics)
    assert (a.key, a.load_duration, a.save_duration, a.apply_duration, a.conflicts) == ("a", 1, 2, 1, 0)
    assert (b.key, b.conflicts, b.attempts) == ("b", 1, 2)
    assert (b.load_duration, b.save_duration) == pytest.approx((2, 4))
    assert b.apply_duration == pytest.approx(1.5)


# Subscriptions


def test_a_watcher_that_raises_hurts_neither_the_batch_nor_the_other_watchers(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def publish(self, metric: object) -> None:
            raise OSError("broken watcher")

        def close(self) -> None:
            pass

    processor: Processor[None] = Processor(min_duration=0)
    broken = Broken()
    processor._watch(broken)
    metrics = processor.subscribe_batch_metrics()
    assert processor.run("k", nothing) is None
    assert processor.stop() is True
    assert [metric.key for metric in metrics] == ["k"]
    gevent.sleep(0)
    assert "broken watcher" in caplog.text


def test_several_subscribers_each_get_every_metric_from_when_they_came(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    early = processor.subscribe_batch_metrics()
    processor.run("a", nothing)
    late = processor.subscribe_batch_metrics()
    processor.run("b", nothing)
    processor.stop()
    assert [metric.key for metric in early] == ["a", "b"]
    assert [metric.key for metric in late] == ["b"]


def test_a_subscription_is_an_iterator_that_waits_for_the_next_metric(clock: VirtualTime) -> None:
    with Processor(min_duration=0) as processor:
        metrics = processor.subscribe_batch_metrics()
        assert isinstance(metrics, MetricSubscription)
        assert iter(metrics) is metrics
        reader = gevent.spawn(next, metrics)
        clock.advance(10)
        assert not reader.ready()
        processor.run("k", nothing)
        assert reader.get().key == "k"


def test_a_subscription_ends_after_the_last_metric_when_the_processor_has_stopped_and_not_before(
    clock: VirtualTime,
) -> None:
    processor = Processor(save_resource=sleeping(1), min_duration=0, max_duration=5)
    metrics = processor.subscribe_batch_metrics()
    read: list[Any] = []

    def read_all() -> None:
        read.extend(metric.key for metric in metrics)
        read.append(clock.now())

    reader = gevent.spawn(read_all)
    callers = [gevent.spawn(processor.run, key, nothing) for key in "ab"]
    clock.settle()
    assert processor.stop(timeout=0) is False
    clock.advance(0.5)
    assert not reader.ready()
    gevent.joinall(callers)
    reader.get()
    assert read == ["a", "b", 1]
    with pytest.raises(StopIteration):
        next(metrics)
    with pytest.raises(StopIteration):
        next(metrics)


def test_a_subscription_after_the_stop_ends_at_once(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    processor.run("k", nothing)
    processor.stop()
    assert list(processor.subscribe_batch_metrics()) == []


def test_a_subscription_during_the_stop_gets_what_ends_after_it(clock: VirtualTime) -> None:
    processor = Processor(save_resource=sleeping(1), min_duration=0, max_duration=5)
    caller = gevent.spawn(processor.run, "k", nothing)
    clock.settle()
    processor.stop(timeout=0)
    metrics = processor.subscribe_batch_metrics()
    caller.get()
    assert [metric.key for metric in metrics] == ["k"]


def test_a_subscription_made_while_the_last_callers_are_being_woken_ends(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    subscribed: list[list[object]] = []

    def call() -> None:
        processor.run("k", nothing)
        subscribed.append(list(processor.subscribe_batch_metrics()))

    callers = [gevent.spawn(call) for _ in range(200)]
    gevent.spawn(processor.stop)
    clock.advance(1)
    assert all(caller.ready() for caller in callers)
    assert subscribed == [[]] * len(subscribed)


def test_a_reader_that_never_reads_holds_1024_metrics_and_misses_the_newest_and_delays_nobody(
    clock: VirtualTime,
) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    idle = processor.subscribe_batch_metrics()
    keen = processor.subscribe_batch_metrics()
    reader = gevent.spawn(lambda: [metric.key for metric in keen])
    for number in range(1024):
        processor.run(number, nothing)
    assert idle.missed == 0
    for number in range(1024, 1030):
        processor.run(number, nothing)
    assert idle.missed == 6
    assert next(idle).key == 0
    processor.run(2000, nothing)
    processor.run(2001, nothing)
    assert idle.missed == 7
    processor.stop()
    assert [metric.key for metric in idle] == [*range(1, 1024), 2000]
    assert reader.get() == [*range(1030), 2000, 2001]
    assert keen.missed == 0
    assert clock.now() == 0


def test_a_full_subscription_still_ends_at_the_stop(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    metrics = processor.subscribe_batch_metrics()
    for number in range(1100):
        processor.run(number, nothing)
    assert processor.stop() is True
    assert len(list(metrics)) == 1024
    assert metrics.missed == 76


def test_a_reader_that_fails_or_is_killed_fails_no_batch_and_no_other_reader(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    metrics = [processor.subscribe_batch_metrics() for _ in range(3)]

    def fail() -> None:
        for metric in metrics[0]:
            raise OSError(metric.key)

    failing = gevent.spawn(answer_of, fail)
    killed = gevent.spawn(next, metrics[1])
    clock.settle()
    assert processor.run("a", nothing) is None
    assert isinstance(failing.get(), OSError)
    killed.kill()
    assert processor.run("b", nothing) is None
    assert processor.stop() is True
    assert [metric.key for metric in metrics[2]] == ["a", "b"]


def test_a_slow_reader_delays_nobody(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    metrics = processor.subscribe_batch_metrics()
    read: list[object] = []

    def read_slowly() -> None:
        for metric in metrics:
            gevent.sleep(10)
            read.append(metric.key)

    reader = gevent.spawn(read_slowly)
    for number in range(5):
        processor.run(number, nothing)
    assert processor.stop() is True
    assert clock.now() == 0
    reader.get()
    assert read == [0, 1, 2, 3, 4]


def test_a_subscription_that_is_closed_ends_after_what_it_holds_and_the_others_go_on(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    closed, other = processor.subscribe_batch_metrics(), processor.subscribe_batch_metrics()
    processor.run("a", nothing)
    closed.close()
    processor.run("b", nothing)
    processor.stop()
    assert [metric.key for metric in closed] == ["a"]
    assert [metric.key for metric in other] == ["a", "b"]


def test_a_subscription_that_nobody_refers_to_any_more_is_forgotten(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    metrics = processor.subscribe_batch_metrics()
    processor.run("a", nothing)
    gone = weakref.ref(metrics)
    del metrics
    gc.collect()
    assert gone() is None
    processor.run("b", nothing)
    processor.stop()


# Publishers in other threads, with batching=False


def test_metrics_of_other_threads_reach_the_reader_and_wake_it() -> None:
    processor: Processor[None] = Processor(batching=False)
    metrics = processor.subscribe_batch_metrics()
    reader = gevent.spawn(lambda: [metric.key for metric in metrics])
    gevent.sleep(0)
    for key in "abc":
        assert gevent.get_hub().threadpool.apply(processor.run, (key, nothing)) is None
    processor.stop()
    assert reader.get(timeout=30) == ["a", "b", "c"]


def test_a_subscription_holds_1024_metrics_of_other_threads_too_while_its_own_stands_still() -> None:
    processor: Processor[None] = Processor(batching=False)
    metrics = processor.subscribe_batch_metrics()

    def run_all() -> None:
        for number in range(1100):
            processor.run(number, nothing)

    in_a_thread(run_all)
    gevent.sleep(0)
    assert metrics.missed == 76
    processor.stop()
    assert [metric.key for metric in metrics] == list(range(1024))


def test_the_last_metric_is_read_also_when_another_thread_has_published_it_and_stopped_the_processor() -> None:
    processor: Processor[None] = Processor(batching=False)
    metrics = processor.subscribe_batch_metrics()

    def run_and_stop() -> bool:
        processor.run("k", nothing)
        return processor.stop()

    assert in_a_thread(run_and_stop) is True
    assert [metric.key for metric in metrics] == ["k"]

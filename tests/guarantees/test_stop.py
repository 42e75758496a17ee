"""Guarantee 8: stop."""

from __future__ import annotations

from heapq import heappush
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.event import AsyncResult

from geventbatch import BatchTimeout, Processor, ProcessorStopped, worker_number_for_key
from geventbatch._core import batch, moments
from geventbatch._core.bell import Bell
from tests.support.recording_store import (
    FORMS,
    Store,
    add,
    answered_at,
    answers,
    current_greenlet,
    do_nothing,
    fail,
    only_once,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


def in_hub(call: Callable[[], object]) -> list[Any]:
    """Call it in the hub; what it gave or raised is in the list after the next turn."""
    came_of_it: list[Any] = []

    def note() -> None:
        try:
            came_of_it.append(call())
        except RuntimeError as error:
            came_of_it.append(error)

    gevent.get_hub().loop.run_callback(note)
    return came_of_it


def without_a_switch(call: Callable[[], Any]) -> Any:
    """Call it, and hold it to switching to nobody."""
    switched: list[None] = []
    callback = gevent.get_hub().loop.run_callback(switched.append, None)
    try:
        return call()
    finally:
        assert not switched
        callback.stop()


# Nothing is admitted, everything admitted is saved


def test_after_stop_has_been_called_no_operation_is_admitted(store: Store) -> None:
    processor = store.processor(min_duration=0)
    assert processor.run("k", add, 1) == 1
    processor.stop()
    with pytest.raises(ProcessorStopped, match="was stopped") as refused:
        processor.run("k", add, 2)
    assert refused.value.retry_safe
    assert store.kept["k"] == [1]


def test_after_stop_has_been_called_no_function_of_the_user_runs_for_an_operation_that_is_refused(store: Store) -> None:
    asked: list[Any] = []

    def number_for(key: Any, workers: int) -> int:
        asked.append(key)
        return 0

    processor = store.processor(worker_number_for_key=number_for)
    processor.stop()
    with pytest.raises(ProcessorStopped):
        processor.run("k", add, 1)
    assert asked == []


def test_while_stop_waits_no_operation_is_admitted_for_an_open_batch_or_another_key(store: Store) -> None:
    processor = store.processor(min_duration=1)
    admitted = store.call(processor, "k", store.apply, "admitted", 0.5)
    store.clock.advance(0.1)
    stopping = gevent.spawn(processor.stop)
    store.clock.advance(0.1)
    refused = [store.call(processor, "k", add, "refused"), store.call(processor, "other", add, "refused")]
    store.clock.advance(2)
    assert stopping.value is True
    assert admitted.answer == "admitted"
    assert [type(error) for error in answers(refused)] == [ProcessorStopped] * 2
    assert answered_at(refused) == [0.2, 0.2]
    assert store.kept == {"k": ["admitted"]}


def test_stop_closes_open_windows(store: Store) -> None:
    processor = store.processor(min_duration=10)
    callers = [store.call(processor, key, add, key) for key in "abc"]
    store.clock.advance(1)
    assert processor.stop()
    assert answered_at(callers) == [1.02] * 3


def test_stop_during_the_load_closes_the_window_too(store: Store) -> None:
    processor = store.processor(min_duration=10)
    caller = store.call(processor, "k", add, 1)
    store.clock.advance(0.005)
    assert processor.stop()
    assert caller.at == 0.03


def test_everything_admitted_is_saved_and_answered_before_stop_returns(store: Store) -> None:
    processor = store.processor(min_duration=0, max_batch_size=3)
    callers = []
    for mark in range(10):
        callers += [store.call(processor, f"k{number}", add, mark) for number in range(5)]
    callers.append(store.call(processor, "k0", fail, ValueError("taken")))
    store.clock.settle()
    assert processor.stop() is True
    assert all(caller.answered for caller in callers)
    assert all(store.kept[f"k{number}"] == list(range(10)) for number in range(5))


def test_batches_queued_behind_one_that_saves_are_saved_too(store: Store) -> None:
    processor = store.processor(min_duration=0)
    first = store.call(processor, "k", add, "first")
    store.clock.advance(0.02)
    behind = store.call(processor, "k", add, "behind")
    store.clock.settle()
    assert processor.stop()
    assert store.clock.now() == 0.06
    assert answers([first, behind]) == store.kept["k"] == ["first", "behind"]


def test_nothing_runs_after_stop_returned_true(store: Store) -> None:
    processor = store.processor(min_duration=0)
    outcomes: list[str] = []

    def again_and_again(number: int) -> None:
        gevent.sleep(number % 40 / 200)  # so that many come after the stop has begun
        while True:
            try:
                processor.run(number % 7, store.apply, number, 0.0001)
            except ProcessorStopped:
                outcomes.append("refused")
                return
            outcomes.append("saved")

    callers = [gevent.spawn(again_and_again, number) for number in range(2000)]
    store.clock.advance(0.1)
    assert processor.stop() is True
    noted = list(store.log)
    store.clock.advance(10)
    assert store.log == noted
    assert all(caller.dead for caller in callers)
    assert outcomes.count("saved") == sum(map(len, store.kept.values())) == len(store.times("applied")) > 1000
    assert outcomes.count("refused") == 2000


def test_when_stop_returned_true_every_caller_has_been_woken(store: Store) -> None:
    processor = store.processor(min_duration=0)
    callers = [store.call(processor, f"k{number % 3}", add, number) for number in range(1000)]
    store.clock.settle()
    assert processor.stop() is True
    assert all(caller.answered for caller in callers)


def test_stop_ends_the_workers(store: Store) -> None:
    processor = store.processor(min_duration=0)
    gevent.joinall([gevent.spawn(processor.run, number, add, 1) for number in range(50)])
    processor.stop()
    store.clock.settle()
    assert "stopped, 0 keys, 0 batches, 0 operations pending, 0 workers" in repr(processor)
    assert store.clock.timers == 0


def test_a_processor_that_never_ran_anything_stops_at_once(store: Store) -> None:
    processor = store.processor()
    assert without_a_switch(processor.stop) is True
    with pytest.raises(ProcessorStopped):
        processor.run("k", add, 1)


def test_a_processor_as_a_context_manager_stops_on_exit(store: Store) -> None:
    made = store.processor(min_duration=10)
    with made as processor:
        assert processor is made
        caller = store.call(processor, "k", add, 1)
        store.clock.settle()
    assert store.clock.now() == 0.03
    assert caller.answer == 1
    assert store.kept["k"] == [1]
    assert processor.stop(timeout=0) is True
    with pytest.raises(ProcessorStopped):
        processor.run("k", add, 1)


def test_a_processor_as_a_context_manager_stops_when_it_is_left_with_an_exception(store: Store) -> None:
    processor = store.processor(min_duration=10)
    caller = store.call(processor, "k", add, 1)
    store.clock.settle()
    with pytest.raises(ValueError, match="mine"), processor:
        raise ValueError("mine")
    assert caller.answer == 1
    assert processor.stop(timeout=0) is True


# Admission is one stretch without a switch, after every call of a user's function


class Key:
    def __init__(self, meanwhile: Callable[[], object], *, on: str) -> None:
        self.meanwhile = meanwhile
        self.on = on

    def __hash__(self) -> int:
        if self.on == "hash":
            self.meanwhile()
        return 1

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        if self.on == "equality":
            self.meanwhile()
            other.meanwhile()
        return True


@pytest.mark.parametrize("place", ["hash", "equality", "worker number"])
@pytest.mark.parametrize("another_is_there", [False, True])
@pytest.mark.parametrize("blocking", [False, True])
def test_a_stop_that_user_code_calls_in_the_middle_of_admission_refuses_the_operation(
    store: Store, place: str, another_is_there: bool, blocking: bool
) -> None:
    def stop(*args: object) -> int:
        if armed:
            processor.stop(timeout=None if blocking else 0)
        return 0

    armed: list[bool] = []
    processor = store.processor(min_duration=0, worker_number_for_key=stop if place == "worker number" else zero)
    there = [store.call(processor, Key(do_nothing, on=place), add, "there")] if another_is_there else []
    store.clock.settle()
    armed.append(True)
    if place == "worker number" and another_is_there:
        key: Any = "a key without a batch"
    else:
        key = Key(stop, on=place)
    with pytest.raises(ProcessorStopped):
        processor.run(key, store.apply, "refused")
    assert processor.stop() is True
    assert answers(there) == ["there"] * len(there)
    assert store.times("apply") == []
    store.clock.advance(1)
    assert store.times("apply") == []


def zero(key: Any, workers: int) -> int:
    return 0


@pytest.mark.parametrize("place", ["hash", "equality", "worker number"])
def test_a_stop_called_while_user_code_yields_in_the_middle_of_admission_refuses_the_operation(
    store: Store, place: str
) -> None:
    def wait(*args: object) -> int:
        gevent.sleep(0.5)
        return 0

    processor = store.processor(min_duration=0, worker_number_for_key=wait if place == "worker number" else zero)
    caller = store.call(processor, Key(wait, on=place), store.apply, "refused")
    store.clock.advance(0.1)
    assert processor.stop() is True
    assert store.clock.now() == 0.1
    store.clock.advance(5)
    assert isinstance(caller.error, ProcessorStopped)
    assert store.log == []
    assert "0 keys, 0 batches, 0 operations pending, 0 workers" in repr(processor)


@pytest.mark.parametrize("place", ["worker_number_for_key", "AsyncResult", "heappush"])
def test_a_stop_in_the_middle_of_anything_leaves_no_window_open(
    clock: VirtualTime, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    # As a signal handler does that is taken while the queue of the key is looked up, or while `Batch.add` makes
    # something, or while `Bell.wait` queues the end of the window: in the middle of a stretch without a switch.
    def stop_before(make: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(*args: Any) -> Any:
            processor.stop(timeout=0)
            return make(*args)

        return stopped

    number = stop_before(worker_number_for_key) if place == "worker_number_for_key" else worker_number_for_key
    processor: Processor[list[int]] = Processor(
        load_resource=lambda _: [], min_duration=5, worker_number_for_key=number
    )

    def call() -> float:
        try:
            processor.run("k", list.append, 1)
        except Exception:
            return clock.now()
        return clock.now()

    def push(heap: list[Any], entry: tuple[Any, ...]) -> None:
        (stop_before(heappush) if type(entry[-1]) is Bell else heappush)(heap, entry)

    if place == "AsyncResult":
        monkeypatch.setattr(batch, place, stop_before(AsyncResult))
    elif place == "heappush":
        monkeypatch.setattr(moments, place, push)
    caller = gevent.spawn(call)
    clock.advance(20)
    assert caller.value == 0.0
    assert processor.stop()


# More than once


def test_stop_may_be_called_twice(store: Store) -> None:
    processor = store.processor(min_duration=0)
    processor.run("k", add, 1)
    assert processor.stop() is True
    assert processor.stop() is True
    assert processor.stop(timeout=0) is True
    assert processor.stop(timeout=1) is True


def test_stop_may_be_called_from_two_greenlets_at_once(store: Store) -> None:
    processor = store.processor(min_duration=0)
    caller = store.call(processor, "k", store.apply, 1, 0.5)
    store.clock.advance(0.1)
    stopping = [gevent.spawn(processor.stop), gevent.spawn(processor.stop, 5), gevent.spawn(processor.stop, 0.1)]
    store.clock.advance(1)
    assert [one.value for one in stopping] == [True, True, False]
    assert caller.answer == 1


def test_a_greenlet_killed_in_stop_leaves_the_stop_going_on(store: Store) -> None:
    processor = store.processor(min_duration=0)
    caller = store.call(processor, "k", store.apply, 1, 0.5)
    store.clock.advance(0.1)
    stopping = gevent.spawn(processor.stop)
    store.clock.advance(0.1)
    stopping.kill()
    with pytest.raises(ProcessorStopped):
        processor.run("other", add, 1)
    assert processor.stop() is True
    assert caller.answer == 1


# With a timeout


def test_stop_with_a_timeout_returns_false_when_time_is_up_and_the_rest_still_ends_by_itself(store: Store) -> None:
    processor = store.processor(min_duration=0, max_duration=5)
    caller = store.call(processor, "k", store.apply, 1, 2)
    store.clock.advance(0.5)
    assert processor.stop(timeout=1) is False
    assert store.clock.now() == 1.5
    assert not caller.answered
    store.clock.advance(1)
    assert caller.answer == 1
    assert caller.at == 2.03
    assert processor.stop(timeout=0) is True
    assert "0 workers" in repr(processor)


def test_stop_with_a_timeout_returns_true_as_soon_as_everything_has_ended(store: Store) -> None:
    processor = store.processor(min_duration=0)
    store.call(processor, "k", add, 1)
    store.clock.settle()
    assert processor.stop(timeout=100) is True
    assert store.clock.now() == 0.03


@pytest.mark.parametrize("where", ["greenlet", "hub", "load", "operation", "save", "worker number"])
def test_a_stop_with_timeout_0_may_be_called_from_anywhere_and_never_switches(store: Store, where: str) -> None:
    gave: list[Any] = []

    def stop(*args: object) -> int:
        gave.append(without_a_switch(lambda: processor.stop(timeout=0)))
        return 0

    processor = store.processor(
        min_duration=0,
        worker_number_for_key=zero if where != "worker number" else lambda *a: stop() if a[0] == "other" else 0,
    )
    if where == "load":
        store.on_load = stop
    if where == "save":
        store.on_save = stop
    caller = store.call(processor, "k", stop if where == "operation" else add, *([] if where == "operation" else [1]))
    store.clock.advance(0.005)
    if where == "greenlet":
        stop()
    if where == "hub":
        gave = in_hub(lambda: processor.stop(timeout=0))
    if where == "worker number":
        with pytest.raises(ProcessorStopped):
            processor.run("other", add, 1)
    store.clock.advance(1)
    assert gave == [False]
    assert caller.error is None
    if where == "hub":
        gave = in_hub(lambda: processor.stop(timeout=0))
        store.clock.settle()
        assert gave == [True]
    assert processor.stop(timeout=0) is True
    with pytest.raises(ProcessorStopped):
        processor.run("k", add, 2)


def test_a_stop_with_timeout_0_still_ends_what_was_admitted(store: Store) -> None:
    processor = store.processor(min_duration=10)
    callers = [store.call(processor, key, add, key) for key in "ab"]
    store.clock.advance(1)
    assert processor.stop(timeout=0) is False
    store.clock.advance(0.02)
    assert answers(callers) == ["a", "b"]
    assert processor.stop(timeout=0) is True


# Where it cannot wait


@pytest.mark.parametrize("timeout", [None, 1])
@pytest.mark.parametrize("where", ["load", "operation", "save"])
def test_a_blocking_stop_inside_a_batch_begins_the_stop_and_raises_runtime_error(
    store: Store, where: str, timeout: float | None
) -> None:
    raised: list[str] = []

    def stop(*args: object) -> None:
        with pytest.raises(RuntimeError, match=r"^stop\(\) has begun, but cannot wait here for its end") as error:
            without_a_switch(lambda: processor.stop(timeout=timeout))
        raised.append(str(error.value))

    processor = store.processor(min_duration=10)
    if where == "load":
        store.on_load = only_once(stop)
    if where == "save":
        store.on_save = only_once(stop)
    caller = store.call(processor, "k", stop if where == "operation" else do_nothing)
    store.clock.advance(20)
    assert len(raised) == 1
    assert caller.error is None
    assert processor.stop(timeout=0) is True
    with pytest.raises(ProcessorStopped):
        processor.run("k", add, 1)


@pytest.mark.parametrize("timeout", [None, 1])
def test_a_blocking_stop_in_the_hub_begins_the_stop_and_raises_runtime_error(
    store: Store, timeout: float | None
) -> None:
    processor = store.processor(min_duration=10)
    caller = store.call(processor, "k", add, 1)
    store.clock.advance(1)
    gave = in_hub(lambda: processor.stop(timeout=timeout))
    store.clock.settle()
    (error,) = gave
    assert type(error) is RuntimeError
    assert str(error).startswith("stop() has begun, but cannot wait here for its end")
    with pytest.raises(ProcessorStopped):
        processor.run("k", add, 2)
    store.clock.advance(1)
    assert caller.at == 1.02
    assert store.kept["k"] == [1]
    assert processor.stop(timeout=0) is True


def test_a_blocking_stop_inside_a_batch_of_another_processor_may_wait(store: Store) -> None:
    other: Processor[None] = Processor(min_duration=0)
    with store.processor(min_duration=0) as processor:
        other.run("k", do_nothing)
        assert processor.run("k", lambda resource: other.stop()) is True


# With trouble at the end


def test_stop_waits_for_a_batch_until_its_deadline_and_for_its_code_until_it_has_returned(store: Store) -> None:
    def hang(resource: list[Any]) -> None:
        try:
            gevent.sleep(100)
        finally:
            gevent.sleep(3)

    processor = store.processor(min_duration=0, max_duration=1)
    caller = store.call(processor, "k", hang)
    stopping = gevent.spawn(processor.stop)
    store.clock.advance(2)
    assert processor.stop(timeout=0) is False
    assert processor.stop() is True
    stopping.join()
    assert stopping.value is True
    assert caller.at == 1.0
    assert isinstance(caller.error, BatchTimeout)
    assert store.clock.now() == 4.0


def test_stop_returns_when_all_callers_have_left(store: Store) -> None:
    processor = store.processor(min_duration=10)
    callers = [store.call(processor, "k", add, mark) for mark in range(5)]
    store.clock.advance(0.005)
    for caller in callers:
        caller.kill()
    assert processor.stop() is True
    assert store.times("save") == []


def test_stop_returns_when_workers_are_killed_meanwhile(store: Store) -> None:
    workers: list[Any] = []

    def hang(resource: list[Any]) -> None:
        workers.append(current_greenlet())
        gevent.sleep(5)

    processor = store.processor(min_duration=0, workers=1)
    for number in range(5):
        store.call(processor, number, hang)
    store.clock.advance(0.1)
    stopping = gevent.spawn(processor.stop)
    store.clock.advance(0.1)
    gevent.killall(workers)
    stopping.join(1)
    assert stopping.value is True


def test_a_stopped_processor_leaves_another_one_running(store: Store) -> None:
    with store.processor(min_duration=0) as one, store.processor(min_duration=0) as other:
        one.run("k", add, 1)
        one.stop()
        assert other.run("k", add, 2) == 2

"""With `batching=False` any thread may call, and what it runs happens there (guarantee 19)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event
from gevent.monkey import get_original

from geventbatch import (
    BatchTimeout,
    Conflict,
    LoadFailed,
    Processor,
    ProcessorStopped,
)
from tests.support.callers import answer_of, in_a_thread
from tests.support.recording_store import add, do_nothing, raising

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


native_thread: Callable[[], int] = get_original("_thread", "get_ident")
new_lock: Any = get_original("_thread", "allocate_lock")
start_thread: Any = get_original("_thread", "start_new_thread")


def slow(*args: object) -> None:
    gevent.sleep(100)


def test_any_thread_may_call_and_everything_happens_there() -> None:
    ran: list[int] = []

    def note(*args: object) -> None:
        ran.append(native_thread())

    def operation(resource: None) -> int:
        note()
        return ran[-1]

    with Processor(load_resource=note, save_resource=note, batching=False) as processor:
        first = in_a_thread(processor.run, "k", operation)
        second = gevent.get_hub().threadpool.apply(processor.run, ("k", operation))
        third = processor.run("k", operation)
    assert ran == [first] * 3 + [second] * 3 + [third] * 3
    assert third == native_thread()
    assert third not in {first, second}


def test_fifty_threads_at_once_each_get_the_answer_of_their_own(clock: VirtualTime) -> None:
    answers: dict[int, object] = {}
    lock = new_lock()
    all_there = new_lock()
    all_ended = new_lock()
    all_there.acquire()
    all_ended.acquire()

    def operation(resource: None, number: int) -> int:
        with lock:
            inside.append(number)
            if len(inside) == 50:
                all_there.release()
        all_there.acquire()  # so that all are inside at once
        all_there.release()
        return number

    inside: list[int] = []
    processor = Processor(batching=False, max_duration=500)

    def caller(number: int) -> None:
        answer = answer_of(processor.run, "k", operation, number)
        with lock:
            answers[number] = answer
            if len(answers) == 50:
                all_ended.release()

    for number in range(50):
        start_thread(caller, (number,))
    assert all_ended.acquire(True, 30)
    assert answers == {number: number for number in range(50)}
    assert processor.stop() is True


def test_errors_and_replay_are_the_same_in_a_thread() -> None:
    conflicts = [Conflict(), Conflict()]
    loads: list[str] = []
    saved: list[list[Any]] = []

    def load(key: str) -> list[Any]:
        loads.append(key)
        return []

    def save(key: str, resource: list[Any]) -> None:
        if conflicts:
            raise conflicts.pop()
        saved.append(resource)

    with Processor(load_resource=load, save_resource=save, batching=False, max_duration=5) as processor:
        assert in_a_thread(processor.run, "k", add, "a") == "a"
        assert (loads, saved) == (["k"] * 3, [["a"]])
        refused = in_a_thread(processor.run, "k", raising(KeyError("taken")))
        assert isinstance(refused, KeyError)
    with Processor(load_resource=raising(OSError("gone")), batching=False) as failing:
        failed = in_a_thread(failing.run, "k", print)
        assert (type(failed), failed.retry_safe) == (LoadFailed, True)
    with Processor(load_resource=slow, batching=False, max_duration=0.02, min_duration=0) as slow_one:
        late = in_a_thread(slow_one.run, "k", print)
        assert (type(late), late.phase) == (BatchTimeout, "load")


def test_a_thread_that_runs_does_not_become_the_one_that_batches_belong_to() -> None:
    with Processor(batching=False) as off, Processor(min_duration=0) as on:
        assert in_a_thread(off.run, "k", lambda resource: 1) == 1
        assert on.run("k", lambda resource: 2) == 2


def test_stop_waits_for_what_runs_in_threads_and_admits_nothing_there_any_more() -> None:
    saved: list[str] = []
    inside, go_on, ended = Event(), new_lock(), new_lock()
    go_on.acquire()
    ended.acquire()
    hub = gevent.get_hub()

    def operation(resource: None) -> str:
        hub.loop.run_callback_threadsafe(inside.set)
        go_on.acquire()
        return "done"

    processor = Processor(
        save_resource=lambda key, resource: saved.append(key), batching=False, min_duration=0, max_duration=500
    )
    answers: list[Any] = []

    def thread() -> None:
        answers.append(answer_of(processor.run, "k", operation))
        ended.release()

    start_thread(thread, ())
    assert inside.wait(30)
    assert processor.stop(timeout=0) is False
    assert processor.stop(timeout=0.02) is False
    assert saved == []
    assert isinstance(in_a_thread(processor.run, "k", print), ProcessorStopped)
    go_on.release()
    assert processor.stop(timeout=30) is True
    assert saved == ["k"]
    assert ended.acquire(True, 30)
    assert answers == ["done"]


def test_stop_may_be_called_in_any_thread_when_batching_was_never_on() -> None:
    processor = Processor(batching=False)
    assert in_a_thread(processor.run, "k", lambda resource: 1) == 1
    assert in_a_thread(processor.stop) is True
    assert isinstance(answer_of(processor.run, "k", print), ProcessorStopped)
    assert processor.stop() is True


def test_two_threads_and_a_greenlet_may_stop_it_at_once_and_all_wait_for_the_same_end() -> None:
    inside, go_on = new_lock(), new_lock()
    inside.acquire()
    go_on.acquire()

    def operation(resource: None) -> None:
        inside.release()
        go_on.acquire()

    processor = Processor(batching=False, max_duration=500)
    pool = gevent.get_hub().threadpool
    callers = [pool.spawn(processor.run, "k", operation)]
    assert pool.apply(inside.acquire, (True, 30))
    stoppers: list[Any] = [
        pool.spawn(processor.stop, 30),
        pool.spawn(processor.stop, 30),
        gevent.spawn(processor.stop, 30),
        gevent.spawn(processor.stop, 0.01),
    ]
    assert stoppers[3].get() is False
    assert not any(stopper.ready() for stopper in stoppers[:3])
    go_on.release()
    assert [stopper.get() for stopper in stoppers[:3]] == [True] * 3
    assert callers[0].get() is None


def test_a_stop_that_gave_up_ends_by_itself_when_the_last_operation_ends_in_another_thread() -> None:
    processor: Processor[None] = Processor(min_duration=0)
    metrics = processor.subscribe_batch_metrics()
    processor.run("k", do_nothing)
    processor.batching = False
    arrived, go_on = Event(), new_lock()
    go_on.acquire()

    def wait_for_the_stop(_: object) -> None:
        hub.loop.run_callback_threadsafe(arrived.set)
        go_on.acquire()

    hub: Any = gevent.get_hub()
    running = hub.threadpool.spawn(processor.run, "k", wait_for_the_stop)
    assert arrived.wait(30)
    assert not processor.stop(timeout=0)
    go_on.release()
    running.get()
    assert len(list(metrics)) == 2

"""The off-switch (guarantee 19): with `batching=False` each `run` loads, applies and saves by itself, in its caller."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.local import local
from gevent.monkey import get_original

from geventbatch import (
    BatchTimeout,
    Conflict,
    LoadFailed,
    NothingToSave,
    NotSaved,
    Processor,
    ProcessorStopped,
    SaveFailed,
)
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime

COLOUR: ContextVar[str] = ContextVar("COLOUR", default="none")

native_thread: Callable[[], int] = get_original("_thread", "get_ident")
new_lock: Any = get_original("_thread", "allocate_lock")
start_thread: Any = get_original("_thread", "start_new_thread")


class Store:
    """One list with a version, as a database row has; a save of an old version is a conflict."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.saved: list[Any] = []
        self.loads = 0

    def load(self, key: str) -> list[Any]:
        self.loads += 1
        resource = list(self.saved)
        gevent.sleep(self.seconds)
        return resource

    def save(self, key: str, resource: list[Any]) -> None:
        if resource[: len(self.saved)] != self.saved:
            raise Conflict
        self.saved = resource


def alone(store: Store, **options: Any) -> Processor[list[Any]]:
    return Processor(
        **{
            "load_resource": store.load,
            "save_resource": store.save,
            "max_duration": 5,
            "batching": False,
            **options,
        }
    )


def append(resource: list[Any], value: Any) -> int:
    resource.append(value)
    return len(resource)


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: object) -> None:
        raise error

    return raise_it


def slow(*args: object) -> None:
    gevent.sleep(100)


def test_each_run_loads_applies_and_saves_by_itself_and_waits_for_no_window(clock: VirtualTime) -> None:
    noted: list[str] = []
    with Processor(
        load_resource=lambda key: noted.append("load"),
        save_resource=lambda key, resource: noted.append("save"),
        min_duration=1,
        batching=False,
    ) as processor:
        for _ in range(2):
            assert processor.run("k", lambda resource: noted.append("apply")) is None
    assert noted == ["load", "apply", "save"] * 2
    assert clock.now() == 0


def test_load_operation_and_save_run_in_the_callers_own_greenlet(clock: VirtualTime) -> None:
    ran: list[Any] = []

    def note(*args: object) -> None:
        ran.append(gevent.getcurrent())

    with Processor(load_resource=note, save_resource=note, batching=False) as processor:
        caller = gevent.spawn(processor.run, "k", note)
        caller.get()
        processor.run("k", note)
    assert ran == [caller] * 3 + [gevent.getcurrent()] * 3


def test_it_starts_no_worker(clock: VirtualTime) -> None:
    with Processor(batching=False) as processor:
        processor.run("k", lambda resource: None)
        assert "0 workers" in repr(processor)


def test_two_of_one_key_run_at_once_so_that_a_slow_one_delays_nobody(clock: VirtualTime) -> None:
    with Processor(batching=False, max_duration=5) as processor:
        callers = [gevent.spawn(processor.run, "k", lambda resource: gevent.sleep(1)) for _ in range(10)]
        gevent.joinall(callers, raise_error=True)
    assert clock.now() == 1


def test_it_is_right_over_a_store_that_detects_conflicts(clock: VirtualTime) -> None:
    store = Store(seconds=0.1)
    with alone(store, max_attempts=100, max_duration=500) as processor:
        callers = [gevent.spawn(processor.run, "k", append, number) for number in range(20)]
        answers = [caller.get() for caller in callers]
    assert sorted(answers) == list(range(1, 21))
    assert [store.saved[answer - 1] for answer in answers] == list(range(20))
    assert store.loads > 20


def test_it_is_right_over_a_store_that_locks(clock: VirtualTime) -> None:
    saved: list[int] = []
    lock = threading.Lock()  # gevent's, since threading is patched

    @contextmanager
    def scope(key: str) -> Iterator[list[int]]:
        with lock:
            resource = list(saved)
            yield resource
            gevent.sleep(0.1)
            saved[:] = resource

    with Processor(open_resource=scope, batching=False, max_duration=50) as processor:
        callers = [gevent.spawn(processor.run, "k", append, number) for number in range(20)]
        gevent.joinall(callers, raise_error=True)
    assert sorted(saved) == list(range(20))


def test_an_operation_runs_in_a_copy_of_its_callers_context_fresh_for_each_attempt(clock: VirtualTime) -> None:
    seen: list[str] = []
    conflicts = [Conflict()]

    def paint(resource: None) -> None:
        seen.append(COLOUR.get())
        COLOUR.set("painted")

    def save(key: str, resource: None) -> None:
        if conflicts:
            raise conflicts.pop()

    def caller() -> None:
        COLOUR.set("red")
        processor.run("k", paint)
        assert COLOUR.get() == "red"

    with Processor(save_resource=save, batching=False) as processor:
        gevent.spawn(caller).get()
    assert seen == ["red", "red"]


# The same errors and replay


def test_what_the_operation_raises_reaches_its_caller_unwrapped_and_nothing_is_saved(clock: VirtualTime) -> None:
    left: list[Any] = []

    class Scope:
        def __init__(self, key: str) -> None:
            pass

        def __enter__(self) -> None:
            pass

        def __exit__(self, kind: object, error: object, traceback: object) -> None:
            left.append(kind)
            raise OSError

    mine = KeyError("taken")
    with Processor(open_resource=Scope, batching=False) as processor:
        assert answer_of(processor.run, "k", raising(mine)) is mine
    assert left == [NothingToSave]


def test_a_load_that_fails_is_a_load_failed_and_a_save_that_fails_a_save_failed(clock: VirtualTime) -> None:
    gone = OSError("gone")
    for options, kind, cause, retry_safe in [
        ({"load_resource": raising(gone)}, LoadFailed, gone, True),
        ({"save_resource": raising(gone)}, SaveFailed, gone, False),
        ({"save_resource": raising(no := NotSaved())}, SaveFailed, no, True),
        ({"save_resource": raising(conflict := Conflict())}, SaveFailed, conflict, True),
    ]:
        chosen: dict[str, Any] = dict(options)
        with Processor(batching=False, max_attempts=2, **chosen) as processor:
            error = answer_of(processor.run, "k", lambda resource: None)
        assert (type(error), error.__cause__, error.retry_safe) == (kind, cause, retry_safe)


def test_a_conflict_is_replayed_up_to_max_attempts(clock: VirtualTime) -> None:
    loads: list[str] = []
    with Processor(
        load_resource=loads.append, save_resource=raising(Conflict()), batching=False, max_attempts=3
    ) as processor:
        error = answer_of(processor.run, "k", lambda resource: None)
    assert len(loads) == 3
    assert isinstance(error, SaveFailed)
    assert error.retry_safe


def test_the_deadline_interrupts_its_load_operation_or_save(clock: VirtualTime) -> None:
    for options, operation, phase in [
        ({"load_resource": slow}, print, "load"),
        ({}, slow, "operations"),
        ({"save_resource": slow}, lambda resource: None, "save"),
    ]:
        chosen: dict[str, Any] = dict(options)
        begun = clock.now()
        with Processor(batching=False, max_duration=5, **chosen) as processor:
            error = answer_of(processor.run, "k", operation)
        assert isinstance(error, BatchTimeout)
        assert (error.phase, error.retry_safe) == (phase, phase != "save")
        assert clock.now() == begun + 5


def test_past_the_deadline_nothing_is_saved_even_if_the_operation_never_yielded(clock: VirtualTime) -> None:
    store = Store()
    with alone(store) as processor:
        error = answer_of(processor.run, "k", lambda resource: clock.spend(6))
    assert isinstance(error, BatchTimeout)
    assert (error.phase, error.retry_safe) == ("operations", True)
    assert store.saved == []


def test_a_run_that_ended_leaves_no_timer(clock: VirtualTime) -> None:
    with Processor(batching=False, max_duration=5) as processor:
        processor.run("k", lambda resource: None, start_timeout=3)
        answer_of(processor.run, "k", raising(KeyError()), start_timeout=3)
        assert clock.timers == 0
        clock.advance(10)
    with Processor(load_resource=raising(OSError()), batching=False, max_duration=5) as failing:
        answer_of(failing.run, "k", print, start_timeout=3)
        assert clock.timers == 0
        clock.advance(10)


def test_a_broken_operation_is_not_saved_and_gives_its_caller_its_exception(clock: VirtualTime) -> None:
    store = Store()
    broken = OSError("half-way")
    with alone(store, clean_errors=()) as processor:
        assert answer_of(processor.run, "k", raising(broken)) is broken
    assert store.saved == []


@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_a_callers_own_timeout_is_its_own(clock: VirtualTime, phase: str) -> None:
    def part(name: str) -> Callable[..., None]:
        return slow if name == phase else lambda *args: gevent.sleep(0.25)

    own = gevent.Timeout(1)
    with (
        Processor(load_resource=part("load"), save_resource=part("save"), batching=False, max_duration=50) as processor,
        own,
    ):
        assert answer_of(processor.run, "k", part("operations")) is own
        assert clock.now() == 1


def test_a_caller_that_is_killed_ends_and_stop_does_not_wait_for_it(clock: VirtualTime) -> None:
    with Processor(batching=False, max_duration=50) as processor:
        caller = gevent.spawn(processor.run, "k", slow)
        clock.settle()
        caller.kill()
        assert caller.dead
        assert processor.stop() is True
    assert clock.now() == 0


def test_an_operation_that_kills_its_greenlet_ends_it_and_saves_nothing(clock: VirtualTime) -> None:
    store = Store()
    with alone(store) as processor:
        caller = gevent.spawn(processor.run, "k", raising(gevent.GreenletExit("by itself")))
        caller.join()
        assert isinstance(caller.value, gevent.GreenletExit)
    assert store.saved == []


# Stopping


def test_stop_waits_for_every_run_and_admits_none_any_more(clock: VirtualTime) -> None:
    store = Store(seconds=1)
    processor = alone(store)
    caller = gevent.spawn(processor.run, "k", append, 1)
    clock.advance(0.5)
    stopper = gevent.spawn(processor.stop)
    clock.settle()
    assert isinstance(answer_of(processor.run, "k", append, 2), ProcessorStopped)
    assert not stopper.ready()
    assert processor.stop(timeout=0.1) is False
    assert stopper.get() is True
    assert caller.ready()
    assert caller.get() == 1
    assert store.saved == [1]
    assert clock.now() == pytest.approx(1, abs=0.02)


# Switching


def test_it_can_be_switched_at_any_time_and_what_was_admitted_ends_as_it_began(clock: VirtualTime) -> None:
    store = Store(seconds=1)
    loads_before = 0
    with alone(store, batching=True, min_duration=0, max_attempts=50, max_duration=50) as processor:
        batched = [gevent.spawn(processor.run, "k", append, value) for value in "ab"]
        clock.advance(0.5)
        processor.batching = False
        assert processor.batching is False
        assert "batching off" in repr(processor)
        by_itself = gevent.spawn(processor.run, "k", append, "c")
        clock.settle()
        assert store.loads == loads_before + 2
        processor.batching = True
        assert "batching off" not in repr(processor)
        joining = gevent.spawn(processor.run, "k", append, "d")
        clock.settle()
        assert store.loads == 2, "it joins the batch that is open"
        gevent.joinall([*batched, by_itself, joining], raise_error=True)
    assert sorted(store.saved) == ["a", "b", "c", "d"]


def test_after_it_was_switched_off_stop_still_waits_for_the_batches(clock: VirtualTime) -> None:
    saved: list[str] = []
    processor = Processor(
        load_resource=lambda key: gevent.sleep(1),
        save_resource=lambda key, resource: saved.append(key),
        min_duration=0,
        max_duration=5,
    )
    callers = [gevent.spawn(processor.run, key, lambda resource: None) for key in "ab"]
    clock.advance(0.5)
    processor.batching = False
    callers.append(gevent.spawn(processor.run, "c", lambda resource: None))
    clock.settle()
    assert processor.stop() is True
    assert all(caller.ready() for caller in callers)
    assert sorted(saved) == ["a", "b", "c"]


def test_a_test_may_run_it_inside_a_transaction_of_its_own(clock: VirtualTime) -> None:
    """The connection of the caller's greenlet is the one that loads, operations and saves see."""
    here = local()
    here.transaction = "the test's"
    seen: list[str] = []

    def note(*args: object) -> None:
        seen.append(here.transaction)

    with Processor(load_resource=note, save_resource=note, batching=False) as processor:
        processor.run("k", note)
    assert seen == ["the test's"] * 3


def test_a_timeout_of_a_class_that_makes_no_timer_is_its_callers_own_too() -> None:
    class Bare(gevent.Timeout):
        def __init__(self) -> None:
            """Make nothing of gevent's."""

    own = Bare()

    def save(key: str, resource: None) -> None:
        try:
            raise own
        finally:
            raise KeyError

    with Processor(save_resource=save, min_duration=0, batching=False) as processor:
        assert answer_of(processor.run, "k", print) is own

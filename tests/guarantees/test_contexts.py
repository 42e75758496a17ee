"""Guarantee 11: contexts, and which workers are used again."""

from __future__ import annotations

from contextvars import Context, ContextVar, copy_context
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchAborted, BatchTimeout, Conflict, LoadFailed, SaveFailed
from tests.support.recording_store import FORMS, Store, add, current_greenlet, only_once, raising

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime

who: ContextVar[str] = ContextVar("who", default="nobody")


class Odd(BaseException):
    """Neither an Exception nor a kill."""


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


def ask_who(resource: list[Any]) -> str:
    return who.get()


def as_caller(name: str, call: Callable[..., Any], *args: Any) -> Any:
    """Call in a context in which *name* is who; a new greenlet begins with an empty one."""

    def run() -> Any:
        who.set(name)
        return call(*args)

    return copy_context().run(run)


# Operations


def test_an_operation_runs_in_the_context_of_its_caller(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        assert as_caller("Ann", processor.run, "k", ask_who) == "Ann"


def test_each_operation_of_a_batch_runs_in_its_own_caller_s_context(store: Store) -> None:
    names = [f"caller {number}" for number in range(100)]
    with store.processor(min_duration=0) as processor:
        callers = [gevent.spawn(as_caller, name, processor.run, "k", ask_who) for name in names]
        gevent.joinall(callers)
        assert [caller.value for caller in callers] == names
        assert len(store.times("load")) == 1


def test_an_operation_sees_the_context_as_it_was_at_run_and_not_as_it_was_changed_in_the_course_of_it(
    store: Store,
) -> None:
    def number_for(key: Any, workers: int) -> int:
        who.set("the worker number")
        return 0

    with store.processor(min_duration=0, worker_number_for_key=number_for) as processor:
        assert as_caller("Ann", processor.run, "k", ask_who) == "Ann"


def test_what_an_operation_sets_does_not_reach_its_caller_or_any_other_operation(store: Store) -> None:
    def set_who(resource: list[Any], name: str) -> str:
        before = who.get()
        who.set(name)
        return before

    def calls_twice() -> tuple[str, str, str]:
        return processor.run("k", set_who, "changed"), who.get(), processor.run("k", ask_who)

    with store.processor(min_duration=0) as processor:
        callers = [gevent.spawn(as_caller, f"caller {number}", calls_twice) for number in range(40)]
        gevent.joinall(callers)
        assert [caller.value for caller in callers] == [(f"caller {number}",) * 3 for number in range(40)]


def test_callers_with_copies_of_one_context_may_share_a_batch(store: Store) -> None:
    def run_ten_times() -> list[str]:
        def run_in(context: Context) -> str:
            return context.run(processor.run, "k", ask_who)

        callers = [gevent.spawn(run_in, copy_context()) for _ in range(10)]
        gevent.joinall(callers)
        return [str(caller.value) for caller in callers]

    with store.processor(min_duration=0) as processor:
        assert as_caller("Ann", run_ten_times) == ["Ann"] * 10


def test_an_operation_that_yields_keeps_its_context(store: Store) -> None:
    def look_twice(resource: list[Any]) -> tuple[str, str]:
        first = who.get()
        gevent.sleep(0.05)
        return first, who.get()

    with store.processor(min_duration=0) as processor:
        callers = [gevent.spawn(as_caller, name, processor.run, name, look_twice) for name in ("Ann", "Bob")]
        gevent.joinall(callers)
        assert [caller.value for caller in callers] == [("Ann", "Ann"), ("Bob", "Bob")]


def test_each_attempt_has_a_fresh_copy_of_the_caller_s_context(store: Store) -> None:
    seen: list[str] = []

    def change(resource: list[Any]) -> None:
        seen.append(who.get())
        who.set("of the attempt before")

    def conflict_twice(key: Any) -> None:
        if len(seen) < 3:
            raise Conflict

    store.on_save = conflict_twice
    with store.processor(min_duration=0) as processor:
        as_caller("Ann", processor.run, "k", change)
        assert seen == ["Ann", "Ann", "Ann"]


# Load and save


def test_load_and_save_of_a_batch_share_one_context(store: Store) -> None:
    seen: list[str] = []
    store.on_load = lambda key: who.set("the batch")
    store.on_save = lambda key: seen.append(who.get())
    with store.processor(min_duration=0) as processor:
        as_caller("Ann", processor.run, "k", add, 1)
        assert seen == ["the batch"]


def test_load_and_save_see_nothing_of_their_callers_contexts_or_of_what_operations_set(store: Store) -> None:
    seen: list[str] = []
    store.on_load = store.on_save = lambda key: seen.append(who.get())

    def set_who(resource: list[Any]) -> None:
        who.set("the operation")

    with store.processor(min_duration=0) as processor:
        as_caller("Ann", processor.run, "k", set_who)
        assert seen == ["nobody", "nobody"]


def test_operations_see_nothing_of_what_the_load_set(store: Store) -> None:
    store.on_load = lambda key: who.set("the load")
    with store.processor(min_duration=0) as processor:
        assert processor.run("k", ask_who) == "nobody"
        assert as_caller("Ann", processor.run, "k", ask_who) == "Ann"


@pytest.mark.parametrize("failing", ["nothing", "load", "operation", "save"])
def test_nothing_leaks_from_batch_to_batch_on_the_same_worker(store: Store, failing: str) -> None:
    workers: set[Any] = set()
    seen: list[str] = []

    def mark_in(place: str) -> Callable[..., None]:
        def mark(*args: object) -> None:
            workers.add(current_greenlet())
            who.set("the batch before")
            if place == failing:
                raise OSError

        return mark

    def look(*args: object) -> None:
        workers.add(current_greenlet())
        seen.append(who.get())

    store.on_load, store.on_save = mark_in("load"), mark_in("save")
    with store.processor(min_duration=0, workers=1) as processor:
        caller = store.call(processor, "k", mark_in("operation"))
        store.clock.advance(1)
        assert (caller.error is None) == (failing == "nothing")
        store.on_load = store.on_save = look
        processor.run("k", look)
        processor.run("other", look)
        assert seen == ["nobody"] * 6
        assert len(workers) == 1


def test_batches_that_run_at_the_same_time_have_contexts_of_their_own(store: Store) -> None:
    seen: list[tuple[Any, str]] = []

    def set_who(key: Any) -> None:
        who.set(f"batch of {key}")

    store.on_load = set_who
    store.on_save = lambda key: seen.append((key, who.get()))
    with store.processor(min_duration=0, workers=1) as processor:
        gevent.joinall([gevent.spawn(processor.run, number, add, 1) for number in range(20)])
        assert seen == [(number, f"batch of {number}") for number in range(20)]


def test_the_clean_up_of_a_scope_runs_in_the_context_of_its_load(clock: VirtualTime) -> None:
    store = Store(clock, "scope")
    seen: list[str] = []
    store.on_load = lambda key: who.set("the batch")
    store.on_leave = lambda error: seen.append(who.get())
    with store.processor(min_duration=0) as processor, pytest.raises(ValueError, match="taken"):
        processor.run("k", raising(ValueError("taken")))
    assert seen == ["the batch"]


# Which workers are used again


def worker_of_next(processor: Any) -> Any:
    return processor.run("next", current_greenlet)


def test_a_worker_whose_batch_ended_well_is_used_again(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        assert processor.run("k", current_greenlet) is worker_of_next(processor)


@pytest.mark.parametrize("phase", ["load", "save"])
def test_a_worker_whose_load_or_save_raised_an_exception_is_used_again(store: Store, phase: str) -> None:
    seen: list[Any] = []

    def note_and_fail(key: Any) -> None:
        seen.append(current_greenlet())
        raise OSError

    if phase == "load":
        store.on_load = only_once(note_and_fail)
    else:
        store.on_save = only_once(note_and_fail)
    with store.processor(min_duration=0, workers=1) as processor:
        with pytest.raises((LoadFailed, SaveFailed)):
            processor.run("k", add, 1)
        assert worker_of_next(processor) is seen[0]


def hang(*args: Any) -> None:
    gevent.sleep(100)


def hang_and_raise_something_else(*args: Any) -> None:
    try:
        gevent.sleep(100)
    except gevent.Timeout:
        raise OSError from None


def hang_and_swallow(*args: Any) -> None:
    try:
        gevent.sleep(100)
    except gevent.Timeout:
        return


@pytest.mark.parametrize("hanging", [hang, hang_and_raise_something_else, hang_and_swallow])
@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_a_worker_whose_batch_ended_by_deadline_is_not_used_again_whatever_its_code_made_of_that(
    store: Store, phase: str, hanging: Callable[..., None]
) -> None:
    assert_not_used_again(store, phase, hanging, BatchTimeout)


def test_a_worker_whose_operations_passed_the_deadline_without_a_yield_is_not_used_again(store: Store) -> None:
    assert_not_used_again(store, "operations", lambda resource: store.clock.spend(2), BatchTimeout)


@pytest.mark.parametrize(
    ("phase", "kind"),
    [
        *((phase, kind) for phase in ("load", "operations", "save") for kind in (Odd, gevent.GreenletExit)),
        ("load", gevent.Timeout),  # one that an operation lets out is its own, and does not end the batch
        ("save", gevent.Timeout),
    ],
)
def test_a_worker_whose_batch_ended_by_a_base_exception_is_not_used_again(
    store: Store, phase: str, kind: type[BaseException]
) -> None:
    assert_not_used_again(store, phase, raising(kind()), BatchAborted)


def assert_not_used_again(store: Store, phase: str, wrong: Callable[..., Any], error: type[Exception]) -> None:
    seen: list[Any] = []

    def go_wrong(*args: Any) -> None:
        seen.append(current_greenlet())
        wrong(*args)

    if phase == "load":
        store.on_load = only_once(go_wrong)
    if phase == "save":
        store.on_save = only_once(go_wrong)
    with store.processor(min_duration=0, max_duration=1, workers=1) as processor:
        caller = store.call(processor, "k", go_wrong if phase == "operations" else lambda resource: None)
        store.clock.advance(3)
        assert isinstance(caller.error, error)
        assert worker_of_next(processor) is not seen[0]
        assert seen[0].dead

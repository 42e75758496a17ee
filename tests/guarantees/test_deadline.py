"""Guarantee 6: the deadline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchTimeout, LoadFailed, Processor, SaveFailed
from tests.support.callers import answer_of
from tests.support.recording_store import FORMS, Caller, Store, add, answered_at, answers, fail, only_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime

PHASES = ("load", "operations", "save")


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param)


def sleep_on_and_on(*args: object) -> None:
    gevent.sleep(100)


def block_in_clean_up(seconds: float) -> Callable[..., None]:
    """Hang, and when interrupted take *seconds* to clean up, as a ROLLBACK to a dead peer does."""

    def hang(*args: object) -> None:
        try:
            gevent.sleep(100)
        finally:
            gevent.sleep(seconds)

    return hang


def swallow_the_interruption(resource: object = None, *args: object) -> str:
    try:
        gevent.sleep(100)
    except BaseException:
        if isinstance(resource, list):
            resource.append("swallowed")
    return "swallowed"


def hang_in(store: Store, phase: str, hang: Callable[..., object]) -> Callable[..., object]:
    """Have the first batch hang in *phase*; give the operation to run in it."""
    if phase == "load":
        store.on_load = only_once(hang)
    if phase == "save":
        store.on_save = only_once(hang)
    return hang if phase == "operations" else no_change


def no_change(resource: list[Any]) -> None:
    """An operation that completes."""


def assert_timed_out(callers: list[Caller], phase: str, at: float) -> None:
    assert answered_at(callers) == [at] * len(callers)
    errors = answers(callers)
    assert [type(error) for error in errors] == [BatchTimeout] * len(callers)
    assert len({id(error) for error in errors}) == len(callers)
    assert {error.phase for error in errors} == {phase}
    assert {error.retry_safe for error in errors} == {phase != "save"}
    assert {error.key for error in errors} == {"k"}


# Answered at the deadline


@pytest.mark.parametrize("phase", PHASES)
def test_at_the_deadline_all_callers_are_answered_and_told_the_phase_and_whether_it_is_safe_to_run_again(
    store: Store, phase: str
) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        hangs = hang_in(store, phase, sleep_on_and_on)
        callers = [store.call(processor, "k", no_change), store.call(processor, "k", hangs)]
        callers += [store.call(processor, "k", no_change) for _ in range(100)]
        store.clock.advance(2)
        assert_timed_out(callers, phase, at=1.0)
        assert store.times("saved") == []


@pytest.mark.parametrize("phase", PHASES)
def test_callers_are_answered_at_the_deadline_while_the_clean_up_of_the_interrupted_code_still_blocks(
    store: Store, phase: str
) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        caller = store.call(processor, "k", hang_in(store, phase, block_in_clean_up(5)))
        store.clock.advance(1)
        assert_timed_out([caller], phase, at=1.0)


@pytest.mark.parametrize("phase", PHASES)
def test_the_key_is_released_when_the_interrupted_code_has_returned_and_not_before(store: Store, phase: str) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        store.call(processor, "k", hang_in(store, phase, block_in_clean_up(5)))
        store.clock.advance(2)
        behind = store.call(processor, "k", add, "behind")
        store.clock.advance(3.9)
        assert len(store.times("load")) == 1
        store.clock.advance(2)
        assert store.times("load") == [0.0, 6.0]
        assert behind.answer == "behind"
        assert store.kept["k"] == ["behind"]


@pytest.mark.parametrize("phase", PHASES)
def test_stop_ends_when_the_interrupted_code_has_returned(store: Store, phase: str) -> None:
    processor = store.processor(min_duration=0, max_duration=1)
    store.call(processor, "k", hang_in(store, phase, block_in_clean_up(5)))
    store.clock.advance(2)
    assert processor.stop(timeout=1) is False
    assert store.clock.now() == 3
    assert processor.stop() is True
    assert store.clock.now() == 6


@pytest.mark.parametrize("phase", PHASES)
def test_the_running_code_is_interrupted_at_its_next_yield(store: Store, phase: str) -> None:
    seen: list[float] = []

    def look(*args: object) -> None:
        store.clock.spend(1.5)  # the interruption does not reach code that never yields
        try:
            gevent.sleep(100)
        except gevent.Timeout:
            seen.append(store.clock.now())
            raise

    with store.processor(min_duration=0, max_duration=1) as processor:
        store.call(processor, "k", hang_in(store, phase, look))
        store.clock.advance(2)
        assert seen == [1.5]


def test_at_the_deadline_the_batch_closes(store: Store) -> None:
    store.on_load = only_once(block_in_clean_up(1))
    with store.processor(min_duration=0, max_duration=1) as processor:
        first = store.call(processor, "k", add, "first")
        store.clock.advance(1.5)
        late = store.call(processor, "k", add, "late")
        store.clock.advance(2)
        assert_timed_out([first], "load", at=1.0)
        assert late.answer == "late"
        assert store.kept["k"] == ["late"]


def test_a_load_that_meets_the_deadline_answers_those_in_batches_behind_too(store: Store) -> None:
    store.on_load = only_once(sleep_on_and_on)
    with store.processor(min_duration=0, max_duration=1, max_batch_size=2) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(7)]
        store.clock.advance(2)
        assert_timed_out(callers, "load", at=1.0)
        assert len(store.times("load")) == 1


@pytest.mark.parametrize("phase", ["operations", "save"])
def test_a_deadline_after_the_load_answers_nobody_of_the_batches_behind(store: Store, phase: str) -> None:
    with store.processor(min_duration=0, max_duration=1, max_batch_size=1) as processor:
        first = store.call(processor, "k", hang_in(store, phase, sleep_on_and_on))
        behind = store.call(processor, "k", add, "behind")
        store.clock.advance(2)
        assert_timed_out([first], phase, at=1.0)
        assert behind.answer == "behind"


def test_nothing_is_saved_and_the_scope_is_left_with_an_exception_when_operations_meet_the_deadline(
    clock: VirtualTime,
) -> None:
    store = Store(clock, "scope")
    with store.processor(min_duration=0, max_duration=1) as processor:
        store.call(processor, "k", add, 1)
        store.call(processor, "k", sleep_on_and_on)
        clock.advance(2)
        assert store.times("save") == []
        assert len(store.left) == 1


def test_what_a_scope_makes_of_being_left_at_the_deadline_changes_no_answer(clock: VirtualTime) -> None:
    store = Store(clock, "scope")

    def raise_late(error: BaseException) -> None:
        gevent.sleep(1)
        raise OSError

    store.on_leave = only_once(raise_late)
    with store.processor(min_duration=0, max_duration=1) as processor:
        caller = store.call(processor, "k", sleep_on_and_on)
        clock.advance(1.5)
        behind = store.call(processor, "k", add, "behind")
        clock.advance(2)
        assert_timed_out([caller], "operations", at=1.0)
        assert behind.at == 2.0


def test_callers_are_answered_at_the_deadline_even_when_the_own_timeout_of_an_operation_expires_with_it(
    store: Store,
) -> None:
    def waits_as_long_as_the_batch(resource: list[Any]) -> None:
        with gevent.Timeout(1):
            gevent.sleep(100)

    with store.processor(min_duration=0, max_duration=1) as processor:
        caller = store.call(processor, "k", waits_as_long_as_the_batch)
        other = store.call(processor, "k", no_change)
        store.clock.advance(2)
        assert_timed_out([caller, other], "operations", at=1.0)
        assert processor.run("k", add, 1) == 1


# What comes later is ignored


@pytest.mark.parametrize("phase", PHASES)
def test_what_code_that_swallowed_the_interruption_returns_is_ignored(store: Store, phase: str) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        caller = store.call(processor, "k", hang_in(store, phase, swallow_the_interruption))
        other = store.call(processor, "k", store.apply, "other")
        store.clock.advance(2)
        assert_timed_out([caller, other], phase, at=1.0)
        if phase != "save":
            assert store.times("apply") == []
            assert store.times("save") == []
        store.kept.clear()
        assert processor.run("k", add, "next") == "next"
        assert store.kept["k"] == ["next"]


@pytest.mark.parametrize("phase", PHASES)
def test_what_code_raises_after_the_interruption_is_ignored(store: Store, phase: str) -> None:
    def raise_something_else(*args: object) -> None:
        try:
            gevent.sleep(100)
        except gevent.Timeout as error:
            gevent.sleep(0.5)
            raise OSError("the driver's own idea of a timeout") from error

    with store.processor(min_duration=0, max_duration=1) as processor:
        caller = store.call(processor, "k", hang_in(store, phase, raise_something_else))
        store.clock.advance(2)
        assert_timed_out([caller], phase, at=1.0)
        assert not isinstance(caller.error, (LoadFailed, SaveFailed))


def test_operations_behind_one_that_swallowed_the_interruption_do_not_run(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        store.call(processor, "k", lambda resource: gevent.sleep(0.9995))  # the library has no reason to pause after it
        store.call(processor, "k", swallow_the_interruption)
        store.call(processor, "k", store.apply, "behind")
        store.clock.advance(2)
        assert store.times("apply") == []


def test_to_what_a_load_returned_that_swallowed_the_interruption_nothing_is_applied_and_its_scope_is_left(
    clock: VirtualTime,
) -> None:
    store = Store(clock, "scope")
    store.on_load = only_once(swallow_the_interruption)
    with store.processor(min_duration=0, max_duration=1) as processor:
        store.call(processor, "k", store.apply, 1)
        clock.advance(2)
        assert store.times("apply") == []
        assert len(store.left) == 1


def test_who_comes_after_the_deadline_of_a_load_that_swallowed_it_has_a_load_of_his_own(clock: VirtualTime) -> None:
    loads: list[float] = []

    def load(_: object) -> list[str]:
        loads.append(clock.now())
        if len(loads) == 1:
            try:
                gevent.sleep(100)
            except gevent.Timeout:
                gevent.sleep(0.5)
        return []

    processor = Processor(load_resource=load, min_duration=0, max_duration=1)
    first = gevent.spawn(answer_of, processor.run, "k", no_change)
    clock.advance(1.2)
    later = gevent.spawn(processor.run, "k", lambda _: "saved")
    clock.advance(1)
    assert isinstance(first.value, BatchTimeout)
    assert (later.value, loads) == ("saved", [0.0, 1.5])
    processor.stop()


# What never yields


def test_past_the_deadline_nothing_is_saved_so_that_work_that_never_yields_leaves_no_unknown_outcome(
    store: Store,
) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        callers = [store.call(processor, "k", no_change)]
        callers += [store.call(processor, "k", lambda resource: store.clock.spend(1.2))]
        store.clock.advance(2)
        assert [type(error) for error in answers(callers)] == [BatchTimeout] * 2
        assert all(error.phase == "operations" and error.retry_safe for error in answers(callers))
        assert all(at and 1.2 <= at < 1.201 for at in answered_at(callers))  # the hub had its turn in between
        assert store.times("save") == []


def test_the_clock_is_read_before_the_save_even_when_the_deadline_is_only_just_past(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        callers = [
            store.call(processor, "k", lambda resource: gevent.sleep(0.9995)),
            store.call(processor, "k", lambda resource: store.clock.spend(0.001)),
        ]
        store.clock.advance(2)
        assert_timed_out(callers, "operations", at=1.0005)
        assert store.times("save") == []


def test_many_short_operations_that_never_yield_end_soon_after_the_deadline_and_are_not_saved(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        callers = [store.call(processor, "k", lambda resource: store.clock.spend(0.002)) for _ in range(1000)]
        store.clock.advance(3)
        assert {type(error) for error in answers(callers)} == {BatchTimeout}
        assert all(at and 1.0 <= at < 1.1 for at in answered_at(callers))
        assert store.times("save") == []


def test_a_load_that_never_yields_past_the_deadline_is_not_saved(store: Store) -> None:
    store.on_load = only_once(lambda key: store.clock.spend(1.2))
    with store.processor(min_duration=0, max_duration=1) as processor:
        caller = store.call(processor, "k", no_change)
        store.clock.advance(2)
        assert isinstance(caller.error, BatchTimeout)
        assert caller.error.retry_safe
        assert store.times("save") == []


def test_a_save_that_never_yields_past_the_deadline_and_returns_is_saved_and_answered_so(store: Store) -> None:
    store.on_save = lambda key: store.clock.spend(1.2)
    with store.processor(min_duration=0, max_duration=1) as processor:
        caller = store.call(processor, "k", add, 1)
        store.clock.advance(2)
        assert caller.answer == 1
        assert store.kept["k"] == [1]


# When it begins


def test_the_deadline_counts_from_the_moment_that_the_batch_starts_to_run(store: Store) -> None:
    store.load_time = 0.6
    with store.processor(min_duration=0, max_duration=1, max_batch_size=1) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(5)]  # the last waits for 2.4 s
        store.clock.advance(5)
        assert answers(callers) == store.kept["k"] == [0, 1, 2, 3, 4]
        assert callers[-1].at == 3.0


def test_the_deadline_does_not_count_the_wait_for_one_of_max_batches(store: Store) -> None:
    store.load_time = 0.6
    with store.processor(min_duration=0, max_duration=1, max_batches=1) as processor:
        callers = [store.call(processor, f"k{number}", add, number) for number in range(5)]
        store.clock.advance(5)
        assert answers(callers) == [0, 1, 2, 3, 4]


def test_each_batch_of_a_worker_has_the_whole_of_its_own_max_duration(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=1, workers=1) as processor:
        for seconds in (0.9, 0.3, 0.9, 0.99, 0.1, 0.8):
            processor.run("k", store.apply, 1, seconds)
        before = store.clock.now()
        with pytest.raises(BatchTimeout):
            processor.run("k", sleep_on_and_on)
        assert round(store.clock.now() - before, 9) == 1.0


def test_after_a_batch_that_ended_just_before_its_deadline_nobody_is_interrupted(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=1, workers=1) as processor:
        processor.run("k", lambda resource: store.clock.spend(0.9999))
        assert processor.run("k", store.apply, 1, 0.5) == 1
        store.clock.advance(5)
        assert processor.run("k", store.apply, 2, 0.9) == 2


# The library's own pauses


def test_the_library_s_own_pauses_do_not_count(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0, max_duration=1)
    ended = []

    def book(key: int) -> None:
        processor.run(key, lambda resource: clock.spend(0.0001))
        ended.append(clock.now())

    with processor:
        callers = [gevent.spawn(book, key) for key in range(20) for _ in range(1000)]
        gevent.joinall(callers, raise_error=True)
    assert len(ended) == 20_000
    assert max(ended) >= 2.0


def test_the_deadline_still_comes_on_time_after_a_pause(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        callers = [store.call(processor, "k", lambda resource: store.clock.spend(0.0001)) for _ in range(200)]
        callers.append(store.call(processor, "k", sleep_on_and_on))
        store.clock.advance(3)
        assert {type(error) for error in answers(callers)} == {BatchTimeout}
        assert all(at and 1.0 <= at < 1.001 for at in answered_at(callers))


def test_a_deadline_that_falls_into_a_pause_comes_when_the_rest_of_the_time_has_passed_after_it(store: Store) -> None:
    def hold_the_hub_after_this(resource: list[Any]) -> None:
        store.clock.spend(0.004)  # so the library pauses, 1 ms before the deadline
        gevent.spawn(store.clock.spend, 0.005)  # and the deadline passes meanwhile

    with store.processor(min_duration=0, max_duration=1) as processor:
        callers = [
            store.call(processor, "k", lambda resource: gevent.sleep(0.995)),
            store.call(processor, "k", hold_the_hub_after_this),
            store.call(processor, "k", sleep_on_and_on),
        ]
        store.clock.advance(3)
        assert {type(error) for error in answers(callers)} == {BatchTimeout}
        assert all(at and 1.005 <= at < 1.01 for at in answered_at(callers))


# Near misses


def test_an_operation_that_raised_is_told_of_the_deadline_like_all_others(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=1) as processor:
        callers = [store.call(processor, "k", fail, ValueError()), store.call(processor, "k", sleep_on_and_on)]
        store.clock.advance(2)
        assert_timed_out(callers, "operations", at=1.0)


def test_a_batch_that_ends_just_before_its_deadline_is_saved(store: Store) -> None:
    store.load_time, store.save_time = 0.3, 0.3
    with store.processor(min_duration=0, max_duration=1) as processor:
        assert processor.run("k", store.apply, 1, 0.399) == 1
        assert store.clock.now() == 0.999


def test_a_caller_that_runs_again_at_the_deadline_waits_for_the_key_and_is_answered(store: Store) -> None:
    store.on_load = only_once(block_in_clean_up(2))
    told: list[float] = []

    def insists() -> None:
        with pytest.raises(BatchTimeout):
            processor.run("k", add, 1)
        told.append(store.clock.now())
        processor.run("k", add, 1)
        told.append(store.clock.now())

    with store.processor(min_duration=0, max_duration=1) as processor:
        gevent.joinall([gevent.spawn(insists) for _ in range(3)], raise_error=True)
        assert told == [1.0] * 3 + [3.0] * 3
        assert store.kept["k"] == [1, 1, 1]

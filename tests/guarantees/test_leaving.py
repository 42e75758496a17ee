"""Guarantee 7: nobody strands anybody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import gevent
import pytest
from gevent.exceptions import InvalidSwitchError

from geventbatch import BatchAborted, Conflict, LoadFailed, SaveFailed
from tests.support.recording_store import (
    FORMS,
    Caller,
    Store,
    add,
    answers,
    kill_here,
    only_once,
    raising,
)

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime

KILLS: Final = (gevent.GreenletExit, SystemExit, KeyboardInterrupt)


class Odd(BaseException):
    """Neither an Exception nor a kill."""


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


def advance_through_system_errors(clock: VirtualTime, seconds: float) -> list[BaseException]:
    """Advance; the hub raises here the SystemExit or KeyboardInterrupt that ended another greenlet."""
    raised: list[BaseException] = []
    end = clock.now() + seconds
    while clock.now() < end:
        try:
            clock.advance(end - clock.now())
        except (SystemExit, KeyboardInterrupt) as error:
            raised.append(error)
    return raised


# A caller that leaves, leaves alone


def test_a_caller_that_something_else_switches_to_has_no_answer_and_leaves(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        first = store.call(processor, "k", add, "first")
        store.clock.advance(0.015)
        waiting = store.call(processor, "k", add, "waiting")
        last = store.call(processor, "k", add, "last")
        store.clock.advance(0.001)
        gevent.get_hub().loop.run_callback(waiting.greenlet.switch)
        store.clock.advance(1)
        assert type(waiting.error) is InvalidSwitchError
        assert answers([first, last]) == ["first", "last"]
        assert store.kept["k"] == ["first", "last"]
        assert processor.stats().withdrawn_total == 1


def test_a_caller_that_is_killed_before_its_operation_started_takes_only_that_with_it(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        first = store.call(processor, "k", add, "first")
        killed = store.call(processor, "k", add, "killed")
        last = store.call(processor, "k", add, "last")
        store.clock.advance(0.005)
        killed.kill()
        store.clock.advance(1)
        assert isinstance(killed.error, gevent.GreenletExit)
        assert killed.at == 0.005
        assert answers([first, last]) == store.kept["k"] == ["first", "last"]


def test_a_caller_whose_own_timeout_fires_before_its_operation_started_takes_only_that_with_it(store: Store) -> None:
    timeout = gevent.Timeout(0.005)
    raised: list[tuple[float, bool]] = []

    def hurry() -> None:
        try:
            with timeout:
                processor.run("k", add, "hurried")
        except gevent.Timeout as error:
            raised.append((store.clock.now(), error is timeout))

    with store.processor(min_duration=0) as processor:
        first = store.call(processor, "k", add, "first")
        gevent.spawn(hurry)
        last = store.call(processor, "k", add, "last")
        store.clock.advance(1)
        assert raised == [(0.005, True)]
        assert answers([first, last]) == store.kept["k"] == ["first", "last"]


def test_when_a_caller_leaves_after_its_operation_started_the_batch_goes_on(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        started = store.call(processor, "k", store.apply, "started", 0.5)
        other = store.call(processor, "k", add, "other")
        store.clock.advance(0.1)
        started.kill()
        store.clock.advance(1)
        assert isinstance(started.error, gevent.GreenletExit)
        assert other.answer == "other"
        assert store.kept["k"] == ["started", "other"]


@pytest.mark.parametrize("when", [0.1, 0.52])
def test_when_all_callers_leave_a_started_batch_it_is_saved(store: Store, when: float) -> None:
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", store.apply, "started", 0.5)]
        store.clock.advance(when)
        for caller in callers:
            caller.kill()
        store.clock.advance(1)
        assert store.kept["k"] == ["started"]
        assert processor.run("k", add, "next") == "next"


def test_what_a_caller_started_before_it_left_is_in_the_replay_too(store: Store) -> None:
    store.on_save = only_once(raising(Conflict()))
    with store.processor(min_duration=0) as processor:
        started = store.call(processor, "k", store.apply, "started", 0.1)
        other = store.call(processor, "k", add, "other")
        store.clock.advance(0.05)
        started.kill()
        store.clock.advance(1)
        assert other.answer == "other"
        assert len(store.times("load")) == 2
        assert store.kept["k"] == ["started", "other"]


def test_a_caller_that_was_killed_before_it_ran_has_admitted_nothing(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        store.call(processor, "k", add, 1).kill()
        store.clock.advance(1)
        assert store.log == []


# A batch that everyone left


def test_a_batch_that_everyone_left_before_it_started_is_dropped_without_a_load(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        first = store.call(processor, "k", add, "first")
        store.clock.advance(0.02)  # it saves
        behind = [store.call(processor, "k", add, mark) for mark in range(40)]
        store.clock.advance(0.005)
        for caller in behind:
            caller.kill()
        store.clock.advance(1)
        assert first.answer == "first"
        assert len(store.times("load")) == 1
        assert processor.run("k", add, "next") == "next"
        assert store.kept["k"] == ["first", "next"]


def test_a_batch_that_everyone_left_before_a_worker_took_it_is_dropped_without_a_load(store: Store) -> None:
    with store.processor(min_duration=0, max_batches=1) as processor:
        slow = store.call(processor, "slow", store.apply, "slow", 0.5)
        store.clock.advance(0.1)
        left = store.call(processor, "k", add, "left")
        store.clock.advance(0.1)
        left.kill()
        store.clock.advance(1)
        assert slow.answer == "slow"
        assert store.times("load", "k") == []
        assert processor.run("k", add, "next") == "next"


def test_an_operation_that_comes_to_a_batch_that_everyone_else_has_left_is_applied(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        store.call(processor, "k", add, "first")
        store.clock.advance(0.02)
        left = store.call(processor, "k", add, "left")
        store.clock.advance(0.002)
        left.kill()
        store.clock.advance(0.002)
        later = store.call(processor, "k", add, "later")
        store.clock.advance(1)
        assert later.answer == "later"
        assert store.kept["k"] == ["first", "later"]


def test_a_batch_that_everyone_left_during_its_load_is_not_saved(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(3)]
        store.clock.advance(0.005)
        for caller in callers:
            caller.kill()
        store.clock.advance(1)
        assert store.times("save") == []
        assert processor.run("k", add, "next") == "next"


def test_everyone_may_leave_an_open_window(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        left = [store.call(processor, "k", add, mark) for mark in range(3)]
        store.clock.advance(0.05)
        for caller in left:
            caller.kill()
        store.clock.advance(0.01)
        later = store.call(processor, "k", add, "later")
        store.clock.advance(1)
        assert store.kept["k"] == [0, 1, 2, "later"]
        assert later.at == 0.12


# Kills and other BaseExceptions, in each phase


@pytest.mark.parametrize("kind", KILLS)
def test_an_operation_that_is_killed_answers_everyone_and_nothing_is_saved(
    store: Store, kind: type[BaseException]
) -> None:
    killed = kind("bye")
    processor = store.processor(min_duration=0)
    callers = [store.call(processor, "k", add, 1), store.call(processor, "k", raising(killed))]
    callers += [store.call(processor, "k", add, mark) for mark in range(100)]
    raised = advance_through_system_errors(store.clock, 1)
    assert raised == ([] if kind is gevent.GreenletExit else [killed])
    assert_aborted(callers, killed, retry_safe=True)
    assert store.times("save") == []
    assert processor.run("k", add, "next") == "next"
    assert processor.stop()


@pytest.mark.parametrize("kind", KILLS)
def test_a_load_that_is_killed_answers_everyone_of_its_batch(store: Store, kind: type[BaseException]) -> None:
    killed = kind("bye")
    store.on_load = only_once(raising(killed))
    processor = store.processor(min_duration=0)
    callers = [store.call(processor, "k", add, mark) for mark in range(100)]
    advance_through_system_errors(store.clock, 1)
    assert_aborted(callers, killed, retry_safe=True)
    assert processor.run("k", add, "next") == "next"
    assert processor.stop()


@pytest.mark.parametrize("kind", KILLS)
def test_a_save_that_is_killed_answers_everyone_that_the_outcome_is_unknown(
    store: Store, kind: type[BaseException]
) -> None:
    killed = kind("bye")
    store.on_save = only_once(raising(killed))
    processor = store.processor(min_duration=0)
    callers = [store.call(processor, "k", add, mark) for mark in range(100)]
    advance_through_system_errors(store.clock, 1)
    assert_aborted(callers, killed, retry_safe=False)
    assert processor.run("k", add, "next") == "next"
    assert processor.stop()


def assert_aborted(callers: list[Caller], cause: BaseException, *, retry_safe: bool) -> None:
    errors = answers(callers)
    assert [type(error) for error in errors] == [BatchAborted] * len(callers)
    assert len({id(error) for error in errors}) == len(callers)
    assert {id(error.__cause__) for error in errors} == {id(cause)}
    assert {error.retry_safe for error in errors} == {retry_safe}
    assert {error.key for error in errors} == {"k"}


def test_an_operation_that_raises_any_other_base_exception_answers_everyone_and_nothing_is_saved(store: Store) -> None:
    odd = Odd()
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", add, 1), store.call(processor, "k", raising(odd))]
        store.clock.advance(1)
        assert_aborted(callers, odd, retry_safe=True)
        assert store.times("save") == []
        assert processor.run("k", add, "next") == "next"


def test_a_scope_is_left_with_the_kill_that_ended_its_operations(clock: VirtualTime) -> None:
    store = Store(clock, "scope")
    killed = gevent.GreenletExit()
    with store.processor(min_duration=0) as processor:
        store.call(processor, "k", raising(killed))
        clock.advance(1)
        assert store.left == [killed]


def test_a_kill_while_a_scope_is_left_answers_everyone(clock: VirtualTime) -> None:
    store = Store(clock, "scope")
    store.on_leave = only_once(kill_here)
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", raising(ValueError())) for _ in range(3)]
        clock.advance(1)
        assert all(caller.answered for caller in callers)
        assert processor.run("k", add, 1) == 1


def test_callers_of_the_batch_behind_a_killed_one_are_answered_by_their_own(store: Store) -> None:
    store.on_load = only_once(kill_here)
    with store.processor(min_duration=0, max_batch_size=2) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(6)]
        store.clock.advance(1)
        assert [type(error) for error in answers(callers[:2])] == [BatchAborted] * 2
        assert answers(callers[2:]) == store.kept["k"] == [2, 3, 4, 5]


# Every other caller is answered, on every path


@pytest.mark.parametrize("kind", [ValueError, gevent.Timeout, Odd, gevent.GreenletExit])
@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_callers_are_answered_whatever_is_raised_wherever_and_whoever_has_left(
    store: Store, phase: str, kind: type[BaseException]
) -> None:
    error = kind()
    if phase == "load":
        store.on_load = only_once(raising(error))
    if phase == "save":
        store.on_save = only_once(raising(error))
    with store.processor(min_duration=0, max_batch_size=50) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(40)]
        callers.append(store.call(processor, "k", raising(error) if phase == "operations" else add, 40))
        callers += [store.call(processor, "k", add, mark) for mark in range(41, 120)]
        store.clock.advance(0.005)
        for caller in callers[::7]:
            caller.kill()
        store.clock.advance(2)
        assert all(caller.answered for caller in callers)
        allowed = (LoadFailed, SaveFailed, BatchAborted, gevent.GreenletExit, type(None))
        assert all(isinstance(caller.error, allowed) or caller.error is error for caller in callers)
        assert processor.run("k", add, "next") == "next"

"""Guarantee 7: nobody strands anybody."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final

import gevent
import pytest

from geventbatch import BatchAborted, BatchError, BatchTimeout, Conflict, LoadFailed, SaveFailed
from geventbatch.testing import VirtualTime, virtual_time
from tests.support.recording_store import (
    FORMS,
    Caller,
    Form,
    Store,
    add,
    answered_at,
    answers,
    current_greenlet,
    only_once,
    raising,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch import Processor

KILLS: Final = (gevent.GreenletExit, SystemExit, KeyboardInterrupt)


class Odd(BaseException):
    """Neither an Exception nor a kill."""


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


def kill_current(*args: object) -> None:
    """Have the greenlet that calls this killed at its next yield."""
    current_greenlet().kill(block=False)


def kill_here(*args: object) -> None:
    kill_current()
    gevent.sleep(1)


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


# A killed worker answers, ends, and is replaced


@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_a_killed_worker_answers_and_ends_and_is_replaced(store: Store, phase: str) -> None:
    workers: list[Any] = []

    def be_killed(*args: object) -> None:
        workers.append(current_greenlet())
        kill_here()

    if phase == "load":
        store.on_load = only_once(be_killed)
    if phase == "save":
        store.on_save = only_once(be_killed)
    with store.processor(min_duration=0, workers=1) as processor:
        callers = [store.call(processor, "k", be_killed if phase == "operations" else add, 1)]
        callers += [store.call(processor, "k", add, mark) for mark in range(100)]
        store.clock.advance(1)
        assert [type(error) for error in answers(callers)] == [BatchAborted] * 101
        assert all(error.retry_safe == (phase != "save") for error in answers(callers))
        assert workers[0].dead
        for number in range(3):
            assert processor.run(number, current_greenlet) is not workers[0]


def test_a_worker_killed_while_it_waits_for_a_batch_is_replaced(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        for _ in range(3):
            worker = processor.run("k", current_greenlet)
            worker.kill()
            assert worker.dead
        assert processor.run("k", add, 1) == 1
        assert "1 workers" in repr(processor)


def test_a_worker_killed_just_when_a_batch_is_put_before_it_leaves_the_batch_to_another(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        worker = processor.run("k", current_greenlet)
        caller = store.call(processor, "k", add, 1)
        gevent.spawn(lambda: worker.kill(block=False))
        store.clock.advance(1)
        assert caller.answered
        worker = processor.run("k", current_greenlet)
        gevent.spawn(lambda: worker.kill(block=False))
        caller = store.call(processor, "k", add, 1)
        store.clock.advance(1)
        assert caller.answered


def test_a_worker_killed_while_it_waits_for_one_of_max_batches_answers_its_batch(store: Store) -> None:
    with store.processor(min_duration=0, workers=1, max_batches=1) as processor:
        slow = store.call(processor, "slow", store.apply, "slow", 0.5)
        store.clock.advance(0.1)
        before = set(library_greenlets())
        waits = store.call(processor, "k", add, 1)
        store.clock.advance(0.1)
        for worker in set(library_greenlets()) - before - {waits.greenlet}:
            worker.kill()
        store.clock.advance(0.01)
        if store.form == "bulk":  # it has taken no batch before it has its place
            assert not waits.answered
        else:
            assert isinstance(waits.error, BatchAborted)
            assert waits.error.retry_safe
        store.clock.advance(1)
        assert slow.answer == "slow"
        assert waits.answered
        assert processor.run("k", add, 2) == 2


def test_a_worker_killed_before_its_first_step_is_replaced(store: Store) -> None:
    processor = store.processor(min_duration=0, workers=1)
    killed: list[Any] = []

    def kill_the_newborn() -> None:
        for _ in range(5):
            newborn = [one for one in library_greenlets() if one not in known and not one.dead]
            for one in newborn:
                one.kill(block=False)
            killed.extend(newborn)
            if newborn:
                return
            gevent.sleep(0)

    caller = store.call(processor, "k", add, 1)
    killer = gevent.spawn(kill_the_newborn)
    known = {*library_greenlets(), killer}
    store.clock.advance(1)
    assert len(killed) == 1
    assert caller.answer == 1
    assert processor.stop(timeout=1)


def library_greenlets() -> list[Any]:
    return [one for one in gc.get_objects() if type(one) is gevent.Greenlet and not one.dead]


def test_a_killed_worker_that_swallows_it_in_a_load_goes_on(store: Store) -> None:
    def swallow(key: object) -> None:
        kill_current()
        with pytest.raises(gevent.GreenletExit):
            gevent.sleep(1)

    store.on_load = only_once(swallow)
    with store.processor(min_duration=0) as processor:
        assert processor.run("k", add, 1) == 1


# A kill at every yield


def run_with_a_kill(form: Form, step: int, kill: Callable[[list[Any], list[Caller]], bool]) -> bool:
    """Run two batches, killing after *step* turns of the hub; False when there were not that many."""
    done = False
    with virtual_time() as clock:
        store = Store(clock, form)
        runners: list[Any] = []

        def yield_twice(key: object) -> None:
            runners.append(current_greenlet())
            gevent.sleep(0)
            gevent.sleep(0)

        store.on_load = store.on_save = yield_twice

        def yields(resource: list[Any], mark: int) -> int:
            if mark % 20 == 0:
                gevent.sleep(0)
            resource.append(mark)
            return mark

        processor = store.processor(min_duration=0, workers=1)
        callers = [store.call(processor, "k", yields, mark) for mark in range(70)]

        def killer() -> None:
            nonlocal done
            for _ in range(step):
                gevent.sleep(0)
            done = kill(runners, callers)

        gevent.spawn(killer)
        gevent.sleep(0)
        gevent.sleep(0)
        gevent.sleep(0)
        callers += [store.call(processor, "k", yields, mark) for mark in range(100, 150)]
        clock.advance(5)
        check_consistent(store, processor, callers)
    return done


def check_consistent(store: Store, processor: Processor[list[Any]], callers: list[Caller]) -> None:
    assert all(caller.greenlet.dead for caller in callers)  # one that was killed before it ran has no answer
    kept = store.kept["k"]
    assert len(kept) == len(set(kept))
    for caller in callers:
        if caller.answered and caller.error is None:
            assert caller.value in kept
        elif isinstance(caller.error, BatchError):
            assert isinstance(caller.error, BatchAborted)
    assert processor.run("k", add, "next") == "next"
    assert processor.stop(timeout=1)
    assert "0 keys, 0 batches, 0 operations pending, 0 workers" in repr(processor)


@pytest.mark.parametrize("form", FORMS)
def test_a_worker_killed_at_any_of_its_yields_answers_everyone(form: Form) -> None:
    def kill_the_worker(runners: list[Any], callers: list[Caller]) -> bool:
        if not runners or all(caller.answered for caller in callers):
            return False
        runners[-1].kill(block=False)
        return True

    killed = [step for step in range(60) if run_with_a_kill(form, step, kill_the_worker)]
    assert len(killed) > 10


def noting_the_greenlet_in(runners: list[Any]) -> Callable[..., None]:
    return lambda key: runners.append(current_greenlet())


@pytest.mark.parametrize("form", FORMS)
def test_a_worker_killed_in_a_window_a_pause_a_backoff_or_anything_else_that_takes_time_answers_everyone(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("geventbatch._core.replay.random", lambda: 1.0)  # the backoff is as long as can be
    kinds: set[type[BaseException | None]] = set()
    for step in range(70):
        with virtual_time() as clock:
            store = Store(clock, form, load_time=0.002, save_time=0.002)
            store.on_save = only_once(raising(Conflict()))
            runners: list[Any] = []
            store.on_load = noting_the_greenlet_in(runners)

            def work(resource: list[Any], mark: int, clock: VirtualTime = clock) -> int:
                clock.spend(0.0011)
                return int(add(resource, mark))

            processor = store.processor(min_duration=0.02, max_duration=5, workers=1)
            callers = [store.call(processor, "k", work, mark) for mark in range(10)]
            callers.append(store.call(processor, "k", store.apply, 10, 0.003))
            clock.advance(step / 1000)
            if runners:
                runners[-1].kill(block=False)
            callers.append(store.call(processor, "k", work, 11))
            clock.advance(5)
            check_consistent(store, processor, callers)
            kinds |= {type(caller.error) for caller in callers}
    assert kinds == {type(None), BatchAborted}


def test_a_timeout_that_an_operation_left_running_strands_nobody_wherever_it_fires(store: Store) -> None:
    def leave_running(resource: list[Any], seconds: float) -> None:
        left.append(gevent.Timeout.start_new(seconds))

    left: list[gevent.Timeout] = []
    for step in range(1, 90, 2):  # in the window, a later operation, the save, the next batch, and in an idle worker
        with store.processor(min_duration=0.02, max_duration=5, workers=1) as processor:
            callers = [store.call(processor, "k", leave_running, step / 1000)]
            callers.append(store.call(processor, "k", store.apply, 1, 0.03))
            store.clock.advance(0.04)
            callers.append(store.call(processor, "k", store.apply, 2))
            store.clock.advance(1)
            assert all(caller.answered for caller in callers)
            assert processor.run("k", add, 3) == 3
        left.pop().close()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", [0, 1, 31, 32, 69, -1])
def test_a_caller_killed_at_any_of_its_yields_leaves_alone(form: Form, which: int) -> None:
    def kill_the_caller(runners: list[Any], callers: list[Caller]) -> bool:
        if callers[which].answered:
            return False
        callers[which].kill()
        left.append(callers[which])
        everyone.append(callers)
        return True

    killed = 0
    for step in range(40):
        left: list[Caller] = []
        everyone: list[list[Caller]] = []
        killed += run_with_a_kill(form, step, kill_the_caller)
        for callers in everyone:
            assert all(caller.error is None for caller in callers if caller not in left)
    assert killed > 5


@pytest.mark.parametrize("form", FORMS)
def test_all_callers_killed_at_any_moment_leave_a_usable_key(form: Form) -> None:
    def kill_all(runners: list[Any], callers: list[Caller]) -> bool:
        for caller in callers:
            caller.kill()
        return True

    for step in range(40):
        run_with_a_kill(form, step, kill_all)


# Kills while answering


def test_callers_killed_while_others_are_being_woken_strand_nobody(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(200)]
        store.clock.settle()

        def kill_the_next_few() -> None:
            callers[0].greenlet.join()
            for caller in callers[1:200:3]:
                caller.kill()

        gevent.spawn(kill_the_next_few)
        store.clock.advance(1)
        assert all(caller.answered for caller in callers)
        assert store.kept["k"] == list(range(200))
        assert {type(caller.error) for caller in callers} <= {type(None), gevent.GreenletExit}
        assert all(callers[number].error is None for number in range(200) if number % 3 != 1)


def test_a_worker_killed_while_its_callers_are_being_woken_strands_nobody(store: Store) -> None:
    workers: list[Any] = []

    def note_worker(resource: list[Any]) -> None:
        workers.append(current_greenlet())

    with store.processor(min_duration=0) as processor:
        first = store.call(processor, "k", note_worker)
        rest = [store.call(processor, "k", add, mark) for mark in range(200)]

        def kill_the_worker() -> None:
            first.greenlet.join()
            workers[0].kill(block=False)

        gevent.spawn(kill_the_worker)
        store.clock.advance(1)
        assert answers(rest) == list(range(200))
        assert processor.run("k", add, 1) == 1


def test_a_woken_caller_that_raises_or_hangs_strands_nobody(store: Store) -> None:
    with store.processor(min_duration=0) as processor:

        def run_and_hang() -> None:
            processor.run("k", add, "hangs")
            gevent.sleep(100)

        def run_and_raise() -> None:
            processor.run("k", add, "raises")
            raise gevent.GreenletExit

        difficult = [gevent.spawn(run_and_hang), gevent.spawn(run_and_raise)]
        callers = [store.call(processor, "k", add, mark) for mark in range(100)]
        store.clock.advance(1)
        assert answered_at(callers) == [0.03] * 100
        gevent.killall(difficult)


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


def test_callers_are_answered_when_the_worker_is_killed_in_the_clean_up_after_the_deadline(store: Store) -> None:
    def block(*args: object) -> None:
        try:
            gevent.sleep(100)
        finally:
            workers.append(current_greenlet())
            gevent.sleep(100)

    workers: list[Any] = []
    with store.processor(min_duration=0, max_duration=1) as processor:
        first = store.call(processor, "k", block)
        store.clock.advance(2)
        behind = store.call(processor, "k", add, "behind")
        store.clock.advance(1)
        workers[0].kill()
        store.clock.advance(1)
        assert isinstance(first.error, BatchTimeout)
        assert behind.answer == "behind"

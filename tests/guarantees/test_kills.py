"""Guarantee 7: whoever is killed, and wherever, everybody else is answered, and a worker is replaced."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchAborted, BatchError, BatchTimeout, Conflict, Processor
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
    do_nothing,
    kill_current,
    kill_here,
    only_once,
    raising,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


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


@pytest.mark.parametrize("spared", range(3))
def test_a_worker_killed_just_when_it_is_woken_leaves_its_batch_to_another_one(clock: VirtualTime, spared: int) -> None:
    def load(_: object) -> list[int]:
        gevent.sleep(0.5)
        return []

    processor = Processor(load_resource=load, workers=1, min_duration=0)
    for key in range(3):
        gevent.spawn(processor.run, key, add, 1)
    clock.advance(2)
    workers = [one for one in gc.get_objects() if type(one) is gevent.Greenlet and not one.dead and "work" in repr(one)]
    del workers[spared]
    assert len(workers) == 2
    callers = [gevent.spawn(processor.run, key, len) for key in "ab"]
    for worker in workers:
        worker.kill(block=False)
    clock.advance(1.5)
    assert [caller.value for caller in callers] == [0, 0]
    processor.stop()


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


def test_who_waits_behind_a_failed_load_is_answered_even_if_the_worker_is_killed_in_a_repr(clock: VirtualTime) -> None:
    class Key(str):
        __slots__ = ()

        def __repr__(self) -> str:
            workers.append(gevent.getcurrent())
            gevent.sleep(1)
            return "key"

    def load(_: object) -> None:
        gevent.sleep(1)
        raise ValueError

    workers: list[Any] = []
    processor = Processor(load_resource=load, min_duration=0, max_duration=50, max_batch_size=1)
    metrics = processor.subscribe_batch_metrics()
    callers = [gevent.spawn(processor.run, Key("k"), do_nothing) for _ in range(3)]
    for caller in callers:
        caller.rawlink(lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gevent.get_hub(), "print_exception", lambda *_: None)
        clock.advance(1.5)
        assert workers
        workers[0].kill(block=False)
        clock.advance(20)
    assert all(caller.ready() for caller in callers)
    assert processor.stop(timeout=1)
    metrics.close()


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

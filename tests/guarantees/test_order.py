"""Guarantee 1: one at a time per key, whatever the functions of users do."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch.testing import VirtualTime, virtual_time
from tests.support.recording_store import FORMS, Caller, Form, Store, add, answers, only_once, raising

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


class Key:
    """A key whose ``__hash__`` and ``__eq__`` do what a test wants, such as to yield."""

    def __init__(self, name: str, on_hash: Callable[[], object], on_eq: Callable[[], object]) -> None:
        self.name = name
        self.on_hash = on_hash
        self.on_eq = on_eq

    def __hash__(self) -> int:
        self.on_hash()
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        self.on_eq()
        if not isinstance(other, Key):
            return NotImplemented
        other.on_eq()
        return self.name == other.name

    def __repr__(self) -> str:
        return f"Key({self.name!r})"


def pause() -> None:
    gevent.sleep(0)


def assert_one_after_the_other(log: list[tuple[float, str, Hashable]]) -> None:
    """Hold a log of one key to: load, operations, save, and then the next batch."""
    after = {"load": "loaded", "loaded": "apply", "apply": "applied", "applied": "apply save", "save": "saved"}
    expected = "load"
    for _, what, _ in log:
        assert what in expected.split(), log
        expected = after.get(what, "load")
    assert expected == "load", log


# Its operations in the order they came


def test_operations_run_in_the_order_they_came(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        callers = []
        for mark in range(100):
            callers.append(store.call(processor, "k", add, mark))
            if mark % 7 == 0:
                store.clock.advance(0.001)
        store.clock.advance(1)
        assert answers(callers) == list(range(100))
        assert store.kept["k"] == list(range(100))


def test_an_operation_that_yields_lets_no_other_operation_of_its_key_run(store: Store) -> None:
    def apply(resource: list[int], mark: int) -> int:
        before = list(resource)
        store.apply(resource, mark, 0.001 * (mark % 3))
        resource[:] = [*before, mark]  # what another one has added meanwhile would be lost
        return mark

    with store.processor(min_duration=0, max_duration=5) as processor:
        callers = [store.call(processor, "k", apply, mark) for mark in range(1000)]
        store.clock.advance(5)
        marks = list(range(1000))
        assert answers(callers) == store.kept["k"] == marks
        assert [of for _, what, of in store.log if what in {"apply", "applied"}] == sorted(marks + marks)
        assert len(store.times("load")) == 1


def test_an_operation_that_comes_while_another_yields_runs_after_those_that_came_before(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        store.call(processor, "k", store.apply, "long", 0.05)
        store.call(processor, "k", store.apply, "second", 0.001)
        store.clock.advance(0.02)
        store.call(processor, "k", store.apply, "third")
        store.clock.advance(1)
        assert store.kept["k"] == ["long", "second", "third"]


# At most one batch of a key, and in the order they opened


def test_at_most_one_batch_of_a_key_is_loading_applying_or_saving(store: Store) -> None:
    with store.processor(min_duration=0, max_batch_size=2) as processor:
        callers = []
        for mark in range(40):
            callers.append(store.call(processor, "k", store.apply, mark, 0.003))
            store.clock.advance(0.007)
        store.clock.advance(5)
        assert answers(callers) == list(range(40))
        assert len(store.times("load")) >= 20
        assert_one_after_the_other(store.log)


def test_batches_of_a_key_run_in_the_order_they_opened(store: Store) -> None:
    with store.processor(min_duration=0, max_batch_size=3) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(30)]
        store.clock.advance(1)
        assert store.kept["k"] == list(range(30))
        assert len(store.times("save")) == 10
        moments = [caller.at for caller in callers]
        assert moments == sorted(moments, key=lambda at: at or 0)
        assert len(set(moments)) == 10


def test_a_batch_opened_behind_a_failing_save_still_waits_for_its_turn(store: Store) -> None:
    store.on_save = raising(OSError("disk full"))
    with store.processor(min_duration=0, max_batch_size=1) as processor:
        for mark in range(5):
            store.call(processor, "k", store.apply, mark)
        store.clock.advance(1)
    assert [of for _, what, of in store.log if what == "applied"] == [0, 1, 2, 3, 4]
    whats = [what for _, what, _ in store.log]
    assert whats == ["load", "loaded", "apply", "applied", "save"] * 5


def test_equal_keys_are_one_key(store: Store) -> None:
    with store.processor(min_duration=0.1, worker_number_for_key=lambda key, workers: 0) as processor:
        callers = [store.call(processor, key, store.apply, key) for key in (1, 1.0, True)]
        store.clock.advance(1)
        assert answers(callers) == [1, 1.0, True]
        assert len(store.times("load")) == len(store.times("save")) == 1


def test_operations_of_different_keys_run_at_the_same_time(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, f"k{number}", store.apply, number, 0.5) for number in range(20)]
        store.clock.advance(0.53)
        assert all(caller.answered for caller in callers)


# Whatever worker_number_for_key does


def test_a_worker_number_that_changes_its_mind_does_not_make_two_batches_of_a_key_run_at_once(store: Store) -> None:
    numbers = iter(range(1_000_000))
    with store.processor(
        min_duration=0, workers=8, worker_number_for_key=lambda key, workers: next(numbers) % workers
    ) as processor:
        callers = []
        for mark in range(60):
            callers.append(store.call(processor, "k", store.apply, mark, 0.002))
            store.clock.advance(0.003 * (mark % 5))
            if mark % 20 == 0:
                store.clock.advance(1)  # until the key has no batch, so that it is asked again
        store.clock.advance(5)
        assert next(numbers) > 3
        assert store.kept["k"] == answers(callers) == list(range(60))
        assert_one_after_the_other(store.log)


def test_the_worker_number_is_asked_only_for_a_key_that_has_no_live_batch(store: Store) -> None:
    asked: list[Any] = []

    def number_for(key: Any, workers: int) -> int:
        asked.append((store.clock.now(), key))
        return len(asked) % workers  # another one each time, which must do no harm

    with store.processor(min_duration=0, workers=4, worker_number_for_key=number_for) as processor:
        store.call(processor, "k", add, 1)
        for _ in range(5):  # joins the load, then the batch behind the save
            store.call(processor, "k", add, 1)
            store.clock.advance(0.008)
        assert asked == [(0.0, "k")]
        store.clock.advance(1)
        store.call(processor, "k", add, 1)
        store.clock.advance(1)
        assert asked == [(0.0, "k"), (1.04, "k")]


def test_callers_that_come_while_the_worker_number_is_being_found_share_one_batch(store: Store) -> None:
    def number_for(key: Any, workers: int) -> int:
        gevent.sleep(0.05)
        return random.randrange(workers)

    with store.processor(min_duration=0, workers=8, worker_number_for_key=number_for) as processor:
        callers = []
        for mark in range(10):
            callers.append(store.call(processor, "k", store.apply, mark, 0.001))
            store.clock.advance(0.01)
        store.clock.advance(5)
        assert sorted(answers(callers)) == list(range(10))
        assert sorted(store.kept["k"]) == list(range(10))
        assert_one_after_the_other(store.log)


def test_a_worker_number_function_may_run_an_operation_of_the_same_key(store: Store) -> None:
    inner: list[Any] = []

    def number_for(key: Any, workers: int) -> int:
        if not inner:
            inner.append("begun")
            inner.append(processor.run(key, store.apply, "inner", 0.001))
            return 1
        return 2

    with store.processor(min_duration=0, workers=8, worker_number_for_key=number_for) as processor:
        outer = store.call(processor, "k", store.apply, "outer")
        during = store.call(processor, "k", store.apply, "during")
        store.clock.advance(1)
        assert inner == ["begun", "inner"]
        assert answers([outer, during]) == ["outer", "during"]
        assert sorted(store.kept["k"]) == ["during", "inner", "outer"]
        assert_one_after_the_other(store.log)


def test_a_worker_number_function_may_open_the_batch_of_the_same_key_and_leave_it_running(store: Store) -> None:
    inner: list[Caller] = []

    def number_for(key: Any, workers: int) -> int:
        if not inner:
            inner.append(store.call(processor, key, store.apply, "inner", 0.5))
            gevent.sleep(0.1)  # until the inner one is being applied, on another shard
        return len(inner)

    with store.processor(min_duration=0, max_duration=5, workers=8, worker_number_for_key=number_for) as processor:
        outer = store.call(processor, "k", store.apply, "outer")
        store.clock.advance(2)
        assert answers([*inner, outer]) == ["inner", "outer"]
        assert_one_after_the_other(store.log)


# Whatever keys do


@pytest.mark.parametrize(("on_hash", "on_eq"), [(pause, int), (int, pause), (pause, pause)])
def test_a_key_whose_hash_or_equality_yields_has_one_batch_at_a_time(
    store: Store, on_hash: Callable[[], object], on_eq: Callable[[], object]
) -> None:
    with store.processor(min_duration=0, worker_number_for_key=lambda key, workers: 0) as processor:
        callers = []
        for mark in range(40):
            callers.append(store.call(processor, Key("k", on_hash, on_eq), store.apply, mark, 0.001))
            store.clock.advance(0.0031 * (mark % 6))
        store.clock.advance(5)
        assert sorted(answers(callers)) == sorted(store.kept[Key("k", int, int)]) == list(range(40))
        assert_one_after_the_other(store.log)


def test_a_caller_whose_key_was_found_while_its_last_batch_ended_opens_the_next_one(store: Store) -> None:
    compare_for_long = only_once(lambda: gevent.sleep(0.05))
    with store.processor(min_duration=0, worker_number_for_key=lambda key, workers: 0) as processor:
        first = store.call(processor, Key("k", int, int), store.apply, "first")
        store.clock.settle()
        late = store.call(processor, Key("k", int, compare_for_long), store.apply, "late", 0.1)
        store.clock.advance(0.04)
        assert first.answered
        store.clock.advance(0.03)
        last = store.call(processor, Key("k", int, int), store.apply, "last")
        store.clock.advance(1)
        assert answers([first, late, last]) == store.kept[Key("k", int, int)] == ["first", "late", "last"]
        assert_one_after_the_other(store.log)


def test_keys_of_one_hash_are_different_keys_when_they_are_not_equal_even_if_their_equality_yields(
    store: Store,
) -> None:
    class Colliding(Key):
        def __hash__(self) -> int:
            return 7

    with store.processor(min_duration=0, max_duration=9, worker_number_for_key=lambda key, workers: 0) as processor:
        store.call(processor, Colliding("busy", int, pause), store.apply, "busy", 5)
        callers = []
        for mark in range(60):
            callers.append(
                store.call(processor, Colliding(f"k{mark % 3}", int, pause), store.apply, mark, 0.001 * (mark % 2))
            )
            if mark % 6 == 5:
                store.clock.advance(0.011 * (mark % 7))
        store.clock.advance(9)
        assert sorted(answers(callers)) == list(range(60))
        for number in range(3):
            key = Colliding(f"k{number}", int, int)
            marks = set(range(number, 60, 3))
            assert set(store.kept[key]) == marks
            assert_one_after_the_other([one for one in store.log if one[2] == key or one[2] in marks])


@pytest.mark.parametrize("place", ["hash", "equality", "worker number"])
def test_a_caller_killed_while_its_key_is_being_looked_up_leaves_the_key_usable_and_the_stop_finite(
    store: Store, place: str
) -> None:
    def wait_in(here: str) -> Callable[[], object]:
        return (lambda: gevent.sleep(0.015)) if here == place else int

    def number_for(key: Any, workers: int) -> int:
        wait_in("worker number")()
        return 0

    with store.processor(min_duration=0, worker_number_for_key=number_for) as processor:
        first = store.call(processor, Key("k", int, int), add, "first")
        store.clock.advance(1 if place == "worker number" else 0.02)
        killed = store.call(processor, Key("k", wait_in("hash"), wait_in("equality")), add, "killed")
        store.clock.advance(0.01)
        killed.kill()
        second = store.call(processor, Key("k", int, int), add, "second")
        store.clock.advance(1)
        assert answers([first, second]) == store.kept[Key("k", int, int)] == ["first", "second"]
        assert isinstance(killed.error, gevent.GreenletExit)
        assert "0 keys, 0 batches, 0 operations pending" in repr(processor)


# All of it together, in many orders


@pytest.mark.parametrize("form", FORMS)
def test_whatever_the_order_of_ready_greenlets_a_key_has_one_batch_at_a_time(form: Form) -> None:
    for seed in range(60):
        with virtual_time(seed) as clock:
            store = Store(clock, form, load_time=0.001, save_time=0.001)
            chance = random.Random(seed)

            def number_for(key: Any, workers: int, chance: random.Random = chance) -> int:
                gevent.sleep(chance.choice([0, 0, 0.001]))
                return chance.randrange(workers)

            with store.processor(min_duration=0, workers=4, worker_number_for_key=number_for) as processor:
                callers = []
                for mark in range(12):
                    callers.append(store.call(processor, Key("k", pause, pause), store.apply, mark, mark % 2 / 1000))
                    gevent.sleep(chance.choice([0, 0, 0.001, 0.004]))
                clock.advance(1)
                assert sorted(answers(callers)) == list(range(12)), seed
                assert sorted(store.kept[Key("k", int, int)]) == list(range(12)), seed
                assert_one_after_the_other(store.log)

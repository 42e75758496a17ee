"""Guarantees 4 and 5: the window, and natural batching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest

from tests.support.recording_store import FORMS, Caller, Store, add, answered_at, answers

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


def come_at(store: Store, moments: dict[Any, float], run: Callable[[Any], Caller]) -> dict[Any, Caller]:
    """Have a caller come at each of the moments, which are in order; return when the last has come."""
    callers = {}
    for mark, moment in moments.items():
        store.clock.advance(moment - store.clock.now())
        callers[mark] = run(mark)
    store.clock.settle()
    return callers


# 4: the window


def test_a_batch_takes_operations_for_at_least_the_window_after_it_opened(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        callers = come_at(
            store, {1: 0.0, 2: 0.05, 3: 0.0999}, lambda mark: store.call(processor, "k", store.apply, mark)
        )
        store.clock.advance(1)
        assert answers(callers.values()) == store.kept["k"] == [1, 2, 3]
        assert answered_at(callers.values()) == [0.12] * 3
        assert len(store.times("load")) == 1


def test_a_batch_loads_at_once(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        store.clock.advance(0.05)
        store.call(processor, "k", add, 1)
        store.clock.advance(1)
        assert store.times("load") == [0.05]
        assert store.times("saved") == [0.17]


def test_a_batch_applies_operations_after_the_load_and_as_they_come(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        come_at(store, {1: 0.0, 2: 0.005, 3: 0.05, 4: 0.09}, lambda mark: store.call(processor, "k", store.apply, mark))
        store.clock.advance(1)
        assert [(at, mark) for at, what, mark in store.log if what == "applied"] == [
            (0.01, 1),
            (0.01, 2),
            (0.05, 3),
            (0.09, 4),
        ]


def test_a_batch_takes_no_more_operations_past_the_window(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        callers = come_at(store, {1: 0.0, 2: 0.1001}, lambda mark: store.call(processor, "k", store.apply, mark))
        store.clock.advance(1)
        assert store.kept["k"] == [1, 2]
        assert len(store.times("load")) == 2
        assert callers[1].at == 0.12


@pytest.mark.parametrize("seconds", [0.02, 0.1, 3])
def test_a_batch_saves_at_the_end_of_its_window_and_not_after_each_operation(store: Store, seconds: float) -> None:
    with store.processor(min_duration=seconds) as processor:
        come_at(store, {1: 0.0, 2: seconds / 2}, lambda mark: store.call(processor, "k", store.apply, mark))
        store.clock.advance(5)
        assert store.times("save") == [seconds]


def test_a_batch_closes_at_the_end_of_the_window_even_between_two_operations(store: Store) -> None:
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        come_at(
            store,
            {"a": 0.0, "b": 0.01, "c": 0.02, "late": 0.13},  # late comes between b and c
            lambda mark: store.call(processor, "k", store.apply, mark, 0.06),
        )
        store.clock.advance(1)
        applied = [(at, mark) for at, what, mark in store.log if what == "applied"]
        assert applied == [(0.07, "a"), (0.13, "b"), (0.19, "c"), (0.28, "late")]
        assert store.times("saved") == [0.21, 0.3]  # what it had is applied and saved; what came late is the next one


def test_a_stream_of_operations_does_not_keep_a_batch_open(store: Store) -> None:
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        callers = []
        for mark in range(100):
            callers.append(store.call(processor, "k", store.apply, mark, 0.004))
            store.clock.advance(0.005)
        store.clock.advance(1)
        assert answers(callers) == store.kept["k"] == list(range(100))
        assert store.times("save")[0] == 0.104
        assert len(store.times("save")) >= 4


def test_work_that_never_yields_closes_the_window_too(store: Store) -> None:
    late: list[Caller] = []

    def compute(resource: list[Any]) -> None:
        store.clock.spend(0.15)
        late.append(store.call(processor, "k", store.apply, "late"))

    with store.processor(min_duration=0.1, max_duration=5) as processor:
        first = store.call(processor, "k", compute)
        second = store.call(processor, "k", store.apply, "second")
        store.clock.advance(1)
        assert len(store.times("load")) == 2
        assert first.at == second.at == 0.18
        assert late[0].answer == "late"


def test_an_operation_that_comes_in_the_middle_of_one_that_outlasts_the_window_is_in_the_next_batch(
    store: Store,
) -> None:
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        long = store.call(processor, "k", store.apply, "long", 0.5)
        store.clock.advance(0.2)
        late = store.call(processor, "k", store.apply, "late")
        store.clock.advance(2)
        assert long.at == 0.53
        assert store.times("load") == [0.0, 0.53]
        assert store.times("applied", "late") == [0.54]
        assert late.answer == "late"


def test_what_comes_during_a_load_that_outlasts_the_window_joins_the_batch(store: Store) -> None:
    store.load_time = 0.3
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        callers = come_at(store, {1: 0.0, 2: 0.05, 3: 0.25}, lambda mark: store.call(processor, "k", add, mark))
        store.clock.advance(1)
        assert answers(callers.values()) == store.kept["k"] == [1, 2, 3]
        assert answered_at(callers.values()) == [0.32] * 3


def test_the_batch_that_opens_while_another_is_saving_counts_its_window_from_its_own_first_operation(
    store: Store,
) -> None:
    store.save_time = 0.15  # of the first batch: from 0.1 to 0.25
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        callers = come_at(
            store, {1: 0.0, 2: 0.12, 3: 0.2, 4: 0.249}, lambda mark: store.call(processor, "k", store.apply, mark)
        )
        store.clock.advance(2)
        assert store.times("load") == [0.0, 0.25]
        assert store.times("save") == [
            0.1,
            0.26,
        ]  # the window of the second ended at 0.22, so its load was all it waited for
        assert answered_at(callers.values()) == [0.25, 0.41, 0.41, 0.41]


def test_the_rest_of_a_window_that_began_during_a_save_is_still_waited_for(store: Store) -> None:
    store.save_time = 0.05  # of the first batch: from 0.1 to 0.15
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        callers = come_at(store, {1: 0.0, 2: 0.12, 3: 0.21}, lambda mark: store.call(processor, "k", store.apply, mark))
        store.clock.advance(2)
        assert store.times("load") == [0.0, 0.15]
        assert store.times("save") == [0.1, 0.22]
        assert callers[3].at == 0.27


def test_the_next_batch_of_an_idle_key_has_a_window_of_its_own(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor:
        come_at(store, {1: 0.0, 2: 5.0}, lambda mark: store.call(processor, "k", add, mark))
        store.clock.advance(1)
        assert store.times("save") == [0.1, 5.1]


def test_windows_of_different_keys_are_their_own(store: Store) -> None:
    with store.processor(min_duration=0.1, workers=1) as processor:
        come_at(store, {"a": 0.0, "b": 0.03, "c": 0.06}, lambda mark: store.call(processor, mark, add, mark))
        store.clock.advance(1)
        assert [store.times("save", key) for key in "abc"] == [[0.1], [0.13], [0.16]]


def test_an_operation_that_raises_does_not_end_the_window(store: Store) -> None:
    def refuse(resource: list[Any]) -> None:
        raise ValueError

    with store.processor(min_duration=0.1, clean_errors=(ValueError,)) as processor:
        store.call(processor, "k", refuse)
        store.clock.advance(0.05)
        later = store.call(processor, "k", add, "later")
        store.clock.advance(1)
        assert later.answer == "later"
        assert len(store.times("load")) == 1
        assert store.times("save") == [0.1]


def test_a_full_batch_does_not_wait_for_the_end_of_its_window(store: Store) -> None:
    with store.processor(min_duration=10, max_batch_size=3) as processor:
        callers = come_at(store, {1: 0.0, 2: 0.0, 3: 4.0}, lambda mark: store.call(processor, "k", add, mark))
        store.clock.advance(1)
        assert store.times("save") == [4.0]
        assert answered_at(callers.values()) == [4.02] * 3


# 5: natural batching


def test_without_a_window_one_lone_caller_waits_for_load_and_save_and_nothing_else(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        for _ in range(3):
            before = store.clock.now()
            processor.run("k", add, 1)
            assert round(store.clock.now() - before, 9) == 0.03


def test_without_a_window_and_with_an_instant_store_a_lone_caller_waits_for_no_timer(clock: VirtualTime) -> None:
    with Store(clock).processor(min_duration=0) as processor:
        for _ in range(100):
            processor.run("k", add, 1)
        assert clock.now() == 0


def test_without_a_window_a_batch_starts_at_once(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        store.clock.advance(1)
        store.call(processor, "k", add, 1)
        store.clock.settle()
        assert store.times("load") == [1.0]


def test_without_a_window_what_arrives_during_the_load_joins_it(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = come_at(store, {1: 0.0, 2: 0.003, 3: 0.0099}, lambda mark: store.call(processor, "k", add, mark))
        store.clock.advance(1)
        assert store.kept["k"] == [1, 2, 3]
        assert answered_at(callers.values()) == [0.03] * 3
        assert len(store.times("load")) == 1


def test_without_a_window_all_that_arrives_while_a_batch_saves_is_the_next_one(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = come_at(
            store, {1: 0.0, 2: 0.011, 3: 0.02, 4: 0.0299}, lambda mark: store.call(processor, "k", add, mark)
        )
        store.clock.advance(1)
        assert store.kept["k"] == [1, 2, 3, 4]
        assert store.times("load") == [0.0, 0.03]
        assert answered_at(callers.values()) == [0.03, 0.06, 0.06, 0.06]


def test_without_a_window_what_arrives_while_a_batch_applies_is_the_next_one(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = come_at(
            store, {1: 0.0, 2: 0.05}, lambda mark: store.call(processor, "k", store.apply, mark, 0.1 * (mark == 1))
        )
        store.clock.advance(1)
        assert store.times("load") == [0.0, 0.13]
        assert answered_at(callers.values()) == [0.13, 0.16]


def test_without_a_window_callers_that_come_at_the_same_moment_share_a_batch_even_if_nothing_takes_time(
    clock: VirtualTime,
) -> None:
    store = Store(clock)
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(50)]
        clock.advance(1)
        assert answered_at(callers) == [0.0] * 50
        assert len(store.times("load")) == 1


def test_in_a_closed_loop_every_round_of_callers_is_one_batch(store: Store) -> None:
    rounds = 10

    def again_and_again() -> None:
        for _ in range(rounds):
            processor.run("k", add, 1)

    with store.processor(min_duration=0) as processor:
        gevent.joinall([gevent.spawn(again_and_again) for _ in range(200)])
        assert len(store.kept["k"]) == 200 * rounds
        # The first woken open the next batch, and all others are there before its load has ended.
        assert len(store.times("load")) == rounds
        assert store.clock.now() == 0.3

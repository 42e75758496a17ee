"""Guarantee 9, slow keys keep to themselves; and what else is promised of workers and shards."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchAborted, BatchTimeout, Processor, worker_number_for_key
from tests.support.recording_store import FORMS, Store, add, answered_at, answers, current_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from geventbatch.testing import VirtualTime


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


def hang_for(slow: Hashable) -> Callable[[Hashable], None]:
    def hang(key: Hashable) -> None:
        if key == slow:
            gevent.sleep(100)

    return hang


def worker_count(processor: Processor[Any]) -> int:
    """As the processor sums it up."""
    return int(repr(processor).split(" workers")[0].split()[-1])


def live_workers() -> list[Any]:
    """As the garbage collector sees them."""
    return [one for one in gc.get_objects() if type(one) is gevent.Greenlet and not one.dead and "Worker" in repr(one)]


# 9: slow keys keep to themselves


@pytest.mark.parametrize("phase", ["load", "save"])
def test_a_key_whose_load_or_save_hangs_delays_no_other_key_on_its_own_shard_either(store: Store, phase: str) -> None:
    if phase == "load":
        store.on_load = hang_for("slow")
    else:
        store.on_save = hang_for("slow")
    with store.processor(min_duration=0, max_duration=5, workers=1) as processor:
        slow = store.call(processor, "slow", add, 1)
        store.clock.advance(1)
        others = [store.call(processor, number, add, number) for number in range(20)]
        store.clock.advance(1)
        assert answered_at(others) == [1.03] * 20
        assert not slow.answered
        store.clock.advance(5)
        assert isinstance(slow.error, BatchTimeout)


def test_keys_that_come_with_a_slow_one_at_the_same_moment_are_not_delayed(store: Store) -> None:
    store.on_load = hang_for(0)
    with store.processor(min_duration=0, max_duration=5, workers=1) as processor:
        callers = [store.call(processor, number, add, number) for number in range(20)]
        store.clock.advance(1)
        assert answered_at(callers) == [None] + [0.03] * 19


def test_many_slow_keys_delay_no_other_key(store: Store) -> None:
    def hang(key: Hashable) -> None:
        if isinstance(key, int):
            gevent.sleep(100)

    store.on_load = hang
    with store.processor(min_duration=0, max_duration=5, workers=2) as processor:
        for number in range(50):
            store.call(processor, number, add, number)
        store.clock.advance(1)
        quick = store.call(processor, "quick", add, 1)
        store.clock.advance(1)
        assert quick.at == 1.03


def test_an_operation_that_waits_delays_no_other_key(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=5, workers=1) as processor:
        store.call(processor, "slow", store.apply, 1, 3)
        quick = store.call(processor, "quick", add, 1)
        store.clock.advance(1)
        assert quick.at == 0.03


def test_an_open_window_delays_no_other_key_of_its_shard(store: Store) -> None:
    with store.processor(min_duration=1, workers=1) as processor:
        callers = [store.call(processor, number, add, number) for number in range(20)]
        store.clock.advance(2)
        assert answered_at(callers) == [1.02] * 20


def test_the_clean_up_of_an_interrupted_load_delays_no_other_key(store: Store) -> None:
    def hang(key: Hashable) -> None:
        if key == "slow":
            try:
                gevent.sleep(100)
            finally:
                gevent.sleep(50)

    store.on_load = hang
    with store.processor(min_duration=0, max_duration=1, workers=1) as processor:
        store.call(processor, "slow", add, 1)
        store.clock.advance(2)
        quick = store.call(processor, "quick", add, 1)
        store.clock.advance(1)
        assert quick.at == 2.03


# max_batches


@pytest.mark.parametrize("shards", [1, 16])
@pytest.mark.parametrize(("most", "seconds"), [(1, 12), (2, 6), (3, 4), (6, 2), (7, 2)])
def test_max_batches_run_at_once_whatever_their_shards_and_the_rest_wait_for_their_turn(
    store: Store, most: int, seconds: float, shards: int
) -> None:
    running: list[Hashable] = []
    at_once: list[int] = []

    def begin(key: Hashable) -> None:
        running.append(key)
        at_once.append(len(running))
        gevent.sleep(1)

    def end(key: Hashable) -> None:
        gevent.sleep(1)
        running.remove(key)

    store.load_time = store.save_time = 0
    store.on_load, store.on_save = begin, end
    with store.processor(min_duration=0, max_duration=50, workers=shards, max_batches=most) as processor:
        assert len({worker_number_for_key(key, shards) for key in range(6)}) > (1 if shards > 1 else 0)
        callers = [store.call(processor, key, add, mark) for key in range(6) for mark in "xy"]
        store.clock.advance(20)
        assert answers(callers) == ["x", "y"] * 6
        assert max(caller.at or 0 for caller in callers) == seconds
        assert max(at_once) == min(most, 6)
        assert all(store.kept[key] == ["x", "y"] for key in range(6))


def test_within_max_batches_a_slow_key_still_delays_no_other(store: Store) -> None:
    store.on_load = hang_for("slow")
    with store.processor(min_duration=0, max_duration=5, workers=1, max_batches=2) as processor:
        store.call(processor, "slow", add, 1)
        for number in range(10):
            store.clock.advance(0.1)
            assert processor.run(number, add, number) == number
        assert store.clock.now() == 1.3


@pytest.mark.parametrize("shards", [1, 20])
def test_batches_that_wait_for_one_of_max_batches_get_it_in_the_order_they_came(store: Store, shards: int) -> None:
    store.on_load = hang_for(-1)
    with store.processor(
        min_duration=0,
        max_duration=5,
        workers=shards,
        max_batches=2,
        worker_number_for_key=lambda key, workers: key % workers,
    ) as processor:
        store.call(processor, -1, add, 1)
        store.clock.advance(0.1)
        callers = [store.call(processor, number, add, number) for number in range(10)]
        store.clock.advance(1)
        assert answered_at(callers) == [round(0.13 + 0.03 * number, 9) for number in range(10)]


def test_a_worker_killed_just_when_it_is_given_its_place_among_max_batches_gives_it_on(store: Store) -> None:
    def kill_the_first_that_waits(key: Hashable) -> None:
        if key == 0:
            waiting[0].kill(block=False)

    store.on_save = kill_the_first_that_waits
    with store.processor(
        min_duration=0, workers=4, max_batches=1, worker_number_for_key=lambda key, workers: key % workers
    ) as processor:
        callers = [store.call(processor, 0, add, 0)]
        store.clock.settle()
        known = set(live_workers())
        callers.append(store.call(processor, 1, add, 1))
        store.clock.settle()
        waiting = [one for one in live_workers() if one not in known]
        callers += [store.call(processor, number, add, number) for number in (2, 3)]
        store.clock.advance(1)
        if store.form == "bulk":  # it takes nothing before it has its place
            assert callers[1].value == 1
        else:
            assert isinstance(callers[1].error, BatchAborted)
        assert answers([callers[0], *callers[2:]]) == [0, 2, 3]
        assert processor.run(1, add, "next") == "next"


def test_a_batch_that_waits_for_one_of_max_batches_is_not_overtaken_by_those_of_a_busy_shard(store: Store) -> None:
    def loop(number: int) -> None:
        while True:
            processor.run(number, add, number)

    with store.processor(
        min_duration=0, workers=2, max_batches=2, worker_number_for_key=lambda key, workers: int(key == "lone")
    ) as processor:
        busy = [gevent.spawn(loop, number) for number in range(6)]
        store.clock.advance(1)
        lone = store.call(processor, "lone", add, 1)
        store.clock.advance(0.5)
        gevent.killall(busy)
        assert lone.at is not None
        assert lone.at <= 1.15  # behind the six that were before it, two at once, and itself: 0.03 each


def test_with_max_batches_1_batches_of_all_keys_run_one_after_the_other_and_none_is_forgotten(store: Store) -> None:
    with store.processor(min_duration=0, workers=8, max_batches=1) as processor:
        callers = [store.call(processor, number % 25, store.apply, number) for number in range(100)]
        store.clock.advance(5)
        assert answers(callers) == list(range(100))
        assert len(store.times("load")) == 25
        assert [what for _, what, _ in store.log if what in {"load", "saved"}] == ["load", "saved"] * 25


def test_what_comes_while_a_batch_waits_for_one_of_max_batches_joins_it(store: Store) -> None:
    with store.processor(min_duration=0, max_batches=1) as processor:
        store.call(processor, "slow", store.apply, 1, 0.5)
        store.clock.advance(0.1)
        callers = [store.call(processor, "k", add, 1)]
        store.clock.advance(0.1)
        callers.append(store.call(processor, "k", add, 2))
        store.clock.advance(1)
        assert answers(callers) == [1, 2]
        assert len(store.times("load", "k")) == 1


def test_a_batch_that_fails_gives_its_place_among_max_batches_back(store: Store) -> None:
    def fail_all(key: Hashable) -> None:
        kinds = [OSError, gevent.GreenletExit, gevent.Timeout, None]
        kind = kinds[int(str(key)) % 4]
        if kind is None:
            gevent.sleep(100)  # until the deadline
        else:
            raise kind

    store.on_load = fail_all
    with store.processor(min_duration=0, max_duration=5, workers=2, max_batches=2) as processor:
        callers = [store.call(processor, number, add, 1) for number in range(12)]
        store.clock.advance(20)
        assert all(caller.error for caller in callers)
        del store.on_load
        store.on_load = lambda key: None
        assert processor.run(1, add, "fine") == "fine"


# Workers: reused, replaced, and not more than needed


def test_workers_are_long_lived_and_nothing_is_spawned_for_an_operation_or_a_batch(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        seen = {processor.run(number % 3, current_greenlet) for number in range(30)}
        assert len(seen) == 1


def test_one_greenlet_runs_a_batch_from_load_to_save(store: Store) -> None:
    seen: list[Any] = []
    store.on_load = store.on_save = lambda key: seen.append(current_greenlet())
    with store.processor(min_duration=0, workers=4) as processor:
        for number in range(40):
            store.call(processor, number % 8, lambda resource: seen.append(current_greenlet()))
        store.clock.advance(1)
        assert len(seen) == 8 + 40 + 8
        assert len(set(seen)) == 8
        assert len(live_workers()) == 8


def test_batches_that_follow_one_another_need_one_worker(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        for number in range(50):
            processor.run(number, add, 1)
        assert worker_count(processor) == len(live_workers()) == 1


def test_a_shard_adds_a_worker_only_when_all_of_its_workers_are_held(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        for _ in range(3):
            for number in range(7):
                store.call(processor, number, add, 1)
            store.clock.advance(1)
            assert worker_count(processor) == len(live_workers()) == 7


def test_surplus_idle_workers_end(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        for number in range(40):
            store.call(processor, number, add, number)
        store.clock.advance(1)
        assert len(live_workers()) == 40
        store.clock.advance(60)
        assert worker_count(processor) == len(live_workers()) == 1
        assert processor.run("k", add, 1) == 1


def test_workers_that_are_needed_now_and_again_stay(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        seen: list[set[int]] = []
        for _ in range(30):
            ids: set[int] = set()
            for number in range(5):
                store.call(processor, number, lambda resource, ids=ids: ids.add(id(current_greenlet())))
            store.clock.advance(2)
            seen.append(ids)
        assert len(set.union(*seen)) == 5


def test_surplus_workers_that_end_lose_no_batch_that_comes_at_that_moment(clock: VirtualTime) -> None:
    store = Store(clock)
    with store.processor(min_duration=0, workers=1) as processor:
        callers = [store.call(processor, number, add, number) for number in range(10)]
        for _ in range(4000):  # every 10 ms, among them the moments at which the surplus ends
            clock.advance(0.01)
            callers.append(store.call(processor, "k", add, 1))
        clock.advance(1)
        assert all(caller.answered for caller in callers)


def test_surplus_workers_keep_no_timer_once_they_have_ended(store: Store) -> None:
    with store.processor(min_duration=0, workers=1) as processor:
        for number in range(10):
            store.call(processor, number, add, number)
        store.clock.advance(100)
        assert worker_count(processor) == 1
        assert store.clock.timers == 0


def test_a_worker_whose_batch_met_its_deadline_is_not_used_again(store: Store) -> None:
    store.on_load = hang_for("slow")
    with store.processor(min_duration=0, max_duration=1, workers=1) as processor:
        store.call(processor, "slow", add, 1)
        store.clock.settle()
        (first,) = live_workers()
        store.clock.advance(2)
        assert first.dead
        assert processor.run("k", current_greenlet) is not first


# Shards


def test_there_are_as_many_shards_as_the_workers_option_says_and_each_key_has_its_own_one(store: Store) -> None:
    asked: list[tuple[Hashable, int]] = []

    def number_for(key: Any, workers: int) -> int:
        asked.append((key, workers))
        return int(key) % workers

    with store.processor(min_duration=0, workers=3, worker_number_for_key=number_for) as processor:
        workers = [processor.run(key, current_greenlet) for key in range(6)]
        assert asked == [(key, 3) for key in range(6)]
        assert workers[:3] == workers[3:]
        assert len(set(workers)) == 3

"""Guarantee 10: the hub stays alive."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import LoadFailed, Processor
from tests.support.recording_store import FORMS, Store, add, raising, wait
from tests.support.ticks import LONGEST, Ticks

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


def run_together(
    clock: VirtualTime,
    processor: Processor[Any],
    keys: list[int],
    operation: Callable[..., object],
    when_answered: Callable[[], object],
) -> Ticks:
    """Run one operation for each of the keys, all at once, and tick meanwhile."""

    def one(key: int) -> None:
        with suppress(LoadFailed):
            processor.run(key, operation)
        when_answered()
        ended.append(key)

    ended: list[int] = []
    with Ticks(clock) as ticks:
        gevent.joinall([gevent.spawn(one, key) for key in keys], raise_error=True)
    assert sorted(ended) == sorted(keys)
    return ticks


def no_work(*args: object) -> None:
    pass


# Operations


@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_operations_with_work_to_do_never_hold_the_hub_for_long(clock: VirtualTime, form: Any) -> None:
    with Store(clock, form).processor(min_duration=0, max_duration=5) as processor:
        ticks = run_together(clock, processor, [1] * 1000, lambda resource: clock.spend(0.0001), no_work)
        assert clock.now() >= 0.1
        assert ticks.longest_gap() <= LONGEST


def test_a_thousand_operations_on_many_keys_never_hold_the_hub_for_long(clock: VirtualTime) -> None:
    with Store(clock).processor(min_duration=0, max_duration=5) as processor:
        keys = [number % 50 for number in range(1000)]
        ticks = run_together(clock, processor, keys, lambda resource: clock.spend(0.0001), no_work)
        assert clock.now() >= 0.1
        assert ticks.longest_gap() <= LONGEST


def test_a_thousand_batches_of_one_operation_never_hold_the_hub_for_long(clock: VirtualTime) -> None:
    with Store(clock).processor(min_duration=0, max_duration=5) as processor:
        ticks = run_together(clock, processor, list(range(1000)), lambda resource: clock.spend(0.0001), no_work)
        assert clock.now() >= 0.1
        assert ticks.longest_gap() <= LONGEST


def test_a_thousand_operations_that_all_raise_never_hold_the_hub_for_long(clock: VirtualTime) -> None:
    def refuse(resource: list[Any]) -> None:
        clock.spend(0.0001)
        raise ValueError("taken")

    ended: list[int] = []

    def one(number: int) -> None:
        with pytest.raises(ValueError, match="taken"):
            processor.run("k", refuse)
        ended.append(number)

    with Store(clock).processor(min_duration=0, max_duration=5) as processor, Ticks(clock) as ticks:
        gevent.joinall([gevent.spawn(one, number) for number in range(1000)], raise_error=True)
    assert len(ended) == 1000
    assert ticks.longest_gap() <= LONGEST


def test_between_two_long_operations_the_hub_gets_its_turn(clock: VirtualTime) -> None:
    with Store(clock).processor(min_duration=0, max_duration=5) as processor:
        ticks = run_together(clock, processor, [1] * 20, lambda resource: clock.spend(0.01), no_work)
        assert ticks.longest_gap() < 0.0101  # one operation; the library cannot cut it


def test_the_replay_of_a_thousand_operations_never_holds_the_hub_for_long(clock: VirtualTime) -> None:
    def half_change(resource: list[Any]) -> None:
        clock.spend(0.0001)
        raise KeyError

    with Store(clock).processor(min_duration=0, max_duration=5, clean_errors=()) as processor:
        broken = Store(clock).call(processor, 1, half_change)
        ticks = run_together(clock, processor, [1] * 1000, lambda resource: clock.spend(0.0001), no_work)
        assert isinstance(broken.error, KeyError)
        assert ticks.longest_gap() <= LONGEST


def test_operations_that_are_no_work_are_applied_without_a_pause(clock: VirtualTime) -> None:
    seen: list[str] = []

    def note(resource: list[Any]) -> None:
        if not seen:
            gevent.spawn(seen.append, "another greenlet")
        seen.append("operation")

    with Store(clock).processor(min_duration=0) as processor:
        run_together(clock, processor, [1] * 1000, note, no_work)
        assert seen == ["operation"] * 1000 + ["another greenlet"]


def test_others_get_their_turn_while_a_thousand_operations_are_applied(clock: VirtualTime) -> None:
    store = Store(clock)
    with store.processor(min_duration=0, max_duration=5) as processor:
        for _ in range(1000):
            store.call(processor, "long", lambda resource: clock.spend(0.001))
        clock.settle()
        short = store.call(processor, "short", add, 1)
        clock.advance(3)
        assert short.at is not None
        assert short.at < 0.2


# Callers that are woken


def test_a_thousand_woken_callers_with_work_to_do_never_hold_the_hub_for_long(clock: VirtualTime) -> None:
    with Store(clock).processor(min_duration=0) as processor:
        ticks = run_together(clock, processor, [1] * 1000, no_work, lambda: clock.spend(0.0001))
        assert clock.now() >= 0.1
        assert ticks.longest_gap() <= LONGEST


@pytest.mark.parametrize("keys", [50, 1000])
def test_a_thousand_callers_of_many_batches_that_end_at_once_never_hold_the_hub_for_long(
    clock: VirtualTime, keys: int
) -> None:
    store = Store(clock, save_time=0.5)  # so that all end at the same moment
    with store.processor(min_duration=0) as processor:
        ticks = run_together(
            clock, processor, [number % keys for number in range(1000)], no_work, lambda: clock.spend(0.0001)
        )
        assert clock.now() >= 0.6
        assert ticks.longest_gap() <= LONGEST


def test_a_thousand_callers_told_of_a_failed_load_never_hold_the_hub_for_long(clock: VirtualTime) -> None:
    store = Store(clock, load_time=0.1)
    store.on_load = raising(OSError())
    with store.processor(min_duration=0, max_batch_size=40) as processor:
        ticks = run_together(clock, processor, [1] * 1000, no_work, lambda: clock.spend(0.0001))
        assert clock.now() >= 0.2
        assert ticks.longest_gap() <= LONGEST
        assert len(store.times("load")) == 1


class Turns:
    """Counts the callers that are woken between two moments at which everything else that is ready has its turn."""

    def __init__(self) -> None:
        self.counts: list[int] = [0]
        self._counting = False

    def woken(self) -> None:
        if not self._counting:
            self._counting = True
            gevent.get_hub().loop.run_callback(self._next)
        self.counts[-1] += 1

    def _next(self) -> None:
        self._counting = False
        self.counts.append(0)


@pytest.mark.parametrize("keys", [1, 3, 50, 1000])
def test_at_most_32_callers_are_woken_at_a_time_across_all_batches_that_end_at_once(
    clock: VirtualTime, keys: int
) -> None:
    turns = Turns()
    with Store(clock, save_time=0.1).processor(min_duration=0) as processor:
        run_together(clock, processor, [number % keys for number in range(1000)], no_work, turns.woken)
    assert sum(turns.counts) == 1000
    assert max(turns.counts) <= 32
    assert clock.now() < 0.2


def test_at_most_32_callers_are_woken_at_a_time_by_several_processors(clock: VirtualTime) -> None:
    turns = Turns()
    processors = [Store(clock, save_time=0.1).processor(min_duration=0) for _ in range(10)]

    def one(processor: Processor[Any]) -> None:
        processor.run("k", no_work)
        turns.woken()

    callers = [gevent.spawn(one, processors[number % 10]) for number in range(1000)]
    gevent.joinall(callers, raise_error=True)
    assert sum(turns.counts) == 1000
    assert max(turns.counts) <= 32
    for processor in processors:
        processor.stop()


def test_at_most_32_callers_are_told_of_a_failed_load_at_a_time(clock: VirtualTime) -> None:
    store = Store(clock, load_time=0.1)
    store.on_load = raising(OSError())
    turns = Turns()
    with store.processor(min_duration=0, max_batch_size=40) as processor:
        run_together(clock, processor, [1] * 1000, no_work, turns.woken)
    assert sum(turns.counts) == 1000
    assert max(turns.counts) <= 32


def test_callers_that_run_again_as_soon_as_they_are_woken_leave_the_hub_its_turns(clock: VirtualTime) -> None:
    ended: list[int] = []

    def again_and_again(number: int) -> None:
        for _ in range(5):
            processor.run(number % 10, lambda resource: clock.spend(0.00001))
            clock.spend(0.0001)
        ended.append(number)

    with Store(clock).processor(min_duration=0, max_duration=5) as processor, Ticks(clock) as ticks:
        gevent.joinall([gevent.spawn(again_and_again, number) for number in range(1000)], raise_error=True)
    assert len(ended) == 1000
    assert ticks.longest_gap() <= LONGEST


def test_operations_and_woken_callers_together_leave_the_hub_its_turns(clock: VirtualTime) -> None:
    store = Store(clock, load_time=0.002, save_time=0.003)
    ended: list[int] = []

    def one(number: int) -> None:
        wait(0.0005 * (number % 20))
        for _ in range(3):
            processor.run(number % 7, lambda resource: clock.spend(0.0001))
            clock.spend(0.0001)
        ended.append(number)

    with store.processor(min_duration=0, max_duration=20) as processor, Ticks(clock) as ticks:
        gevent.joinall([gevent.spawn(one, number) for number in range(500)], raise_error=True)
    assert len(ended) == 500
    assert ticks.longest_gap() <= LONGEST


def test_waking_in_pieces_keeps_the_order_of_the_callers(clock: VirtualTime) -> None:
    woken: list[int] = []

    def one(number: int) -> None:
        processor.run("k", no_work)
        woken.append(number)
        clock.spend(0.0005)

    with Store(clock).processor(min_duration=0) as processor:
        gevent.joinall([gevent.spawn(one, number) for number in range(300)], raise_error=True)
    assert woken == list(range(300))

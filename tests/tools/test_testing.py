"""Virtual time, and the fixture that finds leaked greenlets."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.event import AsyncResult, Event
from gevent.exceptions import LoopExit
from gevent.lock import BoundedSemaphore
from gevent.monkey import get_original
from gevent.queue import Empty, Queue

from geventbatch._core.clock import clock as _clock
from geventbatch.testing import VirtualTime, virtual_time
from tests.support.shared import STARTUP

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


def current_loop() -> Any:
    return gevent.get_hub().loop


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where the hub prints the errors that nobody else hears of."""
    stream = io.StringIO()
    monkeypatch.setattr(gevent.get_hub(), "exception_stream", stream)
    return stream


def sleep_and_note(seconds: float, name: str, noted: list[str]) -> None:
    gevent.sleep(seconds)
    noted.append(name)


# What gevent must be for virtual time to work


def test_the_loop_of_a_hub_can_be_replaced_and_what_waits_with_a_timeout_asks_the_replacement_for_its_timer() -> None:
    def get(queue: Queue[None] | AsyncResult[None]) -> None:
        with pytest.raises((Empty, gevent.Timeout)):
            queue.get(timeout=5)

    waits: list[Callable[[], object]] = [
        lambda: gevent.sleep(5),
        lambda: gevent.with_timeout(5, Event().wait, timeout_value=None),
        lambda: Event().wait(5),
        lambda: get(Queue()),
        lambda: get(AsyncResult()),
        lambda: BoundedSemaphore(0).acquire(timeout=5),
        lambda: gevent.wait([Event()], timeout=5),
        lambda: time.sleep(5),
        lambda: threading.Event().wait(5),
    ]
    for wait in waits:
        with virtual_time() as clock:
            wait()
            assert clock.now() == 5
            assert clock.timers == 0


# Entering and leaving


def test_time_begins_at_zero_and_at_the_same_numbers_in_every_run() -> None:
    def clocks() -> tuple[float, ...]:
        with virtual_time() as clock:
            return clock.now(), _clock.monotonic(), _clock.wall(), current_loop().now()

    assert clocks() == clocks()
    assert clocks()[0] == 0.0


def test_the_real_loop_and_clocks_are_back_after_the_block() -> None:
    before = current_loop(), _clock.monotonic, _clock.wall
    with virtual_time():
        assert current_loop() is not before[0]
    assert (current_loop(), _clock.monotonic, _clock.wall) == before


def test_the_real_loop_and_clocks_are_back_after_an_exception() -> None:
    before = current_loop(), _clock.monotonic, _clock.wall
    with pytest.raises(ZeroDivisionError), virtual_time():
        raise ZeroDivisionError
    assert (current_loop(), _clock.monotonic, _clock.wall) == before


def test_real_time_goes_on_after_a_block_that_was_left_by_a_greenlet_which_a_timer_had_woken() -> None:
    with virtual_time():
        gevent.sleep(1)  # the hub is inside of the firing timer from here until the next wait
    gevent.sleep(0.001)
    with pytest.raises(LoopExit):
        Event().wait()


def test_virtual_times_do_not_nest(clock: VirtualTime) -> None:
    with pytest.raises(RuntimeError, match="nested"), virtual_time():
        pass
    gevent.sleep(1)
    assert clock.now() == 1


def test_virtual_time_is_refused_outside_the_main_thread() -> None:
    refusals: list[str] = []

    def enter() -> None:
        try:
            with virtual_time():
                pass
        except RuntimeError as error:
            refusals.append(str(error))
        finally:
            gevent.get_hub().destroy()
            done.release()

    done = get_original("_thread", "allocate_lock")()
    done.acquire()
    get_original("_thread", "start_new_thread")(enter, ())
    done.acquire()
    assert refusals == ["virtual_time() works in the main thread only: it replaces clocks that all threads share"]


def test_a_timer_is_not_started_after_its_time_has_ended() -> None:
    with virtual_time() as clock:
        timer = current_loop().timer(1)
    with pytest.raises(RuntimeError, match="has ended"):
        timer.start(print)
    with pytest.raises(RuntimeError, match="has ended"):
        clock.advance(1)
    with pytest.raises(RuntimeError, match="has ended"):
        clock.spend(1)
    timer.stop()
    timer.close()


def test_a_greenlet_that_sleeps_when_its_time_ends_can_be_killed_later() -> None:
    with virtual_time() as clock:
        sleeper = gevent.spawn(gevent.sleep, 5)
        clock.settle()
        assert clock.timers == 1
    assert clock.timers == 0
    assert not sleeper.dead
    sleeper.kill()
    assert sleeper.dead


# The clock


def test_a_sleep_moves_all_clocks_by_its_length(clock: VirtualTime) -> None:
    monotonic, wall, loop = _clock.monotonic(), _clock.wall(), current_loop().now()
    gevent.sleep(2.5)
    current_loop().update_now()
    assert clock.now() == 2.5
    assert _clock.monotonic() - monotonic == 2.5
    assert _clock.wall() - wall == 2.5
    assert current_loop().now() - loop == 2.5


def test_tenths_of_seconds_add_up_to_round_numbers(clock: VirtualTime) -> None:
    for _ in range(3):
        clock.advance(0.1)
    assert clock.now() == 0.3


@pytest.mark.parametrize("window", [0.1, 0.7, 1 / 3, 1e-6])
def test_whoever_waits_for_what_is_left_until_a_deadline_wakes_at_it_and_not_before(
    clock: VirtualTime, window: float
) -> None:
    for _ in range(100):
        deadline = _clock.monotonic() + window
        gevent.sleep(deadline - _clock.monotonic())
        assert _clock.monotonic() == deadline


def test_hours_take_no_time() -> None:
    began = time.perf_counter()
    with virtual_time() as clock:
        for _ in range(496):
            gevent.sleep(10)
        assert clock.now() == 4960
    assert time.perf_counter() - began < 1


def test_advance_returns_after_all_that_is_due_at_the_same_time_and_all_that_it_makes_ready(clock: VirtualTime) -> None:
    woken = Event()
    noted: list[str] = []

    def wait_and_sleep() -> None:
        woken.wait()
        gevent.sleep(0)
        noted.append("woken by the late one")

    def come_late() -> None:
        gevent.sleep(1)
        gevent.sleep(1)
        noted.append("late")
        woken.set()

    greenlets = [gevent.spawn(wait_and_sleep), gevent.spawn(come_late)]
    clock.advance(2)
    assert noted == ["late", "woken by the late one"]
    assert clock.now() == 2
    gevent.joinall(greenlets)


def test_advance_stops_short_of_what_is_due_later(clock: VirtualTime) -> None:
    sleeper = gevent.spawn(gevent.sleep, 1.001)
    clock.advance(1)
    assert (clock.now(), clock.timers, sleeper.dead) == (1, 1, False)
    clock.advance(0.001)
    assert (clock.now(), clock.timers, sleeper.dead) == (1.001, 0, True)


def test_greenlets_may_advance_at_the_same_time(clock: VirtualTime) -> None:
    advancing = [gevent.spawn(clock.advance, seconds) for seconds in (3, 1, 3, 2)]
    clock.advance(2)
    assert [one.dead for one in advancing] == [False, True, False, False]  # the last one came after us
    gevent.joinall(advancing)
    assert clock.now() == 3


def test_who_is_killed_while_it_advances_is_forgotten(clock: VirtualTime) -> None:
    early, late = (gevent.spawn(clock.advance, 3) for _ in range(2))
    clock.settle()
    early.kill()
    assert clock.timers == 1
    killer = gevent.spawn_later(3, late.kill)  # when its time has come already
    clock.advance(5)
    assert (clock.now(), clock.timers) == (5, 0)
    assert [one.dead for one in (early, late, killer)] == [True] * 3


def test_settle_runs_what_is_ready_and_leaves_the_time_alone(clock: VirtualTime) -> None:
    noted: list[str] = []
    sleeper = gevent.spawn(sleep_and_note, 0.001, "later", noted)
    ready = gevent.spawn(sleep_and_note, 0, "now", noted)
    clock.settle()
    assert (noted, clock.now()) == (["now"], 0)
    gevent.joinall([sleeper, ready])


def test_settle_fires_timers_that_are_due(clock: VirtualTime) -> None:
    sleeper = gevent.spawn(gevent.sleep, 1)
    clock.settle()
    clock.spend(1)
    clock.settle()
    assert sleeper.dead
    assert clock.now() == 1


def test_spend_moves_the_time_without_a_switch_and_timers_fire_when_the_hub_runs(clock: VirtualTime) -> None:
    noted: list[float] = []

    def sleep() -> None:
        gevent.sleep(1)
        noted.append(clock.now())

    sleepers = [gevent.spawn(sleep) for _ in range(2)]
    clock.settle()
    clock.spend(3)
    assert (clock.now(), noted) == (3, [])
    gevent.joinall(sleepers)
    assert noted == [3, 3]


def test_a_timeout_that_became_due_by_spending_is_raised_at_the_next_switch(clock: VirtualTime) -> None:
    with gevent.Timeout(1) as timeout:
        clock.spend(2)
        with pytest.raises(gevent.Timeout) as raised:
            gevent.sleep(10)
    assert raised.value is timeout
    assert clock.now() == 2


def test_timers_counts_the_sleeping(clock: VirtualTime) -> None:
    sleepers = [gevent.spawn(gevent.sleep, seconds) for seconds in (1, 2, 3)]
    assert clock.timers == 0
    clock.settle()
    assert clock.timers == 3
    clock.advance(2)
    assert clock.timers == 1
    gevent.joinall(sleepers)
    assert clock.timers == 0


@pytest.mark.parametrize("seconds", [-1, math.nan, math.inf])
def test_the_time_moves_only_forward_and_not_for_ever(clock: VirtualTime, seconds: float) -> None:
    with pytest.raises(ValueError, match=f"advance\\({seconds}\\)"):
        clock.advance(seconds)
    with pytest.raises(ValueError, match=f"spend\\({seconds}\\)"):
        clock.spend(seconds)
    assert clock.now() == 0


def test_the_repr_says_what_time_it_is(clock: VirtualTime) -> None:
    gevent.sleep(1.5)
    assert repr(clock) == "<VirtualTime at 1.5 s, 0 timers>"


# Whatever gevent does with a loop


def test_a_deadlock_still_raises_loop_exit(clock: VirtualTime) -> None:
    with pytest.raises(LoopExit):
        Event().wait()
    gevent.sleep(1)
    with pytest.raises(LoopExit):
        Event().wait()
    assert clock.now() == 1


def test_a_timeout_fires_before_a_sleep_of_the_same_length_that_began_after_it(clock: VirtualTime) -> None:
    with pytest.raises(gevent.Timeout), gevent.Timeout(5):
        gevent.sleep(5)
    assert (clock.now(), clock.timers) == (5, 0)


@pytest.mark.parametrize("seed", [None, 1])
def test_a_timeout_that_is_not_needed_does_not_move_the_time(seed: int | None) -> None:
    with virtual_time(seed) as clock:
        queue = Queue[int]()
        putter = gevent.spawn(queue.put, 1)
        assert queue.get(timeout=5) == 1
        assert (clock.now(), clock.timers) == (0, 0)
        putter.join()


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_a_greenlet_that_was_killed_before_it_started_never_starts(seed: int | None) -> None:
    with virtual_time(seed):
        noted: list[str] = []
        early = gevent.spawn(noted.append, "started")
        early.kill()
        later = gevent.spawn_later(1, noted.append, "started later")
        later.kill()
        gevent.sleep(2)
        assert noted == []
        assert early.dead
        assert later.dead


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_killing_and_joining_work_in_any_order(seed: int | None) -> None:
    with virtual_time(seed) as clock:
        greenlets = [gevent.spawn(gevent.sleep, seconds) for seconds in range(10)]
        gevent.sleep(4.5)
        gevent.killall(greenlets)
        assert clock.now() == 4.5
        assert len(gevent.joinall(greenlets, raise_error=True)) == 10
        assert clock.timers == 0


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_results_and_failures_arrive_in_any_order(seed: int | None) -> None:
    with virtual_time(seed):
        good: AsyncResult[int] = AsyncResult()
        bad: AsyncResult[int] = AsyncResult()
        good_setter, bad_setter = gevent.spawn(good.set, 1), gevent.spawn(bad.set_exception, KeyError())
        assert good.get(timeout=1) == 1
        with pytest.raises(KeyError):
            bad.get(timeout=1)
        good_setter.join()
        bad_setter.join()


@pytest.mark.skipif(gevent.config.loop.__module__.startswith("gevent.libuv"), reason="libuv has no priorities")
def test_gevent_idle_runs_before_the_time_moves(clock: VirtualTime) -> None:
    sleeper = gevent.spawn(gevent.sleep, 1)
    gevent.idle()
    assert clock.now() == 0
    sleeper.join()


def test_a_thousand_ready_greenlets_run_before_the_time_moves() -> None:
    # More than gevent runs in one round of its loop: it breaks off when they took longer than its switch interval.
    began = time.perf_counter()

    def take_real_time() -> float:
        while time.perf_counter() - began < 0.02:
            pass
        return clock.now()

    with virtual_time() as clock:
        greenlets = [gevent.spawn(take_real_time) for _ in range(1000)]
        gevent.sleep(1)
        assert [one.value for one in greenlets] == [0] * 1000


# Timers


def fired_at(clock: VirtualTime, noted: list[float]) -> Callable[[], None]:
    return lambda: noted.append(clock.now())


def test_timers_of_one_moment_fire_in_the_order_they_were_started(clock: VirtualTime) -> None:
    noted: list[str] = []
    sleepers = [gevent.spawn(sleep_and_note, 3, str(n), noted) for n in range(50)]
    gevent.joinall(sleepers)
    assert noted == [str(n) for n in range(50)]


def test_a_timer_is_active_until_it_fires(clock: VirtualTime) -> None:
    timer = current_loop().timer(2)
    seen: list[tuple[bool, bool]] = []
    assert (timer.active, timer.pending, timer.callback, timer.args) == (False, False, None, None)
    timer.start(lambda _: seen.append((timer.active, timer.pending)), 1)
    assert (timer.active, timer.pending, timer.args) == (True, False, (1,))
    clock.advance(2)
    assert seen == [(False, False)]
    assert (timer.active, timer.pending, timer.callback, timer.args) == (False, False, None, None)


def test_a_timer_of_no_or_negative_time_fires_at_once(clock: VirtualTime) -> None:
    noted: list[float] = []
    for after in (0, -5, 0):
        current_loop().timer(after).start(noted.append, after)
    clock.settle()
    assert (noted, clock.now()) == ([0, -5, 0], 0)


def test_timers_of_one_moment_fire_before_what_they_make_ready_and_that_before_timers_that_they_start(
    clock: VirtualTime,
) -> None:
    noted: list[str] = []
    loop = current_loop()

    def fire() -> None:
        loop.timer(0).start(noted.append, "timer that it started")
        loop.run_callback(noted.append, "callback that it made ready")

    loop.timer(1).start(fire)
    loop.timer(1).start(noted.append, "timer of the same moment")
    clock.advance(1)
    assert noted == ["timer of the same moment", "callback that it made ready", "timer that it started"]


def test_a_repeating_timer_fires_until_it_is_stopped(clock: VirtualTime) -> None:
    noted: list[float] = []
    with current_loop().timer(2, 3) as timer:
        timer.start(fired_at(clock, noted))
        clock.advance(8)
        assert timer.active
    clock.advance(8)
    assert (noted, clock.timers) == ([2, 5, 8], 0)


def test_a_repeating_timer_that_is_late_catches_up_once(clock: VirtualTime) -> None:
    noted: list[float] = []
    with current_loop().timer(1, 1) as timer:
        timer.start(fired_at(clock, noted))
        clock.spend(3.5)
        clock.advance(1)
    assert noted == [3.5, 3.5, 4.5]


def test_again_starts_a_repeating_timer_anew_from_its_interval(clock: VirtualTime) -> None:
    noted: list[float] = []
    timer = current_loop().timer(10, 3)
    timer.again(fired_at(clock, noted), update=True)
    clock.advance(2)
    timer.again(fired_at(clock, noted))
    clock.advance(6)
    timer.stop()
    assert noted == [5, 8]


def test_again_stops_a_timer_that_does_not_repeat(clock: VirtualTime) -> None:
    timer = current_loop().timer(1)
    timer.start(print, "never")
    timer.again(print, "never")
    assert (timer.active, clock.timers) == (False, 0)


def test_a_timer_that_is_started_while_active_keeps_its_time_and_calls_the_new_callback(clock: VirtualTime) -> None:
    noted: list[str] = []
    timer = current_loop().timer(2)
    timer.start(noted.append, "old")
    clock.advance(1)
    timer.start(noted.append, "new", update=True)
    assert clock.timers == 1
    clock.advance(1)
    assert noted == ["new"]


def test_a_timer_that_was_stopped_goes_on_where_it_was(clock: VirtualTime) -> None:
    noted: list[float] = []
    timer = current_loop().timer(5)
    timer.start(fired_at(clock, noted))
    clock.advance(2)
    timer.stop()
    clock.advance(100)
    timer.start(fired_at(clock, noted), update=True)
    clock.advance(10)
    assert noted == [105]


def test_a_timer_may_be_started_again_by_its_own_callback(clock: VirtualTime) -> None:
    noted: list[str] = []
    timer = current_loop().timer(1)
    timer.start(lambda: timer.start(noted.append, "second"))
    clock.advance(1)
    assert noted == ["second"]
    assert not timer.active


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_repeating_timer_may_be_ended_by_its_own_callback(clock: VirtualTime, end: str) -> None:
    noted: list[float] = []
    timer = current_loop().timer(1, 1)

    def note_and_end() -> None:
        noted.append(clock.now())
        getattr(timer, end)()

    timer.start(note_and_end)
    clock.advance(5)
    assert (noted, clock.timers) == ([1], 0)


def test_a_timer_that_another_one_of_the_same_moment_stops_does_not_fire(clock: VirtualTime) -> None:
    noted: list[str] = []
    first, second = current_loop().timer(1), current_loop().timer(1)
    first.start(second.stop)
    second.start(noted.append, "fired")
    clock.advance(2)
    assert noted == []


def test_a_closed_timer_can_be_closed_and_stopped_but_not_started(clock: VirtualTime) -> None:
    timer = current_loop().timer(1, 1)
    timer.start(print)
    timer.close()
    timer.close()
    timer.stop()
    assert clock.timers == 0
    with pytest.raises(ValueError, match="closed"):
        timer.start(print)
    with pytest.raises(ValueError, match="closed"):
        timer.again(print)


def test_a_timer_without_ref_does_not_keep_the_loop_alive(clock: VirtualTime) -> None:
    timer = current_loop().timer(1, ref=False)
    timer.start(print, "never")
    with pytest.raises(LoopExit):
        Event().wait()
    assert (timer.ref, timer.active, clock.now()) == (False, True, 0)
    timer.close()


def test_a_timer_without_ref_fires_in_its_place_among_others(clock: VirtualTime) -> None:
    noted: list[float] = []
    timer = current_loop().timer(1, ref=False)
    timer.start(fired_at(clock, noted))
    gevent.sleep(2)
    assert noted == [1]


def test_the_ref_of_a_timer_can_be_changed_while_it_is_active(clock: VirtualTime) -> None:
    timer = current_loop().timer(1)
    woken = Event()
    timer.start(woken.set)
    timer.ref = False
    with pytest.raises(LoopExit):
        woken.wait()
    timer.ref = True
    assert woken.wait()
    assert clock.now() == 1
    with pytest.raises(LoopExit):
        Event().wait()


def test_hub_join_ends_with_the_last_timer(clock: VirtualTime) -> None:
    sleeper = gevent.spawn(gevent.sleep, 5)
    assert not gevent.get_hub().join(timeout=3)
    assert gevent.get_hub().join(timeout=3)
    assert sleeper.dead
    assert clock.now() == 5


def test_an_exception_of_a_timer_goes_to_the_hub_and_the_others_fire(clock: VirtualTime, errors: io.StringIO) -> None:
    noted: list[float] = []
    timers = [current_loop().timer(1, 1), current_loop().timer(1)]
    timers[0].start(lambda: 1 / 0)
    timers[1].start(fired_at(clock, noted))
    clock.advance(2)
    assert noted == [1]
    assert errors.getvalue().count("ZeroDivisionError: division by zero") == 2
    assert "<virtual timer due at 2.0 s" in errors.getvalue()
    assert timers[0].active
    timers[0].close()


def test_a_system_exit_of_a_timer_reaches_the_main_greenlet(clock: VirtualTime) -> None:
    timer = current_loop().timer(1)
    timer.start(sys.exit, 3)
    with pytest.raises(SystemExit):
        gevent.sleep(5)
    gevent.sleep(5)
    assert clock.now() == 6


def test_bad_timers_are_refused(clock: VirtualTime) -> None:
    loop = current_loop()
    with pytest.raises(TypeError, match="real number"):
        loop.timer("1")
    with pytest.raises(ValueError, match="never gets there"):
        loop.timer(math.inf)
    with pytest.raises(ValueError, match="never gets there"):
        loop.timer(math.nan)
    with pytest.raises(ValueError, match="positive or zero"):
        loop.timer(1, -1)
    with pytest.raises(TypeError, match="callable"):
        loop.timer(1).start(None)
    assert clock.timers == 0


# Seeds


def interleaving(seed: int | None) -> str:
    noted: list[str] = []

    def run(name: str) -> None:
        for _ in range(3):
            gevent.sleep(0)
            noted.append(name)
            gevent.sleep(1)
            noted.append(name.upper())

    with virtual_time(seed):
        gevent.joinall([gevent.spawn(run, name) for name in "abcd"])
    return "".join(noted)


def test_without_a_seed_the_order_is_first_come_first_served() -> None:
    assert interleaving(None) == "abcdABCD" * 3


def test_five_hundred_seeds_give_hundreds_of_interleavings_and_each_the_same_one_again() -> None:
    first = [interleaving(seed) for seed in range(500)]
    again = [interleaving(seed) for seed in range(500)]
    assert first == again
    assert len(set(first)) > 490


def test_a_seed_decides_among_callbacks() -> None:
    def order(seed: int) -> str:
        noted: list[str] = []
        with virtual_time(seed) as clock:
            for name in "abcdefgh":
                current_loop().run_callback(noted.append, name)
            clock.settle()
        return "".join(noted)

    orders = [order(seed) for seed in range(100)]
    assert orders == [order(seed) for seed in range(100)]
    assert len(set(orders)) > 90
    assert {"".join(sorted(one)) for one in orders} == {"abcdefgh"}


def test_a_seed_decides_among_timers_of_one_moment_but_not_between_moments() -> None:
    def order(seed: int) -> str:
        noted: list[str] = []
        with virtual_time(seed):
            sleepers = [gevent.spawn(sleep_and_note, int(name), name, noted) for name in "1112"]
            tied = [gevent.spawn(sleep_and_note, 1, name, noted) for name in "abc"]
            gevent.joinall(sleepers + tied)
        return "".join(noted)

    orders = {order(seed) for seed in range(100)}
    assert len(orders) > 50
    assert {one[-1] for one in orders} == {"2"}


def test_seeds_try_an_event_both_before_and_after_a_timeout_of_the_same_moment() -> None:
    def outcome(seed: int) -> bool:
        with virtual_time(seed):
            event = Event()
            waiter = gevent.spawn(event.wait, 5)
            setter = gevent.spawn_later(5, event.set)
            setter.join()
            return waiter.get()

    assert {outcome(seed) for seed in range(50)} == {False, True}


def test_a_shuffled_callback_is_pending_until_it_runs_and_true_until_it_has_run() -> None:
    with virtual_time(1) as clock:
        seen: list[tuple[bool, bool, Any]] = []

        def note(_: int) -> None:
            seen.append((callback.pending, bool(callback), callback.args))

        callback: Any = current_loop().run_callback(note, 7)
        assert (callback.pending, bool(callback), callback.args) == (True, True, (7,))
        clock.settle()
        assert seen == [(False, True, (7,))]
        assert (callback.pending, bool(callback), callback.args) == (False, False, None)


@pytest.mark.parametrize("end", ["stop", "close"])
def test_a_shuffled_callback_that_was_stopped_does_not_run(end: str) -> None:
    with virtual_time(1) as clock:
        noted: list[str] = []
        callback = current_loop().run_callback(noted.append, "ran")
        getattr(callback, end)()
        assert (callback.pending, bool(callback)) == (False, False)
        clock.settle()
        assert noted == []


def test_an_exception_of_a_shuffled_callback_goes_to_the_hub_and_the_others_run(errors: io.StringIO) -> None:
    with virtual_time(1) as clock:
        noted: list[str] = []
        for callback in (lambda: 1 / 0, lambda: noted.append("ran")):
            current_loop().run_callback(callback)
        clock.settle()
        assert noted == ["ran"]
        assert "ZeroDivisionError" in errors.getvalue()


@pytest.mark.parametrize("seed", [None, 1])
def test_another_thread_may_call_back(seed: int | None) -> None:
    with virtual_time(seed):
        woken = Event()
        loop = current_loop()
        keep_alive = loop.async_()  # a real watcher, and no timer: the hub waits for the thread in real time
        keep_alive.start(print)
        get_original("_thread", "start_new_thread")(loop.run_callback_threadsafe, (woken.set,))
        assert woken.wait()
        keep_alive.close()


def test_what_is_ready_when_a_shuffled_time_ends_still_runs() -> None:
    noted: list[str] = []
    with virtual_time(1):
        greenlets = [gevent.spawn(noted.append, name) for name in "abc"]
    gevent.joinall(greenlets)
    assert sorted(noted) == ["a", "b", "c"]


# The fixtures of conftest.py, in a pytest of their own


def run_pytest(folder: Path, source: str, *options: str) -> str:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_sample.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTHONPATH": f"{STARTUP}{os.pathsep}{ROOT}"}
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False).stdout


def test_a_test_that_leaks_a_greenlet_fails_and_says_what_that_is_doing(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        """
import gevent, gevent.event, greenlet

kept = []

def wait_for_ever():
    gevent.event.Event().wait()

def test_leaks():
    kept.append(gevent.spawn(wait_for_ever))
    gevent.sleep(0)

def test_leaks_a_raw_one():
    kept.append(greenlet.greenlet(wait_for_ever, gevent.get_hub()))
    gevent.get_hub().loop.run_callback(kept[-1].switch)
    gevent.sleep(0)

def test_leaks_in_virtual_time(clock):
    kept.append(gevent.spawn(gevent.sleep, 5))
    clock.settle()

def test_is_clean():
    gevent.spawn(wait_for_ever).kill(block=False)
    kept.append(gevent.Greenlet(wait_for_ever))
    gevent.get_hub().threadpool.apply(sum, [(1, 2)])
    gevent.spawn(gevent.sleep, 0)
""",
    )
    assert "4 passed, 3 errors" in output
    for name in ("leaks", "leaks_a_raw_one", "leaks_in_virtual_time"):
        assert f"ERROR test_sample.py::test_{name} - " in output
    assert output.count("the test left 1 greenlets behind") >= 3
    assert "in wait_for_ever" in output


def test_a_test_that_hangs_is_failed_by_its_timeout_wherever_it_hangs(tmp_path: Path) -> None:
    pytest.importorskip("pytest_timeout")
    output = run_pytest(
        tmp_path,
        """
import gevent, gevent.event

def spin(step):
    while True:
        step()

def test_hangs_in_the_hub():
    gevent.sleep(3600)

def test_hangs_because_others_are_always_ready():
    spinner = gevent.spawn(spin, lambda: gevent.sleep(0))
    try:
        spinner.join()
    finally:
        spinner.kill()

def test_hangs_because_another_one_never_yields():
    gevent.spawn(spin, lambda: None).join()

def test_hangs_in_virtual_time(clock):
    spinner = gevent.spawn(spin, lambda: gevent.sleep(1))
    try:
        spinner.join()
    finally:
        spinner.kill()
""",
        "--timeout=0.5",
        "--timeout-method=signal",
    )
    assert "4 failed" in output

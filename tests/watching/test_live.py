"""`Processor.stats`, `Processor.live_batches`, and the estimate of a `ProcessorOverloaded`."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Conflict, LiveBatch, Processor, ProcessorOverloaded, ProcessorStats
from geventbatch._watch.gauges import Gauges, gauges_of
from tests.support.callers import answer_of, in_a_thread
from tests.support.recording_store import raising

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime


def nothing(resource: object) -> None:
    """An operation."""


def sleeping(seconds: float) -> Callable[..., None]:
    def sleep(*args: object) -> None:
        gevent.sleep(seconds)

    return sleep


# stats


def test_stats_of_a_processor_that_did_nothing_are_all_zero() -> None:
    assert set(dataclasses.astuple(Processor(min_duration=0).stats())) == {0}


def test_stats_say_what_lives_and_count_what_ended(clock: VirtualTime) -> None:
    conflicts = [Conflict()]

    def save(key: str, resource: None) -> None:
        gevent.sleep(1)
        if conflicts:
            raise conflicts.pop()
        if key == "b":
            raise OSError

    processor: Processor[None] = Processor(
        load_resource=sleeping(1), save_resource=save, min_duration=0, max_duration=9, max_pending=4
    )
    callers = [gevent.spawn(answer_of, processor.run, key, nothing) for key in "aaab"]
    clock.advance(0.5)
    assert isinstance(answer_of(processor.run, "c", nothing), ProcessorOverloaded)
    callers[0].kill()
    stats = processor.stats()
    assert (stats.keys, stats.batches, stats.operations) == (2, 2, 3)
    assert stats.workers >= 2
    assert (stats.operations_total, stats.batches_total) == (0, 0)
    gevent.joinall(callers)
    clock.advance(2)
    stats = processor.stats()
    assert (stats.keys, stats.batches, stats.operations) == (0, 0, 0)
    assert stats.operations_total == 3
    assert stats.batches_total == 2
    assert stats.failed_batches_total == 1
    assert stats.conflicts_total == 1
    assert stats.withdrawn_total == 1
    assert stats.overloaded_total == 1
    processor.stop()
    assert processor.stats().workers == 0


def test_stats_are_frozen_and_any_thread_may_ask_for_them() -> None:
    processor: Processor[None] = Processor(min_duration=0, batching=False)
    processor.run("k", nothing)
    in_a_thread(lambda: processor.run("k", nothing))
    stats = in_a_thread(processor.stats)
    assert isinstance(stats, ProcessorStats)
    assert (stats.operations_total, stats.batches_total) == (2, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.keys = 5  # type: ignore[misc]


def test_operations_per_second_is_the_rate_of_the_last_ten_seconds(clock: VirtualTime) -> None:
    with Processor(min_duration=0, max_duration=5) as processor:
        assert processor.stats().operations_per_second == 0
        for _ in range(200):
            processor.run("k", nothing)
            clock.advance(0.1)
        assert processor.stats().operations_per_second == pytest.approx(10, rel=0.02)
        clock.advance(5)
        assert processor.stats().operations_per_second == pytest.approx(5, rel=0.05)
        clock.advance(20)
        assert processor.stats().operations_per_second == 0


# retry_after


def test_an_overloaded_processor_says_when_those_who_wait_will_have_their_answers(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(
        save_resource=sleeping(1), min_duration=0, max_duration=9, max_batch_size=10, max_pending=50
    )
    callers = [gevent.spawn(processor.run, "k", nothing) for _ in range(50)]
    clock.advance(0.5)
    refused = answer_of(processor.run, "k", nothing)
    assert isinstance(refused, ProcessorOverloaded)
    assert refused.retry_after == 9  # nothing was answered yet
    clock.advance(2)
    callers += [gevent.spawn(processor.run, "k", nothing) for _ in range(20)]
    clock.settle()
    refused = answer_of(processor.run, "k", nothing)
    assert isinstance(refused, ProcessorOverloaded)
    assert refused.retry_after == pytest.approx(50 / (20 / 2.5))
    assert "in 6.25 s" in str(refused)
    gevent.joinall(callers)
    processor.stop()


# live_batches


def test_live_batches_say_what_each_is_doing_and_where(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(load_resource=sleeping(1), min_duration=0, max_duration=9, max_batches=1)
    assert processor.live_batches() == []
    callers = [gevent.spawn(processor.run, key, nothing) for key in "aab"]
    clock.advance(0.75)
    a, b = processor.live_batches()
    assert isinstance(a, LiveBatch)
    assert (a.key, a.phase, a.age, a.running, a.remaining) == ("a", "load", 0.75, 0.75, 8.25)
    assert (a.waiting, a.operations, a.attempts, a.overdue) == (2, 2, 1, False)
    assert (b.key, b.phase, b.age, b.running, b.remaining) == ("b", "queued", 0.75, None, None)
    assert b.stack == ()
    here = [frame for frame in a.stack if frame.endswith("in sleeping.<locals>.sleep")]
    assert len(here) == 1
    assert __file__ in here[0]
    assert not any("geventbatch/_" in frame for frame in a.stack)
    gevent.joinall(callers)
    assert processor.live_batches() == []
    processor.stop()


def test_a_batch_whose_callers_were_told_but_whose_code_hangs_is_overdue(clock: VirtualTime) -> None:
    def hang(key: str) -> None:
        try:
            gevent.sleep(100)
        finally:
            gevent.sleep(100)

    processor: Processor[None] = Processor(load_resource=hang, min_duration=0, max_duration=5)
    answer_of(processor.run, "k", nothing)
    (batch,) = processor.live_batches()
    assert (batch.overdue, batch.waiting, batch.running, batch.remaining) == (True, 0, 5, None)
    assert any("hang" in frame for frame in batch.stack)
    clock.advance(100)
    assert processor.live_batches() == []
    processor.stop()


def test_a_batch_that_did_not_fail_is_not_overdue_while_its_scope_rolls_back(clock: VirtualTime) -> None:
    @contextmanager
    def open_resource(key: str) -> Iterator[list[int]]:
        try:
            yield []
        finally:
            gevent.sleep(1)

    processor = Processor(open_resource=open_resource, min_duration=0, max_duration=5)
    caller = gevent.spawn(answer_of, processor.run, "k", raising(KeyError()))
    clock.settle()
    (batch,) = processor.live_batches()
    assert (batch.waiting, batch.overdue) == (0, False)
    assert gauges_of(processor, Gauges()).overdue_batches == 0
    assert isinstance(caller.get(), KeyError)
    processor.stop()


def test_a_batch_that_waits_for_its_replay_says_so(clock: VirtualTime) -> None:
    def conflict(*_: object) -> None:
        raise Conflict

    processor: Processor[None] = Processor(save_resource=conflict, min_duration=0, max_duration=5)
    caller = gevent.spawn(answer_of, processor.run, "k", nothing)
    clock.settle()
    (batch,) = processor.live_batches()
    assert (batch.phase, batch.overdue) == ("replay", False)
    caller.get()
    processor.stop()


def test_a_batch_in_its_callers_own_greenlet_or_in_a_bulk_is_a_live_one_too(clock: VirtualTime) -> None:
    def load(keys: list[str]) -> dict[str, None]:
        gevent.sleep(1)
        return dict.fromkeys(keys)

    alone: Processor[None] = Processor(load_resource=sleeping(1), min_duration=0, max_duration=5, batching=False)
    bulk = Processor(load_resources=load, save_resources=print, min_duration=0, max_duration=5)
    ran: list[Any] = [gevent.spawn(alone.run, "k", nothing), gevent.spawn(bulk.run, "a", nothing)]
    ran.append(gevent.spawn(bulk.run, "b", nothing))
    clock.advance(0.5)
    assert [(one.key, one.phase, one.waiting) for one in alone.live_batches()] == [("k", "load", 1)]
    assert [(one.key, one.phase, one.waiting) for one in bulk.live_batches()] == [("a", "load", 1), ("b", "load", 1)]
    gevent.joinall(ran)
    alone.stop()
    bulk.stop()


# name


def test_a_processor_is_called_what_the_option_says_or_what_loads_its_resources() -> None:
    class Store:
        def __call__(self, key: str) -> Any: ...

    assert Processor(name="seats", min_duration=0).name == "seats"
    assert Processor(load_resource=nothing, min_duration=0).name == "nothing"
    assert Processor(open_resource=Store(), min_duration=0).name == Store.__qualname__
    assert Processor(min_duration=0).name == "geventbatch"


@pytest.mark.parametrize("name", [5, "", b"name"])
def test_a_name_is_a_str_that_is_not_empty(name: Any) -> None:
    with pytest.raises(TypeError, match=r"name is .*, but must be a str that is not empty"):
        Processor(name=name)

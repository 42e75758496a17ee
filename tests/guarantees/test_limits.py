"""`max_batch_size`, `max_pending` and `max_batches`."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import OperationCancelled, Processor, ProcessorOverloaded
from tests.support.callers import answer_of, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch.testing import VirtualTime


class Store:
    """Takes a second to load and a second to save, and notes who does so at once."""

    def __init__(self) -> None:
        self.saved: list[list[Any]] = []
        self.loads: list[Hashable] = []
        self.inside = 0
        self.most = 0

    def load(self, key: Hashable) -> list[Any]:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.loads.append(key)
        gevent.sleep(1)
        return []

    def save(self, key: Hashable, resource: list[Any]) -> None:
        gevent.sleep(1)
        self.saved.append(resource)
        self.inside -= 1


def processor_over(store: Store, **options: Any) -> Processor[list[Any]]:
    return Processor(
        **{
            "load_resource": store.load,
            "save_resource": store.save,
            "min_duration": 0,
            "max_duration": 50,
            **options,
        }
    )


def spawn(processor: Processor[list[Any]], *values: Any, key: Hashable = "k", **options: Any) -> list[Any]:
    return [gevent.spawn(answer_of, processor.run, key, list.append, value, **options) for value in values]


def all_of(callers: list[Any]) -> list[Any]:
    return [caller.get() for caller in callers]


# max_batch_size


@pytest.mark.parametrize("size", [1, 2, 3, 5, 32, 33, 64])
def test_a_batch_holds_max_batch_size_operations_and_the_next_ones_are_the_next_batch_in_their_order(
    clock: VirtualTime, size: int
) -> None:
    store = Store()
    count = 2 * size + 1
    with processor_over(store, max_batch_size=size) as processor:
        assert all_of(spawn(processor, *range(count))) == [None] * count
    assert [len(batch) for batch in store.saved] == [size, size, 1]
    assert list(chain(*store.saved)) == list(range(count))


def test_an_operation_that_was_withdrawn_before_it_started_leaves_its_place_in_the_batch(clock: VirtualTime) -> None:
    store = Store()
    with processor_over(store, max_batch_size=3) as processor:
        (kept,) = spawn(processor, "kept")
        (killed,) = spawn(processor, "killed")
        clock.settle()
        killed.kill()
        (cancelled,) = spawn(processor, "cancelled", start_timeout=0.5)
        assert isinstance(cancelled.get(), OperationCancelled)
        assert all_of([kept, *spawn(processor, "a", "b", "next")]) == [None] * 4
    assert store.saved == [["kept", "a", "b"], ["next"]]


# max_pending


@pytest.mark.parametrize("batching", [True, False])
def test_more_than_max_pending_operations_are_refused_at_once_and_not_run_whatever_their_keys(
    clock: VirtualTime, batching: bool
) -> None:
    store = Store()
    with processor_over(store, max_pending=3, batching=batching) as processor:
        admitted = spawn(processor, 1, key="a") + spawn(processor, 2, key="b") + spawn(processor, 3, key="a")
        refused = spawn(processor, 4, key="a") + spawn(processor, 5, key="c")
        clock.settle()
        assert [type(caller.value) for caller in refused] == [ProcessorOverloaded] * 2
        assert all_of(admitted) == [None] * 3
    assert sorted(chain(*store.saved)) == [1, 2, 3]
    assert "c" not in store.loads


@pytest.mark.parametrize("batching", [True, False])
def test_an_operation_that_was_answered_makes_room_for_another(clock: VirtualTime, batching: bool) -> None:
    store = Store()
    with processor_over(store, max_pending=2, batching=batching) as processor:
        for _ in range(3):
            callers = spawn(processor, 1, 2, 3)
            assert [type(answer) for answer in all_of(callers)] == [type(None)] * 2 + [ProcessorOverloaded]


def test_an_operation_that_failed_in_any_way_makes_room_for_another(clock: VirtualTime) -> None:
    fail: list[str] = ["load", "save", "operation", "load deadline", "save deadline", "kill"]

    def step(name: str) -> None:
        if fail and fail[0] == name:
            raise OSError
        if fail and fail[0] == f"{name} deadline":
            gevent.sleep(100)

    def operation(resource: None) -> None:
        if fail and fail[0] == "kill":
            raise gevent.GreenletExit
        step("operation")

    with Processor(
        load_resource=lambda key: step("load"),
        save_resource=lambda key, resource: step("save"),
        min_duration=0,
        max_duration=5,
        max_pending=2,
    ) as processor:
        while fail:
            callers = [gevent.spawn(answer_of, processor.run, "k", operation) for _ in range(3)]
            answers = all_of(callers)
            assert [isinstance(answer, ProcessorOverloaded) for answer in answers] == [False, False, True], fail[0]
            assert None not in answers[:2]
            del fail[0]
        assert "0 operations pending" in repr(processor)


def test_an_operation_that_was_withdrawn_makes_room_for_another_even_if_it_had_started(clock: VirtualTime) -> None:
    store = Store()
    with processor_over(store, max_pending=1) as processor:
        (waiting,) = spawn(processor, "withdrawn")
        clock.settle()
        assert isinstance(answer_of(processor.run, "k", list.append, 0), ProcessorOverloaded)
        waiting.kill()
        (started,) = spawn(processor, "started")
        clock.advance(1.5)  # into the save
        assert isinstance(answer_of(processor.run, "k", list.append, 0), ProcessorOverloaded)
        started.kill()
        assert answer_of(processor.run, "k", list.append, "last") is None
        (cancelled,) = spawn(processor, "cancelled", start_timeout=0.1)
        clock.settle()
        assert isinstance(answer_of(processor.run, "k", list.append, 0), ProcessorOverloaded)
        assert isinstance(cancelled.get(), OperationCancelled)
        assert answer_of(processor.run, "k", list.append, "very last") is None
    assert store.saved == [["started"], ["last"], ["very last"]]


def test_with_batching_off_operations_in_other_threads_count_too(clock: VirtualTime) -> None:
    with Processor(max_pending=1, batching=False) as processor:

        def another(resource: None) -> Any:
            return in_a_thread(processor.run, "k", lambda resource: None)

        assert isinstance(processor.run("k", another), ProcessorOverloaded)
        assert in_a_thread(processor.run, "k", lambda resource: 5) == 5


# max_batches

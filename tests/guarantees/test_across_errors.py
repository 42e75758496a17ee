"""What the errors of `run_across` and `run` say of their keys: ``key``, that failed or was waited for, and ``keys``."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.exceptions import InvalidSwitchError

from geventbatch import (
    BatchAborted,
    BatchTimeout,
    LoadFailed,
    NotSaved,
    OperationCancelled,
    Processor,
    ProcessorOverloaded,
    ProcessorStopped,
    ResourceMissing,
    SaveFailed,
)
from tests.support.ledger import Callers, Ledger, append, append_to_all, hold

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


def miss(ledger: Ledger, processor: Processor[Any]) -> None:
    ledger.missing = {"b"}


def fail_load(ledger: Ledger, processor: Processor[Any]) -> None:
    ledger.unloadable = {"b": OSError("load")}


def refuse_all(ledger: Ledger, processor: Processor[Any]) -> None:
    def refuse(_: object) -> None:
        raise NotSaved

    ledger.on_save = refuse


def be_slow(ledger: Ledger, processor: Processor[Any]) -> None:
    ledger.save_time = 100


def die(ledger: Ledger, processor: Processor[Any]) -> None:
    def kill(_: object) -> None:
        raise gevent.GreenletExit

    ledger.on_load = kill


def hold_b(ledger: Ledger, processor: Processor[Any]) -> None:
    ledger.save_time = 100
    gevent.spawn(processor.run, "b", append, "first")
    gevent.sleep(0.1)


def fill(ledger: Ledger, processor: Processor[Any]) -> None:
    for key in "xyz":
        gevent.spawn(processor.run, key, append, "first")
    gevent.sleep(0)


def stop(ledger: Ledger, processor: Processor[Any]) -> None:
    processor.stop(timeout=0)


@pytest.mark.parametrize(
    ("prepare", "kind", "key"),
    [
        (miss, ResourceMissing, "b"),
        (fail_load, LoadFailed, "b"),
        (refuse_all, SaveFailed, "a"),
        (be_slow, BatchTimeout, "a"),
        (die, BatchAborted, "a"),
        (hold_b, OperationCancelled, "b"),
        (fill, ProcessorOverloaded, "a"),
        (stop, ProcessorStopped, "a"),
    ],
)
def test_it_says_its_keys_and_the_one_that_failed_or_that_was_waited_for(
    clock: VirtualTime, prepare: Callable[[Ledger, Processor[Any]], None], kind: type[Exception], key: str
) -> None:
    ledger = Ledger()
    with ledger.processor(max_pending=3) as processor:
        prepare(ledger, processor)
        with pytest.raises(kind) as caught:
            processor.run_across(["a", "b"], append_to_all, 1, start_timeout=1)
        assert type(caught.value) is kind
        assert (caught.value.key, caught.value.keys) == (key, ("a", "b"))  # type: ignore[attr-defined]
        with pytest.raises(kind) as caught:
            processor.run("b", append, 1, start_timeout=1)
        assert (caught.value.key, caught.value.keys) == ("b", ("b",))  # type: ignore[attr-defined]


def test_one_that_waited_for_a_worker_and_no_other_operation_says_its_first_key(clock: VirtualTime) -> None:
    ledger = Ledger()
    ledger.save_time = 10
    with ledger.processor(max_batches=1, worker_number_for_key=lambda _key, _workers: 0) as processor:
        callers = Callers(processor)
        callers.run("zy", 0)
        clock.advance(0.1)
        callers.run("ba", 1, start_timeout=1)
        clock.advance(20)
    error = callers.answers[1]
    assert "it waited for a worker" in str(error)
    assert (error.key, error.keys) == ("b", ("b", "a"))


@pytest.mark.parametrize("keys", ["ab", "a"])
def test_unbatched_it_says_them_too(clock: VirtualTime, keys: str) -> None:
    ledger = Ledger()
    ledger.load_time = 10
    with ledger.processor(batching=False) as processor:
        callers = Callers(processor)
        callers.run(keys, 1, start_timeout=1)
        clock.advance(20)
    error = callers.answers[1]
    assert type(error) is OperationCancelled
    assert (error.key, error.keys) == (keys[0], tuple(keys))


@pytest.mark.parametrize("prepare", [hold_b, fill, stop])
def test_no_such_error_is_part_of_a_cycle(
    clock: VirtualTime, prepare: Callable[[Ledger, Processor[Any]], None]
) -> None:
    ledger = Ledger()
    processor = ledger.processor(max_pending=3)
    prepare(ledger, processor)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises((OperationCancelled, ProcessorOverloaded, ProcessorStopped)):
            processor.run("b", hold, 1, start_timeout=1)
        with pytest.raises((OperationCancelled, ProcessorOverloaded, ProcessorStopped)):
            processor.run_across([*"ab"], append_to_all, 1, start_timeout=1)
        assert not [one for one in gc.get_objects() if isinstance(one, (OperationCancelled, ProcessorStopped))]
    finally:
        gc.enable()
        processor.stop(timeout=0)
        clock.advance(500)


class Numbered:
    """A key that counts how often one is compared with another."""

    compared = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        Numbered.compared += 1
        return isinstance(other, Numbered) and other.number == self.number


def test_each_operation_is_looked_at_once_however_many_keys_of_a_component_are_missing() -> None:
    ledger = Ledger()
    bank, *keys = [Numbered(number) for number in range(61)]
    ledger.missing = set(keys[::2])
    answers: dict[int, Any] = {}

    def call(key: Numbered) -> None:
        try:
            answers[key.number] = processor.run_across([bank, key], append_to_all, key.number)
        except ResourceMissing as error:
            answers[key.number] = error.key

    Numbered.compared = 0
    with ledger.processor(max_batches=1, worker_number_for_key=lambda _key, _workers: 0) as processor:
        gevent.joinall([gevent.spawn(call, key) for key in keys])
    assert answers == {key.number: key if key in ledger.missing else key.number for key in keys}
    assert ledger.kept[bank] == list(range(2, 61, 2))
    assert Numbered.compared <= 10 * len(keys)


@pytest.mark.parametrize("keys", ["b", "bc"])
def test_a_caller_that_something_else_switches_to_has_no_answer_and_leaves(clock: VirtualTime, keys: str) -> None:
    ledger = Ledger()
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0, lambda _, mark: gevent.sleep(4))
        clock.advance(1)
        waiting = callers.run(keys, 1)
        clock.advance(1)
        gevent.get_hub().loop.run_callback(waiting.switch)
        clock.advance(1)
        assert type(callers.answers[1]) is InvalidSwitchError
        assert processor.stats().withdrawn_total == 1
        clock.advance(20)
    assert callers.answers[0] is None
    assert not any(ledger.kept.values())

"""Guarantee 21: which answer each operation of a component has, and which keys its error names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Conflict, LoadFailed, Rejected, ResourceMissing, SaveFailed
from tests.support.ledger import Callers, Ledger, break_all

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def test_where_the_loads_of_two_keys_fail_all_that_wait_for_either_are_told_so(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.unloadable = {"a": OSError("no"), "b": OSError("no")}
    ledger.load_time = 1
    with ledger.processor(max_bulk=2) as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("bc", 1)
        callers.run("ca", 2)
        callers.run("cd", 3)
        clock.advance(1.5)
        assert {mark: callers.answers[mark].key for mark in range(3)} == {0: "a", 1: "b", 2: "a"}
        ledger.unloadable = {}
        clock.advance(5)
        assert callers.answers[3] == 3
    assert ledger.loads == [["a", "b"], ["c", "d"]]


def test_one_whose_key_is_missing_in_a_replay_is_told_so_at_once_and_counts_as_failed(
    clock: VirtualTime, ledger: Ledger
) -> None:
    conflicts = [Conflict()]

    def lose(_: object) -> None:
        if conflicts:
            raise conflicts.pop()
        gevent.sleep(3)

    def miss(_: object) -> None:
        ledger.missing = {"b"} if len(ledger.loads) > 1 else set()

    ledger.on_save, ledger.on_load = lose, miss
    with ledger.processor() as processor:
        metrics = processor.subscribe_batch_metrics()
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "ac", "b"]):
            callers.run(keys, mark)
        clock.advance(1)
        assert {mark: type(answer) for mark, answer in callers.answers.items()} == dict.fromkeys(
            (0, 2), ResourceMissing
        )
        clock.advance(5)
        assert callers.answers[1] == 1
    (metric,) = metrics
    assert (metric.operation_count, metric.raised, metric.withdrawn, metric.error) == (1, 0, 0, None)
    assert ledger.kept == {"a": [1], "c": [1]}


def test_what_waits_at_a_key_that_has_failed_before_is_not_told_of_the_failed_load_of_a_replay(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.unloadable = {"b": OSError("no")}
    loads = iter([None, OSError("gone")])

    def load(_: object) -> None:
        error = next(loads, None)
        if error is not None:
            raise error

    def save(_: object) -> None:
        if len(ledger.saves) == 1:
            ledger.unloadable = {}
            callers.run("b", 2)
            gevent.sleep(0.1)
            raise Conflict

    ledger.on_load, ledger.on_save = load, save
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("a", 1)
        clock.advance(5)
    assert type(callers.answers[0]) is type(callers.answers[1]) is LoadFailed
    assert callers.answers[2] == 2


def test_one_that_was_not_being_saved_when_a_later_part_fails_is_safe_to_run_again(
    clock: VirtualTime, ledger: Ledger
) -> None:
    def save(resources: dict[Any, list[Any]]) -> None:
        if any(3 in marks for marks in resources.values()):
            raise Rejected from ValueError("three")
        if len(ledger.saves) > 2:
            raise OSError("the connection is lost")

    ledger.on_save = save
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark in range(4):
            callers.run("ab", mark)
        clock.advance(1)
    assert [len(ledger.kept[key]) for key in "ab"] == [2, 2]
    assert (callers.answers[0], callers.answers[1]) == (0, 1)
    assert type(callers.answers[2]) is type(callers.answers[3]) is SaveFailed
    assert not callers.answers[2].retry_safe
    assert callers.answers[3].retry_safe


def test_the_error_names_a_key_of_the_operation_that_has_failed(clock: VirtualTime, ledger: Ledger) -> None:
    def lose(keys: list[Any]) -> None:
        if "b" in keys:
            raise OSError("gone")

    ledger.on_load = lose
    ledger.load_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        clock.advance(0.5)
        callers.run("cb", 1)
        clock.advance(5)
    error = callers.answers[1]
    assert type(error) is LoadFailed
    assert (error.key, error.keys) == ("b", ("c", "b"))


def test_an_error_of_many_keys_names_a_few_and_has_all(clock: VirtualTime, ledger: Ledger) -> None:
    keys = [f"k{number}" for number in range(42)]
    ledger.on_load = lambda _: 1 / 0
    with ledger.processor() as processor, pytest.raises(LoadFailed) as caught:
        processor.run_across(keys, break_all, 1)
    assert str(caught.value).startswith("batch of keys 'k0', 'k1', 'k2', 'k3', 'k4' and 37 more: loading raised")
    assert caught.value.keys == tuple(keys)


def test_a_kill_while_keys_are_looked_up_leaves_none_of_them_behind(clock: VirtualTime, ledger: Ledger) -> None:
    asked: list[str] = []

    def number(key: str, workers: int) -> int:
        asked.append(key)
        gevent.sleep(1)
        return 0

    with ledger.processor(worker_number_for_key=number, max_pending=1) as processor:
        callers = Callers(processor)
        ledger.save_time = 10
        callers.run("z", "first")
        clock.advance(1.5)
        crossing = callers.run("abc", "killed")
        clock.advance(1.2)
        callers.run("a", "overloaded")  # is refused, and takes the queue of its key away
        clock.advance(2.5)
        assert asked == ["z", *"abc", "a"]
        crossing.kill(block=False)
        clock.advance(20)
        assert processor.stats().keys == 0


def test_a_key_that_only_operations_with_a_key_missing_in_the_replay_have_named_is_not_saved(
    clock: VirtualTime, ledger: Ledger
) -> None:
    def lose(_: object) -> None:
        if not ledger.missing:
            ledger.missing = {"b"}
            raise Conflict

    ledger.on_save = lose
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("bxc", 0)
        callers.run("ca", 1)
        clock.advance(5)
    assert type(callers.answers[0]) is ResourceMissing
    assert callers.answers[1] == 1
    assert [sorted(keys) for keys in ledger.saves] == [["a", "b", "c", "x"], ["a", "c"]]

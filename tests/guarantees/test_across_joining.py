"""What joins the operations across keys that a worker has taken, until when, and what waits for the next load."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Conflict, LoadFailed
from tests.support.ledger import Callers, Ledger, append_to_all

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Accounts


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def think(accounts: Accounts, mark: Any) -> Any:
    append_to_all(accounts, mark)
    gevent.sleep(1)
    return mark


def test_what_comes_during_the_load_joins_and_what_comes_behind_it_does_not(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.load_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("xy", 0, think)
        callers.run("ab", 1)
        clock.advance(0.5)
        callers.run("ba", 2)
        clock.advance(1)  # loaded: the operation of the other component is applied, and takes a second
        callers.run("ab", 3)
        clock.advance(10)
    assert callers.answers == {mark: mark for mark in range(4)}
    assert [sorted(keys) for keys in ledger.loads] == [["a", "b", "x", "y"], ["a", "b"]]
    assert ledger.kept["a"] == ledger.kept["b"] == [1, 2, 3]


def test_callers_that_have_their_answers_come_back_into_one_bulk(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.load_time = 1
    callers = 90
    with ledger.processor() as processor:

        def call(number: int) -> None:
            for mark in range(3):
                processor.run_across(["hot", number], append_to_all, mark)

        running = [gevent.spawn(call, number) for number in range(callers)]
        clock.advance(10)
        assert all(one.successful() for one in running)
    assert [len(keys) for keys in ledger.loads] == [callers + 1] * 3


def test_one_that_comes_when_the_load_of_one_of_its_keys_has_failed_is_not_told_of_that(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.load_time = 1
    ledger.unloadable = {"b": OSError("load")}
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["xy", "ab", "ac"]):
            callers.run(keys, mark, think if keys == "xy" else None)
        clock.advance(1.5)
        ledger.unloadable = {}
        for mark, keys in enumerate(["ab", "b", "bc"], 3):
            callers.run(keys, mark)
        clock.advance(10)
    assert type(callers.answers.pop(1)) is LoadFailed
    assert callers.answers == {mark: mark for mark in (0, 2, 3, 4, 5)}
    assert ledger.kept == {"x": [0], "y": [0], "a": [2, 3], "b": [3, 4, 5], "c": [2, 5]}


def test_one_that_comes_in_a_replay_after_the_load_of_one_of_its_keys_has_failed_waits_for_a_load_of_it(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.load_time = 1
    ledger.unloadable = {"a": OSError("load"), "c": Conflict("busy")}
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "cd"]):
            callers.run(keys, mark)
        clock.advance(1.5)
        assert len(ledger.loads) == 2  # the second one is under way
        ledger.unloadable = {}
        for mark, keys in enumerate(["ab", "bd"], 3):
            callers.run(keys, mark)
        clock.advance(10)
    assert type(callers.answers.pop(0)) is LoadFailed
    assert callers.answers == {mark: mark for mark in range(1, 5)}
    assert ledger.kept == {"a": [3], "b": [1, 3, 4], "c": [1, 2], "d": [2, 4]}


def test_a_key_whose_load_has_failed_is_free_when_what_was_connected_with_it_has_ended(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.unloadable = {"a": OSError("load"), "c": Conflict("busy")}
    random.seed(0)  # the wait before the next round may be as short as nothing
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc"]):
            callers.run(keys, mark)
        clock.advance(0.001)  # the second operation waits for its next round
        assert type(callers.answers.pop(0)) is LoadFailed
        ledger.unloadable = {}
        callers.run("a", 2)
        clock.advance(0.0001)
        assert callers.answers == {}
        clock.advance(10)
    assert callers.answers == {1: 1, 2: 2}
    assert callers.ended == [0, 1, 2]


def test_a_batch_behind_another_one_of_its_key_is_not_taken_with_it(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor(max_batches=1, max_batch_size=2) as processor:
        callers = Callers(processor)
        callers.run("xy", 0)
        clock.advance(0.1)
        callers.run("a", 1)
        leaving = callers.run("a", 2)
        clock.advance(0.1)
        callers.run("a", 3)
        callers.run("bc", 4)
        clock.advance(0.1)
        leaving.kill(block=False)
        clock.advance(10)
    assert [sorted(keys) for keys in ledger.loads] == [["x", "y"], ["a", "b", "c"], ["a"]]
    assert ledger.kept["a"] == [1, 3]


def test_the_window_of_a_key_that_is_taken_with_others_ends_when_their_operations_begin(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.load_time = 0.1
    with ledger.processor(min_duration=2, max_duration=10) as processor:
        callers = Callers(processor)
        callers.run("ab", 0, think)
        callers.run("b", 1)
        clock.advance(0.5)
        callers.run("b", 2)  # within the two seconds, but the operations have begun
        clock.advance(1)
        assert callers.answers == {0: 0, 1: 1}
        clock.advance(10)
    assert callers.answers == {0: 0, 1: 1, 2: 2}
    assert ledger.kept == {"a": [0], "b": [0, 1, 2]}
    assert len(ledger.loads) == 2

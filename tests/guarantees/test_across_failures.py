"""Guarantee 21: what becomes of an operation across keys when a load, a save, a worker or its caller fails."""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import GreenletExit

from geventbatch import (
    COMPILED,
    BatchAborted,
    BatchTimeout,
    Conflict,
    LoadFailed,
    NotSaved,
    OperationCancelled,
    PartlySaved,
    ProcessorOverloaded,
    ProcessorStopped,
    Rejected,
    ResourceMissing,
    SaveFailed,
)
from geventbatch._bulk.crossing import Crossing
from geventbatch.testing import faults
from tests.support.ledger import Callers, Ledger, append, append_to_all, break_all, hold

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Account, Accounts


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


# -- the save, and failures ----------------------------------------------------------------------------------------


def test_a_conflict_replays_all_of_a_component(clock: VirtualTime, ledger: Ledger) -> None:
    errors: list[Exception] = [PartlySaved({"b": Conflict()}), Conflict()]

    def lose(_: object) -> None:
        if errors:
            raise errors.pop()

    ledger.on_save = lose
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("bc", 1)
        callers.run("a", 2)
        clock.advance(5)
    assert callers.answers == {0: 0, 1: 1, 2: 2}
    assert ledger.kept == {"a": [0, 2], "b": [0, 1], "c": [1]}
    assert len(ledger.saves) == 3


def test_a_failed_save_is_the_answer_of_all_in_the_component_and_each_has_an_error_of_its_own(
    clock: VirtualTime, ledger: Ledger
) -> None:
    def lose(_: object) -> None:
        raise NotSaved("no")

    ledger.on_save = lose
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("b", 1)
        clock.advance(5)
    both, single = callers.answers[0], callers.answers[1]
    assert type(both) is type(single) is SaveFailed
    assert both is not single
    assert both.retry_safe
    assert single.retry_safe
    assert (both.keys, single.keys, single.key) == (("a", "b"), ("b",), "b")
    assert "keys 'a', 'b'" in str(both)


def test_a_culprit_that_the_store_refuses_is_found_and_the_others_are_saved(clock: VirtualTime, ledger: Ledger) -> None:
    def refuse(resources: dict[Any, Account]) -> None:
        if any(5 in account for account in resources.values()):
            raise Rejected from ValueError("five")

    ledger.on_save = refuse
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark in range(9):
            callers.run("ab" if mark % 2 else "bc", mark)
        callers.run("d", 9)
        clock.advance(5)
    assert type(callers.answers.pop(5)) is ValueError
    assert all(mark == answer for mark, answer in callers.answers.items())
    assert ledger.kept == {"a": [1, 3, 7], "b": [0, 1, 2, 3, 4, 6, 7, 8], "c": [0, 2, 4, 6, 8], "d": [9]}


@pytest.mark.parametrize("how", ["missing", "unloadable"])
def test_a_key_whose_load_fails_is_the_answer_of_those_that_name_it_and_the_others_go_on(
    clock: VirtualTime, ledger: Ledger, how: str
) -> None:
    if how == "missing":
        ledger.missing = {"b"}
    else:
        ledger.unloadable = {"b": OSError("no")}
    ledger.load_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "b", "bc", "ac", "a"]):
            callers.run(keys, mark)
        clock.advance(0.5)
        callers.run("bd", "behind")
        callers.run("d", "d")
        clock.advance(5)
        kind = ResourceMissing if how == "missing" else LoadFailed
        for mark in [*range(3), "behind"]:
            error = callers.answers[mark]
            assert type(error) is kind
            assert error.key == "b"
            assert error.retry_safe
        assert callers.answers[0].keys == ("a", "b")
        assert [callers.answers[mark] for mark in (3, 4, "d")] == [3, 4, "d"]
    assert ledger.kept == {"a": [3, 4], "c": [3], "d": ["d"]}
    assert sum("b" in keys for keys in ledger.loads) == 1


def test_a_conflict_of_one_key_in_the_load_replays_what_is_connected_with_it(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.unloadable = {"b": Conflict()}

    def clear(_: object) -> None:
        if len(ledger.loads) > 1:
            ledger.unloadable = {}

    ledger.on_load = clear
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "a", "c"]):
            callers.run(keys, mark)
        clock.advance(5)
    assert callers.answers == {0: 0, 1: 1, 2: 2}
    assert ledger.kept == {"a": [0, 1], "b": [0], "c": [2]}
    assert ledger.saves == [["c"], ["a", "b"]]
    assert processor.stats().conflicts_total == 1


def test_a_failed_load_answers_all_that_wait_for_any_of_its_keys(clock: VirtualTime, ledger: Ledger) -> None:
    def lose(keys: list[Any]) -> None:
        if "a" in keys:
            raise OSError("gone")

    ledger.on_load = lose
    ledger.load_time = 1
    with ledger.processor(workers=1) as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        clock.advance(0.5)
        callers.run("bc", 1)
        callers.run("c", 2)
        clock.advance(5)
    assert type(callers.answers[0]) is type(callers.answers[1]) is LoadFailed
    assert callers.answers[2] == 2
    assert len(ledger.loads) == 2


def test_a_key_that_is_missing_only_in_a_replay_is_the_answer_of_those_that_name_it(
    clock: VirtualTime, ledger: Ledger
) -> None:
    def lose(_: object) -> None:
        if not ledger.missing:
            ledger.missing = {"b"}
            raise Conflict

    ledger.on_save = lose
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "ac", "c"]):
            callers.run(keys, mark)
        clock.advance(5)
    assert type(callers.answers[0]) is type(callers.answers[1]) is ResourceMissing
    assert (callers.answers[2], callers.answers[3]) == (2, 3)
    assert ledger.kept == {"a": [2], "c": [2, 3]}


def test_one_that_could_not_be_undone_is_told_too_that_its_key_is_missing_in_a_replay(
    clock: VirtualTime, ledger: Ledger
) -> None:
    conflicts = [Conflict()]

    def lose(_: object) -> None:
        if conflicts:
            raise conflicts.pop()

    def miss(_: object) -> None:
        ledger.missing = {"b"} if len(ledger.loads) > 1 else set()

    ledger.on_save, ledger.on_load = lose, miss
    with ledger.processor(copy_resource=None) as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("ab", 1, break_all)
        callers.run("ac", 2)
        clock.advance(5)
    assert [type(callers.answers[mark]) for mark in (0, 1)] == [ResourceMissing] * 2
    assert callers.answers[2] == 2
    assert ledger.kept == {"a": [2], "c": [2]}


@pytest.mark.parametrize("batching", [True, False])
def test_a_planned_fault_of_one_key_is_one_of_all_that_operations_connect_with_it(
    clock: VirtualTime, ledger: Ledger, batching: bool
) -> None:
    with ledger.processor(batching=batching) as processor, faults(processor) as plan:
        plan.conflict(key="b")
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "d"]):
            callers.run(keys, mark)
        clock.advance(5)
        plan.fail_load(OSError("no"), key="a")
        callers.run("ab", 3)
        callers.run("b", 4)
        clock.advance(5)
    assert type(callers.answers.pop(3)) is LoadFailed
    assert callers.answers == {0: 0, 1: 1, 2: 2, 4: 4}
    assert {key: sorted(marks) for key, marks in ledger.kept.items()} == {"a": [0], "b": [0, 1, 4], "c": [1], "d": [2]}


# -- time, kills and stops -----------------------------------------------------------------------------------------


def test_one_that_waits_for_a_slow_key_can_leave_and_says_which_key_it_waited_for(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.slow = {"b": 3}
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("b", 0)
        clock.advance(0.1)
        callers.run("ab", 1, start_timeout=1)
        callers.run("a", 2)
        clock.advance(0.5)
        assert callers.answers == {}
        clock.advance(1)
        assert callers.answers[2] == 2
        assert isinstance(callers.answers[1], OperationCancelled)
        assert "waited for the key 'b'" in str(callers.answers[1])
        clock.advance(5)
        assert callers.answers[0] == 0
    assert ledger.kept == {"a": [2], "b": [0]}


def test_one_that_is_killed_while_it_waits_leaves_alone(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.slow = {"a": 3}
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        clock.advance(0.5)
        waiting = [callers.run("bc", mark) for mark in range(1, 1500)]
        callers.run("b", "b")
        callers.run("c", "c")
        clock.advance(0.1)
        gevent.killall(waiting, block=False)
        clock.advance(0.1)
        assert callers.answers["c"] == "c"
        clock.advance(5)
    assert ledger.kept == {"a": [0], "b": [0, "b"], "c": ["c"]}
    assert processor.stats().operations == processor.stats().keys == 0


def test_traffic_on_keys_that_it_does_not_name_is_not_delayed(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.slow = {"slow": 3}
    with ledger.processor() as processor:
        gevent.spawn(processor.run, "slow", append, 0)
        clock.advance(0.1)
        callers = Callers(processor)
        gevent.spawn(processor.run_across, ["slow", "a"], append_to_all, 1)
        clock.advance(0.1)
        callers.run("bc", 2)
        callers.run("c", 3)
        clock.advance(0.1)
        assert callers.answers == {2: 2, 3: 3}
        clock.advance(5)
    assert ledger.kept == {"slow": [0, 1], "a": [1], "b": [2], "c": [2, 3]}


@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_the_deadline_answers_all_of_the_bulk_and_frees_its_keys(
    clock: VirtualTime, ledger: Ledger, phase: str
) -> None:
    if phase == "load":
        ledger.load_time = 100
    elif phase == "save":
        ledger.save_time = 100
    with ledger.processor(max_duration=2) as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("bc", 1, hold if phase == "operations" else None)
        callers.run("c", 2)
        clock.advance(2.1)
        assert [type(callers.answers[mark]) for mark in range(3)] == [BatchTimeout] * 3
        assert {callers.answers[mark].phase for mark in range(3)} == {phase}
        ledger.load_time = ledger.save_time = 0
        callers.run("ac", 3)
        callers.run("b", 4)
        clock.advance(5)
        assert (callers.answers[3], callers.answers[4]) == (3, 4)
    assert (ledger.kept["a"], ledger.kept["b"]) == ([3], [4])


def test_a_killed_operation_answers_its_component_and_the_keys_are_free(clock: VirtualTime, ledger: Ledger) -> None:
    def die(accounts: Accounts, mark: object) -> None:
        raise GreenletExit

    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("bc", 1, die)
        clock.advance(1)
        assert [type(callers.answers[mark]) for mark in range(2)] == [BatchAborted] * 2
        callers.run("ab", 2)
        callers.run("bc", 3)
        clock.advance(1)
    assert ledger.kept == {"a": [2], "b": [2, 3], "c": [3]}


def test_keys_of_a_killed_worker_are_freed_without_a_search_in_their_queues(
    clock: VirtualTime, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = Crossing.free
    searched: list[bool] = []

    def free_counted(self: Crossing) -> None:
        searched.extend(place.key_queue is None or place.key_queue.first is not place for place in self.places)
        free(self)

    def die(_: object) -> None:
        raise GreenletExit

    if not COMPILED:  # a compiled class cannot be watched
        monkeypatch.setattr(Crossing, "free", free_counted)
    ledger.on_save = die
    with ledger.processor(max_batches=1) as processor:
        callers = Callers(processor)
        for mark in range(50):
            callers.run("ab" if mark % 2 else "bac", mark)
        clock.advance(1)
    assert {type(answer) for answer in callers.answers.values()} == {BatchAborted}
    assert searched == ([] if COMPILED else [False] * (25 * 2 + 25 * 3))


def test_a_stop_saves_all_that_was_admitted(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    processor = ledger.processor(min_duration=1)
    callers = Callers(processor)
    for mark, keys in enumerate(["ab", "b", "bc", "d", "cd"]):
        callers.run(keys, mark)
    clock.advance(0.1)
    callers.run("ca", "last")
    clock.advance(0.1)
    gevent.spawn(processor.stop)
    clock.advance(0.1)
    callers.run("ab", "late")
    clock.advance(10)
    assert processor.stop(timeout=0)
    assert type(callers.answers.pop("late")) is ProcessorStopped
    assert all(mark == answer for mark, answer in callers.answers.items())
    assert ledger.kept == {"a": [0, "last"], "b": [0, 1, 2], "c": [2, 4, "last"], "d": [3, 4]}


def test_it_may_end_a_window_and_has_none_of_its_own(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor(min_duration=2) as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        clock.advance(0.1)
        assert callers.answers == {0: 0}
        callers.run("a", 1)
        clock.advance(0.5)
        assert 1 not in callers.answers
        callers.run("ab", 2)
        clock.advance(0.5)
        assert callers.answers[2] == 2
    assert ledger.kept == {"a": [0, 1, 2], "b": [0, 2]}


def test_what_comes_while_a_component_loads_joins_it_if_it_has_all_its_keys(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.load_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("bc", 1)
        clock.advance(0.5)
        callers.run("ca", 2)
        callers.run("abc", 3)
        callers.run("cd", 4)
        callers.run("ab", 5)
        clock.advance(1)
        assert ledger.kept == {"a": [0, 2, 3, 5], "b": [0, 1, 3, 5], "c": [1, 2, 3]}
        clock.advance(5)
    assert [sorted(keys) for keys in ledger.loads] == [["a", "b", "c"], ["c", "d"]]


def test_max_pending_and_max_batches_and_max_batch_size_hold(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor(max_pending=6, max_batches=1, max_batch_size=2) as processor:
        callers = Callers(processor)
        for mark in range(8):
            callers.run("ab" if mark % 2 else "a", mark)
        clock.advance(20)
    assert [type(callers.answers[mark]) for mark in (6, 7)] == [ProcessorOverloaded] * 2
    assert ledger.kept == {"a": [0, 1, 2, 3, 4, 5], "b": [1, 3, 5]}
    assert len(ledger.saves) == 3


def test_with_several_shards_each_operation_runs_once_and_in_order(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 0.1
    with ledger.processor(workers=5) as processor:
        callers = Callers(processor)
        pick = random.Random(5)
        came: dict[str, list[int]] = {}
        for mark in range(300):
            keys = "".join(pick.sample("abcdefghijklmnop", pick.randint(1, 5)))
            for key in keys:
                came.setdefault(key, []).append(mark)
            callers.run(keys, mark)
            if not mark % 10:
                clock.advance(0.05)
        clock.advance(100)
    assert ledger.kept == came


@pytest.mark.parametrize("max_bulk", [100, 1000])
def test_between_any_two_of_10_000_keys_a_bulk_is_filled_to_half(
    clock: VirtualTime, ledger: Ledger, max_bulk: int
) -> None:
    ledger.save_time = 1
    pick = random.Random(1)

    def go_on() -> None:
        while True:
            processor.run_across(pick.sample(range(10_000), 2), append_to_all, 1)

    processor = ledger.processor(max_bulk=max_bulk, max_batches=1)
    for _ in range(1000):
        gevent.spawn(_until_stopped, go_on)
    while len(ledger.saves) <= 20:
        clock.advance(1)
    processor.stop(timeout=0)
    clock.advance(100)
    filled = [len(keys) for keys in ledger.saves[:20]]
    assert sum(filled) / len(filled) >= max_bulk / 2


def _until_stopped(function: Callable[[], object]) -> None:
    with suppress(ProcessorStopped):
        function()

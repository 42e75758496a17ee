"""Guarantee 21: operations across keys, which are saved at all their keys or at none, in the order they came."""

from __future__ import annotations

import os
import random
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import GreenletExit

from geventbatch import (
    BatchError,
    Conflict,
    NotSaved,
    Processor,
    Rejected,
    current_batch,
)
from tests.support.ledger import Broken, Callers, Ledger, append_to_all, break_all, fail

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Account, Accounts


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


# -- atomic, and in order ------------------------------------------------------------------------------------------


def test_an_operation_has_the_resources_of_its_keys_in_the_order_that_it_named_them(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.kept = {"Ann": [30], "shop": [5]}

    def transfer(accounts: Accounts, amount: int) -> tuple[int, int]:
        source, target = accounts
        source[0] -= amount
        target[0] += amount
        return source[0], target[0]

    with ledger.processor() as processor:
        assert processor.run_across(["shop", "Ann"], transfer, 2) == (3, 32)
        assert processor.run_across(("Ann", "shop"), transfer, 10) == (22, 13)
    assert ledger.kept == {"Ann": [22], "shop": [13]}
    assert [sorted(keys) for keys in ledger.loads] == [sorted(keys) for keys in ledger.saves] == [["Ann", "shop"]] * 2


def test_it_may_have_one_key_and_gets_a_tuple_all_the_same(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        assert processor.run_across(["a"], append_to_all, 1) == 1
    assert ledger.kept == {"a": [1]}


def test_operations_on_connected_keys_run_in_the_order_they_came(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "b", "bc", "a", "ca", "c", "abc", "b"]):
            callers.run(keys, mark)
        clock.advance(1)
    assert ledger.kept == {"a": [0, 3, 4, 6], "b": [0, 1, 2, 6, 7], "c": [2, 4, 5, 6]}
    assert callers.answers == {mark: mark for mark in range(8)}


def test_a_key_in_every_operation_makes_one_bulk_of_all_that_wait(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("Mz", "first")
        clock.advance(0.1)
        for number in range(50):
            callers.run("M" + "abcdefghij"[number % 10], number)
        clock.advance(5)
    assert [len(keys) for keys in ledger.saves] == [2, 11]
    assert ledger.kept["M"] == ["first", *range(50)]


def test_keys_that_operations_connect_are_one_batch_and_others_are_not(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "de", "f", "g", "g"]):
            callers.run(keys, mark)
        clock.advance(1)
    assert ledger.connected == [[{"a", "b", "c"}, {"d", "e"}, {"f"}, {"g"}]]


def test_one_that_raises_changes_nothing_at_any_of_its_keys(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("a", 0)
        callers.run("ab", 1)
        callers.run("ab", 2, break_all)
        callers.run("b", 3)
        callers.run("ba", 4, break_all)
        callers.run("a", 5)
        clock.advance(1)
    assert ledger.kept == {"a": [0, 1, 5], "b": [1, 3]}
    assert type(callers.answers[2]) is type(callers.answers[4]) is Broken
    assert [callers.answers[mark] for mark in (0, 1, 3, 5)] == [0, 1, 3, 5]


def test_many_that_raise_cost_one_load_more(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark in range(40):
            callers.run("ab" if mark % 2 else "bc", mark, break_all if mark % 3 else None)
        clock.advance(1)
    assert ledger.kept["b"] == [mark for mark in range(40) if not mark % 3]
    assert len(ledger.loads) <= 2


def test_of_a_component_only_what_operations_have_changed_is_saved(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0, fail)
        callers.run("b", 1)
        clock.advance(1)
    assert ledger.saves == [["b"]]


def test_what_connected_operations_have_only_read_or_refused_is_told_to_the_scope_and_not_saved(
    clock: VirtualTime, ledger: Ledger
) -> None:
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("bc", 1, lambda accounts, mark: mark, read_only=True)
        callers.run("cd", 2, fail)
        left = callers.run("de", 3, start_timeout=0.5)
        ledger.load_time = 1
        clock.advance(3)
        assert left.ready()
    assert [sorted(keys) for keys in ledger.loads] == [list("abcde")] * 2
    assert [sorted(keys) for keys in ledger.saves] == [["a", "b"]]
    assert ledger.connected == [[set("abcd")]]
    assert callers.answers[0] == 0
    assert callers.answers[1] == 1


def test_what_a_read_only_one_and_one_that_fails_leave_is_not_saved(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        assert processor.run_across([*"ab"], len, read_only=True) == 2
        with pytest.raises(ValueError, match="refused"):
            processor.run_across([*"ab"], fail, 1)
    assert ledger.saves == []


class UndoingLedger(Ledger):
    """One whose scopes restore by themselves, and ask the batch for the key that is meant."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Any] = []

    def __call__(self, keys: list[Any]) -> Any:
        return UndoingScope(self, super().__call__(keys))


class UndoingScope:
    """The scope of an `UndoingLedger`."""

    def __init__(self, ledger: UndoingLedger, inner: Any) -> None:
        self.ledger, self.inner = ledger, inner

    def __enter__(self) -> dict[Any, Any]:
        resources: dict[Any, Any] = self.inner.__enter__()
        self.resources = resources
        self.first = {key: list(one) for key, one in resources.items()}
        return resources

    def __exit__(self, *error: object) -> Any:
        return self.inner.__exit__(*error)

    def checkpoint(self) -> object:
        return list(self.resources[current_batch().key])

    def restore(self, checkpoint: Any) -> Any:
        key = current_batch().key
        self.ledger.asked.append(key)
        self.resources[key][:] = self.first[key] if checkpoint is None else checkpoint
        return self.resources[key]


def test_a_scope_that_restores_by_itself_is_asked_for_the_keys_that_operations_have_touched(clock: VirtualTime) -> None:
    ledger = UndoingLedger()
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "cd"]):
            callers.run(keys, mark)
        callers.run("ca", 3, break_all)
        callers.run("d", 4)
        clock.advance(1)
    assert type(callers.answers[3]) is Broken
    assert ledger.kept == {"a": [0], "b": [0, 1], "c": [1, 2], "d": [2, 4]}
    assert len(ledger.loads) == 1
    assert {*ledger.asked} == {"a", "b", "c", "d"}


@pytest.mark.parametrize("copying", [{}, {"copy_resource": list}, {"copy_resource": None}])
def test_a_pair_whose_save_says_so_does_as_well(clock: VirtualTime, copying: dict[str, Any]) -> None:
    class Save:
        all_or_nothing = True

        def __call__(self, resources: dict[str, Account]) -> None:
            kept.update(resources)

    kept: dict[str, Account] = {}

    def load(keys: list[str]) -> dict[str, Account]:
        return {key: list(kept.get(key, ())) for key in keys}

    with Processor(load_resources=load, save_resources=Save(), min_duration=0, **copying) as processor:
        callers = Callers(processor)
        for mark in range(30):
            callers.run("ab" if mark % 2 else "bc", mark, break_all if mark % 3 == 2 else None)
        clock.advance(1)
    assert kept["b"] == [mark for mark in range(30) if mark % 3 != 2]


def test_a_load_that_returns_the_same_objects_again_applies_no_operation_twice(clock: VirtualTime) -> None:
    class Same(Ledger):
        def __call__(self, keys: list[Any]) -> Any:
            return nullcontext({key: self.kept.setdefault(key, []) for key in keys})

    ledger = Same()
    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark in range(6):
            callers.run("ab" if mark % 2 else "bc", mark, break_all if mark == 3 else None)
        clock.advance(1)
    assert [mark for mark in ledger.kept["b"] if mark != "half"] == [0, 1, 2, 4, 5]


def test_a_thousand_operations_across_keys_never_hold_the_hub_in_one_piece(clock: VirtualTime, ledger: Ledger) -> None:
    def busy(accounts: Accounts, mark: object) -> None:
        clock.spend(0.001)

    turns: list[float] = []

    def watch() -> None:
        while len(callers.answers) < 1000:
            turns.append(clock.now())
            gevent.sleep(0.001)

    with ledger.processor(max_duration=100) as processor:
        callers = Callers(processor)
        for mark in range(1000):
            callers.run(f"M{'abcdefghij'[mark % 10]}", mark, busy)
        gevent.spawn(watch)
        clock.advance(20)
    assert len(callers.answers) == 1000
    assert len(turns) > 100
    assert max(after - before for before, after in pairwise(turns)) < 0.02


def test_the_oldest_that_a_worker_can_take_goes_first_up_to_max_bulk_keys(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor(max_bulk=3, max_batches=1) as processor:
        callers = Callers(processor)
        callers.run("z", "first")
        clock.advance(0.1)
        for mark, keys in enumerate(["Ma", "Mb", "c", "Md", "ef"]):
            callers.run(keys, mark)
        clock.advance(20)
    assert [sorted(keys) for keys in ledger.loads] == [["z"], ["M", "a", "b"], ["c", "e", "f"], ["M", "d"]]


def test_what_joins_a_component_while_it_loads_does_not_exceed_max_batch_size(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.load_time = 1
    with ledger.processor(max_batch_size=2) as processor:
        callers = Callers(processor)
        for mark in range(2):
            callers.run("ab", mark)
        clock.advance(0.5)
        for mark in range(2, 5):
            callers.run("a" if mark == 3 else "ab", mark)
        clock.advance(0.7)
        assert ledger.kept == {"a": [0, 1], "b": [0, 1]}
        clock.advance(10)
    assert ledger.kept == {"a": [0, 1, 2, 3, 4], "b": [0, 1, 2, 4]}


# -- what operations and watchers see ------------------------------------------------------------------------------


def test_an_operation_sees_its_own_key_or_keys(clock: VirtualTime, ledger: Ledger) -> None:
    seen: dict[Any, Any] = {}

    def look(_: object, mark: Any) -> None:
        seen[mark] = current_batch().key, current_batch().keys

    with ledger.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "b", "cb", "a", "z"]):
            callers.run(keys, mark, look)
        clock.advance(1)
    assert seen == {
        0: ("a", ("a", "b")),
        1: ("b", ("b",)),
        2: ("c", ("c", "b")),
        3: ("a", ("a",)),
        4: ("z", ("z",)),
    }


def test_live_batches_show_one_that_waits_once(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        clock.advance(0.5)
        callers.run("bc", 1)
        callers.run("c", 2)
        clock.advance(0.1)
        assert [(one.key, one.phase, one.operations) for one in processor.live_batches()] == [
            ("a", "save", 1),
            ("b", "queued", 1),
            ("c", "queued", 1),
        ]
        clock.advance(5)
        assert processor.live_batches() == []


def test_an_operation_is_counted_once_and_a_component_has_one_metric(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        metrics = processor.subscribe_batch_metrics()
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "c", "z"]):
            callers.run(keys, mark)
        clock.advance(1)
        assert processor.stats().operations_total == 4
        assert processor.stats().batches_total == 2
    assert [metric.operation_count for metric in metrics] == [3, 1]


def test_nothing_is_left_over_of_an_operation_across_keys(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        assert processor.run_across([*"ab"], append_to_all, 1) == 1
        assert processor.stats().keys == processor.stats().batches == 0


# -- at random -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(int(os.environ.get("GEVENTBATCH_SEEDS", "30"))))
def test_at_random_all_guarantees_hold(clock: VirtualTime, ledger: Ledger, seed: int) -> None:
    pick = random.Random(seed)
    _go_wrong_at_random(ledger, pick)
    options: dict[str, Any] = {
        "max_bulk": pick.choice([5, 8, 100]),
        "max_duration": pick.choice([5, 60]),
        "workers": pick.choice([1, 1, 3]),
        "max_batches": pick.choice([None, 1, 2]),
        "max_batch_size": pick.choice([None, None, 2]),
        "min_duration": pick.choice([0, 0, 0.3]),
    }
    with ledger.processor(**options) as processor:
        callers, named = Callers(processor), {}
        for mark in range(150):
            named[mark] = "".join(pick.sample("Mabcdefgh", pick.choice([1, 1, 2, 2, 3, 5])))
            operation: Any = pick.choice([None] * 8 + [fail, break_all if len(named[mark]) > 1 else fail])
            caller = callers.run(named[mark], mark, operation, start_timeout=pick.choice([None, None, None, 0.2]))
            if pick.random() < 0.05:
                gevent.spawn_later(pick.random(), caller.kill, block=False)
            if pick.random() < 0.3:
                clock.advance(pick.random())
        clock.advance(300)
        assert processor.stats().keys == processor.stats().operations == processor.stats().batches == 0
    assert max(map(len, ledger.loads)) <= options["max_bulk"]
    _check_all(ledger, callers, named)


def _go_wrong_at_random(ledger: Ledger, pick: random.Random) -> None:
    ledger.load_time = ledger.save_time = 0.1
    ledger.slow = {"h": 1.0}

    def load(keys: list[Any]) -> None:
        ledger.missing = {key for key in "Mabc" if pick.random() < 0.01}
        ledger.unloadable = {key: Conflict() for key in keys if pick.random() < 0.03}
        if pick.random() < 0.015:
            raise OSError("load")

    def save(resources: dict[Any, Any]) -> None:
        found = pick.random()
        if found < 0.1:
            raise Conflict
        if found < 0.15:
            raise NotSaved
        if any(mark % 13 == 7 for account in resources.values() for mark in account if mark not in _kept(ledger)):
            raise Rejected

    ledger.on_load, ledger.on_save = load, save


def _kept(ledger: Ledger) -> set[Any]:
    return {mark for account in ledger.kept.values() for mark in account}


def _check_all(ledger: Ledger, callers: Callers, named: dict[Any, str]) -> None:
    at: dict[Any, set[str]] = {}
    for key, account in ledger.kept.items():
        assert account == sorted(set(account)), "in the order they came, and each once"
        for mark in account:
            at.setdefault(mark, set()).add(key)
    for mark, answer in callers.answers.items():
        if answer == mark:
            assert at.get(mark) == set(named[mark]), "all of it is saved"
        elif isinstance(answer, BatchError) and not answer.retry_safe:
            assert at.get(mark, set()) in (set(), set(named[mark]))
        elif not isinstance(answer, GreenletExit):
            assert mark not in at, "nothing of it is saved"
    for mark, keys in at.items():
        assert keys == set(named[mark]), "never half of it"
    assert sum(answer == mark for mark, answer in callers.answers.items()) >= 5

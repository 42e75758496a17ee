"""Guarantee 21 over a store that opens one key at a time, and many by its `open_resources`: `open_resource=store`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import GreenletExit

from geventbatch import BatchError, Conflict, NotSaved, Rejected, ResourceMissing, current_batch
from geventbatch.testing import faults
from tests.support.ledger import Broken, Callers, Ledger, append_to_all, break_all, fail
from tests.support.two_forms import Many, TwoForms

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Account


@pytest.fixture
def store() -> TwoForms:
    return TwoForms()


def test_a_store_of_one_key_takes_operations_across_keys_by_its_form_for_many(
    clock: VirtualTime, store: TwoForms
) -> None:
    with store.processor() as processor:
        assert processor.run("a", list) == []
        assert processor.run_across([*"ab"], append_to_all, 1) == 1
        assert processor.run("b", list) == [1]
        assert processor.run_across(["a"], append_to_all, 2) == 2
    assert store.ones == ["a", "b"]
    assert store.manys == [["a", "b"], ["a"]]
    assert store.ledger.kept == {"a": [1, 2], "b": [1]}


def test_single_keys_that_no_operation_across_keys_touches_stay_batches_of_their_own(
    clock: VirtualTime, store: TwoForms
) -> None:
    store.ledger.save_time = 1
    with store.processor(max_batches=1) as processor:
        callers = Callers(processor)
        callers.run("z", "first")
        clock.advance(0.1)
        for mark, keys in enumerate(["x", "ab", "y", "bc", "w"]):
            callers.run(keys, mark)
        clock.advance(10)
    assert sorted(store.ones) == ["w", "x", "y", "z"]
    assert [sorted(keys) for keys in store.manys] == [["a", "b", "c"]]
    assert callers.answers == dict(zip([*range(5), "first"], [*range(5), "first"], strict=True))


def test_single_keys_are_opened_at_once_by_a_worker_each(clock: VirtualTime, store: TwoForms) -> None:
    store.ledger.load_time = store.ledger.save_time = 1
    with store.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["x", "y", "ab", "z"]):
            callers.run(keys, mark)
        clock.advance(2.5)
        assert len(callers.ended) == 4


def test_a_ready_batch_of_one_key_runs_in_its_own_form_before_the_operations_across_keys_behind_it(
    clock: VirtualTime, store: TwoForms
) -> None:
    with store.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["a", "ab", "a", "bc", "c", "b"]):
            callers.run(keys, mark)
        clock.advance(1)
    assert store.ones == ["a"]
    assert [sorted(keys) for keys in store.manys] == [["a", "b", "c"]]
    assert store.ledger.kept == {"a": [0, 1, 2], "b": [1, 3, 5], "c": [3, 4]}


def test_an_operation_of_one_key_that_is_taken_with_others_behaves_as_in_its_own_batch(
    clock: VirtualTime, store: TwoForms
) -> None:
    seen = []

    def look(account: Account, mark: int) -> int:
        seen.append((current_batch().key, current_batch().keys, list(account)))
        current_batch().add_row(mark)
        return mark

    def halfway(account: Account, mark: int) -> None:
        account.append("half")
        current_batch().add_row("half")
        raise Broken

    with store.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        callers.run("a", 1, look)
        callers.run("a", 2, halfway)
        callers.run("a", 3, look, read_only=True)
        callers.run("ab", 4)
        clock.advance(1)
    assert store.ones == []
    assert store.ledger.kept == {"a": [0, 4], "b": [0, 4]}
    assert seen[-2:] == [("a", ("a",), [0])] * 2
    assert type(callers.answers.pop(2)) is Broken
    assert callers.answers == {0: 0, 1: 1, 3: 3, 4: 4}
    assert store.rows == [1, 3]
    assert [sorted(keys) for keys in store.hooked] == [["a", "b"]]


def test_where_the_form_for_many_keys_records_no_outcomes_single_keys_are_not_taken(
    clock: VirtualTime, store: TwoForms
) -> None:
    class Keeps(TwoForms):
        keeps_outcomes = True

    store = Keeps()
    with store.processor() as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "a", "ab"]):
            callers.run(keys, mark)
        clock.advance(1)
        with pytest.raises(TypeError, match="outcomes of single keys only"):
            processor.run_across([*"ab"], append_to_all, 1, idempotency_key="x")
        assert processor.stats().keys == 0
    assert store.ones == ["a"]
    assert store.ledger.kept == {"a": [0, 1, 2], "b": [0, 2]}


# -- the door, and the off-switch ----------------------------------------------------------------------------------


class Refusing(TwoForms):
    """A store whose model cannot be saved with others."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    @property
    def open_resources(self) -> Many:
        raise self.error


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize(
    ("error", "said"),
    [(AttributeError("it has none"), "it has none"), (TypeError("it has a trigger"), "it has a trigger")],
)
def test_a_store_that_has_no_form_for_many_keys_goes_on_with_single_ones_and_refuses_others(
    clock: VirtualTime, error: Exception, said: str, batching: bool
) -> None:
    store = Refusing(error)
    with store.processor(batching=batching) as processor:
        with pytest.raises(TypeError, match=said):
            processor.run_across([*"ab"], append_to_all, 1)
        assert processor.run("a", list) == []
    with pytest.raises(TypeError, match="max_bulk"):
        store.processor(max_bulk=5)


def test_a_form_that_does_not_say_all_or_nothing_is_none(clock: VirtualTime) -> None:
    class Partly(TwoForms):
        @property
        def open_resources(self) -> Any:
            return lambda keys: None

    with Partly().processor() as processor, pytest.raises(TypeError, match="all or nothing"):
        processor.run_across([*"ab"], append_to_all, 1)


def test_max_bulk_bounds_the_keys_of_an_operation_and_what_runs_together(clock: VirtualTime, store: TwoForms) -> None:
    store.ledger.save_time = 1
    with store.processor(max_bulk=3, max_batches=1) as processor:
        with pytest.raises(ValueError, match="max_bulk is 3"):
            processor.run_across([*"abcd"], append_to_all, 1)
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "cd", "bc", "ef"]):
            callers.run(keys, mark)
        clock.advance(20)
    assert max(map(len, store.manys)) <= 3
    assert callers.answers == {mark: mark for mark in range(4)}


def test_the_form_for_many_keys_is_asked_whether_it_admits_them_and_the_store_if_it_cannot_say(
    clock: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asking(TwoForms):
        def admit(self, key: str) -> bool:
            asked.append(key)
            return key == "b"

    def refuse(_: Many, key: str) -> bool:
        raise PermissionError(key)

    asked: list[str] = []
    alone: list[bool] = []

    def look(_: object) -> None:
        alone.append(current_batch().alone)

    with Asking().processor() as processor:
        processor.run_across([*"ac"], look)
        processor.run_across([*"ab"], look)
        assert (asked, alone) == (["a", "c", "a", "b"], [False, True])
        assert processor.stats().keys == 0
    monkeypatch.setattr(Many, "admit", refuse, raising=False)
    with Asking().processor() as processor:
        with pytest.raises(PermissionError):
            processor.run_across([*"ac"], look)
        processor.run("a", look)
        assert processor.stats().keys == 0


def test_with_the_off_switch_one_scope_of_many_keys_does_it(clock: VirtualTime, store: TwoForms) -> None:
    with store.processor(batching=False) as processor:
        assert processor.run_across([*"ab"], append_to_all, 1) == 1
        assert processor.run("a", list) == [1]
        with pytest.raises(Broken):
            processor.run_across([*"ab"], break_all, 1)
        store.ledger.missing = {"c"}
        with pytest.raises(ResourceMissing) as caught:
            processor.run_across([*"ac"], append_to_all, 1)
        assert caught.value.keys == ("a", "c")
    assert store.manys == [["a", "b"], ["a", "b"], ["a", "c"]]
    assert store.ones == ["a"]
    assert store.hooked == [["a", "b"], ["a"]]


def test_planned_faults_happen_in_both_forms(clock: VirtualTime, store: TwoForms) -> None:
    with store.processor() as processor:
        with faults(processor) as plan:
            plan.conflict(key="b")
            assert processor.run_across([*"ab"], append_to_all, 1) == 1
            plan.fail_save(NotSaved)
            with pytest.raises(BatchError):
                processor.run("a", list)
        assert processor.run_across([*"ab"], append_to_all, 2) == 2
        assert processor.run("a", list) == [1, 2]
    assert len(store.manys) == 3


# -- after the answers ---------------------------------------------------------------------------------------------


def test_the_hook_of_many_keys_is_called_when_its_callers_are_answered_and_a_stop_waits_for_it(
    clock: VirtualTime, store: TwoForms
) -> None:
    seen: list[Any] = []

    def hook() -> None:
        gevent.sleep(1)
        seen.append((dict(callers.answers), processor.stats().keys, processor.run("a", list)))

    store.on_hook = hook
    processor = store.processor()
    callers = Callers(processor)
    callers.run("ab", 0)
    clock.advance(0.5)
    assert callers.answers == {0: 0}
    store.on_hook = lambda: None
    assert not processor.stop(timeout=0)
    clock.advance(10)
    assert processor.stop(timeout=0)


def test_a_hook_of_many_keys_may_run_operations_and_is_not_called_if_nothing_was_saved(
    clock: VirtualTime, store: TwoForms
) -> None:
    store.ledger.on_save = lambda _: (_ for _ in ()).throw(NotSaved())
    with store.processor() as processor:
        with pytest.raises(BatchError):
            processor.run_across([*"ab"], append_to_all, 1)
        assert store.hooked == []
        store.ledger.on_save = lambda _: None

        def hook() -> None:
            store.on_hook = lambda: None
            processor.run_across([*"ab"], append_to_all, "hook")

        store.on_hook = hook
        processor.run_across([*"ab"], append_to_all, 2)
        clock.advance(1)
        assert processor.stats().batches == 0
    assert store.ledger.kept == {"a": [2, "hook"], "b": [2, "hook"]}


# -- at random -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_at_random_nothing_is_lost_left_over_or_out_of_order(clock: VirtualTime, store: TwoForms, seed: int) -> None:
    pick = random.Random(seed)
    ledger = store.ledger
    ledger.load_time = ledger.save_time = 0.1

    def save(resources: dict[Any, Any]) -> None:
        if pick.random() < 0.1:
            raise Conflict
        known = {mark for account in ledger.kept.values() for mark in account}
        if any(mark % 13 == 7 for account in resources.values() for mark in account if mark not in known):
            raise Rejected

    ledger.on_save = save
    ledger.on_load = lambda keys: ledger.missing.__ixor__({key for key in "abc" if pick.random() < 0.01})
    options: dict[str, Any] = {
        "max_bulk": pick.choice([5, 8, 100]),
        "max_duration": 60,
        "workers": pick.choice([1, 3, None]),
        "max_batches": pick.choice([None, 1, 2]),
        "max_batch_size": pick.choice([None, None, 2]),
        "min_duration": pick.choice([0, 0, 0.3]),
    }
    with store.processor(**options) as processor:
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
    _check(ledger, callers, named)


def _check(ledger: Ledger, callers: Callers, named: dict[int, str]) -> None:
    at: dict[Any, set[str]] = {}
    for key, account in ledger.kept.items():
        assert account == sorted(set(account)), "in the order they came, and each once"
        for mark in account:
            at.setdefault(mark, set()).add(key)
    for mark, answer in callers.answers.items():
        if answer == mark:
            assert at.get(mark) == set(named[mark])
        elif not isinstance(answer, GreenletExit):
            assert mark not in at
    assert all(keys == set(named[mark]) for mark, keys in at.items())
    assert len(callers.answers) == 150
    assert sum(answer == mark for mark, answer in callers.answers.items()) >= 5

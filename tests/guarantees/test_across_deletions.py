"""`current_batch().delete(key)` and `add_row` of operations across keys (guarantees 18 and 21)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from geventbatch import Conflict, Processor, Rejected, ResourceMissing, SaveFailed, current_batch
from tests.support.ledger import Broken, Callers, append
from tests.support.two_forms import TwoForms

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Account, Accounts


@pytest.fixture
def store() -> TwoForms:
    return TwoForms()


def delete(_: Any, mark: Any, *keys: str) -> Any:
    for key in keys:
        current_batch().delete(key)
    return mark


def delete_it(account: Account, mark: Any) -> Any:
    account.append(mark)
    current_batch().delete()
    return mark


def delete_and_break(accounts: Any, mark: Any) -> None:
    current_batch().delete("a")
    raise Broken


def add_row(accounts: Any, mark: Any) -> Any:
    for account in accounts if type(accounts) is tuple else (accounts,):
        account.append(mark)
    current_batch().add_row(mark)
    return mark


def options(*keys: str) -> Any:
    return lambda accounts, mark: delete(accounts, mark, *keys)


@pytest.mark.parametrize("form", ["one key too", "many"])
@pytest.mark.parametrize("batching", [True, False])
def test_it_deletes_the_key_that_it_names_and_what_comes_behind_finds_another_load(
    clock: VirtualTime, store: TwoForms, batching: bool, form: str
) -> None:
    with _made(store, form, batching=batching) as processor:
        callers = Callers(processor)
        for mark, (keys, operation) in enumerate(
            [("ab", None), ("ab", options("a")), ("ab", None), ("bc", None), ("bc", options("b", "c")), ("b", None)]
        ):
            callers.run(keys, mark, operation)
            if not batching:  # nothing keeps the order
                clock.advance(1)
        clock.advance(1)
    assert callers.answers == {mark: mark for mark in range(6)}
    assert store.ledger.kept == {"a": [2], "b": [5]}


def _made(store: TwoForms, form: str, **options: Any) -> Processor[Account]:
    if form == "one key too":
        return store.processor(**options)
    return Processor(open_resources=store.open_resources, min_duration=0, max_duration=5, **options)


@pytest.mark.parametrize("form", ["one key too", "many"])
def test_of_a_key_that_is_missing_then_the_operations_that_need_it_say_so_and_no_others(
    clock: VirtualTime, store: TwoForms, form: str
) -> None:
    def miss(resources: dict[Any, Account]) -> None:
        bulk = current_batch().bulk
        store.ledger.missing |= {key for key in resources if key in bulk[key].deleted_keys}

    store.ledger.on_save = miss
    with _made(store, form) as processor:
        callers = Callers(processor)
        for mark, (keys, operation) in enumerate([("ab", options("b")), ("ab", None), ("a", None), ("ac", None)]):
            callers.run(keys, mark, operation)
        clock.advance(1)
    missing = callers.answers.pop(1)
    assert type(missing) is ResourceMissing
    assert (missing.key, missing.keys) == ("b", ("a", "b"))
    assert callers.answers == {0: 0, 2: 2, 3: 3}
    assert store.ledger.kept == {"a": [2, 3], "c": [3]}


def test_an_operation_of_one_key_that_is_taken_with_others_deletes_its_own(clock: VirtualTime, store: TwoForms) -> None:
    with store.processor() as processor:
        callers = Callers(processor)
        for mark, (keys, operation) in enumerate([("ab", None), ("a", delete_it), ("a", append), ("ab", None)]):
            callers.run(keys, mark, operation)
        clock.advance(1)
    assert store.ones == []
    assert callers.answers == {mark: mark for mark in range(4)}
    assert store.ledger.kept == {"a": [2, 3], "b": [0, 3]}


@pytest.mark.parametrize("form", ["one key too", "many"])
@pytest.mark.parametrize("batching", [True, False])
def test_one_that_raises_deletes_nothing_and_adds_no_row(
    clock: VirtualTime, store: TwoForms, form: str, batching: bool
) -> None:
    def add_and_break(accounts: Accounts, mark: Any) -> None:
        current_batch().add_row(mark)
        raise Broken

    with _made(store, form, batching=batching) as processor:
        callers = Callers(processor)
        for mark, operation in enumerate([None, delete_and_break, add_and_break, add_row]):
            callers.run("ab", mark, operation)
            if not batching:  # nothing keeps the order
                clock.advance(1)
        clock.advance(1)
    assert store.ledger.kept == {"a": [0, 3], "b": [0, 3]}
    assert store.rows == [3]
    assert len(store.manys) == (2 if batching else 4)  # the second load, to undo


def test_one_that_is_applied_again_deletes_again(clock: VirtualTime, store: TwoForms) -> None:
    errors: list[Exception] = [Conflict(), Rejected(), Rejected()]

    def lose(_: object) -> None:
        if errors:
            raise errors.pop(0)

    store.ledger.on_save = lose
    with store.processor() as processor:
        callers = Callers(processor)
        for mark, operation in enumerate([None, options("a"), None]):
            callers.run("ab", mark, operation)
        clock.advance(5)
    assert sum(isinstance(answer, Rejected) for answer in callers.answers.values()) == 1
    assert store.ledger.kept in ({"a": [2], "b": [0, 2]}, {"a": [2], "b": [2]}, {"a": [0, 2], "b": [0, 2]})


@pytest.mark.parametrize("batching", [True, False])
def test_an_operation_of_several_keys_has_to_say_which_one(clock: VirtualTime, store: TwoForms, batching: bool) -> None:
    def delete_one(_: object) -> None:
        current_batch().delete()

    def delete_other(_: object) -> None:
        current_batch().delete("c")

    with store.processor(batching=batching) as processor:
        with pytest.raises(RuntimeError, match=r"keys 'a', 'b': say which one, as in delete\('a'\)"):
            processor.run_across([*"ab"], delete_one)
        with pytest.raises(RuntimeError, match="keys 'a', 'b', and not the key 'c'"):
            processor.run_across([*"ab"], delete_other)
        with pytest.raises(RuntimeError, match="key 'a', and not the key 'c'"):
            processor.run("a", delete_other)
        processor.run_across([*"a"], delete_one)
    assert store.ledger.saves == [["a"]]


def test_a_key_may_be_said_in_any_form_that_the_store_knows(clock: VirtualTime) -> None:
    class Lower(TwoForms):
        def normalize_key(self, key: str) -> str:
            return key.lower()

    store = Lower()
    with store.processor() as processor:
        processor.run_across([*"AB"], delete, 0, "B")
        processor.run("C", delete, 0, "C")
    assert store.ledger.kept == {"a": []}


@pytest.mark.parametrize("batching", [True, False])
def test_a_scope_that_asks_only_whether_the_batch_deletes_deletes_nothing(
    clock: VirtualTime, store: TwoForms, batching: bool
) -> None:
    store.ledger.on_save = lambda _: current_batch().deleted
    with store.processor(batching=batching) as processor:
        assert processor.run_across([*"ab"], delete, 1) == 1
        with pytest.raises(SaveFailed, match="deleted_keys"):
            processor.run_across([*"ab"], delete, 1, "a")
    assert store.ledger.kept == {"a": [], "b": []}


@pytest.mark.parametrize("form", ["one key too", "many"])
def test_a_scope_that_deletes_nothing_or_takes_no_rows_refuses_both_by_name(
    clock: VirtualTime, store: TwoForms, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.two_forms.ManyScope.deletes", False)
    monkeypatch.setattr("tests.support.two_forms.ManyScope.takes_rows", False)
    with _made(store, form) as processor:
        with pytest.raises(RuntimeError, match=r"delete: the store of the processor .* deletes no resources"):
            processor.run_across([*"ab"], delete, 1, "a")
        with pytest.raises(RuntimeError, match=r"add_row: the store of the processor .* inserts no rows"):
            processor.run_across([*"ab"], add_row, 1)


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one key too", "many"])
def test_each_row_of_connected_keys_is_there_once_in_the_order_of_the_operations(
    clock: VirtualTime, store: TwoForms, form: str
) -> None:
    errors: list[Exception] = [Conflict()]

    def lose(_: object) -> None:
        if errors:
            raise errors.pop(0)

    store.ledger.on_save = lose
    with _made(store, form) as processor:
        callers = Callers(processor)
        for mark, keys in enumerate(["ab", "bc", "b", "ca", "c", "abc", "a"]):
            callers.run(keys, mark, add_row)
        clock.advance(1)
    assert store.rows == list(range(7))
    assert {key: len(batch) for key, batch in store.ledger.kept.items()} == {"a": 4, "b": 4, "c": 4}

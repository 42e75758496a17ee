"""`check_operations` for operations across keys."""

from __future__ import annotations

from typing import Any

import pytest

from geventbatch import Processor
from geventbatch.testing import ImpureOperation, check_operations
from tests.support.ledger import Ledger


class NotEnough(Exception):
    pass


def processor(ledger: Ledger) -> Processor[Any]:
    return Processor(
        open_resources=ledger, min_duration=0, max_duration=1, clean_errors=(NotEnough,), batching=False, max_bulk=10
    )


def move(accounts: tuple[list[int], ...], amount: int) -> tuple[int, int]:
    source, target = accounts
    if sum(source) < amount:
        raise NotEnough
    source.append(-amount)
    target.append(amount)
    return sum(source), sum(target)


def change_and_raise(accounts: tuple[list[int], ...]) -> None:
    accounts[1].append(1)
    raise NotEnough


def share(accounts: tuple[list[Any], ...]) -> None:
    note = ["both"]
    for account in accounts:
        account.append(note)


def keep(accounts: tuple[list[int], ...], given: list[int]) -> None:
    accounts[1].append(given)  # type: ignore[arg-type]


def look(accounts: tuple[list[int], ...]) -> tuple[int, ...]:
    return tuple(sum(account) for account in accounts)


def test_one_that_is_right_is_applied_once_at_all_of_its_keys() -> None:
    ledger = Ledger()
    ledger.kept = {"a": [5], "b": []}
    accounts = processor(ledger)
    with check_operations(accounts):
        assert accounts.run_across(["a", "b"], move, 3) == (2, 3)
        with pytest.raises(NotEnough):
            accounts.run_across(["a", "b"], move, 3)
        assert accounts.run_across(["a", "b"], look) == (2, 3)
    assert ledger.kept == {"a": [5, -3], "b": [3]}


@pytest.mark.parametrize(
    ("bad", "args", "told"),
    [
        (change_and_raise, (), "had changed resource[1] by then"),
        (share, (), "put one object into resource[0]"),
        (keep, ([1],), "put argument 1 into the resource"),
    ],
)
def test_one_that_is_wrong_at_any_of_its_keys_is_refused(bad: Any, args: tuple[Any, ...], told: str) -> None:
    ledger = Ledger()
    accounts = processor(ledger)
    with pytest.raises(ImpureOperation), check_operations(accounts), pytest.raises(ImpureOperation) as complained:
        accounts.run_across(["a", "b"], bad, *args)
    assert told in str(complained.value)
    assert ledger.kept == {}


def test_copies_and_states_of_ones_own_are_asked_for_each_resource() -> None:
    ledger = Ledger()
    accounts = processor(ledger)
    copied: list[Any] = []
    compared: list[Any] = []

    def copy(resource: list[int]) -> list[int]:
        copied.append(resource)
        return list(resource)

    def state(value: Any) -> Any:
        compared.append(value)
        return value

    ledger.kept = {"a": [5], "b": [1]}
    with check_operations(accounts, copy=copy, state=state):
        accounts.run_across(["a", "b"], move, 3)
    assert copied == [[5, -3], [1, 3]] * 2  # these very objects, which the operation has changed by now
    assert ([5], [1]) not in compared
    assert ledger.kept == {"a": [5, -3], "b": [1, 3]}

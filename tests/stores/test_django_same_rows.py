"""A store of several models of which two have the same rows: a key of each names one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import connections

from geventbatch import LoadFailed, Processor
from geventbatch.stores import DjangoStore
from tests.support.callers import answer_of
from tests.support.django_accounts import opening

from tests.support.django_project.bank.models import Account, Savings  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable

alias = opening("sqlite", "postgresql")

MODES = pytest.mark.parametrize("mode", ["lock", "version"])

OTHERS = pytest.mark.parametrize("other", ["savings", "again"])
"""A child of the model, and the model itself by another name."""


def opened(alias: str, mode: Any) -> Processor[Any]:
    for name in "xyz":
        Savings.objects.using(alias).create(name=name, balance=10)
    models: Any = {"account": Account, "savings": Savings, "again": Account}
    store: Any = DjangoStore(models, by=dict.fromkeys(models, "name"), mode=mode, using=alias)
    how: Any = {"min_duration": 0, "max_duration": 10, "workers": 1, "max_batches": 1}
    return Processor(open_resources=store.open_resources, **how)


def together(run: Callable[..., Any], *calls: Any) -> list[Any]:
    def call(*args: Any) -> Any:
        try:
            return answer_of(run, *args)
        finally:
            for connection in connections.all(initialized_only=True):
                connection.close()

    return [one.get() for one in [gevent.spawn(call, *args) for args in calls]]


def deposit(account: Any) -> int:
    account.balance += 1
    return int(account.balance)


def deposit_all(accounts: tuple[Any, ...]) -> list[int]:
    return [deposit(account) for account in accounts]


def balance(alias: str) -> int:
    return Account.objects.using(alias).get(name="x").balance


@MODES
@OTHERS
def test_single_keys_of_two_models_that_name_one_row_lose_no_change(alias: str, mode: str, other: str) -> None:
    with opened(alias, mode) as processor:
        answers = together(processor.run, (("account", "x"), deposit), ((other, "x"), deposit), ((other, "y"), deposit))
    assert sorted(answers) == [11, 11, 12]
    assert balance(alias) == 12


@MODES
@OTHERS
def test_operations_across_keys_of_two_models_that_name_one_row_lose_no_change(
    alias: str, mode: str, other: str
) -> None:
    with opened(alias, mode) as processor:
        answers = together(
            processor.run_across,
            ([("account", "x"), ("account", "y")], deposit_all),
            ([(other, "x"), (other, "z")], deposit_all),
        )
    assert sorted(answers) == [[11, 11], [12, 11]]
    assert balance(alias) == 12


@MODES
@OTHERS
def test_an_operation_that_names_one_row_by_two_models_is_told_so(alias: str, mode: str, other: str) -> None:
    with opened(alias, mode) as processor:
        (told,) = together(processor.run_across, ([("account", "x"), (other, "x")], deposit_all))
    assert isinstance(told, LoadFailed)
    assert "names the same row as" in str(told)
    assert "always name it by one of the models" in str(told)
    assert balance(alias) == 10

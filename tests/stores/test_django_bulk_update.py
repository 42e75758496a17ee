"""Rows of a Django model that are written by one UPDATE, on PostgreSQL: as `save` would have written each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import DatabaseError, connections
from django.db.models.signals import pre_save

from geventbatch import Processor, current_batch
from geventbatch.stores import DjangoStore
from geventbatch.stores.django import _messages
from tests.support.callers import answer_of
from tests.support.django_accounts import opening

from tests.support.django_project.bank.models import Account, Entry  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable

alias = opening("postgresql")

NAMES = "abcdef"
MODES = pytest.mark.parametrize("mode", ["lock", "version"])


def change_all(alias: str, mode: Any, changes: dict[str, Callable[[Any], object]]) -> list[Any]:
    """What the callers of these operations, by the account's name, were told; all in one bulk."""
    for name in NAMES[1:]:
        Account.objects.using(alias).create(name=name)
    store = DjangoStore(Account, by="name", mode=mode, using=alias)
    how: Any = {"min_duration": 0, "max_duration": 10, "workers": 1, "max_batches": 1, "max_attempts": 20}
    with Processor(open_resources=store.open_resources, **how) as processor:
        callers = [gevent.spawn(answer_of, processor.run, name, change) for name, change in changes.items()]
        return [caller.get() for caller in callers]


def put(account: Any, note: str) -> None:
    account.note = note


def updates(sent: list[str]) -> list[str]:
    return [one for one in sent if one.startswith("UPDATE")]


@MODES
def test_all_rows_with_the_same_changes_are_one_statement(alias: str, mode: str, sent: list[str]) -> None:
    before = dict(Account.objects.using(alias).values_list("name", "changed_at"))

    def change(account: Any) -> str:
        account.balance = len(account.name) + ord(account.name)
        account.document["seats"] = [account.name, None, 1.5]
        account.note = f"{account.name}'s % {{}} \\ note"
        return str(account.name)

    assert change_all(alias, mode, dict.fromkeys(NAMES, change)) == list(NAMES)
    assert len(updates(sent)) == 1
    for account in Account.objects.using(alias):
        assert account.balance == 1 + ord(account.name)
        assert account.document == {"seats": [account.name, None, 1.5]}
        assert account.note == f"{account.name}'s % {{}} \\ note"
    assert Account.objects.using(alias).get(name="a").changed_at > before["a"]  # which its `pre_save` sets


@pytest.mark.parametrize("many", [1, 10_000], ids=["by ourselves", "by psycopg"])
def test_values_are_put_into_a_statement_as_psycopg_does(
    alias: str, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_messages, "_MANY", many)
    notes = ["%s", "%%", "it's", "\\'; --", "ü€😀", '"%(note)s"']
    changes: dict[str, Callable[[Any], object]] = {
        name: partial(change_to, balance=-number, note=note)
        for number, (name, note) in enumerate(zip(NAMES, notes, strict=True))
    }
    assert change_all(alias, None, changes) == [None] * 6
    found = Account.objects.using(alias).order_by("name").values_list("balance", "note", "document")
    assert list(found) == [(-number, note, {"%s": [None, note]}) for number, note in enumerate(notes)]


def change_to(account: Any, balance: int, note: str) -> None:
    account.balance, account.note, account.document = balance, note, {"%s": [None, note]}


def test_rows_with_other_changes_are_another_statement(alias: str, sent: list[str]) -> None:
    changes: dict[str, Callable[[Any], object]] = {
        name: (lambda one: setattr(one, "balance", 5)) if name < "d" else (lambda one: setattr(one, "note", "n"))
        for name in NAMES
    }
    change_all(alias, None, changes)
    assert len(updates(sent)) == 2
    found = Account.objects.using(alias).order_by("name").values_list("balance", "note")
    assert list(found) == [(5, "")] * 3 + [(0, "n")] * 3


@MODES
def test_a_value_that_the_column_does_not_take_is_not_cut_off_and_refused_alone(alias: str, mode: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("ALTER TABLE bank_account ALTER note TYPE varchar(5)")
    changes: dict[str, Callable[[Any], object]] = {
        name: partial(put, note=name * (6 if name == "c" else 5)) for name in NAMES
    }
    changes["d"] = lambda one: setattr(one, "balance", 2**40)
    answers = change_all(alias, mode, changes)
    assert [isinstance(answer, DatabaseError) for answer in answers] == [name in "cd" for name in NAMES]
    found = Account.objects.using(alias).order_by("name").values_list("note", flat=True)
    assert list(found) == ["aaaaa", "bbbbb", "", "", "eeeee", "fffff"]


def test_a_row_that_a_trigger_leaves_out_is_told_to_its_caller_alone(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN IF NEW.name = 'c' THEN RETURN NULL; END IF; RETURN NEW; END$$; "
            "CREATE TRIGGER leaves_out BEFORE UPDATE ON bank_account FOR EACH ROW EXECUTE FUNCTION leave_out()"
        )
    answers = change_all(alias, None, dict.fromkeys(NAMES, lambda one: setattr(one, "balance", 5)))
    assert [isinstance(answer, DatabaseError) for answer in answers] == [name == "c" for name in NAMES]
    found = Account.objects.using(alias).order_by("name").values_list("balance", flat=True)
    assert list(found) == [5, 5, 0, 5, 5, 5]


def test_rows_of_a_model_with_listeners_are_saved_one_by_one(alias: str, sent: list[str]) -> None:
    saved: list[str] = []

    def see(instance: Any, **_: Any) -> None:
        saved.append(instance.name)

    pre_save.connect(see, Account)
    try:
        change_all(alias, None, dict.fromkeys(NAMES, lambda one: setattr(one, "balance", 5)))
    finally:
        pre_save.disconnect(see, Account)
    assert sorted(saved[5:]) == list(NAMES)
    assert len(updates(sent)) == 6
    assert Account.objects.using(alias).filter(balance=5).count() == 6


def test_rows_beside_are_inserted_by_one_statement_for_each_model(alias: str, sent: list[str]) -> None:
    def note(account: Any) -> None:
        account.balance += 1
        current_batch().add_row(Entry(text=account.name))

    change_all(alias, None, dict.fromkeys(NAMES, note))
    inserts = [one for one in sent if one.startswith('INSERT INTO "bank_entry"')]
    assert (len(inserts), len(updates(sent))) == (1, 1)
    assert Entry.objects.using(alias).count() == 6

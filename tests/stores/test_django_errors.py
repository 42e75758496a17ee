"""What a field, the driver, the server or a signal says to a value of a Django model is the error of one caller."""

from __future__ import annotations

from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.core.exceptions import ValidationError
from django.db import IntegrityError, transaction
from django.db.models.signals import post_save, pre_delete, pre_save

from geventbatch import Processor, current_batch
from geventbatch.stores import DjangoStore
from tests.support.callers import answer_of
from tests.support.django_accounts import MARIADB, account, account_in, deposit, opening
from tests.support.django_project.start import execute

from tests.support.django_project.bank.models import Account, Entry, Purse, Ticket  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


alias = opening("sqlite", "postgresql", MARIADB)


def answers_of(alias: str, *operations: Callable[[Any], object], pipeline: bool = True, **options: Any) -> list[Any]:
    """In one batch."""
    store = DjangoStore(Account, by="name", using=alias, pipeline=pipeline)
    with Processor(open_resource=store, **{"min_duration": 0.01, "max_duration": 20, **options}) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "a", operation) for operation in operations]
        return [caller.get() for caller in callers]


def between(alias: str, operation: Callable[[Any], object], *, pipeline: bool = True) -> Any:
    """The answer of *operation* between two deposits, which are saved."""
    Account.objects.using(alias).update(balance=0)
    answers = answers_of(alias, add, operation, add, pipeline=pipeline)
    assert (answers[0], answers[2], account(alias).balance) == (1, 2, 2), answers
    return answers[1]


def add(resource: Account) -> int:
    return deposit(resource, 1)


def assign(resource: Account, name: str, value: object) -> None:
    setattr(resource, name, value)


def put(resource: Account, value: object) -> None:
    resource.document["x"] = value


def add_row(resource: Account, row: Callable[[], object]) -> None:
    current_batch().add_row(Entry(text="of nobody"))
    current_batch().add_row(row())


class Never:
    """What no field takes."""

    def __str__(self) -> str:
        raise TypeError("it has no text")


EVERYWHERE = (
    partial(assign, name="balance", value="many"),
    partial(assign, name="balance", value=[]),
    partial(assign, name="balance", value=float("nan")),
    partial(assign, name="balance", value=Decimal("NaN")),
    partial(assign, name="balance", value=2**80),
    partial(assign, name="balance", value=Never()),
    partial(assign, name="note", value=None),
    partial(assign, name="note", value="\ud800"),
    partial(assign, name="note", value=Never()),
    partial(put, value=object()),
    partial(put, value={1, 2}),
    partial(add_row, row=lambda: Ticket(number="many")),
    partial(add_row, row=lambda: Ticket(number=2**80)),
    partial(add_row, row=lambda: Entry(text=None)),
    partial(add_row, row=lambda: Entry(text="of nobody")),
    partial(add_row, row=lambda: Entry(text="\ud800")),
    partial(add_row, row=lambda: Entry(text=Never())),
    partial(add_row, row=lambda: Account(name="c", document=object())),
    partial(add_row, row=lambda: "no row"),
)

ON_SERVERS = (
    partial(assign, name="name", value="x" * 300),
    partial(add_row, row=lambda: Entry(text="x" * 300)),
)

ON_POSTGRES = (
    partial(assign, name="note", value="from a request: \x00"),
    partial(put, value="\x00"),
    partial(put, value="\ud800"),
    partial(put, value=float("nan")),
    partial(add_row, row=lambda: Entry(text="\x00")),
)


@pytest.mark.parametrize("pipeline", [True, pytest.param(False, marks=pytest.mark.variants)])
def test_a_value_that_no_column_takes_is_the_error_of_the_operation_that_brought_it(
    alias: str, request: pytest.FixtureRequest, pipeline: bool
) -> None:
    server = request.node.callspec.params["alias"]
    bad = [*EVERYWHERE, *(ON_SERVERS if server != "sqlite" else ()), *(ON_POSTGRES if server == "postgresql" else ())]
    for operation in bad:
        error = between(alias, operation, pipeline=pipeline)
        assert isinstance(error, Exception), operation
        assert getattr(error, "retry_safe", None) is None, (operation, error)  # it is its own, and no BatchError
    assert not Entry.objects.using(alias).exists()
    Account.objects.using(alias).update(balance=0)
    answers = answers_of(alias, *[one for operation in bad for one in (add, operation)], pipeline=pipeline)
    assert answers[::2] == list(range(1, len(bad) + 1))
    assert all(isinstance(answer, Exception) for answer in answers[1::2])


def test_what_a_field_refuses_when_it_is_saved_is_the_error_of_its_own_operation(alias: str) -> None:
    for error in (ValidationError("no"), TypeError("no"), ValueError("no"), RuntimeError("no")):
        Purse.objects.using(alias).create(name="a")
        store = DjangoStore(Purse, by="name", using=alias)
        with Processor(open_resource=store, min_duration=0.01) as processor:
            callers = [
                gevent.spawn(answer_of, processor.run, "a", partial(assign, name="total", value=value))
                for value in (1, 2, Raising(error))
            ]
            answers = [caller.get() for caller in callers]
        assert answers[:2] == [None, None]
        assert (type(answers[2]), Purse.objects.using(alias).get().total) == (type(error), 2)
        Purse.objects.using(alias).all().delete()


class Raising:
    """A value whose number cannot be had."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __int__(self) -> int:
        raise self.error


def test_a_foreign_key_that_is_looked_at_by_commit_is_the_error_of_its_own_operation(alias: str) -> None:
    error = between(alias, lambda _: current_batch().add_row(Entry(account_id=12345, text="to nobody")))
    assert isinstance(error, IntegrityError)
    assert not Entry.objects.using(alias).exists()


def test_what_a_trigger_refuses_is_the_error_of_its_own_operation(tmp_path: Path) -> None:
    with account_in("postgresql", tmp_path) as alias:
        execute(
            alias,
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF NEW.note = 'bad' THEN "
            "RAISE EXCEPTION 'refused by a trigger'; END IF; RETURN NEW; END $$",
        )
        execute(alias, "CREATE TRIGGER refuse BEFORE UPDATE ON bank_account FOR EACH ROW EXECUTE FUNCTION refuse()")
        for pipeline in (True, False):
            error = between(alias, partial(assign, name="note", value="bad"), pipeline=pipeline)
            assert "refused by a trigger" in str(error)


# -- signals -----------------------------------------------------------------------------------------------------


@contextmanager
def heard(signal: Any, receiver: Callable[..., object], sender: Any = Account) -> Iterator[None]:
    signal.connect(receiver, sender=sender)
    try:
        yield
    finally:
        signal.disconnect(receiver, sender=sender)


def refuse(instance: Account, **_: object) -> None:
    Entry.objects.using(instance._state.db).create(text=f"seen {Entry.objects.using(instance._state.db).count()}")
    if instance.note == "bad":
        raise PermissionError("not this")


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=["pre_save", "post_save"])
def test_what_a_receiver_of_a_signal_raises_is_the_error_of_the_operation_that_it_judges(
    alias: str, signal: Any
) -> None:
    with heard(signal, refuse):
        error = between(alias, partial(assign, name="note", value="bad"))
    assert isinstance(error, PermissionError)
    saves = Entry.objects.using(alias).count()
    assert [one.text for one in Entry.objects.using(alias).order_by("id")] == [f"seen {n}" for n in range(saves)]
    assert saves == 2  # each half of the batch


def test_what_a_receiver_of_pre_delete_raises_is_the_error_of_the_operation_that_deletes(alias: str) -> None:
    def refuse_it(**_: object) -> None:
        raise PermissionError("not this")

    with heard(pre_delete, refuse_it):
        error, balance = answers_of(alias, lambda a: a.delete(), add)
    assert isinstance(error, PermissionError)
    assert (balance, account(alias).balance) == (1, 1)


def test_signals_are_sent_once_for_a_save_of_many_operations(alias: str) -> None:
    seen: list[int] = []

    def note(instance: Account, **_: object) -> None:
        seen.append(instance.balance)

    with heard(post_save, note):
        assert answers_of(alias, *[add] * 5) == [1, 2, 3, 4, 5]
    assert seen == [5]


@pytest.mark.parametrize("signal", [pre_save, post_save], ids=["pre_save", "post_save"])
def test_a_block_that_a_receiver_of_a_signal_leaves_open_is_not_taken_for_a_save(alias: str, signal: Any) -> None:
    def leave_open(instance: Account, **_: object) -> None:
        if instance.note == "bad":
            transaction.atomic(using=instance._state.db).__enter__()

    with heard(signal, leave_open):
        error = between(alias, partial(assign, name="note", value="bad"))
    assert isinstance(error, RuntimeError)
    assert "left a block of atomic() open" in str(error)

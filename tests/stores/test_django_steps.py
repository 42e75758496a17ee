"""A batch on a Django model that is judged step by step: the culprits are out, and everybody else is saved."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import DataError, IntegrityError, connections, transaction

from geventbatch import Processor, current_batch
from geventbatch.stores import DjangoStore
from tests.support.callers import answer_of
from tests.support.django_accounts import account_in
from tests.support.django_project.start import execute

from tests.support.django_project.bank.models import Account, Entry, Outcome, Ticket  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


@pytest.fixture(params=["postgresql", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def alias(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with account_in(request.param, tmp_path) as alias:
        if request.param == "postgresql":
            execute(alias, "ALTER TABLE bank_account ADD CHECK (note <> 'bad')")
            execute(alias, "ALTER TABLE bank_ticket ADD CHECK (total >= 0)")
        else:
            execute(alias, "ALTER TABLE bank_account ADD CONSTRAINT checked CHECK (note <> 'bad')")
            execute(alias, "ALTER TABLE bank_ticket ADD CONSTRAINT checked_too CHECK (total >= 0)")
        Ticket.objects.using(alias).create(number=1)
        yield alias


def run_all(alias: str, operations: Sequence[Callable[[Any], object]], **options: Any) -> list[Any]:
    """Their answers, in one batch."""
    of_store = {name: options.pop(name, None) for name in ("mode", "idempotency", "version", "missing")}
    of_store = {name: value for name, value in of_store.items() if value is not None}
    model, by, key = options.pop("model", Account), options.pop("by", "name"), options.pop("key", "a")
    pipeline = options.pop("pipeline", True)
    store: Any = DjangoStore(model, by=by, using=alias, pipeline=pipeline, **of_store)
    with Processor(open_resource=store, **{"min_duration": 0.05, "max_duration": 30, **options}) as processor:
        callers = [gevent.spawn(answer_of, processor.run, key, operation) for operation in operations]
        return [caller.get() for caller in callers]


def add(resource: Any) -> int:
    resource.balance += 1
    return int(resource.balance)


def spoil(resource: Any) -> int:
    resource.note = "bad"
    resource.document["seats"].append(9)
    return add(resource)


def kinds(answers: Sequence[object]) -> list[object]:
    return [type(answer) if isinstance(answer, Exception) else answer for answer in answers]


@pytest.mark.parametrize("pipeline", [True, False])
def test_half_of_a_thousand_operations_may_be_refused_by_a_constraint(alias: str, pipeline: bool) -> None:
    runs: list[int] = []

    def count(resource: Any) -> int:
        runs.append(1)
        return add(resource)

    answers = run_all(alias, [spoil, count] * 500, pipeline=pipeline, max_duration=50)
    assert all(isinstance(answer, IntegrityError) for answer in answers[::2])
    assert answers[1::2] == list(range(1, 501))
    found = Account.objects.using(alias).get(name="a")
    assert (found.balance, found.note, found.document) == (500, "", {"seats": [1, 2]})
    assert len(runs) < 4 * 500


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_few_bad_values_among_many_are_the_errors_of_those_who_brought_them(alias: str, pipeline: bool) -> None:
    def empty(resource: Any) -> None:
        resource.note = None

    operations = [empty if number % 30 == 7 else add for number in range(200)]
    answers = run_all(alias, operations, pipeline=pipeline)
    assert [number for number, answer in enumerate(answers) if isinstance(answer, IntegrityError)] == [
        number for number in range(200) if number % 30 == 7
    ]
    assert Account.objects.using(alias).get(name="a").balance == 193


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_the_version_is_counted_once_for_each_part_that_is_saved(alias: str, mode: str) -> None:
    def count(resource: Ticket) -> int:
        resource.total += 1
        return resource.total

    def overdraw(resource: Ticket) -> None:
        resource.total -= 1000

    operations: list[Callable[[Any], object]] = [count, overdraw, count, overdraw, overdraw, add_rows, count]
    options = {"model": Ticket, "by": "pk", "key": 1, "version": "version", "mode": mode}
    answers = run_all(alias, operations, **options)
    assert [isinstance(answer, Exception) for answer in answers] == [False, True, False, True, True, False, False]
    assert answers[::2][:2] == [1, 2]
    found = Ticket.objects.using(alias).get()
    assert (found.total, answers[6]) == (3, 3)
    assert found.version == SAVES


SAVES = 3
"""The batch is halved twice before it goes step by step."""


def add_rows(resource: Any) -> None:
    current_batch().add_row(Entry(text="kept"))


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_what_a_refused_operation_wrote_is_undone_with_it(alias: str, mode: str) -> None:
    def write(resource: Account, text: str, *, bad: bool) -> None:
        Entry.objects.using(alias).create(text=f"written {text}")
        current_batch().add_row(Entry(text=f"added {text}"))
        add(resource)
        if bad:
            spoil(resource)

    def write_and_raise(resource: Account) -> None:
        write(resource, "raised", bad=False)
        raise KeyError

    hooks: list[str] = []

    def hook(resource: Account, text: str, *, bad: bool) -> None:
        transaction.on_commit(lambda: hooks.append(text), using=alias)
        if bad:
            spoil(resource)

    def leave_open(resource: Account) -> None:
        transaction.atomic(using=alias).__enter__()
        Entry.objects.using(alias).create(text="left open")

    operations: list[Callable[[Any], object]] = [
        partial(write, text="1", bad=False),
        *[partial(write, text=f"bad {number}", bad=True) for number in range(4)],
        partial(hook, text="good", bad=False),
        partial(hook, text="bad", bad=True),
        write_and_raise,
        leave_open,
        partial(write, text="2", bad=False),
    ]
    answers = run_all(alias, operations, mode=mode, clean_errors=(KeyError,))
    assert [isinstance(answer, Exception) for answer in answers] == [
        *[False, True, True, True, True],
        *[False, True, True, True, False],
    ]
    texts = sorted(Entry.objects.using(alias).values_list("text", flat=True))
    assert texts == ["added 1", "added 2", "written 1", "written 2"]
    assert Account.objects.using(alias).get(name="a").balance == 2
    assert hooks == ["good"]


def test_a_new_resource_is_inserted_with_the_first_step_that_is_kept(alias: str) -> None:
    operations = [spoil, spoil, spoil, add, spoil, add, add_rows]
    answers = run_all(
        alias, operations, key="new", missing=lambda name: Account(name=name, document={"seats": []}), mode="lock"
    )
    assert [isinstance(answer, Exception) for answer in answers] == [True, True, True, False, True, False, False]
    found = Account.objects.using(alias).get(name="new")
    assert (found.balance, found.document) == (2, {"seats": []})
    assert Entry.objects.using(alias).count() == 1


def test_a_new_resource_that_somebody_else_has_inserted_meanwhile_is_a_conflict_in_a_step_too(alias: str) -> None:
    runs: list[int] = []

    def insert_elsewhere(resource: Account) -> int:
        runs.append(resource.balance)
        if len(runs) == 3:  # in the attempt that goes step by step
            gevent.spawn(insert).join()
        return add(resource)

    def insert() -> None:
        try:
            Account.objects.using(alias).create(name="new", balance=100, document={"seats": []})
        finally:
            connections[alias].close()

    operations = [insert_elsewhere, spoil, spoil, add]
    missing = partial(_made, document={"seats": []})
    answers = run_all(alias, operations, key="new", missing=missing, mode="version")
    assert answers[0] == 101, runs
    assert answers[3] == Account.objects.using(alias).get(name="new").balance == 102


def _made(name: str, document: Any) -> Account:
    return Account(name=name, document={**document})


def test_the_resource_may_be_deleted_behind_steps(alias: str) -> None:
    def add_nothing(resource: Any) -> None:
        current_batch().add_row(Entry(text=None))

    operations = [add, add_nothing, add_nothing, add_nothing, add_rows, lambda a: a.delete() and None]
    answers = run_all(alias, operations)
    assert [isinstance(answer, Exception) for answer in answers] == [False, True, True, True, False, False]
    assert not Account.objects.using(alias).exists()
    assert Entry.objects.using(alias).count() == 1


def test_outcomes_are_recorded_at_the_end_of_an_attempt_with_steps(alias: str) -> None:
    store = DjangoStore(Account, by="name", using=alias, idempotency=Outcome)
    with Processor(open_resource=store, min_duration=0.05, max_duration=20) as processor:
        for _ in range(2):
            callers = [
                gevent.spawn(answer_of, processor.run, "a", operation, idempotency_key=str(number))
                for number, operation in enumerate([add, spoil, spoil, add, spoil])
            ]
            answers = [caller.get() for caller in callers]
            assert [isinstance(answer, Exception) for answer in answers] == [False, True, True, False, True]
            assert answers[::3] == [1, 2]
    assert Account.objects.using(alias).get(name="a").balance == 2


def test_a_value_that_cannot_be_encoded_is_refused_in_a_step_too(alias: str) -> None:
    def too_long(resource: Any) -> None:
        resource.name = "x" * 300

    def out_of_range(resource: Any) -> None:
        resource.balance = 2**80

    def no_json(resource: Any) -> None:
        resource.document = {"when": object()}

    def no_number(resource: Any) -> None:
        resource.balance = "many"

    answers = run_all(alias, [out_of_range, add, no_json, add, no_number, add, out_of_range, no_json])
    assert kinds(answers[1:6:2]) == [1, 2, 3]
    assert [isinstance(answer, Exception) for answer in answers] == [True, False] * 3 + [True, True]
    assert isinstance(answers[2], TypeError)
    assert isinstance(answers[4], ValueError)
    assert isinstance(answers[0], DataError)

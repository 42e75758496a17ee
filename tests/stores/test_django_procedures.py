"""A procedure of MySQL's that may end the transaction is refused to who calls it; any other may be called."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections, transaction

from geventbatch.stores._sql.functions import Functions
from tests.support.callers import answer_of
from tests.support.django_accounts import account, account_in, deposit, entries, processing, together
from tests.support.django_project.start import execute

from tests.support.django_project.bank.models import Entry  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.django_project.bank.models import Account

WRITES = "INSERT INTO bank_entry (text) VALUES ('so; COMMIT')"
PROCEDURES = {
    "ends_it": "COMMIT",
    "begins_another": f"COMMIT; START TRANSACTION; {WRITES}",
    "rolls_back": "ROLLBACK; START TRANSACTION",
    "empties": "truncate table bank_entry",
    "calls": "CALL `only_writes`(); CALL/* so */ends_it",
    "executes": "SET @sent = 'COMMIT'; PREPARE sent FROM @sent; EXECUTE sent",
    "`ends it`": "COMMIT",
    "only_writes": WRITES,  # and begins with BEGIN
}
ENDING = [name for name in PROCEDURES if name != "only_writes"]


@pytest.fixture
def alias(tmp_path: Path) -> Iterator[str]:
    with account_in("mariadb", tmp_path) as alias:
        for name, body in PROCEDURES.items():
            execute(alias, f"CREATE PROCEDURE {name}() BEGIN {body}; END")
        yield alias


def by_statement(alias: str, name: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute(f"CALL {name}()")


def by_name(alias: str, name: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.callproc(name)


def in_a_block(alias: str, name: str) -> None:
    with transaction.atomic(using=alias), connections[alias].cursor() as cursor:
        cursor.execute(f"/*! CALL {name} */")


def swallowed(alias: str, name: str) -> None:
    try:
        by_statement(alias, name)
    except RuntimeError as error:
        Entry.objects.using(alias).create(text=str(error)[-28:])


@pytest.mark.mariadb
@pytest.mark.parametrize("way", [by_statement, by_name, in_a_block])
@pytest.mark.parametrize("batching", [True, False])
def test_a_procedure_that_may_end_the_transaction_is_the_error_of_who_calls_it_through_django(
    alias: str, way: Callable[[str, str], None], batching: bool
) -> None:
    def call(name: str, resource: Account) -> None:
        resource.balance += 100
        Entry.objects.using(alias).create(text="of nobody")
        way(alias, name)

    operations: list[Callable[[Account], object]] = [lambda a: deposit(a, 1)]
    for name in [*ENDING, "ends_it"]:
        operations += [partial(call, name), lambda a: deposit(a, 1)]
    with processing(alias, min_duration=0.01, batching=batching) as processor:
        answers: list[Any] = (
            together(processor, *operations)
            if batching
            else [answer_of(processor.run, "a", operation) for operation in operations]
        )
    assert answers[::2] == list(range(1, 10))
    for answer in answers[1::2]:
        assert isinstance(answer, RuntimeError)
        assert "calls a procedure that may end the transaction of its batch" in str(answer)
    assert (account(alias).balance, entries(alias)) == (9, [])


@pytest.mark.mariadb
def test_who_goes_on_after_its_procedure_was_refused_is_saved_like_the_others(alias: str) -> None:
    with processing(alias, min_duration=0.01) as processor:
        answers = together(processor, lambda a: deposit(a, 1), lambda _: swallowed(alias, "ends_it"))
    assert answers == [1, None]
    assert (account(alias).balance, entries(alias)) == (1, ["call it outside of the batch"])


@pytest.mark.mariadb
@pytest.mark.parametrize("way", [by_statement, by_name, in_a_block])
def test_any_other_procedure_may_be_called_through_django(alias: str, way: Callable[[str, str], None]) -> None:
    with processing(alias, min_duration=0.01) as processor:
        answers = together(processor, lambda a: deposit(a, 1), lambda _: way(alias, "only_writes"))
    assert answers == [1, None]
    assert (account(alias).balance, entries(alias)) == (1, ["so; COMMIT"])


# -- what is known of them -----------------------------------------------------------------------------------------


def test_who_calls_a_procedure_while_another_one_asks_about_it_asks_too() -> None:
    functions, answers = Functions("mysql"), list[bool]()

    def ask(question: str, parameters: list[str]) -> list[str]:
        if not answers:  # the other one runs while this one waits for the server
            answers.append(functions.may_end_transaction("CALL p()", lambda *_: ["COMMIT"]))
        return ["COMMIT"]

    assert functions.may_end_transaction("CALL p()", ask)
    assert answers == [True]


def test_procedures_that_call_each_other_end_what_any_of_them_ends() -> None:
    bodies = {"a": "CALL b(); CALL c()", "b": "CALL a()", "c": "COMMIT"}
    functions = Functions("mysql")
    for name in "abc":
        assert functions.may_end_transaction(f"CALL {name}()", lambda _, names: [bodies[names[0]]])


def test_a_function_is_known_though_more_were_called_than_are_remembered() -> None:
    functions, asked = Functions("mysql"), list[str]()

    def ask(question: str, parameters: list[str]) -> list[str]:
        asked.extend(parameters)
        return ["writes"]

    assert functions.may_write("SELECT writes()", ask)
    for number in range(3_000):
        assert functions.may_write(f"SELECT writes(), f{number}()", ask)
    assert len(asked) == 3_001

"""A function of the user's in the database may write, although the query that calls it only selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections

from tests.stores.test_django_transactions import between
from tests.support.django_accounts import account_in, deposit, entries, opening, processing, together
from tests.support.django_project.start import execute

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.django_project.bank.models import Account

__all__ = ["postgres"]

WRITE_ON_POSTGRES = """
    CREATE FUNCTION write_entry(text) RETURNS int LANGUAGE sql AS
    $$ INSERT INTO bank_entry (text) VALUES ($1) RETURNING 1 $$
"""
PAY_ON_POSTGRES = """
    CREATE FUNCTION pay(int) RETURNS int LANGUAGE sql AS
    $$ UPDATE bank_account SET balance = balance + $1 RETURNING balance $$
"""
TOTAL = """
    CREATE FUNCTION total() RETURNS bigint STABLE LANGUAGE sql AS $$ SELECT sum(balance) FROM bank_account $$
"""
WRITE_ON_MARIADB = """
    CREATE FUNCTION write_entry(written TEXT) RETURNS INT
    BEGIN INSERT INTO bank_entry (text) VALUES (written); RETURN 1; END
"""
PAY_ON_MARIADB = """
    CREATE FUNCTION pay(amount INT) RETURNS INT
    BEGIN UPDATE bank_account SET balance = balance + amount; RETURN 1; END
"""
FUNCTIONS = {
    "postgresql": (WRITE_ON_POSTGRES, PAY_ON_POSTGRES),
    "mariadb": (WRITE_ON_MARIADB, PAY_ON_MARIADB),
}


postgres = opening("postgresql")


@pytest.fixture(params=["postgresql", pytest.param("mariadb", marks=pytest.mark.mariadb)])
def with_functions(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with account_in(request.param, tmp_path) as alias:
        for function in FUNCTIONS[request.param]:
            execute(alias, function)
        yield alias


def call(alias: str, query: str) -> Any:
    with connections[alias].cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchone()[0]


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_what_a_function_wrote_for_an_operation_that_raised_is_not_committed(with_functions: str, mode: str) -> None:
    def write(resource: Account) -> None:
        call(with_functions, "SELECT write_entry('of nobody')")
        raise ValueError("no")

    answers = between(with_functions, write, mode=mode, clean_errors=(Exception,))
    assert isinstance(answers[1], ValueError)
    assert entries(with_functions) == []
    with processing(with_functions, mode=mode) as processor:
        assert processor.run("a", lambda _: call(with_functions, "SELECT Write_Entry ('of somebody')")) == 1
    assert entries(with_functions) == ["of somebody"]


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_a_function_that_changes_the_row_of_the_resource_is_refused_to_who_calls_it(
    with_functions: str, mode: str
) -> None:
    answers = between(with_functions, lambda _: call(with_functions, "SELECT pay(100)"), mode=mode)
    assert isinstance(answers[1], RuntimeError)
    assert "changed the row of its resource" in str(answers[1])


def test_a_function_that_only_reads_costs_no_replay(postgres: str) -> None:
    execute(postgres, TOTAL)

    def look(resource: Account) -> None:
        raise LookupError(call(postgres, "SELECT total() + sqrt(4)"))

    with processing(postgres, clean_errors=(LookupError,), min_duration=0.05) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, lambda a: deposit(a, 1), look)
    assert str(answers[1]) == "2.0"
    assert [metric.attempts for metric in metrics] == [1]

"""`transaction.on_commit` in operations on a Django model: called once for those that are saved, for others never."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections, transaction
from django.test import TestCase

from tests.support.callers import answer_of
from tests.support.django_accounts import account, deposit, opening, processing, together
from tests.support.servers import wait_until

from tests.support.django_project.bank.models import Account, Entry, Outcome  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable


alias = opening("sqlite", "postgresql")


@pytest.fixture
def seen() -> list[str]:
    """What was called."""
    return []


class Hook:
    """An operation that gives something to `on_commit`, and may raise after that."""

    def __init__(self, alias: str, seen: list[str], name: str, error: Exception | None = None) -> None:
        self.alias = alias
        self.seen = seen
        self.name = name
        self.error = error

    def __call__(self, resource: Account) -> int:
        transaction.on_commit(lambda: self.seen.append(self.name), using=self.alias)
        if self.error is not None:
            raise self.error
        return deposit(resource, 1)


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize("clean", [True, False])
def test_what_an_operation_that_raised_has_registered_is_never_called(
    alias: str, seen: list[str], *, batching: bool, keyed: bool, clean: bool
) -> None:
    options: dict[str, Any] = {"batching": batching, "idempotency": Outcome}
    with processing(alias, clean_errors=(KeyError,) if clean else (), **options) as processor:
        how: Any = {"idempotency_key": "k"} if keyed else {}
        for _ in range(2):
            assert isinstance(
                answer_of(processor.run, "a", Hook(alias, seen, "raised", KeyError("x")), **how), KeyError
            )
        processor.run("a", Hook(alias, seen, "saved"))
        wait_until(lambda: seen)
    assert seen == ["saved"]


def test_in_its_callers_block_too_what_an_operation_that_raised_has_registered_is_never_called(
    alias: str, seen: list[str]
) -> None:
    with processing(alias, batching=False, idempotency=Outcome, clean_errors=(KeyError,)) as processor:
        with transaction.atomic(using=alias):
            transaction.on_commit(lambda: seen.append("of the block"), using=alias)
            raised = Hook(alias, seen, "raised", KeyError("x"))
            assert isinstance(answer_of(processor.run, "a", raised, idempotency_key="k"), KeyError)
            assert isinstance(answer_of(processor.run, "a", raised), KeyError)
            processor.run("a", Hook(alias, seen, "saved"))
            assert seen == []
        assert seen == ["of the block", "saved"]


def test_a_test_case_sees_the_callbacks_of_those_that_are_saved_and_calls_them(alias: str, seen: list[str]) -> None:
    with processing(alias, idempotency=Outcome, clean_errors=(KeyError,)) as processor, in_test_case(alias):
        with TestCase.captureOnCommitCallbacks(using=alias) as callbacks:
            raised = Hook(alias, seen, "raised", KeyError("x"))
            assert isinstance(answer_of(processor.run, "a", raised, idempotency_key="k"), KeyError)
            processor.run("a", Hook(alias, seen, "saved"))
        assert seen == []
        assert len(callbacks) == 1
        with TestCase.captureOnCommitCallbacks(using=alias, execute=True):
            processor.run("a", Hook(alias, seen, "saved too"))
        assert seen == ["saved too"]


class in_test_case:  # noqa: N801 - as a function
    """Inside the block that a `TestCase` of Django's puts around a test."""

    def __init__(self, alias: str) -> None:
        block: Any = transaction.atomic(using=alias)
        block._from_testcase = True
        self._block = block
        self._alias = alias

    def __enter__(self) -> None:
        self._block.__enter__()

    def __exit__(self, *error: object) -> None:
        transaction.set_rollback(True, using=self._alias)
        self._block.__exit__(*error)


def test_what_an_operation_that_is_replayed_has_registered_is_called_once(alias: str, seen: list[str]) -> None:
    def break_it(resource: Account) -> None:
        resource.balance = -1
        Entry.objects.using(alias).create(text="x")
        raise ValueError

    with processing(alias, min_duration=0.05, clean_errors=()) as processor:
        answers = together(processor, Hook(alias, seen, "1"), break_it, Hook(alias, seen, "2"), break_it)
        wait_until(lambda: len(seen) >= 2)
    assert answers[::2] == [1, 2]
    assert seen == ["1", "2"]


def test_what_was_registered_in_a_block_that_was_rolled_back_is_dropped_and_the_order_kept(
    alias: str, seen: list[str]
) -> None:
    def register_and_raise() -> None:
        with transaction.atomic(using=alias):
            transaction.on_commit(lambda: seen.append("undone"), using=alias)
            raise KeyError

    def change(resource: Account) -> int:
        transaction.on_commit(lambda: seen.append("before"), using=alias)
        with pytest.raises(KeyError):
            register_and_raise()
        with transaction.atomic(using=alias):
            transaction.on_commit(lambda: seen.append("inside"), using=alias)
        transaction.on_commit(lambda: seen.append("behind"), using=alias, robust=True)
        return deposit(resource, 1)

    def raise_behind_a_block(resource: Account) -> None:
        transaction.on_commit(lambda: seen.append("raised"), using=alias)
        with pytest.raises(KeyError), transaction.atomic(using=alias):
            raise KeyError  # Django makes all entries anew then
        raise LookupError

    with processing(alias, min_duration=0.05, clean_errors=(LookupError,)) as processor:
        answers = together(processor, Hook(alias, seen, "first"), raise_behind_a_block, change)
        wait_until(lambda: len(seen) >= 4)
    assert answers[::2] == [1, 2]
    assert seen == ["first", "before", "inside", "behind"]


@pytest.mark.parametrize("batching", [True, False])
def test_a_callback_that_raises_is_logged_and_hurts_nobody_robust_or_not(
    alias: str, seen: list[str], batching: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def change(resource: Account, robust: bool) -> int:
        transaction.on_commit(lambda: 1 // 0, using=alias, robust=robust)
        return deposit(resource, 1)

    with processing(alias, batching=batching) as processor:
        assert [processor.run("a", change, True), processor.run("a", change, False)] == [1, 2]
        processor.run("a", Hook(alias, seen, "last"))
        wait_until(lambda: seen and len(caplog.records) >= 2)
    assert account(alias).balance == 3
    assert len([record for record in caplog.records if "on_commit" in record.getMessage()]) == 2


def test_what_cannot_be_called_is_refused_to_its_own_operation(alias: str) -> None:
    nothing: Any = None

    def change(resource: Account) -> None:
        transaction.on_commit(nothing, using=alias)

    with processing(alias, min_duration=0.05) as processor:
        answers = together(processor, lambda a: deposit(a, 1), change)
    assert answers[0] == 1
    assert isinstance(answers[1], TypeError)


def test_a_callback_uses_the_database_as_ever(alias: str, seen: list[str]) -> None:
    def called() -> None:
        with transaction.atomic(using=alias):
            Entry.objects.using(alias).create(text="of the callback")
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT 1")
        seen.append("called")

    def change(resource: Account) -> int:
        transaction.on_commit(called, using=alias)
        return deposit(resource, 1)

    operation: Callable[[Account], int] = change
    with processing(alias) as processor:
        processor.run("a", operation)
        wait_until(lambda: seen)
    assert Entry.objects.using(alias).count() == 1

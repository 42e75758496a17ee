"""Models whose own `save` or `delete` does less than Django's: nothing that was answered is lost by that."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import IntegrityError, transaction

from tests.stores.test_django_models import MODES, processing, tables
from tests.support.callers import answer_of
from tests.support.django_project.start import execute

from tests.support.django_project.bank.models import Account, Entry, Ticket  # isort: skip - after Django is set up
from tests.support.django_project.bank.shapes import Choosy, Marked, Updated  # isort: skip

if TYPE_CHECKING:
    from pathlib import Path


def add(row: Any, number: int) -> int:
    row.number += number
    return int(row.number)


def delete(row: Any) -> str:
    row.delete()
    return "deleted"


@pytest.mark.parametrize(("server", "mode"), MODES)
@pytest.mark.parametrize("model", [Marked, Updated])
def test_what_was_changed_before_a_deletion_that_only_marks_the_row_is_saved(
    model: Any, server: str, mode: Any, tmp_path: Path
) -> None:
    with tables(server, tmp_path, model) as alias:
        row = model.objects.using(alias).create()
        with processing(model, alias, mode=mode) as processor:
            operations = (partial(add, number=1), delete, partial(add, number=2))
            callers = [gevent.spawn(processor.run, row.pk, operation) for operation in operations]
            assert [caller.get() for caller in callers] == [1, "deleted", 3]
        row = model.objects.using(alias).get()
        assert (row.number, row.deleted) == (3, True)


def test_a_trigger_that_keeps_a_copy_of_what_is_deleted_finds_what_was_changed_before(tmp_path: Path) -> None:
    with tables("postgresql", tmp_path, Choosy, Account, Entry) as alias:
        row = Choosy.objects.using(alias).create(number=1)
        execute(
            alias,
            "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN INSERT INTO bank_entry (text) VALUES (OLD.number::text); RETURN NULL; END $$",
        )
        execute(alias, "CREATE TRIGGER keep AFTER DELETE ON bank_choosy FOR EACH ROW EXECUTE FUNCTION keep()")
        with processing(Choosy, alias) as processor:
            callers = [gevent.spawn(processor.run, row.pk, one) for one in (partial(add, number=1), delete)]
            assert [caller.get() for caller in callers] == [2, "deleted"]
        assert not Choosy.objects.using(alias).exists()
        assert [entry.text for entry in Entry.objects.using(alias).all()] == ["2"]


@pytest.mark.parametrize(("server", "mode"), MODES)
def test_a_save_that_chooses_to_write_nothing_is_the_error_of_the_operation_that_brought_it(
    server: str, mode: Any, tmp_path: Path
) -> None:
    with tables(server, tmp_path, Choosy) as alias:
        row = Choosy.objects.using(alias).create()
        with processing(Choosy, alias, mode=mode) as processor:
            operations = [partial(add, number=number) for number in (1, 100, 2)]
            callers = [gevent.spawn(answer_of, processor.run, row.pk, operation) for operation in operations]
            first, second, third = (caller.get() for caller in callers)
        assert (first, third) == (1, 3)
        assert isinstance(second, RuntimeError)
        assert "save() of Choosy has written nothing" in str(second)
        assert Choosy.objects.using(alias).get().number == 3


def test_who_marks_the_transaction_for_rollback_is_not_told_of_an_error_of_somebody_else(tmp_path: Path) -> None:
    def fail(resource: object) -> None:
        with suppress(IntegrityError):
            for _ in range(2):
                Ticket.objects.using(alias).create(number=1)

    def mark(_: object) -> None:
        with suppress(KeyError), transaction.atomic(using=alias, savepoint=False):
            raise KeyError("own")

    with tables("sqlite", tmp_path, Choosy, Ticket) as alias:
        row = Choosy.objects.using(alias).create(number=1)
        with processing(Choosy, alias) as processor:
            assert isinstance(answer_of(processor.run, row.pk, fail), IntegrityError)
            assert "marked for rollback" in str(answer_of(processor.run, row.pk, mark))

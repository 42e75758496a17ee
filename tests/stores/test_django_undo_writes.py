"""An operation on a Django model that raises behind something it has written: undone by a savepoint, without a load."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import DatabaseError, IntegrityError, connections, transaction
from django.db.backends.utils import CursorWrapper

from geventbatch import Processor
from geventbatch.stores import DjangoStore
from geventbatch.stores._sql import bounds
from tests.support.callers import answer_of
from tests.support.django_accounts import MARIADB, account_in, opening
from tests.support.django_project.start import execute
from tests.support.servers import wait_until

from tests.support.django_project.bank.models import Account, Entry  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


class Refused(Exception):
    pass


alias = opening("postgresql", MARIADB)
anywhere = opening("sqlite", "postgresql", MARIADB)


def run_all(alias: str, operations: Sequence[Callable[[Any], object]], **options: Any) -> tuple[list[Any], int]:
    """Their answers in one batch, and how often it was loaded."""
    of_store = {name: options.pop(name) for name in ("mode", "missing", "pipeline") if name in options}
    store: DjangoStore[Account] = DjangoStore(Account, by="name", using=alias, **of_store)
    with Processor(open_resource=store, **{"min_duration": 0.05, "max_duration": 30, **options}) as processor:
        metrics = processor.subscribe_batch_metrics()
        callers = [gevent.spawn(answer_of, processor.run, "a", operation) for operation in operations]
        answers = [caller.get() for caller in callers]
    (metric,) = metrics
    return answers, metric.attempts


def add(resource: Any) -> int:
    resource.balance += 1
    resource.document["seats"].append(resource.balance)
    return int(resource.balance)


def write(text: str) -> Callable[[Any], int]:
    def operation(resource: Any) -> int:
        Entry.objects.using(resource._state.db).create(text=text, account_id=resource.pk)
        return add(resource)

    return operation


def write_and_raise(resource: Any) -> None:
    write("raised")(resource)
    raise Refused


def raise_only(resource: Any) -> None:
    add(resource)
    raise Refused


def read_and_raise(resource: Any) -> None:
    Entry.objects.using(resource._state.db).count()
    raise_only(resource)


def texts(alias: str) -> list[str]:
    return list(Entry.objects.using(alias).values_list("text", flat=True).order_by("pk"))


def check(alias: str, answers: Sequence[object], kinds: Sequence[object]) -> None:
    """Those that returned have counted, and nobody else."""
    assert [type(answer) if isinstance(answer, Exception) else answer for answer in answers] == list(kinds)
    good = [answer for answer in answers if isinstance(answer, int)]
    found = Account.objects.using(alias).get(name="a")
    assert (found.balance, found.document) == (len(good), {"seats": [1, 2, *good]})


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("pipeline", [True, False])
def test_half_of_the_operations_may_write_and_raise_for_one_more_load(anywhere: str, mode: str, pipeline: bool) -> None:
    good = [write(f"good {number}") for number in range(20)]
    operations = [one for pair in zip([write_and_raise] * 20, good, strict=True) for one in pair]
    answers, loads = run_all(anywhere, operations, mode=mode, pipeline=pipeline)
    check(anywhere, answers, [one for number in range(1, 21) for one in (Refused, number)])
    assert texts(anywhere) == [f"good {number}" for number in range(20)]
    assert loads == 2


def test_what_an_earlier_operation_wrote_stays_once_where_a_later_one_raises(anywhere: str) -> None:
    operations = [add, write("1"), raise_only, add, raise_only, write("2"), read_and_raise, add]
    answers, loads = run_all(anywhere, operations)
    check(anywhere, answers, [1, 2, Refused, 3, Refused, 4, Refused, 5])
    assert texts(anywhere) == ["1", "2"]
    assert loads == 2


def test_who_reads_only_or_has_taken_back_what_it_wrote_costs_no_load(anywhere: str) -> None:
    def try_and_raise(resource: Any) -> None:
        with suppress(KeyError), transaction.atomic(using=anywhere):
            write("taken back")(resource)
            raise KeyError
        raise Refused

    operations = [read_and_raise, add, try_and_raise, read_and_raise, add, try_and_raise, add]
    answers, loads = run_all(anywhere, operations)
    check(anywhere, answers, [Refused, 1, Refused, Refused, 2, Refused, 3])
    assert (texts(anywhere), loads) == ([], 1)


def test_on_sqlite_other_writers_are_not_kept_out_before_an_operation_writes(tmp_path: Path) -> None:
    writing: list[str] = []

    def write_elsewhere(resource: Any) -> int:
        gevent.spawn(write_beside).join()
        return 0

    def write_beside() -> None:
        try:
            writing.append("tried")
            Entry.objects.using(alias).create(text=f"beside {len(writing)}")
        finally:
            connections[alias].close()

    with account_in("sqlite", tmp_path) as alias:
        answers, loads = run_all(alias, [add, read_and_raise, write_elsewhere, write_and_raise, add])
        check(alias, [*answers[:2], *answers[3:]], [1, Refused, Refused, 2])
        assert (texts(alias), loads) == (["beside 1", "beside 2"], 2)


def test_a_statement_that_fails_costs_no_load_where_savepoints_are_taken(anywhere: str) -> None:
    alias = anywhere

    def fail(resource: Any) -> None:
        add(resource)
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT nothing FROM nowhere")

    def swallow(resource: Any) -> int:
        with suppress(DatabaseError):
            fail(resource)
        return add(resource)

    def repeat(resource: Any) -> None:
        write("1")(resource)

    operations = [write_and_raise, write("1"), fail, add, fail, repeat, read_and_raise, write("2"), fail, add]
    answers, loads = run_all(alias, operations)
    kinds = [Refused, 1, _failure(answers[2]), 2, _failure(answers[4]), IntegrityError, Refused, 3]
    check(alias, answers, [*kinds, _failure(answers[8]), 4])
    assert (texts(alias), loads) == (["1", "2"], 2)


def _failure(answer: object) -> object:
    assert isinstance(answer, DatabaseError)
    return type(answer)


@pytest.mark.parametrize("pipeline", [True, False])
def test_only_operations_that_send_something_cost_statements(tmp_path: Path, sent: list[str], pipeline: bool) -> None:
    with account_in("postgresql", tmp_path) as alias:
        operations = [write_and_raise, add, add, raise_only, add, write("1"), raise_only, read_and_raise, add]
        answers, loads = run_all(alias, operations, pipeline=pipeline)
        check(alias, answers, [Refused, 1, 2, Refused, 3, 4, Refused, Refused, 5])
    begun = [number for number, statement in enumerate(sent) if " FOR NO KEY UPDATE" in statement]
    assert (loads, len(begun)) == (2, 2)
    words = [statement.split()[0] for statement in sent[begun[1] + 1 :]]
    behind = words[: words.index("UPDATE")]
    first = ["SAVEPOINT", "INSERT", "ROLLBACK", "INSERT"]  # the savepoint that there is will do
    assert [word for word in behind if word not in {"BEGIN", "SET"}] == [*first, "RELEASE", "SAVEPOINT", "SELECT"]


def test_a_savepoint_goes_in_the_message_of_the_first_statement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    execute = CursorWrapper._execute  # type: ignore[attr-defined]

    def remember(self: Any, sql: Any, *args: Any) -> Any:
        messages.append(str(sql))
        return execute(self, sql, *args)

    monkeypatch.setattr(CursorWrapper, "_execute", remember)
    with account_in("postgresql", tmp_path) as alias:
        run_all(alias, [write_and_raise, add, write("1"), read_and_raise])
    taken = [one for one in messages if "SAVEPOINT" in one and "ROLLBACK" not in one]
    assert ["INSERT" in one or "SELECT" in one for one in taken] == [True, True]


def test_an_operation_finds_its_statements_as_ever_where_a_savepoint_goes_before(alias: str) -> None:
    seen: list[tuple[str, Any]] = []

    def watch(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        seen.append((sql, params))
        return execute(sql, params, many, context)

    def read(resource: Any) -> Any:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT %s + 1, '100 %%'", [1])
            return cursor.fetchall(), cursor.rowcount, [column[0] for column in cursor.description][:0]

    def watched(resource: Any) -> None:
        with connections[alias].execute_wrapper(watch):
            read(resource)
            write("1")(resource)

    def stream(resource: Any) -> list[str]:
        return [one.text for one in Entry.objects.using(alias).order_by("pk").iterator(chunk_size=1)]

    def many(resource: Any) -> None:
        with connections[alias].cursor() as cursor:
            cursor.executemany("INSERT INTO bank_entry (text) VALUES (%s)", [["2"], ["3"]])

    answers, _ = run_all(alias, [write_and_raise, read, watched, many, stream, write_and_raise, stream])
    assert answers[1] == ([(2, "100 %")] if connections[alias].vendor == "postgresql" else ((2, "100 %"),), 1, [])
    assert answers[4] == answers[6] == ["1", "2", "3"]
    (query, params), (insert, _) = seen[-2:]
    assert (bounds.without_prefix(query), params) == ("SELECT %s + 1, '100 %%'", [1])
    assert bounds.without_prefix(insert).startswith("INSERT INTO")


def test_blocks_of_an_operations_own_are_undone_with_it(anywhere: str) -> None:
    def in_blocks(resource: Any) -> None:
        with transaction.atomic(using=anywhere):
            write("outer")(resource)
            with suppress(KeyError), transaction.atomic(using=anywhere):
                write("inner")(resource)
                raise KeyError
        raise Refused

    def leave_open(resource: Any) -> None:
        transaction.atomic(using=anywhere).__enter__()
        write("left open")(resource)

    operations = [write_and_raise, in_blocks, write("1"), leave_open, in_blocks, add, leave_open, write("2")]
    answers, loads = run_all(anywhere, operations)
    assert [isinstance(answer, Exception) for answer in answers] == [True, True, False, True, True, False, True, False]
    assert (answers[2], answers[5], answers[7], texts(anywhere), loads) == (1, 2, 3, ["1", "2"], 2)


def test_a_block_without_a_savepoint_that_raises_costs_no_load_where_savepoints_are_taken(anywhere: str) -> None:
    def mark(resource: Any) -> None:
        with transaction.atomic(using=anywhere, savepoint=False):
            raise_only(resource)

    operations = [write_and_raise, mark, add, mark, write("1"), mark, add, mark]
    answers, loads = run_all(anywhere, operations)
    check(anywhere, answers, [Refused, Refused, 1, Refused, 2, Refused, 3, Refused])
    assert (texts(anywhere), loads) == (["1"], 2)


def test_hooks_of_who_returned_are_called_once_and_no_others(anywhere: str) -> None:
    called: list[str] = []

    def hook(text: str, operation: Callable[[Any], object]) -> Callable[[Any], object]:
        def registering(resource: Any) -> object:
            transaction.on_commit(partial(called.append, text), using=anywhere)
            return operation(resource)

        return registering

    operations = [
        *(hook("1", add), hook("no", raise_only), hook("2", add), hook("no", raise_only), hook("no", raise_only)),
        *(hook("3", write("1")), hook("no", write_and_raise), hook("no", raise_only), hook("4", add)),
    ]
    answers, _ = run_all(anywhere, operations)
    check(anywhere, answers, [1, Refused, 2, Refused, Refused, 3, Refused, Refused, 4])
    wait_until(lambda: len(called) >= 4)
    assert called == ["1", "2", "3", "4"]


def test_what_a_save_refuses_is_found_behind_savepoints_too(alias: str) -> None:
    bad = "note <> 'bad'"
    checked = f"CHECK ({bad})" if connections[alias].vendor == "postgresql" else f"CONSTRAINT checked CHECK ({bad})"
    execute(alias, f"ALTER TABLE bank_account ADD {checked}")

    def spoil(resource: Any) -> None:
        add(resource)
        resource.note = "bad"

    def spoil_and_raise(resource: Any) -> None:
        spoil(resource)
        raise Refused

    operations = [write_and_raise, write("1"), spoil, add, spoil_and_raise, spoil, write_and_raise, write("2"), spoil]
    answers, loads = run_all(alias, operations)
    kinds = [Refused, 1, IntegrityError, 2, Refused, IntegrityError, Refused, 3, IntegrityError]
    check(alias, answers, kinds)
    assert texts(alias) == ["1", "2"]
    assert loads <= 5


def test_a_new_resource_is_brought_back_to_what_it_was_made_of(anywhere: str) -> None:
    Account.objects.using(anywhere).all().delete()

    def forget(resource: Any) -> None:
        resource.name, resource.pk = "other", 99
        raise Refused

    operations = [forget, raise_only, add, forget, raise_only, add]
    document = {"seats": [1, 2]}
    answers, loads = run_all(anywhere, operations, missing=lambda name: Account(name=name, document=document))
    check(anywhere, answers, [Refused, Refused, 1, Refused, Refused, 2])
    assert loads == 1


@contextmanager
def in_a_block(alias: str) -> Iterator[None]:
    with transaction.atomic(using=alias):
        yield


def test_alone_in_a_block_who_raises_takes_back_its_own_and_leaves_the_hooks_of_the_block(anywhere: str) -> None:
    called: list[str] = []
    store: DjangoStore[Account] = DjangoStore(Account, by="name", using=anywhere, allow_atomic=True)
    with Processor(open_resource=store, batching=False) as processor, in_a_block(anywhere):
        transaction.on_commit(partial(called.append, "block"), using=anywhere)
        assert processor.run("a", add) == 1
        for operation in (raise_only, write_and_raise):
            with pytest.raises(Refused):
                processor.run("a", operation)
        assert processor.run("a", write("1")) == 2
    assert (called, texts(anywhere)) == (["block"], ["1"])


def test_a_batch_whose_row_was_changed_by_somebody_else_applies_those_again_that_raised(tmp_path: Path) -> None:
    runs: list[int] = []

    def change_elsewhere(resource: Any) -> int:
        runs.append(resource.balance)
        if len(runs) == 1:
            gevent.spawn(change, alias).join()
        return add(resource)

    def change(alias: str) -> None:
        try:
            Account.objects.using(alias).filter(name="a").update(balance=100)
        finally:
            connections[alias].close()

    def refuse_the_poor(resource: Any) -> int:
        resource.balance -= 50
        if resource.balance < 0:
            raise Refused
        return int(resource.balance)

    with account_in("postgresql", tmp_path) as alias:
        operations = [add, refuse_the_poor, change_elsewhere, refuse_the_poor, add]
        answers, _ = run_all(alias, operations, mode="version")
        assert answers == [101, 51, 52, 2, 3]

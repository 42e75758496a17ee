"""What operations on a Django model may do in the transaction that they share, and what is refused to each of them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import DatabaseError, connections, transaction
from django.db.transaction import TransactionManagementError
from gevent.event import Event

from tests.support.callers import answer_of
from tests.support.django_accounts import MARIADB, account, account_in, deposit, entries, opening, processing, together
from tests.support.django_project.start import database

from tests.support.django_project.bank.models import Account, Entry, Outcome  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


alias = opening("sqlite", "postgresql", MARIADB)
postgres = opening("postgresql")


def between(alias: str, operation: Callable[[Account], object], **options: Any) -> list[Any]:
    """The answers of two deposits and of *operation* between them; the deposits are saved."""
    with processing(alias, min_duration=0.01, **options) as processor:
        answers = together(processor, lambda a: deposit(a, 1), operation, lambda a: deposit(a, 1))
    assert (answers[0], answers[2], account(alias).balance) == (1, 2, 2), answers
    return answers


def send(alias: str, statement: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute(statement)


def send_to(alias: str, statement: str, resource: Account) -> None:
    send(alias, statement)


# -- what an operation has written that raises -------------------------------------------------------------------


def write_and_raise(resource: Account) -> None:
    Entry.objects.using(resource._state.db).create(text="of nobody")
    raise ValueError("not enough")


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("clean_errors", [(), (Exception,)])
def test_what_an_operation_wrote_that_raised_is_not_committed_with_the_others(
    alias: str, mode: str, clean_errors: Any
) -> None:
    answers = between(alias, write_and_raise, mode=mode, clean_errors=clean_errors)
    assert isinstance(answers[1], ValueError)
    assert entries(alias) == []


@pytest.mark.parametrize("batching", [True, False])
def test_what_an_operation_wrote_that_raised_is_not_committed_with_its_idempotency_key(
    alias: str, batching: bool
) -> None:
    with processing(alias, batching=batching, idempotency=Outcome, clean_errors=(Exception,)) as processor:
        for _ in range(2):
            told = answer_of(processor.run, "a", write_and_raise, idempotency_key="k")
            assert str(told) == "not enough"
    assert entries(alias) == []


def test_a_change_by_a_statement_of_an_operation_that_raised_is_not_committed(alias: str) -> None:
    make(alias, "b")

    def transfer(resource: Account) -> None:
        Account.objects.using(alias).filter(name="b").update(balance=5)
        raise KeyError

    answers = between(alias, transfer, clean_errors=(KeyError,))
    assert isinstance(answers[1], KeyError)
    assert Account.objects.using(alias).get(name="b").balance == 0


def test_what_an_operation_wrote_in_a_block_of_its_own_that_it_left_by_raising_costs_no_replay(alias: str) -> None:
    def change(resource: Account) -> None:
        with transaction.atomic(using=alias):
            write_and_raise(resource)

    with processing(alias, clean_errors=(ValueError,), min_duration=0.05) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, lambda a: deposit(a, 1), change)
    assert isinstance(answers[1], ValueError)
    assert [metric.attempts for metric in metrics] == [1]
    assert (entries(alias), account(alias).balance) == ([], 1)


def test_an_operation_that_only_reads_and_raises_costs_no_replay(alias: str) -> None:
    def look(resource: Account) -> None:
        raise LookupError(Entry.objects.using(alias).count())

    with processing(alias, clean_errors=(LookupError,), min_duration=0.05) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, lambda a: deposit(a, 1), look)
    assert isinstance(answers[1], LookupError)
    assert [metric.attempts for metric in metrics] == [1]


def test_an_operation_that_raises_is_not_blamed_for_what_those_before_it_wrote(alias: str) -> None:
    def write(resource: Account) -> None:
        Entry.objects.using(alias).create(text="of somebody")

    def refuse(resource: Account) -> None:
        raise KeyError

    with processing(alias, clean_errors=(KeyError,), min_duration=0.05) as processor:
        metrics = processor.subscribe_batch_metrics()
        assert isinstance(together(processor, write, refuse)[1], KeyError)
    assert [metric.attempts for metric in metrics] == [1]
    assert entries(alias) == ["of somebody"]


def test_rows_that_are_copied_by_an_operation_that_raised_are_not_committed(postgres: str) -> None:
    def copy_rows(resource: Account) -> None:
        with (
            connections[postgres].cursor() as cursor,
            cursor.copy("COPY bank_entry (text) FROM STDIN") as copying,
        ):
            copying.write_row(["copied"])

    def copy_and_raise(resource: Account) -> None:
        copy_rows(resource)
        raise KeyError

    assert isinstance(between(postgres, copy_and_raise, clean_errors=(KeyError,)), list)
    assert entries(postgres) == []
    with processing(postgres) as processor:
        processor.run("a", copy_rows)
    assert entries(postgres) == ["copied"]


@pytest.mark.mariadb
def test_what_a_procedure_wrote_for_an_operation_that_raised_is_not_committed(tmp_path: Path) -> None:
    with account_in("mariadb", tmp_path) as alias:
        send(alias, "CREATE PROCEDURE write_entry() INSERT INTO bank_entry (text) VALUES ('of a procedure')")

        def call(resource: Account) -> None:
            with connections[alias].cursor() as cursor:
                cursor.callproc("write_entry")
            raise KeyError

        between(alias, call, clean_errors=(KeyError,))
        assert entries(alias) == []


# -- what ends the transaction, or leaves it half ended ----------------------------------------------------------


def leave_open(resource: Account) -> None:
    transaction.atomic(using=resource._state.db).__enter__()


def leave_open_without_a_savepoint(resource: Account) -> None:
    transaction.atomic(using=resource._state.db, savepoint=False).__enter__()


def end_the_batchs(resource: Account) -> None:
    transaction.atomic(using=resource._state.db).__exit__(None, None, None)


def commit(resource: Account) -> None:
    transaction.commit(using=resource._state.db)


def roll_back(resource: Account) -> None:
    transaction.rollback(using=resource._state.db)


def close(resource: Account) -> None:
    connections[str(resource._state.db)].close()


def close_all(resource: Account) -> None:
    connections.close_all()


def autocommit(resource: Account) -> None:
    transaction.set_autocommit(True, using=resource._state.db)


def mark_for_rollback(resource: Account) -> None:
    transaction.set_rollback(True, using=resource._state.db)


def mark_for_rollback_by_hand(resource: Account) -> None:
    connections[str(resource._state.db)].needs_rollback = True


def commit_as_text(resource: Account) -> None:
    send(str(resource._state.db), "COMMIT")


def roll_back_as_text(resource: Account) -> None:
    send(str(resource._state.db), "/* undo */ rollback")


def swallow(resource: Account) -> None:
    alias = str(resource._state.db)
    with pytest.raises(DatabaseError):
        Entry.objects.using(alias).create(text=None)


BREAKING = [
    leave_open,
    leave_open_without_a_savepoint,
    end_the_batchs,
    commit,
    roll_back,
    close,
    close_all,
    autocommit,
    mark_for_rollback,
    mark_for_rollback_by_hand,
    commit_as_text,
    roll_back_as_text,
    swallow,
]


@pytest.mark.parametrize("writes", [False, True])
def test_what_ends_or_breaks_the_transaction_is_refused_to_its_own_operation_only(alias: str, writes: bool) -> None:
    def change(resource: Account, operation: Callable[[Account], object]) -> None:
        if writes:
            Entry.objects.using(alias).create(text="of nobody")
        operation(resource)

    for operation in BREAKING:
        Account.objects.using(alias).update(balance=0)
        error = between(alias, partial(change, operation=operation))[1]
        assert isinstance(error, (RuntimeError, DatabaseError, TransactionManagementError)), (operation, error)
        assert entries(alias) == []
        with processing(alias) as processor:
            assert processor.run("a", deposit, 1) == 3


def test_what_ends_or_breaks_the_transaction_and_is_swallowed_costs_nobody_else_anything(alias: str) -> None:
    def change(resource: Account, operation: Callable[[Account], object]) -> int:
        with suppress(Exception):
            operation(resource)
        return deposit(resource, 10)

    for operation in BREAKING:
        Account.objects.using(alias).update(balance=0)
        with processing(alias, min_duration=0.01) as processor:
            between = partial(change, operation=operation)
            answers = together(processor, lambda a: deposit(a, 1), between, lambda a: deposit(a, 1))
        assert all(isinstance(answer, int) for answer in answers[::2]), (operation, answers)
        assert account(alias).balance == (12 if isinstance(answers[1], int) else 2), operation


def test_what_ends_or_breaks_the_transaction_is_refused_alone_too_and_leaves_its_callers_block_whole(
    alias: str,
) -> None:
    with processing(alias, batching=False) as processor:
        for operation in BREAKING:
            Account.objects.using(alias).update(balance=0)
            assert isinstance(answer_of(processor.run, "a", operation), Exception), operation
            assert processor.run("a", deposit, 1) == 1
            with transaction.atomic(using=alias):
                assert isinstance(answer_of(processor.run, "a", operation), Exception), operation
                assert processor.run("a", deposit, 1) == 2
            assert account(alias).balance == 2


def commit_below(alias: str) -> None:
    raw: Any = connections[alias].connection
    raw.commit()


def roll_back_below(alias: str) -> None:
    raw: Any = connections[alias].connection
    raw.rollback()


@pytest.mark.parametrize("server", ["sqlite", "postgresql"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_what_the_drivers_own_connection_ends_is_not_taken_for_saved(
    tmp_path: Path, *, server: str, goes_on: bool
) -> None:
    with account_in(server, tmp_path) as alias:
        for end in (roll_back_below, commit_below):

            def change(resource: Account, end: Callable[[str], None] = end) -> None:
                Entry.objects.using(alias).create(text="before")
                end(alias)
                if goes_on:
                    Entry.objects.using(alias).create(text="behind")

            Account.objects.using(alias).update(balance=0)
            error = between(alias, change)[1]
            assert isinstance(error, RuntimeError)
            assert "ended the transaction of its batch" in str(error)
            assert entries(alias) == (["before"] if end is commit_below else [])


def test_a_block_that_is_left_open_is_refused_by_name(alias: str) -> None:
    error = between(alias, leave_open)[1]
    assert isinstance(error, RuntimeError)
    assert "an operation on 'a' left a block of atomic() open" in str(error)


def test_a_connection_that_is_closed_is_refused_by_name(alias: str) -> None:
    error = between(alias, close)[1]
    assert isinstance(error, RuntimeError)
    assert "an operation on 'a' called close() on the connection of its batch" in str(error)
    assert str(error).endswith(". Nothing of this operation was saved")


def test_a_savepoint_that_is_never_released_is_as_harmless_as_alone(alias: str) -> None:
    def change(resource: Account) -> None:
        connections[alias].savepoint()
        Entry.objects.using(alias).create(text="kept")

    assert between(alias, change)[1] is None
    assert entries(alias) == ["kept"]


def test_a_savepoint_of_ones_own_is_rolled_back_to(alias: str) -> None:
    def change(resource: Account) -> None:
        mine = connections[alias].savepoint()
        Entry.objects.using(alias).create(text="undone")
        connections[alias].savepoint_rollback(str(mine))
        connections[alias].savepoint_commit(str(mine))

    assert between(alias, change)[1] is None
    assert entries(alias) == []


def test_the_savepoint_of_another_operation_cannot_be_rolled_back_to(alias: str) -> None:
    taken: list[Any] = []

    def take(resource: Account) -> None:
        taken[:] = [connections[alias].savepoint()]
        Entry.objects.using(alias).create(text="kept")

    def roll_back(resource: Account) -> None:
        transaction.savepoint_rollback(taken[0], using=alias)

    with processing(alias, min_duration=0.05) as processor:
        answers = together(processor, take, roll_back)
    assert answers[0] is None
    assert isinstance(answers[1], RuntimeError)
    assert "which is not its own" in str(answers[1])
    assert entries(alias) == ["kept"]


def test_a_block_of_ones_own_may_be_marked_for_rollback(alias: str) -> None:
    def change(resource: Account) -> None:
        with transaction.atomic(using=alias):
            Entry.objects.using(alias).create(text="undone")
            transaction.set_rollback(True, using=alias)

    assert between(alias, change)[1] is None
    assert entries(alias) == []


@pytest.mark.mariadb
def test_a_statement_that_makes_mysql_commit_is_refused_to_its_own_operation(tmp_path: Path) -> None:
    with account_in("mariadb", tmp_path) as alias:
        error = between(alias, lambda _: send(alias, "CREATE TABLE beside (n int)"))[1]
        assert isinstance(error, RuntimeError)
        assert "makes MySQL commit" in str(error)


# -- what is set in the session ----------------------------------------------------------------------------------


SETTING = (
    "SET statement_timeout = 0",
    "SELECT set_config('my.tenant', 'x', false)",
    "SET LOCAL my.tenant = 'x'",
    "SET ROLE NONE",
    "CREATE TEMPORARY TABLE mine (n int)",
    "SELECT pg_advisory_lock(1)",
    "LISTEN news",
    "PREPARE mine AS SELECT 1",
    "BEGIN",
    "SAVEPOINT mine",
    "SELECT 1; COMMIT; BEGIN",
)


def test_what_would_reach_another_operation_in_the_session_is_refused_by_name(postgres: str) -> None:
    for statement in SETTING:
        Account.objects.using(postgres).update(balance=0)
        error = between(postgres, partial(send_to, postgres, statement))[1]
        assert isinstance(error, RuntimeError), statement
        assert "an operation on 'a' was refused a statement" in str(error)


def test_a_statement_composed_by_psycopg_is_looked_at_too(postgres: str) -> None:
    from psycopg import sql

    def change(resource: Account) -> None:
        with connections[postgres].cursor() as cursor:
            cursor.execute(sql.SQL("SET {} = 1").format(sql.Identifier("my", "tenant")))

    assert isinstance(between(postgres, change)[1], RuntimeError)


def test_a_pragma_that_sets_something_is_refused_by_name(tmp_path: Path) -> None:
    with account_in("sqlite", tmp_path) as alias:
        assert isinstance(between(alias, lambda _: send(alias, "PRAGMA foreign_keys = OFF"))[1], RuntimeError)


def test_what_is_set_on_the_connection_itself_does_not_reach_the_next_operation(alias: str) -> None:
    seen: list[str] = []

    def see(execute: Any, sql: str, *call: Any) -> Any:
        seen.append(sql)
        return execute(sql, *call)

    def set_things(resource: Account) -> None:
        connection: Any = connections[alias]
        connection.execute_wrappers.append(see)
        connection.force_debug_cursor = True
        connection.settings_dict["TIME_ZONE"] = "Asia/Tokyo"
        connection.of_the_operation = 1

    def look(resource: Account) -> tuple[Any, ...]:
        connection: Any = connections[alias]
        count = Entry.objects.using(alias).count()
        return (
            count,
            connection.force_debug_cursor,
            connection.settings_dict["TIME_ZONE"],
            connection.timezone_name,
            hasattr(connection, "of_the_operation"),
        )

    with processing(alias, min_duration=0.05) as processor:
        answers = together(processor, set_things, look, lambda a: deposit(a, 1))
        assert answers == [None, (0, False, None, "UTC", False), 1]
        assert processor.run("a", look) == (0, False, None, "UTC", False)
    assert seen == []


def test_a_wrapper_of_an_operations_own_sees_its_statements(alias: str) -> None:
    def count(resource: Account) -> int:
        seen: list[str] = []

        def see(execute: Any, sql: str, *call: Any) -> Any:
            seen.append(sql)
            return execute(sql, *call)

        with connections[alias].execute_wrapper(see):
            Entry.objects.using(alias).count()
        return len(seen)

    assert between(alias, count)[1] == 1


# -- other databases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [True, False])
def test_a_write_to_another_database_is_refused_to_its_own_operation_and_a_read_is_not(
    tmp_path: Path, batching: bool
) -> None:
    with (
        account_in("sqlite", tmp_path) as alias,
        database(f"sqlite:///{tmp_path / 'other.sqlite'}") as other,
    ):

        def write(resource: Account) -> None:
            Entry.objects.using(other).create(text="elsewhere")

        def write_in_a_block(resource: Account) -> None:
            with transaction.atomic(using=other):
                write(resource)

        with processing(alias, batching=batching) as processor:
            assert processor.run("a", lambda _: Entry.objects.using(other).count()) == 0
            for operation in (write, write_in_a_block):
                error = answer_of(processor.run, "a", operation)
                assert isinstance(error, RuntimeError)
                assert f"would write to the database {other!r}" in str(error)
            assert processor.run("a", deposit, 1) == 1
        assert entries(other) == []
        write(account(alias))  # outside of a batch it is as ever
        assert entries(other) == ["elsewhere"]


# -- the server --------------------------------------------------------------------------------------------------


def make(alias: str, *names: str) -> None:
    Account.objects.using(alias).bulk_create([Account(name=name) for name in names])


@pytest.mark.mariadb
@pytest.mark.parametrize("in_a_block", [False, True])
def test_a_transaction_that_mysql_has_ended_is_replayed_though_the_operation_swallowed_it(
    tmp_path: Path, in_a_block: bool
) -> None:
    with account_in("mariadb", tmp_path) as alias:
        make(alias, "b", "c")
        started: list[gevent.Greenlet[..., Any]] = []
        held = Event()
        runs: list[int] = []

        def hold_c_then_a() -> None:
            try:
                with transaction.atomic(using=alias):
                    rows = Account.objects.using(alias)
                    for number in range(50):  # so that it is the other one that is rolled back
                        rows.create(name=f"n{number}")
                    rows.filter(name="c").update(note="held")
                    held.set()
                    rows.filter(name="a").update(note="held")
            finally:
                connections[alias].close()

        def change(resource: Account) -> int:
            runs.append(resource.balance)
            if not started:
                started.append(gevent.spawn(hold_c_then_a))
                held.wait()
            try:
                if in_a_block:
                    with transaction.atomic(using=alias):
                        Account.objects.using(alias).filter(name="c").update(balance=1)
                else:
                    Account.objects.using(alias).filter(name="c").update(balance=1)
            except DatabaseError:
                pass
            return deposit(resource, 1)

        with processing(alias, min_duration=0.05) as processor:
            assert together(processor, lambda a: deposit(a, 1), change) == [1, 2]
        started[0].get()
        assert runs == [1, 1]
        assert (account(alias).balance, Account.objects.using(alias).get(name="c").balance) == (2, 1)

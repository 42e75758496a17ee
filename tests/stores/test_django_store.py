"""What is DjangoStore's own, beside the contract of all stores (tests/stores/test_stores.py)."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import IntegrityError, OperationalError, connections, transaction
from django.db.backends.signals import connection_created
from django.db.models import F
from django.db.models.signals import post_save
from gevent.event import Event

from geventbatch import BatchTimeout, IdempotencyKeyReused, LoadFailed, Processor, current_batch
from geventbatch._core import process
from geventbatch.stores import DjangoStore
from geventbatch.stores.django import _connections
from geventbatch.stores.django._connections import close_idle
from tests.support.callers import answer_of
from tests.support.django_accounts import (
    account,
    account_in,
    deposit,
    open_connections,
    opening,
    processing,
    together,
)
from tests.support.django_project.start import database, endpoint, options_of, place
from tests.support.proxy import Proxy
from tests.support.servers import bound_early, wait_until

from geventbatch.integrations.django.models import OutcomeIdField, OutcomeModel  # isort: skip - after Django is set up
from tests.support.django_project.bank.models import Account, Audited, Entry, Outcome, Savings, Ticket  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from django.db.models import Model

SERVERS = ("sqlite", "postgresql")


alias = opening(*SERVERS)
postgres = opening("postgresql")


# -- what is written ---------------------------------------------------------------------------------------------


def test_only_changed_columns_are_written_and_those_that_follow_the_clock(alias: str, sent: list[str]) -> None:
    before = account(alias)
    with processing(alias) as processor:
        sent.clear()
        processor.run("a", deposit, 5)
    (update,) = [statement for statement in sent if statement.startswith("UPDATE")]
    assert re.findall(r'"(\w+)" = ', update.partition(" WHERE ")[0]) == ["balance", "changed_at"]
    assert account(alias).changed_at > before.changed_at


def test_a_document_that_is_changed_in_place_is_written(alias: str) -> None:
    with processing(alias) as processor:
        processor.run("a", lambda resource: resource.document["seats"].append(3))
    assert account(alias).document == {"seats": [1, 2, 3]}


def test_a_number_that_becomes_another_kind_of_one_in_a_document_is_written(alias: str) -> None:
    def change(resource: Account) -> None:
        resource.document["seats"][0] = True  # which is equal to 1

    with processing(alias) as processor:
        processor.run("a", change)
    assert account(alias).document["seats"][0] is True


def test_a_document_that_is_a_number_and_becomes_a_truth_value_is_written(alias: str) -> None:
    def change(resource: Account) -> None:
        resource.document = resource.document == 1 or 1

    with processing(alias) as processor:
        processor.run("a", change)
        assert account(alias).document == 1
        processor.run("a", change)
    assert account(alias).document is True


def test_a_batch_that_only_reads_writes_nothing(alias: str, sent: list[str]) -> None:
    with processing(alias) as processor:
        sent.clear()
        assert processor.run("a", lambda resource: len(resource.document["seats"])) == 2
    assert [statement for statement in sent if statement.startswith(("BEGIN IMM", "INSERT", "UPDATE", "DELETE"))] == []


def test_saving_the_resource_in_operations_is_left_to_the_store(alias: str, sent: list[str]) -> None:
    def change(resource: Account) -> None:
        deposit(resource, 1)
        resource.save()

    with processing(alias, min_duration=0.05) as processor:
        together(processor, change, change, change)
    assert account(alias).balance == 3
    assert len([statement for statement in sent if statement.startswith("UPDATE")]) == 1


def test_deleting_the_resource_in_an_operation_is_left_to_the_store(alias: str) -> None:
    with processing(alias, min_duration=0.05) as processor:
        answers = together(processor, lambda resource: resource.delete(), lambda resource: resource.name)
    assert answers[0] == (1, {"bank.Account": 1})
    assert isinstance(answers[1], LoadFailed)
    assert not Account.objects.using(alias).exists()


def test_a_copy_of_the_resource_saves_as_any_other(alias: str) -> None:
    def change(resource: Account) -> None:
        for twin in (copy.copy(resource), pickle.loads(pickle.dumps(resource))):  # noqa: S301 - our own
            twin.pk = None
            twin.name += f" {Account.objects.using(alias).count()}"
            twin.save(using=alias)

    with processing(alias) as processor:
        processor.run("a", change)
    assert set(Account.objects.using(alias).values_list("name", flat=True)) == {"a", "a 1", "a 2"}


def test_a_primary_key_that_an_operation_changes_fails_its_own_operation_only(alias: str) -> None:
    def change(resource: Account) -> None:
        resource.pk = None
        resource.save()

    with processing(alias, min_duration=0.05) as processor:
        error, balance = together(processor, change, lambda a: deposit(a, 1))
    assert isinstance(error, ValueError)
    assert "primary key" in str(error)
    assert (balance, account(alias).balance) == (1, 1)


def test_the_resource_is_an_instance_of_its_model_all_the_time(alias: str) -> None:
    with processing(alias) as processor:
        outside = processor.run("a", lambda resource: (isinstance(resource, Account), repr(resource), resource))
    assert outside[:2] == (True, repr(account(alias)))
    assert type(outside[2]) is Account


def test_a_model_of_two_tables_is_written_whole_and_compared_whole(alias: str) -> None:
    Savings.objects.using(alias).create(name="s")
    store = DjangoStore(Savings, by="name", using=alias, mode="version")
    runs = []

    def change(resource: Savings) -> None:
        runs.append(resource.balance)
        if len(runs) == 1:
            gevent.spawn(foreign_deposit, alias).join()
        resource.balance += 1
        resource.rate += 1

    with Processor(open_resource=store, min_duration=0) as processor:
        processor.run("s", change)
    assert runs == [0, 100]
    assert Savings.objects.using(alias).values_list("balance", "rate").get() == (101, 1)


def foreign_deposit(alias: str, name: str = "s") -> None:
    Account.objects.using(alias).filter(name=name).update(balance=100)
    connections[alias].close()


def test_large_queries_are_read_in_pieces_by_cursors_of_the_transaction(postgres: str) -> None:
    def read(resource: Account) -> list[str]:
        return [one.name for one in Account.objects.using(postgres).select_for_update().iterator(chunk_size=1)]

    make_accounts(postgres, 3)
    with processing(postgres) as processor:
        assert sorted(processor.run("a", read)) == ["a", "n0", "n1", "n2"]


def test_an_instance_that_left_its_batch_saves_as_any_other(alias: str) -> None:
    with processing(alias) as processor:
        outside = processor.run("a", lambda resource: resource)
    outside.balance = 7
    outside.save(using=alias)
    assert account(alias).balance == 7


def test_a_save_of_the_models_own_runs_whole_and_in_the_transaction(alias: str) -> None:
    Audited.objects.using(alias).bulk_create([Audited(name="x")])
    store = DjangoStore(Audited, by="name", using=alias)

    def change(resource: Audited) -> None:
        resource.total += 1

    with Processor(open_resource=store, min_duration=0) as processor:
        processor.run("x", change)
        processor.run("x", change)
    assert list(Entry.objects.using(alias).order_by("id").values_list("text", flat=True)) == ["x 1", "x 2"]
    assert Audited.objects.using(alias).get().total == 2


def test_related_rows_are_read_and_written_in_the_transaction_of_the_batch(alias: str) -> None:
    def change(resource: Account, text: str) -> int:
        resource.entries.create(text=text)
        return resource.entries.count()

    def read_elsewhere(resource: Account) -> int:
        return gevent.spawn(count_entries, alias).get()

    with processing(alias, min_duration=0.05) as processor:
        answers = together(processor, lambda a: change(a, "x"), lambda a: change(a, "y"), read_elsewhere)
    assert answers == [1, 2, 0]
    assert count_entries(alias) == 2


def count_entries(alias: str) -> int:
    try:
        return Entry.objects.using(alias).count()
    finally:
        connections[alias].close()


def test_rows_of_several_models_are_inserted_in_one_statement_each(alias: str, sent: list[str]) -> None:
    def change(resource: Account, number: int) -> None:
        current_batch().add_row(Entry(account=resource, text=f"x{number}"))
        current_batch().add_row(Ticket(number=number))

    with processing(alias, min_duration=0.05) as processor:
        together(processor, *[lambda a, n=n: change(a, n) for n in range(5)])
    assert account(alias).entries.count() == Ticket.objects.using(alias).count() == 5
    assert len([statement for statement in sent if statement.startswith("INSERT")]) == 2


def test_what_is_no_row_fails_its_own_operation_only(alias: str) -> None:
    def change(resource: Account) -> None:
        current_batch().add_row("no row")

    with processing(alias, min_duration=0.05) as processor:
        error, balance = together(processor, change, lambda a: deposit(a, 1))
    assert isinstance(error, TypeError)
    assert "'no row'" in str(error)
    assert (balance, account(alias).balance) == (1, 1)


def test_a_value_that_its_field_refuses_fails_its_own_operation_only(alias: str) -> None:
    def change(resource: Account) -> None:
        current_batch().add_row(Ticket(number="many"))

    with processing(alias, min_duration=0.05) as processor:
        error, balance = together(processor, change, lambda a: deposit(a, 1))
    assert isinstance(error, ValueError)
    assert (balance, account(alias).balance) == (1, 1)


def test_a_constraint_that_fails_at_commit_fails_its_own_operation_only(postgres: str) -> None:
    def change(resource: Account) -> None:
        current_batch().add_row(Entry(account_id=12345, text="to nobody"))  # whose constraint is deferred

    with processing(postgres, min_duration=0.05) as processor:
        error, balance = together(processor, change, lambda a: deposit(a, 1))
    assert isinstance(error, IntegrityError)
    assert (balance, account(postgres).balance) == (1, 1)


def test_a_statement_that_failed_and_was_swallowed_fails_its_own_operation_only(postgres: str) -> None:
    def change(resource: Account) -> None:
        with connections[postgres].cursor() as cursor, pytest.raises(Exception, match="division by zero"):
            cursor.execute("SELECT 1 / 0")

    with processing(postgres, min_duration=0.05) as processor:
        error, balance = together(processor, change, lambda a: deposit(a, 1))
    assert isinstance(error, Exception)
    assert (balance, account(postgres).balance) == (1, 1)


def test_an_error_inside_an_operations_own_savepoint_leaves_the_batch_whole(alias: str) -> None:
    def change(resource: Account) -> int:
        with pytest.raises(IntegrityError), transaction.atomic(using=alias):
            Account.objects.using(alias).create(name="a")
        return deposit(resource, 1)

    with processing(alias) as processor:
        metrics = processor.subscribe_batch_metrics()
        assert processor.run("a", change) == 1
    assert [metric.attempts for metric in metrics] == [1]


def test_a_percent_sign_in_a_statement_of_djangos_stays_one(alias: str) -> None:
    store = DjangoStore(Account, by="name", using=alias, missing=lambda name: Account(name=name))
    with Processor(open_resource=store, min_duration=0) as processor:
        for _ in range(2):
            processor.run("100 %% %s %(x)s; COMMIT", change_note)
    assert Account.objects.using(alias).get(name="100 %% %s %(x)s; COMMIT").note == "50 % %s; x50 % %s; x"


def change_note(resource: Account) -> None:
    resource.note += "50 % %s; x"


def test_statements_are_logged_where_django_does(postgres: str) -> None:
    def turn_on(connection: Any, **_: object) -> None:
        connection.force_debug_cursor = True

    def read(resource: Account) -> list[dict[str, str]]:
        deposit(resource, 1)
        return connections[postgres].queries

    connection_created.connect(turn_on)
    try:
        with processing(postgres) as processor:
            processor.run("a", read)
            logged = processor.run("a", read)
    finally:
        connection_created.disconnect(turn_on)
    told = " ".join(statement["sql"] for statement in logged)  # by some releases with what was sent beside them
    assert 'UPDATE "bank_account" SET "balance" = 1' in told
    assert "FOR NO KEY UPDATE" in told


# -- versions and keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_every_save_counts_the_version_up(alias: str, mode: Any) -> None:
    Ticket.objects.using(alias).create(number=42)

    def change(resource: Ticket) -> None:
        resource.total += 1

    store = DjangoStore(Ticket, version="version", mode=mode, using=alias)
    with Processor(open_resource=store, min_duration=0) as processor:
        processor.run(42, change)
        processor.run("42", change)
        processor.run("42", lambda resource: resource.total)
    assert Ticket.objects.using(alias).values_list("version", "total").get() == (2, 2)


@pytest.mark.parametrize("key", ["x", "4.2", 4.2, True, None, b"42", ("4", "2")], ids=repr)
def test_a_key_that_its_column_cannot_have_is_refused_by_name(key: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"bank\.Ticket\.number") as raised:
        DjangoStore(Ticket).normalize_key(key)
    assert repr(key) in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "balance"}, "by is 'balance', but must name a unique field of bank.Account, or be 'pk'"),
        ({"by": "entries"}, "by is 'entries', which is no column of bank.Account"),
        ({"version": "nothing"}, "version is 'nothing', which is no column of bank.Account"),
        ({"version": "name"}, "version is 'name', but must name an integer field of bank.Account"),
        ({"mode": "optimistic"}, 'mode is \'optimistic\', but must be "lock", "version" or None'),
        (
            {"idempotency_ttl": 60},
            "idempotency_ttl is 60, but no outcomes are recorded: pass idempotency=… too",
        ),
        (
            {"missing": "make"},
            "missing is 'make', but must be \"raise\" or a callable that makes the resource of a key",
        ),
        ({"missing": dict}, "missing is the class dict, which would be called with the key: pass lambda key: dict()"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        DjangoStore(Account, **arguments)
    assert str(raised.value) == message


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a concrete model class"):
        DjangoStore(dict)  # type: ignore[type-var]


@pytest.mark.parametrize("made", [Account(name="b"), Account(), None], ids=["another key", "no key", "nothing"])
def test_a_factory_must_give_an_instance_with_the_key(alias: str, made: Any) -> None:
    store = DjangoStore(Account, by="name", using=alias, missing=lambda _: made)
    with (
        Processor(open_resource=store, min_duration=0) as processor,
        pytest.raises(LoadFailed, match="'new'") as raised,
    ):
        processor.run("new", deposit, 1)
    assert raised.value.retry_safe


# -- connections -------------------------------------------------------------------------------------------------


def make_accounts(alias: str, count: int) -> list[str]:
    names = [f"n{number}" for number in range(count)]
    Account.objects.using(alias).bulk_create([Account(name=name) for name in names])
    return names


def test_there_are_never_more_connections_than_batches_at_once(postgres: str) -> None:
    names = make_accounts(postgres, 30)
    most = 0

    def change(resource: Account) -> int:
        gevent.sleep(0.001)
        return deposit(resource, 1)

    with processing(postgres, max_batches=3) as processor:
        callers = [gevent.spawn(processor.run, name, change) for name in names * 5]
        while not all(caller.ready() for caller in callers):
            most = max(most, open_connections(postgres))
            gevent.sleep(0.002)
        assert [caller.get() for caller in callers] == [number for number in range(1, 6) for _ in names]
        assert most == open_connections(postgres) == 3
    wait_until(lambda: open_connections(postgres) == 0)  # the processor has stopped


def test_batches_one_after_the_other_share_one_connection(postgres: str) -> None:
    names = make_accounts(postgres, 20)
    with processing(postgres) as processor:
        assert {processor.run(name, backend) for name in names} == {processor.run("a", backend)}


def backend(resource: Account) -> int:
    with connections[resource._state.db or ""].cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (pid,) = cursor.fetchone() or (0,)
    return int(pid)


def test_a_connection_whose_batch_met_its_deadline_is_closed(postgres: str) -> None:
    with processing(postgres, max_duration=0.2) as processor:
        first = processor.run("a", backend)
        assert isinstance(answer_of(processor.run, "a", lambda _: gevent.sleep(5)), BatchTimeout)
        wait_until(lambda: open_connections(postgres) == 0)
        assert processor.run("a", backend) != first
        assert open_connections(postgres) == 1


def run_side_by_side(processor: Processor[Account], names: list[str]) -> None:
    """With a connection for each."""
    everybody = Event()
    entered: list[str] = []

    def meet(resource: Account) -> None:
        entered.append(resource.name)
        if len(entered) == len(names):
            everybody.set()
        everybody.wait()

    gevent.joinall([gevent.spawn(processor.run, name, meet) for name in names], raise_error=True)


def test_connections_that_the_server_ended_while_idle_fail_no_batch(postgres: str) -> None:
    names = make_accounts(postgres, 3)
    with processing(postgres) as processor:
        run_side_by_side(processor, names)
        with connections[postgres].cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = %s AND pid <> pg_backend_pid()",
                [postgres],
            )
        wait_until(lambda: open_connections(postgres) == 0)
        assert [processor.run(name, deposit, 1) for name in names] == [1, 1, 1]
        assert open_connections(postgres) == 1


def test_after_a_peak_idle_connections_are_closed_when_they_are_old(postgres: str) -> None:
    names = make_accounts(postgres, 3)
    store = DjangoStore(Account, by="name", using=postgres, conn_max_age=0.2)

    def run_one_and_count() -> int:
        processor.run("a", deposit, 1)
        return open_connections(postgres)

    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        run_side_by_side(processor, names)
        wait_until(lambda: run_one_and_count() == 1)


def test_a_statement_is_ended_by_the_server_before_the_deadline(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound_early(monkeypatch, 9)

    def change(resource: Account) -> None:
        with connections[postgres].cursor() as cursor:
            cursor.execute("SELECT pg_sleep(5)")

    with processing(postgres, max_duration=9.4) as processor:
        assert isinstance(answer_of(processor.run, "a", change), OperationalError)


def test_connections_to_other_databases_are_closed_after_the_batch(postgres: str, tmp_path: Path) -> None:
    with place("postgresql", tmp_path) as address:
        options = options_of(address)
        with database(address, create=False, options=options) as other, processing(postgres) as processor:
            options["application_name"] = other

            def change(resource: Account) -> bool:
                return Account.objects.using(other).exists()

            assert processor.run("a", change) is False
            wait_until(lambda: open_connections(other) == 0)
            connections[other].close()


def test_a_child_of_a_fork_leaves_the_connections_of_its_parent_alone(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DjangoStore(Account, by="name", using=postgres)
    with Processor(open_resource=store, min_duration=0) as processor:
        processor.run("a", deposit, 1)
        (parents,) = store._models.any.pool._idle
        monkeypatch.setattr(process.here, "epoch", process.here.epoch + 1)
        assert len(store._models.any.pool) == 1
        own = connections[postgres]
        lent, reused = store._models.any.pool.lend()
        store._models.any.pool.give_back(lent, own)
        assert lent is not parents
        assert (postgres, parents) in _connections._put_aside
        assert not reused
        assert parents.connection is not None
        monkeypatch.undo()
    parents.connection.close()


# -- round trips -------------------------------------------------------------------------------------------------


@pytest.fixture
def proxied(tmp_path: Path) -> Iterator[tuple[str, Proxy]]:
    with (
        place("postgresql", tmp_path) as address,
        database(address, create=False) as direct,
        Proxy(endpoint(direct)) as proxy,
    ):
        through = {"HOST": proxy.host, "PORT": str(proxy.port)}
        options = {**options_of(address), "sslmode": "disable", "gssencmode": "disable"}
        with database(address, create=False, settings=through, options=options) as alias:
            Account.objects.using(alias).create(name="a")
            yield alias, proxy
            close_idle(alias)
            connections[alias].close()


def with_row(resource: Account) -> None:
    deposit(resource, 1)
    current_batch().add_row(Entry(account=resource, text=str(resource.balance)))


@pytest.mark.parametrize(
    ("mode", "operation", "expected"),
    [
        ("lock", lambda resource: deposit(resource, 1), 2),
        ("version", lambda resource: deposit(resource, 1), 2),
        ("lock", with_row, 3),
        ("version", with_row, 3),
        ("lock", lambda resource: resource.balance, 2),
    ],
    ids=["update", "update of a version", "with rows", "with rows and a version", "read"],
)
def test_a_batch_is_two_round_trips_and_one_more_with_rows(
    proxied: tuple[str, Proxy], mode: str, operation: Callable[[Account], object], expected: int
) -> None:
    alias, proxy = proxied
    with processing(alias, mode=mode) as processor:
        processor.run("a", operation)  # connects
        before = proxy.round_trips
        processor.run("a", operation)
        assert proxy.round_trips - before == expected


def test_idempotency_keys_cost_no_round_trip(proxied: tuple[str, Proxy]) -> None:
    alias, proxy = proxied
    for mode in ("lock", "version"):
        with processing(alias, mode=mode, idempotency=Outcome) as processor:
            trips = []
            for key in (None, "a", "b"):
                before = proxy.round_trips
                processor.run("a", deposit, 1, idempotency_key=key and mode + key)
                trips.append(proxy.round_trips - before)
        assert trips[1:] == [2, 2]


# -- outcomes ----------------------------------------------------------------------------------------------------


def test_a_first_insert_is_replayed_too_when_it_cannot_be_seen_who_was_faster(proxied: tuple[str, Proxy]) -> None:
    alias, proxy = proxied

    def insert() -> None:
        Account.objects.using(alias).create(name="new", balance=7)
        connections[alias].close()

    def insert_elsewhere(resource: Account) -> int:
        if resource.pk is None:
            gevent.spawn(insert).get()
            proxy.cut_before(b'FROM "bank_account"')
        return deposit(resource, 1)

    store = DjangoStore(Account, by="name", using=alias, missing=lambda name: Account(name=name))
    with Processor(open_resource=store, min_duration=0) as processor:
        assert processor.run("new", insert_elsewhere) == 8
    assert Account.objects.using(alias).get(name="new").balance == 8


def test_a_migration_names_the_public_field_and_makes_one_index_for_it(postgres: str) -> None:
    field = Outcome._meta.get_field("id")
    assert isinstance(field, OutcomeIdField)
    name, path, args, options = field.deconstruct()
    assert (name, path, args) == ("id", "geventbatch.integrations.django.models.OutcomeIdField", [])
    assert OutcomeIdField(*args, **options).max_length == 300
    assert Outcome.check(databases=[postgres]) == []
    with connections[postgres].cursor() as cursor:
        found = connections[postgres].introspection.get_constraints(cursor, Outcome._meta.db_table)
    assert [one["columns"] for one in found.values() if one["index"] or one["unique"]].count(["id"]) == 1


@pytest.mark.parametrize("model", [OutcomeModel, Account, "Outcome"])
def test_what_is_no_model_of_outcomes_is_refused(model: Any) -> None:
    with pytest.raises(
        TypeError, match=r"idempotency is .*, but must be a subclass of OutcomeModel in an app of yours"
    ):
        DjangoStore(Account, idempotency=model)


def test_a_store_that_records_nothing_has_nothing_to_purge() -> None:
    with pytest.raises(ValueError, match="records no outcomes: pass idempotency="):
        DjangoStore(Account).purge_outcomes()


def test_an_outcome_is_rolled_back_with_the_transaction_that_its_savepoint_is_in(alias: str) -> None:
    with processing(alias, batching=False, idempotency=Outcome) as processor:

        def run(amount: int) -> int:
            return processor.run("a", deposit, amount, idempotency_key="a")

        with transaction.atomic(using=alias):
            assert [run(1), run(1)] == [1, 1]
            assert isinstance(answer_of(run, 2), IdempotencyKeyReused)
            transaction.set_rollback(True, using=alias)
        assert account(alias).balance == 0
        with transaction.atomic(using=alias):
            assert [run(2), processor.run("a", deposit, 1), run(2)] == [2, 3, 2]
            Outcome.objects.using(alias).update(expires=1)
            assert run(2) == 5
    assert account(alias).balance == 5


# -- alone -------------------------------------------------------------------------------------------------------


def test_with_batching_off_a_batch_is_a_savepoint_of_its_callers_transaction(alias: str) -> None:
    with processing(alias, batching=False) as processor:
        with transaction.atomic(using=alias):
            Account.objects.using(alias).create(name="b")
            assert processor.run("b", deposit, 1) == 1
            assert processor.run("a", deposit, 1) == 1
            transaction.set_rollback(True, using=alias)
        assert account(alias).balance == 0
        with transaction.atomic(using=alias):
            assert processor.run("a", deposit, 2) == 2
            with pytest.raises(ZeroDivisionError):
                processor.run("a", lambda resource: deposit(resource, 1) / 0)
            assert isinstance(answer_of(processor.run, "nobody", deposit, 1), LoadFailed)
    assert account(alias).balance == 2


def test_without_locks_a_savepoint_of_its_callers_transaction_notices_a_foreign_writer_too(postgres: str) -> None:
    runs: list[int] = []

    def change(resource: Account) -> None:
        runs.append(resource.balance)
        if len(runs) == 1:
            gevent.spawn(foreign_deposit, postgres, "a").join()
        resource.balance += 1

    with processing(postgres, batching=False, mode="version") as processor, transaction.atomic(using=postgres):
        processor.run("a", change)
    assert runs == [0, 100]
    assert account(postgres).balance == 101


def test_with_batching_off_a_batch_uses_the_connection_of_its_caller(postgres: str) -> None:
    with processing(postgres, batching=False) as processor:
        assert processor.run("a", backend) == backend(account(postgres))


# -- deadlocks ---------------------------------------------------------------------------------------------------


def test_a_deadlock_in_the_sql_of_operations_is_replayed(postgres: str) -> None:
    make_accounts(postgres, 2)
    both = [Event(), Event()]

    def change(resource: Account, number: int) -> None:
        both[number].set()
        both[1 - number].wait()
        Account.objects.using(postgres).filter(name=f"n{1 - number}").update(note="locked")
        resource.balance += 1

    with processing(postgres) as processor:
        callers = [gevent.spawn(processor.run, f"n{number}", change, number) for number in (0, 1)]
        for caller in callers:
            caller.get()
    assert list(Account.objects.using(postgres).filter(name__startswith="n").values_list("balance", "note")) == (
        [(1, "locked")] * 2
    )


# -- on_commit ---------------------------------------------------------------------------------------------------


def test_callbacks_run_in_their_order_when_the_batch_is_committed_and_answered(alias: str) -> None:
    seen: list[object] = []
    answered = Event()

    def change(resource: Account, number: int) -> int:
        def called() -> None:
            answered.wait()
            seen.append((number, account(alias).balance))

        transaction.on_commit(called, using=alias)
        return deposit(resource, 1)

    with processing(alias, min_duration=0.05) as processor:
        assert together(processor, *[lambda a, n=n: change(a, n) for n in range(3)]) == [1, 2, 3]
        assert seen == []
        answered.set()
        wait_until(lambda: len(seen) == 3)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_a_callback_that_fails_is_logged_and_the_next_ones_run(alias: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def change(resource: Account) -> None:
        deposit(resource, 1)
        transaction.on_commit(lambda: 1 // 0, using=alias)
        transaction.on_commit(lambda: seen.append(1), using=alias)

    with caplog.at_level(logging.ERROR, "geventbatch"), processing(alias) as processor:
        processor.run("a", change)
        wait_until(lambda: seen)
    assert account(alias).balance == 1
    (record,) = caplog.records
    assert "on_commit" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_callbacks_of_operations_that_raise_or_are_replayed_are_dropped(alias: str) -> None:
    seen: list[str] = []

    def change(resource: Account, name: str, error: Exception | None) -> None:
        transaction.on_commit(lambda: seen.append(name), using=alias)
        if error is not None:
            raise error

    with processing(alias, min_duration=0.05, clean_errors=(KeyError,)) as processor:
        together(
            processor,
            lambda a: change(a, "first", None),
            lambda a: change(a, "clean", KeyError()),
            lambda a: change(a, "broken", ValueError()),
            lambda a: change(a, "last", None),
        )
        wait_until(lambda: len(seen) == 2)
    assert seen == ["first", "last"]


def test_callbacks_of_a_batch_that_is_not_saved_never_run(postgres: str) -> None:
    seen: list[int] = []

    def change(resource: Account) -> None:
        transaction.on_commit(lambda: seen.append(1), using=postgres)
        raise LookupError

    with processing(postgres) as processor:
        assert isinstance(answer_of(processor.run, "a", change), LookupError)
        processor.run("a", deposit, 1)
    assert seen == []


def test_callbacks_run_with_batching_off_too(alias: str) -> None:
    seen: list[int] = []

    def change(resource: Account) -> None:
        transaction.on_commit(lambda: seen.append(account(alias).balance), using=alias)
        deposit(resource, 1)

    with processing(alias, batching=False) as processor:
        processor.run("a", change)
        assert seen == [1]
        with transaction.atomic(using=alias):
            processor.run("a", change)
            assert seen == [1]
        assert seen == [1, 2]


@pytest.mark.parametrize("batching", [True, False])
def test_callbacks_of_signals_of_the_save_run_after_it_and_fail_nobody(
    alias: str, batching: bool, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []

    def saved(**_: object) -> None:
        transaction.on_commit(lambda: 1 // 0, using=alias)
        transaction.on_commit(lambda: seen.append(account(alias).balance), using=alias)

    def change(resource: Account) -> int:
        current_batch().add_row(Entry(text="added"))  # a statement behind the signal, which COMMIT is sent with
        return deposit(resource, 1)

    post_save.connect(saved, sender=Account)
    try:
        with caplog.at_level(logging.ERROR, "geventbatch"), processing(alias, batching=batching) as processor:
            assert processor.run("a", change) == 1
            wait_until(lambda: seen and caplog.records)
    finally:
        post_save.disconnect(saved, sender=Account)
    assert seen == [1]
    (record,) = caplog.records
    assert "on_commit" in record.getMessage()


def test_callers_are_answered_before_callbacks_of_signals_of_the_save(alias: str) -> None:
    answered = Event()
    seen: list[int] = []

    def called() -> None:
        answered.wait()
        seen.append(1)

    def saved(**_: object) -> None:
        transaction.on_commit(called, using=alias)

    post_save.connect(saved, sender=Account)
    try:
        with processing(alias) as processor:
            assert processor.run("a", deposit, 1) == 1
            assert seen == []
            answered.set()
            wait_until(lambda: seen)
    finally:
        post_save.disconnect(saved, sender=Account)


# -- what operations do beside changing the resource -------------------------------------------------------------


def change_beside(resource: Model, pause: Callable[[], None]) -> str:
    entry = Entry.objects.using(resource._state.db).get()
    pause()
    entry.text += "+"
    entry.save()
    return entry.text


def add_beside(resource: Model, pause: Callable[[], None]) -> str:
    text = "+" * Entry.objects.using(resource._state.db).count()
    pause()
    current_batch().add_row(Entry(text=text))
    return text


def update_beside(resource: Model, pause: Callable[[], None]) -> str:
    entries = Entry.objects.using(resource._state.db)
    text = entries.get().text + "+"
    pause()
    entries.update(text=text)
    return text


@pytest.mark.parametrize(
    ("operation", "saved"),
    [(change_beside, ["++"]), (add_beside, ["", "+", "++"]), (update_beside, ["++"])],
    ids=["a related object", "rows", "a statement"],
)
@pytest.mark.parametrize(
    ("server", "options", "key"),
    [
        ("sqlite", {"model": Ticket, "version": "version"}, 1),
        ("postgresql", {"model": Ticket, "version": "version"}, 1),
        ("postgresql", {"model": Account, "by": "name"}, "a"),
    ],
    ids=["version on SQLite", "version", "xmin"],
)
def test_without_locks_a_batch_that_writes_only_beside_the_resource_is_noticed_by_that_of_another_process(
    tmp_path: Path,
    *,
    server: str,
    options: dict[str, Any],
    key: object,
    operation: Callable[[Model, Callable[[], None]], str],
    saved: list[str],
) -> None:
    told: list[str] = []

    def let_the_other_run() -> None:
        if not told:
            told.append(gevent.spawn(other.run, key, operation, lambda: None).get())

    with account_in(server, tmp_path) as alias:
        Ticket.objects.using(alias).create(number=1)
        Entry.objects.using(alias).create(text="")
        ours, theirs = (DjangoStore(using=alias, mode="version", **options) for _ in range(2))
        with (
            Processor(open_resource=ours, min_duration=0) as processor,
            Processor(open_resource=theirs, min_duration=0) as other,
        ):
            told.append(processor.run(key, operation, let_the_other_run))
        assert told == ["+", "++"]
        assert list(Entry.objects.using(alias).order_by("id").values_list("text", flat=True)) == saved


def test_an_expression_in_a_field_is_refused_to_its_own_caller(alias: str) -> None:
    def deposit_in_sql(resource: Any) -> None:
        resource.balance = F("balance") + 10
        resource.save()

    with processing(alias, min_duration=0.05) as processor:
        answers = together(processor, lambda a: deposit(a, 1), deposit_in_sql, lambda a: deposit(a, 1))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], TypeError)
    assert "assigned an expression to balance" in str(answers[1])
    assert account(alias).balance == 2


def test_loading_the_resource_again_is_refused_and_undoes_nothing(alias: str) -> None:
    with processing(alias, min_duration=0.05) as processor:
        answers = together(processor, lambda a: deposit(a, 1), lambda a: a.refresh_from_db(), lambda a: deposit(a, 1))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], RuntimeError)
    assert "would undo what the operations before this one have changed" in str(answers[1])
    assert account(alias).balance == 2


def test_deferred_fields_are_loaded_when_they_are_read(alias: str) -> None:
    def defer_and_read(resource: Account) -> tuple[str, int]:
        del resource.note
        return resource.note, deposit(resource, 1)

    Account.objects.using(alias).update(note="loaded")
    with processing(alias) as processor:
        assert processor.run("a", defer_and_read) == ("loaded", 1)
    assert (account(alias).note, account(alias).balance) == ("loaded", 1)


def test_a_timeout_of_an_operation_around_its_sql_breaks_that_operation_only(postgres: str) -> None:
    def wait(resource: Account) -> None:
        with gevent.Timeout(0.05, LookupError), connections[postgres].cursor() as cursor:
            cursor.execute("SELECT pg_sleep(0.5)")

    with processing(postgres, min_duration=0.05) as processor:
        answers = together(processor, lambda a: deposit(a, 1), wait, lambda a: deposit(a, 1))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], LookupError)
    assert account(postgres).balance == 2


def test_what_a_wrapper_raises_after_a_commit_in_the_same_message_is_logged_and_the_batch_is_saved(
    postgres: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []

    def change(resource: Account) -> int:
        runs.append(deposit(resource, 1))
        return runs[-1]

    def fail_after_an_update(execute: Callable[..., Any], sql: str, *args: Any) -> Any:
        answer = execute(sql, *args)
        if sql.startswith("UPDATE"):
            raise LookupError
        return answer

    def wrap(connection: Any, **_: object) -> None:
        connection.execute_wrappers.append(fail_after_an_update)

    connection_created.connect(wrap)
    try:
        with processing(postgres, min_duration=0.05) as processor:
            answers = together(processor, change, change, change)
    finally:
        connection_created.disconnect(wrap)
    assert answers == [1, 2, 3]
    assert runs == [1, 2, 3]
    assert account(postgres).balance == 3
    wait_until(lambda: caplog.records)
    assert [record.message for record in caplog.records] == [
        "what is called after COMMIT raised, for the batch of key 'a', which was saved: LookupError()"
    ]

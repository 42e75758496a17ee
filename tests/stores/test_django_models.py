"""Which models DjangoStore takes, and what it refuses when it is made."""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import connections, models, transaction

from geventbatch import Processor, ResourceMissing
from geventbatch.stores import DjangoStore
from geventbatch.stores.django._connections import close_idle
from tests.support.callers import answer_of
from tests.support.django_project.start import database, execute, options_of, place
from tests.support.servers import wait_until

from tests.support.django_project.bank.models import Account, Outcome, Savings, Ticket  # isort: skip - after Django is set up
from tests.support.django_project.bank.shapes import (
    Agent,
    Branch,
    Client,
    Deaf,
    Folded,
    Limited,
    Odd,
    OneOfUs,
    Percent,
    Seat,
    Shown,
    Vault,
)  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SERVERS = ("sqlite", "postgresql")
MODES: Any = (
    ("sqlite", "version"),
    ("postgresql", "lock"),
    ("postgresql", "version"),
    pytest.param("mariadb", "lock", marks=pytest.mark.mariadb),
    pytest.param("mariadb", "version", marks=pytest.mark.mariadb),
)


class Line(str, Enum):  # noqa: UP042 - as many have it
    NORTH = "north"


@contextmanager
def tables(server: str, directory: Path, *kinds: type[models.Model]) -> Iterator[str]:
    with place(server, directory, models=kinds) as address:
        options = options_of(address)
        with database(address, create=False, options=options) as alias:
            yield alias
            close_idle(alias)


@contextmanager
def processing(model: Any, alias: str, **options: Any) -> Iterator[Processor[Any]]:
    store: DjangoStore[Any] = DjangoStore(model, using=alias, **options)
    with Processor(open_resource=store, min_duration=0.02, max_duration=10) as processor:
        yield processor


def deposit(resource: Any, amount: int) -> int:
    resource.balance += amount
    return int(resource.balance)


def sell(seat: Any) -> int:
    seat.sold += 1
    return int(seat.sold)


def answers_of(processor: Processor[Any], key: Any, *operations: Callable[[Any], object]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, operation) for operation in operations]
    return [caller.get() for caller in callers]


# -- managers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("server", "mode"), MODES)
@pytest.mark.parametrize("manager", [None, "joined", "active", "counted", "kept"])
def test_a_manager_that_joins_counts_or_leaves_out_finds_the_row(
    server: str, mode: Any, manager: str | None, tmp_path: Path
) -> None:
    with tables(server, tmp_path, Agent, Client, Branch) as alias:
        agent = Agent.objects.using(alias).create(name="Ann")
        client = Client.objects.using(alias).create(number="1", agent=agent)
        Branch.objects.using(alias).create(client=client)
        with processing(Client, alias, by="number", mode=mode, manager=manager) as processor:
            assert processor.run("1", deposit, 5) == 5
            assert processor.run("1", lambda one: (one.agent.name, one.note)) == ("Ann", "a note")
            if manager == "counted":
                assert processor.run("1", lambda one: one.branches) == 1
        assert Client.objects.using(alias).get(number="1").balance == 5


def test_what_a_manager_joins_is_read_when_the_lock_is_there(tmp_path: Path) -> None:
    with tables("postgresql", tmp_path, Agent, Client, Branch) as alias:
        client = Client.objects.using(alias).create(number="1")
        with processing(Client, alias, by="number", manager="counted") as processor:
            with models_locked(alias, client) as waits:
                caller = gevent.spawn(processor.run, "1", lambda one: one.branches)
                waits()
                Branch.objects.using(alias).create(client=client)
            assert caller.get() == 1


@contextmanager
def models_locked(alias: str, client: Client) -> Iterator[Callable[[], None]]:
    """Have the row locked in the block, and say how to wait until another one waits for it."""

    def wait() -> None:
        def waiting() -> bool:
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
                return bool(cursor.fetchone()[0])

        wait_until(waiting)

    with transaction.atomic(using=alias):
        Client.objects.using(alias).filter(pk=client.pk).update(note="changed")
        yield wait


@pytest.mark.parametrize("server", SERVERS)
def test_a_row_that_the_manager_hides_is_missing_and_one_can_be_hidden(server: str, tmp_path: Path) -> None:
    def hide(client: Client) -> None:
        client.deleted = True

    with tables(server, tmp_path, Agent, Client) as alias:
        Client.objects.using(alias).create(number="1")
        with processing(Client, alias, by="number", manager="kept") as processor:
            processor.run("1", hide)
            assert isinstance(answer_of(processor.run, "1", deposit, 5), ResourceMissing)
        assert Client.objects.using(alias).get(number="1").balance == 0


@pytest.mark.parametrize("server", SERVERS)
def test_a_key_that_django_knows_to_be_nowhere_has_a_transaction_too(server: str, tmp_path: Path) -> None:
    def change(client: Client) -> None:
        Agent.objects.using(client._state.db).create(name="saved")

    with (
        tables(server, tmp_path, Agent, Client) as alias,
        processing(Client, alias, by="number", manager="nowhere", missing=lambda key: Client(number=key)) as processor,
    ):
        processor.run("1", change)
        assert Agent.objects.using(alias).get().name == "saved"
        assert Client.objects.using(alias).get().number == "1"


def test_what_is_no_manager_is_refused() -> None:
    with pytest.raises(ValueError, match="manager is 'balance'"):
        DjangoStore(Client, manager="balance")


# -- keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("server", "mode"), MODES)
def test_a_row_is_found_and_saved_by_a_primary_key_of_two_columns(server: str, mode: Any, tmp_path: Path) -> None:
    with tables(server, tmp_path, Seat) as alias:
        Seat.objects.using(alias).create(line="north", number=1)
        Seat.objects.using(alias).create(line="north", number=2, window=2)
        with processing(Seat, alias, mode=mode) as processor:
            assert [processor.run(key, sell) for key in (("north", 1), ("north", "1"), (Line.NORTH, 1))] == [1, 2, 3]
            assert isinstance(answer_of(processor.run, ("south", 1), sell), ResourceMissing)
            processor.run(("north", 2), lambda seat: seat.delete())
        assert list(Seat.objects.using(alias).values_list("pk", "sold")) == [(("north", 1), 3)]


@pytest.mark.parametrize("server", SERVERS)
def test_a_part_of_a_primary_key_is_not_changed(server: str, tmp_path: Path) -> None:
    def move(seat: Any) -> None:
        seat.number = 3

    with tables(server, tmp_path, Seat) as alias:
        Seat.objects.using(alias).create(line="north", number=1)
        with processing(Seat, alias) as processor:
            refused, sold = answers_of(processor, ("north", 1), move, sell)
        assert isinstance(refused, ValueError)
        assert "primary key" in str(refused)
        assert (sold, Seat.objects.using(alias).get().sold) == (1, 1)


@pytest.mark.parametrize("server", SERVERS)
def test_a_row_is_found_by_columns_that_are_unique_together(server: str, tmp_path: Path) -> None:
    def made(key: Any) -> Seat:
        return Seat(line="south", number=7, coach=key[0], window=key[1])

    with tables(server, tmp_path, Seat) as alias:
        Seat.objects.using(alias).create(line="north", number=1, coach=2, window=3)
        with processing(Seat, alias, by=("coach", "window"), missing=made) as processor:
            assert processor.run(("2", 3), sell) == 1
            assert processor.run((2, 4), sell) == 1
        assert set(Seat.objects.using(alias).values_list("number", "window")) == {(1, 3), (7, 4)}


def test_columns_that_are_not_unique_together_are_no_key() -> None:
    with pytest.raises(ValueError, match="unique together"):
        DjangoStore(Seat, by=("coach", "sold"))


@pytest.mark.parametrize("key", [1, ("north",), ("north", 1, 2), ("north", "one"), ("north", None)])
def test_what_is_no_key_of_two_columns_is_refused_at_the_door(key: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="is no key for the column"):
        DjangoStore(Seat).normalize_key(key)


@pytest.mark.parametrize("server", SERVERS)
def test_the_field_that_is_the_key_is_not_changed(server: str, tmp_path: Path) -> None:
    def rename(client: Client) -> None:
        client.number = "2"

    with tables(server, tmp_path, Agent, Client) as alias:
        Client.objects.using(alias).create(number="1")
        with processing(Client, alias, by="number") as processor:
            refused, balance = answers_of(processor, "1", rename, lambda one: deposit(one, 1))
        assert isinstance(refused, ValueError)
        assert "number, the key" in str(refused)
        assert (balance, Client.objects.using(alias).get().number) == (1, "1")


@pytest.mark.parametrize(
    ("model", "key"),
    [(Ticket, 10**12), (Ticket, -(10**12)), (Client, "\ud800"), (Client, "a\0"), (Client, "far too long a number")],
)
def test_a_key_that_no_row_can_have_is_refused_at_the_door(model: Any, key: object, tmp_path: Path) -> None:
    by = "number"
    with tables("postgresql", tmp_path) as alias, processing(model, alias, by=by) as processor:
        refused = answer_of(processor.run, key, deposit, 1)
        assert isinstance(refused, ValueError)
        assert isinstance(refused, ResourceMissing)


@pytest.mark.parametrize("server", SERVERS)
def test_a_primary_key_that_is_another_rows_is_a_key(server: str, tmp_path: Path) -> None:
    def dig(vault: Vault) -> str:
        vault.gold += 1
        return vault.agent.name

    with tables(server, tmp_path, Agent, Vault) as alias:
        agent = Agent.objects.using(alias).create(name="a")
        Vault.objects.using(alias).create(agent=agent)
        for by in ("pk", "agent"):
            with processing(Vault, alias, by=by) as processor:
                assert processor.run(str(agent.pk), dig) == "a"
        assert Vault.objects.using(alias).get().gold == 2


def test_an_idempotency_key_is_recorded_under_the_key_that_the_row_has(tmp_path: Path) -> None:
    def add(row: Any) -> int:
        row.total += 1
        return int(row.total)

    with tables("sqlite", tmp_path, Folded, Outcome) as alias:
        Folded.objects.using(alias).create(name="Ann")
        with processing(Folded, alias, by="name", idempotency=Outcome) as processor:
            assert [processor.run(name, add, idempotency_key="one") for name in ("Ann", "ANN", "ann")] == [1, 1, 1]
        assert Folded.objects.using(alias).get().total == 1


# -- what the database gives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", SERVERS)
def test_operations_see_what_the_database_gives_a_new_row(server: str, tmp_path: Path) -> None:
    def raise_limit(account: Limited) -> int:
        account.limit += 1
        return account.limit

    def opened(account: Limited) -> datetime:
        return account.opened

    with (
        tables(server, tmp_path, Limited) as alias,
        processing(Limited, alias, by="number", missing=lambda key: Limited(number=key)) as processor,
    ):
        *limits, when = answers_of(processor, "1", raise_limit, raise_limit, opened)
        found = Limited.objects.using(alias).get()
        assert (limits, found.limit) == ([101, 102], 102)
        assert isinstance(when, datetime)
        assert found.opened == when


@pytest.mark.parametrize("server", SERVERS)
def test_an_expression_in_a_new_row_is_refused_for_its_operation(server: str, tmp_path: Path) -> None:
    def express(account: Limited) -> None:
        account.limit = models.F("limit") + 1  # type: ignore[assignment]

    with (
        tables(server, tmp_path, Limited) as alias,
        processing(Limited, alias, by="number", missing=lambda key: Limited(number=key)) as processor,
    ):
        refused, balance = answers_of(processor, "1", express, lambda one: deposit(one, 1))
        assert isinstance(refused, TypeError)
        assert (balance, Limited.objects.using(alias).get().limit) == (1, 100)


# -- names, inheritance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("server", "mode"), MODES)
def test_names_that_have_to_be_quoted_are(server: str, mode: Any, tmp_path: Path) -> None:
    with tables(server, tmp_path, Odd) as alias:
        Odd.objects.using(alias).create(number=1)
        with processing(Odd, alias, by="number", mode=mode) as processor:
            assert processor.run(1, deposit, 5) == 5
        assert Odd.objects.using(alias).get().balance == 5


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("version", [None, "balance"])
def test_a_change_of_the_parents_row_alone_is_a_conflict(mode: Any, version: str | None, tmp_path: Path) -> None:
    """Two stores stand for two processes."""
    with tables("postgresql", tmp_path, Account, Savings) as alias:
        Savings.objects.using(alias).create(name="a")
        column = "rate" if version else "balance"

        def add(resource: Any) -> None:
            setattr(resource, column, getattr(resource, column) + 1)
            gevent.sleep(0)

        with (
            processing(Savings, alias, by="name", mode=mode, version=version) as one,
            processing(OneOfUs, alias, by="name", mode=mode, version=version) as other,
        ):
            callers = [gevent.spawn(processor.run, "a", add) for processor in (one, other) for _ in range(5)]
            gevent.joinall(callers, raise_error=True)
        assert getattr(Savings.objects.using(alias).get(), column) == 10


def test_a_row_that_was_deleted_and_made_anew_is_another_one(tmp_path: Path) -> None:
    for server in ("postgresql", "sqlite"):
        with tables(server, tmp_path, Ticket) as alias:
            Ticket.objects.using(alias).create(number=1, version=1, total=5)
            attempts: list[int] = []

            def add(ticket: Ticket, attempts: list[int] = attempts, alias: str = alias) -> int:
                attempts.append(ticket.total)
                if len(attempts) == 1:
                    gevent.spawn(make_anew, alias).join()
                ticket.total += 1
                return ticket.total

            with processing(Ticket, alias, mode="version", version="version") as processor:
                assert processor.run(1, add) == 101
            assert attempts == [5, 100]
            assert Ticket.objects.using(alias).get().total == 101


def make_anew(alias: str) -> None:
    Ticket.objects.using(alias).all().delete()
    Ticket.objects.using(alias).create(number=1, version=1, total=100)
    connections[alias].close()


@contextmanager
def view(directory: Path) -> Iterator[str]:
    with tables("postgresql", directory, Account, Outcome) as alias:
        execute(
            alias, "CREATE VIEW bank_shown AS SELECT id, name, balance, 0 + length(note) AS number FROM bank_account"
        )
        Account.objects.using(alias).create(name="a")
        yield alias


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("version", [None, "balance"])
@pytest.mark.parametrize("batching", [True, False])
def test_a_row_of_a_view_is_loaded_and_saved(
    mode: Any, version: str | None, pipeline: bool, batching: bool, tmp_path: Path
) -> None:
    """A view of PostgreSQL has no xmin."""

    def rename(row: Any) -> str:
        row.name += "b"
        return str(row.name)

    with view(tmp_path) as alias, processing(Shown, alias, mode=mode, version=version, pipeline=pipeline) as processor:
        processor.batching = batching
        pk = Account.objects.using(alias).get().pk
        assert [processor.run(pk, rename) for _ in range(2)] == ["ab", "abb"]
        assert Account.objects.using(alias).get().name == "abb"


@pytest.mark.parametrize("pipeline", [True, False])
def test_what_somebody_else_has_changed_in_a_row_of_a_view_is_a_conflict(pipeline: bool, tmp_path: Path) -> None:
    with view(tmp_path) as alias:
        attempts: list[int] = []

        def elsewhere() -> None:
            Account.objects.using(alias).update(balance=100)
            connections[alias].close()

        def add(row: Any) -> int:
            attempts.append(row.balance)
            if len(attempts) == 1:
                gevent.spawn(elsewhere).join()
            row.balance += 1
            return int(row.balance)

        with processing(Shown, alias, by="name", mode="version", pipeline=pipeline) as processor:
            assert processor.run("a", add) == 101
        assert attempts == [0, 100]
        assert Account.objects.using(alias).get().balance == 101


def test_names_that_django_cannot_send_are_refused() -> None:
    with pytest.raises(ValueError, match="share in %"):
        DjangoStore(Percent)


def test_a_save_that_takes_no_database_is_refused() -> None:
    with pytest.raises(TypeError, match=re.escape("Deaf.save() takes no using")):
        DjangoStore(Deaf)

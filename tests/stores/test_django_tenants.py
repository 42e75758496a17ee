"""A schema for each tenant: a batch finds the tables of its callers, or they are told."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import connections

from geventbatch import Processor
from geventbatch.stores import DjangoStore
from geventbatch.stores.django import _tenants
from geventbatch.stores.django._connections import close_idle, pool
from tests.support.callers import answer_of
from tests.support.django_project.start import create_tables, database, execute, options_of, place

from tests.support.django_project.bank.models import Outcome, Ticket  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TENANTS = ("north", "south")


@pytest.fixture
def alias(tmp_path: Path) -> Iterator[str]:
    """A database with tables of nobody's, and with those of two tenants."""
    with place("postgresql", tmp_path, models=(Ticket, Outcome)) as address:
        name = address.rpartition("#")[2]
        with database(address, create=False, options=options_of(address)) as alias:
            Ticket.objects.using(alias).create(number=1)
            for tenant in TENANTS:
                execute(alias, f"CREATE SCHEMA {name}_{tenant}")
                use(alias, tenant)
                create_tables(alias, (Ticket, Outcome))
                Ticket.objects.using(alias).create(number=1)
            connections[alias].close()
            yield alias
            close_idle(alias)
            for tenant in TENANTS:
                execute(alias, f"DROP SCHEMA {name}_{tenant} CASCADE")


def schema(alias: str) -> str:
    return str(connections.settings[alias]["OPTIONS"]["options"].split("search_path=")[1].split()[0])


def use(alias: str, tenant: str) -> None:
    execute(alias, f"SET search_path TO {schema(alias)}_{tenant}")


def sold(alias: str) -> dict[str, int]:
    with connections[alias].cursor() as cursor:
        found = {}
        for tenant in ("", *TENANTS):
            cursor.execute(f"SELECT total FROM {schema(alias)}{'_' if tenant else ''}{tenant}.bank_ticket")  # noqa: S608 - our own names
            found[tenant] = cursor.fetchone()[0]
        return found


def sell(ticket: Any, pieces: int) -> int:
    ticket.total += pieces
    return int(ticket.total)


@contextmanager
def request(alias: str, tenant: str) -> Iterator[None]:
    use(alias, tenant)
    try:
        yield
    finally:
        connections[alias].close()


def ask(processor: Processor[Any], alias: str, tenant: str, pieces: int, key: str | None = None) -> Any:
    with request(alias, tenant):
        return answer_of(processor.run, 1, sell, pieces, idempotency_key=key)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_caller_that_finds_other_tables_than_the_batch_would_is_refused(
    alias: str, is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_told:  # by the server, as one before PostgreSQL 18 does not
        monkeypatch.setattr(_tenants, "_status", lambda raw: None)
    with Processor(open_resource=DjangoStore(Ticket, using=alias), min_duration=0) as processor:
        refused = gevent.spawn(ask, processor, alias, "north", 1).get()
        assert isinstance(refused, RuntimeError)
        assert "tenant=" in str(refused)
        assert processor.run(1, sell, 5) == 5
    assert sold(alias) == {"": 5, "north": 0, "south": 0}


@contextmanager
def processing(alias: str, tenants: list[str]) -> Iterator[Processor[Any]]:
    def prepare(connection: Any, key: Any) -> None:
        tenants.append(key)
        with connection.cursor() as cursor:
            cursor.execute(f"SET search_path TO {schema(alias)}_{key[0]}")

    def tenant() -> str:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT current_schema()")
            return str(cursor.fetchone()[0].rpartition("_")[2])

    store = DjangoStore(Ticket, using=alias, tenant=tenant, prepare_connection=prepare, idempotency=Outcome)
    with Processor(open_resource=store, min_duration=0.05, max_duration=10) as processor:
        yield processor
    prepared = pool(alias, 60.0, prepare)
    for connection in prepared._idle:
        with connection.cursor() as cursor:
            cursor.execute("SHOW search_path")
            assert cursor.fetchone()[0] == schema(alias)
    prepared.close()


def test_each_tenant_has_its_own_row_where_the_store_is_told_whose_it_is(alias: str) -> None:
    keys: list[Any] = []
    with processing(alias, keys) as processor:
        callers = [
            gevent.spawn(ask, processor, alias, tenant, pieces)
            for tenant, pieces in (("north", 1), ("south", 10), ("north", 2), ("south", 20))
        ]
        answers = [caller.get() for caller in callers]
        assert (max(answers[::2]), max(answers[1::2])) == (3, 30)
    assert set(keys) == {("north", 1), ("south", 1)}
    assert sold(alias) == {"": 0, "north": 3, "south": 30}


def test_one_idempotency_key_of_two_tenants_is_two(alias: str) -> None:
    with processing(alias, []) as processor:
        answers = [gevent.spawn(ask, processor, alias, tenant, 1, "order-7").get() for tenant in (*TENANTS, *TENANTS)]
    assert answers == [1, 1, 1, 1]
    assert sold(alias) == {"": 0, "north": 1, "south": 1}


def test_a_tenant_without_a_prepared_connection_is_refused() -> None:
    with pytest.raises(ValueError, match="prepare_connection"):
        DjangoStore(Ticket, tenant=lambda: "north")

"""Databases of Django's with an account in the table, and what the tests of DjangoStore do with it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import gevent
import pytest
from django.db import connections

from geventbatch import Processor
from geventbatch.stores import DjangoStore
from geventbatch.stores.django._connections import close_idle
from tests.support.callers import answer_of
from tests.support.django_project.start import database, options_of, place

from tests.support.django_project.bank.models import Account, Entry  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MARIADB: Final = pytest.param("mariadb", marks=pytest.mark.mariadb)


def opening(*servers: Any) -> Any:
    """Make a fixture of a module: the alias of a database with an account, on each of the *servers*."""

    @pytest.fixture(params=servers if len(servers) > 1 else None)
    def alias(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
        with account_in(getattr(request, "param", servers[0]), tmp_path) as alias:
            yield alias

    return alias


@contextmanager
def account_in(server: str, directory: Path, **settings: str) -> Iterator[str]:
    with place(server, directory) as address:
        options = options_of(address)
        with database(address, create=False, settings=settings, options=options) as alias:
            if server == "postgresql":
                options["application_name"] = alias
            Account.objects.using(alias).create(name="a", document={"seats": [1, 2]})
            yield alias
            close_idle(alias)


@contextmanager
def processing(alias: str, **options: Any) -> Iterator[Processor[Account]]:
    of_store = {name: options.pop(name, None) for name in ("mode", "idempotency")}
    store = DjangoStore(Account, by="name", using=alias, **of_store)
    with Processor(open_resource=store, **{"min_duration": 0, "max_duration": 10, **options}) as processor:
        yield processor


def account(alias: str) -> Account:
    return Account.objects.using(alias).get(name="a")


def deposit(resource: Account, amount: int) -> int:
    resource.balance += amount
    return resource.balance


def together(processor: Processor[Any], *operations: Callable[[Any], object]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, "a", operation) for operation in operations]
    return [caller.get() for caller in callers]


def open_connections(alias: str) -> int:
    with connections[alias].cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND pid <> pg_backend_pid()", [alias]
        )
        (count,) = cursor.fetchone() or (0,)
    return int(count)


def entries(alias: str) -> list[str]:
    return [*Entry.objects.using(alias).order_by("id").values_list("text", flat=True)]

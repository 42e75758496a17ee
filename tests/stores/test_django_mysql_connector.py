"""DjangoStore on the backend that comes with mysql-connector-python, ``mysql.connector.django``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import IntegrityError, connections, transaction

from geventbatch import Processor, SaveFailed, current_batch
from geventbatch.stores import DjangoStore
from geventbatch.stores.django._connections import close_idle
from tests.support.callers import answer_of
from tests.support.django_project.start import database, place

from tests.support.django_project.bank.models import Account, Entry, Outcome, Purse  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mariadb


@pytest.fixture
def alias(tmp_path: Path) -> Iterator[str]:
    with (
        place("mariadb", tmp_path, models=(Account, Entry, Purse, Outcome)) as address,
        database(
            address, create=False, settings={"ENGINE": "mysql.connector.django"}, options={"use_pure": True}
        ) as alias,
    ):
        yield alias
        close_idle(alias)


def processor(alias: str, **options: Any) -> Processor[Purse]:
    store = DjangoStore(
        Purse, by="name", using=alias, missing=lambda key: Purse(name=key, total=0), idempotency=Outcome
    )
    return Processor(open_resource=store, **{"min_duration": 0.05, "max_duration": 20, **options})


def add(purse: Purse, entry: str | None = None) -> int:
    purse.total += 1
    if entry is not None:
        current_batch().add_row(Entry(text=entry))
    return int(purse.total)


def together(*calls: Any) -> list[Any]:
    return [one.get() for one in [gevent.spawn(answer_of, *call) for call in calls]]


def test_what_the_database_refuses_fails_its_own_operation_alone(alias: str) -> None:
    with processor(alias) as purses:
        assert purses.run("a", add, "taken") == 1
        run = purses.run
        answers = together((run, "a", add), (run, "a", add, "taken"), (run, "a", add))
    assert [answers[0], answers[2]] == [2, 3]
    assert isinstance(answers[1], IntegrityError)


def test_a_first_insert_that_was_raced_is_replayed_and_an_idempotency_key_has_one_outcome(alias: str) -> None:
    with processor(alias, min_duration=0) as one, processor(alias, min_duration=0) as other:
        for name in ("a", "b", "c"):
            assert sorted(together((one.run, name, add), (other.run, name, add))) == [1, 2]
        once = [lambda some=some: some.run("k", add, idempotency_key="once") for some in (one, other) * 2]
        assert together(*[(call,) for call in once]) == [1] * 4


def test_connections_that_the_server_ended_while_idle_fail_no_batch(alias: str) -> None:
    def level(purse: Purse) -> str:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT @@tx_isolation")
            return str(cursor.fetchone()[0])

    def number(purse: Purse) -> int:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT CONNECTION_ID()")
            return int(cursor.fetchone()[0])

    with processor(alias, min_duration=0) as purses:
        assert purses.run("a", level) == "READ-COMMITTED"
        for _ in range(2):
            ended = purses.run("a", number)
            with connections[alias].cursor() as cursor:
                cursor.execute(f"KILL {ended}")
            connections[alias].close()
            assert purses.run("a", number) != ended


def test_a_row_that_is_locked_for_too_long_is_told_before_the_deadline(alias: str) -> None:
    with processor(alias, min_duration=0, max_duration=1) as purses:
        purses.run("a", add)
        with transaction.atomic(using=alias):
            Purse.objects.using(alias).update(total=100)
            answer = gevent.spawn(answer_of, purses.run, "a", add).get()
        connections[alias].close()
        assert answer.retry_safe
        assert not isinstance(answer, SaveFailed)
        assert "max_statement_time" in str(answer)
        assert purses.run("a", add) == 101

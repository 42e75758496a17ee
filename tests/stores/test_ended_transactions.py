"""A transaction that MySQL or MariaDB has ended by itself is over, also where an operation has swallowed the error."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from django.db import connections, transaction
from gevent.event import Event
from sqlalchemy.orm import object_session
from sqlalchemy.pool import NullPool

from tests.support import mariadb
from tests.support.adapters.base import case_named

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.adapters.base import Adapter

pytestmark = pytest.mark.mariadb


class Foreign:
    """Another program, whose transactions are heavier, so that of two that deadlock the batch's is rolled back."""

    def __init__(self, name: str, adapter: Adapter) -> None:
        opened: Any = adapter
        self.is_django = name.startswith("django")
        entries, purses = ("bank_entry", "bank_purse") if self.is_django else ("entries", "purses")
        self.entries = sa.table(entries, sa.column("text"))
        self.purses = sa.table(purses, sa.column("name"), sa.column("total", sa.Integer))
        self.is_theirs = self.entries.c.text == "theirs"
        self.looking = f"SELECT text FROM {entries} WHERE text = 'theirs'"  # noqa: S608 - of our own
        self.statement = f"UPDATE {entries} SET text = 'theirs too' WHERE text = 'theirs'"  # noqa: S608 - of our own
        database = connections[opened._direct].settings_dict["NAME"] if self.is_django else opened.place.database
        url = sa.make_url(mariadb.url()).set(drivername="mysql+pymysql", database=database)
        self.engine = sa.create_engine(url, poolclass=NullPool, isolation_level="READ COMMITTED")  # it locks no gaps
        self.batch_has_its_lock = Event()
        self.has_its_lock = Event()

    def write(self) -> None:
        self.batch_has_its_lock.wait()
        with self.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS heavy (i int PRIMARY KEY)")
            connection.execute(sa.update(self.entries).where(self.is_theirs).values(text="mine"))
            for number in range(60):
                connection.execute(sa.insert(sa.table("heavy", sa.column("i"))), {"i": number})
            self.has_its_lock.set()
            total = self.purses.c.total
            connection.execute(sa.update(self.purses).where(self.purses.c.name == "k").values(total=total + 1000))

    def execute(self, resource: Any, statement: str) -> None:
        """As an operation does."""
        if self.is_django:
            with connections[resource._state.db].cursor() as cursor:
                cursor.execute(statement)
        else:
            session_of(resource).execute(sa.text(statement))

    def savepoint(self, resource: Any) -> AbstractContextManager[Any]:
        block: AbstractContextManager[Any] = (
            transaction.atomic(using=resource._state.db) if self.is_django else session_of(resource).begin_nested()
        )
        return block


def session_of(resource: Any) -> Any:
    return object_session(resource)


@pytest.mark.parametrize("in_savepoint", [False, True])
@pytest.mark.parametrize("name", ["sqlalchemy-mapped-lock-mariadb", "django-lock-mariadb"])
def test_a_deadlock_that_an_operation_swallows_has_the_batch_replayed(
    tmp_path: Path, name: str, in_savepoint: bool
) -> None:
    case = case_named(name)
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        foreign = Foreign(name, adapter)
        adapter.put("k", 0)
        runs: list[str] = []
        swallowed: list[Exception] = []
        with foreign.engine.begin() as connection:
            connection.execute(sa.insert(foreign.entries), {"text": "theirs"})

        def first(resource: Any) -> int:
            runs.append("first")
            adapter.insert(resource, "first")
            foreign.execute(resource, "SELECT 1")  # which flushes
            foreign.batch_has_its_lock.set()
            return adapter.add(resource, 1)

        def second(resource: Any) -> int:
            runs.append("second")
            foreign.has_its_lock.wait()
            try:
                with foreign.savepoint(resource) if in_savepoint else nullcontext():
                    foreign.execute(resource, foreign.statement)
            except Exception as error:
                swallowed.append(error)
            return adapter.add(resource, 1)

        with adapter.processor(min_duration=0.05, max_duration=20) as processor:
            callers = [gevent.spawn(processor.run, "k", operation) for operation in (first, second)]
            writer = gevent.spawn(foreign.write)
            answers = [caller.get() for caller in callers]
            writer.get()
        assert swallowed
        assert answers == [1001, 1002]
        assert adapter.get("k") == 1002
        assert runs == ["first", "second"] * 2
        assert adapter.rows().count("first") == 1


@pytest.fixture(scope="module")
def server_that_rolls_back() -> str:
    return mariadb.started("--innodb-rollback-on-timeout")


@pytest.mark.parametrize("name", ["sqlalchemy-mapped-lock-mariadb", "django-lock-mariadb"])
def test_a_wait_for_a_lock_that_was_too_long_and_has_ended_all_has_the_batch_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server_that_rolls_back: str, name: str
) -> None:
    monkeypatch.setenv("GEVENTBATCH_TEST_MARIADB_URL", server_that_rolls_back)
    case = case_named(name)
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        foreign = Foreign(name, adapter)
        adapter.put("k", 0)
        holds, swallowed, released = Event(), Event(), Event()
        with foreign.engine.begin() as connection:
            connection.execute(sa.insert(foreign.entries), {"text": "theirs"})

        def hold() -> None:
            with foreign.engine.begin() as connection:
                connection.execute(sa.update(foreign.entries).where(foreign.is_theirs).values(text="mine"))
                holds.set()
                swallowed.wait()
            released.set()

        def first(resource: Any) -> int:
            adapter.insert(resource, "first")
            foreign.execute(resource, "SELECT 1")  # which flushes
            return adapter.add(resource, 1)

        def second(resource: Any) -> int:
            if swallowed.is_set():
                released.wait()
            try:
                foreign.execute(resource, f"{foreign.looking} FOR UPDATE NOWAIT")
            except Exception:
                swallowed.set()
            return adapter.add(resource, 1)

        writer = gevent.spawn(hold)
        holds.wait()
        with adapter.processor(min_duration=0.05, max_duration=20) as processor:
            callers = [gevent.spawn(processor.run, "k", operation) for operation in (first, second)]
            assert [caller.get() for caller in callers] == [1, 2]
        writer.get()
        assert swallowed.is_set()
        assert adapter.get("k") == 2
        assert adapter.rows().count("first") == 1

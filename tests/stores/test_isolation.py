"""In mode "lock" a batch is READ COMMITTED, whatever the server's default; an application that insists is refused."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import gevent
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import pytest
import sqlalchemy as sa
from django.db import connections
from django.db.backends.postgresql.psycopg_any import IsolationLevel
from psycogreen.gevent import patch_psycopg  # type: ignore[import-untyped] # likewise
from sqlalchemy.orm import object_session

from geventbatch import Processor
from geventbatch.stores import DjangoStore, SQLAlchemyStore
from geventbatch.stores.django._connections import close_idle
from tests.support.adapters.base import case_named
from tests.support.adapters.sqlalchemy import PLACES, Purse, fresh
from tests.support.django_project.start import database, options_of, place

from tests.support.django_project.bank.models import Account  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPEATABLE_READ = r"-c default_transaction_isolation=repeatable\ read"


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("mode", [None, "lock"])
def test_an_engine_that_insists_on_another_level_is_refused_in_mode_lock_only(level: Any, mode: Any) -> None:
    made = sa.create_engine("postgresql+psycopg://", isolation_level=level)
    derived = sa.create_engine("postgresql+psycopg://").execution_options(isolation_level=level)
    for engine in (made, derived):
        with pytest.raises(ValueError, match=rf"isolation_level='{level}'.*Pass mode='version'"):
            SQLAlchemyStore.documents(engine, "documents", mode=mode)
        with pytest.raises(ValueError, match="isolation_level"):
            SQLAlchemyStore.mapped(engine, Purse, mode=mode)
        assert SQLAlchemyStore.documents(engine, "documents", mode="version").mode == "version"
    same = sa.create_engine("postgresql+psycopg://", isolation_level="READ COMMITTED")
    assert SQLAlchemyStore.documents(same, "documents").mode == "lock"


@pytest.mark.parametrize("level", [IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
@pytest.mark.parametrize("mode", [None, "lock"])
def test_a_database_of_djangos_that_insists_is_refused_in_mode_lock_only(level: Any, mode: Any) -> None:
    with database("postgresql://localhost/none", create=False, options={"isolation_level": level}) as alias:
        with pytest.raises(ValueError, match=f"isolation_level {level.name.replace('_', ' ')}"):
            DjangoStore(Account, by="name", using=alias, mode=mode)
        DjangoStore(Account, by="name", using=alias, mode="version")


def level_seen(purse: Purse) -> str:
    session: Any = object_session(purse)
    is_postgres = session.bind.dialect.name == "postgresql"
    asked = "current_setting('transaction_isolation')" if is_postgres else "@@tx_isolation"
    return str(session.execute(sa.text(f"SELECT {asked}")).scalar())


@contextmanager
def repeatable_read(directory: Path, driver: str) -> Iterator[sa.Engine]:
    """A PostgreSQL where that is the default of the session."""
    with fresh("postgresql", directory) as address:
        found: Any = PLACES["postgresql"](address)
        url = found.url.set(drivername=f"postgresql+{driver}")
        options = f"-c search_path={found.schema} {REPEATABLE_READ}"
        if driver == "pg8000":  # which takes no options
            socket = f"{url.query['host']}/.s.PGSQL.{url.port or 5432}"
            url = url.difference_update_query(["host"]).set(host=None, port=None)
            engine = sa.create_engine(url, connect_args={"unix_sock": socket}, pool_size=4, max_overflow=0)

            @sa.event.listens_for(engine, "connect")
            def set_up(connection: Any, _: object) -> None:
                cursor = connection.cursor()
                cursor.execute(f"SET search_path = {found.schema}")
                cursor.execute("SET default_transaction_isolation = 'repeatable read'")
                connection.commit()
        else:
            engine = sa.create_engine(url, connect_args={"options": options}, pool_size=4, max_overflow=0)
        with waiting_in_gevents_way() if driver == "psycopg2" else nullcontext():
            yield engine
        engine.dispose()


@contextmanager
def waiting_in_gevents_way() -> Iterator[None]:
    """Else psycopg2 would block the process while it waits for a row that another greenlet has locked."""
    patch_psycopg()
    yield
    psycopg2.extensions.set_wait_callback(None)


@pytest.mark.parametrize(
    ("driver", "pipeline"), [("psycopg", True), ("psycopg", False), ("psycopg2", False), ("pg8000", False)]
)
def test_a_batch_that_locks_is_read_committed_where_the_server_has_another_default(
    tmp_path: Path, driver: str, pipeline: bool
) -> None:
    with repeatable_read(tmp_path, driver) as engine:

        def processor(mode: Any) -> Processor[Purse]:
            store = SQLAlchemyStore.mapped(
                engine, Purse, by="name", mode=mode, missing=lambda key: Purse(name=key, total=0), pipeline=pipeline
            )
            return Processor(open_resource=store, min_duration=0, max_duration=20, max_attempts=1)

        def add(purse: Purse) -> int:
            purse.total += 1
            return purse.total

        with processor("lock") as one, processor("lock") as other, processor("version") as third:
            assert one.run("a", add) == 1
            assert one.run("a", level_seen) == "read committed"
            calls = [gevent.spawn(some.run, "a", add) for _ in range(10) for some in (one, other)]
            assert sorted(call.get() for call in calls) == list(range(2, 22))
            assert third.run("a", level_seen) == "repeatable read"
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SHOW transaction_isolation").scalar() == "repeatable read"


@pytest.mark.mariadb
def test_a_batch_that_locks_is_read_committed_on_mariadb(tmp_path: Path) -> None:
    case = case_named("sqlalchemy-mapped-lock-mariadb")
    with case.fresh(tmp_path) as address, case.opens(address) as adapter, adapter.processor() as processor:
        adapter.put("k", 1)
        assert [processor.run("k", level_seen) for _ in range(2)] == ["READ-COMMITTED"] * 2


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_batch_of_djangos_that_locks_is_read_committed_and_gives_the_level_back(
    tmp_path: Path, pipeline: bool
) -> None:
    with place("postgresql", tmp_path) as address:
        options = {"options": f"{options_of(address)['options']} {REPEATABLE_READ}"}
        with database(address, create=False, options=options) as alias:
            Account.objects.using(alias).create(name="a")

            def level(_: object) -> str:
                with connections[alias].cursor() as cursor:
                    cursor.execute("SHOW transaction_isolation")
                    return str(cursor.fetchone()[0])

            for mode, expected in (("lock", "read committed"), ("version", "repeatable read")) * 2:
                chosen: Any = mode
                for batching in (True, False):
                    store = DjangoStore(Account, by="name", using=alias, mode=chosen, pipeline=pipeline)
                    with Processor(open_resource=store, min_duration=0, batching=batching) as processor:
                        assert processor.run("a", level) == expected
            close_idle(alias)
            assert level(None) == "repeatable read"
            connections[alias].close()

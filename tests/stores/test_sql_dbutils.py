"""SQLStore over a ``PooledDB`` of DBUtils: who waits for a connection, and what happens behind sessions that ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import psycopg
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import pytest
from dbutils.pooled_db import PooledDB  # type: ignore[import-untyped] # likewise

from geventbatch import LoadFailed, Processor
from geventbatch.stores import SQLStore
from tests.support.callers import answer_of
from tests.support.sql_pools import database_with, psycopg2_waits

if TYPE_CHECKING:
    from collections.abc import Iterator

KEYS = 12  # as in the tables
CONNECTIONS = 2

TABLES = """
    CREATE TABLE shows (id int PRIMARY KEY, stock int);
    INSERT INTO shows SELECT i, 100 FROM generate_series(1, 12) i
"""
LOAD = "SELECT id, stock FROM shows WHERE id = %(key)s FOR UPDATE"
SAVE = "UPDATE shows SET stock = %(stock)s WHERE id = %(key)s"


class Server:
    """What a pool connects to; it counts, and may be away."""

    def __init__(self, told: str) -> None:
        self.told = told
        # -- mutable state ---------------------------------------------------------------------------------
        self.asked = 0
        self.is_away = False

    def connect(self) -> Any:
        self.asked += 1
        if self.is_away:
            raise psycopg2.OperationalError("nobody is there")
        return psycopg2.connect(self.told)

    def end_sessions(self) -> None:
        with psycopg.connect(self.told, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name = 'pooled'"
            )


@pytest.fixture
def server() -> Iterator[Server]:
    with psycopg2_waits(), database_with(TABLES) as told:
        yield Server(f"{told} application_name=pooled")


def sell(show: Any) -> int:
    show.stock -= 1
    return int(show.stock)


def over(pool: Any, **options: Any) -> Processor[Any]:
    return Processor(
        open_resource=SQLStore(pool, load=LOAD, save=SAVE), min_duration=0, max_duration=10, workers=KEYS, **options
    )


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("blocking", [True, False])
def test_more_batches_than_connections_wait_in_turn_and_all_are_saved(
    server: Server, blocking: bool, batching: bool
) -> None:
    pool = PooledDB(server.connect, maxconnections=CONNECTIONS, blocking=blocking)
    with over(pool, batching=batching) as processor:
        callers = [gevent.spawn(answer_of, processor.run, number % KEYS + 1, sell) for number in range(3 * KEYS)]
        assert sorted(caller.get() for caller in callers) == [*[97] * KEYS, *[98] * KEYS, *[99] * KEYS]
    assert server.asked == CONNECTIONS
    pool.close()


@pytest.mark.parametrize("options", [{}, {"ping": 0}, {"reset": False}, {"ping": 0, "reset": False}, {"ping": 7}])
def test_a_connection_that_the_server_has_ended_is_made_anew_whatever_the_pool_asks(
    server: Server, options: dict[str, Any]
) -> None:
    pool = PooledDB(server.connect, maxconnections=CONNECTIONS, **options)
    with over(pool) as processor:
        first = [gevent.spawn(processor.run, key, sell) for key in (1, 2)]
        assert [one.get() for one in first] == [99, 99]
        server.end_sessions()
        assert [answer_of(processor.run, key, sell) for key in (1, 2, 1, 2)] == [98, 98, 97, 97]
    pool.close()


def test_a_server_that_is_away_is_asked_a_few_times_and_its_own_error_is_told(server: Server) -> None:
    pool = PooledDB(server.connect, maxconnections=CONNECTIONS)
    with over(pool) as processor:
        assert processor.run(1, sell) == 99
        server.end_sessions()
        server.is_away, server.asked = True, 0
        failed = answer_of(processor.run, 1, sell)
        assert type(failed) is LoadFailed
        assert failed.retry_safe
        assert "nobody is there" in str(failed)
        assert server.asked <= 3
        server.is_away = False
        assert processor.run(1, sell) == 98
    pool.close()

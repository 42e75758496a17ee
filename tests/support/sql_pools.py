"""Databases and pools for SQLStore, as applications without an ORM have them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psycopg
import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import psycopg2.pool  # type: ignore[import-untyped] # likewise
from psycogreen.gevent import gevent_wait_callback  # type: ignore[import-untyped] # likewise
from psycopg_pool import ConnectionPool

from tests.support.psycopg_bench import of_schema, schema

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def database_with(tables: str) -> Iterator[str]:
    """What libpq is told of a schema of its own, in which these statements were executed."""
    with schema() as name:
        told, _ = of_schema(name)
        with psycopg.connect(told) as connection:
            connection.execute(tables)
        yield told


@contextmanager
def psycopg2_waits() -> Iterator[None]:
    """Let psycopg2 wait in gevent's way."""
    before: Any = psycopg2.extensions.get_wait_callback()
    psycopg2.extensions.set_wait_callback(gevent_wait_callback)
    try:
        yield
    finally:
        psycopg2.extensions.set_wait_callback(before)


@contextmanager
def pool_of(driver: str, told: str) -> Iterator[Any]:
    """A pool of two connections of "psycopg" or "psycopg2"."""
    if driver == "psycopg":
        with ConnectionPool(told, min_size=0, max_size=2, open=True) as pool:
            yield pool
        return
    with psycopg2_waits():
        of_psycopg2 = psycopg2.pool.ThreadedConnectionPool(0, 2, told)
        try:
            yield of_psycopg2
        finally:
            of_psycopg2.closeall()

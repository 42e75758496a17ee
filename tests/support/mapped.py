"""Stores of mapped classes where their ways differ: the databases, the modes, with psycopg's pipeline and without."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, object_session

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from sqlalchemy.orm import DeclarativeBase

    from tests.support.adapters.sqlalchemy import Server

EVERYWHERE: Final = [
    pytest.param(("sqlite", "version", True), id="sqlite"),
    pytest.param(("postgresql", "lock", True), id="postgresql-lock"),
    pytest.param(("postgresql", "version", True), id="postgresql-version"),
    pytest.param(("postgresql", "lock", False), id="postgresql-lock-no-pipeline"),
    pytest.param(("postgresql", "version", False), id="postgresql-version-no-pipeline"),
    pytest.param(("mariadb", "lock", True), id="mariadb-lock", marks=pytest.mark.mariadb),
    pytest.param(("mariadb", "version", True), id="mariadb-version", marks=pytest.mark.mariadb),
]
"""The settings of `opened`."""

ON_POSTGRES: Final = EVERYWHERE[1:5]

LOCKING: Final = [EVERYWHERE[1], EVERYWHERE[3], EVERYWHERE[5]]

COMPARING: Final = [EVERYWHERE[0], EVERYWHERE[2], EVERYWHERE[4], EVERYWHERE[6]]
"""Mode "version"."""


@dataclass
class Bed:
    """A database with the tables of some models, and how stores are made on it."""

    engine: sa.Engine
    other: sa.Engine
    """Of somebody else."""
    server: Server
    mode: Literal["lock", "version"]
    pipeline: bool
    base: type[DeclarativeBase]
    statements: list[str] = field(default_factory=list)
    """What was sent through `engine`."""

    def clear(self) -> None:
        """Nothing is in the tables, and nothing was sent."""
        with self.other.begin() as connection:
            for table in reversed(self.base.metadata.sorted_tables):
                connection.execute(sa.delete(table))
        self.statements.clear()

    def store(self, entity: type, **options: Any) -> SQLAlchemyStore[Any]:
        return SQLAlchemyStore.mapped(self.engine, entity, **{"mode": self.mode, "pipeline": self.pipeline, **options})

    @contextmanager
    def processor(self, entity: type, **options: Any) -> Iterator[Processor[Any]]:
        store = self.store(entity, **options)
        with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
            yield processor

    def together(self, entity: type, key: object, *operations: Callable[[Any], object], **options: Any) -> list[Any]:
        """What the callers of these operations are told, who run them in one batch."""
        with self.processor(entity, **options) as processor:
            callers = [gevent.spawn(answer_of, processor.run, key, operation) for operation in operations]
            return [caller.get() for caller in callers]

    def add(self, *instances: object) -> None:
        with Session(self.other) as session:
            session.add_all(instances)
            session.commit()

    def write(self, statement: sa.Executable) -> None:
        """Somebody else writes."""
        with self.other.begin() as connection:
            connection.execute(statement)

    def read(self, statement: sa.Select[Any]) -> Any:
        with Session(self.other) as session:
            return session.scalars(statement).one()

    def updates(self) -> list[str]:
        return [statement for statement in self.statements if "UPDATE " in statement and "SELECT" not in statement]


def opening(base: type[DeclarativeBase], settings: Sequence[Any] = EVERYWHERE) -> Any:
    """Make a fixture of a module: a database with the tables of *base*, in each of the *settings*, for all its tests.

    A module that has it as `opened_bed` has the fixture `bed` too, which is empty, or has what the module adds.
    """

    @pytest.fixture(scope="module", params=settings)
    def opened_bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
        with opened(request.param, base, tmp_path_factory.mktemp("bed")) as bed:
            yield bed

    return opened_bed


def session_of(resource: object) -> Session:
    session = object_session(resource)
    assert session is not None
    return session


@contextmanager
def opened(setting: tuple[Any, ...], base: type[DeclarativeBase], directory: Path) -> Iterator[Bed]:
    """A database with the tables of *base* that it can have."""
    server, mode, pipeline = setting
    with fresh(server, directory) as address:
        place = PLACES[server](address)
        engine, other = place.engine(None, pool_size=4), place.beside()
        base.metadata.create_all(other)
        bed = Bed(engine, other, server, mode, pipeline, base)
        sa.event.listen(
            engine, "before_cursor_execute", lambda _, __, statement, *___: bed.statements.append(statement)
        )
        yield bed
        engine.dispose()

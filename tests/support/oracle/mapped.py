"""The oracle for mapped classes: made-up examples, and how one is run."""

from __future__ import annotations

import enum
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from hypothesis import strategies as st
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

from tests.support.oracle import engines
from tests.support.oracle.engines import EnginesPlace
from tests.support.oracle.example import KEYS, Example, Orm, across, course, operations
from tests.support.oracle.mapped_model import render
from tests.support.oracle.mapped_operations import ACROSS, SHAPES, foreign, grammar
from tests.support.oracle.mapped_world import MappedWorld

IMPORTS = """\
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

WORLD = """
def world():
    engine, other = engines()
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        for statement in DDL:
            connection.exec_driver_sql(statement.format(p=PREFIX))
    return MappedWorld(engine, other, globals(), **OPTIONS)
"""

ORM = Orm(world="mapped_world", imports=engines.IMPORTS + IMPORTS, makes=engines.ENGINES + WORLD)

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
}


@st.composite
def examples(draw: st.DrawFn, server: str) -> Example:
    """One on *server*."""
    shape = draw(SHAPES[server])
    made, promised = draw(operations(grammar(shape)))
    return Example(
        ORM,
        server,
        render(shape, server),
        made,
        *draw(course(len(made), foreign(shape))),
        draw(_options(server)),
        promised,
    )


@st.composite
def across_examples(draw: st.DrawFn, server: str) -> Example:
    """One with operations across keys."""
    shape = draw(ACROSS[server])
    made, promised, at = draw(across(grammar(shape)))
    return Example(
        ORM,
        server,
        render(shape, server),
        made,
        *draw(course(len(made), foreign(shape))),
        (("bulk", draw(st.booleans())), *draw(_options(server))),
        promised,
        at,
        draw(st.integers(0, KEYS - 1)),
    )


@st.composite
def _options(draw: st.DrawFn, server: str) -> tuple[tuple[str, Any], ...]:
    mode = draw(st.sampled_from(["version"] if server == "sqlite" else ["lock", "lock", "version"]))
    options: dict[str, Any] = {"mode": mode}
    if server == "postgresql":
        options["pipeline"] = draw(st.sampled_from([True, True, False]))
    if draw(st.sampled_from([False, False, False, True])):
        options["session"] = {"autoflush": False}
    return tuple(sorted(options.items()))


class MappedPlace(EnginesPlace):
    """Two engines, and the mapped classes that are there."""

    def __init__(self, server: str, address: str) -> None:
        super().__init__(server, address, **_NAMES)

    def world(self, example: Example, names: dict[str, Any]) -> MappedWorld:
        """What the judge is given."""
        return MappedWorld(self.engine, self.other, names, **dict(example.options))

    def make(self, model: dict[str, Any]) -> None:
        """Make its tables, and what is there beside them."""
        with self.engine.begin() as connection:
            model["Base"].metadata.create_all(connection, checkfirst=False)
            for statement in model["DDL"]:
                connection.exec_driver_sql(statement.format(p=model["PREFIX"]))

    def drop(self, model: dict[str, Any]) -> None:
        """Drop its tables, and forget the classes."""
        with self.engine.begin() as connection:
            model["Base"].metadata.drop_all(connection, checkfirst=False)
        model["Base"].registry.dispose()

    def close(self) -> None:
        """Give the connections back, and forget the classes."""
        for model in self._models.values():
            model["Base"].registry.dispose()
        super().close()


place = partial(engines.new, MappedPlace)
"""A new one, on a server and in a directory."""

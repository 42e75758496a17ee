"""Importing this sets Django up. `database` adds one to its settings for as long as a test needs it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import django
from django.db import connections
from django.db.models import Model

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.django_project.settings")
django.setup()

from tests.django_project.bank.models import MODELS  # noqa: E402 - they need all the above
from tests.servers import postgres_url  # noqa: E402


@contextmanager
def database(
    url: str,
    *,
    alias: str | None = None,
    create: bool = True,
    models: Sequence[type[Model]] = MODELS,
    settings: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> Iterator[str]:
    """The alias of the database at *url* (as SQLAlchemy writes it), with the tables of the project."""
    alias = alias or f"test_{uuid4().hex}"
    connections.settings[alias] = {**_settings(url), "OPTIONS": options or {}, **(settings or {})}
    try:
        if create:
            create_tables(alias, models)
            connections[alias].close()
        yield alias
    finally:
        connections[alias].close()
        del connections[alias]
        del connections.settings[alias]


@contextmanager
def place(server: str, directory: Path, *, models: Sequence[type[Model]] = MODELS) -> Iterator[str]:
    """The address of a new database: a file, or a schema in the one that there is, which is quicker made."""
    if server == "sqlite":
        url = f"sqlite:///{directory / 'bank.sqlite'}"
        with database(url, models=models):
            yield url
        return
    with database(postgres_url(), create=False) as alias:
        schema = f"place_{uuid4().hex}"
        _execute(alias, f"CREATE SCHEMA {schema}")
        address = f"{postgres_url()}#{schema}"
        with database(address, options=options_of(address), models=models):
            yield address
        _execute(alias, f"DROP SCHEMA {schema} CASCADE")


def _execute(alias: str, statement: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute(statement)


def options_of(address: str) -> dict[str, Any]:
    schema = urlsplit(address).fragment
    return {"options": f"-c search_path={schema} -c synchronous_commit=off"} if schema else {}


def create_tables(alias: str, models: Sequence[type[Model]] = MODELS) -> None:
    with connections[alias].schema_editor() as editor:
        for model in models:
            editor.create_model(model)


def _settings(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    found: dict[str, Any]
    if parts.scheme == "sqlite":
        found = {"ENGINE": "django.db.backends.sqlite3", "NAME": parts.path[1:]}
    else:
        kind = "postgresql" if parts.scheme.startswith("postgres") else "mysql"
        found = {
            "ENGINE": f"django.db.backends.{kind}",
            "NAME": parts.path[1:],
            "USER": unquote(parts.username or ""),
            "PASSWORD": unquote(parts.password or ""),
            "HOST": parts.hostname or parse_qs(parts.query).get("host", [""])[0],
            "PORT": str(parts.port or parse_qs(parts.query).get("port", [""])[0]),
        }
    complete: dict[str, Any] = connections.configure_settings({"default": found})["default"]
    return complete

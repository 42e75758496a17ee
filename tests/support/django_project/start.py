"""Importing this sets Django up. `database` adds one to its settings for as long as a test needs it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import django
import pymysql
from django.db import connections
from django.db.models import Model

# As Django knows it: PyMySQL in place of mysqlclient, which blocks.
pymysql.version_info = (2, 2, 1, "final", 0)
pymysql.install_as_MySQLdb()

# Not for programs that tests start: Celery, for one, sets Django up where it is named.
with mock.patch.dict(os.environ, DJANGO_SETTINGS_MODULE="tests.support.django_project.settings"):
    django.setup()

from tests.support import mariadb
from tests.support.django_project.bank.models import MODELS
from tests.support.pgbouncer import pooled
from tests.support.servers import administer, postgres_url


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
    """The address of a new database. For PostgreSQL it is a schema in the one that there is, which is quicker made."""
    if server == "sqlite":
        address = f"sqlite:///{directory / 'bank.sqlite'}"
        with database(address, models=models):
            yield address
        return
    name = f"place_{uuid4().hex}"
    if server in {"postgresql", "pgbouncer"}:
        administer(f"CREATE SCHEMA {name}; SET LOCAL search_path = {name}; {_tables_of_postgres(tuple(models))}")
        address = f"{postgres_url()}#{name}"
        with ExitStack() as stack:
            yield address if server == "postgresql" else stack.enter_context(pooled(address))
        administer(f"DROP SCHEMA {name} CASCADE")
        return
    with database(mariadb.url(), create=False) as alias:
        # Where a text is equal to itself only; with MariaDB's usual one, " " is "" and "A" is "a".
        execute(alias, f"CREATE DATABASE {name} CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin")
        address = f"{mariadb.url()}#{name}"
        with database(address, options=options_of(address), models=models):
            yield address
        execute(alias, f"DROP DATABASE {name}")


@cache
def _tables_of_postgres(models: tuple[type[Model], ...]) -> str:
    """The statements that make them."""
    with database(postgres_url(), create=False) as alias:
        with connections[alias].schema_editor(collect_sql=True) as editor:
            for model in models:
                editor.create_model(model)
        return "".join(editor.collected_sql)


def options_of(address: str) -> dict[str, Any]:
    """For a connection to it."""
    parts = urlsplit(address)
    if parts.scheme.startswith("postgres") and parts.fragment:
        return {"options": f"-c search_path={parts.fragment.partition('#')[0]} -c synchronous_commit=off"}
    return {}


def endpoint(alias: str) -> tuple[str, int] | str:
    """Where its server is, for a proxy."""
    found = connections[alias].settings_dict
    if not found["HOST"].startswith("/"):
        return found["HOST"], int(found["PORT"])
    return (
        found["HOST"] if connections[alias].vendor == "mysql" else f"{found['HOST']}/.s.PGSQL.{found['PORT'] or 5432}"
    )


def execute(alias: str, statement: str) -> None:
    """Send it."""
    with connections[alias].cursor() as cursor:
        cursor.execute(statement)


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
        query = parse_qs(parts.query)
        found = {
            "ENGINE": f"django.db.backends.{kind}",
            "NAME": parts.fragment if kind == "mysql" else parts.path[1:],
            "USER": unquote(parts.username or ""),
            "PASSWORD": unquote(parts.password or ""),
            "HOST": query.get("host", query.get("unix_socket", [parts.hostname or ""]))[0],
            "PORT": str(parts.port or query.get("port", [""])[0]),
        }
    complete: dict[str, Any] = connections.configure_settings({"default": found})["default"]
    return complete

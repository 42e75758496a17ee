"""Importing this sets Django up. `database` adds one to its settings for as long as a test needs it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4

import django
from django.db import connections

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.django_project.settings")
django.setup()

from tests.django_project.bank.models import MODELS  # noqa: E402 - they need all the above


@contextmanager
def database(url: str, *, create: bool = True, **options: Any) -> Iterator[str]:
    """The alias of the database at *url* (as SQLAlchemy writes it), with the tables of the project."""
    alias = f"test_{uuid4().hex}"
    connections.settings[alias] = _settings(url, options)
    try:
        if create:
            create_tables(alias)
        yield alias
    finally:
        if alias in connections.settings:
            connections[alias].close()
            del connections[alias]
            del connections.settings[alias]


def create_tables(alias: str) -> None:
    with connections[alias].schema_editor() as editor:
        for model in MODELS:
            editor.create_model(model)


def _settings(url: str, options: dict[str, Any]) -> dict[str, Any]:
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
    found = {**found, "OPTIONS": options}
    settings: dict[str, Any] = connections.configure_settings({"default": found})["default"]
    return settings

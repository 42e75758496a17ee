"""Ready stores, each a `Processor`'s ``open_resource``: for SQLAlchemy, Django, Redis and plain SQL.

Each is imported when it is first asked for, and needs the extra of its name (``geventbatch[sqlalchemy]``,
``geventbatch[django]``, ``geventbatch[redis]``); the one for plain SQL needs nothing but the driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from geventbatch._renamed import renamed
from geventbatch.stores._reuse import Reuse

if TYPE_CHECKING:
    from geventbatch.stores._sql.errors import as_not_saved
    from geventbatch.stores.django import DjangoStore
    from geventbatch.stores.redis import RedisStore
    from geventbatch.stores.sql import SQLStore
    from geventbatch.stores.sqlalchemy import SQLAlchemyStore

__all__ = ["DjangoStore", "RedisStore", "Reuse", "SQLAlchemyStore", "SQLStore", "as_not_saved"]

_MODULES: Final = {
    "DjangoStore": "django",
    "RedisStore": "redis",
    "SQLAlchemyStore": "sqlalchemy",
    "SQLStore": "sql",
    "as_not_saved": "_sql.errors",
}

_IN_MIGRATIONS: Final = frozenset({"_documents", "_sqlalchemy_outcomes"})
"""Modules of earlier releases that Alembic has written into migrations, which are kept for ever."""

if TYPE_CHECKING:
    what_it_means = as_not_saved
else:

    def __getattr__(name: str) -> Any:
        if name in _IN_MIGRATIONS:
            return import_module(f"{__name__}.{name}")
        if name not in _MODULES:
            return renamed(__name__, name, {"what_it_means": "as_not_saved"})
        module = _MODULES[name]
        try:
            return getattr(import_module(f"{__name__}.{module}"), name)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != module:
                raise
            raise ImportError(f"{name} needs {module}: pip install 'geventbatch[{module}]'", name=module) from error

"""Whose tables a connection of Django's finds: a schema for each tenant is set on the request's connection.

A batch runs on another connection, which knows nothing of that. So a store is told how to prepare it; and where it is
not told, `run` is refused when the two connections would find other tables. Asking the server costs a round trip: what
the client knows is compared. Newer servers tell it the path by themselves (PostgreSQL 18); else it is what was sent.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import gevent
from django.db.backends.signals import connection_created

from geventbatch._safe_repr import shown
from geventbatch.stores.django._connections import current

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.db.backends.base.base import BaseDatabaseWrapper

    from geventbatch.stores.django._connections import Pool

_SET: Final = re.compile(
    r"\s*SET\s+(?:SESSION\s+(?!AUTHORIZATION\b|CHARACTERISTICS\b)|(?!SESSION\b|LOCAL\b|TRANSACTION\b|CONSTRAINTS\b))",
    re.IGNORECASE,
)

_watched: set[str] = set()
_sent: WeakKeyDictionary[BaseDatabaseWrapper, str] = WeakKeyDictionary()
"""What was sent last that says whose tables a connection finds."""


def prepare(connection: BaseDatabaseWrapper, key: Any, hook: Callable[[BaseDatabaseWrapper, Any], object]) -> None:
    """Call *hook* inside the transaction; what it sets is gone with that on PostgreSQL. Switches: as it does."""
    with connection.execute_wrapper(_set_locally):
        hook(connection, key)


def _set_locally(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    if isinstance(sql, str) and context["connection"].vendor == "postgresql":
        sql = _SET.sub("SET LOCAL ", sql, count=1) if _SET.match(sql) else sql
    return execute(sql, params, many, context)


def watch(alias: str) -> None:
    """Note from now on what the connections to *alias* find. Switches: no."""
    _watched.add(alias)
    there = current(alias)
    if there is not None and there.connection is not None:
        _see(connection=there)


class Place:
    """Whose tables the batches of a store find, against those that its callers find."""

    def __init__(self, alias: str, pool: Pool) -> None:
        self._alias = alias
        self._pool = pool
        self._found: tuple[Any, ...] | None = None

    def check(self, connection: BaseDatabaseWrapper, key: object) -> None:
        """Raise `RuntimeError` where the caller's *connection* finds others. Switches: the first time, to connect."""
        if connection.connection is None or connection.vendor not in {"postgresql", "mysql"}:
            return
        mine = _path(connection)
        if self._found is None:
            gevent.spawn(self._look).join()
        if self._found is not None and self._found != mine:
            raise RuntimeError(
                f"run() was called on key {shown(key)} by a caller whose connection to {self._alias!r} finds other "
                f"tables ({_told(mine)}) than the batch's ({_told(self._found)}), as with a schema for each tenant: "
                "give the store tenant=…, which says whose they are, and prepare_connection=…, which sets that for "
                "a batch"
            )

    def _look(self) -> None:
        with suppress(Exception):  # the load will say so
            connection, _ = self._pool.lend()
            try:
                connection.ensure_connection()
                self._found = _path(connection)
            finally:
                self._pool.give_back(connection, None)


def _path(connection: BaseDatabaseWrapper) -> tuple[Any, ...]:
    """What this side knows of where *connection* finds its tables."""
    tenant = getattr(connection, "schema_name", None)  # of django-tenants
    if connection.vendor == "mysql":
        return tenant, _sent.get(connection)
    told = _status(connection.connection)
    return tenant, _sent.get(connection) if told is None else told


def _status(raw: Any) -> Any:
    """The search path, as the server has told it by itself."""
    status = getattr(getattr(raw, "info", None), "parameter_status", None)
    return None if status is None else status("search_path")


def _told(path: tuple[Any, ...] | None) -> str:
    return " ".join(str(part) for part in path or () if part is not None) or "its default"


def _see(*, connection: BaseDatabaseWrapper, **_: object) -> None:
    """A connection was made: see what is sent on it."""
    if connection.alias not in _watched or connection.vendor not in {"postgresql", "mysql"}:
        return
    _sent.pop(connection, None)
    raw: Any = connection.connection
    if _status(raw) is None and _note not in connection.execute_wrappers:
        connection.execute_wrappers.append(_note)


def _note(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    executed = execute(sql, params, many, context)
    if isinstance(sql, str) and ("search_path" in sql or sql[:4].upper() == "USE "):
        _sent[context["connection"]] = sql if not params else f"{sql} {shown(params)}"
    return executed


connection_created.connect(_see, dispatch_uid="geventbatch.tenants")

"""Checks where a Django connection finds its tables: a schema for each tenant is set on the request's connection.

A batch runs on another connection, so a store must be told how to prepare that. If it is not told, `run` is refused
when the two connections would find different tables. To ask the server would cost a round trip, so what the client
knows is compared: the search path as reported by the server (PostgreSQL 18), else the last statement that has set it.
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
"""The last statement on each connection that has set where it finds its tables."""


def prepare(connection: BaseDatabaseWrapper, key: Any, hook: Callable[[BaseDatabaseWrapper, Any], object]) -> None:
    """Call *hook* inside the transaction, whose end undoes its SETs on PostgreSQL. Switches: as *hook* does."""
    with connection.execute_wrapper(_set_locally):
        hook(connection, key)


def _set_locally(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    if isinstance(sql, str) and context["connection"].vendor == "postgresql":
        sql = _SET.sub("SET LOCAL ", sql, count=1) if _SET.match(sql) else sql
    return execute(sql, params, many, context)


def watch(alias: str) -> None:
    """Note from now on where the connections to *alias* find their tables. Switches: no."""
    _watched.add(alias)
    there = current(alias)
    if there is not None and there.connection is not None:
        _see(connection=there)


class Place:
    """Where the batches of a store find their tables, to be compared with its callers."""

    def __init__(self, alias: str, pool: Pool) -> None:
        self._alias = alias
        self._pool = pool
        self._found: tuple[Any, ...] | None = None

    def check(self, connection: BaseDatabaseWrapper, key: object) -> None:
        """Raise `RuntimeError` if *connection*, the caller's, finds others. Switches: the first time, to connect."""
        if connection.connection is None or connection.vendor not in {"postgresql", "mysql"}:
            return
        mine = _path(connection)
        if self._found is None:
            gevent.spawn(self._look).join()
        if self._found is not None and self._found != mine:
            raise RuntimeError(
                f"an operation on key {shown(key)} was called where the connection to {self._alias!r} finds other "
                f"tables ({_told(mine)}) than the batch's ({_told(self._found)}), as with a schema for each tenant: "
                "give the store tenant=…, which says whose they are, and prepare_connection=…, which sets that for "
                "a batch"
            )

    def _look(self) -> None:
        with suppress(Exception):  # the load raises it again
            connection, _ = self._pool.lend()
            try:
                connection.ensure_connection()
                self._found = _path(connection)
            finally:
                self._pool.give_back(connection, None)


def _path(connection: BaseDatabaseWrapper) -> tuple[Any, ...]:
    """Return where *connection* finds its tables, as far as the client knows."""
    tenant = getattr(connection, "schema_name", None)  # set by django-tenants
    if connection.vendor == "mysql":
        return tenant, _sent.get(connection)
    told = _status(connection.connection)
    return tenant, _sent.get(connection) if told is None else told


def _status(raw: Any) -> Any:
    """Return the search path that the server has reported, or None."""
    status = getattr(getattr(raw, "info", None), "parameter_status", None)
    return None if status is None else status("search_path")


def _told(path: tuple[Any, ...] | None) -> str:
    return " ".join(str(part) for part in path or () if part is not None) or "its default"


def _see(*, connection: BaseDatabaseWrapper, **_: object) -> None:
    """Watch the statements of a new connection, if its server does not report the search path."""
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

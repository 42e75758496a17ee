"""Django's ``check`` for set-ups in which batches would block, fail or be undone.

``manage.py check`` finds faults of the settings. Faults of a process show only in a worker; there the app logs them at
its start.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import gevent
from django.conf import settings
from django.core.checks import CheckMessage, register
from django.core.checks import Warning as CheckWarning
from django.db import connections
from django.urls import URLPattern, URLResolver, get_resolver
from gevent import monkey

from geventbatch import _seam
from geventbatch._core import process
from geventbatch._watch import setup_check, setup_problems
from geventbatch.integrations import django as integration
from geventbatch.stores.django import DjangoStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from geventbatch import Processor
    from geventbatch._options import Options

    Check = Callable[..., list[CheckMessage]]

_GRACEFUL_TIMEOUT: Final = 30.0
"""Seconds: gunicorn's default."""

_POOL_SIZE: Final = 4
"""Connections: the default of psycopg's pool."""

_ENDS_SESSIONS: Final = ("idle_in_transaction_session_timeout", "transaction_timeout")
_MYSQL_TIMEOUTS: Final = ("read_timeout", "write_timeout")
_UNITS: Final = {"": 0.001, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}


class Declared(NamedTuple):
    """A processor over a `DjangoStore`, and its name for messages."""

    name: str
    processor: Processor[Any]
    store: DjangoStore[Any]

    @property
    def options(self) -> Options:
        """The processor's options."""
        return _seam.options_of(self.processor)

    @property
    def database(self) -> dict[str, Any]:
        """The settings of the store's database."""
        found: dict[str, Any] = connections.settings[self.store.using]
        return found


def declared() -> list[Declared]:
    """Return the processors over a `DjangoStore` whose database is in the settings; a stopped one does nothing more."""
    names = _names()
    found = []
    for processor in process.processors():
        if _seam.dispatcher_of(processor).stopping:
            continue
        store = _seam.options_of(processor).open_resource
        if isinstance(store, DjangoStore) and store.using in connections.settings:
            found.append(Declared(names.get(id(processor), f"over {store!r}"), processor, store))
    return found


def _names() -> dict[int, str]:
    return {id(processor): name for name, processor in integration.processors().items()}


def register_all() -> None:
    """Register the checks with ``manage.py check``."""
    for check in (*_OF_PROCESS, *_OF_SETTINGS):
        register(check, "geventbatch")


# -- of the process ------------------------------------------------------------------------------------------


def in_gevent_worker() -> bool:
    """Return whether this process belongs to gunicorn with gevent workers, or to Celery with gevent's pool."""
    return "gunicorn.workers.ggevent" in sys.modules or "celery.concurrency.gevent" in sys.modules


def of_process() -> list[CheckMessage]:
    """Return the warnings about this process."""
    return [message for check in _OF_PROCESS for message in check()]


def check_patched(**_: object) -> list[CheckMessage]:
    """W001: a gevent worker is not patched, so that one wait blocks all greenlets."""
    if not in_gevent_worker() or monkey.is_module_patched("socket"):
        return []
    return [
        CheckWarning(
            "gevent has not patched this process, although it is for gevent workers: a database that is waited for "
            "will block every request.",
            hint="Let gunicorn.conf.py begin with `from geventbatch.integrations.gunicorn import *`, or call "
            "gevent.monkey.patch_all() there.",
            id="geventbatch.W001",
        )
    ]


def check_connections(**_: object) -> list[CheckMessage]:
    """W002: all greenlets share one connection, since Django was imported before gevent patched."""
    if not monkey.is_module_patched("threading") or not are_shared():
        return []
    return [
        CheckWarning(
            "Django was imported before gevent patched threading: all greenlets share one connection of each database.",
            hint="Call gevent.monkey.patch_all() before anything else is imported; with gunicorn --preload, in "
            "gunicorn.conf.py.",
            id="geventbatch.W002",
        )
    ]


def are_shared() -> bool:
    """Return whether a greenlet sees another one's connections."""
    before = set(_initialized())
    aliases = [alias for alias in connections if alias not in before][:1]
    for alias in aliases:
        connections[alias]  # makes a wrapper to be seen, and does not connect
    try:
        return bool(gevent.spawn(_initialized).get())
    finally:
        for alias in aliases:
            del connections[alias]


def _initialized() -> list[str]:
    return [connection.alias for connection in connections.all(initialized_only=True)]


def check_psycopg(**_: object) -> list[CheckMessage]:
    """W003: psycopg 3 waits in C, where gevent cannot switch."""
    return [CheckWarning(problem.what, hint=problem.mend, id="geventbatch.W003") for problem in setup_check.psycopg()]


def check_psycopg2(**_: object) -> list[CheckMessage]:
    """W004: psycopg2 blocks."""
    return [CheckWarning(problem.what, hint=problem.mend, id="geventbatch.W004") for problem in setup_check.psycopg2()]


_OF_PROCESS: Final[tuple[Check, ...]] = (check_patched, check_connections, check_psycopg, check_psycopg2)


# -- of the settings -----------------------------------------------------------------------------------------


def check_atomic_requests(**_: object) -> list[CheckMessage]:
    """W005: every view is inside a transaction, in which `run` is refused."""
    suspects = [one for one in declared() if one.database["ATOMIC_REQUESTS"] and not one.store.allow_atomic]
    exempt = _exempt_aliases() if suspects else set()
    return [
        CheckWarning(
            f"The processor {one.name} refuses run() in views: ATOMIC_REQUESTS is on for the database "
            f"{one.store.using!r}, and no view is exempt from it.",
            hint="Decorate the views that call run() with django.db.transaction.non_atomic_requests. (This check is "
            "silent as soon as one view is exempt: it does not see which views call run().)",
            id="geventbatch.W005",
        )
        for one in suspects
        if one.store.using not in exempt
    ]


def _exempt_aliases() -> set[str]:
    if not getattr(settings, "ROOT_URLCONF", None):
        return set()
    views = _views(get_resolver().url_patterns)
    return {alias for view in views for alias in getattr(view, "_non_atomic_requests", ())}


def _views(patterns: Iterable[URLPattern | URLResolver]) -> Iterator[object]:
    for pattern in patterns:
        if isinstance(pattern, URLResolver):
            yield from _views(pattern.url_patterns)
        else:
            yield pattern.callback


def check_graceful_timeout(**_: object) -> list[CheckMessage]:
    """W006: a batch may take longer than gunicorn waits before it kills the worker."""
    most = float(getattr(settings, "GEVENTBATCH_GRACEFUL_TIMEOUT", _GRACEFUL_TIMEOUT))
    return [
        CheckWarning(
            f"The processor {one.name} has a max_duration of {_seconds(one):g} s, which does not fit into gunicorn's "
            f"graceful_timeout of {most:g} s: a batch may be killed in its save.",
            hint="Shorten max_duration, or lengthen graceful_timeout and say so in "
            "settings.GEVENTBATCH_GRACEFUL_TIMEOUT (seconds).",
            id="geventbatch.W006",
        )
        for one in declared()
        if _seconds(one) >= most
    ]


def check_database_timeouts(**_: object) -> list[CheckMessage]:
    """W007: the database ends the session, or the driver gives up, before the batch's deadline."""
    return [
        CheckWarning(
            f"The processor {one.name} has a max_duration of {_seconds(one):g} s, but {name} of the database "
            f"{one.store.using!r} ends its connection after {seconds:g} s.",
            hint=f"Shorten max_duration, or lengthen {name}.",
            id="geventbatch.W007",
        )
        for one in declared()
        for name, seconds in _database_timeouts(one.database)
        if 0 < seconds <= _seconds(one)
    ]


def _database_timeouts(database: dict[str, Any]) -> Iterator[tuple[str, float]]:
    options = database["OPTIONS"]
    given = options.get("options")
    for name in _ENDS_SESSIONS:
        for number, unit in re.findall(
            rf"{name}\s*=\s*'?(\d+)\s*(ms|s|min|h)?", given if isinstance(given, str) else ""
        ):
            yield name, int(number) * _UNITS[unit]
    for name in _MYSQL_TIMEOUTS:
        if isinstance(options.get(name), (int, float)):
            yield name, float(options[name])


def check_max_age(**_: object) -> list[CheckMessage]:
    """W008: each greenlet keeps a connection."""
    return [
        CheckWarning(
            f"CONN_MAX_AGE of the database {alias!r} is {connections.settings[alias]['CONN_MAX_AGE']!r}: under gevent "
            "each request's greenlet keeps a connection of its own for so long, and hardly ever uses it again.",
            hint="Set it to 0. The connections of batches are kept all the same (conn_max_age of DjangoStore); for "
            'connections of requests there is OPTIONS["pool"] (Django 5.1, psycopg 3).',
            id="geventbatch.W008",
        )
        for alias in _aliases()
        if connections.settings[alias]["CONN_MAX_AGE"] != 0
    ]


def _aliases() -> list[str]:
    return sorted({one.store.using for one in declared()})


def check_max_batches(**_: object) -> list[CheckMessage]:
    """W009: nothing bounds the number of connections."""
    return [
        CheckWarning(
            f"The processor {one.name} has no max_batches: its batches want as many connections to the database "
            f"{one.store.using!r} at once as there are busy keys.",
            hint="Set max_batches so that all workers together stay under the limit of the database.",
            id="geventbatch.W009",
        )
        for one in declared()
        if one.options.max_batches is None and not one.database["ENGINE"].endswith("sqlite3")
    ]


def check_pool(**_: object) -> list[CheckMessage]:
    """W010: batches wait for connections, while their time runs."""
    return [
        CheckWarning(
            f"The processor {one.name} has a max_batches of {one.options.max_batches}, but the pool of the "
            f"database {one.store.using!r} has {size} connections: the others wait, while their max_duration runs.",
            hint='Raise max_size in OPTIONS["pool"] to max_batches plus what requests need: a request that has used '
            "the database holds its connection while it waits in run().",
            id="geventbatch.W010",
        )
        for one in declared()
        for size in _pool_sizes(one.database)
        if one.options.max_batches is not None and one.options.max_batches > size
    ]


def _pool_sizes(database: dict[str, Any]) -> list[int]:
    pool = database["OPTIONS"].get("pool")
    if not pool:
        return []
    options = pool if isinstance(pool, dict) else {}
    return [options.get("max_size") or options.get("min_size", _POOL_SIZE)]


_IDS: Final = {"short-deadline": "W011", "unsaved": "W012", "uncompared": "W013", "misspelt": "W014"}


def check_set_up(**_: object) -> list[CheckMessage]:
    """W011: too little time over a server; W012: nothing is saved; W013: a pair on several workers; W014: misspelt."""
    return [
        CheckWarning(problem.what, hint=problem.mend, id=f"geventbatch.{_IDS[problem.name]}")
        for problem in setup_problems.problems(_names())
    ]


def _seconds(one: Declared) -> float:
    return one.options.max_duration


_OF_SETTINGS: Final[tuple[Check, ...]] = (
    check_atomic_requests,
    check_graceful_timeout,
    check_database_timeouts,
    check_max_age,
    check_max_batches,
    check_pool,
    check_set_up,
)

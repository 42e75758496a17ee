"""uWSGI's gevent loop (``gevent = 1000``), by one line in the application's module; outside of uWSGI it does nothing.

    import geventbatch.integrations.uwsgi

- Whatever ends a worker, uWSGI lets it save and answer first what it has admitted, and send the responses. By itself,
  uWSGI drops everything at INT, QUIT and TERM, and calls no ``atexit`` function of Python's. This module uses
  ``uwsgi.atexit``. A function that the application had assigned before is called last, once.
- QUIT ends a worker as INT does, and a signal ends one that is still importing: uWSGI would forget that it was sent,
  and the master would wait for that worker for ever.
- A worker too many (``cheaper``) ends gracefully. By itself it would serve until the master kills it with its requests.
- Each worker notices the fork: uWSGI calls none of Python's fork hooks.
- At the first `run` of a worker, the garbage collector leaves out what is loaded, unless ``GEVENTBATCH_FREEZE=0`` is in
  the environment.
- `check_setup`, and a warning at the first `run`, name the options of uWSGI by which requests or batches are cut off.

The import raises a `RuntimeError` if uWSGI has another loop. With threads, or one request at a time, there is nothing
to batch: do without this module there, and set ``batching=False``.

docs/deploying.md has the options under which nothing is lost and no response cut off.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import Event

from geventbatch import stop_all
from geventbatch._core import process
from geventbatch._watch import setup_check
from geventbatch._watch.problem import SetupProblem
from geventbatch.integrations._collector import freeze_loaded, is_refused
from geventbatch.integrations._longest import killed_after

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["stop"]

# Shares of worker-reload-mercy: the worker has to end by itself before uWSGI kills it.
_TO_STOP: Final = 0.75
_TO_RESPOND: Final = 0.15

# It is built into uWSGI, and there before anything is imported. A module from a file is somebody else's.
_uwsgi: Any = sys.modules.get("uwsgi")
_inside: Final = hasattr(_uwsgi, "masterpid")
_former: Final[Any] = getattr(_uwsgi, "atexit", None) if _inside else None

_responded: Final = Event()
"""Set when the last request of a worker that ends has its response."""

_cheaped: Final = Event()
"""Set when this worker, of which there is no need any more, has begun to end."""

_log = logging.getLogger("geventbatch.uwsgi")


def stop() -> None:
    """Save and answer what this worker has admitted, and wait for the responses. uWSGI calls it as ``uwsgi.atexit``.

    It waits for nine tenths of ``worker-reload-mercy`` at most. If an application assigns ``uwsgi.atexit`` after this
    module was imported, its function has to call this one.

    Switches: yes, until every admitted operation is answered and the responses are sent.
    """
    if isinstance(gevent.getcurrent(), gevent.Greenlet):
        # uWSGI calls it from the last request too. The process ends when the main greenlet returns from here.
        _responded.set()
        return
    mercy = _mercy()
    try:
        if not stop_all(timeout=mercy * _TO_STOP):
            _log.error(
                "Some batches did not end within %g s, and end with this worker: it is unknown whether they were "
                "saved. Let max_duration end well before worker-reload-mercy",
                mercy * _TO_STOP,
            )
    finally:
        if _is_responding():
            _responded.wait(mercy * _TO_RESPOND)
        if _former is not None:
            _former()


def _is_responding() -> bool:
    number = _uwsgi.worker_id() if _inside else 0  # 0 in the master, in a mule, and in the spooler
    return bool(number and _uwsgi.workers()[number - 1]["status"].startswith(b"busy"))


def _mercy() -> int:
    return _seconds("worker-reload-mercy", 60)


def _seconds(option: str, default: int) -> int:
    given: Any = _uwsgi.opt.get(option) if _inside else None
    last = given[-1] if isinstance(given, list) else given  # a list if it was given more than once
    return int(last) if isinstance(last, bytes) and last.isdigit() else default


def _hear_signals() -> None:
    """Have this worker end as it does at other signals, where uWSGI leaves one to the kernel or ignores it."""
    if _uwsgi.worker_id():
        if signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL:  # terminals send it to all processes
            gevent.signal_handler(signal.SIGQUIT, os.kill, os.getpid(), signal.SIGINT)
        gevent.signal_handler(signal.SIGWINCH, _end_if_cheaped)


def _end_if_cheaped() -> None:
    """End gracefully if this is a worker too many: the loop would go on, until the master kills it."""
    if _uwsgi.workers()[_uwsgi.worker_id() - 1]["status"] == b"cheap" and not _cheaped.is_set():
        _cheaped.set()  # a second HUP would find no handler, and kill
        os.kill(os.getpid(), signal.SIGHUP)


def _problems() -> Iterator[SetupProblem]:
    mercy, harakiri = _mercy(), _seconds("harakiri", 0)
    limit = mercy * _TO_STOP
    why = f"a worker that is told to end waits {limit:g} s for it, since worker-reload-mercy is {mercy} s"
    yield from killed_after(limit, why, ", or raise worker-reload-mercy")
    if harakiri:
        why = f"harakiri = {harakiri} ends the whole worker, with all its requests"
        yield from killed_after(harakiri, why, ", or do without harakiri")
    if not {"http", "https"}.isdisjoint(_uwsgi.opt):
        yield SetupProblem(
            "uwsgi-router",
            "The HTTP router of uWSGI (http = ...) drops the requests under way at a reload and at an end: their "
            "operations are saved, but their clients get no response.",
            "Use http-socket = ..., or socket = ... behind a proxy.",
        )
    if _uwsgi.atexit is not stop:
        yield SetupProblem(
            "uwsgi-atexit",
            "uwsgi.atexit was assigned after geventbatch.integrations.uwsgi was imported: a worker that is told to end "
            "saves and answers nothing, unless that function calls geventbatch.integrations.uwsgi.stop().",
            "Assign it before the import, which has it called last.",
        )


def _join() -> None:
    """Connect `stop` and the looks.

    Raises:
        RuntimeError: uWSGI has another loop than gevent's.
        ValueError: ``GEVENTBATCH_FREEZE`` says neither yes nor no.
    """
    if _uwsgi.loop != b"gevent":
        raise RuntimeError(
            f"geventbatch.integrations.uwsgi needs uWSGI's gevent loop (gevent = 1000), but its loop is {_uwsgi.loop}: "
            "without gevent there is nothing to batch. Do not import this module there, and set batching=False"
        )
    _uwsgi.atexit = stop
    setup_check.looks.append(_problems)
    if _uwsgi.worker_id():
        # A worker that is still importing would ignore it, and the server that is told to end would never do so. The
        # loop puts its own handler there.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process.at_first_run(_hear_signals)
    if not is_refused():
        process.at_first_run(freeze_loaded)  # uWSGI has no hook behind a worker's import of the application
    if _uwsgi.masterpid():  # without a master, this module of uWSGI's raises
        import_module("uwsgidecorators").postfork(process.notice_fork)


if _inside:
    _join()

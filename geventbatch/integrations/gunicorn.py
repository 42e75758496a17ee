"""gunicorn with gevent workers, by one line at the top of ``gunicorn.conf.py``: no operation that was admitted is lost.

    from geventbatch.integrations.gunicorn import *

What it does:

- It patches, before the application is imported: with ``--preload``, gunicorn would patch after that, and a database
  driver would block the hub.
- It sets ``worker_class`` to "gevent" and ``control_socket_disable`` to True: in a patched parent, the server behind
  that socket is a greenlet, and every worker that is forked later would inherit it.
- TERM, HUP and max_requests let a worker finish what it has accepted. INT and QUIT tell it to drop everything: it saves
  and answers that first, and so it does when a terminal's Ctrl-C reaches it twice.
- A signal ends a worker that is still starting, which would have put it into a queue that nobody reads.
- When a worker has started, it warns of processors whose ``max_duration`` is too long for ``graceful_timeout`` (what
  runs longer is killed), and, when there are more workers than one, of those whose load and save compare nothing.

Your own hooks stay as they are, those of the same names too: both are called. For that, this module has the hook
``nworkers_changed``; in the rare case that you have one, call this module's in it. The worker class may be a child of
gunicorn's gevent worker. With one that does not call ``pre_request`` and ``post_request``, as ``gevent_pywsgi``, INT
and QUIT save everything too, but the last responses may be lost.

Nothing can be done for connections that no worker has accepted when the last one closes the socket, nor for kept ones
whose next request comes while a worker ends.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

import gevent
from gevent import GreenletExit, monkey

monkey.patch_all()

from geventbatch import _seam, stop_all  # noqa: E402 - as it asks for itself
from geventbatch._core import process  # noqa: E402 - as it asks for itself
from geventbatch._watch import setup_problems  # noqa: E402 - as it asks for itself

if TYPE_CHECKING:
    from collections.abc import Callable

    _Hook = Callable[..., object]

__all__ = ["control_socket_disable", "nworkers_changed", "worker_class"]

worker_class = "gevent"
control_socket_disable = True

# Shares of graceful_timeout: the worker has to end by itself before gunicorn kills it.
_TO_STOP: Final = 0.75
_TO_RESPOND: Final = 0.15

_composed: WeakSet[Any] = WeakSet()
"""The configurations that have our hooks; a reload makes a new one."""


def nworkers_changed(server: Any, new_value: int, old_value: int | None) -> None:
    """Join our hooks with those of the configuration: gunicorn calls this first of all, and after each reload.

    Raises:
        RuntimeError: The workers are no gevent workers.
    Switches: no.
    """
    del new_value, old_value
    if not any(one.__module__ == "gunicorn.workers.ggevent" for one in server.worker_class.__mro__):
        raise RuntimeError(
            f"geventbatch needs gunicorn's gevent worker, but worker_class is {server.cfg.worker_class_str!r}, from "
            "gunicorn.conf.py or from the command line"
        )
    if server.cfg not in _composed:
        _composed.add(server.cfg)
        _Hooks().join(server.cfg)


class _Hooks:
    """What a worker does; made before the fork."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self._responding = 0  # calls of the application that are not completely answered
        self._workers = 0  # how many there were when this one was forked
        self._interrupted: Any = None  # the greenlet that ends everything then

    def join(self, cfg: Any) -> None:
        """Have ours called beside those of *cfg*: what a hook of ours needs to be there, another hook may take down."""
        for ours in (self.post_fork, self.post_worker_init, self.pre_request, self.worker_int, self.worker_exit):
            name = ours.__name__
            cfg.set(name, _in_turn(ours, getattr(cfg, name)))
        cfg.set("post_request", _in_turn(cfg.post_request, self.post_request))

    def post_fork(self, server: Any, worker: Any) -> None:
        """Let a signal end a worker that is still starting: nobody waits for it yet."""
        del worker
        self._workers = server.num_workers
        # The parent's handlers, which it has inherited, put signals into a queue that nobody reads here. The worker
        # would not end, and the parent wait for graceful_timeout.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)

    def post_worker_init(self, worker: Any) -> None:
        """Say what would be killed, and what would be lost."""
        for problem in setup_problems.know_workers(self._workers):
            worker.log.warning("%s", problem)
        most = worker.cfg.graceful_timeout * _TO_STOP
        for processor in process.processors():
            longest = _seam.options_of(processor).max_duration
            if longest > most and not _seam.dispatcher_of(processor).stopping:
                worker.log.warning(
                    "A batch may take max_duration = %g s, but a worker that is told to end waits %g s for it, since "
                    "graceful_timeout is %g s: what runs longer is killed",
                    longest,
                    most,
                    worker.cfg.graceful_timeout,
                )

    def pre_request(self, worker: Any, req: Any) -> None:
        """Count what has to be answered before the worker may end."""
        del worker, req
        self._responding += 1

    def post_request(self, worker: Any, req: Any, environ: Any, resp: Any) -> None:
        """It is answered: gunicorn has sent the response."""
        del worker, req, environ, resp
        self._responding -= 1

    def worker_int(self, worker: Any) -> None:
        """INT or QUIT: gunicorn drops what is left when this returns."""
        if self._interrupted is not None:
            # Ctrl-C reaches the workers twice, from the terminal and from the parent. The first call ends the process,
            # this one only its own greenlet: the second exit would meet the first one half-way and print a traceback.
            raise GreenletExit
        self._interrupted = gevent.getcurrent()
        _stop(worker)
        give_up_at = time.monotonic() + worker.cfg.graceful_timeout * _TO_RESPOND
        while self._responding and time.monotonic() < give_up_at:
            time.sleep(0.01)

    def worker_exit(self, server: Any, worker: Any) -> None:
        """Every other end: all is answered when this runs, unless graceful_timeout was over."""
        del server
        # The parent calls this too, for a worker that has gone already; with --preload its processors are what the next
        # worker inherits.
        if worker.pid == os.getpid():
            _stop(worker)
            # Ctrl-C, which reaches a worker twice, would meet the end of the interpreter half-way.
            for number in (signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            self._let_interrupted_end(worker.cfg.graceful_timeout * _TO_RESPOND)

    def _let_interrupted_end(self, seconds: float) -> None:
        """Wait for the greenlet that an interrupt has begun, which ends the process too and would do so half-way in."""
        if isinstance(self._interrupted, gevent.Greenlet):
            with suppress(SystemExit):
                self._interrupted.join(seconds)


def _stop(worker: Any) -> None:
    seconds = worker.cfg.graceful_timeout * _TO_STOP
    try:
        if not stop_all(timeout=seconds):
            worker.log.error("Some batches did not end in %g seconds", seconds)
    except RuntimeError:
        worker.log.exception("Some processors could not be waited for")


def _in_turn(first: _Hook, second: _Hook) -> _Hook:
    """Call both; *second* even if *first* failed, but not if that ended the greenlet."""

    @wraps(first)  # gunicorn counts the arguments
    def both(*arguments: object) -> None:
        try:
            first(*arguments)
        except Exception:
            second(*arguments)
            raise
        second(*arguments)

    return both

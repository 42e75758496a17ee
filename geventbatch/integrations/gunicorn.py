"""gunicorn with gevent workers, by one line at the top of ``gunicorn.conf.py``: every admitted operation is saved.

    from geventbatch.integrations.gunicorn import *

It does the following:

- It patches before the application is imported. With ``--preload``, gunicorn would patch only afterwards, and a
  database driver would block the hub.
- It sets ``worker_class`` to "gevent" and ``control_socket_disable`` to True: in a patched parent, the server behind
  that socket is a greenlet, and every worker that is forked later would inherit it.
- After TERM, HUP and max_requests, a worker finishes what it has accepted. After INT and QUIT it would drop everything:
  here it saves and answers first, even if a terminal's Ctrl-C reaches it twice.
- HUP ends a worker as TERM does: it is meant for the parent, but ``pkill -HUP gunicorn`` sends it to all processes.
- A signal ends a worker that is still starting. Otherwise it would land in a queue that nothing reads.
- The garbage collector leaves out what the parent has loaded before it forks (with ``--preload`` that is the
  application, whose memory the workers go on sharing) and what a started worker has loaded, and begins a pass after
  10,000 objects. With thousands of callers it would keep the hub for a tenth of a second otherwise. To refuse, set
  ``GEVENTBATCH_FREEZE=0`` in the environment, or ``os.environ["GEVENTBATCH_FREEZE"] = "0"`` in the configuration.
- With HTTP/2 in ``http_protocols``, it says at the start that the batches will have one operation.
- A started worker warns of processors whose ``max_duration`` is too long for ``graceful_timeout`` (gunicorn kills what
  runs longer). If there are several workers, it also warns of processors whose load and save compare nothing.

Your own hooks stay, even hooks of the same names: both are called. If your configuration defines ``nworkers_changed``
too, let it call this module's. The worker class may be ``gevent_pywsgi``, or another child of gunicorn's gevent worker.

Two kinds of connections are beyond help: connections that no worker has accepted when the last worker closes the
socket, and keep-alive connections whose next request comes while a worker ends. So is what takes longer than two
seconds when INT or QUIT comes behind a TERM: the parent kills it then, whatever graceful_timeout is.
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

from geventbatch import stop_all  # noqa: E402 - as it asks for itself
from geventbatch._watch import setup_check, setup_problems  # noqa: E402 - as it asks for itself
from geventbatch.integrations._collector import freeze_loaded  # noqa: E402 - as it asks for itself
from geventbatch.integrations._longest import killed_after  # noqa: E402 - as it asks for itself
from geventbatch.integrations.pywsgi import IDLE, ClosingHandler, close_all  # noqa: E402 - as it asks for itself

if TYPE_CHECKING:
    from collections.abc import Callable

    from greenlet import greenlet

    _Hook = Callable[..., object]

setup_check.patched.first = True  # of the application, nothing is imported yet

__all__ = ["control_socket_disable", "nworkers_changed", "worker_class"]

worker_class = "gevent"
control_socket_disable = True

# Shares of graceful_timeout: the worker has to end by itself before gunicorn kills it.
_TO_STOP: Final = 0.75
_TO_RESPOND: Final = 0.15

_composed: WeakSet[Any] = WeakSet()
"""The configurations that have our hooks. A reload makes a new configuration."""


def nworkers_changed(server: Any, new_value: int, old_value: int | None) -> None:
    """Join our hooks with the configuration's. gunicorn calls this first of all, and after each reload.

    Raises:
        RuntimeError: The workers are not gevent workers.
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
        if "h2" in getattr(server.cfg, "http_protocols", ()):  # older ones have no such setting
            server.log.warning(
                "http_protocols has h2: gunicorn serves the streams of an HTTP/2 connection one after the other, so "
                "that batches have one operation where a proxy multiplexes. Let the proxy speak HTTP/1.1 to gunicorn"
            )
        _Hooks().join(server.cfg)


class _Hooks:
    """The hooks of a worker, made before the fork."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self.responding = 0  # calls of the application whose responses are not sent
        self._workers = 0  # how many workers there were at the fork
        self._interrupted: Any = None  # the greenlet that ends the process after INT or QUIT

    def join(self, cfg: Any) -> None:
        """Call our hooks beside the hooks of *cfg*: around them, if another hook may take down what ours needs."""
        for ours in (
            self.pre_fork,
            self.post_fork,
            self.post_worker_init,
            self.pre_request,
            self.worker_int,
            self.worker_exit,
        ):
            name = ours.__name__
            cfg.set(name, _in_turn(ours, getattr(cfg, name)))
        cfg.set("post_request", _in_turn(cfg.post_request, self.post_request))

    def pre_fork(self, server: Any, worker: Any) -> None:
        """Keep the workers' collectors from writing to the memory that they share with the parent."""
        del server, worker
        freeze_loaded()

    def post_fork(self, server: Any, worker: Any) -> None:
        """Let a signal end a worker that is still starting: no caller waits for it yet."""
        del worker
        self._workers = server.num_workers
        # The handlers inherited from the parent put signals into a queue that nothing reads here. The worker would not
        # end, and the parent would wait for graceful_timeout.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)

    def post_worker_init(self, worker: Any) -> None:
        """Leave out of collections what is loaded. Warn of batches that would be killed, and of lost changes."""
        freeze_loaded()
        # `pkill -HUP gunicorn`, or a terminal that is closed, reaches the workers too, and would kill them.
        signal.signal(signal.SIGHUP, worker.handle_exit)
        handler = getattr(worker, "wsgi_handler", None)
        if handler is not None:
            idle: set[greenlet] = set()
            worker.wsgi_handler = type("Handler", (_Counted, handler), {"hooks": self, "idle": idle})
            gevent.spawn(_close_idle, worker, idle)
        limit = worker.cfg.graceful_timeout * _TO_STOP
        why = (
            f"a worker that is told to end waits {limit:g} s for it, since graceful_timeout is "
            f"{worker.cfg.graceful_timeout} s"
        )
        killed = killed_after(limit, why, ", or raise graceful_timeout")
        for problem in (*setup_problems.know_workers(self._workers), *killed):
            worker.log.warning("%s", problem)

    def pre_request(self, worker: Any, req: Any) -> None:
        """Count a request that must be answered before the worker may end."""
        del worker, req
        self.responding += 1

    def post_request(self, worker: Any, req: Any, environ: Any, resp: Any) -> None:
        """Note that gunicorn has sent the response."""
        del worker, req, environ, resp
        self.responding -= 1

    def worker_int(self, worker: Any) -> None:
        """Save and answer at INT or QUIT: when this returns, gunicorn drops the rest."""
        if self._interrupted is not None:
            # Ctrl-C reaches a worker twice, from the terminal and from the parent. The first call ends the process.
            # This one ends only its own greenlet: a second exit would meet the first half-way and print a traceback.
            raise GreenletExit
        self._interrupted = gevent.getcurrent()
        _stop(worker)
        give_up_at = time.monotonic() + worker.cfg.graceful_timeout * _TO_RESPOND
        while self.responding and time.monotonic() < give_up_at:
            time.sleep(0.01)

    def worker_exit(self, server: Any, worker: Any) -> None:
        """Save and answer at every other end, if graceful_timeout is not over yet."""
        del server
        # The parent calls this too, for a worker that has gone. With --preload, the parent's processors are those that
        # the next worker inherits.
        if worker.pid == os.getpid():
            _stop(worker)
            # Ctrl-C reaches a worker twice. The second would interrupt the end of the interpreter.
            for number in (signal.SIGINT, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            self._let_interrupted_end(worker.cfg.graceful_timeout * _TO_RESPOND)

    def _let_interrupted_end(self, seconds: float) -> None:
        """Wait for the greenlet that an interrupt has begun: it ends the process too, and may be half-way."""
        if isinstance(self._interrupted, gevent.Greenlet):
            with suppress(SystemExit):
                self._interrupted.join(seconds)


class _Counted(ClosingHandler):
    """Counts the responses of ``gevent_pywsgi``, which calls neither ``pre_request`` nor ``post_request``."""

    hooks: _Hooks

    def handle_one_response(self) -> None:
        """Respond to a request."""
        self.hooks.responding += 1
        try:
            super().handle_one_response()
        finally:
            self.hooks.responding -= 1


def _close_idle(worker: Any, idle: set[greenlet]) -> None:
    """Close idle connections when *worker* ends: ``gevent_pywsgi`` would wait for them until graceful_timeout."""
    while worker.alive:  # as the worker itself looks
        gevent.sleep(IDLE)
    gevent.sleep(IDLE)
    close_all(idle)


def _stop(worker: Any) -> None:
    seconds = worker.cfg.graceful_timeout * _TO_STOP
    try:
        if not stop_all(timeout=seconds):
            worker.log.error(
                "Some batches did not end within %g s. If gunicorn kills them, it is unknown whether they were "
                "saved. Let max_duration end well before graceful_timeout",
                seconds,
            )
    except RuntimeError:
        worker.log.exception("Some processors could not be waited for: their last batches may not be saved")


def _in_turn(first: _Hook, second: _Hook) -> _Hook:
    """Return a hook that calls both: *second* even if *first* raises, unless that ends the greenlet."""

    @wraps(first)  # gunicorn counts the arguments
    def both(*arguments: object) -> None:
        try:
            first(*arguments)
        except Exception:
            second(*arguments)
            raise
        second(*arguments)

    return both

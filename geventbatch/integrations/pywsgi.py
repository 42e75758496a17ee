"""gevent's own server, `gevent.pywsgi.WSGIServer`: `serve` in place of ``serve_forever``.

    from geventbatch.integrations.pywsgi import serve

    serve(WSGIServer(("127.0.0.1", 8000), app, spawn=1000))

By itself, the server handles no signal: TERM ends the process at once, and INT cuts off what is under way.
"""

from __future__ import annotations

import logging
import signal
import time
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.pywsgi import WSGIHandler

from geventbatch import stop_all
from geventbatch._check_values import check_seconds
from geventbatch._safe_repr import shown
from geventbatch._watch.problem import warn
from geventbatch.integrations._collector import freeze_loaded
from geventbatch.integrations._longest import killed_after

if TYPE_CHECKING:
    from gevent.pywsgi import WSGIServer
    from greenlet import greenlet

__all__ = ["serve"]

_TO_RESPOND: Final = 0.75
"""The share of the time that requests may take. The rest is for batches that no request waits for."""

IDLE: Final = 1.0
"""Seconds that a connection has for its next request, once the server accepts no more."""

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)

_log = logging.getLogger("geventbatch.pywsgi")


def serve(server: WSGIServer, timeout: float = 30) -> bool:
    """Serve until TERM, INT, QUIT or HUP; then respond to all that was accepted, and save all that was admitted.

    At the signal, *server* closes its socket. Requests under way get their responses, behind which their connections
    are closed; a connection that is idle is closed after a second. At last, what no request waits for is saved. A
    signal that the process ignores, as it does HUP under ``nohup``, stays ignored.

    Call it in the main thread, when the application is loaded: the garbage collector leaves out what there is by then,
    unless ``GEVENTBATCH_FREEZE=0`` is in the environment.

    Args:
        server: A server with a pool, as ``spawn=1000`` gives it one: else it does not wait for its requests.
        timeout: Seconds that all this may take: a little less than the supervisor waits before it kills. Requests have
            three quarters of them, and are cut off then.

    Returns:
        True if every batch has ended.

    Raises:
        TypeError: *timeout* is no number.
        ValueError: *server* has no pool, or *timeout* is not positive, infinite or NaN.
        OSError: *server* cannot listen.
    Switches: yes, until all has ended.
    """
    check_seconds("timeout", timeout, positive=True)
    if server.pool is None:
        raise ValueError(
            f"server is {shown(server)}, which has no pool, and so waits for no request when it stops: pass "
            "spawn=1000, or a gevent.pool.Pool, to WSGIServer"
        )
    to_respond = timeout * _TO_RESPOND
    why = f"requests that are told to end have {to_respond:g} s, since the timeout of serve() is {timeout:g} s"
    for problem in killed_after(to_respond, why, ", or a longer timeout"):
        warn(problem)
    freeze_loaded()
    end = _End(server, timeout)
    watchers = [gevent.signal_handler(one, end.begin) for one in _SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    try:
        server.serve_forever(stop_timeout=to_respond)
    finally:
        ended = stop_all(timeout=end.left())
        for watcher in watchers:
            watcher.cancel()
    if not ended:
        _log.error(
            "Some batches did not end within %g s after the signal: it is unknown whether they were saved. Let "
            "max_duration end well before the timeout of serve()",
            timeout,
        )
    return ended


class _End:
    """The end of a server, from the signal on."""

    def __init__(self, server: WSGIServer, timeout: float) -> None:
        self._server = server
        self._timeout = timeout
        # -- mutable state ---------------------------------------------------------------------------------
        self._give_up_at: float | None = None  # set at the signal
        self._idle: set[greenlet] = set()  # those of connections that wait for a request
        server.handler_class = type("Handler", (ClosingHandler, server.handler_class), {"idle": self._idle})

    def begin(self) -> None:
        """Accept no more. Later signals change nothing."""
        if self._give_up_at is None:
            self._give_up_at = time.monotonic() + self._timeout
            self._server.close()
            gevent.spawn_later(IDLE, self._close_idle)

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._timeout if self._give_up_at is None else max(0.0, self._give_up_at - time.monotonic())

    def _close_idle(self) -> None:
        close_all(self._idle)


def close_all(idle: set[greenlet]) -> None:
    """Close idle connections of a closed server. Once is enough: a request from now on is its connection's last."""
    gevent.killall(list(idle), block=False)


class ClosingHandler(WSGIHandler):
    """Closes its connection behind the response, once the server is closed."""

    idle: set[greenlet]
    """The greenlets of connections that wait for a request; set by a child of this class, for all of them."""

    def read_requestline(self) -> str:
        """Wait for a request."""
        current = gevent.getcurrent()
        self.idle.add(current)
        try:
            return super().read_requestline()
        finally:
            self.idle.discard(current)

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        """Tell the client to use another connection next time."""
        if self.server.closed and not any(name.lower() == "connection" for name, _ in headers):
            headers = [*headers, ("Connection", "close")]
        return super().start_response(status, headers, exc_info)

    def handle_one_response(self) -> None:
        """Respond, and read no further request if the server was closed meanwhile."""
        super().handle_one_response()
        if self.server.closed:
            self.close_connection = True

"""gunicorn with gevent workers: no booking that was answered is lost, whatever makes a worker end.

    gunicorn -c examples/tickets/gunicorn.conf.py

TERM, HUP and max_requests let a worker finish what it has accepted. INT and QUIT tell it to drop everything;
`worker_int` below saves and answers that first. Nothing can be done for connections that no worker has accepted when
the last one closes the socket, nor for kept ones whose next request comes while a worker ends.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from gevent import GreenletExit, monkey

# gunicorn patches each worker, after the fork. With --preload that is too late: the application is imported before, and
# its database driver would then block the hub. So it is patched here, before anything else.
monkey.patch_all()

wsgi_app = "examples.tickets.wsgi:app"
pythonpath = str(Path(__file__).parents[2])
worker_class = "gevent"
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
# More than max_pending: a worker that is overloaded says so, in place of letting connections wait unseen.
worker_connections = 2000
keepalive = 5
# A batch ends within max_duration (see `settings`). What is killed after this has not answered anybody.
graceful_timeout = 30
# Its server is a thread with an event loop of its own, which a patched process cannot run beside its work.
control_socket_disable = True

# Less than graceful_timeout, so that a worker ends by itself.
STOP_TIMEOUT = 20.0
# Responses are small. Whoever does not read one in this time does not get it.
RESPOND_TIMEOUT = 2.0

_responding = 0
"""How many calls of the application in this worker are not completely answered."""
_interrupted = False


def when_ready(server: Any) -> None:
    """Say where to look."""
    for listener in server.LISTENERS:
        print(f"Tickets are sold at {listener}/ (Ctrl-C ends it)", flush=True)


def post_fork(server: Any, worker: Any) -> None:
    """Let a signal end a worker that is still starting: nobody waits for it yet."""
    # The parent's handlers, which it has inherited, put signals into a queue that nobody reads here. The worker would
    # not end, and the parent wait for graceful_timeout.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def post_worker_init(worker: Any) -> None:
    """From here on, signals end it in order."""
    worker.log.info("Worker ready (pid: %s)", worker.pid)


def pre_request(worker: Any, req: Any) -> None:
    """Count what has to be answered before the worker may end."""
    global _responding
    _responding += 1


def post_request(worker: Any, req: Any, environ: Any, response: Any) -> None:
    """It is answered: gunicorn has sent the response."""
    global _responding
    _responding -= 1


def worker_int(worker: Any) -> None:
    """INT or QUIT: gunicorn drops what is left when this returns."""
    global _interrupted
    if _interrupted:
        # Ctrl-C reaches the workers twice, from the terminal and from the parent. The first call ends the process; this
        # one only its own greenlet, or the second exit would meet the first one half-way and print a traceback.
        raise GreenletExit
    _interrupted = True
    _stop(worker)
    give_up_at = time.monotonic() + RESPOND_TIMEOUT
    while _responding and time.monotonic() < give_up_at:
        time.sleep(0.01)


def worker_exit(server: Any, worker: Any) -> None:
    """Every other end: all is answered when this runs, unless graceful_timeout was over."""
    # The parent calls this too, for a worker that has gone already; with --preload its processor is what the next
    # worker inherits.
    if worker.pid == os.getpid():
        _stop(worker)


def _stop(worker: Any) -> None:
    app = getattr(worker, "wsgi", None)
    if app is not None and not app.extensions["tickets"].processor.stop(timeout=STOP_TIMEOUT):
        worker.log.error("some batches did not end in %s seconds", STOP_TIMEOUT)

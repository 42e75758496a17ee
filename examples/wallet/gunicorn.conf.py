"""gunicorn with gevent workers, and the process that finishes pending transfers.

gunicorn -c examples/wallet/gunicorn.conf.py
"""

# ruff: noqa: F403 - its hooks are for gunicorn to find here

import os
import sys
from pathlib import Path
from typing import Any

from geventbatch.integrations.gunicorn import *

wsgi_app = "examples.wallet.wsgi:application"
pythonpath = str(Path(__file__).parents[2])
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
# More than max_pending: a worker that is overloaded says so, in place of letting connections wait unseen.
worker_connections = 2000
keepalive = 5
# A batch ends within max_duration (see `processors`).
graceful_timeout = 30


def when_ready(server: Any) -> None:
    """Say where to look, and start what finishes transfers."""
    for listener in server.LISTENERS:
        print(f"The wallet is open at {listener}/ (Ctrl-C ends it)", flush=True)
    # A deployment has a unit of its own for it. Here it ends when this process does, and inherits no socket of it.
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "examples.wallet.finish"],
        {**os.environ, "PYTHONPATH": pythonpath},
        file_actions=[(os.POSIX_SPAWN_CLOSE, listener.sock.fileno()) for listener in server.LISTENERS],
    )


def post_worker_init(worker: Any) -> None:
    """From here on, signals end it in order."""
    worker.log.info("Worker ready (pid: %s)", worker.pid)

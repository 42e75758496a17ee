"""gunicorn with gevent workers: no booking that was answered is lost, whatever makes a worker end.

gunicorn -c examples/tickets/gunicorn.conf.py
"""

# First of all: it patches, and has every worker save and answer what it has admitted before it ends.
from geventbatch.integrations.gunicorn import *  # noqa: F403, I001 - its hooks are for gunicorn to find here

import os
from pathlib import Path
from typing import Any

wsgi_app = "examples.tickets.wsgi:app"
pythonpath = str(Path(__file__).parents[2])
workers = int(os.environ.get("WEB_CONCURRENCY", "2"))
# More than max_pending: a worker that is overloaded says so, in place of letting connections wait unseen.
worker_connections = 2000
keepalive = 5
# A batch ends within max_duration (see `settings`). What is killed after this has not answered anybody.
graceful_timeout = 30


def when_ready(server: Any) -> None:
    """Say where to look."""
    for listener in server.LISTENERS:
        print(f"Tickets are sold at {listener}/ (Ctrl-C ends it)", flush=True)


def post_worker_init(worker: Any) -> None:
    """Say that it works."""
    worker.log.info("Worker ready (pid: %s)", worker.pid)

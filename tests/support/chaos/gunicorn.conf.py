"""gunicorn as in production, with workers that say that they live: who breaks them has to know their names."""

# ruff: noqa: F403 - its hooks are for gunicorn to find here

import sys
from pathlib import Path
from typing import Any

from geventbatch.integrations.gunicorn import *
from tests.support.chaos.settings import settings
from tests.support.chaos.watch import begin_to_watch

TOLD = settings()

wsgi_app = "tests.support.chaos.app:app"
workers = TOLD.workers
worker_connections = 2000
preload_app = True  # a worker that was killed is replaced at once
keepalive = TOLD.keepalive
graceful_timeout = 5
timeout = 15


def when_ready(server: Any) -> None:
    for listener in server.LISTENERS:
        sys.stdout.write(f"listening at {listener}/\n")
        sys.stdout.flush()


def post_worker_init(worker: Any) -> None:
    Path(TOLD.directory, "workers", str(worker.pid)).touch()
    if TOLD.watched:
        begin_to_watch(Path(TOLD.directory, "watched"), TOLD.watched)


def child_exit(server: Any, worker: Any) -> None:
    Path(TOLD.directory, "workers", str(worker.pid)).unlink(missing_ok=True)

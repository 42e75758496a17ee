"""gunicorn's configuration with metrics of several workers, as docs/watching.md has it."""

# ruff: noqa: F403

import os
import sys
from typing import Any

from prometheus_client import multiprocess

from geventbatch.integrations.gunicorn import *

wsgi_app = "tests.support.programs.prometheus_app:app"
bind = "127.0.0.1:0"
workers = 2
graceful_timeout = 20


def when_ready(server: Any) -> None:
    sys.stdout.write(f"{server.LISTENERS[0].sock.getsockname()[1]}\n")
    sys.stdout.flush()


def child_exit(server: Any, worker: Any) -> None:
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]

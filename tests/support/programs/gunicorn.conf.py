"""gunicorn's configuration as a user would write it: our line on top, then hooks of their own."""

# ruff: noqa: F403

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from geventbatch.integrations.gunicorn import *

wsgi_app = "tests.support.programs.gunicorn_app:app"
bind = "127.0.0.1:0"
workers = 1
accesslog = None
graceful_timeout = 20
if "DEBUG" in os.environ:
    logging.basicConfig(level=logging.DEBUG)


def note(what: str) -> None:
    with Path(os.environ["HOOKS"]).open("a") as notes:
        notes.write(f"{what}\n")


def when_ready(server: Any) -> None:
    sys.stdout.write(f"{server.LISTENERS[0].sock.getsockname()[1]}\n")
    sys.stdout.flush()


def post_fork(server: Any, worker: Any) -> None:
    note("post_fork")
    while "POST_FORK_WAITS" in os.environ and not Path(os.environ["GATE"]).exists():
        time.sleep(0.01)


def post_worker_init(worker: Any) -> None:
    note("post_worker_init")


def pre_request(worker: Any, req: Any) -> None:
    if req.path == "/":
        note("pre_request")


def post_request(worker: Any, req: Any) -> None:
    if req.path == "/":
        note("post_request")


def worker_int(worker: Any) -> None:
    note("worker_int")


def worker_exit(server: Any, worker: Any) -> None:
    note("worker_exit")
    if worker.pid == os.getpid():
        os.kill(worker.pid, signal.SIGINT)  # Ctrl-C once more, which comes when all is over

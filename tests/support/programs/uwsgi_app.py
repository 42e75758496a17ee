"""The application of `gunicorn_app`, under uWSGI, with an end of its own."""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import gevent

logging.basicConfig()
_uwsgi: Any = sys.modules["uwsgi"]


def end() -> None:
    with Path(os.environ["HOOKS"]).open("a") as notes:
        notes.write(f"{os.getpid()}\n")


_uwsgi.atexit = end

if "PLAIN" not in os.environ:
    import_module("geventbatch.integrations.uwsgi")  # behind it, as a user's

if "LATE_ATEXIT" in os.environ:
    _uwsgi.atexit = end

from tests.support.programs.gunicorn_app import app as application
from tests.support.programs.gunicorn_app import load, run

if "WARMS_UP" in os.environ:
    gevent.spawn(run, "parents")
    gevent.sleep(0.01)  # its batch is loading

if "STARTS_LATE" in os.environ:
    sys.stderr.write("is starting\n")
    load("")

__all__ = ["application"]

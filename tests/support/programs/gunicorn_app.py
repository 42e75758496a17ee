"""A WSGI application whose batches load when a gate is open, and save to a file; and that says how it is."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import gevent
from gevent import monkey

from geventbatch import Processor, ProcessorOverloaded, check_setup
from geventbatch.integrations.wsgi import ErrorAnswers

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

PATCHED_AT_IMPORT = monkey.is_module_patched("socket")
GATE = Path(os.environ["GATE"])
SAVED = Path(os.environ["SAVED"])

frozen_at_fork: list[int] = []
"""How many objects the parent had left out of collections, if this was imported there."""
os.register_at_fork(after_in_child=lambda: frozen_at_fork.append(gc.get_freeze_count()))


def load(key: str) -> list[str]:
    while not GATE.exists():
        gevent.sleep(0.01)
    return []


def save(key: str, words: list[str]) -> None:
    gevent.sleep(0.05)
    with SAVED.open("a") as saved:
        saved.write("".join(f"{word}\n" for word in words))


ended = Processor(batching=False, max_duration=1000)  # nobody has to be warned of it
ended.stop()

processor = Processor(
    load_resource=load,
    save_resource=save,
    min_duration=0,
    max_duration=float(os.environ.get("MAX_DURATION", "10")),
)


def run(word: str) -> None:
    processor.run(f"key {len(word) % 3}", list.append, word)
    if word.startswith("slow"):  # to be rendered, once it is saved
        gevent.sleep(0.5)


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    word = environ["PATH_INFO"].removeprefix("/")
    if word == "overloaded":
        start_response("200 OK", [("Content-Length", "1")])
        raise ProcessorOverloaded
    if word.startswith("later"):
        gevent.spawn(run, word)
    elif word:
        run(word)
    told = {
        "pid": os.getpid(),
        "processor": repr(processor),
        "patched": PATCHED_AT_IMPORT,
        "frozen": gc.get_freeze_count(),
        "frozen_at_fork": frozen_at_fork,
        "threshold": gc.get_threshold(),
        "problems": [problem.name for problem in check_setup()],
    }
    body = json.dumps(told).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


app = ErrorAnswers(application)

"""A Celery application whose batches load when a gate is open, and save to a file; broker and results are folders.

Beyond so many words they load only when a second gate is open.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import gevent
from celery import Celery
from celery.signals import worker_ready, worker_shutdown

from geventbatch import Processor

FOLDER = Path(os.environ["FOLDER"])
GATE, SECOND_GATE, SAVED, NOTES = (FOLDER / name for name in ("gate", "second-gate", "saved", "notes"))
WORDS_BEFORE_THE_SECOND_GATE = 100
OUT = os.environ.get("OUT", "queue")
"""Where tasks are sent to, and those of a worker that it did not get to."""


def note(what: str) -> None:
    with NOTES.open("a") as notes:
        notes.write(f"{what}\n")


# Before the library's own: receivers are called in the order in which they were connected.
@worker_shutdown.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery has no types
def _tell_of_the_end(**_: object) -> None:
    note("worker_shutdown")


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery has no types
def _tell_of_the_start(**_: object) -> None:
    note("worker_ready")


import geventbatch.integrations.celery  # noqa: F401 - the line that users write


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # Celery has no types
def _tell_what_is_frozen(**_: object) -> None:
    note(f"frozen={gc.get_freeze_count()}")


app = Celery("tests.support.programs.celery_app", broker="filesystem://", backend=f"file://{FOLDER / 'results'}")
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(FOLDER / "queue"),
        "data_folder_out": str(FOLDER / OUT),
        "control_folder": str(FOLDER / "control"),
        "polling_interval": 0.01,
    },
    worker_prefetch_multiplier=1,
)


words_saved: list[str] = []


def load(key: str) -> list[str]:
    gate = GATE if len(words_saved) < WORDS_BEFORE_THE_SECOND_GATE else SECOND_GATE
    while not gate.exists():
        gevent.sleep(0.01)
    return []


def save(key: str, words: list[str]) -> None:
    gevent.sleep(0.05)
    with SAVED.open("a") as saved:
        saved.write("".join(f"{word}\n" for word in words))
    words_saved.extend(words)


processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=20)


@app.task  # type: ignore[untyped-decorator]  # Celery has no types
def add(word: str) -> str:
    processor.run("k", list[Any].append, word)
    return word


@app.task  # type: ignore[untyped-decorator]  # Celery has no types
def add_later(word: str) -> str:
    gevent.spawn(processor.run, "k", list[Any].append, word)
    return word


if __name__ == "__main__":
    task = {"add": add, "add_later": add_later}[sys.argv[1]]
    for number in range(int(sys.argv[2])):
        task.delay(f"word{number}")

"""How a worker is: its memory, greenlets, file descriptors and connections, written down again and again. On Linux."""

from __future__ import annotations

import gc
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gevent
from greenlet import greenlet


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at one worker."""

    pid: int
    at: float
    """`time.time()`"""
    memory: float
    """MiB that are its own or shared, in RAM."""
    greenlets: int
    descriptors: int
    connections: int
    """To the database."""


def begin_to_watch(directory: Path, seconds: float) -> None:
    """Have this process write how it is, every so many seconds, until it ends."""
    gc.collect()
    gc.freeze()  # what is there now is not looked through each time
    gevent.spawn(_watch, directory / str(os.getpid()), seconds)


def looks(directory: Path) -> list[Look]:
    """What all workers have written so far, in the order of time."""
    found = [
        Look(**json.loads(line))
        for path in directory.iterdir()
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return sorted(found, key=lambda look: look.at)


def _watch(path: Path, seconds: float) -> None:
    while True:
        with path.open("a") as written:
            written.write(json.dumps(asdict(_look())) + "\n")
        gevent.sleep(seconds)


def _look() -> Look:
    return Look(
        pid=os.getpid(),
        at=time.time(),
        memory=int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        greenlets=sum(1 for one in gc.get_objects() if issubclass(type(one), greenlet) and _lives(one)),
        descriptors=sum(1 for _ in Path("/proc/self/fd").iterdir()),
        connections=_connections(),
    )


def _lives(one: Any) -> bool:
    return bool(one) and not one.dead


def _connections() -> int:
    from tests.support.chaos import app

    return app.connections()

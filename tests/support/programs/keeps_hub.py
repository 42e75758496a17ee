"""An operation that keeps the hub in one of several ways: logs to stdout, and says at last how long it took.

python -m tests.support.programs.keeps_hub WAY [in a child]
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import logging
import os
import signal
import sys
import time
from typing import Any

import gevent

from geventbatch import Processor

# None of these lets the hub turn.
native_sleep: Any = monkey.get_original("time", "sleep")
posix_spawn: Any = monkey.get_original("os", "posix_spawn")


def waits(_resource: object) -> None:
    native_sleep(0.3)


def computes(_resource: object) -> None:
    began = time.thread_time()
    while time.thread_time() < began + 0.3:
        pass


def computes_longer(_resource: object) -> None:
    began = time.thread_time()
    while time.thread_time() < began + 0.5:
        pass


def has_no_cpu(_resource: object) -> None:
    """It has nearly none: only what another process leaves of one."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the other process inherits it
    other = posix_spawn(sys.executable, [sys.executable, "-S", "-c", "while True: pass"], os.environ)
    try:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        began, used = time.monotonic(), time.thread_time()
        while time.monotonic() - began - (time.thread_time() - used) < 0.3:
            pass
    finally:
        os.kill(other, signal.SIGKILL)


def is_stopped(_resource: object) -> None:
    posix_spawn("/bin/sh", ["sh", "-c", f"sleep 0.3; kill -CONT {os.getpid()}"], os.environ)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    way = globals()[sys.argv[1]]
    took: list[float] = []

    def operation(resource: object) -> None:
        began = time.monotonic()
        way(resource)
        took.append(time.monotonic() - began)

    with Processor(min_duration=0, max_duration=100) as made:
        if sys.argv[2:] == ["in a child"]:
            made.run("k", computes_longer)
            child = os.fork()
            if child:
                sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        made.run("k", operation)
    gevent.sleep(0.01)
    sys.stdout.write(f"took {took[0]}\n")

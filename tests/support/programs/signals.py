"""Signals in the middle of something. Each function is a program that sends itself SIGTERM, and prints what follows.

What a Python signal calls runs in whatever greenlet is current, the hub if all wait, between two instructions.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import os
import signal
import sys
from typing import Any

import gevent
from gevent.event import Event
from gevent.hub import Hub

from geventbatch import BatchError, Processor

processors: list[Processor[Any]] = []
workers: list[object] = []
came = Event()
native_sleep = monkey.get_original("time", "sleep")


def note(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def where() -> str:
    current = gevent.getcurrent()
    return "the hub" if isinstance(current, Hub) else "a worker" if current in workers else "a caller"


def on_term(number: int, frame: object) -> None:
    note("SIGTERM in", where())
    note("stop gives", processors[0].stop(timeout=0))
    came.set()


def listen(processor: Processor[Any]) -> None:
    processors.append(processor)
    # The plain one: gevent's own gives every signal to the hub, and this is what other code does with one.
    signal.signal(signal.SIGTERM, on_term)


def terminate() -> None:
    """Send it to this process, and take it here: by the next instruction of this greenlet, or before."""
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        if came.is_set():
            return
        native_sleep(0.001)


def terminate_from_outside() -> None:
    """Have another process send it while this one waits in its hub."""
    parent = os.getpid()
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.read(reading, 1)
        os.kill(parent, signal.SIGTERM)
        os._exit(0)
    # From this callback on nobody but the hub has anything to do.
    gevent.get_hub().loop.timer(0.05).start(os.write, writing, b"x")


def run(processor: Processor[Any], key: str, value: str, *actions: Any) -> str:
    def operation(resource: list[str]) -> str:
        workers.append(gevent.getcurrent())
        for action in actions:
            action()
        resource.append(value)
        return value

    try:
        return processor.run(key, operation)
    except BatchError as error:
        return type(error).__name__


def caller(processor: Processor[Any], key: str, value: str, *actions: Any) -> gevent.Greenlet[..., Any]:
    return gevent.spawn(lambda: note(value, "is answered", run(processor, key, value, *actions)))


def save(key: str, resource: list[str]) -> None:
    note("saves", key, *resource)


def load(key: str) -> list[str]:
    return []


def end(*callers: gevent.Greenlet[..., Any]) -> None:
    gevent.joinall(callers)
    note("late is answered", run(processors[0], "k", "late"))
    note("stop gives", processors[0].stop(timeout=10))


def in_the_hub() -> None:
    """With an open window, and a batch in its save."""

    def slow_save(key: str, resource: list[str]) -> None:
        if key == "saving":
            came.wait()
            gevent.sleep(0.01)
        save(key, resource)

    processor = Processor(load_resource=load, save_resource=slow_save, min_duration=0, max_duration=100)
    listen(processor)
    callers = [caller(processor, "saving", "a")]
    terminate_from_outside()
    end(*callers)


def in_the_hub_with_open_windows() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=50, max_duration=100)
    listen(processor)
    callers = [caller(processor, key, key + "1") for key in "ab"] + [caller(processor, "a", "a2")]
    terminate_from_outside()
    end(*callers)


def in_an_operation() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=50, max_duration=100)
    listen(processor)
    callers = [caller(processor, "k", "a", terminate), caller(processor, "k", "b"), caller(processor, "other", "c")]
    end(*callers)


def in_a_load() -> None:
    def terminating_load(key: str) -> list[str]:
        workers.append(gevent.getcurrent())
        terminate()
        return load(key)

    processor = Processor(load_resource=terminating_load, save_resource=save, min_duration=50, max_duration=100)
    listen(processor)
    callers = [caller(processor, "k", value) for value in "ab"]
    end(*callers)


def in_a_save() -> None:
    def terminating_save(key: str, resource: list[str]) -> None:
        terminate()
        save(key, resource)

    processor = Processor(load_resource=load, save_resource=terminating_save, min_duration=0, max_duration=100)
    listen(processor)
    callers = [caller(processor, "k", value) for value in "ab"]
    end(*callers)


def in_a_caller() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=50, max_duration=100)
    listen(processor)
    callers = [caller(processor, "k", "a")]
    gevent.sleep(0)
    terminate()  # between what a caller runs
    end(*callers)


def while_an_operation_is_being_admitted() -> None:
    """In a function of the user's, in the middle of `run`: the operation is refused, and nothing is left of it."""

    def number(key: str, workers: int) -> int:
        if key == "k":
            terminate()
        return 0

    processor = Processor(
        load_resource=load, save_resource=save, worker_number_for_key=number, min_duration=50, max_duration=100
    )
    listen(processor)
    callers = [caller(processor, "other", "a"), caller(processor, "k", "b")]
    end(*callers)


def at_any_instruction() -> None:
    """Of a processor that is busy: whatever was admitted is answered, and the stop ends."""
    saved: list[str] = []
    answered: list[str] = []

    def keep(key: str, resource: list[str]) -> None:
        saved.extend(resource)

    processor = Processor(load_resource=load, save_resource=keep, min_duration=0, max_duration=100)
    processors.append(processor)

    def on_alarm(number: int, frame: object) -> None:
        processor.stop(timeout=0)
        came.set()

    def run_on(key: str) -> None:
        number = 0
        while True:
            value = f"{key} {number}"
            if run(processor, key, value) == "ProcessorStopped":
                return
            answered.append(value)
            number += 1

    signal.signal(signal.SIGALRM, on_alarm)
    callers = [gevent.spawn(run_on, f"key {number % 3}") for number in range(20)]
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
    gevent.joinall(callers)
    note("stop gives", processor.stop(timeout=10))
    note("all that was answered was saved" if sorted(saved) == sorted(answered) else f"{saved} {answered}")


if __name__ == "__main__":
    globals()[sys.argv[1]]()

"""Forks in the middle of something. Each function is a program; every line that is printed says which process it is of.

The child does what a child can: it lets go whatever the parent's greenlets wait for, runs operations of its own on the
same keys, lets the time pass, stops, and leaves.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import ctypes
import os
import sys

if sys.argv[2:] == ["in C, without wiped memory"]:
    vars(sys)["modules"]["_ctypes"] = None  # so it cannot be imported

import traceback
import warnings
from typing import TYPE_CHECKING, Any

import gevent
from gevent.event import Event

from geventbatch import BatchError, Conflict, Processor
from tests.support.children import wait_for

warnings.filterwarnings("ignore", message="This process was forked from one that had run batches")

if TYPE_CHECKING:
    from collections.abc import Callable

PARENT = os.getpid()

IN_C = sys.argv[2].startswith("in C")
"""It forks without a callback of Python's, as servers that are written in C."""

lets_go = Event()
"""What the loads, operations and saves of the parent wait for."""

reached = Event()
"""They have come to where it forks."""


def note(*words: object) -> None:
    who = "parent" if os.getpid() == PARENT else "child"
    os.write(1, " ".join([who, *map(str, words), "\n"]).encode())


def load(key: str) -> list[str]:
    note("loads", key)
    return []


def save(key: str, resource: list[str]) -> None:
    note("saves", key, *resource)


def wait() -> None:
    if os.getpid() == PARENT:
        reached.set()
        lets_go.wait()


def apply(resource: list[str], value: str) -> str:
    note("applies", value)
    if value == "b":
        reached.set()
    resource.append(value)
    return value


def caller(processor: Processor[Any], key: str, value: str, **options: Any) -> gevent.Greenlet[..., Any]:
    """Run an operation that is called *value*, and say what it was answered."""

    def run() -> None:
        try:
            answer: object = processor.run(key, apply, value, **options)
        except BatchError as error:
            answer = type(error).__name__
        note("answers", value, "with", answer)

    return gevent.spawn(run)


def forked(child: Callable[[], object]) -> int:
    """Fork; the child calls *child* and never returns."""
    number = os.fork()
    if number == 0:
        leave_after(child)
    return number


def leave_after(child: Callable[[], object]) -> None:
    try:
        child()
        note("ends")
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def live(processor: Processor[Any], *, seconds: float = 0.0, letting_go: bool = True) -> Callable[[], None]:
    """Give what a child does."""

    def child() -> None:
        if letting_go:
            lets_go.set()
        gevent.sleep(seconds)
        for value in ("own1", "own2"):
            caller(processor, "k", value).get()
        for _ in range(100):
            gevent.sleep(0)
        note("stops", processor.stop(timeout=5))
        for _ in range(100):
            gevent.sleep(0)

    return child


def end(processor: Processor[Any], child: int, *callers: gevent.Greenlet[..., Any]) -> None:
    """Wait for the child; then what the parent was in the middle of goes on."""
    wait_for(child)
    note("goes on")
    lets_go.set()
    gevent.joinall(callers)
    caller(processor, "k", "last").get()
    note("stops", processor.stop(timeout=5))


def before_any_run() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=5)

    def child() -> None:
        live(processor)()

        def grandchild() -> None:
            note("is a grandchild")

        wait_for(forked(grandchild))

    end(processor, forked(child))


def in_children_of_children() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=5)

    def child() -> None:
        caller(processor, "k", "own0").get()
        wait_for(forked(live(processor)))
        caller(processor, "k", "own3").get()

    caller(processor, "k", "first").get()
    end(processor, forked(child))


def while_a_save_waits() -> None:
    def waiting_save(key: str, resource: list[str]) -> None:
        note("begins to save", *resource)
        wait()
        save(key, resource)

    processor = Processor(load_resource=load, save_resource=waiting_save, min_duration=0, max_duration=50)
    callers = [caller(processor, "k", value) for value in "uv"]  # no "b": applying that says `reached` too
    reached.wait()
    callers += [caller(processor, "k", value) for value in "cd"]  # the batch behind it
    gevent.sleep(0)
    end(processor, forked(live(processor)), *callers)


def while_a_load_waits() -> None:
    def waiting_load(key: str) -> list[str]:
        wait()
        return load(key)

    processor = Processor(load_resource=waiting_load, save_resource=save, min_duration=0, max_duration=50)
    callers = [caller(processor, "k", value) for value in "ab"]
    reached.wait()
    end(processor, forked(live(processor)), *callers)


def while_a_load_waits_with_batching_off() -> None:
    def waiting_load(key: str) -> list[str]:
        wait()
        return load(key)

    processor = Processor(load_resource=waiting_load, save_resource=save, max_duration=50, batching=False)
    callers = [caller(processor, "k", value) for value in "ab"]
    reached.wait()
    end(processor, forked(live(processor)), *callers)


def inside_an_operation() -> None:
    """The child returns from it, as if nothing had been."""
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=50)
    children: list[int] = []

    def fork(resource: list[str]) -> None:
        children.append(os.fork())
        if children == [0]:
            gevent.spawn(leave_after, live(processor))

    def forking() -> None:
        processor.run("k", fork)
        note("answers fork")

    callers = [caller(processor, "k", "a"), gevent.spawn(forking), *(caller(processor, "k", value) for value in "bc")]
    gevent.joinall(callers)
    end(processor, children[0], *callers)


def inside_an_operation_that_the_child_does_not_leave() -> None:
    """It may even run operations of its own there: the batch around it is the parent's."""
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=50)
    children: list[int] = []
    callers = [
        gevent.spawn(processor.run, "k", lambda resource: children.append(forked(live(processor)))),
        caller(processor, "k", "a"),
    ]
    gevent.joinall(callers)
    end(processor, children[0], *callers)


def while_callers_are_being_answered() -> None:
    processor: Processor[list[Any]] = Processor(
        load_resource=lambda key: [], save_resource=lambda *_: None, min_duration=0, max_duration=50
    )
    children: list[int] = []

    def run(value: int) -> None:
        processor.run("k", list.append, value)
        if not children:
            children.append(os.fork())
            if children == [0]:
                gevent.spawn(leave_after, live(processor))
        note("answers", value)

    callers = [gevent.spawn(run, value) for value in range(100)]
    gevent.joinall(callers)
    end(processor, children[0], *callers)


def with_a_batch_in_the_queue() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=50, workers=1)
    callers = [caller(processor, "k", "a")]
    gevent.sleep(0)  # its batch is there, and no worker yet
    end(processor, forked(live(processor)), *callers)


def with_a_batch_in_the_queue_of_an_idle_worker() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=50, workers=1)
    caller(processor, "k", "first").get()
    callers = [caller(processor, "k", "a"), caller(processor, "other", "b")]
    gevent.sleep(0)
    end(processor, forked(live(processor)), *callers)


def with_a_batch_that_waits_for_its_turn() -> None:
    def waiting_save(key: str, resource: list[str]) -> None:
        if key == "first":
            wait()
        save(key, resource)

    processor = Processor(
        load_resource=load, save_resource=waiting_save, min_duration=0, max_duration=50, max_batches=1, workers=1
    )
    callers = [caller(processor, key, key) for key in ("first", "second", "third")]
    reached.wait()
    end(processor, forked(live(processor)), *callers)


def with_a_batch_whose_turn_has_come() -> None:
    processor = Processor(
        load_resource=load, save_resource=save, min_duration=0, max_duration=50, max_batches=1, workers=1
    )
    children: list[int] = []

    def run() -> None:
        processor.run("first", apply, "first")
        children.append(os.fork())
        if children == [0]:
            gevent.spawn(leave_after, live(processor))
        note("answers first")

    callers = [gevent.spawn(run), *(caller(processor, key, key) for key in ("second", "third"))]
    gevent.joinall(callers)
    end(processor, children[0], *callers)


def with_an_open_window() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0.1, max_duration=50)
    callers = [caller(processor, "k", value) for value in "ab"]
    reached.wait()
    end(processor, forked(live(processor)), *callers)  # the child's own window ends after that of the parent


def during_a_backoff() -> None:
    conflicts = [Conflict(), Conflict()]

    def conflicting_save(key: str, resource: list[str]) -> None:
        if conflicts and "a" in resource:
            note("conflicts")
            reached.set()
            raise conflicts.pop()
        save(key, resource)

    processor = Processor(load_resource=load, save_resource=conflicting_save, min_duration=0, max_duration=50)
    callers = [caller(processor, "k", "a")]
    reached.wait()
    end(processor, forked(live(processor, seconds=0.1)), *callers)


def before_timeouts() -> None:
    def waiting_load(key: str) -> list[str]:
        try:
            wait()
        except BaseException:
            note("cleans up")  # on a connection that both processes have
            raise
        return load(key)

    processor = Processor(load_resource=waiting_load, save_resource=save, min_duration=0, max_duration=0.5)
    callers = [caller(processor, "k", "a"), caller(processor, "k", "b", start_timeout=0.1)]
    reached.wait()
    number = forked(live(processor, seconds=0.6, letting_go=False))
    gevent.joinall(callers)
    end(processor, number, *callers)


def with_a_subscription() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=50)
    metrics = processor.subscribe_batch_metrics()

    def read() -> None:
        for metric in metrics:
            note("reads", metric.key)
        note("has read all")

    def child() -> None:
        reader = gevent.spawn(read)
        gevent.sleep(0)
        live(processor)()
        reader.get()

    caller(processor, "unread", "a").get()
    end(processor, forked(child))
    read()


def with_a_subscription_that_a_greenlet_waits_for() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=50)
    metrics = processor.subscribe_batch_metrics()

    def read() -> None:
        for metric in metrics:
            note("reads", metric.key)
        note("has read all")

    reader = gevent.spawn(read)
    gevent.sleep(0)
    end(processor, forked(live(processor)))
    reader.get()


def after_a_stop() -> None:
    processor = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=50)
    caller(processor, "k", "a").get()
    note("stops", processor.stop())

    def child() -> None:
        caller(processor, "k", "own").get()
        note("stops", processor.stop(timeout=5))

    wait_for(forked(child))


def stop_waits_for_the_childs_own() -> None:
    def waiting_save(key: str, resource: list[str]) -> None:
        if "own" in resource:
            own_saves.set()
            own_lets_go.wait()
        wait()
        save(key, resource)

    own_saves = Event()
    own_lets_go = Event()
    processor = Processor(load_resource=load, save_resource=waiting_save, min_duration=0, max_duration=50)
    callers = [caller(processor, "k", "a")]
    reached.wait()

    def child() -> None:
        own = caller(processor, "k", "own")
        own_saves.wait()
        note("stops", processor.stop(timeout=0))
        note("stops", processor.stop(timeout=0.01))
        gevent.spawn_later(0.01, own_lets_go.set)
        note("stops", processor.stop(timeout=5))
        note("answered:", own.ready())

    end(processor, forked(child), *callers)


if __name__ == "__main__":
    if IN_C:
        in_c: Any = ctypes.PyDLL(None).fork
        os.fork = in_c
    else:  # gevent does it after the first fork, and then waits for ever for a child that had ended before.
        gevent.get_hub().loop.install_sigchld()
    globals()[sys.argv[1]]()

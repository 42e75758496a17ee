"""Where `run` and `stop` may be called: not from another thread or the hub (13), and not inside a batch (14)."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import LoadFailed, Processor, ProcessorStopped, SaveFailed
from tests.support.callers import answer_of, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime

ROOT = Path(__file__).parents[2]


def nothing(resource: object) -> None:
    """An operation."""


def in_the_hub(clock: VirtualTime, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Give the answer of *call* in a callback of the hub."""
    answers: list[Any] = []
    gevent.get_hub().loop.run_callback(lambda: answers.append(answer_of(call, *args, **options)))
    clock.settle()
    return answers[0]


# Other threads


def test_run_in_another_thread_than_that_of_the_first_run_is_a_runtime_error_and_nothing_is_enqueued() -> None:
    loads: list[str] = []
    with Processor(load_resource=loads.append, min_duration=0) as processor:
        processor.run("first", nothing)
        before = repr(processor)
        for error in (
            in_a_thread(processor.run, "k", nothing),
            answer_of(gevent.get_hub().threadpool.apply, processor.run, ("k", nothing)),
        ):
            assert type(error) is RuntimeError
            assert str(error) == (
                "run() was called from another thread than the first run() of this process; greenlets belong to one "
                "thread: call it there, or construct the processor with batching=False, which works in any thread"
            )
        assert repr(processor) == before
        assert processor.run("last", nothing) is None
    assert loads == ["first", "last"]


def test_it_holds_for_every_processor_of_the_process() -> None:
    with Processor(min_duration=0) as first, Processor(min_duration=0) as second:
        first.run("k", nothing)
        assert isinstance(in_a_thread(second.run, "k", nothing), RuntimeError)
        assert second.run("k", nothing) is None


@pytest.mark.parametrize("timeout", [None, 0, 1])
def test_stop_in_another_thread_is_a_runtime_error_and_stops_nothing(timeout: float | None) -> None:
    with Processor(min_duration=0) as processor:
        processor.run("k", nothing)
        error = in_a_thread(processor.stop, timeout)
        assert type(error) is RuntimeError
        assert str(error).startswith("stop() was called from another thread than the first run() of this process")
        assert processor.run("k", nothing) is None


def test_the_thread_of_the_first_run_is_the_right_one_whichever_it_is() -> None:
    program = """
from gevent import monkey
monkey.patch_all()
import gevent
from geventbatch import Processor

processor = Processor(min_duration=0)
pool = gevent.get_hub().threadpool
pool.maxsize = 1
print(pool.apply(processor.run, ("k", lambda resource: "ran in the thread")))
try:
    processor.run("k", print)
except RuntimeError as error:
    print(str(error)[:38])
try:
    processor.stop()
except RuntimeError as error:
    print(str(error)[:39])
print(pool.apply(processor.run, ("k", lambda resource: "ran again")))
print(pool.apply(processor.stop))
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [
        "ran in the thread",
        "run() was called from another thread t",
        "stop() was called from another thread t",
        "ran again",
        "True",
    ]


def test_with_batching_off_any_thread_may_call() -> None:
    with Processor(min_duration=0) as on, Processor(batching=False) as off:
        on.run("k", nothing)
        assert in_a_thread(off.run, "k", lambda resource: 5) == 5


def test_switched_off_a_processor_that_has_batched_may_be_run_in_any_thread_too() -> None:
    with Processor(min_duration=0) as processor:
        processor.run("k", nothing)
        processor.batching = False
        assert in_a_thread(processor.run, "k", lambda resource: 5) == 5
        processor.batching = True
        assert isinstance(in_a_thread(processor.run, "k", nothing), RuntimeError)


# The hub


@pytest.mark.parametrize("batching", [True, False])
def test_run_in_the_hub_is_a_runtime_error_and_nothing_is_enqueued(clock: VirtualTime, batching: bool) -> None:
    loads: list[str] = []
    with Processor(load_resource=loads.append, min_duration=0, batching=batching) as processor:
        before = repr(processor)
        error = in_the_hub(clock, processor.run, "k", nothing)
        assert type(error) is RuntimeError
        assert str(error) == (
            "run() was called in gevent's hub, where nothing may block: call it from a greenlet (gevent.spawn)"
        )
        assert repr(processor) == before
        assert processor.run("last", nothing) is None
    assert loads == ["last"]


def test_a_run_in_the_hub_of_another_thread_is_refused_too() -> None:
    with Processor(min_duration=0) as processor:
        processor.run("k", nothing)

        def thread() -> Any:
            answers: list[Any] = []
            gevent.get_hub().loop.run_callback(lambda: answers.append(answer_of(processor.run, "k", nothing)))
            gevent.sleep(0)
            gevent.get_hub().destroy(destroy_loop=True)
            return answers[0]

        assert isinstance(in_a_thread(thread), RuntimeError)


# Inside a batch


class Places:
    """A processor whose load, operation or save calls something."""

    def __init__(self, place: str, batching: bool) -> None:
        self.place = place
        self.answer: Any = None
        self.saved: list[str] = []
        self.call: Callable[[], Any] = list
        self.processor: Processor[Any] = Processor(
            open_resource=self.scope, min_duration=0, max_duration=50, batching=batching
        )

    def at(self, place: str) -> None:
        if place == self.place:
            self.answer = answer_of(self.call)

    @contextmanager
    def scope(self, key: str) -> Iterator[None]:
        self.at("load")
        try:
            yield
        except BaseException:
            self.at("roll back")
            raise
        self.at("save")
        self.saved.append(key)

    def operation(self, resource: None) -> str:
        self.at("operation")
        if self.place == "roll back":
            raise KeyError
        return "done"

    def run(self) -> Any:
        return answer_of(self.processor.run, "outer", self.operation)


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("key", ["outer", "another"])
@pytest.mark.parametrize("place", ["load", "operation", "save", "roll back"])
def test_run_inside_a_batch_of_the_same_processor_is_a_runtime_error_at_once_whatever_the_key(
    clock: VirtualTime, place: str, key: str, batching: bool
) -> None:
    places = Places(place, batching)
    places.call = lambda: places.processor.run(key, nothing)
    with places.processor:
        answer = places.run()
        error = places.answer
        assert clock.now() == 0
        assert places.processor.run("after", nothing) is None
    assert type(error) is RuntimeError
    assert str(error) == (
        "run() was called inside a batch of the same processor (key 'outer'), which would wait for itself. Nothing was "
        "run: call it after the batch, or make the change inside this operation"
    )
    if place == "roll back":
        assert isinstance(answer, KeyError)
    else:
        assert answer == "done"
        assert places.saved == ["outer", "after"]


@pytest.mark.parametrize("place", ["load", "operation", "save"])
def test_unless_it_is_caught_there_it_is_the_error_of_what_called_it(clock: VirtualTime, place: str) -> None:
    def run_again(*args: object) -> None:
        processor.run("inner", nothing)

    options: dict[str, Any] = {f"{place}_resource": run_again} if place != "operation" else {}
    processor: Processor[Any] = Processor(min_duration=0, **options)
    answer = answer_of(processor.run, "outer", run_again if place == "operation" else nothing)
    processor.stop()
    if place == "operation":
        assert type(answer) is RuntimeError
    else:
        assert type(answer) is {"load": LoadFailed, "save": SaveFailed}[place]
        assert type(answer.__cause__) is RuntimeError


def test_run_inside_a_batch_is_refused_through_another_processor_too(clock: VirtualTime) -> None:
    with Processor(min_duration=0) as outer, Processor(batching=False) as inner:

        def in_between(resource: None) -> Any:
            return answer_of(outer.run, "k", nothing)

        answer = outer.run("k", lambda resource: inner.run("k", in_between))
        assert type(answer) is RuntimeError


@pytest.mark.parametrize("batching", [True, False])
def test_run_of_another_processor_inside_a_batch_works(clock: VirtualTime, batching: bool) -> None:
    with Processor(min_duration=0) as outer, Processor(min_duration=0, batching=batching) as inner:
        assert outer.run("k", lambda resource: inner.run("k", lambda other: "from inside")) == "from inside"


@pytest.mark.parametrize("timeout", [None, 5])
@pytest.mark.parametrize("place", ["load", "operation", "save"])
def test_with_batching_off_too_a_blocking_stop_inside_a_run_begins_the_stop_and_raises(
    clock: VirtualTime, place: str, timeout: float | None
) -> None:
    places = Places(place, batching=False)
    places.call = lambda: places.processor.stop(timeout)
    assert places.run() == "done"
    assert type(places.answer) is RuntimeError
    assert str(places.answer).startswith("stop() has begun, but cannot wait here for its end")
    assert isinstance(answer_of(places.processor.run, "late", nothing), ProcessorStopped)
    assert places.saved == ["outer"]
    assert clock.now() == 0
    assert places.processor.stop() is True


@pytest.mark.parametrize("place", ["load", "operation", "save"])
def test_with_batching_off_too_a_stop_without_waiting_may_be_called_inside_a_run(
    clock: VirtualTime, place: str
) -> None:
    places = Places(place, batching=False)
    places.call = lambda: places.processor.stop(timeout=0)
    assert places.run() == "done"
    assert places.answer is False
    assert places.saved == ["outer"]
    assert places.processor.stop() is True


LIBUV = """
from gevent import monkey; monkey.patch_all()
import gevent
from geventbatch import Processor

with Processor(load_resource=lambda _: [], save_resource=lambda *_: None, min_duration=0) as processor:
    callers = [gevent.spawn(processor.run, number % 3, list.append, number) for number in range(1000)]
    gevent.joinall(callers, timeout=30, raise_error=True)
print(sum(caller.successful() for caller in callers))
"""


def test_everybody_is_answered_on_gevents_other_event_loop_too() -> None:
    environment = {**os.environ, "GEVENT_LOOP": "libuv"}
    told = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIBUV],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (told.stdout, told.stderr) == ("1000\n", "")


UNPATCHED = """
import threading, warnings
warnings.simplefilter("ignore")
from geventbatch import Processor

processor = Processor(load_resource=lambda _: [], min_duration=0)

def call():
    try:
        print(processor.run("k", len))
    except RuntimeError as error:
        print(str(error).split(";")[0])

for _ in range(3):
    one = threading.Thread(target=call)
    one.start()
    one.join()
"""


def test_a_later_thread_with_the_identity_of_the_first_one_is_told_apart() -> None:
    told = subprocess.run([sys.executable, "-c", UNPATCHED], capture_output=True, text=True, timeout=50, check=True)
    refused = "run() was called from another thread than the first run() of this process"
    assert told.stdout.splitlines() == ["0", refused, refused]

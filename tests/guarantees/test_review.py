"""What a close reading of the code found: each test failed before it was mended."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.event import Event

from geventbatch import BatchTimeout, LoadFailed, OperationCancelled, Processor, worker_number_for_key
from geventbatch._core import batch, process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime


def wait_swallowing(seconds: float, clean_up: float) -> None:
    try:
        gevent.sleep(seconds)
    except BaseException:
        gevent.sleep(clean_up)


def nothing(resource: object) -> None:
    """Be an operation that changes nothing."""


def refused(
    kind: type[Exception], processor: Processor[Any], operation: Callable[[Any], Any] = nothing, key: str = "k"
) -> None:
    with pytest.raises(kind):
        processor.run(key, operation)


def test_who_comes_after_the_deadline_of_a_load_that_swallowed_it_has_a_load_of_his_own(clock: VirtualTime) -> None:
    loads: list[float] = []

    def load(_: object) -> list[str]:
        loads.append(clock.now())
        if len(loads) == 1:
            wait_swallowing(100, 0.5)
        return []

    processor = Processor(load_resource=load, min_duration=0, max_duration=1)
    first = gevent.spawn(refused, BatchTimeout, processor)
    clock.advance(1.2)
    later = gevent.spawn(processor.run, "k", lambda _: "saved")
    clock.advance(1)
    assert first.ready()
    assert (later.value, loads) == ("saved", [0.0, 1.5])
    processor.stop()


def test_who_waits_behind_a_failed_load_is_answered_even_if_the_worker_is_killed_in_a_repr(clock: VirtualTime) -> None:
    class Key(str):
        __slots__ = ()

        def __repr__(self) -> str:
            workers.append(gevent.getcurrent())
            gevent.sleep(1)
            return "key"

    def load(_: object) -> None:
        gevent.sleep(1)
        raise ValueError

    workers: list[Any] = []
    processor = Processor(load_resource=load, min_duration=0, max_duration=50, max_batch_size=1)
    metrics = processor.subscribe_batch_metrics()
    callers = [gevent.spawn(processor.run, Key("k"), nothing) for _ in range(3)]
    for caller in callers:
        caller.rawlink(lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gevent.get_hub(), "print_exception", lambda *_: None)
        clock.advance(1.5)
        assert workers
        workers[0].kill(block=False)
        clock.advance(20)
    assert all(caller.ready() for caller in callers)
    assert processor.stop(timeout=1)
    metrics.close()


def test_a_subscription_made_while_the_last_callers_are_being_woken_ends(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=0)
    subscribed: list[list[object]] = []

    def call() -> None:
        processor.run("k", nothing)
        subscribed.append(list(processor.subscribe_batch_metrics()))

    callers = [gevent.spawn(call) for _ in range(200)]
    gevent.spawn(processor.stop)
    clock.advance(1)
    assert all(caller.ready() for caller in callers)
    assert subscribed == [[]] * len(subscribed)


@pytest.mark.parametrize("batching", [True, False])
def test_a_batch_whose_operations_are_all_broken_is_not_loaded_again(clock: VirtualTime, *, batching: bool) -> None:
    loads: list[float] = []

    def fail(_: object) -> None:
        raise ValueError("half-way")

    def load(_: object) -> list[str]:
        loads.append(clock.now())
        return []

    processor = Processor(load_resource=load, min_duration=0, clean_errors=(), batching=batching)
    caller = gevent.spawn(refused, ValueError, processor, fail)
    clock.advance(1)
    assert caller.successful()
    assert len(loads) == 1
    processor.stop()


def test_alone_a_timeout_of_the_callers_own_comes_at_once_out_of_an_operation(clock: VirtualTime) -> None:
    processor = Processor(load_resource=lambda _: gevent.sleep(2), min_duration=0, max_duration=50, batching=False)

    def call() -> float:
        with pytest.raises(gevent.Timeout), gevent.Timeout(3):
            processor.run("k", lambda _: gevent.sleep(10))
        return clock.now()

    caller = gevent.spawn(call)
    clock.advance(20)
    assert caller.value == 3.0


@pytest.mark.parametrize("swallow", [True, False])
def test_alone_a_late_start_is_cancelled_whatever_the_load_makes_of_it(clock: VirtualTime, *, swallow: bool) -> None:
    def load(_: object) -> None:
        try:
            gevent.sleep(10)
        except OSError as error:  # as drivers do with their own timeouts
            if not swallow:
                raise ConnectionError from error
        except BaseException as error:
            if not swallow:
                raise ConnectionError from error

    processor = Processor(load_resource=load, min_duration=0, max_duration=50, batching=False)

    def call() -> float:
        with pytest.raises(OperationCancelled):
            processor.run("k", nothing, start_timeout=0.25)
        return clock.now()

    caller = gevent.spawn(call)
    clock.advance(20)
    assert caller.value == 0.25


def test_a_stop_that_gave_up_ends_by_itself_when_the_last_operation_ends_in_another_thread() -> None:
    processor: Processor[None] = Processor(min_duration=0)
    metrics = processor.subscribe_batch_metrics()
    processor.run("k", nothing)
    processor.batching = False
    arrived = Event()
    finish: list[bool] = []

    def wait_for_the_stop(_: object) -> None:
        hub.loop.run_callback_threadsafe(arrived.set)
        while not finish:
            pass

    hub: Any = gevent.get_hub()
    running = hub.threadpool.spawn(processor.run, "k", wait_for_the_stop)
    arrived.wait()
    assert not processor.stop(timeout=0)
    finish.append(True)
    running.get()
    assert len(list(metrics)) == 2


def raise_it(_: object, argument: object) -> None:
    raise ValueError(argument)


def test_an_error_keeps_neither_resource_nor_batch_alive_and_shows_no_frame_of_others(clock: VirtualTime) -> None:
    class Resource:
        pass

    resources: list[weakref.ref[Resource]] = []

    def load(_: object) -> Resource:
        resource = Resource()
        resources.append(weakref.ref(resource))
        return resource

    processor = Processor(load_resource=load, min_duration=0)
    names: list[str] = []

    def call() -> None:
        try:
            processor.run("k", raise_it, "x")
        except ValueError as error:
            frame = error.__traceback__
            while frame is not None:
                names.append(frame.tb_frame.f_code.co_name)
                frame = frame.tb_next

    gc.disable()
    try:
        gevent.spawn(call)
        clock.advance(1)
        assert names[-1] == "raise_it"
        assert not any(name.startswith("_apply") for name in names)
        assert resources[0]() is None
    finally:
        gc.enable()
    processor.stop()


@pytest.mark.parametrize("place", ["worker_number_for_key", "AsyncResult", "Waiter"])
def test_a_stop_in_the_middle_of_anything_leaves_no_window_open(
    clock: VirtualTime, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    # As a signal handler does that is taken while the lane is looked up, or while `Batch.add` or
    # `Batch.wait_for_operations` makes something: in the middle of a stretch without a switch.
    def stop_before(make: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(*args: Any) -> Any:
            processor.stop(timeout=0)
            return make(*args)

        return stopped

    number = stop_before(worker_number_for_key) if place == "worker_number_for_key" else worker_number_for_key
    processor: Processor[list[int]] = Processor(
        load_resource=lambda _: [], min_duration=5, worker_number_for_key=number
    )

    def call() -> float:
        try:
            processor.run("k", list.append, 1)
        except Exception:
            return clock.now()
        return clock.now()

    if place != "worker_number_for_key":
        monkeypatch.setattr(batch, place, stop_before(getattr(batch, place)))
    caller = gevent.spawn(call)
    clock.advance(20)
    assert caller.value == 0.0
    assert processor.stop()


def test_a_misspelt_option_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match=r"Processor\(\) has no option max_duratoin: did you mean max_duration\?"):
        Processor(max_duratoin=1)  # type: ignore[call-overload]


def test_a_scope_without_an_exit_fails_before_it_is_entered(clock: VirtualTime) -> None:
    entered = []

    class Half:
        def __enter__(self) -> None:
            entered.append(True)

    @contextmanager
    def whole(_: object) -> Iterator[None]:
        yield

    processor: Processor[None] = Processor(open_resource=lambda key: Half() if key == "half" else whole(key))  # type: ignore[arg-type,return-value]
    caller = gevent.spawn(refused, LoadFailed, processor, key="half")
    clock.advance(1)
    assert caller.successful()
    assert not entered
    processor.stop()


class Unprintable(str):
    """A key whose repr ends whoever asks for it."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise gevent.GreenletExit


@pytest.mark.parametrize("phase", ["load", "operations"])
def test_a_scope_is_left_though_telling_a_watcher_of_its_late_batch_raises(clock: VirtualTime, phase: str) -> None:
    log: list[str] = []

    @contextmanager
    def scope(_: object) -> Iterator[None]:
        log.append("entered")
        if phase == "load":
            clock.spend(2)
        try:
            yield
        finally:
            log.append("left")

    processor = Processor(open_resource=scope, min_duration=0, max_duration=1)
    watcher = processor.subscribe_batch_metrics()

    def call() -> None:
        processor.run(Unprintable("k"), lambda _: clock.spend(2))

    caller = gevent.spawn(call)
    clock.advance(5)
    assert caller.dead
    assert log == ["entered", "left"]
    assert processor.stop()
    assert list(watcher) == []


def test_what_a_broken_operation_raised_is_freed_with_its_last_reference(clock: VirtualTime) -> None:
    class Broken(Exception):
        pass

    def break_it(_: object) -> None:
        raise Broken

    processor: Processor[list[int]] = Processor(load_resource=lambda _: [], min_duration=0, clean_errors=())
    raised: list[weakref.ref[Broken]] = []

    def call() -> None:
        try:
            processor.run("k", break_it)
        except Broken as error:
            raised.append(weakref.ref(error))

    gc.disable()
    try:
        gevent.spawn(call)
        clock.advance(1)
        assert raised[0]() is None
    finally:
        gc.enable()
    processor.stop()


@pytest.mark.parametrize("spared", range(3))
def test_a_worker_killed_just_when_it_is_woken_leaves_its_batch_to_another_one(clock: VirtualTime, spared: int) -> None:
    def load(_: object) -> list[int]:
        gevent.sleep(0.5)
        return []

    processor = Processor(load_resource=load, workers=1, min_duration=0)
    for key in range(3):
        gevent.spawn(processor.run, key, list.append, 1)
    clock.advance(2)
    workers = [one for one in gc.get_objects() if type(one) is gevent.Greenlet and not one.dead and "work" in repr(one)]
    del workers[spared]
    assert len(workers) == 2
    callers = [gevent.spawn(processor.run, key, len) for key in "ab"]
    for worker in workers:
        worker.kill(block=False)
    clock.advance(1.5)
    assert [caller.value for caller in callers] == [0, 0]
    processor.stop()


def test_a_processor_that_nobody_holds_is_gone_and_forgotten() -> None:
    gc.collect()
    before = list(process.made)
    processor: Processor[None] = Processor(min_duration=0)
    gone = weakref.ref(processor)
    del processor
    gc.collect()
    assert gone() is None
    assert process.made == before

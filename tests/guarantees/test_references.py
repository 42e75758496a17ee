"""What has ended keeps nothing alive, and is freed with its last reference, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import GreenletExit

from geventbatch import Conflict, Processor, Rejected
from geventbatch._core import process
from tests.support.ledger import append, append_to_all, break_all
from tests.support.two_forms import TwoForms

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime


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


@pytest.mark.parametrize("form", ["many", "one key too"])
@pytest.mark.parametrize(
    "what", ["nothing", "an operation", "the save", "the load", "a conflict", "a refusal", "a caller"]
)
def test_what_operations_across_keys_leave_is_freed_without_the_garbage_collector(
    clock: VirtualTime, what: str, form: str
) -> None:
    store = TwoForms()
    store.ledger.save_time = 0.1
    errors: list[Exception] = []

    def go_wrong(_: object) -> None:
        if errors:
            raise errors.pop()

    if what == "the load":
        store.ledger.on_load = go_wrong
    else:
        store.ledger.on_save = go_wrong
    options: Any = {"open_resources": store.open_resources} if form == "many" else {"open_resource": store}
    processor = Processor[Any](**options, min_duration=0, max_duration=5)
    wrong = {"the save": OSError(), "the load": OSError(), "a conflict": Conflict(), "a refusal": Rejected()}

    def call(run: Any, *args: Any) -> None:
        with suppress(Exception, GreenletExit):  # who keeps an error in its own frame makes a cycle
            run(*args)
        answered.append(args[-1])

    answered: list[int] = []

    def run_some() -> None:
        if what in wrong:
            errors.append(wrong[what])
        callers = []
        for mark in range(6):
            operation = break_all if what == "an operation" and mark == 3 else append_to_all
            keys = [*("Ma" if mark % 2 else "bM")]
            callers.append(gevent.spawn(call, processor.run_across, keys, operation, mark))
        gevent.spawn(call, processor.run, "M", append, 6)
        clock.advance(0.05)
        if what == "a caller":  # it leaves while its operation is saved
            callers[2].kill(block=False)
        clock.advance(5)
        assert not errors

    run_some()
    gc.collect()
    gc.disable()
    try:
        run_some()
        wrong.clear()
        assert gc.collect() == 0
        assert sorted(answered) == sorted([*range(7)] * 2)
    finally:
        gc.enable()
        processor.stop(timeout=0)
        clock.advance(1)


def test_an_idle_worker_keeps_nothing_of_its_last_batch_alive(clock: VirtualTime) -> None:
    class Argument:
        pass

    processor: Processor[list[object]] = Processor(load_resource=lambda _: [], min_duration=0)
    argument = Argument()
    gone = weakref.ref(argument)
    gevent.spawn(processor.run, "k", lambda _, argument: None, argument)
    clock.advance(1)
    assert "1 workers" in repr(processor)
    del argument
    assert gone() is None
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


def test_a_processor_over_a_store_that_refuses_many_keys_is_gone_with_its_last_reference() -> None:
    class OneByOne:
        @property
        def open_resources(self) -> Any:
            raise TypeError("one key at a time")

        def __call__(self, key: object) -> Any:
            return nullcontext()

    processor: Processor[None] = Processor(open_resource=OneByOne(), min_duration=0)
    gone = weakref.ref(processor)
    del processor
    assert gone() is None

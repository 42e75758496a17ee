"""What has ended keeps nothing alive, and is freed with its last reference, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import gevent

from geventbatch import Processor
from geventbatch._core import process

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

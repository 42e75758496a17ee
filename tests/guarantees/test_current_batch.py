"""`current_batch`: the key and the time that is left, inside of a load, an operation and a save, and nowhere else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Batch, Conflict, Processor, current_batch
from tests.support.callers import answer_of, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing import VirtualTime

OUTSIDE = r"^current_batch\(\) was called outside of a load, an operation or a save$"


@pytest.mark.parametrize("batching", [True, False])
def test_load_operation_and_save_see_the_key_and_the_seconds_until_the_deadline(
    clock: VirtualTime, batching: bool
) -> None:
    seen: list[tuple[object, float]] = []

    def note(*args: object) -> None:
        gevent.sleep(1)
        batch = current_batch()
        assert isinstance(batch, Batch)
        seen.append((batch.key, round(batch.remaining(), 6)))

    with Processor(
        load_resource=note, save_resource=note, min_duration=0, max_duration=5, batching=batching
    ) as processor:
        processor.run(("ICE", 1), note)
    assert seen == [(("ICE", 1), 4.0), (("ICE", 1), 3.0), (("ICE", 1), 2.0)]


@pytest.mark.parametrize("batching", [True, False])
def test_every_part_of_a_resource_scope_sees_it_also_when_it_rolls_back(clock: VirtualTime, batching: bool) -> None:
    seen: list[str] = []

    def note(part: str) -> None:
        seen.append(f"{part} {current_batch().key}")

    class Scope:
        def __init__(self, key: str) -> None:
            note("open")

        def __enter__(self) -> None:
            note("enter")

        def __exit__(self, *error: object) -> None:
            note("leave")

    def refuse(resource: None) -> None:
        raise KeyError

    with Processor(open_resource=Scope, min_duration=0, batching=batching) as processor:
        processor.run("k", lambda resource: None)
        answer_of(processor.run, "k", refuse)
    assert seen == ["open k", "enter k", "leave k"] * 2


@pytest.mark.parametrize("batching", [True, False])
def test_the_time_that_is_left_is_never_under_a_millisecond(clock: VirtualTime, batching: bool) -> None:
    seen: list[float] = []

    def overrun(resource: None) -> None:
        batch = current_batch()
        clock.spend(4.9995)
        seen.append(batch.remaining())
        clock.spend(0.0005)
        seen.append(batch.remaining())
        clock.spend(100)
        seen.append(batch.remaining())
        kept.append(batch)

    kept: list[Batch] = []
    with Processor(min_duration=0, max_duration=5, batching=batching) as processor:
        answer_of(processor.run, "k", overrun)
    assert seen == [0.001, 0.001, 0.001]
    assert kept[0].remaining() == 0.001


def test_the_clean_up_after_the_deadline_still_has_a_millisecond(clock: VirtualTime) -> None:
    seen: list[float] = []

    @contextmanager
    def scope(key: str) -> Iterator[None]:
        try:
            yield
        finally:
            seen.append(current_batch().remaining())

    with Processor(open_resource=scope, min_duration=0, max_duration=5) as processor:
        answer_of(processor.run, "k", lambda resource: gevent.sleep(100))
    assert seen == [0.001]


def test_one_deadline_holds_for_all_attempts(clock: VirtualTime) -> None:
    seen: list[float] = []

    def load(key: str) -> None:
        seen.append(current_batch().remaining())

    def save(key: str, resource: None) -> None:
        gevent.sleep(1)
        if len(seen) < 3:
            raise Conflict

    with Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=5) as processor:
        processor.run("k", lambda resource: None)
    assert len(seen) == 3
    assert seen[0] == pytest.approx(5)
    assert seen[1] == pytest.approx(4, abs=0.1)
    assert seen[2] == pytest.approx(3, abs=0.2)


def test_the_batch_inside_is_the_innermost_one_and_after_it_the_outer_one_again(clock: VirtualTime) -> None:
    seen: list[object] = []

    def note(resource: None) -> None:
        seen.append(current_batch().key)

    with Processor(min_duration=0, batching=False) as inner, Processor(min_duration=0) as outer:

        def nest(resource: None) -> None:
            note(None)
            inner.run("inner", note)
            note(None)

        outer.run("outer", nest)
    assert seen == ["outer", "inner", "outer"]


def test_elsewhere_it_is_a_runtime_error(clock: VirtualTime) -> None:
    spawned: list[Any] = []

    def spawn(resource: None) -> None:
        spawned.append(gevent.spawn(answer_of, current_batch))
        gevent.sleep(0.5)

    with pytest.raises(RuntimeError, match=OUTSIDE):
        current_batch()
    with Processor(min_duration=0) as processor:
        processor.run("k", spawn)
        with pytest.raises(RuntimeError, match=OUTSIDE):
            current_batch()
    assert isinstance(spawned[0].get(), RuntimeError)
    assert isinstance(in_a_thread(current_batch), RuntimeError)
    in_the_hub: list[Any] = []
    gevent.get_hub().loop.run_callback(lambda: in_the_hub.append(answer_of(current_batch)))
    clock.settle()
    assert isinstance(in_the_hub[0], RuntimeError)


@pytest.mark.parametrize("batching", [True, False])
def test_it_is_over_after_a_batch_that_failed(clock: VirtualTime, batching: bool) -> None:
    def fail(*args: object) -> None:
        raise OSError

    for options in ({"load_resource": fail}, {"save_resource": fail}):
        chosen: dict[str, Any] = dict(options)
        with Processor(min_duration=0, batching=batching, **chosen) as processor:
            assert isinstance(answer_of(processor.run, "k", lambda resource: None), Exception)
        with pytest.raises(RuntimeError, match=OUTSIDE):
            current_batch()

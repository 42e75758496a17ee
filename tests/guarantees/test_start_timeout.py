"""`start_timeout`: an operation that does not start in time is withdrawn, one that has started is not (guarantee 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gevent
import pytest

from geventbatch import OperationCancelled, Processor
from tests.support.callers import answer_of
from tests.support.recording_store import FORMS, Store, add, do_nothing

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param)


def test_an_operation_that_does_not_start_in_time_takes_only_itself_out_of_its_batch(store: Store) -> None:
    store.load_time = 0.5
    with store.processor(min_duration=0.1, max_duration=5) as processor:
        waits = store.call(processor, "k", add, "waits")
        with pytest.raises(OperationCancelled) as cancelled:
            processor.run("k", store.apply, "cancelled", start_timeout=0.2)
        assert store.clock.now() == 0.2
        assert cancelled.value.retry_safe
        assert isinstance(cancelled.value, TimeoutError)
        store.clock.advance(1)
        assert waits.answer == "waits"
        assert store.kept["k"] == ["waits"]
        assert store.times("apply") == []


def test_an_operation_that_has_started_is_not_cancelled(store: Store) -> None:
    with store.processor(min_duration=0, max_duration=5) as processor:
        assert processor.run("k", store.apply, "started", 1, start_timeout=0.2) == "started"
        assert store.clock.now() == 1


# With batching=False


def test_alone_a_start_timeout_cancels_a_load_that_takes_longer_and_nothing_later(clock: VirtualTime) -> None:
    ran: list[str] = []
    with Processor(load_resource=lambda key: gevent.sleep(2), batching=False, max_duration=50) as processor:
        error = answer_of(processor.run, "k", lambda resource: ran.append("late"), start_timeout=1)
        assert type(error) is OperationCancelled
        assert clock.now() == 1

        def take_long(resource: None) -> str:
            gevent.sleep(10)
            return "done"

        assert processor.run("k", take_long, start_timeout=3) == "done"
    assert ran == []


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
            processor.run("k", do_nothing, start_timeout=0.25)
        return clock.now()

    caller = gevent.spawn(call)
    clock.advance(20)
    assert caller.value == 0.25

"""A worker that is killed while its batch's save waits ends, and what its callers are told is a kill (guarantee 7)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchAborted, Processor, Rejected
from geventbatch._core import process
from tests.stores.test_stores import adapter, over_slow_steps, place, spawned
from tests.support.callers import answer_of
from tests.support.recording_store import raising
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime
    from tests.support.adapters.base import Adapter, Step

__all__ = ["adapter", "place"]


@over_slow_steps("save", "commit")
def test_a_kill_in_a_save_ends_the_worker_and_is_told_as_a_kill(
    adapter: Adapter,
    step: Step,
) -> None:
    adapter.put("k", 10)
    with adapter.processor() as processor:
        with adapter.slow(step) as reached:
            caller = spawned(processor.run, "k", adapter.add, 1)
            wait_until(reached)
            worker: Any = next(iter(process.running))
            worker.kill(block=False)
            outcome = caller.get()
        assert type(outcome) is BatchAborted
        assert type(outcome.__cause__) is gevent.GreenletExit
        assert not outcome.retry_safe
        wait_until(lambda: worker.dead)
        assert adapter.get("k") in {10, 11}
        assert processor.run("k", adapter.add, 1) in {11, 12}


@over_slow_steps("save", "commit")
def test_a_kill_in_a_save_is_the_callers_own_with_batching_off(
    adapter: Adapter,
    step: Step,
) -> None:
    adapter.put("k", 10)
    with adapter.processor(batching=False) as processor:
        with adapter.slow(step) as reached:
            caller = spawned(processor.run, "k", adapter.add, 1)
            wait_until(reached)
            caller.kill(block=False)
            outcome = caller.get()
        assert type(outcome) is gevent.GreenletExit
        assert processor.run("k", adapter.add, 1) in {11, 12}


class Replaces:
    """Its save is killed, and cleans up as Django's ``atomic`` does: that raises in its turn."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __enter__(self) -> list[Any]:
        return []

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                raise self.error
            finally:
                self.clean_up()

    def clean_up(self) -> None:
        try:
            raising(LookupError("in a transaction"))()
        except LookupError as error:
            raise Rejected("can't change 'autocommit' now") from error


def append(resource: list[Any]) -> None:
    resource.append(1)


@pytest.mark.parametrize("many", [False, True])
def test_a_kill_whose_place_another_error_took_is_told_as_a_kill(clock: VirtualTime, many: bool) -> None:
    workers: list[Any] = []

    class Noting(Replaces):
        def __enter__(self) -> list[Any]:
            workers.append(gevent.getcurrent())
            return super().__enter__()

    class Many(Noting):
        def __enter__(self) -> Any:
            super().__enter__()
            return {"k": []}

    error = gevent.GreenletExit("kill")
    option: dict[str, Any] = {"open_resource": lambda _: Noting(error)}
    if many:
        option = {"open_resources": lambda _: Many(error)}
    with Processor(min_duration=0, **option) as processor:
        outcome = answer_of(processor.run, "k", append)
        assert type(outcome) is BatchAborted
        assert outcome.__cause__ is error
        assert not outcome.retry_safe
        clock.advance(1)
        assert workers[0].dead


def test_with_batching_off_a_kill_or_a_timeout_whose_place_another_error_took_is_the_caller_s() -> None:
    for error in (gevent.GreenletExit("kill"), gevent.Timeout(5)):
        with Processor(open_resource=partial(_open, error), min_duration=0, batching=False) as processor:
            assert answer_of(processor.run, "k", append) is error


def _open(error: BaseException, _: object) -> Replaces:
    return Replaces(error)


def test_who_runs_an_operation_while_he_cleans_up_behind_a_kill_is_not_killed_again() -> None:
    outcome: Any = None
    with Processor(open_resource=partial(_open, LookupError("plain")), min_duration=0, batching=False) as processor:
        try:
            raising(gevent.GreenletExit("mine"))()
        except gevent.GreenletExit:
            outcome = answer_of(processor.run, "k", append)
    assert type(outcome) is LookupError

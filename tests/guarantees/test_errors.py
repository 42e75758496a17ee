"""The error tree: what callers are told when their batch fails, and whether it is safe to run the operation again."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest

import geventbatch
from geventbatch import (
    BatchAborted,
    BatchError,
    BatchTimeout,
    Conflict,
    LoadFailed,
    NothingToSave,
    NotSaved,
    OperationCancelled,
    Processor,
    ProcessorOverloaded,
    ProcessorStopped,
    SaveFailed,
)
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from greenlet import greenlet

    from geventbatch.testing import VirtualTime

NOTHING = "nothing was saved, it is safe to run the operation again"
UNKNOWN = "it is unknown whether anything was saved: look at the resource before you run the operation again"


class Odd(BaseException):
    """No Exception."""


def nothing(*args: object) -> None:
    """An operation, or a save."""


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: object) -> None:
        raise error

    return raise_it


def slow(*args: object) -> None:
    gevent.sleep(100)


def answers(clock: VirtualTime, operation: Callable[[Any], Any] = nothing, **options: Any) -> list[Any]:
    """What three callers of one batch were answered, the first of whom ran *operation*."""
    with Processor(min_duration=0, max_duration=5, **options) as processor:
        first = gevent.spawn(answer_of, processor.run, "ICE 1", operation)
        others = [gevent.spawn(answer_of, processor.run, "ICE 1", nothing) for _ in range(2)]
        return [caller.get() for caller in (first, *others)]


def check(answered: list[Any], kind: type[BatchAborted], what: str, cause: object, *, retry_safe: bool) -> None:
    """Every caller has an exception of its own, of *kind*, which says it all."""
    assert len({id(error) for error in answered}) == len(answered) == 3
    for error in answered:
        assert type(error) is kind
        assert error.key == "ICE 1"
        assert error.retry_safe is retry_safe
        assert "key 'ICE 1'" in str(error)
        assert what in str(error)
        assert str(error).endswith(NOTHING if retry_safe else UNKNOWN)
        if isinstance(cause, type):
            assert type(error.__cause__) is cause
        else:
            assert error.__cause__ is cause


# The tree


def test_the_tree_of_errors_is_this() -> None:
    public = [getattr(geventbatch, name) for name in geventbatch.__all__]
    errors = {one.__name__: one.__bases__ for one in public if isinstance(one, type) and issubclass(one, BaseException)}
    assert errors == {
        "BatchError": (Exception,),
        "ProcessorStopped": (BatchError,),
        "ProcessorOverloaded": (BatchError,),
        "OperationCancelled": (BatchError, TimeoutError),
        "PartlySaved": (Exception,),
        "Repeated": (NotSaved,),
        "IdempotencyKeyReused": (BatchError,),
        "BatchAborted": (BatchError,),
        "LoadFailed": (BatchAborted,),
        "SaveFailed": (BatchAborted,),
        "BatchTimeout": (BatchAborted, TimeoutError),
        "NotSaved": (Exception,),
        "Conflict": (NotSaved,),
        "Rejected": (NotSaved,),
        "ResourceMissing": (LoadFailed,),
        "NothingToSave": (Exception,),
    }


def test_what_was_never_admitted_or_never_started_is_always_retry_safe_and_an_error_is_not_by_default() -> None:
    assert ProcessorStopped().retry_safe is True
    assert ProcessorOverloaded().retry_safe is True
    assert OperationCancelled().retry_safe is True
    assert BatchError().retry_safe is False
    assert BatchAborted().retry_safe is False


# Each of them, as callers meet it


def test_a_stopped_processor_says_so_and_that_nothing_was_saved_and_where_to_run_it(clock: VirtualTime) -> None:
    processor = Processor(min_duration=0)
    processor.stop()
    one, other = (answer_of(processor.run, "ICE 1", nothing) for _ in range(2))
    assert type(one) is type(other) is ProcessorStopped
    assert one is not other
    assert one.retry_safe is True
    assert str(one) == (
        f"{processor.name}: the processor was stopped before the operation was admitted; nothing was saved, it is safe "
        "to run it again on another processor"
    )


def test_an_overloaded_processor_says_how_much_waits_and_that_nothing_was_saved_and_to_come_later(
    clock: VirtualTime,
) -> None:
    with Processor(load_resource=slow, min_duration=0, max_pending=2) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "ICE 1", nothing) for _ in range(4)]
        clock.settle()
        one, other = (caller.value for caller in callers[2:])
        gevent.joinall(callers)
    assert type(one) is type(other) is ProcessorOverloaded
    assert one is not other
    assert one.retry_safe is True
    assert str(one) == (
        f"{processor.name}: max_pending of 2 operations are waiting already; nothing was saved, it is safe to run it "
        "again later: no rate is known yet, try in 1 s"
    )


def test_an_operation_that_did_not_start_in_time_says_how_long_it_waited_and_that_it_is_safe_to_run_it_again(
    clock: VirtualTime,
) -> None:
    with Processor(load_resource=slow, min_duration=0, max_duration=5) as processor:
        callers = [
            gevent.spawn(answer_of, processor.run, "ICE 1", nothing, start_timeout=seconds) for seconds in (0.25, 3, 10)
        ]
        one, other, last = (caller.get() for caller in callers)
    assert type(one) is type(other) is OperationCancelled
    assert isinstance(one, TimeoutError)
    assert one.retry_safe is True
    assert str(one) == (
        "the operation on key 'ICE 1' did not start within its start_timeout of 0.25 s; nothing of it was saved, it is "
        "safe to run it again"
    )
    assert "3 s" in str(other)
    assert type(last) is BatchTimeout


@pytest.mark.parametrize(
    "cause",
    [
        OSError("database gone"),
        NotSaved("as early as this"),
        NothingToSave(),
        TimeoutError(),
        gevent.Timeout(7),
        Odd("odd"),
        LoadFailed("of another processor"),
        StopIteration(),
    ],
    ids=repr,
)
def test_a_load_that_raises_whatever_it_raises_is_a_load_failed_from_it_and_retry_safe(
    clock: VirtualTime, cause: BaseException
) -> None:
    answered = answers(clock, load_resource=raising(cause))
    check(answered, LoadFailed, f"loading raised {cause!r}", cause, retry_safe=True)


def test_an_open_resource_that_raises_when_called_is_a_load_failed(clock: VirtualTime) -> None:
    cause = KeyError("ICE 1")
    check(
        answers(clock, open_resource=raising(cause)),
        LoadFailed,
        "loading raised KeyError('ICE 1')",
        cause,
        retry_safe=True,
    )


@pytest.mark.parametrize(
    "cause",
    [
        OSError("connection lost"),
        TimeoutError(),
        gevent.Timeout(7),
        Odd("odd"),
        LoadFailed("of another processor", retry_safe=True),
        ProcessorStopped("another one"),
        NothingToSave(),
    ],
    ids=repr,
)
def test_a_save_that_raises_whatever_it_raises_is_a_save_failed_from_it_and_its_outcome_unknown(
    clock: VirtualTime, cause: BaseException
) -> None:
    answered = answers(clock, save_resource=raising(cause))
    check(answered, SaveFailed, f"saving raised {cause!r}", cause, retry_safe=False)


@pytest.mark.parametrize("kind", [NotSaved, type("Refused", (NotSaved,), {})])
def test_a_save_that_raises_not_saved_is_a_save_failed_and_retry_safe(clock: VirtualTime, kind: type[NotSaved]) -> None:
    cause = kind("seat map is read-only")
    check(answers(clock, save_resource=raising(cause)), SaveFailed, f"saving raised {cause!r}", cause, retry_safe=True)


def test_out_of_attempts_is_a_save_failed_from_the_conflict_that_says_how_many_there_were_and_is_retry_safe(
    clock: VirtualTime,
) -> None:
    cause = Conflict("version 7")
    answered = answers(clock, save_resource=raising(cause), max_attempts=3)
    what = "saving raised Conflict('version 7') in attempt 3 of 3"
    check(answered, SaveFailed, what, cause, retry_safe=True)


def test_a_deadline_in_the_load_is_a_batch_timeout_of_that_phase_and_retry_safe(clock: VirtualTime) -> None:
    answered = answers(clock, load_resource=slow)
    check(answered, BatchTimeout, "max_duration of 5 s passed while it was loading", TimeoutError, retry_safe=True)
    assert {error.phase for error in answered} == {"load"}
    assert all(isinstance(error, TimeoutError) for error in answered)


def test_a_deadline_in_an_operation_is_a_batch_timeout_of_that_phase_and_retry_safe(clock: VirtualTime) -> None:
    answered = answers(clock, slow)
    what = "max_duration of 5 s passed while it was applying its operations"
    check(answered, BatchTimeout, what, TimeoutError, retry_safe=True)
    assert {error.phase for error in answered} == {"operations"}


def test_a_deadline_in_the_save_is_a_batch_timeout_of_that_phase_and_its_outcome_unknown(clock: VirtualTime) -> None:
    answered = answers(clock, save_resource=slow)
    check(answered, BatchTimeout, "max_duration of 5 s passed while it was saving", TimeoutError, retry_safe=False)
    assert {error.phase for error in answered} == {"save"}


def test_a_deadline_that_cpu_work_ran_past_is_a_batch_timeout_of_the_operations_and_retry_safe(
    clock: VirtualTime,
) -> None:
    saved: list[str] = []
    answered = answers(clock, lambda resource: clock.spend(6), save_resource=lambda key, resource: saved.append(key))
    what = "max_duration of 5 s passed while it was applying its operations"
    check(answered, BatchTimeout, what, TimeoutError, retry_safe=True)
    assert saved == []


def test_an_operation_that_kills_its_worker_is_a_batch_aborted_from_that_and_retry_safe(clock: VirtualTime) -> None:
    cause = gevent.GreenletExit("killed")
    check(answers(clock, raising(cause)), BatchAborted, f"killed by {cause!r}", cause, retry_safe=True)


@pytest.mark.parametrize("cause", [SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_an_operation_that_ends_the_process_is_a_batch_aborted_from_that_for_everybody_else(
    clock: VirtualTime, cause: BaseException
) -> None:
    processor = Processor(min_duration=0, max_duration=5)
    operations: list[Callable[..., Any]] = [raising(cause), nothing, nothing]
    callers = [gevent.spawn(answer_of, processor.run, "ICE 1", operation) for operation in operations]
    with pytest.raises(type(cause)):  # gevent has the main greenlet raise it
        clock.settle()
    clock.settle()
    check([caller.value for caller in callers], BatchAborted, f"killed by {cause!r}", cause, retry_safe=True)
    processor.stop()


@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_a_worker_killed_is_a_batch_aborted_and_retry_safe_unless_the_save_had_begun(
    clock: VirtualTime, phase: str
) -> None:
    workers: list[greenlet] = []

    def wait(*args: object) -> None:
        workers.append(gevent.getcurrent())
        gevent.sleep(1)

    options = {"load": {"load_resource": wait}, "save": {"save_resource": wait}}.get(phase, {})

    def kill() -> None:
        gevent.sleep(0.5)
        gevent.kill(workers[0], gevent.GreenletExit("by its parent"))

    killer = gevent.spawn(kill)
    answered = answers(clock, wait if phase == "operations" else nothing, **options)
    killer.get()
    cause = answered[0].__cause__
    assert repr(cause) == "GreenletExit('by its parent')"
    check(answered, BatchAborted, "killed by GreenletExit('by its parent')", cause, retry_safe=phase != "save")


def test_once_a_save_has_begun_nothing_but_a_not_saved_makes_an_error_retry_safe(clock: VirtualTime) -> None:
    """Each of the ways that a save can end badly, through a scope that hides what happened to it."""

    def leaving(end: Callable[[], object]) -> Callable[[str], Any]:
        @contextmanager
        def scope(key: str) -> Iterator[None]:
            yield
            end()

        return scope

    def swallow_the_deadline() -> None:
        with gevent.Timeout(100, swallow := Odd("own")):
            try:
                gevent.sleep(50)
            except BaseException:
                raise swallow from None

    ends: list[tuple[Callable[[], object], bool]] = [
        (raising(OSError()), False),
        (raising(BatchTimeout(phase="load", retry_safe=True)), False),
        (raising(gevent.GreenletExit()), False),
        (slow, False),
        (swallow_the_deadline, False),
        (raising(NotSaved()), True),
        (raising(Conflict()), True),
    ]
    for end, retry_safe in ends:
        answered = answers(clock, open_resource=leaving(end))
        assert [error.retry_safe for error in answered] == [retry_safe] * 3
        assert all(isinstance(error, BatchAborted) for error in answered)


def test_a_not_saved_that_comes_after_the_deadline_of_the_save_makes_nobodys_error_retry_safe(
    clock: VirtualTime,
) -> None:
    """Everybody was answered at the deadline, and an answer does not change."""

    def late(key: str, resource: object) -> None:
        try:
            gevent.sleep(100)
        finally:
            raise NotSaved

    answered = answers(clock, save_resource=late)
    assert [type(error) for error in answered] == [BatchTimeout] * 3
    assert not any(error.retry_safe for error in answered)


def test_a_caller_that_changes_its_exception_changes_nobody_elses(clock: VirtualTime) -> None:
    cause = OSError("gone")
    with Processor(load_resource=raising(cause), min_duration=0) as processor:

        def caller(number: int) -> LoadFailed:
            try:
                processor.run("ICE 1", nothing)
            except LoadFailed as error:
                error.add_note(f"caller {number}")
                error.retry_safe = number > 0
                return error
            raise AssertionError

        callers = [gevent.spawn(caller, number) for number in range(3)]
        errors = [one.get() for one in callers]
    assert [error.__notes__ for error in errors] == [["caller 0"], ["caller 1"], ["caller 2"]]
    assert [error.retry_safe for error in errors] == [False, True, True]
    assert all(error.__cause__ is cause for error in errors)


def test_off_the_switch_the_same_errors_come_from_the_same_causes(clock: VirtualTime) -> None:
    gone = OSError("gone")
    for options, kind, cause, retry_safe in [
        ({"load_resource": raising(gone)}, LoadFailed, gone, True),
        ({"save_resource": raising(gone)}, SaveFailed, gone, False),
        ({"load_resource": slow}, BatchTimeout, None, True),
        ({"save_resource": slow}, BatchTimeout, None, False),
    ]:
        chosen: dict[str, Any] = dict(options)
        with Processor(min_duration=0, max_duration=5, batching=False, **chosen) as processor:
            error = answer_of(processor.run, "ICE 1", nothing)
        assert type(error) is kind
        assert error.key == "ICE 1"
        assert error.retry_safe is retry_safe
        assert str(error).endswith(NOTHING if retry_safe else UNKNOWN)
        assert error.__cause__ is cause if cause else isinstance(error.__cause__, TimeoutError)


# As other processes and reporters meet it


@pytest.mark.parametrize(
    "error",
    [
        BatchError("told"),
        ProcessorStopped("told"),
        ProcessorOverloaded("told"),
        OperationCancelled("told"),
        BatchAborted("told", key=("ICE 1", 2), retry_safe=True),
        LoadFailed("told", key="ICE 1", retry_safe=True),
        SaveFailed("told", key="ICE 1"),
        BatchTimeout("told", key="ICE 1", retry_safe=True, phase="operations"),
        NotSaved("told"),
        Conflict("told"),
        NothingToSave("told"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_can_be_pickled_and_copied_with_all_that_it_says(error: Any) -> None:
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    for again in [*(pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols), copy.copy(error)]:  # noqa: S301 - our own
        assert type(again) is type(error)
        assert str(again) == str(error) == "told"
        assert again.args == error.args
        for name in ("retry_safe", "key", "phase"):
            assert getattr(again, name, "none") == getattr(error, name, "none")


def test_an_error_that_a_caller_got_can_be_pickled_too(clock: VirtualTime) -> None:
    error = answers(clock, save_resource=slow)[0]
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
    assert (str(again), again.key, again.phase, again.retry_safe) == (str(error), "ICE 1", "save", False)

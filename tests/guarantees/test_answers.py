"""Guarantees 2 and 3: an answer means saved, and a failure reaches everyone at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import gevent
import pytest

from geventbatch import BatchAborted, Conflict, LoadFailed, NothingToSave, NotSaved, SaveFailed
from tests.support.recording_store import (
    FORMS,
    Caller,
    Form,
    Store,
    add,
    answered_at,
    answers,
    do_nothing,
    fail,
    only_once,
    raising,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch import Processor
    from geventbatch.testing import VirtualTime


class Odd(BaseException):
    """Neither an Exception nor a kill."""


WHATEVER = [OSError, gevent.Timeout, Odd, TimeoutError, AssertionError]


def times_out_by_itself(resource: list[Any], timeout: gevent.Timeout) -> None:
    """An operation that lets a Timeout of its own out."""
    with timeout:
        gevent.sleep(100)


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.02)


def assert_each_has_its_own(callers: list[Caller], kind: type[BatchAborted], cause: BaseException) -> None:
    errors = answers(callers)
    assert [type(error) for error in errors] == [kind] * len(callers)
    assert len({id(error) for error in errors}) == len(callers)
    assert {id(error.__cause__) for error in errors} == {id(cause)}
    assert {error.key for error in errors} == {"k"}


# 2: an answer means saved


def test_run_returns_only_after_the_save_of_its_batch_has_returned(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", store.apply, mark) for mark in range(3)]
        store.clock.advance(0.029)
        assert answered_at(callers) == [None, None, None]
        store.clock.advance(1)
        assert answered_at(callers) == [0.03] * 3 == store.times("saved") * 3


def test_run_returns_what_its_own_operation_returned(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", lambda resource, mark: (mark, None), mark) for mark in range(100)]
        nothing = store.call(processor, "k", do_nothing)
        store.clock.advance(1)
        assert answers(callers) == [(mark, None) for mark in range(100)]
        assert nothing.answered
        assert nothing.answer is None


@pytest.mark.parametrize("clean_errors", [(), (Exception,)])
def test_what_an_operation_raises_reaches_its_own_caller_unwrapped_and_the_others_go_on(
    store: Store, clean_errors: tuple[type[Exception], ...]
) -> None:
    kinds = (ValueError, OSError, ZeroDivisionError, AssertionError, RecursionError, MemoryError)
    errors = [kind("taken") for kind in kinds]
    with store.processor(min_duration=0, clean_errors=clean_errors) as processor:
        before = store.call(processor, "k", add, "before")
        raised = [store.call(processor, "k", fail, error) for error in errors]
        after = store.call(processor, "k", add, "after")
        store.clock.advance(1)
        assert all(caller.error is error for caller, error in zip(raised, errors, strict=True))
        assert answers([before, after]) == store.kept["k"] == ["before", "after"]
        assert len(store.times("load")) == (1 if clean_errors else 2)  # the second, to undo what raised
        assert len(store.times("saved")) == 1


def test_what_an_operation_raises_reaches_its_caller_only_after_the_save(store: Store) -> None:
    with store.processor(min_duration=0, clean_errors=(Exception,)) as processor:
        raised = store.call(processor, "k", fail, ValueError("taken"))
        store.call(processor, "k", add, "other")
        store.clock.advance(1)
        assert raised.at == 0.03 == store.times("saved")[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_timeout_of_an_operation_s_own_reaches_only_its_caller_and_only_after_the_save(
    clock: VirtualTime, form: Form
) -> None:
    store = Store(clock, form, save_time=0.5)
    timeout = gevent.Timeout(0.1)
    with store.processor(min_duration=0, max_duration=5, clean_errors=(gevent.Timeout,)) as processor:
        before = store.call(processor, "k", add, "before")
        timed_out = store.call(processor, "k", times_out_by_itself, timeout)
        after = store.call(processor, "k", add, "after")
        clock.advance(2)
        assert timed_out.error is timeout
        assert answers([before, after]) == store.kept["k"] == ["before", "after"]
        assert answered_at([before, timed_out, after]) == [0.6] * 3


def test_an_operation_may_let_a_timeout_of_its_own_pass_and_return(store: Store) -> None:
    def tries(resource: list[Any]) -> str:
        gevent.with_timeout(0.1, gevent.sleep, 100, timeout_value=None)
        resource.append("tried")
        return "tried"

    with store.processor(min_duration=0) as processor:
        assert processor.run("k", tries) == "tried"
        assert store.kept["k"] == ["tried"]
        assert store.clock.now() == 0.13


def test_a_batch_in_which_no_operation_completed_is_not_saved(store: Store) -> None:
    with store.processor(min_duration=0, clean_errors=(Exception,)) as processor:
        errors = [ValueError(mark) for mark in range(3)]
        callers = [store.call(processor, "k", fail, error) for error in errors]
        store.clock.advance(1)
        assert answers(callers) == errors
        assert answered_at(callers) == [0.01] * 3
        assert store.times("save") == []


def test_one_completed_operation_among_many_that_raise_is_saved(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        for _ in range(10):
            store.call(processor, "k", fail, ValueError("taken"))
        completed = store.call(processor, "k", do_nothing)
        for _ in range(10):
            store.call(processor, "k", fail, ValueError("taken"))
        store.clock.advance(1)
        assert completed.answered
        assert len(store.times("saved")) == 1


def swallow(error: BaseException) -> bool:
    return True


@pytest.mark.parametrize("kind", [*WHATEVER, Conflict, NotSaved])
def test_a_scope_is_left_with_nothing_to_save_and_what_it_raises_then_is_ignored(
    clock: VirtualTime, kind: type[BaseException]
) -> None:
    assert_left_with_nothing_to_save(clock, raising(kind()))


@pytest.mark.parametrize("on_leave", [do_nothing, swallow])
def test_a_scope_is_left_with_nothing_to_save_whether_it_swallows_that_or_not(
    clock: VirtualTime, on_leave: Callable[[BaseException], object]
) -> None:
    assert_left_with_nothing_to_save(clock, on_leave)


def assert_left_with_nothing_to_save(clock: VirtualTime, on_leave: Callable[[BaseException], object]) -> None:
    store = Store(clock, "scope")
    store.on_leave = on_leave
    with store.processor(min_duration=0) as processor:
        error = ValueError("taken")
        with pytest.raises(ValueError, match="taken") as raised:
            processor.run("k", fail, error)
        assert raised.value is error
        assert [type(left) for left in store.left] == [NothingToSave]
        assert len(store.times("load")) == 1
        store.on_leave = do_nothing
        assert processor.run("k", add, 1) == 1
        assert store.kept["k"] == [1]


def test_a_scope_that_takes_its_time_to_leave_without_saving_is_left_before_the_answer(clock: VirtualTime) -> None:
    store = Store(clock, "scope")
    store.on_leave = lambda error: gevent.sleep(0.1)
    with store.processor(min_duration=0) as processor, pytest.raises(ValueError, match="taken"):
        processor.run("k", fail, ValueError("taken"))
    assert clock.now() == 0.1


def test_an_operation_that_raised_is_told_of_a_failed_save_like_all_others(store: Store) -> None:
    store.on_save = raising(OSError("disk full"))
    with store.processor(min_duration=0) as processor:
        raised = store.call(processor, "k", fail, ValueError("taken"))
        other = store.call(processor, "k", add, 1)
        store.clock.advance(1)
        assert [type(error) for error in answers([raised, other])] == [SaveFailed, SaveFailed]


# 3: a failure reaches everyone at once


def come_one_by_one(store: Store, processor: Processor[list[Any]], count: int, every: float) -> list[Caller]:
    callers = []
    for mark in range(count):
        callers.append(store.call(processor, "k", store.apply, mark))
        store.clock.advance(every)
    return callers


def test_a_failed_load_answers_all_that_wait_for_the_key_at_once_those_that_came_during_the_load_too(
    store: Store,
) -> None:
    error = OSError("no route")
    store.on_load = raising(error)
    with store.processor(min_duration=0) as processor:
        callers = come_one_by_one(store, processor, 9, 0.001)
        store.clock.advance(1)
        assert_each_has_its_own(callers, LoadFailed, error)
        assert answered_at(callers) == [0.01] * 9
        assert len(store.times("load")) == 1
        assert store.times("apply") == store.times("save") == []
        assert all(one.retry_safe for one in answers(callers))


@pytest.mark.parametrize("size", [1, 2])
def test_a_failed_load_answers_those_in_batches_queued_behind_too_with_no_second_load(store: Store, size: int) -> None:
    error = OSError("no route")
    store.on_load = raising(error)
    with store.processor(min_duration=0, max_batch_size=size) as processor:
        callers = come_one_by_one(store, processor, 50, 0.0001)
        store.clock.advance(100)
        assert_each_has_its_own(callers, LoadFailed, error)
        assert answered_at(callers) == [0.01] * 50
        assert len(store.times("load")) == 1


def test_a_failed_load_answers_nobody_of_another_key(store: Store) -> None:
    def only_k_fails(key: Any) -> None:
        if key == "k":
            raise OSError

    store.on_load = only_k_fails
    with store.processor(min_duration=0, workers=1) as processor:
        failed = store.call(processor, "k", add, 1)
        other = store.call(processor, "other", add, 1)
        store.clock.advance(1)
        assert isinstance(failed.error, LoadFailed)
        assert other.answer == 1


@pytest.mark.parametrize("kind", WHATEVER)
def test_whatever_loading_raises_is_a_failed_load(store: Store, kind: type[BaseException]) -> None:
    error = kind()
    store.on_load = only_once(raising(error))
    with store.processor(min_duration=0, max_batch_size=1) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(3)]
        store.clock.advance(1)
        assert_each_has_its_own(callers, LoadFailed, error)
        assert processor.run("k", add, "next") == "next"
        assert store.kept["k"] == ["next"]


def test_the_next_run_after_a_failed_load_starts_a_new_batch(store: Store) -> None:
    store.on_load = only_once(raising(OSError("no route")))
    with store.processor(min_duration=0) as processor:
        with pytest.raises(LoadFailed):
            processor.run("k", add, 1)
        assert processor.run("k", add, 2) == 2
        assert len(store.times("load")) == 2
        assert store.kept["k"] == [2]


def test_callers_that_run_again_as_soon_as_they_hear_of_a_failed_load_share_the_next_one(store: Store) -> None:
    store.on_load = only_once(raising(OSError("no route")))
    told: list[tuple[float, int]] = []

    def insists(mark: int) -> None:
        try:
            processor.run("k", add, mark)
        except LoadFailed:
            told.append((store.clock.now(), processor.run("k", add, mark)))

    with store.processor(min_duration=0) as processor:
        for mark in range(100):
            gevent.spawn(insists, mark)
        store.clock.advance(1)
        assert sorted(mark for _, mark in told) == list(range(100))
        assert len(store.times("load")) == 2


def test_a_caller_that_comes_after_a_failed_load_does_not_get_its_error(store: Store) -> None:
    def fail_and_let_another_come(key: Any) -> NoReturn:
        store.on_load = do_nothing
        gevent.spawn_later(0, lambda: late.append(store.call(processor, "k", add, "late")))
        raise OSError

    late: list[Caller] = []
    store.on_load = fail_and_let_another_come
    with store.processor(min_duration=0) as processor:
        first = store.call(processor, "k", add, "first")
        store.clock.advance(1)
        assert isinstance(first.error, LoadFailed)
        assert answers(late) == ["late"]


def test_a_failed_save_answers_every_operation_of_its_batch_at_once(store: Store) -> None:
    error = OSError("disk full")
    store.on_save = raising(error)
    with store.processor(min_duration=0) as processor:
        callers = come_one_by_one(store, processor, 9, 0.001)
        store.clock.advance(1)
        assert_each_has_its_own(callers, SaveFailed, error)
        assert answered_at(callers) == [0.03] * 9
        assert not any(one.retry_safe for one in answers(callers))


def test_a_failed_save_answers_nobody_of_the_batch_behind(store: Store) -> None:
    store.on_save = only_once(raising(OSError("disk full")))
    with store.processor(min_duration=0) as processor:
        failed = store.call(processor, "k", add, "failed")
        store.clock.advance(0.02)
        behind = store.call(processor, "k", add, "behind")
        store.clock.advance(1)
        assert isinstance(failed.error, SaveFailed)
        assert behind.answer == "behind"
        assert store.kept["k"] == ["behind"]
        assert len(store.times("load")) == 2


@pytest.mark.parametrize("kind", WHATEVER)
def test_whatever_saving_raises_is_a_failed_save_of_unknown_outcome(store: Store, kind: type[BaseException]) -> None:
    error = kind()
    store.on_save = only_once(raising(error))
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(3)]
        store.clock.advance(1)
        assert_each_has_its_own(callers, SaveFailed, error)
        assert not any(one.retry_safe for one in answers(callers))


def test_a_save_that_says_not_saved_makes_its_failure_safe_to_retry(store: Store) -> None:
    error = NotSaved("constraint")
    store.on_save = raising(error)
    with store.processor(min_duration=0) as processor:
        callers = [store.call(processor, "k", add, mark) for mark in range(3)]
        store.clock.advance(1)
        assert_each_has_its_own(callers, SaveFailed, error)
        assert all(one.retry_safe for one in answers(callers))
        assert len(store.times("load")) == 1


def test_the_next_run_after_a_failed_save_starts_a_new_batch_from_what_is_stored(store: Store) -> None:
    store.on_save = only_once(raising(OSError("disk full")))
    with store.processor(min_duration=0) as processor:
        with pytest.raises(SaveFailed):
            processor.run("k", add, 1)
        assert processor.run("k", add, 2) == 2
        assert store.kept["k"] == [2]


def test_an_exception_says_which_key_and_what_happened_and_whether_it_is_safe_to_run_again(store: Store) -> None:
    store.on_save = raising(OSError("disk full"))
    with (
        store.processor(min_duration=0) as processor,
        pytest.raises(SaveFailed, match=r"'k'.*disk full.*unknown whether"),
    ):
        processor.run("k", add, 1)


def test_after_a_failure_the_resource_of_the_failed_batch_is_not_used_again(store: Store) -> None:
    seen: list[list[Any]] = []
    store.on_save = only_once(raising(OSError("disk full")))

    def look(resource: list[Any], mark: str) -> None:
        seen.append(list(resource))
        resource.append(mark)

    with store.processor(min_duration=0) as processor:
        with pytest.raises(SaveFailed):
            processor.run("k", look, "lost")
        processor.run("k", look, "kept")
        assert seen == [[], []]

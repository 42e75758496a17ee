"""``geventbatch.testing.faults`` and ``batching_off``: for pairs, scopes and bulks, with batching on and off."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import (
    BatchTimeout,
    Conflict,
    LoadFailed,
    NotSaved,
    PartlySaved,
    Processor,
    ResourceMissing,
    SaveFailed,
    current_batch,
)
from geventbatch.testing import batching_off, faults
from tests.support.callers import answer_of
from tests.support.recording_store import FORMS, Store, add, answers, current_greenlet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing import VirtualTime


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param, load_time=0.01, save_time=0.01)


@pytest.fixture(params=[True, False], ids=["batching", "alone"])
def processor(request: pytest.FixtureRequest, store: Store) -> Iterator[Processor[list[Any]]]:
    with store.processor(min_duration=0, max_duration=1, batching=request.param) as processor:
        yield processor


def test_the_nth_load_raises_and_does_not_reach_the_store(store: Store, processor: Processor[list[Any]]) -> None:
    error = OSError("gone")
    with faults(processor) as plan:
        fault = plan.fail_load(error, nth=2)
        assert processor.run("k", add, 1) == 1
        failed = answer_of(processor.run, "k", add, 2)
        assert processor.run("k", add, 3) == 3
    assert (type(failed), failed.__cause__, failed.retry_safe) == (LoadFailed, error, True)
    assert (fault.happened, plan.loads, plan.saves) == (1, 3, 2)
    assert len(store.times("load")) == 2
    assert store.kept["k"] == [1, 3]


def test_the_nth_save_raises_and_saves_nothing(store: Store, processor: Processor[list[Any]]) -> None:
    error = OSError("gone")
    with faults(processor) as plan:
        plan.fail_save(error, nth=2)
        processor.run("k", add, 1)
        failed = answer_of(processor.run, "k", add, 2)
        processor.run("k", add, 3)
    assert (type(failed), failed.__cause__, failed.retry_safe) == (SaveFailed, error, False)
    assert store.kept["k"] == [1, 3]
    assert store.left == [error] * (store.form != "pair")


def test_a_save_that_raises_a_not_saved_is_safe_to_run_again(processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        plan.fail_save(NotSaved)
        failed = answer_of(processor.run, "k", add, 1)
    assert (type(failed), failed.retry_safe) == (SaveFailed, True)


def test_a_conflict_has_the_batch_replayed(store: Store, processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        plan.conflict(times=2)
        assert processor.run("k", add, 1) == 1
    assert (plan.loads, plan.saves) == (3, 3)
    assert store.kept["k"] == [1]
    assert len(store.times("save")) == 1


def test_conflicts_without_end_are_given_up_after_the_last_attempt(processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        plan.conflict(times=None)
        failed = answer_of(processor.run, "k", add, 1)
    assert (type(failed), type(failed.__cause__), failed.retry_safe) == (SaveFailed, Conflict, True)
    assert plan.saves == 5


def test_an_answer_is_lost_of_a_save_that_was_carried_out(store: Store, processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        plan.lose_answer()
        failed = answer_of(processor.run, "k", add, 1)
        assert processor.run("k", add, 2) == 2
    assert (type(failed), type(failed.__cause__), failed.retry_safe) == (SaveFailed, ConnectionResetError, False)
    assert store.kept["k"] == [1, 2]
    assert store.left == []


@pytest.mark.parametrize("phase", ["load", "save"])
def test_what_hangs_for_some_seconds_goes_on_then(store: Store, processor: Processor[list[Any]], phase: str) -> None:
    with faults(processor) as plan:
        _ = plan.hang_load(0.5) if phase == "load" else plan.hang_save(0.5)
        assert processor.run("k", add, 1) == 1
    assert store.clock.now() == pytest.approx(0.52)
    assert store.kept["k"] == [1]


def test_a_load_that_hangs_until_the_deadline_is_a_timeout(store: Store, processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        plan.hang_load()
        failed = answer_of(processor.run, "k", add, 1)
        assert processor.run("k", add, 2) == 2
    assert (type(failed), failed.phase, failed.retry_safe) == (BatchTimeout, "load", True)
    assert store.kept["k"] == [2]


@pytest.mark.parametrize("saved", [False, True])
def test_a_save_that_hangs_until_the_deadline_is_unknown_before_and_after_it_was_carried_out(
    store: Store, processor: Processor[list[Any]], saved: bool
) -> None:
    with faults(processor) as plan:
        plan.hang_save(saved=saved)
        failed = answer_of(processor.run, "k", add, 1)
    assert (type(failed), failed.phase, failed.retry_safe) == (BatchTimeout, "save", False)
    assert store.kept["k"] == [1] * saved
    assert len(store.left) == (store.form != "pair" and not saved)


def test_what_hangs_can_be_waited_for_and_released(store: Store, processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        fault = plan.hang_save()
        caller = store.call(processor, "k", add, 1)
        assert fault.wait(0.5)
        assert (caller.answered, store.kept["k"]) == (False, [])
        fault.release()
        caller.greenlet.join()
    assert caller.answer == 1


def test_what_hangs_when_the_block_ends_goes_on(store: Store, processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        fault = plan.hang_load()
        caller = store.call(processor, "k", add, 1)
        fault.wait()
    caller.greenlet.join()
    assert (caller.answer, store.kept["k"]) == (1, [1])


def test_after_the_block_nothing_goes_wrong(store: Store, processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        plan.fail_load(OSError, times=None)
        assert isinstance(answer_of(processor.run, "k", add, 1), LoadFailed)
    assert processor.run("k", add, 2) == 2
    assert plan.loads == 1


def test_nth_is_counted_from_when_it_was_planned_by_each_fault_for_itself(processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        processor.run("k", add, 1)
        plan.fail_load(OSError, nth=1)
        plan.fail_load(KeyError, nth=2)
        causes = [answer_of(processor.run, "k", add, 1).__cause__ for _ in range(2)]
    assert list(map(type, causes)) == [OSError, KeyError]


def test_a_fault_of_a_key_leaves_the_other_keys_alone(store: Store, processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        plan.fail_load(OSError, key="b")
        plan.fail_save(OSError, key="c")
        plan.lose_answer(key="d")
        got = {key: answer_of(processor.run, key, add, 1) for key in "abcd"}
    assert [type(got[key]) for key in "abcd"] == [int, LoadFailed, SaveFailed, SaveFailed]
    assert {key: store.kept[key] for key in "abcd"} == {"a": [1], "b": [], "c": [], "d": [1]}


def test_a_batch_of_which_nothing_is_to_be_saved_makes_no_save(processor: Processor[list[Any]]) -> None:
    with faults(processor) as plan:
        processor.run("k", len, read_only=True)
        assert (plan.loads, plan.saves) == (1, 0)


def test_a_fault_that_never_happened_fails_the_test(processor: Processor[list[Any]]) -> None:
    with (
        pytest.raises(AssertionError, match=r"never happened: <Fault: load 2 of key 'k' raises .*1 loads and 1 saves"),
        faults(processor) as plan,
    ):
        plan.fail_load(OSError("gone"), nth=2, key="k")
        processor.run("k", add, 1)
    with pytest.raises(KeyError), faults(processor) as plan:
        plan.conflict()
        raise KeyError


def test_faults_can_be_nested_and_the_store_keeps_what_else_it_has(clock: VirtualTime) -> None:
    class Door:
        def __call__(self, key: str) -> Any:
            return scope(key)

        def normalize_key(self, key: str) -> str:
            return key.lower()

    opened: list[str] = []

    @contextmanager
    def scope(key: str) -> Iterator[list[Any]]:
        opened.append(key)
        yield []

    with Processor(open_resource=Door(), min_duration=0) as processor:
        with faults(processor) as outer, faults(processor) as inner:
            outer.fail_save(OSError, key="ANN")
            inner.hang_load(0.1, key="Ann")
            assert isinstance(answer_of(processor.run, "ann", add, 1), SaveFailed)
        processor.run("Ann", add, 1)
    assert (opened, clock.now()) == (["ann", "ann"], 0.1)


# Bulks of several keys


@pytest.fixture
def bulk(clock: VirtualTime) -> Store:
    return Store(clock, "bulk", load_time=0.01, save_time=0.01)


def run_each(store: Store, processor: Processor[list[Any]], keys: str) -> dict[str, Any]:
    callers = [store.call(processor, key, add, key) for key in keys]
    gevent.joinall([one.greenlet for one in callers])
    return dict(zip(keys, answers(callers), strict=True))


@pytest.fixture
def bulks(bulk: Store) -> Iterator[Processor[list[Any]]]:
    with bulk.processor(min_duration=0, max_duration=1, max_bulk=10, workers=1) as processor:
        yield processor


def test_in_a_bulk_only_the_keys_that_are_named_fail(bulk: Store, bulks: Processor[list[Any]]) -> None:
    with faults(bulks) as plan:
        plan.fail_load(ResourceMissing("none"), key="a")
        plan.fail_load(OSError, key="b")
        plan.fail_save(OSError, key="c")
        plan.conflict(key="d")
        plan.lose_answer(key="e")
        got = run_each(bulk, bulks, "abcdef")
    assert [type(got[key]) for key in "abcdef"] == [ResourceMissing, LoadFailed, SaveFailed, str, SaveFailed, str]
    assert {key: bulk.kept[key] for key in "abcdef"} == {
        **{key: [] for key in "abc"},
        "d": ["d"],
        "e": ["e"],
        "f": ["f"],
    }
    assert (plan.loads, plan.saves) == (2, 2)


def test_in_a_bulk_all_keys_fail_when_none_is_named(bulk: Store, bulks: Processor[list[Any]]) -> None:
    for method, kind, kept in (
        ("fail_load", LoadFailed, 0),
        ("fail_save", SaveFailed, 0),
        ("lose_answer", SaveFailed, 1),
    ):
        with faults(bulks) as plan:
            getattr(plan, method)(OSError)
            got = run_each(bulk, bulks, "abc")
        assert {type(one) for one in got.values()} == {kind}
        assert [len(bulk.kept[key]) for key in "abc"] == [kept] * 3


def test_what_the_save_of_a_bulk_has_lost_by_itself_is_told_beside_it(bulk: Store) -> None:
    @contextmanager
    def open_many(keys: list[str]) -> Iterator[dict[str, list[Any]]]:
        yield {key: [] for key in keys}
        raise PartlySaved({"a": KeyError("a")})

    with Processor(open_resources=open_many, min_duration=0) as processor, faults(processor) as plan:
        plan.fail_save(OSError, key="b")
        got = run_each(bulk, processor, "abc")
    assert [type(got[key]) for key in "abc"] == [SaveFailed, SaveFailed, str]
    assert [type(got[key].__cause__) for key in "ab"] == [KeyError, OSError]


def test_when_every_key_of_a_bulk_fails_alone_nothing_is_saved(bulk: Store, bulks: Processor[list[Any]]) -> None:
    with faults(bulks) as plan:
        for key in "abc":
            plan.fail_save(OSError, key=key)
        got = run_each(bulk, bulks, "abc")
    assert {type(one) for one in got.values()} == {SaveFailed}
    assert bulk.times("save") == []
    assert len(bulk.left) == 3


# What is refused


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ({"nth": 0}, ValueError, "nth is 0, but must be 1 or more"),
        ({"nth": True}, TypeError, "nth is True, but must be an int"),
        ({"times": 0}, ValueError, "times is 0, but must be 1 or more"),
        ({"error": 5}, TypeError, "error is 5, but must be an exception, or a class of them"),
        ({"error": int}, TypeError, "error is <class 'int'>, but must be an exception, or a class of them"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(given: dict[str, Any], kind: type[Exception], told: str) -> None:
    with Processor() as processor, faults(processor) as plan:
        with pytest.raises(kind) as refused:
            plan.fail_load(**{"error": OSError, **given})
        assert str(refused.value) == told
        with pytest.raises(ValueError, match="seconds is -1"):
            plan.hang_load(-1)


def test_what_is_no_processor_is_refused() -> None:
    for block in (faults, batching_off):
        entering: Any = block
        with pytest.raises(TypeError, match="processor is 5, but must be a Processor"), entering(5):
            pass


# Batching off


def where(_: object) -> tuple[Any, bool]:
    return current_greenlet(), current_batch().alone


def test_batching_is_off_in_the_block_for_those_that_are_named_and_as_it_was_behind_it(clock: VirtualTime) -> None:
    me = current_greenlet()
    with Processor(min_duration=0) as one, Processor(min_duration=0) as other, Processor(batching=False) as off:
        with pytest.raises(KeyError), batching_off(one, off):
            assert one.run("k", where) == (me, True)
            assert other.run("k", where)[1] is False
            raise KeyError
        assert [each.batching for each in (one, other, off)] == [True, True, False]
        with batching_off():
            assert [each.batching for each in (one, other, off)] == [False] * 3
            made = Processor(min_duration=0)
            assert made.batching is False
        assert made.batching is True
        assert Processor(min_duration=0).batching is True
        assert [each.batching for each in (one, other, off)] == [True, True, False]


def test_a_batch_that_was_loading_when_the_faults_began_ends_as_it_began(
    store: Store, processor: Processor[list[Any]]
) -> None:
    # Once: of a pair, it was saved, and its caller was told that this is unknown.
    caller = gevent.spawn(answer_of, processor.run, "k", add, 1)
    gevent.sleep(store.load_time / 2)
    with faults(processor) as plan:
        assert caller.get() == 1
        assert (plan.loads, plan.saves) == (0, 0)
    assert store.kept["k"] == [1]

"""Bulks: many keys loaded and saved together, each with its own operations, answers and failures.

That every guarantee holds for bulks of one key is what the tests of the guarantees say, in their form "bulk".
"""

from __future__ import annotations

import gc
import random
import traceback
import weakref
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import GreenletExit

from geventbatch import (
    BatchAborted,
    BatchError,
    BatchTimeout,
    Conflict,
    LoadFailed,
    NothingToSave,
    NotSaved,
    PartlySaved,
    Processor,
    Rejected,
    ResourceMissing,
    SaveFailed,
    current_batch,
)
from geventbatch._bulk.round import Round
from geventbatch._core.clock import clock as library_clock
from geventbatch._core.hub_turns import pace
from geventbatch.testing._virtual_time import _VirtualTimer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from geventbatch.testing import VirtualTime


class Broken(Exception):
    """What an operation raises half-way."""


class Odd(BaseException):
    """What ends no greenlet, and is no Exception."""


class Warehouse:
    """Keeps a list for each key. What it was asked for, and how, is in `loads`, `saves` and `left`."""

    def __init__(self) -> None:
        self.kept: dict[str, list[Any]] = {}
        self.loads: list[list[str]] = []
        self.saves: list[list[str]] = []
        self.left: list[type[BaseException]] = []
        self.load_time = self.save_time = 0.0
        self.missing: set[str] = set()
        self.unloadable: dict[str, Exception] = {}
        self.on_load: Callable[[list[str]], object] = lambda _: None
        self.on_save: Callable[[dict[str, list[Any]]], object] = lambda _: None
        self.lost: list[dict[str, Exception]] = []
        """For each save to come, what it does not save, and why."""

    @contextmanager
    def open(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        self.loads.append(list(keys))
        gevent.sleep(self.load_time)
        self.on_load(keys)
        resources: dict[str, Any] = {key: list(self.kept.get(key, ())) for key in keys if key not in self.missing}
        resources |= {key: self.unloadable[key] for key in keys if key in self.unloadable}
        try:
            yield resources
        except BaseException as error:
            self.left.append(type(error))
            raise
        self.saves.append(list(resources))
        gevent.sleep(self.save_time)
        self.on_save(resources)
        lost = self.lost.pop(0) if self.lost else {}
        self.kept |= {key: resource for key, resource in resources.items() if key not in lost}
        if lost:
            raise PartlySaved(lost)

    def processor(self, **options: Any) -> Processor[list[Any]]:
        return Processor(open_resources=self.open, **{"min_duration": 0, "max_duration": 5, **options})


@pytest.fixture
def warehouse() -> Warehouse:
    return Warehouse()


def append(resource: list[Any], mark: Any = 1) -> Any:
    resource.append(mark)
    return mark


def fail(resource: list[Any]) -> None:
    raise ValueError("refused")


def break_it(resource: list[Any]) -> None:
    resource.append("half")
    raise Broken


def spawn(processor: Processor[Any], key: str, operation: Callable[..., Any], *args: Any) -> gevent.Greenlet[..., Any]:
    return gevent.spawn(lambda: processor.run(key, operation, *args))


def run_all(
    clock: VirtualTime, processor: Processor[list[Any]], operations: dict[str, Callable[..., Any]], seconds: float = 20
) -> dict[str, Any]:
    """Run one operation on each key, all at once. Give what each returned or raised."""
    answers: dict[str, Any] = {}

    def call(key: str, operation: Callable[..., Any]) -> None:
        try:
            answers[key] = processor.run(key, operation)
        except BaseException as error:
            answers[key] = error

    for key, operation in operations.items():
        gevent.spawn(call, key, operation)
    clock.advance(seconds)
    return answers


def appends(keys: str) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(keys, append)


# -- together -----------------------------------------------------------------------------------------------


def test_keys_that_are_ready_are_loaded_together_and_saved_together(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor() as processor:
        assert run_all(clock, processor, appends("abc")) == {"a": 1, "b": 1, "c": 1}
    assert warehouse.loads == warehouse.saves == [["a", "b", "c"]]
    assert warehouse.kept == {"a": [1], "b": [1], "c": [1]}


def test_a_pair_of_functions_does_as_well(clock: VirtualTime, warehouse: Warehouse) -> None:
    def load(keys: list[str]) -> dict[str, list[Any]]:
        warehouse.loads.append(keys)
        return {key: list(warehouse.kept.get(key, ())) for key in keys}

    def save(resources: dict[str, list[Any]]) -> None:
        warehouse.saves.append(list(resources))
        warehouse.kept |= resources

    with Processor(load_resources=load, save_resources=save, min_duration=0) as processor:
        assert run_all(clock, processor, {**appends("ab"), "c": fail})["b"] == 1
    assert warehouse.loads == [["a", "b", "c"]]
    assert warehouse.saves == [["a", "b"]]
    assert warehouse.kept == {"a": [1], "b": [1]}


def test_max_bulk_bounds_the_keys_of_a_bulk(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor(max_bulk=2) as processor:
        run_all(clock, processor, appends("abcde"))
    assert warehouse.loads == [["a", "b"], ["c", "d"], ["e"]]


def test_by_default_it_is_a_hundred(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor() as processor:
        run_all(clock, processor, {str(number): append for number in range(250)})
    assert [len(keys) for keys in warehouse.loads] == [100, 100, 50]


def test_what_comes_while_max_batches_bulks_run_is_the_next_bulk(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.save_time = 1
    with warehouse.processor(max_batches=1) as processor:
        for key in "abcdef":
            spawn(processor, key, append)
            clock.advance(0.3)
        clock.advance(5)
    assert warehouse.loads == [["a"], ["b", "c", "d"], ["e", "f"]]


def test_a_worker_that_finds_its_batches_taken_by_another_one_goes_on(
    clock: VirtualTime, warehouse: Warehouse, capfd: pytest.CaptureFixture[str]
) -> None:
    warehouse.save_time = 1
    with warehouse.processor(max_batches=1) as processor:
        for key in "abc":  # both workers wait for the only place, and the first of them takes all
            spawn(processor, key, append)
            clock.advance(0.8)
        clock.advance(5)
        assert processor.stats().workers == 2
    assert sorted(warehouse.kept) == ["a", "b", "c"]
    assert capfd.readouterr().err == ""


def test_several_operations_of_a_key_are_one_batch_in_a_bulk(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor() as processor:
        for mark in range(10):
            spawn(processor, "ab"[mark % 2], append, mark)
        clock.advance(1)
    assert warehouse.kept == {"a": [0, 2, 4, 6, 8], "b": [1, 3, 5, 7, 9]}
    assert warehouse.saves == [["a", "b"]]


def test_each_key_takes_operations_until_its_window_is_over(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor(min_duration=1) as processor:
        for key in "aba":
            spawn(processor, key, append)
            clock.advance(0.2)
        spawn(processor, "b", append)
        clock.advance(5)
    assert warehouse.kept == {"a": [1, 1], "b": [1, 1]}
    assert len(warehouse.saves) == 2  # a was taken at once, before there was a b


def test_a_key_whose_turn_has_not_come_takes_operations_while_those_of_others_are_at_work(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    warehouse.load_time = 1

    def take_a_second(entries: list[Any], mark: int) -> None:
        gevent.sleep(1)
        append(entries, mark)

    with warehouse.processor() as processor:
        spawn(processor, "a", take_a_second, 1)
        spawn(processor, "b", append, 2)
        clock.advance(1.5)  # loaded: the operation on a is at work
        spawn(processor, "b", append, 3)  # before the first one of b
        spawn(processor, "a", append, 4)  # behind the first one of a
        clock.advance(10)
    assert warehouse.saves == [["a", "b"], ["a"]]
    assert warehouse.kept == {"a": [1, 4], "b": [2, 3]}


def test_a_batch_that_everybody_left_is_not_loaded(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.load_time = 1
    with warehouse.processor(max_batches=1) as processor:
        spawn(processor, "a", append)
        clock.advance(0.1)
        gone = spawn(processor, "b", append)
        spawn(processor, "c", append)
        clock.advance(0.1)
        gone.kill(block=False)
        clock.advance(5)
    assert warehouse.loads == [["a"], ["c"]]


def test_every_key_has_a_metric_of_its_own(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.load_time, warehouse.save_time = 1, 2
    processor = warehouse.processor()
    watcher = processor.subscribe_batch_metrics()
    run_all(clock, processor, {**appends("ab"), "c": fail})
    processor.stop()
    metrics = {metric.key: metric for metric in watcher}
    assert {key: metric.operation_count for key, metric in metrics.items()} == {"a": 1, "b": 1, "c": 1}
    assert [metrics["a"].load_duration, metrics["a"].save_duration, metrics["a"].total_duration] == [1, 2, 3]
    assert [metrics["c"].load_duration, metrics["c"].save_duration] == [1, 0]


def test_the_batches_of_a_bulk_are_there_for_its_load_and_its_save(clock: VirtualTime, warehouse: Warehouse) -> None:
    seen: list[Any] = []
    warehouse.load_time = 1
    warehouse.on_load = lambda _: seen.append((list(current_batch().bulk), current_batch().remaining()))
    warehouse.on_save = lambda _: seen.append({key: batch.completed for key, batch in current_batch().bulk.items()})
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, {**appends("ab"), "c": fail, "d": lambda _: current_batch().key})
    assert seen == [(["a", "b", "c", "d"], 4), {"a": 1, "b": 1, "d": 1}]
    assert answers["d"] == "d"


def test_load_and_save_share_a_context_and_operations_have_their_callers(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")
    seen: list[str] = []

    def append_name(resource: list[Any]) -> None:
        resource.append(name.get())

    def call(key: str) -> None:
        name.set(key)
        processor.run(key, append_name)

    def on_load(_: object) -> None:
        seen.append(name.get())
        name.set("load")

    warehouse.on_load = on_load
    warehouse.on_save = lambda _: seen.append(name.get())
    with warehouse.processor() as processor:
        for key in "ab":
            gevent.spawn(call, key)
        clock.advance(1)
        gevent.spawn(call, "c")
        clock.advance(1)
    assert warehouse.kept == {"a": ["a"], "b": ["b"], "c": ["c"]}
    assert seen == ["nobody", "load", "nobody", "load"]


# -- each for itself ----------------------------------------------------------------------------------------


def test_a_key_that_is_missing_fails_alone(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.missing = {"b"}
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("abc"))
    assert (answers["a"], answers["c"]) == (1, 1)
    assert isinstance(answers["b"], ResourceMissing)
    assert answers["b"].key == "b"
    assert warehouse.saves == [["a", "c"]]


def test_a_key_that_cannot_be_loaded_fails_alone(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.unloadable = {"a": OSError("a page is torn")}
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("abc"))
    assert isinstance(answers["a"], LoadFailed)
    assert answers["a"].__cause__ is warehouse.unloadable["a"]
    assert (answers["b"], answers["c"]) == (1, 1)


def test_a_conflict_of_a_load_replays_its_key_alone(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.unloadable = {"a": Conflict("locked")}
    warehouse.on_save = lambda _: warehouse.unloadable.clear()
    with warehouse.processor() as processor:
        assert run_all(clock, processor, appends("ab")) == {"a": 1, "b": 1}
    assert warehouse.loads == [["a", "b"], ["a"]]
    assert warehouse.saves == [["b"], ["a"]]


def test_a_conflict_replays_its_keys_alone_and_the_others_have_their_answers(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    warehouse.lost = [{"a": Conflict("lost"), "c": Conflict("lost")}]
    order: list[Any] = []

    def note(key: str, _: object) -> None:
        order.append((key, len(warehouse.loads)))

    with warehouse.processor() as processor:
        for key in "abc":
            spawn(processor, key, append).link(partial(note, key))
        clock.advance(1)
    assert order == [("b", 1), ("a", 2), ("c", 2)]
    assert warehouse.loads == [["a", "b", "c"], ["a", "c"]]
    assert warehouse.kept == {"a": [1], "b": [1], "c": [1]}


def test_a_key_of_which_a_save_was_refused_fails_alone(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.lost = [{"a": NotSaved("too large"), "b": OSError("who knows")}]
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("abc"))
    assert isinstance(answers["a"], SaveFailed)
    assert isinstance(answers["b"], SaveFailed)
    assert (answers["a"].retry_safe, answers["b"].retry_safe, answers["c"]) == (True, False, 1)


def test_a_conflict_that_stays_fails_after_max_attempts_and_hurts_no_other(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    warehouse.lost = [{"a": Conflict("lost")} for _ in range(3)]
    with warehouse.processor(max_attempts=3) as processor:
        answers = run_all(clock, processor, appends("ab"))
    assert isinstance(answers["a"], SaveFailed)
    assert answers["a"].retry_safe
    assert answers["b"] == 1
    assert warehouse.loads == [["a", "b"], ["a"], ["a"]]


def test_a_save_that_names_a_strange_key_leaves_nobody_in_the_belief_that_he_was_saved(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    warehouse.lost = [{"A": Conflict("lost")}]
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("ab"))
    for error in answers.values():
        assert isinstance(error, SaveFailed)
        assert not error.retry_safe
        assert "names the key 'A'" in str(error)


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("told", [None, "lost", Conflict, GreenletExit(), gevent.Timeout()])
def test_a_save_that_does_not_tell_by_an_exception_what_became_of_a_key_tells_nobody_that_he_was_saved(
    clock: VirtualTime, warehouse: Warehouse, told: Any, *, batching: bool
) -> None:
    warehouse.lost = [{"a": told}] * 2
    with warehouse.processor(batching=batching) as processor:
        answers = run_all(clock, processor, appends("ab" if batching else "a"))
    for error in answers.values():
        assert isinstance(error, SaveFailed)
        assert not error.retry_safe
        assert "must have an exception" in str(error)


@pytest.mark.parametrize("errors", [["a"], "a", {"a"}])
def test_a_save_that_tells_no_mapping_tells_nobody_that_he_was_saved(
    clock: VirtualTime, warehouse: Warehouse, errors: Any
) -> None:
    def lose(_: object) -> None:
        raise PartlySaved(errors)

    warehouse.on_save = lose
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("ab"))
    for error in answers.values():
        assert isinstance(error, SaveFailed)
        assert "must have a mapping" in str(error)


def test_an_operation_that_is_refused_saves_nothing_of_its_key(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, {**appends("ab"), "c": fail})
    assert isinstance(answers["c"], ValueError)
    assert warehouse.saves == [["a", "b"]]


def test_a_bulk_of_which_nothing_is_to_be_saved_is_left_so(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor(clean_errors=(ValueError,)) as processor:
        answers = run_all(clock, processor, {"a": fail, "b": fail})
    assert [type(error) for error in answers.values()] == [ValueError, ValueError]
    assert (warehouse.saves, warehouse.left) == ([], [NothingToSave])


def test_a_broken_operation_replays_its_key_alone_without_it(clock: VirtualTime, warehouse: Warehouse) -> None:
    with warehouse.processor(clean_errors=()) as processor:
        spawn(processor, "a", append, 7)
        answers = run_all(clock, processor, {"a": break_it, "b": append})
    assert isinstance(answers["a"], Broken)
    assert warehouse.kept == {"a": [7], "b": [1]}
    assert warehouse.saves == [["b"], ["a"]]


def test_an_operation_that_raises_no_exception_ends_its_own_batch(clock: VirtualTime, warehouse: Warehouse) -> None:
    def odd(_: object) -> None:
        raise Odd

    with warehouse.processor() as processor:
        answers = run_all(clock, processor, {"a": append, "b": odd, "c": append})
    assert type(answers["b"]) is BatchAborted
    assert (answers["a"], answers["c"]) == (1, 1)
    assert warehouse.saves == [["a", "c"]]


# -- all of them --------------------------------------------------------------------------------------------


def test_a_load_that_raises_fails_every_key(clock: VirtualTime, warehouse: Warehouse) -> None:
    def refuse(_: object) -> None:
        raise OSError("no disk")

    warehouse.on_load = refuse
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("ab"))
    assert [type(error) for error in answers.values()] == [LoadFailed, LoadFailed]
    assert [error.key for error in answers.values()] == ["a", "b"]


def test_a_load_that_raises_that_one_is_missing_tells_nobody_else_that_his_is(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    def refuse(_: object) -> None:
        raise ResourceMissing("there is nothing at 'a'")

    warehouse.on_load = refuse
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("ab"))
    assert [type(error) for error in answers.values()] == [LoadFailed, LoadFailed]


@pytest.mark.parametrize("given", [None, [1], "ab"])
def test_a_load_that_gives_no_dict_fails_every_key_and_says_so(clock: VirtualTime, given: Any) -> None:
    left: list[Any] = []

    @contextmanager
    def wrong(_: object) -> Iterator[Any]:
        try:
            yield given
        except BaseException as error:
            left.append(type(error))
            raise

    with Processor(open_resources=wrong, min_duration=0) as processor:
        answers = run_all(clock, processor, appends("ab"))
        for error in answers.values():
            assert isinstance(error, LoadFailed)
            assert "must return a dict" in str(error)
    assert left == [NothingToSave]


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("killed", [True, False])
def test_a_scope_is_left_whatever_looking_at_its_dict_raises(
    clock: VirtualTime, *, killed: bool, batching: bool
) -> None:
    left: list[Any] = []

    class Lazy(dict[str, list[Any]]):
        def __getitem__(self, key: str) -> list[Any]:
            if killed:
                raise GreenletExit
            raise OSError("no disk")

        def pop(self, key: str, default: Any = None) -> Any:
            return self[key]

    @contextmanager
    def lazy(keys: list[str]) -> Iterator[Any]:
        try:
            yield Lazy.fromkeys(keys)
        except BaseException as error:
            left.append(type(error))
            raise

    with Processor(open_resources=lazy, min_duration=0, batching=batching) as processor:
        answers = run_all(clock, processor, appends("ab"))
    for error in answers.values():
        assert error.retry_safe if batching or not killed else isinstance(error, GreenletExit)
    assert left == [GreenletExit if killed else OSError] * (1 if batching else 2)


def test_a_conflict_of_all_replays_all_together(clock: VirtualTime, warehouse: Warehouse) -> None:
    def deadlock(_: object) -> None:
        if len(warehouse.saves) == 1:
            raise Conflict("deadlock")

    warehouse.on_save = deadlock
    with warehouse.processor() as processor:
        assert run_all(clock, processor, appends("ab")) == {"a": 1, "b": 1}
    assert warehouse.saves == [["a", "b"], ["a", "b"]]


def test_a_save_that_raises_fails_every_key(clock: VirtualTime, warehouse: Warehouse) -> None:
    def refuse(_: object) -> None:
        raise OSError("no answer")

    warehouse.on_save = refuse
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, appends("ab"))
    assert [(type(error), error.retry_safe) for error in answers.values()] == [(SaveFailed, False)] * 2


def test_the_key_for_which_a_store_refuses_all_is_found_and_the_others_are_saved(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    def refuse(resources: dict[str, list[Any]]) -> None:
        if "poison" in [mark for resource in resources.values() for mark in resource]:
            raise Rejected("a constraint") from ValueError("poison")

    warehouse.on_save = refuse
    with warehouse.processor() as processor:
        spawn(processor, "e", append, 5)
        answers = run_all(
            clock, processor, {**appends("abcd"), "e": lambda resource: append(resource, "poison"), **appends("fgh")}
        )
    assert isinstance(answers.pop("e"), ValueError)
    assert set(answers.values()) == {1}
    assert warehouse.kept.pop("e") == [5]
    assert warehouse.kept == {key: [1] for key in "abcdfgh"}
    assert len(warehouse.saves) < 12


def test_at_the_deadline_all_keys_are_answered_and_free_when_the_code_has_returned(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    def hang(_: object) -> None:
        try:
            gevent.sleep(100)
        except gevent.Timeout:
            gevent.sleep(1)  # takes its time

    with warehouse.processor(max_duration=2) as processor:
        answers = run_all(clock, processor, {"a": append, "b": hang, "c": append}, 2)
        assert [(type(error), error.phase) for error in answers.values()] == [(BatchTimeout, "operations")] * 3
        late = run_all(clock, processor, appends("ac"), 0.9)
        assert late == {}
        clock.advance(1)
        assert late == {"a": 1, "c": 1}
    assert warehouse.saves == [["a", "c"]]


@pytest.mark.parametrize(("phase", "retry_safe"), [("load", True), ("save", False)])
def test_a_load_or_a_save_that_hangs_hangs_for_all_keys_of_the_bulk(
    clock: VirtualTime, warehouse: Warehouse, phase: str, retry_safe: bool
) -> None:
    setattr(warehouse, f"{phase}_time", 100)
    with warehouse.processor(max_duration=2) as processor:
        answers = run_all(clock, processor, appends("ab"), 3)
    assert [(error.phase, error.retry_safe) for error in answers.values()] == [(phase, retry_safe)] * 2


def test_keys_that_come_while_a_bulk_hangs_are_not_delayed(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.load_time = 100
    with warehouse.processor(workers=1) as processor:
        hung = run_all(clock, processor, appends("ab"), 1)
        warehouse.load_time = 0
        assert run_all(clock, processor, appends("cd"), 0.001) == {"c": 1, "d": 1}
        assert hung == {}
        clock.advance(5)


def test_work_that_never_yields_is_not_saved_past_the_deadline(clock: VirtualTime, warehouse: Warehouse) -> None:
    def grind(resource: list[Any]) -> None:
        append(resource)
        clock.spend(1.5)

    with warehouse.processor(max_duration=2) as processor:
        answers = run_all(clock, processor, {"a": grind, "b": grind, "c": append})
    assert [(type(error), error.phase) for error in answers.values()] == [(BatchTimeout, "operations")] * 3
    assert warehouse.saves == []


def test_pauses_do_not_count_for_any_key(clock: VirtualTime, warehouse: Warehouse) -> None:
    def grind(resource: list[Any]) -> None:
        append(resource)
        clock.spend(0.004)

    def disturb() -> None:
        for _ in range(100):
            gevent.sleep(0.001)
            clock.spend(0.1)  # while the worker pauses

    with warehouse.processor(max_duration=1) as processor:
        gevent.spawn(disturb)
        answers = run_all(clock, processor, {str(number): grind for number in range(50)}, 60)
    assert set(answers.values()) == {None}
    assert len(warehouse.kept) == 50


def test_a_key_that_waits_for_its_turn_at_the_deadline_does_not_fail_those_behind(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    def refuse_then_hang(resources: dict[str, list[Any]]) -> None:
        if len(resources) == 4:
            raise Rejected("one of them")
        gevent.sleep(100 if len(warehouse.saves) == 2 else 0)

    warehouse.save_time = 0.1
    warehouse.on_save = refuse_then_hang
    with warehouse.processor(max_duration=2) as processor:
        first = run_all(clock, processor, appends("abcd"), 0.05)
        behind = run_all(clock, processor, appends("cd"), 10)
    assert [(error.phase, error.retry_safe) for error in first.values()] == [
        ("save", False),
        ("save", False),
        ("operations", True),
        ("operations", True),
    ]
    assert behind == {"c": 1, "d": 1}


def test_a_key_that_waits_for_its_next_part_at_the_deadline_does_not_fail_those_behind(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    def hang(_: object) -> None:
        gevent.sleep(100 if len(warehouse.saves) == 2 else 0)

    warehouse.save_time = 0.1
    warehouse.on_save = hang
    warehouse.lost = [{"a": Rejected("one of them"), "b": Conflict("lost")}]
    with warehouse.processor(max_duration=2) as processor:
        reader = gevent.spawn(lambda: processor.run("a", len, read_only=True))
        first = run_all(clock, processor, appends("ab"), 0.05)
        behind = run_all(clock, processor, appends("a"), 10)
    assert reader.value == 0
    assert {key: (error.phase, error.retry_safe) for key, error in first.items()} == {
        "a": ("operations", True),
        "b": ("save", False),
    }
    assert behind == {"a": 1}


def test_the_deadline_of_a_replay_is_kept_though_it_was_looked_at_while_the_others_were_let_go(
    clock: VirtualTime, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_anew(timer: _VirtualTimer, *args: Any, **options: Any) -> None:  # as libuv does
        if not timer.active:
            timer.after = seconds.setdefault(timer, timer.after)
        start(timer, *args, **options)

    def save(_: object) -> None:
        if len(warehouse.saves) == 2:
            gevent.sleep(2.9985 - clock.now())
            pace.slice_end(library_clock.monotonic())
            gevent.spawn(clock.spend, 0.1)  # when the others are let go, with a pause
            clock.spend(0.004)
            warehouse.load_time = 100

    seconds: dict[_VirtualTimer, float] = {}
    start = _VirtualTimer.start
    monkeypatch.setattr(_VirtualTimer, "start", start_anew)
    warehouse.on_save = save
    warehouse.lost = [{}, {"c": Conflict("lost")}]
    with warehouse.processor(max_duration=3) as processor:
        run_all(clock, processor, appends("x"), 1)  # with a timer that rings at 3
        answers = run_all(clock, processor, appends("abc"), 3.2)
        assert isinstance(answers["c"], BatchTimeout)
    assert answers["c"].phase == "load"
    assert (answers["a"], answers["b"]) == (1, 1)


def test_after_pauses_each_key_has_the_time_for_a_replay_that_all_have(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    def grind(resource: list[Any]) -> None:
        append(resource)
        clock.spend(0.004)

    def disturb() -> None:
        for _ in range(50):
            gevent.sleep(0.001)
            clock.spend(0.1)  # while the worker pauses

    left: list[set[float]] = []
    warehouse.lost = [{str(number): Conflict("lost") for number in range(50)}]
    warehouse.on_save = lambda _: left.append({batch.remaining() for batch in current_batch().bulk.values()})
    with warehouse.processor(max_duration=1) as processor:
        gevent.spawn(disturb)
        answers = run_all(clock, processor, {str(number): grind for number in range(50)}, 60)
    assert set(answers.values()) == {None}
    assert [len(one) for one in left] == [1, 1]


@pytest.mark.parametrize("replayed", [True, False])
def test_at_the_deadline_the_metrics_of_all_keys_count_the_same_load_or_save(
    clock: VirtualTime, warehouse: Warehouse, *, replayed: bool
) -> None:
    def wait(_: object) -> None:
        gevent.sleep(0.5)

    warehouse.load_time = 1
    if replayed:
        warehouse.lost = [{key: Conflict("lost") for key in "abc"}]
        warehouse.on_save = lambda _: setattr(warehouse, "load_time", 100)
    else:
        warehouse.save_time = 100
    processor = warehouse.processor(max_duration=5)
    watcher = processor.subscribe_batch_metrics()
    run_all(clock, processor, dict.fromkeys("abc", wait))
    processor.stop()
    durations = [(metric.load_duration, metric.save_duration) for metric in watcher]
    assert durations == [durations[0]] * 3
    assert durations[0] == pytest.approx((3.5, 0) if replayed else (1, 2.5), abs=0.1)


@pytest.mark.parametrize(("phase", "retry_safe"), [("load", True), ("operations", True), ("save", False)])
def test_a_killed_worker_answers_all_keys_of_its_bulk_and_is_replaced(
    clock: VirtualTime, warehouse: Warehouse, phase: str, retry_safe: bool
) -> None:
    def kill_it(_: object) -> None:
        if len(warehouse.loads) == 1:
            worker: Any = gevent.getcurrent()
            worker.kill(block=False)
            gevent.sleep(1)

    operations: dict[str, Callable[..., Any]] = appends("abc")
    if phase == "operations":
        operations["b"] = kill_it
    else:
        setattr(warehouse, f"on_{phase}", kill_it)
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, operations)
        for error in answers.values():
            assert type(error) is BatchAborted
            assert isinstance(error.__cause__, GreenletExit)
            assert error.retry_safe is retry_safe
        assert run_all(clock, processor, appends("abc")) == {"a": 1, "b": 1, "c": 1}


def test_a_stop_waits_for_every_key_and_saves_it(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.save_time = 1
    warehouse.lost = [{"b": Conflict("lost")}]
    processor = warehouse.processor(max_bulk=2)
    callers = [spawn(processor, key, append) for key in "abc"]
    clock.settle()
    assert gevent.spawn(processor.stop).get() is True
    assert [caller.value for caller in callers] == [1, 1, 1]
    assert warehouse.kept == {"a": [1], "b": [1], "c": [1]}


def test_a_thousand_operations_on_as_many_keys_never_hold_the_hub_for_long(
    clock: VirtualTime, warehouse: Warehouse
) -> None:
    longest = 0.0
    done = False

    def watch() -> None:
        nonlocal longest
        last = clock.now()
        while not done:
            gevent.sleep(0.001)
            longest, last = max(longest, clock.now() - last), clock.now()

    def work(resource: list[Any]) -> None:
        append(resource)
        clock.spend(0.001)

    gevent.spawn(watch)
    with warehouse.processor(max_bulk=1000) as processor:
        answers = run_all(clock, processor, {str(number): work for number in range(1000)}, 5)
        done = True
        clock.advance(1)
    assert len(answers) == 1000
    assert longest < 0.01


@pytest.mark.parametrize("how", ["missing", "unloadable", "raised", "refused", "strange", "odd"])
def test_an_error_leads_to_no_frame_that_holds_what_is_of_other_keys(
    clock: VirtualTime, warehouse: Warehouse, how: str
) -> None:
    def odd(_: object) -> None:
        raise Odd

    def refuse(_: object) -> None:
        raise OSError("no answer")

    if how == "missing":
        warehouse.missing = {"a"}
    elif how == "unloadable":
        warehouse.unloadable = {"a": OSError("torn")}
    elif how == "strange":
        warehouse.lost = [{"A": Conflict("lost")}]
    elif how == "raised":
        warehouse.on_load = refuse
    elif how == "refused":
        warehouse.on_save = refuse
    with warehouse.processor() as processor:
        answers = run_all(clock, processor, {"a": odd if how == "odd" else append, "b": append})
    frames = [frame for frame, _ in traceback.walk_tb(answers["a"].__cause__.__traceback__)]
    assert [frame.f_code.co_name for frame in frames if isinstance(frame.f_locals.get("self"), Round)] == []


@pytest.mark.parametrize("form", ["scope", "pair"])
@pytest.mark.parametrize("batching", [True, False])
def test_a_load_that_gives_more_than_it_was_asked_for_is_refused_since_that_would_be_saved_too(
    clock: VirtualTime, form: str, *, batching: bool
) -> None:
    saved: list[object] = []
    rows: dict[str, list[Any]] = {"a": [], "b": []}
    options: dict[str, Any] = {"load_resources": lambda _: rows, "save_resources": saved.append}
    if form == "scope":
        options = {"open_resources": lambda _: nullcontext(rows)}
    with Processor(min_duration=0, batching=batching, **options) as processor:
        error = run_all(clock, processor, appends("a"))["a"]
    assert isinstance(error, LoadFailed)
    assert "returned the key 'b', for which it was not asked" in str(error)
    assert saved == []
    assert rows == {"a": [], "b": []}


# -- alone --------------------------------------------------------------------------------------------------


def test_without_batching_nothing_is_left_for_the_garbage_collector(warehouse: Warehouse) -> None:
    class Mark:
        pass

    mark = Mark()
    gone = weakref.ref(mark)
    gc.disable()
    try:
        with Processor(load_resources=dict.fromkeys, save_resources=len, min_duration=0, batching=False) as processor:
            processor.run("a", lambda _, mark: None, mark)
        del mark
        assert gone() is None
    finally:
        gc.enable()


def test_without_batching_what_leaving_raises_is_ignored_too(clock: VirtualTime) -> None:
    @contextmanager
    def failing(_: object) -> Iterator[dict[str, Any]]:
        try:
            yield {}
        except BaseException:
            raise RuntimeError("the connection is gone") from None

    with Processor(open_resources=failing, min_duration=0) as processor:
        for processor.batching in (True, False):
            assert isinstance(run_all(clock, processor, appends("a"))["a"], ResourceMissing)


def test_without_batching_each_run_is_a_bulk_of_its_own(clock: VirtualTime, warehouse: Warehouse) -> None:
    warehouse.missing = {"b"}
    warehouse.unloadable = {"c": OSError("torn")}
    warehouse.lost = [{}, {"d": Conflict("lost")}, {}, {"e": NotSaved("too large")}]
    seen: list[Any] = []
    warehouse.on_save = lambda _: seen.append(list(current_batch().bulk))
    with warehouse.processor(batching=False) as processor:
        answers = [run_all(clock, processor, {key: append})[key] for key in "abcde"]
    assert [type(answer) for answer in answers] == [int, ResourceMissing, LoadFailed, int, SaveFailed]
    assert warehouse.loads == [["a"], ["b"], ["c"], ["d"], ["d"], ["e"]]
    assert warehouse.left == [ResourceMissing, OSError]
    assert seen == [["a"], ["d"], ["d"], ["e"]]
    assert warehouse.kept == {"a": [1], "d": [1]}


# -- whatever happens ---------------------------------------------------------------------------------------


class Misfortune:
    """What befalls the loads and saves of a `Warehouse`, as a seed will have it."""

    def __init__(self, seed: int, warehouse: Warehouse) -> None:
        self.chance = random.Random(seed)
        self.warehouse = warehouse
        warehouse.on_load, warehouse.on_save = self.load, self.save

    def load(self, keys: list[str]) -> None:
        gevent.sleep(self.chance.choice([0, 0.001, 0.1]))
        self.warehouse.unloadable = self.some(keys, [Conflict, OSError], 0.1)
        if self.chance.random() < 0.1:
            raise Conflict("all")

    def save(self, resources: dict[str, Any]) -> None:
        gevent.sleep(self.chance.choice([0, 0.001, 0.1]))
        kind = self.chance.choice([Conflict, Conflict, Rejected, NotSaved, *[None] * 16])
        if kind is not None:
            raise kind("all")
        self.warehouse.lost = [self.some(resources, [Conflict, Conflict, NotSaved, Rejected], 0.2)]

    def some(self, keys: Iterable[str], kinds: list[type[Exception]], share: float) -> dict[str, Exception]:
        return {key: self.chance.choice(kinds)("one") for key in keys if self.chance.random() < share}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_answered_as_saved_is_saved_once_and_nothing_else(
    clock: VirtualTime, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    warehouse = Warehouse()
    chance = Misfortune(seed, warehouse).chance
    monkeypatch.setattr("geventbatch._core.replay.random", chance.random)  # of its backoff
    answered: dict[str, list[int]] = {key: [] for key in "abcdefgh"}
    unsaved: set[int] = set()

    def call(mark: int) -> None:
        key = chance.choice("abcdefgh")
        operation = chance.choice([append, append, append, lambda resource, _: break_it(resource)])
        gevent.sleep(chance.random() * 2)
        try:
            processor.run(key, operation, mark)
        except (BatchError, Broken, Rejected) as error:
            if getattr(error, "retry_safe", True):
                unsaved.add(mark)
        else:
            answered[key].append(mark)

    options = {"max_bulk": chance.choice([2, 4, 100]), "max_batches": chance.choice([1, 2])}
    with warehouse.processor(clean_errors=(ValueError,), max_duration=2, **options) as processor:
        callers = [gevent.spawn(call, mark) for mark in range(200)]
        for _ in range(3):
            clock.advance(0.5)
            chance.choice(callers).kill(block=False)
        clock.advance(60)
        assert all(caller.ready() for caller in callers)
    assert sum(map(len, answered.values())) > 30
    assert any(len(keys) > 1 for keys in warehouse.loads)
    for key, marks in answered.items():
        kept = warehouse.kept.get(key, [])
        assert len(set(kept)) == len(kept)
        assert [mark for mark in kept if mark in marks] == marks
        assert unsaved.isdisjoint(kept)
        assert "half" not in kept

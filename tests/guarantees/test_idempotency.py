"""Idempotency keys, over a store in memory and on virtual time. What every store has to do is in test_stores.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import (
    BatchError,
    BatchTimeout,
    Conflict,
    IdempotencyKeyReused,
    LoadFailed,
    Processor,
    SaveFailed,
    current_batch,
)
from geventbatch._idempotency.value_text import decode, describe, encode
from geventbatch.errors import Repeated
from tests.support.callers import answer_of
from tests.support.plain import OPERATIONS, VALUES, Odd, Taken, Train, anything, closing_over, with_default
from tests.support.recording_store import Scope, Store, add, only_once, raising

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime

ROOT = Path(__file__).parents[2]


class Keeping:
    """A store in memory that records outcomes."""

    keeps_outcomes = True

    def __init__(self, store: Store) -> None:
        self.store = store
        self.recorded: dict[str, str] = {}

    def __call__(self, key: Any) -> KeepingScope:
        return KeepingScope(self, key)


class KeepingScope(Scope):
    def __init__(self, keeping: Keeping, key: Any) -> None:
        super().__init__(keeping.store, key)
        self.keeping = keeping

    def recorded(self, keys: list[str]) -> dict[str, str]:
        self.store.note("ask", tuple(keys))
        return {key: self.keeping.recorded[key] for key in keys if key in self.keeping.recorded}

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is not None:
            return super().__exit__(kind, error, traceback)
        outcomes = current_batch().outcomes
        found = {key: told for key, told in self.keeping.recorded.items() if key in outcomes}
        if found:
            self.store.note("repeated", self.key)
            raise Repeated("there already", outcomes=found)
        super().__exit__(kind, error, traceback)
        self.keeping.recorded |= outcomes
        return False


@pytest.fixture
def store(clock: VirtualTime) -> Store:
    return Store(clock, "scope", load_time=0.01, save_time=0.02)


@pytest.fixture
def keeping(store: Store) -> Keeping:
    return Keeping(store)


def opened(keeping: Keeping, **options: Any) -> Processor[Any]:
    return Processor(open_resource=keeping, **{"min_duration": 0, "max_duration": 5, **options})


def call(processor: Processor[Any], key: str | None, *run: Any) -> gevent.Greenlet[..., Any]:
    return gevent.spawn(answer_of, partial(processor.run, idempotency_key=key), "k", *run)


def answers(callers: list[gevent.Greenlet[..., Any]]) -> list[Any]:
    return [caller.get() for caller in callers]


# -- at the door ------------------------------------------------------------------------------------------------


def test_a_processor_whose_store_records_nothing_refuses_idempotency_keys_and_says_what_to_set() -> None:
    for batching in (True, False):
        with Processor(min_duration=0, batching=batching) as processor:
            error = answer_of(processor.run, "k", lambda resource: 1, idempotency_key="a")
            assert isinstance(error, TypeError)
            assert "idempotency_key 'a'" in str(error)
            assert "idempotency=…" in str(error)


@pytest.mark.parametrize("key", ["", "a" * 256, "a b", "a\n", "a\0", "é", "\x7f", 1, b"a", True])
def test_what_is_no_idempotency_key_is_refused_by_name(keeping: Keeping, key: Any) -> None:
    with opened(keeping) as processor:
        error = answer_of(processor.run, "k", add, 1, idempotency_key=key)
        assert isinstance(error, ValueError if isinstance(key, str) else TypeError)
        assert f"idempotency_key is {key!r}, but must be" in str(error)
        assert processor.run("k", add, 1, idempotency_key="!~" + "a" * 253) == 1


@pytest.mark.parametrize(
    "run",
    [
        (add, object()),
        (add, [{1, 2}]),
        (add, 10**5000),
        (closing_over(object()),),
        (with_default(object()),),
        (partial(anything, object()),),
    ],
    ids=["argument", "set", "huge", "closure", "default", "partial"],
)
def test_an_operation_that_cannot_be_told_from_others_is_refused_at_the_door(
    keeping: Keeping, store: Store, run: tuple[Any, ...]
) -> None:
    with opened(keeping) as processor:
        error = answer_of(processor.run, "k", *run, idempotency_key="a")
    assert isinstance(error, TypeError)
    assert "idempotency_key 'a'" in str(error)
    assert "Pass what it depends on as arguments, each None, bool" in str(error)
    assert store.log == []


@pytest.mark.parametrize(
    "run",
    [
        (lambda resource: resource.append(1),),
        (partial(lambda resource: resource.append(1)),),
        (add, lambda: 1),
        (add, [lambda: 1]),
        (closing_over(lambda: 1),),
        (with_default(lambda: 1),),
    ],
    ids=["operation", "partial", "argument", "list", "closure", "default"],
)
def test_a_lambda_is_refused_at_the_door(keeping: Keeping, store: Store, run: tuple[Any, ...]) -> None:
    # All lambdas of one function have one name: the second one would get the outcome of the first.
    with opened(keeping) as processor:
        error = answer_of(processor.run, "k", *run, idempotency_key="a")
    assert isinstance(error, TypeError)
    assert "<lambda>) has no name of its own: make it a function with a name" in str(error)
    assert store.log == []


# -- values as text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    text = encode(value)
    assert text.isascii()
    assert "\n" not in text
    back = decode(text)
    assert (type(back), back) == (type(value), value)
    assert repr(back) == repr(value)


def test_what_is_no_plain_value_is_refused() -> None:
    @dataclass
    class Local:
        number: int

    for value in (object(), {1}, [object()], Local(1), add, Train, range(3)):
        with pytest.raises(TypeError, match="is none of None, bool"):
            encode(value)


def test_each_operation_is_told_from_all_others_in_the_same_way_in_every_process() -> None:
    told = [describe(operation, args) for operation, args in OPERATIONS]
    assert len(set(told)) == len(OPERATIONS)
    for seed in ("1", "2"):
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.programs.describe"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        shown = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
        assert json.loads(shown.stdout) == told


def test_the_order_of_a_dictionary_is_no_other_argument() -> None:
    assert describe(add, ({"a": 1, "b": {1: 2, 3: 4}},)) == describe(add, ({"b": {3: 4, 1: 2}, "a": 1},))


# -- replays ----------------------------------------------------------------------------------------------------


def test_a_replay_without_what_was_there_already_waits_for_nothing_and_counts_as_no_conflict(
    keeping: Keeping, store: Store
) -> None:
    with opened(keeping, max_attempts=1) as processor:
        assert answers([call(processor, key, add, key) for key in "ab"]) == ["a", "b"]
        before = store.clock.now()
        metrics = processor.subscribe_batch_metrics()
        callers = [call(processor, key, add, mark) for key, mark in [("a", "a"), (None, "x"), ("b", "b"), ("c", "c")]]
        assert answers(callers) == ["a", "x", "b", "c"]
        assert store.clock.now() - before == pytest.approx(0.01 + 0.01 + 0.02)
    assert store.kept["k"] == ["a", "b", "x", "c"]
    (metric,) = metrics
    assert (metric.attempts, metric.operation_count, metric.error) == (2, 4, None)


def test_where_nothing_else_is_left_there_is_no_other_load(keeping: Keeping, store: Store) -> None:
    with opened(keeping) as processor:
        assert answers([call(processor, "a", add, 1)]) == [1]
        assert answers([call(processor, "a", add, 1)]) == [1]
    assert len(store.times("load")) == 2
    assert len(store.times("repeated")) == 1
    assert store.kept["k"] == [1]


def test_outcomes_are_those_of_the_attempt_that_was_saved(keeping: Keeping, store: Store) -> None:
    def length(resource: list[Any]) -> int:
        resource.append(0)
        return len(resource)

    def change(key: Any) -> None:
        store.kept[key] += [1, 2]
        raise Conflict

    store.on_save = only_once(change)
    with opened(keeping) as processor:
        assert answers([call(processor, "a", length)]) == [3]
        assert answers([call(processor, "a", length)]) == [3]


def test_a_failed_save_records_nothing_and_the_next_one_applies(keeping: Keeping, store: Store) -> None:
    store.on_save = only_once(raising(OSError()))
    with opened(keeping) as processor:
        (error,) = answers([call(processor, "a", add, 1)])
        assert isinstance(error, SaveFailed)
        assert keeping.recorded == {}
        assert answers([call(processor, "a", add, 1)]) == [1]


def test_the_deadline_in_the_replay_takes_no_outcome_away_that_was_given(keeping: Keeping, store: Store) -> None:
    with opened(keeping, max_duration=0.1) as processor:
        assert answers([call(processor, "a", add, 1)]) == [1]
        loads: list[Any] = []

        def hang(key: Any) -> None:
            loads.append(key)
            if len(loads) == 2:
                gevent.sleep(1)

        store.on_load = hang
        repeated, other = answers([call(processor, "a", add, 1), call(processor, "b", add, 2)])
        assert repeated == 1
        assert isinstance(other, BatchTimeout)
        assert other.retry_safe


def test_a_caller_that_has_left_takes_no_outcome_from_another_one_with_its_key(keeping: Keeping, store: Store) -> None:
    with opened(keeping) as processor:
        first, second = (call(processor, "a", add, 1) for _ in range(2))
        store.clock.advance(0.005)
        first.kill(block=False)
        store.clock.advance(0.01)
        second.kill(block=False)
        store.clock.advance(1)
        assert (store.kept["k"], len(keeping.recorded)) == ([1], 1)
        assert answers([call(processor, "a", add, 1)]) == [1]


def test_what_raises_and_is_not_recorded_is_looked_for_before_the_save_all_at_once(
    keeping: Keeping, store: Store
) -> None:
    def once(resource: list[Any], mark: str) -> str:
        resource.append(mark)
        if resource.count(mark) > 1:
            raise LookupError(mark)
        return mark

    with opened(keeping, recorded_errors=()) as processor:
        for key in "ab":
            assert answers([call(processor, key, once, key)]) == [key]
        loads = len(store.times("load"))
        callers = [call(processor, key, once, mark) for key, mark in ("aa", "bb", "ca", "dd")]
        first, second, broken, last = answers(callers)
        assert (first, second, last) == ("a", "b", "d")
        assert isinstance(broken, LookupError)
        assert len(store.times("load")) - loads == 2  # the second one when the first has raised: then it is copied
        assert [keys for _, what, keys in store.log if what == "ask"] == [("a",), ("b", "c")]
        (alone,) = answers([call(processor, "a", once, "a")])
        assert alone == "a"
    assert store.kept["k"] == ["a", "b", "d"]
    assert set(keeping.recorded) == {"a", "b", "d"}


def test_a_store_that_cannot_be_asked_fails_the_load(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeepingScope, "recorded", raising(OSError("gone")))
    with opened(keeping, clean_errors=()) as processor:
        (error,) = answers([call(processor, "a", refuse_seat)])
    assert isinstance(error, LoadFailed)
    assert error.retry_safe


def test_what_an_operation_returns_that_cannot_be_recorded_fails_it_alone(keeping: Keeping, store: Store) -> None:
    def add_and_return_an_object(resource: list[Any]) -> object:
        resource.append("half-way")
        return object()

    with opened(keeping) as processor:
        refused, other = answers([call(processor, "a", add_and_return_an_object), call(processor, "b", add, 1)])
    assert isinstance(refused, TypeError)
    assert "'a'" in str(refused)
    assert "nothing of it was saved: return None, bool, int" in str(refused)
    assert (other, store.kept["k"], set(keeping.recorded)) == (1, [1], {"b"})


def test_what_was_answered_in_the_batch_is_not_applied_again_when_others_are_undone(
    keeping: Keeping, store: Store
) -> None:
    def add_and_refuse(resource: list[Any], mark: str) -> None:
        resource.append(mark)
        raise Taken(7)

    with opened(keeping) as processor:
        found = answers(
            [
                call(processor, "a", add, "a"),
                call(processor, "x", add_and_refuse, "x"),
                call(processor, "a", add, "a"),  # the outcome of the first one
                call(processor, None, add_and_refuse, "y"),
                call(processor, "b", add, "b"),
                call(processor, "x", add_and_refuse, "x"),
                call(processor, None, add_and_refuse, "z"),
                call(processor, "b", add, "b"),
            ]
        )
    assert [one if isinstance(one, str) else type(one) for one in found] == [
        "a",
        Taken,
        "a",
        Taken,
        "b",
        Taken,
        Taken,
        "b",
    ]
    assert store.kept["k"] == ["a", "b"]
    assert set(keeping.recorded) == {"a", "b", "x"}
    assert len(store.times("load")) == 2


@pytest.mark.parametrize("options", [{}, {"copy_resource": None}], ids=str)
def test_what_raises_is_recorded_whether_or_not_it_can_be_undone(
    keeping: Keeping, store: Store, options: dict[str, Any]
) -> None:
    def add_and_refuse(resource: list[Any], mark: str) -> None:
        resource.append(mark)
        raise Taken(len(resource))

    with opened(keeping, **options) as processor:
        runs: list[Any] = [("a", add, "a"), ("x", add_and_refuse, "x"), ("y", add_and_refuse, "y"), ("b", add, "b")]
        first = answers([call(processor, *run) for run in runs])
        assert set(keeping.recorded) == {"a", "b", "x", "y"}
        again = answers([call(processor, *run) for run in runs])
    assert (
        [str(one) for one in first] == [str(one) for one in again] == ["a", "seat 2 is taken", "seat 2 is taken", "b"]
    )
    assert store.kept["k"] == ["a", "b"]


# -- errors -----------------------------------------------------------------------------------------------------


def test_a_clean_error_comes_back_with_all_its_attributes_and_each_caller_has_its_own(keeping: Keeping) -> None:
    def refuse(resource: Any, seat: int) -> None:
        error = Taken(seat)
        error.add_note("a note")
        raise error

    with opened(keeping) as processor:
        errors = answers([call(processor, "a", refuse, 5) for _ in range(3)])
        errors += answers([call(processor, "a", refuse, 5)])
    assert [(type(error), str(error), error.seat) for error in errors] == [(Taken, "seat 5 is taken", 5)] * 4
    assert len({id(error) for error in errors}) == 4
    assert all(error.__cause__ is None for error in errors)


def test_an_error_whose_arguments_cannot_be_recorded_is_refused_to_its_own_caller_and_not_recorded(
    keeping: Keeping, store: Store
) -> None:
    with opened(keeping) as processor:
        refused, other = answers([call(processor, "a", fail_oddly), call(processor, "b", add, 1)])
    assert isinstance(refused, TypeError)
    assert isinstance(refused.__cause__, Odd)
    assert "'a'" in str(refused)
    assert "nothing of it was saved" in str(refused)
    assert other == 1
    assert list(keeping.recorded) == ["b"]
    assert store.kept["k"] == [1]


def test_an_error_that_was_recorded_by_how_it_looks_as_once_is_named_and_not_applied_again(keeping: Keeping) -> None:
    with opened(keeping) as processor:
        assert isinstance(answers([call(processor, "a", refuse_seat)])[0], Taken)
        keeping.recorded["a"] = keeping.recorded["a"][:25] + '["tests.support.plain:Odd","Odd(<object>)"]'
        (error,) = answers([call(processor, "a", refuse_seat)])
    assert isinstance(error, BatchError)
    assert "tests.support.plain:Odd" in str(error)
    assert "'a'" in str(error)


def test_an_error_that_is_not_among_recorded_errors_any_more_is_named_and_not_made(keeping: Keeping) -> None:
    with opened(keeping) as processor:
        (first,) = answers([call(processor, "b", refuse_seat)])
    assert isinstance(first, Taken)
    with opened(keeping, recorded_errors=(Odd,)) as processor:
        (second,) = answers([call(processor, "b", refuse_seat)])
    assert isinstance(second, BatchError)
    assert "not among recorded_errors" in str(second)


def test_a_reused_key_in_a_batch_costs_no_load_whatever_the_clean_errors_are(keeping: Keeping, store: Store) -> None:
    with opened(keeping, clean_errors=()) as processor:
        first, refused = answers([call(processor, "a", add, 1), call(processor, "a", add, 2)])
    assert first == 1
    assert isinstance(refused, IdempotencyKeyReused)
    assert len(store.times("load")) == 1
    assert store.kept["k"] == [1]


def fail_oddly(resource: Any) -> None:
    raise Odd(object())


def refuse_seat(resource: Any) -> None:
    raise Taken(5)

"""Idempotency keys, over a store in memory and on virtual time. What every store has to do is in test_stores.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from geventbatch import (
    BatchError,
    IdempotencyKeyReused,
    Processor,
    current_batch,
)
from tests.support.callers import answer_of
from tests.support.keeping_store import Keeping, KeepingScope, answers, call, opened
from tests.support.plain import Odd, Taken, anything, closing_over, refuse_seat, with_default
from tests.support.recording_store import Store, add

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime

ROOT = Path(__file__).parents[2]


@dataclass
class Half:
    number: int
    never_set: int = field(init=False)


class Unshowable(Exception):
    def __repr__(self) -> str:
        raise RuntimeError("it cannot be shown")


@pytest.fixture
def store(clock: VirtualTime) -> Store:
    return Store(clock, "scope", load_time=0.01, save_time=0.02)


@pytest.fixture
def keeping(store: Store) -> Keeping:
    return Keeping(store)


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


@dataclass
class Deposit:
    amount: int

    def __call__(self, resource: list[Any]) -> int:
        resource.append(self.amount)
        return self.amount


class Bound(partial[Any]):
    pass


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (methodcaller("append", 1), methodcaller("append", 2)),
        (Deposit(1), Deposit(2)),
        (Bound(add, mark=1), Bound(add, mark=2)),
    ],
    ids=["methodcaller", "dataclass", "subclass of partial"],
)
def test_callable_objects_that_differ_are_told_apart_or_refused(keeping: Keeping, first: Any, second: Any) -> None:
    # Once: they had the name of their class; the second one was not applied, and got the outcome of the first.
    with opened(keeping) as processor:
        before, after = (answers([call(processor, "a", operation)])[0] for operation in (first, second))
    if not isinstance(before, TypeError):
        assert isinstance(after, IdempotencyKeyReused)


class Proxy:
    """It has an answer of its own to any question for an attribute, as a LocalProxy outside of its context has."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} outside of a context")

    def __call__(self, resource: list[Any]) -> str:
        resource.append("odd")
        return "odd"


class ProxyThatFails(Proxy):
    def __call__(self, resource: list[Any]) -> str:
        raise LookupError("odd")


@pytest.mark.parametrize("kind", [Proxy, ProxyThatFails])
def test_an_operation_that_has_no_key_is_not_asked_for_attributes(keeping: Keeping, kind: type[Proxy]) -> None:
    # Once: what asking raised ended the batch, for all.
    with opened(keeping) as processor:
        assert answers([call(processor, "a", add, 1)]) == [1]
        callers = [call(processor, "a", add, 1), call(processor, None, kind()), call(processor, None, add, 2)]
        first, odd, last = answers(callers)
    assert (first, last) == (1, 2)
    assert odd == "odd" or isinstance(odd, LookupError)


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [object, partial(Half, 1)], ids=["object", "encoding raises an AttributeError"])
def test_what_an_operation_returns_that_cannot_be_recorded_fails_it_alone(
    keeping: Keeping, store: Store, make: Callable[[], object]
) -> None:
    def add_and_return_it(resource: list[Any]) -> object:
        resource.append("half-way")
        return make()

    with opened(keeping) as processor:
        for other in (1, 2):  # sent again, it is applied again, and fails again
            refused, answer = answers(
                [call(processor, "a", add_and_return_it), call(processor, f"{other}", add, other)]
            )
            assert isinstance(refused, TypeError)
            assert "'a'" in str(refused)
            assert "nothing of it was saved: return None, bool, int" in str(refused)
            assert answer == other
    assert (store.kept["k"], set(keeping.recorded)) == ([1, 2], {"1", "2"})


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


@pytest.mark.parametrize("kind", [Odd, Unshowable])
def test_an_error_whose_arguments_cannot_be_recorded_is_refused_to_its_own_caller_and_not_recorded(
    keeping: Keeping, store: Store, kind: type[Exception]
) -> None:
    with opened(keeping) as processor:
        for number in (1, 2):
            callers = [call(processor, "a", fail_oddly, kind.__name__), call(processor, f"{number}", add, number)]
            refused, other = answers(callers)
            assert isinstance(refused, TypeError)
            assert type(refused.__cause__) is kind
            assert "'a'" in str(refused)
            assert "nothing of it was saved" in str(refused)
            assert other == number
    assert list(keeping.recorded) == ["1", "2"]
    assert store.kept["k"] == [1, 2]


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


def fail_oddly(resource: Any, kind: str) -> None:
    raise {"Odd": Odd, "Unshowable": Unshowable}[kind](object())


def give_object(resource: list[Any]) -> object:
    return object()


def fail(resource: list[Any]) -> None:
    raise LookupError


def unshowable(resource: list[Any]) -> None:
    raise Unshowable(object())


@pytest.mark.parametrize("start_timeout", [None, 3])
@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("operation", [give_object, fail, unshowable])
def test_no_error_leads_to_the_batch(
    keeping: Keeping, operation: Any, batching: bool, start_timeout: float | None
) -> None:
    # Once: a frame of `Once` was in its traceback, or in that of its cause: a cycle, and the operations and the
    # outcomes of other callers for a log that shows the variables of frames.
    for clean in ((), (Exception,)):
        with opened(keeping, batching=batching, clean_errors=clean) as processor:
            for _ in range(2):
                error = answer_of(processor.run, "k", operation, idempotency_key="a", start_timeout=start_timeout)
                assert isinstance(error, Exception)
                assert not [frame for frame in frames_of(error) if frame == "geventbatch._idempotency.once"]


def frames_of(error: BaseException | None) -> list[str]:
    """The modules of all frames that are held by an error and by its causes."""
    found = []
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            found.append(trace.tb_frame.f_globals["__name__"])
            trace = trace.tb_next
        error = error.__cause__
    return found


def test_outcomes_that_a_scope_has_taken_at_its_load_are_those_of_its_save(keeping: Keeping) -> None:
    class Early(KeepingScope):
        def __enter__(self) -> Any:
            self.taken = current_batch().outcomes
            return super().__enter__()

        def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
            assert self.taken is current_batch().outcomes
            return super().__exit__(kind, error, traceback)

    class Taking(Keeping):
        def __call__(self, key: Any) -> Early:
            return Early(self, key)

    taking = Taking(keeping.store)
    with opened(taking) as processor:
        assert [processor.run("k", add, 1, idempotency_key="a") for _ in range(2)] == [1, 1]
    assert list(taking.recorded) == ["a"]

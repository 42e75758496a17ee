"""Guarantees 15 and 19 for operations across keys: what is refused at the door, and the off-switch."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent._hub_local import get_hub_if_exists

from geventbatch import (
    Conflict,
    Processor,
    ResourceMissing,
)
from tests.support.callers import answer_of, in_a_thread
from tests.support.ledger import Broken, Callers, Ledger, append, append_to_all, break_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Account, Accounts


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


# -- the door ------------------------------------------------------------------------------------------------------


@contextmanager
def _one(key: str) -> Iterator[Account]:
    yield []


@contextmanager
def _many(keys: list[str]) -> Iterator[dict[str, Account]]:
    yield {key: [] for key in keys}


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"open_resource": _one}, "open_resources"),
        ({"load_resource": lambda key: []}, "open_resources"),
        ({"open_resources": _many}, "all_or_nothing"),
        ({"load_resources": lambda keys: {}, "save_resources": lambda resources: None}, "all_or_nothing"),
    ],
)
def test_a_processor_that_cannot_save_all_or_nothing_refuses_it_by_name(
    clock: VirtualTime, options: dict[str, Any], said: str, batching: bool
) -> None:
    with Processor[Any](batching=batching, **options) as processor:
        with pytest.raises(TypeError, match=said):
            processor.run_across(["a", "b"], append_to_all, 1)
        assert processor.stats().keys == 0


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize(
    ("keys", "refused"),
    [
        ([], (ValueError, "no key")),
        (["a", "a"], (ValueError, "'a' twice")),
        ([1, True], (ValueError, "twice")),
        (["a", "b", "c", "d"], (ValueError, "max_bulk")),
        (5, (TypeError, "keys is 5")),
        ("ab", (TypeError, r"must be a list of keys, as in \['ab'\]")),
        (b"ab", (TypeError, "must be a list of keys")),
        ({"a", "b"}, (TypeError, "has no order")),
        (["a", []], (TypeError, "hashable")),
        ([float("nan")], (ValueError, "not equal to itself")),
    ],
)
def test_keys_that_cannot_be_are_refused_at_the_door(
    clock: VirtualTime, ledger: Ledger, keys: Any, refused: tuple[type[Exception], str], batching: bool
) -> None:
    kind, said = refused
    with ledger.processor(max_bulk=3, batching=batching) as processor:
        with pytest.raises(kind, match=said):
            processor.run_across(keys, append_to_all, 1)
        assert processor.stats().keys == processor.stats().operations == 0
        assert ledger.loads == []


def _mark(account: Account, mark: int) -> None:
    account.append(mark)


def _mark_first(account: Account) -> None:
    account["first"] = 1  # type: ignore[call-overload]


@pytest.mark.parametrize("batching", [True, False])
def test_an_operation_on_one_resource_is_told_that_it_has_a_tuple_of_them(
    clock: VirtualTime, ledger: Ledger, batching: bool
) -> None:
    was_called = "on keys 'a', 'b' was called with a tuple of the resources"
    nothing = "; nothing of it was saved"
    with ledger.processor(batching=batching) as processor:
        told: Any = answer_of(processor.run_across, [*"ab"], _mark, 1)
        assert type(told) is AttributeError
        says = f"{was_called} and 1 argument: 'tuple' object has no attribute 'append'{nothing}"
        assert str(told) == f"the operation _mark {says}"
        told = answer_of(processor.run_across, [*"ab"], _mark_first)
        assert type(told) is TypeError
        says = f"{was_called} alone: 'tuple' object does not support item assignment{nothing}"
        assert str(told) == f"the operation _mark_first {says}"
        told = answer_of(processor.run_across, [*"ab"], append_to_all)
        says = f"{was_called} alone: append_to_all() missing 1 required positional argument: 'mark'{nothing}"
        assert str(told) == f"the operation append_to_all {says}"
        assert str(answer_of(processor.run, "a", tuple.index, 1)).startswith("the operation tuple.index on key 'a'")


@pytest.mark.parametrize("batching", [True, False])
def test_other_bad_input_is_refused_as_by_run(clock: VirtualTime, ledger: Ledger, batching: bool) -> None:
    with ledger.processor(batching=batching) as processor:
        with pytest.raises(TypeError, match="operation is 5"):
            processor.run_across([*"ab"], 5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="start_timeout"):
            processor.run_across([*"ab"], append_to_all, 1, start_timeout=-1)
        with pytest.raises(TypeError, match="read_only"):
            processor.run_across([*"ab"], append_to_all, 1, read_only=1)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"^run_across\(\) was given .* no outcomes"):
            processor.run_across([*"ab"], append_to_all, 1, idempotency_key="x")
        assert processor.stats().keys == 0


def test_it_cannot_be_called_inside_a_batch_of_the_same_processor(clock: VirtualTime, ledger: Ledger) -> None:
    def inside(accounts: Accounts) -> None:
        processor.run_across([*"cd"], append_to_all, 1)

    inside_a_batch = r"^run_across\(\) was called inside a batch"
    for batching in (True, False):
        with ledger.processor(batching=batching) as processor, pytest.raises(RuntimeError, match=inside_a_batch):
            processor.run_across([*"ab"], inside)


def test_a_thread_in_which_it_is_refused_gets_no_hub(clock: VirtualTime, ledger: Ledger) -> None:
    def refused() -> tuple[str, object]:
        told = answer_of(processor.run_across, [*"ab"], append_to_all, 1)
        return type(told).__name__, get_hub_if_exists()

    with ledger.processor() as processor:
        processor.run("a", append, 1)
        assert in_a_thread(refused) == ("RuntimeError", None)


def test_a_refusal_of_the_place_says_what_was_called(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        processor.run("a", append, 1)
        told = gevent.get_hub().threadpool.apply(answer_of, (processor.run_across, [*"ab"], append_to_all, 1))
        assert str(told).startswith("run_across() was called from another thread than the first run() of this process")
        in_hub: list[Any] = []
        gevent.get_hub().loop.run_callback(
            lambda: in_hub.append(answer_of(processor.run_across, [*"ab"], append_to_all, 1))
        )
        gevent.sleep(0)
        assert str(in_hub[0]).startswith("run_across() was called in gevent's hub")


def test_what_worker_number_for_key_raises_reaches_the_caller_and_nothing_is_left_over(
    clock: VirtualTime, ledger: Ledger
) -> None:
    def number(key: str, workers: int) -> int:
        if key == "b":
            raise KeyError(key)
        return 0

    with ledger.processor(worker_number_for_key=number) as processor:
        with pytest.raises(KeyError):
            processor.run_across([*"ab"], append_to_all, 1)
        assert processor.stats().keys == 0
        assert processor.run_across([*"ac"], append_to_all, 1) == 1


def test_keys_that_are_found_while_others_end_are_found_anew(clock: VirtualTime, ledger: Ledger) -> None:
    def number(key: str, workers: int) -> int:
        gevent.sleep(0.5)
        return 0

    with ledger.processor(worker_number_for_key=number) as processor:
        callers = Callers(processor)
        callers.run("a", 0)
        clock.advance(0.2)
        callers.run("ab", 1)
        callers.run("b", 2)
        clock.advance(0.6)
        callers.run("a", 3)  # its batch ends while the queue of the other key is looked up
        clock.advance(10)
        assert processor.stats().keys == processor.stats().batches == 0
    assert callers.answers == {0: 0, 1: 1, 2: 2, 3: 3}
    assert ledger.kept == {"a": [0, 3, 1], "b": [2, 1]}


# -- one at a time -------------------------------------------------------------------------------------------------


def test_with_the_off_switch_one_scope_of_all_its_keys_does_it(clock: VirtualTime, ledger: Ledger) -> None:
    errors: list[Exception] = [Conflict()]

    def lose(_: object) -> None:
        if errors:
            raise errors.pop()

    ledger.on_save = lose
    with ledger.processor(batching=False) as processor:
        assert processor.run_across([*"ab"], append_to_all, 1) == 1
        with pytest.raises(Broken):
            processor.run_across([*"ab"], break_all, 1)
        ledger.missing = {"c"}
        with pytest.raises(ResourceMissing) as caught:
            processor.run_across([*"ac"], append_to_all, 1)
        assert caught.value.key == "c"
        assert caught.value.keys == ("a", "c")
    assert ledger.loads == [["a", "b"]] * 3 + [["a", "c"]]
    assert ledger.kept == {"a": [1], "b": [1]}


def test_the_off_switch_is_live(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.save_time = 1
    with ledger.processor() as processor:
        callers = Callers(processor)
        callers.run("ab", 0)
        clock.advance(0.1)
        processor.batching = False
        clock.advance(2)
        callers.run("ab", 1)
        clock.advance(2)
        processor.batching = True
        callers.run("ab", 2)
        clock.advance(2)
    assert ledger.kept == {"a": [0, 1, 2], "b": [0, 1, 2]}

"""``run(…, read_only=True)``: a batch of which every completed operation only reads is not saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Conflict, NothingToSave, Processor, current_batch
from tests.support.callers import answer_of
from tests.support.recording_store import FORMS, Store, add

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param)


def last(resource: list[Any]) -> Any:
    return resource[-1]


def refuse(_: object) -> None:
    raise ValueError("refused")


def run_all(store: Store, processor: Processor[Any], *calls: tuple[Callable[..., Any], Any, bool]) -> list[Any]:
    """Run operations with an argument each, or none for None, all at once; say for each whether it only reads."""

    def call(operation: Callable[..., Any], argument: Any, read_only: bool) -> Any:
        arguments = () if argument is None else (argument,)
        return answer_of(processor.run, "k", operation, *arguments, read_only=read_only)

    callers = [gevent.spawn(call, *one) for one in calls]
    store.clock.advance(5)
    return [caller.get(block=False) for caller in callers]


def test_reading_alone_saves_nothing(store: Store) -> None:
    store.kept["k"] = [7]
    with store.processor(min_duration=0, max_duration=5) as processor:
        assert run_all(store, processor, (last, None, True), (last, None, True)) == [7, 7]
    assert store.times("save") == []
    assert [type(error) for error in store.left] == [NothingToSave] * (store.form != "pair")


@pytest.mark.parametrize("order", [1, -1])
def test_beside_a_change_it_is_saved_and_sees_what_came_before(store: Store, order: int) -> None:
    store.kept["k"] = [7]
    with store.processor(min_duration=0, max_duration=5) as processor:
        calls: list[Any] = [(add, 8, False), (last, None, True)]
        answers = run_all(store, processor, *calls[::order])
    assert answers[::order] == [8, 8 if order == 1 else 7]
    assert store.kept["k"] == [7, 8]
    assert len(store.times("save")) == 1


def test_a_change_that_was_refused_is_no_change(store: Store) -> None:
    store.kept["k"] = [7]
    with store.processor(min_duration=0, max_duration=5) as processor:
        answers = run_all(store, processor, (refuse, None, False), (last, None, True))
    assert isinstance(answers[0], ValueError)
    assert answers[1] == 7
    assert store.times("save") == []


def test_a_broken_change_has_the_reading_replayed_and_not_saved(store: Store) -> None:
    def break_it(resource: list[Any]) -> None:
        resource.append("half")
        raise RuntimeError

    store.kept["k"] = [7]
    with store.processor(min_duration=0, max_duration=5, clean_errors=()) as processor:
        answers = run_all(store, processor, (break_it, None, False), (last, None, True))
    assert isinstance(answers[0], RuntimeError)
    assert answers[1] == 7
    assert len(store.times("load")) == 2
    assert store.times("save") == []


def test_in_a_replay_too_it_counts_what_was_completed_then(store: Store) -> None:
    def conflict_once(_: object) -> None:
        if len(store.times("save")) == 1:
            raise Conflict

    def add_once(resource: list[Any]) -> None:
        if len(store.times("load")) > 1:
            raise ValueError("too late")
        add(resource, 8)

    store.kept["k"] = [7]
    store.on_save = conflict_once
    with store.processor(min_duration=0, max_duration=5) as processor:
        answers = run_all(store, processor, (add_once, None, False), (last, None, True))
    assert isinstance(answers[0], ValueError)
    assert answers[1] == 7
    assert len(store.times("save")) == 1


def test_without_batching_it_is_the_same(store: Store) -> None:
    store.kept["k"] = [7]
    with store.processor(min_duration=0, max_duration=5, batching=False) as processor:
        assert run_all(store, processor, (last, None, True)) == [7]
        assert store.times("save") == []
        assert run_all(store, processor, (add, 8, False)) == [8]
    assert store.kept["k"] == [7, 8]


def test_what_it_has_the_store_insert_is_saved(clock: VirtualTime) -> None:
    class Scope:
        takes_rows = True
        saved: list[Any] = []  # noqa: RUF012 - of them all

        def __enter__(self) -> list[Any]:
            return []

        def __exit__(self, kind: object, error: object, trace: object) -> None:
            if kind is None:
                self.saved.extend(current_batch().rows)

    with Processor(open_resource=lambda _: Scope(), min_duration=0) as processor:
        processor.run("k", lambda _: current_batch().add_row("looked at"), read_only=True)
        processor.run("k", lambda _: None, read_only=True)
    assert Scope.saved == ["looked at"]


@pytest.mark.parametrize("value", [1, None, "yes"])
@pytest.mark.parametrize("batching", [True, False])
def test_it_is_a_flag(store: Store, value: Any, *, batching: bool) -> None:
    with store.processor(batching=batching) as processor:
        with pytest.raises(TypeError, match=r"read_only is .*, but must be True or False"):
            processor.run("k", last, read_only=value)
        assert store.log == []

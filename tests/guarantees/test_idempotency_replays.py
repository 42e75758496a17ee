"""Idempotency keys where a batch is replayed, is interrupted, or reads what was recorded: each has its own outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import gevent
import pytest

from geventbatch import BatchAborted, BatchTimeout, Conflict, LoadFailed, SaveFailed
from geventbatch._idempotency import once
from geventbatch._idempotency.value_text import decode
from tests.support.keeping_store import Keeping, KeepingScope, answers, call, opened
from tests.support.plain import Taken, refuse_seat
from tests.support.recording_store import Store, add, do_nothing, only_once, raising, wait
from tests.support.ticks import LONGEST, Ticks

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


@pytest.fixture
def store(clock: VirtualTime) -> Store:
    return Store(clock, "scope", load_time=0.01, save_time=0.02)


@pytest.fixture
def keeping(store: Store) -> Keeping:
    return Keeping(store)


class Made(Exception):
    """Making one again takes as long as `on_made` says, as where its module has to be imported first."""

    on_made: Callable[[], object] = do_nothing

    def __new__(cls, *args: object) -> Self:
        cls.on_made()
        return super().__new__(cls, *args)


def refuse(resource: list[Any], number: int) -> None:
    raise Made(number)


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


def test_a_conflict_while_the_store_is_asked_is_replayed(
    keeping: Keeping, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once: it was a LoadFailed for the whole batch and for those behind it, in place of a replay (guarantee 17).
    ask = KeepingScope.recorded
    conflicts = [Conflict("a deadlock")]

    def recorded(self: KeepingScope, keys: list[str]) -> dict[str, str]:
        if conflicts:
            raise conflicts.pop()
        return ask(self, keys)

    monkeypatch.setattr(KeepingScope, "recorded", recorded)
    with opened(keeping, clean_errors=()) as processor:
        broken, other = answers([call(processor, "a", refuse, 1), call(processor, None, add, 1)])
    assert isinstance(broken, Made)
    assert other == 1
    assert [keys for _, what, keys in store.log if what == "ask"] == [("a",)]


def test_nothing_is_saved_when_the_store_was_asked_past_the_deadline_without_a_yield(
    keeping: Keeping, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The alarm cannot ring there; once the save began with no time left (guarantee 6).
    def recorded(self: KeepingScope, keys: list[str]) -> dict[str, str]:
        store.clock.spend(6.0)  # more than max_duration
        return {}

    monkeypatch.setattr(KeepingScope, "recorded", recorded)
    monkeypatch.setattr(KeepingScope, "checkpoint", lambda _: None, raising=False)  # undone without another load
    monkeypatch.setattr(KeepingScope, "restore", lambda *_: [], raising=False)
    with opened(keeping, recorded_errors=(), max_blocking_time=None) as processor:
        found = answers([call(processor, None, add, 1), call(processor, "a", refuse, 1)])
    assert [(type(one), one.retry_safe) for one in found] == [(BatchTimeout, True)] * 2
    assert store.times("save") == []


def test_the_deadline_while_outcomes_are_read_leaves_nobody_without_one(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once: the outcome of the one that was being read was, after that, what it had in the attempt that was not saved;
    # or there was none, and its caller got an AttributeError. Nothing was written, and they were told that nobody
    # knows.
    with opened(keeping) as processor:
        assert [type(answers([call(processor, f"{n}", refuse, n)])[0]) for n in range(3)] == [Made] * 3

    def wait_next() -> None:
        wait(seconds.pop(0) if seconds else 0.0)

    # Behind the three that the operations make, each of which is tried out, and the first that is read.
    seconds = [0.0] * 7 + [2.0]
    with opened(keeping, max_duration=1) as processor:
        monkeypatch.setattr(Made, "on_made", wait_next)
        first, second, third, other = answers(
            [call(processor, f"{n}", refuse, n) for n in range(3)] + [call(processor, None, add, 1)]
        )
    assert (type(first), first.args) == (Made, (0,))
    for error in (second, third, other):
        assert isinstance(error, BatchTimeout)
        assert error.retry_safe


@pytest.mark.parametrize("kind", [gevent.GreenletExit, gevent.Timeout])
def test_a_kill_while_outcomes_are_read_leaves_nobody_without_one(
    keeping: Keeping, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def make() -> None:
        made.append(None)
        if len(made) == 8:
            raise kind

    made: list[None] = []
    with opened(keeping) as processor:
        assert [type(answers([call(processor, f"{n}", refuse, n)])[0]) for n in range(3)] == [Made] * 3
        monkeypatch.setattr(Made, "on_made", make)
        first, second, third, other = answers(
            [call(processor, f"{n}", refuse, n) for n in range(3)] + [call(processor, None, add, 1)]
        )
    assert (type(first), first.args) == (Made, (0,))
    for error in (second, third, other):
        assert isinstance(error, BatchAborted)
        assert error.retry_safe


def test_a_thousand_outcomes_that_are_read_never_hold_the_hub_for_long(
    keeping: Keeping, clock: VirtualTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Once: they were all read in one piece (guarantee 10).
    def slowly(told: str) -> Any:
        clock.spend(0.0001)
        return decode(told)

    with opened(keeping, min_duration=1, max_duration=5) as processor:
        sent = [call(processor, f"{n}", add, n) for n in range(1000)]
        assert answers(sent) == list(range(1000))
        monkeypatch.setattr(once, "decode", slowly)
        with Ticks(clock) as ticks:
            assert answers([call(processor, f"{n}", add, n) for n in range(1000)]) == list(range(1000))
    assert ticks.longest_gap() < LONGEST

"""What a resource scope, and the store that opens it, may be more than a context manager and a function."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import gevent
import pytest

import geventbatch
from geventbatch import (
    BatchAborted,
    BatchTimeout,
    Conflict,
    LoadFailed,
    NothingToSave,
    NotSaved,
    Processor,
    ProcessorStopped,
    Rejected,
    ResourceMissing,
    SaveFailed,
    current_batch,
)
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from geventbatch.testing import VirtualTime


class Broken(Exception):
    """A constraint of the store, or a bug of an operation."""


class Store:
    """Keeps a list for each key; refuses to save it with anything bad in it."""

    def __init__(self) -> None:
        self.kept: defaultdict[Any, list[Any]] = defaultdict(list)
        self.rows: list[object] = []
        self.bad: set[Any] = set()
        self.saves = self.loads = 0
        self.log: list[Any] = []
        self.load_time = self.save_time = 0.0
        self.missing = False
        self.on_load: list[BaseException | None] = []
        self.on_save: list[BaseException | None] = []
        self.verdicts: dict[type[BaseException], NotSaved] = {}
        self.after: Callable[[], object] | None = None

    def __call__(self, key: Any) -> Scope:
        return Scope(self, key)

    def processor(self, **options: Any) -> Processor[list[Any]]:
        return Processor(open_resource=self, **({"min_duration": 0, "max_duration": 5} | options))


class Scope:
    """One batch's hold of a resource."""

    takes_rows = deletes = True

    def __init__(self, store: Store, key: Any) -> None:
        self.store = store
        self.key = key
        self.resource: list[Any] = []

    def __enter__(self) -> list[Any]:
        self.store.loads += 1
        gevent.sleep(self.store.load_time)
        if self.store.on_load and (error := self.store.on_load.pop(0)):
            raise error
        if self.store.missing and self.key not in self.store.kept:
            raise ResourceMissing(f"nothing at {self.key}", key=self.key)
        self.resource = list(self.store.kept[self.key])
        return self.resource

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.store.log.append(("left", type(error)))
            return
        gevent.sleep(self.store.save_time)
        self.store.saves += 1
        refused = [mark for mark in self.resource if mark in self.store.bad]
        if refused:
            raise Rejected("a constraint") from Broken(*refused)
        if self.store.on_save and (raised := self.store.on_save.pop(0)):
            raise raised
        batch = current_batch()
        self.store.rows += batch.rows
        if batch.deleted:
            del self.store.kept[self.key]
            self.store.log.append("deleted")
        else:
            self.store.kept[self.key] = list(self.resource)

    def operation_raised(self, error: BaseException) -> NotSaved | None:
        return self.store.verdicts.get(type(error))

    def saved(self) -> None:
        if self.store.after is not None:
            self.store.after()


@pytest.fixture
def store() -> Store:
    return Store()


def append(resource: list[Any], mark: Any) -> Any:
    resource.append(mark)
    return mark


def run_all(clock: VirtualTime, processor: Processor[list[Any]], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The answers of one batch, a result or an exception each."""

    def answer(operation: Callable[..., Any], *args: Any) -> Any:
        try:
            return processor.run("k", operation, *args)
        except Exception as error:
            return error

    callers = [gevent.spawn(answer, *call) for call in calls]
    clock.advance(50)
    return [caller.get(block=False) for caller in callers]


def appends(marks: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [(append, mark) for mark in marks]


def kinds(answers: Iterable[Any]) -> list[Any]:
    return [type(answer) if isinstance(answer, Exception) else answer for answer in answers]


# A store that refuses what an operation made


@pytest.mark.parametrize("culprit", [0, 1, 499, 500, 999])
def test_one_culprit_among_a_thousand_is_found_and_all_others_are_saved_in_their_order(
    clock: VirtualTime, store: Store, culprit: int
) -> None:
    store.bad = {culprit}
    with store.processor() as processor:
        answers = run_all(clock, processor, appends(range(1000)))
    assert isinstance(answers[culprit], Broken)
    assert answers[culprit].args == (culprit,)
    others = [number for number in range(1000) if number != culprit]
    assert [answer for answer in answers if not isinstance(answer, Broken)] == others
    assert store.kept["k"] == others
    assert store.saves <= 22


def test_several_culprits_are_all_found(clock: VirtualTime, store: Store) -> None:
    store.bad = {3, 4, 77}
    with store.processor() as processor:
        answers = run_all(clock, processor, appends(range(100)))
    assert [number for number, answer in enumerate(answers) if isinstance(answer, Broken)] == [3, 4, 77]
    assert store.kept["k"] == [number for number in range(100) if number not in store.bad]


def test_a_culprit_that_came_alone_gets_what_the_store_said(clock: VirtualTime, store: Store) -> None:
    store.bad = {1}
    with store.processor() as processor:
        assert kinds(run_all(clock, processor, appends([1]))) == [Broken]
        assert store.saves == 1
        assert kinds(run_all(clock, processor, appends([2]))) == [2]


def test_a_rejected_without_a_cause_is_itself_what_the_culprit_gets(clock: VirtualTime, store: Store) -> None:
    store.on_save = [Rejected("just no")]
    with store.processor() as processor:
        assert kinds(run_all(clock, processor, appends([1]))) == [Rejected]


def test_operations_that_raise_by_themselves_are_no_culprits(clock: VirtualTime, store: Store) -> None:
    def refuse(_: list[Any]) -> None:
        raise KeyError

    store.bad = {1}
    with store.processor() as processor:
        answers = run_all(clock, processor, [(refuse,), (append, 1), (refuse,), (append, 2)])
    assert kinds(answers) == [KeyError, Broken, KeyError, 2]


def test_half_of_a_thousand_operations_may_be_culprits(clock: VirtualTime, store: Store) -> None:
    store.bad = set(range(0, 1000, 2))
    with store.processor() as processor:
        answers = run_all(clock, processor, appends(range(1000)))
    assert store.kept["k"] == list(range(1, 1000, 2))
    assert kinds(answers) == [Broken if number in store.bad else number for number in range(1000)]
    assert [answer.args for answer in answers[::2]] == [(number,) for number in range(0, 1000, 2)]


def test_the_deadline_is_the_only_limit_of_the_number_of_refused_saves(clock: VirtualTime, store: Store) -> None:
    store.bad = set(range(100))
    store.save_time = 0.05
    with store.processor() as processor:
        answers = run_all(clock, processor, appends(range(100)))
    # Those who were found out until then have what the store said.
    out = len([answer for answer in answers if isinstance(answer, Broken)])
    assert kinds(answers) == [Broken] * out + [BatchTimeout] * (100 - out)
    assert 32 < out < store.saves == 5 / 0.05


def test_a_conflict_while_culprits_are_looked_for_replays_the_part_at_hand_only(
    clock: VirtualTime, store: Store
) -> None:
    store.bad = {3}
    store.on_save = [None, Conflict("somebody else")]
    with store.processor() as processor:
        assert kinds(run_all(clock, processor, appends(range(4)))) == [0, 1, 2, Broken]
    assert store.kept["k"] == [0, 1, 2]


@pytest.mark.parametrize(("saved_before", "tries"), [(0, 2), (1, 1), (2, 1)])
def test_who_was_refused_is_tried_again_after_a_conflict_of_his_own_part_and_of_no_later_one(
    clock: VirtualTime, store: Store, saved_before: int, tries: int
) -> None:
    tried: list[list[Any]] = []

    def refuse(resource: list[Any]) -> None:
        tried.append(list(resource))
        raise KeyError

    store.bad = {4}
    store.on_save = [*[None] * saved_before, Conflict("somebody else")]
    with store.processor(copy_resource=None) as processor:  # so that who was refused is left out of what is applied
        answers = run_all(clock, processor, [(append, 0), (refuse,), (append, 2), *appends([3, 4, 5])])
    assert kinds(answers) == [0, KeyError, 2, 3, Broken, 5]
    assert store.kept["k"] == [0, 2, 3, 5]
    assert tried == [[0]] * tries


@pytest.mark.parametrize("kind", [OSError, NotSaved])
def test_what_befalls_a_later_part_changes_nothing_for_those_who_are_saved(
    clock: VirtualTime, store: Store, kind: type[Exception]
) -> None:
    store.bad = {3}
    store.on_save = [None, kind("gone")]  # the first half is saved; in the second half's first part the store fails
    with store.processor() as processor:
        answers = run_all(clock, processor, appends(range(4)))
    assert kinds(answers) == [0, 1, SaveFailed, SaveFailed]
    assert answers[2].retry_safe is (kind is NotSaved)
    assert store.kept["k"] == [0, 1]


def delete_and_append(resource: list[Any], mark: Any) -> Any:
    current_batch().delete()
    return append(resource, mark)


@pytest.mark.parametrize(
    ("calls", "long"),
    [
        pytest.param([(append, 0), (append, 1), (append, 2), (append, "bad")], 3, id="started"),
        pytest.param([(append, 0), (delete_and_append, 1), (append, 2), (append, 3)], 6, id="never started"),
    ],
)
@pytest.mark.parametrize("error", [OSError, gevent.GreenletExit, None])
def test_whose_own_part_was_not_being_saved_is_told_that_nothing_of_it_was_saved(
    clock: VirtualTime, store: Store, calls: list[tuple[Any, ...]], long: float, error: type[BaseException] | None
) -> None:
    kinds_of: dict[Any, Any] = {OSError: SaveFailed, gevent.GreenletExit: BatchAborted, None: BatchTimeout}
    store.bad = {"bad"}
    store.on_save = [None if error is None else error()]
    store.save_time = 0 if error else long
    with store.processor() as processor:
        answers = run_all(clock, processor, calls)
    assert kinds(answers) == [kinds_of[error]] * 4
    assert [answer.retry_safe for answer in answers] == [False, False, True, True]
    for answer in answers[2:]:
        assert "behind those that were being saved" in str(answer)
        assert "nothing was saved, it is safe to run the operation again" in str(answer)
    if error is OSError:  # all are told of it
        assert kinds(answer.__cause__ for answer in answers) == [OSError, OSError, NotSaved, NotSaved]
        assert kinds(answer.__cause__.__cause__ for answer in answers[2:]) == [OSError, OSError]
    if error is None:
        assert [answer.phase for answer in answers] == ["save", "save", "operations", "operations"]
    assert not store.kept["k"]


def test_at_the_deadline_those_who_are_saved_have_their_answers_and_the_rest_a_timeout(
    clock: VirtualTime, store: Store
) -> None:
    store.bad = {3}
    store.save_time = 1
    with store.processor(max_duration=2.5) as processor:
        answers = run_all(clock, processor, appends(range(4)))
    assert kinds(answers) == [0, 1, BatchTimeout, BatchTimeout]
    assert store.kept["k"] == [0, 1]


def test_a_culprit_is_found_with_batching_off_too(store: Store) -> None:
    store.bad = {1}
    processor = store.processor(batching=False)
    with pytest.raises(Broken):
        processor.run("k", append, 1)
    assert processor.run("k", append, 2) == 2


# What a scope says of an error of an operation


def raise_it(resource: list[Any], error: BaseException) -> None:
    resource.append("half")
    raise error


def test_an_operation_whose_error_is_a_conflict_is_replayed_with_all_others(clock: VirtualTime, store: Store) -> None:
    store.verdicts = {Broken: Conflict("deadlock")}
    failures = [Broken()]

    def unlucky(resource: list[Any]) -> str:
        if failures:
            raise failures.pop()
        resource.append("unlucky")
        return "lucky"

    with store.processor() as processor:
        assert run_all(clock, processor, [(append, 1), (unlucky,), (append, 2)]) == [1, "lucky", 2]
    assert store.kept["k"] == [1, "unlucky", 2]
    assert (store.loads, store.saves) == (2, 1)


def test_conflicts_of_operations_are_replayed_up_to_max_attempts(clock: VirtualTime, store: Store) -> None:
    store.verdicts = {Broken: Conflict("deadlock")}
    with store.processor(max_attempts=3) as processor:
        answers = run_all(clock, processor, [(append, 1), (raise_it, Broken())])
    assert kinds(answers) == [SaveFailed] * 2
    assert all(answer.retry_safe for answer in answers)
    assert store.loads == 3


def test_an_operation_that_spoiled_the_transaction_stays_out_though_its_error_is_a_clean_one(
    clock: VirtualTime, store: Store
) -> None:
    store.verdicts = {Broken: Rejected("the transaction is aborted")}
    with store.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (raise_it, Broken("own")), (append, 2)])
    assert kinds(answers) == [1, Broken, 2]
    assert answers[1].args == ("own",)
    assert store.kept["k"] == [1, 2]
    assert (store.loads, store.saves) == (2, 1)


def test_the_deadline_is_the_only_limit_of_the_number_of_operations_that_spoil_the_transaction(
    clock: VirtualTime, store: Store
) -> None:
    store.verdicts = {Broken: Rejected("the transaction is aborted")}
    with store.processor() as processor:
        answers = run_all(
            clock, processor, [(raise_it, Broken()) if number % 2 else (append, number) for number in range(200)]
        )
    assert kinds(answers) == [Broken if number % 2 else number for number in range(200)]
    assert store.kept["k"] == list(range(0, 200, 2))
    assert store.loads == 101
    store.load_time = 0.1
    with store.processor() as processor:
        answers = run_all(clock, processor, [(raise_it, Broken()) for _ in range(100)])
    assert set(kinds(answers)) == {BatchTimeout}
    assert all(answer.retry_safe for answer in answers)


def test_an_operation_whose_error_leaves_nothing_to_be_saved_ends_its_batch(clock: VirtualTime, store: Store) -> None:
    store.verdicts = {Broken: NotSaved("the connection is lost")}
    with store.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (raise_it, Broken()), (append, 2)])
    assert kinds(answers) == [SaveFailed] * 3
    assert all(answer.retry_safe for answer in answers)
    assert "an operation raised NotSaved('the connection is lost')" in str(answers[0])
    assert (store.loads, store.saves) == (1, 0)


def test_an_error_that_the_scope_has_no_opinion_on_is_its_caller_s_alone(clock: VirtualTime, store: Store) -> None:
    with store.processor(clean_errors=(Broken,)) as processor:
        assert kinds(run_all(clock, processor, [(append, 1), (raise_it, Broken())])) == [1, Broken]
    assert store.loads == 1


# Rows beside the resource


def append_with_row(resource: list[Any], mark: Any) -> Any:
    current_batch().add_row(("row", mark))
    resource.append(mark)
    return mark


def test_rows_are_inserted_with_the_save_in_the_order_of_the_operations(clock: VirtualTime, store: Store) -> None:
    with store.processor() as processor:
        run_all(clock, processor, [(append_with_row, number) for number in range(3)])
    assert store.rows == [("row", number) for number in range(3)]
    assert store.saves == 1


def test_the_rows_of_an_operation_that_raises_are_dropped_and_no_others(clock: VirtualTime, store: Store) -> None:
    def fail(_: list[Any]) -> None:
        current_batch().add_row("one")
        current_batch().add_row("two")
        raise KeyError

    with store.processor() as processor:
        run_all(clock, processor, [(fail,), (append_with_row, 1), (fail,), (fail,), (append_with_row, 2), (fail,)])
    assert store.rows == [("row", 1), ("row", 2)]


def test_a_replay_adds_the_rows_anew(clock: VirtualTime, store: Store) -> None:
    store.on_save = [Conflict("somebody else")]
    with store.processor() as processor:
        run_all(clock, processor, [(append_with_row, 1), (append_with_row, 2)])
    assert store.rows == [("row", 1), ("row", 2)]


def test_each_part_has_its_own_rows(clock: VirtualTime, store: Store) -> None:
    store.bad = {2}
    with store.processor() as processor:
        run_all(clock, processor, [(append_with_row, number) for number in range(4)])
    assert store.rows == [("row", 0), ("row", 1), ("row", 3)]


def test_a_row_of_the_load_is_kept_though_the_first_operation_raises(clock: VirtualTime, store: Store) -> None:
    class Adding(Scope):
        def __enter__(self) -> list[Any]:
            current_batch().add_row("of the load")
            return super().__enter__()

    processor = Processor(open_resource=lambda key: Adding(store, key), min_duration=0)
    run_all(clock, processor, [(raise_it, KeyError()), (append, 1)])
    processor.stop()
    assert store.rows == ["of the load"]


@pytest.mark.parametrize("method", ["add_row", "delete"])
def test_what_a_scope_cannot_do_is_refused(clock: VirtualTime, method: str) -> None:
    def ask(_: None) -> None:
        batch = current_batch()
        if method == "add_row":
            batch.add_row("row")
        else:
            batch.delete()

    def call() -> None:
        with pytest.raises(
            RuntimeError, match=f"{method}: the store of the processor .* (inserts no rows|deletes no resources)"
        ):
            processor.run("k", ask)

    with Processor(min_duration=0) as processor:
        caller = gevent.spawn(call)
        clock.advance(1)
        assert caller.successful()


# Deleting


def delete(_: list[Any]) -> str:
    current_batch().delete()
    return "deleted"


def test_operations_behind_one_that_deletes_are_applied_to_what_the_next_load_gives(
    clock: VirtualTime, store: Store
) -> None:
    store.kept["k"] = ["old"]
    with store.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (delete,), (append, 2), (delete,), (append, 3)])
    assert answers == [1, "deleted", 2, "deleted", 3]
    assert store.kept["k"] == [3]
    assert store.log == ["deleted", "deleted"]
    assert store.loads == 3


def test_where_nothing_is_left_to_load_they_are_told_and_those_before_stay_answered(
    clock: VirtualTime, store: Store
) -> None:
    store.kept["k"] = ["old"]
    store.missing = True
    with store.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (delete,), (append, 2)])
    assert kinds(answers) == [1, "deleted", ResourceMissing]
    assert "k" not in store.kept


def test_an_operation_that_deletes_and_raises_deletes_nothing(clock: VirtualTime, store: Store) -> None:
    def delete_and_raise(_: list[Any]) -> None:
        current_batch().delete()
        raise KeyError

    with store.processor(clean_errors=(KeyError,)) as processor:
        answers = run_all(clock, processor, [(append, 1), (delete_and_raise,), (append, 2)])
    assert kinds(answers) == [1, KeyError, 2]
    assert store.kept["k"] == [1, 2]
    assert store.log == []


def test_a_batch_that_deletes_takes_no_more_operations(clock: VirtualTime, store: Store) -> None:
    with store.processor(min_duration=1) as processor:
        first = gevent.spawn(processor.run, "k", delete)
        clock.advance(0.5)
        assert first.value == "deleted"
        second = gevent.spawn(processor.run, "k", append, 2)
        clock.advance(2)
        assert second.value == 2
    assert store.kept["k"] == [2]


def test_a_replay_deletes_again(clock: VirtualTime, store: Store) -> None:
    store.on_save = [Conflict("somebody else")]
    with store.processor() as processor:
        assert run_all(clock, processor, [(delete,), (append, 2)]) == ["deleted", 2]
    assert store.log == ["deleted"]
    assert store.kept["k"] == [2]


# After the answers


def test_what_a_scope_has_still_to_do_comes_after_the_answers_outside_the_deadline_with_the_key_released(
    clock: VirtualTime, store: Store
) -> None:
    events: list[tuple[float, str]] = []

    def after() -> None:
        events.append((clock.now(), "after"))
        gevent.sleep(10)
        events.append((clock.now(), "done"))

    def call(mark: int) -> None:
        processor.run("k", append, mark)
        events.append((clock.now(), f"answered {mark}"))

    store.after = after
    store.save_time = 1
    with store.processor(max_duration=2, max_batches=1, workers=1) as processor:
        gevent.spawn(call, 1)
        clock.advance(1.5)
        gevent.spawn(call, 2)
        clock.advance(1.5)
        assert events == [(1.0, "after"), (1.0, "answered 1"), (2.5, "after"), (2.5, "answered 2")]
        clock.advance(20)
        assert events[4:] == [(11.0, "done"), (12.5, "done")]


def test_a_stop_waits_for_what_comes_after_the_answers(clock: VirtualTime, store: Store) -> None:
    store.after = lambda: gevent.sleep(3)
    processor = store.processor()
    gevent.spawn(processor.run, "k", append, 1)
    clock.settle()
    stop = gevent.spawn(processor.stop)
    clock.advance(2.9)
    assert not stop.ready()
    clock.advance(0.2)
    assert stop.value is True


def test_what_fails_after_the_answers_is_logged_and_harms_nobody(
    clock: VirtualTime, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise Broken("a hook")

    store.after = fail
    with store.processor() as processor, caplog.at_level(logging.ERROR, "geventbatch"):
        assert run_all(clock, processor, appends([1])) == [1]
    assert "after the batch of key 'k' was saved and answered" in caplog.text
    assert "Broken: a hook" in caplog.text


@pytest.mark.parametrize("batching", [True, False])
def test_what_comes_after_the_answers_may_run_operations_of_the_same_processor(
    clock: VirtualTime, store: Store, *, batching: bool
) -> None:
    def after() -> None:
        store.after = None
        processor.run("k", append, "after")

    store.after = after
    with store.processor(max_batches=1, workers=1, batching=batching) as processor:
        run_all(clock, processor, appends(["first"]))
    assert store.kept["k"] == ["first", "after"]


def test_nothing_comes_after_a_batch_that_was_not_saved(clock: VirtualTime, store: Store) -> None:
    called: list[bool] = []
    store.after = lambda: called.append(True)
    store.on_save = [OSError("gone")]
    with store.processor() as processor:
        run_all(clock, processor, appends([1]))
        run_all(clock, processor, [(raise_it, KeyError())])
    assert not called


def test_a_worker_killed_after_the_answers_ends_and_the_stop_does_not_wait_for_it(
    clock: VirtualTime, store: Store
) -> None:
    workers: list[Any] = []

    def after() -> None:
        workers.append(gevent.getcurrent())
        gevent.sleep(100)

    store.after = after
    processor = store.processor()
    gevent.spawn(processor.run, "k", append, 1)
    clock.settle()
    workers[0].kill(block=False)
    clock.settle()
    stop = gevent.spawn(processor.stop)
    clock.advance(1)
    assert stop.value is True


# Before an operation is admitted


class Door(Store):
    """A store that has something to say at the door."""

    def __init__(self) -> None:
        super().__init__()
        self.lone: set[int] = set()
        self.ended = 0

    def normalize_key(self, key: Any) -> int:
        return int(key)

    def admit(self, key: int) -> bool:
        if key < 0:
            raise PermissionError(key)
        return key in self.lone

    def stopped(self) -> None:
        self.ended += 1
        raise Broken("in the end")


def test_keys_that_a_store_takes_for_one_share_a_batch(clock: VirtualTime) -> None:
    store = Door()
    store.load_time = 1
    processor = store.processor()
    keys = [42, "42", " 42 ", 42.0]
    callers = [gevent.spawn(processor.run, key, lambda _: current_batch().key) for key in keys]
    clock.advance(2)
    assert [caller.value for caller in callers] == [42] * 4
    assert store.loads == 1
    processor.stop()


def test_a_store_without_a_length_is_asked_too(clock: VirtualTime) -> None:
    class Empty(Door):
        def __len__(self) -> int:
            return 0

    with Empty().processor() as processor:
        assert processor.run("42", lambda _: current_batch().key) == 42


def test_what_a_store_refuses_at_the_door_reaches_its_caller_and_is_not_enqueued(clock: VirtualTime) -> None:
    with Door().processor() as processor:
        with pytest.raises(ValueError, match="nonsense"):
            processor.run("nonsense", append, 1)
        with pytest.raises(PermissionError):
            processor.run("-1", append, 1)
        assert "0 keys" in repr(processor)
        clock.settle()


def test_a_store_may_have_an_operation_run_alone(clock: VirtualTime) -> None:
    store = Door()
    store.lone = {1}

    def where(_: list[Any]) -> tuple[bool, bool]:
        return current_batch().alone, gevent.getcurrent() is caller

    with store.processor() as processor:
        caller = gevent.spawn(lambda: [processor.run(key, where) for key in ("1", "2")])
        clock.advance(1)
        assert caller.value == [(True, True), (False, False)]
        processor.batching = False
        assert processor.run("-1", lambda _: current_batch().alone), "nobody asks the store then"


def test_a_store_hears_once_that_its_processor_has_stopped(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    store = Door()
    processor = store.processor()
    caller = gevent.spawn(processor.run, 1, append, 1)
    clock.advance(1)
    assert caller.ready()
    assert store.ended == 0
    assert processor.stop()
    assert processor.stop()
    assert store.ended == 1
    clock.advance(1)  # it is told in a greenlet of its own
    assert "Broken: in the end" in caplog.text


# A load that meets a conflict, or nothing


def test_a_load_that_meets_a_conflict_is_repeated(clock: VirtualTime, store: Store) -> None:
    store.on_load = [Conflict("deadlock"), Conflict("again")]
    with store.processor() as processor:
        assert run_all(clock, processor, appends([1, 2])) == [1, 2]
    assert (store.loads, store.saves) == (3, 1)


def test_out_of_attempts_the_load_has_failed_for_all_who_wait(clock: VirtualTime, store: Store) -> None:
    store.on_load = [Conflict(str(number)) for number in range(3)]
    with store.processor(max_attempts=3) as processor:
        answers = run_all(clock, processor, appends([1, 2]))
    assert kinds(answers) == [LoadFailed] * 2
    assert "loading raised Conflict('2') in attempt 3 of 3; nothing was saved" in str(answers[0])


def test_a_deadline_while_a_load_is_about_to_be_repeated_is_a_failed_load(clock: VirtualTime, store: Store) -> None:
    store.load_time = 0.3
    store.on_load = [Conflict("deadlock") for _ in range(100)]
    with store.processor(max_duration=1, max_attempts=100) as processor:
        (answer,) = run_all(clock, processor, appends([1]))
    assert isinstance(answer, (LoadFailed, BatchTimeout))
    assert answer.retry_safe


def test_a_resource_that_is_missing_reaches_each_caller_as_an_error_of_his_own(
    clock: VirtualTime, store: Store
) -> None:
    store.missing = True
    with store.processor() as processor:
        answers = run_all(clock, processor, appends([1, 2]))
    assert kinds(answers) == [ResourceMissing] * 2
    assert answers[0] is not answers[1]
    assert answers[0].__cause__ is answers[1].__cause__
    for answer in answers:
        assert (answer.key, answer.retry_safe) == ("k", True)
        assert "nothing at k" in str(answer)


# All processors at once


def test_stop_all_stops_every_processor_and_waits_for_all_together(clock: VirtualTime, store: Store) -> None:
    store.save_time = 3
    processors = [store.processor() for _ in range(3)]
    callers = [gevent.spawn(processor.run, "k", append, 1) for processor in processors]
    clock.settle()
    assert geventbatch.stop_all(timeout=0) is False
    for processor in processors:
        with pytest.raises(ProcessorStopped):
            processor.run("k", append, 2)
    soon = gevent.spawn(geventbatch.stop_all, 1)
    late = gevent.spawn(geventbatch.stop_all)
    clock.advance(1.5)
    assert soon.value is False
    clock.advance(2)
    assert late.value is True
    assert [caller.value for caller in callers] == [1, 1, 1]


def test_stop_all_inside_a_batch_stops_the_others_before_it_refuses(clock: VirtualTime, store: Store) -> None:
    processors = [store.processor() for _ in range(3)]
    callers = [gevent.spawn(processors[1].run, "k", lambda _: geventbatch.stop_all(1))]
    clock.settle()
    assert isinstance(callers[0].exception, RuntimeError)
    for processor in processors:
        with pytest.raises(ProcessorStopped):
            processor.run("k", append, 2)


def test_a_processor_that_is_gone_is_not_kept_for_stop_all(store: Store) -> None:
    before = len(geventbatch._core.process.processors())
    processor = store.processor()
    assert len(geventbatch._core.process.processors()) == before + 1
    del processor
    assert len(geventbatch._core.process.processors()) == before


# What a hostile reading found


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("everything", [True, False])
def test_a_stop_that_would_wait_for_itself_after_the_answers_is_refused(
    clock: VirtualTime, store: Store, *, batching: bool, everything: bool
) -> None:
    refused: list[RuntimeError] = []

    def after() -> None:
        try:
            geventbatch.stop_all() if everything else processor.stop()
        except RuntimeError as error:
            refused.append(error)

    store.after = after
    processor = store.processor(batching=batching)
    caller = gevent.spawn(processor.run, "k", append, 1)
    clock.advance(1)
    assert caller.value == 1
    assert len(refused) == 1
    assert processor.stop()


def test_between_parts_the_hub_has_its_turns(clock: VirtualTime, store: Store) -> None:
    def toil(_: list[Any]) -> None:
        current_batch().delete()
        clock.spend(0.001)

    def tick() -> None:
        while len(gaps) < 1000:
            begun = clock.now()
            gevent.sleep(0.0001)
            gaps.append(clock.now() - begun)

    gaps: list[float] = []
    ticker = gevent.spawn(tick)
    with store.processor() as processor:
        callers = [gevent.spawn(processor.run, "k", toil) for _ in range(100)]
        clock.advance(1)
        assert all(caller.successful() for caller in callers)
    ticker.kill()
    assert max(gaps) < 0.01


def test_a_store_that_refuses_one_operation_after_the_other_is_asked_once_for_each(
    clock: VirtualTime, store: Store
) -> None:
    def take(resource: list[Any], mark: int) -> None:
        if resource:
            raise KeyError
        resource.append(mark)

    store.bad = set(range(1000))
    with store.processor() as processor:
        answers = kinds(run_all(clock, processor, [(take, number) for number in range(1000)]))
    assert store.saves == 1000
    assert answers == [Broken] * 1000


@pytest.mark.parametrize("kind", [Conflict, Rejected])
def test_a_save_that_raised_keeps_no_resource_alive(clock: VirtualTime, store: Store, kind: type[Exception]) -> None:
    class Resource(list[Any]):
        pass

    class Weak(Scope):
        def __enter__(self) -> list[Any]:
            self.resource = Resource(super().__enter__())
            held.append(weakref.ref(self.resource))
            return self.resource

        def __exit__(self, *raised: object) -> None:
            if len(held) == 1:
                raise kind("nothing was written")

    held: list[weakref.ref[Any]] = []
    processor = Processor(open_resource=lambda key: Weak(store, key), min_duration=0, max_duration=5)
    gc.disable()
    try:
        run_all(clock, processor, appends([1, 2]))
        assert len(held) > 1
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()
    processor.stop()


def test_an_attribute_of_a_scope_that_is_no_method_is_not_called(
    clock: VirtualTime, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    class Flagged(Scope):
        saved = True  # type: ignore[assignment]

    with Processor(open_resource=lambda key: Flagged(store, key), min_duration=0) as processor:
        assert run_all(clock, processor, appends([1])) == [1]
    assert not caplog.records


def test_a_scope_whose_attributes_cannot_be_read_fails_before_it_is_entered(clock: VirtualTime, store: Store) -> None:
    class Closed(Scope):
        @property
        def saved(self) -> Any:
            raise OSError("closed")

    with Processor(open_resource=lambda key: Closed(store, key), min_duration=0) as processor:
        assert kinds(run_all(clock, processor, appends([1]))) == [LoadFailed]
    assert store.loads == 0


def test_a_part_that_everybody_has_left_is_not_loaded(clock: VirtualTime, store: Store) -> None:
    store.save_time = 1
    with store.processor() as processor:
        first = gevent.spawn(processor.run, "k", delete)
        second = gevent.spawn(processor.run, "k", append, 2)
        clock.advance(0.5)
        second.kill(block=False)
        clock.advance(1)
        assert first.value == "deleted"
        assert store.loads == 1


def test_a_part_for_which_no_time_is_left_is_not_loaded_and_harms_no_batch_behind(
    clock: VirtualTime, store: Store
) -> None:
    class Late(Scope):
        def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
            super().__exit__(kind, error, traceback)
            if self.store.saves == 1:
                clock.spend(3)  # the hub cannot ring the alarm meanwhile

    def call(operation: Callable[..., Any], *args: Any) -> Any:
        try:
            return processor.run("k", operation, *args)
        except BatchTimeout as error:
            return error.phase

    store.save_time = 0.1
    with Processor(open_resource=lambda key: Late(store, key), min_duration=0, max_duration=2) as processor:
        callers = [gevent.spawn(call, delete), gevent.spawn(call, append, 2)]
        clock.advance(0.05)
        callers.append(gevent.spawn(call, append, 3))
        clock.advance(5)
        assert [caller.value for caller in callers] == ["deleted", "operations", 3]


def test_a_part_of_which_nothing_is_saved_and_whose_scope_hangs_harms_no_batch_behind(
    clock: VirtualTime, store: Store
) -> None:
    class Slow(Scope):
        def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
            super().__exit__(kind, error, traceback)
            gevent.sleep(100 if isinstance(error, NothingToSave) else 0)

    def refuse_the_second_time(resource: list[Any]) -> None:
        if store.saves:
            raise KeyError
        append(resource, 1)

    store.bad = {2}
    store.save_time = 0.1
    with Processor(
        open_resource=lambda key: Slow(store, key), min_duration=0, max_duration=2, clean_errors=(KeyError,)
    ) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "k", refuse_the_second_time)]
        callers.append(gevent.spawn(answer_of, processor.run, "k", append, 2))
        clock.advance(1)
        callers.append(gevent.spawn(answer_of, processor.run, "k", append, 3))
        clock.advance(5)
        answers: list[Any] = [caller.value for caller in callers]
    first, second, behind = answers
    assert isinstance(first, KeyError)
    assert (type(second), second.phase, behind) == (BatchTimeout, "operations", 3)


def test_a_scope_that_judges_by_anything_but_a_not_saved_is_left_and_told_so(clock: VirtualTime, store: Store) -> None:
    store.verdicts = {Broken: True}  # type: ignore[dict-item]
    with store.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (raise_it, Broken())])
    assert kinds(answers) == [BatchAborted] * 2
    assert "operation_raised returned True" in str(answers[0])
    assert store.log == [("left", TypeError)]


def test_a_timeout_of_a_hook_is_logged_and_the_next_hook_runs(
    clock: VirtualTime, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[int] = []

    def after() -> None:
        called.append(len(called))
        if len(called) == 1:
            with gevent.Timeout(1):
                gevent.sleep(5)

    store.bad = {3}
    store.after = after
    with store.processor() as processor:
        assert kinds(run_all(clock, processor, appends([1, 2, 3]))) == [1, 2, Broken]
    assert called == [0, 1]
    assert "Timeout: 1 second" in caplog.text


def test_a_batch_that_has_ended_keeps_no_scope(clock: VirtualTime, store: Store) -> None:
    scopes: list[weakref.ref[Any]] = []

    def open_weak(key: Any) -> Scope:
        scope = Scope(store, key)
        scopes.append(weakref.ref(scope))
        return scope

    processor = Processor(open_resource=open_weak, min_duration=0)
    gc.disable()
    try:
        (batch,) = run_all(clock, processor, [(lambda _: current_batch(),)])
        assert batch.key == "k"
        assert scopes[0]() is None
    finally:
        gc.enable()
    processor.stop()


def test_the_wait_before_a_load_is_repeated_is_no_part_of_its_duration(clock: VirtualTime, store: Store) -> None:
    store.on_load = [Conflict("deadlock")] * 3
    store.load_time = 0.01
    processor = store.processor()
    metrics = processor.subscribe_batch_metrics()
    run_all(clock, processor, appends([1]))
    processor.stop()
    (metric,) = metrics
    assert metric.load_duration == pytest.approx(0.04)
    assert metric.total_duration > 0.04

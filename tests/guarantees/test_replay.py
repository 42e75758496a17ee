"""Conflict and replay (guarantee 17), and broken operations (guarantee 18)."""

from __future__ import annotations

import random
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchAborted, BatchTimeout, Conflict, LoadFailed, NotSaved, Processor, SaveFailed
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime

COLOUR: ContextVar[str] = ContextVar("COLOUR", default="none")


class Store:
    """One list, loaded as a copy; its first saves raise what they are told to."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.saved: list[Any] = []
        self.saves: list[list[Any]] = []
        """What each save was given, in vain or not."""
        self.loads: list[list[Any]] = []

    def load(self, key: str) -> list[Any]:
        resource = list(self.saved)
        self.loads.append(resource)
        return resource

    def save(self, key: str, resource: list[Any]) -> None:
        self.saves.append(list(resource))
        if self.failures:
            raise self.failures.pop(0)
        self.saved = list(resource)


def over(store: Store, **options: Any) -> Processor[list[Any]]:
    return Processor(
        **{
            "load_resource": store.load,
            "save_resource": store.save,
            "min_duration": 0,
            "max_duration": 5,
            **options,
        }
    )


def append(resource: list[Any], value: Any) -> int:
    resource.append(value)
    return len(resource)


def spawn(processor: Processor[list[Any]], operation: Callable[..., Any], *args: Any) -> gevent.Greenlet[..., Any]:
    return gevent.spawn(answer_of, processor.run, "k", operation, *args)


def all_of(callers: list[gevent.Greenlet[..., Any]]) -> list[Any]:
    return [caller.get() for caller in callers]


class Half(Exception):
    """An operation was left half-way."""


def change_half_way(resource: list[Any], value: Any) -> None:
    resource.append(f"half of {value}")
    raise Half(value)


def refuse(resource: list[Any], value: Any) -> None:
    raise KeyError(value)


# Conflict


def test_after_a_conflict_the_batch_loads_again_applies_all_again_in_their_order_and_saves_again(
    clock: VirtualTime,
) -> None:
    store = Store(Conflict(), Conflict())
    order: list[Any] = []

    def note(resource: list[Any], value: Any) -> int:
        order.append(value)
        return append(resource, value)

    with over(store) as processor:
        callers = [spawn(processor, note, value) for value in range(40)]
        assert all_of(callers) == list(range(1, 41))
    assert order == list(range(40)) * 3
    assert len(store.loads) == 3
    assert store.saves == [list(range(40))] * 3
    assert store.saved == list(range(40))


def test_each_attempt_works_on_what_somebody_else_has_saved_meanwhile(clock: VirtualTime) -> None:
    store = Store()

    def save(key: str, resource: list[Any]) -> None:
        if not store.saved:
            store.saved = ["somebody else's"]
            raise Conflict
        store.saved = resource

    with over(store, save_resource=save) as processor:
        assert processor.run("k", append, "mine") == 2
    assert store.saved == ["somebody else's", "mine"]


def test_leaving_a_scope_with_a_conflict_replays_too_in_a_scope_of_its_own(clock: VirtualTime) -> None:
    noted: list[str] = []

    @contextmanager
    def scope(key: str) -> Iterator[list[int]]:
        noted.append("begin")
        yield []
        if noted.count("begin") < 3:
            noted.append("conflict")
            raise Conflict
        noted.append("commit")

    with Processor(open_resource=scope, min_duration=0) as processor:
        assert processor.run("k", append, 1) == 1
    assert noted == ["begin", "conflict", "begin", "conflict", "begin", "commit"]


def test_callers_see_the_outcome_of_the_last_attempt_only(clock: VirtualTime) -> None:
    """What returned may raise later, what raised may return, and a value may be another one."""
    store = Store(Conflict())

    def first_returns(resource: list[Any]) -> str:
        if store.failures:
            return "of the first attempt"
        raise KeyError("of the second attempt")

    def first_raises(resource: list[Any]) -> str:
        if store.failures:
            raise KeyError("of the first attempt")
        resource.append(1)
        return "of the second attempt"

    def counts(resource: list[Any]) -> int:
        return len(store.loads)

    with over(store, clean_errors=(KeyError,)) as processor:
        callers = [spawn(processor, operation) for operation in (first_returns, first_raises, counts)]
        first, second, third = all_of(callers)
    assert repr(first) == "KeyError('of the second attempt')"
    assert second == "of the second attempt"
    assert third == 2


def test_a_replay_in_which_no_operation_completes_saves_nothing_and_gives_everybody_their_exceptions(
    clock: VirtualTime,
) -> None:
    store = Store(Conflict())

    def only_once(resource: list[Any]) -> None:
        if len(store.loads) > 1:
            raise KeyError("taken meanwhile")

    with over(store, clean_errors=(KeyError,)) as processor:
        answers = all_of([spawn(processor, only_once) for _ in range(3)])
    assert [type(answer) for answer in answers] == [KeyError] * 3
    assert len({id(answer) for answer in answers}) == 3
    assert len(store.saves) == 1
    assert len(store.loads) == 2


def test_each_attempt_runs_an_operation_in_a_fresh_copy_of_its_callers_context(clock: VirtualTime) -> None:
    store = Store(Conflict(), Conflict())
    seen: list[str] = []

    def paint(resource: list[Any]) -> None:
        seen.append(COLOUR.get())
        COLOUR.set("painted")

    def caller(colour: str) -> None:
        COLOUR.set(colour)
        processor.run("k", paint)
        assert COLOUR.get() == colour

    with over(store) as processor:
        gevent.joinall([gevent.spawn(caller, colour) for colour in ("red", "green")], raise_error=True)
    assert seen == ["red", "green"] * 3


def test_the_batch_is_closed_by_then_so_that_who_comes_during_the_backoff_is_the_next_one(clock: VirtualTime) -> None:
    store = Store(Conflict())

    def save(key: str, resource: list[Any]) -> None:
        gevent.sleep(1)
        store.save(key, resource)

    with over(store, save_resource=save) as processor:
        early = [spawn(processor, append, value) for value in "ab"]
        clock.advance(0.5)  # in the first save
        between = spawn(processor, append, "c")
        clock.advance(0.5)  # in the backoff
        late = spawn(processor, append, "d")
        assert all_of([*early, between, late]) == [1, 2, 3, 4]
    assert store.saves == [["a", "b"], ["a", "b"], ["a", "b", "c", "d"]]


def test_an_operation_whose_caller_left_after_its_start_is_replayed_and_one_that_never_started_is_not(
    clock: VirtualTime,
) -> None:
    store = Store(Conflict())

    def save(key: str, resource: list[Any]) -> None:
        gevent.sleep(1)
        store.save(key, resource)

    def load(key: str) -> list[Any]:
        gevent.sleep(1)
        return store.load(key)

    with over(store, load_resource=load, save_resource=save) as processor:
        kept = spawn(processor, append, "kept")
        never = spawn(processor, append, "never started")
        started = spawn(processor, append, "started")
        clock.advance(0.5)  # in the load
        never.kill()
        clock.advance(1)  # in the save
        started.kill()
        assert kept.get() == 1
    assert store.saves == [["kept", "started"]] * 2


def test_a_batch_whose_callers_have_all_left_after_its_start_is_still_replayed(clock: VirtualTime) -> None:
    store = Store(Conflict())

    def save(key: str, resource: list[Any]) -> None:
        gevent.sleep(1)
        store.save(key, resource)

    with over(store, save_resource=save) as processor:
        caller = spawn(processor, append, 1)
        clock.advance(0.5)
        caller.kill()
        clock.advance(5)
        assert store.saved == [1]


def test_a_conflict_is_answered_for_up_to_max_attempts_saves(clock: VirtualTime) -> None:
    for most in (1, 2, 7):
        store = Store(*[Conflict() for _ in range(most - 1)])
        with over(store, max_attempts=most) as processor:
            assert processor.run("k", append, 1) == 1
        assert len(store.saves) == len(store.loads) == most
        last = Conflict("the last one")
        store = Store(*[Conflict() for _ in range(most - 1)], last)
        with over(store, max_attempts=most) as processor:
            answers = all_of([spawn(processor, append, value) for value in range(3)])
        assert [type(answer) for answer in answers] == [SaveFailed] * 3
        assert all(answer.__cause__ is last and answer.retry_safe for answer in answers)
        assert len({id(answer) for answer in answers}) == 3
        assert len(store.saves) == len(store.loads) == most
        assert store.saved == []


def test_what_an_operation_raised_gives_way_to_the_save_failed_of_its_batch(clock: VirtualTime) -> None:
    store = Store(*[Conflict() for _ in range(5)])
    with over(store) as processor:
        raised, returned = all_of([spawn(processor, refuse, 1), spawn(processor, append, 2)])
    assert type(raised) is type(returned) is SaveFailed


def test_the_next_run_after_a_failed_batch_starts_a_new_one_with_all_its_attempts(clock: VirtualTime) -> None:
    store = Store(*[Conflict() for _ in range(5)], *[Conflict() for _ in range(4)])
    with over(store) as processor:
        assert isinstance(answer_of(processor.run, "k", append, 1), SaveFailed)
        assert processor.run("k", append, 2) == 1


# Backoff


def gaps(clock: VirtualTime, conflicts: int) -> list[float]:
    """The seconds between a save that conflicts and the load after it."""
    saved: list[float] = []
    pauses: list[float] = []

    def load(key: str) -> None:
        if saved:
            pauses.append(clock.now() - saved[-1])

    def save(key: str, resource: None) -> None:
        saved.append(clock.now())
        if len(saved) <= conflicts:
            raise Conflict

    with Processor(
        load_resource=load, save_resource=save, min_duration=0, max_duration=600, max_attempts=conflicts + 1
    ) as processor:
        processor.run("k", lambda resource: None)
    return pauses


def test_the_backoff_is_a_random_part_of_5_ms_then_of_twice_as_much_each_time_up_to_100_ms(clock: VirtualTime) -> None:
    longest = [0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.1, 0.1]
    random.seed(17)
    seen = [gaps(clock, len(longest)) for _ in range(60)]
    for number, most in enumerate(longest):
        pauses = [one[number] for one in seen]
        assert len(pauses) == 60
        assert max(pauses) <= most
        # Full jitter: from nothing to the most, and not a fixed part of it with a little noise.
        assert min(pauses) < 0.1 * most
        assert max(pauses) > 0.9 * most
        assert 0.3 * most < sum(pauses) / 60 < 0.7 * most


def test_the_backoff_of_attempt_1100_is_still_100_ms_at_the_most(clock: VirtualTime) -> None:
    random.seed(17)
    assert max(gaps(clock, 1100)) <= 0.1


def test_other_keys_of_the_shard_go_on_during_a_backoff(clock: VirtualTime) -> None:
    store = Store(Conflict())

    def save(key: str, resource: list[Any]) -> None:
        if key == "k":
            store.save(key, resource)

    with over(store, save_resource=save, workers=1) as processor:
        backing_off = spawn(processor, append, 1)
        clock.settle()
        assert len(store.saves) == 1
        assert not backing_off.ready()
        assert processor.run("other", append, 1) == 1
        assert not backing_off.ready()
        assert backing_off.get() == 1


def test_a_worker_killed_during_a_backoff_is_a_batch_aborted_and_retry_safe(clock: VirtualTime) -> None:
    store = Store(Conflict())
    workers: list[Any] = []

    def note_worker(resource: list[Any]) -> None:
        workers.append(gevent.getcurrent())

    with over(store) as processor:
        caller = spawn(processor, note_worker)
        clock.settle()
        gevent.kill(workers[0])
        answer = caller.get()
        assert (type(answer), answer.retry_safe) == (BatchAborted, True)
        assert processor.run("k", append, 1) == 1


# Out of time


def test_without_time_for_another_attempt_it_is_a_save_failed_from_the_conflict_and_retry_safe(
    clock: VirtualTime,
) -> None:
    last: list[Conflict] = []

    def save(key: str, resource: None) -> None:
        gevent.sleep(4.999)
        last.append(Conflict())
        raise last[-1]

    random.seed(0)  # of the 5 ms more than 1
    with Processor(save_resource=save, min_duration=0, max_duration=5) as processor:
        answers = all_of([gevent.spawn(answer_of, processor.run, "k", lambda resource: None) for _ in range(3)])
        assert clock.now() < 5
    assert len(last) == 1
    assert [type(answer) for answer in answers] == [SaveFailed] * 3
    assert all(answer.__cause__ is last[0] and answer.retry_safe for answer in answers)
    assert "no time for another attempt" in str(answers[0])


def test_a_conflict_raised_past_the_deadline_by_cpu_work_is_no_replay(clock: VirtualTime) -> None:
    store = Store(Conflict())

    def save(key: str, resource: list[Any]) -> None:
        clock.spend(6)
        store.save(key, resource)

    with over(store, save_resource=save) as processor:
        answer = answer_of(processor.run, "k", append, 1)
    assert isinstance(answer, SaveFailed)
    assert answer.retry_safe
    assert len(store.loads) == 1


def test_a_deadline_that_passes_during_the_backoff_is_a_save_failed_from_the_conflict_and_retry_safe(
    clock: VirtualTime,
) -> None:
    conflict = Conflict()
    store = Store(conflict)
    with over(store) as processor:
        callers = [spawn(processor, append, value) for value in range(3)]
        clock.settle()
        clock.spend(6)  # something else keeps the hub
        answers = all_of(callers)
    assert [(type(answer), answer.__cause__, answer.retry_safe) for answer in answers] == [
        (SaveFailed, conflict, True)
    ] * 3
    assert len(store.loads) == 1


@pytest.mark.parametrize(
    ("phase", "retry_safe"), [("load", True), ("operations", True), ("save", False)], ids=["load", "operations", "save"]
)
def test_a_deadline_inside_a_later_attempt_is_a_batch_timeout_of_its_phase(
    clock: VirtualTime, phase: str, retry_safe: bool
) -> None:
    store = Store(Conflict())

    def hang_in(now: str) -> None:
        if now == phase and store.saves:
            gevent.sleep(100)

    def load(key: str) -> list[Any]:
        hang_in("load")
        return store.load(key)

    def operation(resource: list[Any]) -> None:
        hang_in("operations")

    def save(key: str, resource: list[Any]) -> None:
        hang_in("save")
        store.save(key, resource)

    with over(store, load_resource=load, save_resource=save) as processor:
        answers = all_of([spawn(processor, operation) for _ in range(2)])
        assert clock.now() == pytest.approx(5)
    for answer in answers:
        assert type(answer) is BatchTimeout
        assert answer.phase == phase
        assert answer.retry_safe is retry_safe


def test_a_load_that_fails_in_a_later_attempt_is_a_load_failed_for_everybody(clock: VirtualTime) -> None:
    store = Store(Conflict())
    gone = OSError("gone")

    def load(key: str) -> list[Any]:
        if store.saves:
            raise gone
        return store.load(key)

    with over(store, load_resource=load) as processor:
        answers = all_of([spawn(processor, append, value) for value in range(3)])
    assert [(type(answer), answer.__cause__, answer.retry_safe) for answer in answers] == [(LoadFailed, gone, True)] * 3


# Not saved, and no conflict


@pytest.mark.parametrize("error", [NotSaved("no"), OSError("no"), TimeoutError()], ids=repr)
def test_a_save_that_fails_without_a_conflict_ends_the_batch_with_no_replay(
    clock: VirtualTime, error: Exception
) -> None:
    store = Store(error)
    with over(store) as processor:
        answers = all_of([spawn(processor, append, value) for value in range(3)])
    assert [type(answer) for answer in answers] == [SaveFailed] * 3
    assert all(answer.retry_safe is isinstance(error, NotSaved) for answer in answers)
    assert len(store.loads) == len(store.saves) == 1


def test_a_not_saved_after_a_conflict_ends_the_batch_too(clock: VirtualTime) -> None:
    no = NotSaved()
    store = Store(Conflict(), no)
    with over(store) as processor:
        answer = answer_of(processor.run, "k", append, 1)
    assert (type(answer), answer.__cause__, answer.retry_safe, len(store.saves)) == (SaveFailed, no, True, 2)


def test_a_conflict_of_ones_own_kind_is_one(clock: VirtualTime) -> None:
    class StaleVersion(Conflict):
        pass

    store = Store(StaleVersion())
    with over(store) as processor:
        assert processor.run("k", append, 1) == 1
    assert len(store.saves) == 2


def test_a_conflict_that_an_operation_raises_is_its_callers_and_no_replay(clock: VirtualTime) -> None:
    store = Store()
    mine = Conflict("mine")

    def raise_it(resource: list[Any]) -> None:
        raise mine

    with over(store, clean_errors=(Conflict,)) as processor:
        raised, returned = all_of([spawn(processor, raise_it), spawn(processor, append, 1)])
    assert raised is mine
    assert returned == 1
    assert len(store.loads) == len(store.saves) == 1


# Operations that raise


def test_an_operation_that_raises_a_clean_error_costs_no_second_load(clock: VirtualTime) -> None:
    store = Store()
    with over(store, clean_errors=(Exception,)) as processor:
        answers = all_of([spawn(processor, append, 1), spawn(processor, refuse, 2), spawn(processor, append, 3)])
    assert (answers[0], type(answers[1]), answers[2]) == (1, KeyError, 2)
    assert store.saved == [1, 3]
    assert len(store.loads) == 1


def test_what_an_operation_that_raised_has_changed_is_never_saved_and_its_caller_gets_its_exception(
    clock: VirtualTime,
) -> None:
    store = Store()
    with over(store, clean_errors=(KeyError,)) as processor:
        answers = all_of(
            [
                spawn(processor, append, 1),
                spawn(processor, change_half_way, 2),
                spawn(processor, refuse, 3),
                spawn(processor, append, 4),
            ]
        )
    assert (answers[0], answers[3]) == (1, 2)
    assert (type(answers[1]), answers[1].args) == (Half, (2,))
    assert (type(answers[2]), answers[2].args) == (KeyError, (3,))
    assert store.saves == [[1, 4]]
    assert len(store.loads) == 2


def test_a_subclass_of_a_clean_error_is_clean_and_with_no_clean_errors_none_is(clock: VirtualTime) -> None:
    for clean, loads in [((LookupError,), 1), ((KeyError, Half), 1), ((Half,), 2), ((), 2)]:
        store = Store()
        with over(store, clean_errors=clean) as processor:
            answers = all_of([spawn(processor, refuse, 1), spawn(processor, append, 2)])
        assert type(answers[0]) is KeyError
        assert answers[1] == 1
        assert len(store.loads) == loads


def test_a_timeout_inside_an_operation_is_no_exception_and_reaches_its_caller(clock: VirtualTime) -> None:
    store = Store()
    own: list[gevent.Timeout] = []

    def take_too_long(resource: list[Any]) -> None:
        resource.append("half")
        own.append(gevent.Timeout(1))
        with own[-1]:
            gevent.sleep(2)

    with over(store, clean_errors=(Exception,)) as processor:
        answers = all_of([spawn(processor, append, 1), spawn(processor, take_too_long), spawn(processor, append, 2)])
    assert answers == [1, own[-1], 2]
    assert store.saves == [[1, 2]]
    assert len(store.loads) == 2


def test_a_timeout_among_the_clean_errors_is_clean(clock: VirtualTime) -> None:
    store = Store()
    own = gevent.Timeout(1)

    def take_too_long(resource: list[Any]) -> None:
        with own:
            gevent.sleep(2)

    with over(store, clean_errors=(gevent.Timeout,)) as processor:
        assert all_of([spawn(processor, append, 1), spawn(processor, take_too_long)]) == [1, own]
    assert len(store.loads) == 1


@pytest.mark.parametrize("options", [{}, {"copy_resource": None}], ids=str)
def test_what_raised_is_applied_again_with_all_the_others_to_what_somebody_else_has_saved(
    clock: VirtualTime, options: dict[str, Any]
) -> None:
    store = Store(Conflict(), Conflict())
    seen: list[int] = []

    def refuse_before_the_third_save(resource: list[Any]) -> str:
        seen.append(len(store.saves))
        resource.append("mine")
        if len(store.saves) < 2:
            raise Half
        return "of the last attempt"

    with over(store, **options) as processor:
        callers = [spawn(processor, append, 1), spawn(processor, refuse_before_the_third_save)]
        assert all_of(callers) == [1, "of the last attempt"]
    assert set(seen) == {0, 1, 2}
    assert store.saves == [[1], [1], [1, "mine"]]


def test_an_operation_that_raises_only_in_a_replay_is_undone_there(clock: VirtualTime) -> None:
    store = Store(Conflict())

    def break_later(resource: list[Any]) -> str:
        if store.saves:
            change_half_way(resource, 1)
        resource.append("first")
        return "of the first attempt"

    with over(store, clean_errors=()) as processor:
        broken, fine = all_of([spawn(processor, break_later), spawn(processor, append, 2)])
    assert type(broken) is Half
    assert fine == 1
    assert store.saves == [["first", 2], [2]]
    assert store.saved == [2]


@pytest.mark.parametrize("options", [{}, {"copy_resource": None}], ids=str)
def test_operations_that_raise_use_up_no_attempts_of_the_conflicts(clock: VirtualTime, options: dict[str, Any]) -> None:
    store = Store(Conflict())
    with over(store, max_attempts=2, **options) as processor:
        callers = [spawn(processor, change_half_way, value) for value in range(6)]
        fine = spawn(processor, append, 1)
        assert [type(answer) for answer in all_of(callers)] == [Half] * 6
        assert fine.get() == 1
    assert store.saved == [1]


def test_a_batch_in_which_every_operation_raises_saves_nothing(clock: VirtualTime) -> None:
    store = Store()
    with over(store) as processor:
        answers = all_of([spawn(processor, change_half_way, value) for value in range(50)])
    assert [answer.args for answer in answers] == [(value,) for value in range(50)]
    assert store.saves == []
    assert len(store.loads) == 2


@pytest.mark.parametrize("batching", [True, False])
def test_a_batch_whose_only_operation_raises_is_loaded_once(clock: VirtualTime, *, batching: bool) -> None:
    store = Store()
    with over(store, batching=batching) as processor:
        assert type(spawn(processor, change_half_way, 1).get()) is Half
    assert len(store.loads) == 1


def test_the_scope_of_an_attempt_with_a_broken_operation_is_rolled_back(clock: VirtualTime) -> None:
    noted: list[Any] = []

    @contextmanager
    def scope(key: str) -> Iterator[list[Any]]:
        resource: list[Any] = []
        try:
            yield resource
        except Exception as error:
            noted.append(("rolled back", type(error)))
            raise
        noted.append(("committed", tuple(resource)))

    with Processor(open_resource=scope, min_duration=0, clean_errors=()) as processor:
        callers = [spawn(processor, append, 1), spawn(processor, change_half_way, 2)]
        assert [type(answer) for answer in all_of(callers)] == [int, Half]
    assert noted == [("rolled back", Half), ("committed", (1,))]


def broken_places(where: str) -> set[int]:
    if where == "last":
        return set(range(900, 1000))
    if where == "first":
        return set(range(100))
    if where == "every tenth":
        return set(range(0, 1000, 10))
    return set(random.Random(int(where)).sample(range(1000), 100))


@pytest.mark.parametrize("where", ["last", "first", "every tenth", "1", "2"])
@pytest.mark.parametrize("batch_size", [None, 1000])
def test_a_hundred_operations_that_raise_among_a_thousand_cost_one_load_and_less_than_one_more_pass(
    clock: VirtualTime, where: str, batch_size: int | None
) -> None:
    store = Store()
    broken = broken_places(where)
    runs = [0] * 1000

    def apply(resource: list[Any], number: int) -> int:
        runs[number] += 1
        if number in broken:
            change_half_way(resource, number)
        return append(resource, number)

    with over(store, max_batch_size=batch_size) as processor:
        answers = all_of([spawn(processor, apply, number) for number in range(1000)])
    good = [number for number in range(1000) if number not in broken]
    assert store.saves == [good]
    assert [answers[number] for number in good] == list(range(1, 901))
    for number in broken:
        assert type(answers[number]) is Half
        assert answers[number].args == (number,)
    assert len({id(answers[number]) for number in broken}) == 100
    assert len(store.loads) == 2
    assert all(runs[number] == 1 for number in broken if number != min(broken))
    assert sum(runs) - (min(broken) + 1) <= 2 * 1000  # besides what came before the first one, in the first attempt


def test_a_good_operation_is_not_judged_by_what_a_broken_one_left_behind(clock: VirtualTime) -> None:
    """The second sees the change that the first left half-way, and must not be refused for it."""
    store = Store()

    def only_if_empty(resource: list[Any]) -> str:
        if resource:
            raise Half("not empty")
        return "empty"

    with over(store, clean_errors=()) as processor:
        broken, fine = all_of([spawn(processor, change_half_way, 1), spawn(processor, only_if_empty)])
    assert type(broken) is Half
    assert fine == "empty"


@pytest.mark.parametrize("count", [10, 100])
def test_a_clean_error_that_only_a_broken_operation_caused_is_not_what_its_caller_gets(
    clock: VirtualTime, count: int
) -> None:
    store = Store()

    def only_if_whole(resource: list[Any]) -> str:
        if any(str(one).startswith("half") for one in resource):
            raise KeyError("half-way")
        resource.append("whole")
        return "whole"

    with over(store, clean_errors=(KeyError,)) as processor:
        callers = [spawn(processor, change_half_way, value) for value in range(count)]
        fine = [spawn(processor, only_if_whole) for _ in range(10)]
        assert [type(answer) for answer in all_of(callers)] == [Half] * count
        assert all_of(fine) == ["whole"] * 10
    assert store.saved == ["whole"] * 10


def test_broken_operations_that_arrive_while_the_window_is_open_are_out_and_the_window_stays_open(
    clock: VirtualTime,
) -> None:
    store = Store()
    with over(store, clean_errors=(), min_duration=1) as processor:
        callers = []
        for value in range(4):
            callers.append(spawn(processor, append, value))
            callers.append(spawn(processor, change_half_way, value))
            clock.advance(0.2)
        answers = all_of(callers)
        assert clock.now() == pytest.approx(1)
    assert answers[::2] == [1, 2, 3, 4]
    assert [type(answer) for answer in answers[1::2]] == [Half] * 4
    assert store.saves == [[0, 1, 2, 3]]

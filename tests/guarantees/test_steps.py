"""Attempts that are judged step by step, and scopes that look at what an operation has done (guarantees 18 and 20)."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import (
    BatchAborted,
    BatchTimeout,
    Conflict,
    NotSaved,
    Processor,
    Rejected,
    SaveFailed,
    current_batch,
)
from geventbatch.errors import Repeated, TooEarly, Undecided
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from geventbatch.testing import VirtualTime


class Refused(Exception):
    """What the database says to a bad value."""


class Own(Exception):
    """An operation's."""


class Ledger:
    """Keeps a list of marks and the rows beside it for each key; it takes no mark that is in `bad`.

    A transaction that was spoiled refuses everything until it goes back.
    """

    keeps_outcomes = True

    def __init__(self) -> None:
        self.kept: defaultdict[Any, list[Any]] = defaultdict(list)
        self.rows: list[object] = []
        self.outcomes: dict[str, str] = {}
        self.bad: set[Any] = set()
        self.bad_together: set[Any] = set()
        """Refused by COMMIT, if all of them are there."""
        self.has_steps = True
        self.log: list[str] = []
        self.raises: defaultdict[str, list[Any]] = defaultdict(list)
        """By what is called: what each call raises, or what it calls."""
        self.verdicts: dict[type[BaseException], NotSaved] = {}
        self.looked: list[NotSaved | None] = []
        """What `operation_returned` gives, one after the other."""
        self.counted = 0

    def __call__(self, key: Any) -> LedgerScope:
        return LedgerScope(self, key)

    def processor(self, **options: Any) -> Processor[list[Any]]:
        return Processor(open_resource=self, **({"min_duration": 0, "max_duration": 5} | options))

    def meet(self, what: str) -> None:
        self.log.append(what)
        if self.raises[what] and (met := self.raises[what].pop(0)) is not None:
            if isinstance(met, BaseException):
                raise met
            met()

    def times(self, what: str) -> int:
        return self.log.count(what)


class LedgerScope:
    takes_rows = deletes = True

    def __init__(self, ledger: Ledger, key: Any) -> None:
        self.ledger = ledger
        self.key = key
        self.resource: list[Any] = []
        self.written: tuple[list[Any], list[object]] = [], []
        self.stepwise = self.spoiled = False

    @property
    def steps(self) -> bool:
        return self.ledger.has_steps

    def __enter__(self) -> list[Any]:
        self.ledger.meet("load")
        self.resource = list(self.ledger.kept[self.key])
        self.written = list(self.resource), []
        return self.resource

    def begin_steps(self) -> None:
        self.ledger.meet("begin_steps")
        self.stepwise = True

    def keep(self) -> None:
        assert self.stepwise
        assert not current_batch().deleted
        self.ledger.meet("keep")
        self.write()

    def undo(self) -> list[Any]:
        assert self.stepwise
        self.ledger.meet("undo")
        self.spoiled = False
        resource, rows = self.written
        assert current_batch().rows == rows  # what the operation added was dropped before
        self.resource = list(resource)
        return self.resource

    def write(self) -> None:
        rows = current_batch().rows
        bad = [mark for mark in (*self.resource, *rows) if mark in self.ledger.bad]
        if bad or self.spoiled:
            self.spoiled = True
            raise Rejected("a constraint") from Refused(*bad)
        self.written = list(self.resource), rows

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.ledger.log.append(f"left for {type(error).__name__}")
            return
        batch = current_batch()
        found = {key: told for key, told in self.ledger.outcomes.items() if key in batch.outcomes}
        if found:
            raise Repeated("there already", outcomes=found)
        self.ledger.meet("save")
        self.write()
        self.ledger.meet("commit")
        together = self.ledger.bad_together
        if together and together <= set(self.resource):
            raise Rejected("a deferred constraint") from Refused("together")
        self.ledger.outcomes |= batch.outcomes
        self.ledger.rows += self.written[1]
        self.ledger.counted += 1
        if batch.deleted:
            del self.ledger.kept[self.key]
        else:
            self.ledger.kept[self.key] = self.written[0]

    def operation_raised(self, error: BaseException) -> NotSaved | None:
        verdict = self.ledger.verdicts.get(type(error))
        self.spoiled = self.spoiled or verdict is not None
        return verdict

    def operation_returned(self) -> NotSaved | None:
        self.ledger.log.append("looked")
        return self.ledger.looked.pop(0) if self.ledger.looked else None

    def recorded(self, keys: list[str]) -> dict[str, str]:
        self.ledger.meet("recorded")
        return {key: self.ledger.outcomes[key] for key in keys if key in self.ledger.outcomes}


class Shelf:
    """Many `LedgerScope`s in one."""

    takes_rows = deletes = steps = True

    def __init__(self, ledger: Ledger, keys: list[Any]) -> None:
        self.ledger = ledger
        self.scopes = {key: LedgerScope(ledger, key) for key in keys}
        self.resources: dict[Any, list[Any]] = {}

    def __enter__(self) -> dict[Any, list[Any]]:
        self.resources = {key: scope.__enter__() for key, scope in self.scopes.items()}
        return self.resources

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        for key in list(self.scopes if error else self.resources):
            self.scopes[key].__exit__(kind, error, traceback)

    def operation_raised(self, error: BaseException) -> NotSaved | None:
        return self.scopes[current_batch().key].operation_raised(error)

    def operation_returned(self) -> NotSaved | None:
        return self.scopes[current_batch().key].operation_returned()


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def append(resource: list[Any], mark: Any) -> Any:
    resource.append(mark)
    return mark


def append_with_row(resource: list[Any], mark: Any) -> Any:
    current_batch().add_row(f"row {mark}")
    return append(resource, mark)


def append_looked_at(resource: list[Any], mark: Any) -> Any:
    current_batch().add_row(f"row {mark}")
    current_batch().ask_scope()
    return append(resource, mark)


def raise_it(resource: list[Any], error: BaseException) -> None:
    current_batch().add_row("half")
    resource.append("half")
    raise error


def remove_all(resource: list[Any]) -> str:
    current_batch().delete()
    return "deleted"


def run_all(clock: VirtualTime, processor: Processor[list[Any]], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The answers of one batch, a result or an exception each; a call is an operation and its arguments."""
    callers = [gevent.spawn(answer_of, processor.run, "k", *call) for call in calls]
    clock.advance(50)
    return [caller.get(block=False) for caller in callers]


def appends(marks: Iterable[Any]) -> list[tuple[Any, ...]]:
    return [(append, mark) for mark in marks]


def kinds(answers: Iterable[Any]) -> list[Any]:
    return [type(answer) if isinstance(answer, BaseException) else answer for answer in answers]


# -- several operations that the store refuses ---------------------------------------------------------------


def test_half_of_a_thousand_are_refused_and_the_others_saved_in_their_order_with_five_loads(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = set(range(0, 1000, 2))
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append_with_row, number) for number in range(1000)])
    good = list(range(1, 1000, 2))
    assert kinds(answers) == [Refused if number in ledger.bad else number for number in range(1000)]
    assert [answer.args for answer in answers[::2]] == [(number,) for number in range(0, 1000, 2)]
    assert ledger.kept["k"] == good
    assert ledger.rows == [f"row {number}" for number in good]
    # All, the first half, and then step by step its first quarter, its second one, and the second half.
    assert ledger.times("load") == 5
    assert ledger.times("keep") == 1000
    assert ledger.times("undo") == 500


def test_one_refusal_is_halved_without_steps_before_the_second(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.bad = {0}
    with ledger.processor() as processor:
        assert kinds(run_all(clock, processor, appends(range(2)))) == [Refused, 1]
    assert ledger.times("keep") == 1  # of the second half, behind the second refusal
    assert ledger.kept["k"] == [1]


def test_a_scope_without_steps_is_halved_as_far_as_it_takes(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.bad = set(range(0, 200, 2))
    ledger.has_steps = False
    with ledger.processor() as processor:
        answers = run_all(clock, processor, appends(range(200)))
    assert kinds(answers) == [Refused if number in ledger.bad else number for number in range(200)]
    assert ledger.kept["k"] == list(range(1, 200, 2))
    assert ledger.times("begin_steps") == ledger.times("keep") == 0


def append_unless(resource: list[Any], mark: Any, there: Any) -> Any:
    if there in resource:
        resource.append("half")
        raise Own(there)
    return append(resource, mark)


@pytest.mark.parametrize("steps", [False, True])
def test_who_raised_for_what_is_refused_later_is_applied_again(
    clock: VirtualTime, ledger: Ledger, *, steps: bool
) -> None:
    ledger.bad, ledger.has_steps = {"bad"}, steps
    calls = [(append, "bad"), (append_unless, 1, "bad"), (append, 2), (append_unless, 3, 2)]
    with ledger.processor(clean_errors=()) as processor:
        assert kinds(run_all(clock, processor, calls)) == [Refused, 1, 2, Own]
    assert ledger.kept["k"] == [1, 2]


@pytest.mark.parametrize("steps", [False, True])
def test_who_raised_for_what_several_made_that_are_refused_later_is_applied_again(
    clock: VirtualTime, ledger: Ledger, *, steps: bool
) -> None:
    ledger.bad, ledger.has_steps = {"bad", "worse"}, steps
    calls = [(append, "bad"), (append_unless, 1, "bad"), (append, "worse"), (append_unless, 2, "worse"), (append, 3)]
    with ledger.processor(clean_errors=()) as processor:
        assert kinds(run_all(clock, processor, calls)) == [Refused, 1, Refused, 2, 3]
    assert ledger.kept["k"] == [1, 2, 3]


def test_in_steps_an_operation_that_raises_is_undone_and_costs_no_load(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.bad = {0, 1, "bad row"}
    calls = [*appends(range(4)), *[(raise_it, Own(number)) for number in range(50)], (append_with_row, 4)]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, calls)
    assert kinds(answers) == [Refused, Refused, 2, 3, *[Own] * 50, 4]
    assert [answer.args for answer in answers[4:-1]] == [(number,) for number in range(50)]
    assert ledger.kept["k"] == [2, 3, 4]
    assert ledger.rows == ["row 4"]
    assert ledger.times("load") <= 12
    assert (ledger.times("keep"), ledger.times("undo")) == (5, 52)


def test_in_steps_an_error_that_is_named_clean_is_undone_too(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.bad = {0, 1}
    with ledger.processor(clean_errors=(Own,)) as processor:
        assert kinds(run_all(clock, processor, [*appends([0, 1]), (raise_it, Own()), (append, 2)])) == [
            Refused,
            Refused,
            Own,
            2,
        ]
    assert "half" not in ledger.kept["k"]


def test_in_steps_an_operation_that_spoils_the_transaction_is_undone_and_costs_no_load(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.verdicts = {Own: Rejected("the transaction is aborted")}
    calls = [(raise_it, Own(number)) if number % 2 else (append, number) for number in range(1000)]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, calls)
    assert kinds(answers) == [Own if number % 2 else number for number in range(1000)]
    assert ledger.kept["k"] == list(range(0, 1000, 2))
    assert ledger.times("load") == 6  # one for each of the first five
    assert ledger.times("undo") == 500  # those five too, by what is there without the others


def test_what_is_refused_is_judged_again_by_what_a_replay_loads(clock: VirtualTime, ledger: Ledger) -> None:
    """An answer is of the last attempt: here the mark is good by then."""

    def better() -> None:
        ledger.bad = set()
        ledger.kept["k"] = ["somebody else's"]
        raise Conflict("somebody else")

    ledger.bad = {0, 2}
    ledger.verdicts = {Own: Undecided("a flush of what came before")}
    ledger.raises["commit"] = [better]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [*appends(range(4)), (flushes, ledger)])
    assert answers == [0, 1, 2, 3, "fine"]
    assert ledger.kept["k"] == ["somebody else's", 0, 1, 2, 3]
    assert ledger.times("undo") == 2


def test_a_commit_that_is_refused_in_steps_is_halved_and_each_half_goes_step_by_step(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = {0, 1}
    ledger.bad_together = {6, 7}
    with ledger.processor() as processor:
        answers = run_all(clock, processor, appends(range(8)))
    assert kinds(answers) == [Refused, Refused, 2, 3, 4, 5, 6, Refused]
    assert answers[7].args == ("together",)
    assert ledger.kept["k"] == [2, 3, 4, 5, 6]
    assert ledger.times("begin_steps") == ledger.times("load") - 2


def test_the_deadline_ends_a_step_and_nothing_of_the_attempt_is_saved(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.bad = {0, 1}
    ledger.raises["keep"] = [partial(gevent.sleep, 10)]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, appends(range(4)))
    left = [answer for answer in answers if isinstance(answer, BatchTimeout)]
    assert left
    assert {(error.phase, error.retry_safe) for error in left} == {("operations", True)}
    assert len(ledger.kept["k"]) + len(left) + kinds(answers).count(Refused) == 4


@pytest.mark.parametrize("what", ["begin_steps", "keep", "undo"])
def test_a_conflict_in_a_step_replays_the_attempt(clock: VirtualTime, ledger: Ledger, what: str) -> None:
    ledger.bad = {0, 3, 5}
    ledger.raises[what] = [Conflict("deadlock")]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, appends(range(8)))
    assert kinds(answers) == [Refused, 1, 2, Refused, 4, Refused, 6, 7]
    assert ledger.kept["k"] == [1, 2, 4, 6, 7]
    assert "left for Conflict" in ledger.log


@pytest.mark.parametrize("what", ["begin_steps", "keep"])
@pytest.mark.parametrize("error", [NotSaved("the connection is lost"), OSError("gone")])
def test_another_error_in_a_step_ends_the_batch(
    clock: VirtualTime, ledger: Ledger, what: str, error: Exception
) -> None:
    ledger.bad = {0, 1, 2}
    ledger.raises[what] = [error]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, appends(range(4)))
        failed = [answer for answer in answers if isinstance(answer, SaveFailed)]
        assert failed
        assert all(answer.retry_safe for answer in failed)
        assert all(error in {answer.__cause__, answer.__cause__ and answer.__cause__.__cause__} for answer in failed)
        assert ledger.kept["k"] == []
        assert f"left for {type(error).__name__}" in ledger.log
        assert kinds(run_all(clock, processor, appends([5]))) == [5]


@pytest.mark.parametrize("error", [NotSaved("no such savepoint"), Rejected("no transaction"), OSError("gone")])
def test_an_operation_that_cannot_be_undone_is_out_and_the_rest_is_replayed(
    clock: VirtualTime, ledger: Ledger, error: Exception
) -> None:
    ledger.bad = {0, 1, 2}
    ledger.raises["undo"] = [error] * 3
    with ledger.processor() as processor:
        answers = run_all(clock, processor, appends(range(6)))
    assert kinds(answers) == [Refused, Refused, Refused, 3, 4, 5]
    assert ledger.kept["k"] == [3, 4, 5]


def test_a_kill_in_a_step_ends_the_batch_and_is_told_as_a_kill(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.bad = {0, 1, 2, 3}
    ledger.raises["keep"] = [gevent.GreenletExit("kill")]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, appends(range(4)))
        killed = [answer for answer in answers if isinstance(answer, BatchAborted)]
        assert killed
        assert {(type(answer), answer.retry_safe) for answer in killed} == {(BatchAborted, True)}
        assert kinds(run_all(clock, processor, appends([5]))) == [5]


def test_a_delete_in_steps_is_saved_as_ever_and_those_behind_it_get_the_next_load(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = {0, 1}
    calls = [*appends([0, 1]), (append_with_row, 2), (remove_all,), *appends([1, 3])]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, calls)
    assert kinds(answers) == [Refused, Refused, 2, "deleted", Refused, 3]
    assert ledger.kept["k"] == [3]
    assert ledger.rows == ["row 2"]


def test_with_batching_off_a_refused_operation_gets_what_the_store_said(ledger: Ledger) -> None:
    ledger.bad = {1}
    processor = ledger.processor(batching=False)
    with pytest.raises(Refused):
        processor.run("k", append, 1)
    assert processor.run("k", append, 2) == 2
    assert ledger.kept["k"] == [2]


# -- idempotency keys -----------------------------------------------------------------------------------------


def keyed(processor: Processor[Any], key: str, mark: Any) -> gevent.Greenlet[..., Any]:
    return gevent.spawn(answer_of, partial(processor.run, idempotency_key=key), "k", append, mark)


def test_in_steps_only_the_outcomes_of_those_who_were_saved_are_recorded(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.bad = {0, 2, 4, 5}
    with ledger.processor() as processor:
        callers = [keyed(processor, f"key-{number}", number) for number in range(10)]
        clock.advance(50)
        answers = [caller.get(block=False) for caller in callers]
    assert kinds(answers) == [Refused if number in ledger.bad else number for number in range(10)]
    assert sorted(ledger.outcomes) == [f"key-{number}" for number in range(10) if number not in ledger.bad]


def test_in_steps_who_was_answered_before_gets_that_answer_though_the_store_would_refuse_it_now(
    clock: VirtualTime, ledger: Ledger
) -> None:
    with ledger.processor() as processor:
        first = keyed(processor, "again", 7)
        clock.advance(50)
        assert first.get(block=False) == 7
        ledger.bad = {0, 1, 7}
        ledger.kept["k"] = []
        ledger.verdicts = {Own: Undecided("a flush of what came before")}
        callers = [
            gevent.spawn(answer_of, processor.run, "k", raise_it, Own()),  # so that it begins with steps
            *[keyed(processor, f"new-{number}", number) for number in range(2)],
            keyed(processor, "again", 7),
            keyed(processor, "new-2", 2),
        ]
        clock.advance(50)
        answers = [caller.get(block=False) for caller in callers]
    assert kinds(answers) == [Own, Refused, Refused, 7, 2]
    assert ledger.kept["k"] == [2]
    assert sorted(ledger.outcomes) == ["again", "new-2"]


def test_where_all_have_raised_a_refused_record_is_of_whom_it_records(clock: VirtualTime, ledger: Ledger) -> None:
    def refuse(resource: list[Any], number: int) -> None:
        raise Own(number)

    ledger.has_steps = False
    ledger.raises["save"] = [Rejected("too long"), None, Rejected("too long")]
    with ledger.processor(clean_errors=(Own,)) as processor:
        callers = [
            gevent.spawn(answer_of, partial(processor.run, idempotency_key=f"key-{number}"), "k", refuse, number)
            for number in range(2)
        ]
        clock.advance(50)
        assert kinds(caller.get(block=False) for caller in callers) == [Own, Rejected]
    assert list(ledger.outcomes) == ["key-0"]


# -- a verdict that judges nobody -----------------------------------------------------------------------------


def flushes(resource: list[Any], ledger: Ledger) -> str:
    """A query that sends what operations before it have changed."""
    if any(mark in ledger.bad for mark in resource):
        raise Own("autoflush")
    return "fine"


def test_an_undecided_verdict_repeats_the_batch_step_by_step_and_finds_who_it_was(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = {2}
    ledger.verdicts = {Own: Undecided("a flush of what came before")}
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [*appends([1, 2]), (flushes, ledger), (append, 3)])
    assert kinds(answers) == [1, Refused, "fine", 3]
    assert ledger.kept["k"] == [1, 3]
    assert (ledger.times("load"), ledger.times("begin_steps")) == (2, 1)


def test_an_undecided_verdict_in_steps_is_of_the_operation_that_met_it(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.verdicts = {Own: Undecided("a flush")}
    with ledger.processor() as processor:
        assert kinds(run_all(clock, processor, [(append, 1), (raise_it, Own()), (append, 2)])) == [1, Own, 2]
    assert ledger.kept["k"] == [1, 2]
    assert ledger.times("load") == 2


def test_without_steps_an_undecided_verdict_is_of_the_operation_that_met_it(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.has_steps = False
    ledger.verdicts = {Own: Undecided("a flush")}
    with ledger.processor() as processor:
        assert kinds(run_all(clock, processor, [(append, 1), (raise_it, Own()), (append, 2)])) == [1, Own, 2]
    assert ledger.kept["k"] == [1, 2]
    assert ledger.times("begin_steps") == 0


def test_those_who_come_while_the_window_is_open_join_the_batch_that_goes_step_by_step(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = {2, 9}
    ledger.verdicts = {Own: Undecided("a flush of what came before")}
    with ledger.processor(min_duration=1) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "k", *call) for call in [*appends([1, 2]), (flushes, ledger)]]
        clock.advance(0.5)
        callers += [gevent.spawn(answer_of, processor.run, "k", append, mark) for mark in (9, 3)]
        clock.advance(5)
        assert kinds(caller.get(block=False) for caller in callers) == [1, Refused, "fine", Refused, 3]
    assert ledger.counted == 1
    assert ledger.kept["k"] == [1, 3]


# -- scopes that look at what an operation has done -------------------------------------------------------------


def test_only_an_operation_that_is_doubted_is_looked_at(clock: VirtualTime, ledger: Ledger) -> None:
    with ledger.processor() as processor:
        assert run_all(clock, processor, [(append, 1), (append_looked_at, 2), (append, 3)]) == [1, 2, 3]
        assert ledger.times("looked") == 1
        run_all(clock, processor, appends([4]))
    assert ledger.times("looked") == 1
    assert ledger.kept["k"] == [1, 2, 3, 4]


def test_in_steps_only_an_operation_that_is_doubted_is_looked_at_and_those_behind_it_are_kept(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = {2, 3}
    ledger.verdicts = {Own: Undecided("a flush")}
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(raise_it, Own()), (append_looked_at, 1), *appends([2, 3, 4])])
    assert kinds(answers) == [Own, 1, Refused, Refused, 4]
    assert (ledger.times("looked"), ledger.times("keep")) == (1, 4)


def test_a_scope_that_doubts_its_own_load_or_save_is_not_asked(clock: VirtualTime, ledger: Ledger) -> None:
    def doubt() -> None:
        current_batch().ask_scope()

    ledger.raises["load"], ledger.raises["save"] = [doubt], [doubt]
    with ledger.processor() as processor:
        assert run_all(clock, processor, appends([1, 2])) == [1, 2]
    assert ledger.times("looked") == 0


@pytest.mark.parametrize("caused", [True, False])
def test_an_operation_that_did_what_it_may_not_is_out_with_what_the_scope_says_and_the_rest_replayed(
    clock: VirtualTime, ledger: Ledger, caused: bool
) -> None:
    ledger.has_steps = False
    verdict = Rejected("it sent COMMIT")
    verdict.__cause__ = RuntimeError("it called commit()") if caused else None
    ledger.looked = [None, verdict, None, None]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append_looked_at, mark) for mark in (1, 2, 3)])
    assert kinds(answers) == [1, RuntimeError if caused else Rejected, 3]
    assert ledger.kept["k"] == [1, 3]
    assert ledger.rows == ["row 1", "row 3"]
    assert ledger.times("load") == 2


def test_without_steps_what_is_before_an_undecided_operation_is_saved_first(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.has_steps = False
    ledger.looked = [None, Undecided("it asked for what came before"), None, None, None]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append_looked_at, mark) for mark in (1, 2, 3)])
    assert answers == [1, 2, 3]
    assert ledger.kept["k"] == [1, 2, 3]
    assert ledger.rows == ["row 1", "row 2", "row 3"]
    assert ledger.times("load") == 3
    assert ledger.times("save") == 2


def test_without_steps_an_undecided_operation_that_nobody_is_before_is_out(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.has_steps = False
    ledger.looked = [Undecided("it asked for what came before"), None]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append_looked_at, mark) for mark in (1, 2)])
    assert kinds(answers) == [Undecided, 2]
    assert ledger.kept["k"] == [2]


def test_in_steps_it_is_undone_and_costs_no_load(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.verdicts = {Own: Undecided("a flush")}
    ledger.looked = [None if mark % 2 else Rejected("it left a savepoint open") for mark in range(100)]
    calls = [(raise_it, Own()), *[(append_looked_at, mark) for mark in range(100)]]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, calls)
    assert kinds(answers) == [Own, *[mark if mark % 2 else Rejected for mark in range(100)]]
    assert ledger.kept["k"] == list(range(1, 100, 2))
    assert ledger.rows == [f"row {mark}" for mark in range(1, 100, 2)]
    assert ledger.times("load") == 2


def test_an_operation_that_swallowed_an_undecided_error_has_the_batch_repeated_step_by_step(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = {1}
    ledger.looked = [Undecided("a flush of what came before was refused")]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (append_looked_at, 2)])
    assert kinds(answers) == [Refused, 2]
    assert ledger.kept["k"] == [2]


def test_a_conflict_that_an_operation_swallowed_replays_the_batch(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.looked = [Conflict("deadlock")]
    with ledger.processor() as processor:
        assert run_all(clock, processor, [(append, 1), (append_looked_at, 2)]) == [1, 2]
    assert (ledger.kept["k"], ledger.rows) == ([1, 2], ["row 2"])
    assert ledger.times("load") == 2


def test_a_connection_that_an_operation_has_lost_ends_the_batch(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.looked = [NotSaved("the connection is lost")]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (append_looked_at, 2), (append, 3)])
    assert kinds(answers) == [SaveFailed] * 3
    assert all(answer.retry_safe for answer in answers)
    assert ledger.kept["k"] == []


def test_an_operation_that_raises_is_judged_by_its_error_alone(clock: VirtualTime, ledger: Ledger) -> None:
    def doubted_and_raises(resource: list[Any]) -> None:
        current_batch().ask_scope()
        raise Own

    with ledger.processor(clean_errors=(Own,)) as processor:
        assert kinds(run_all(clock, processor, [(doubted_and_raises,), (append, 1)])) == [Own, 1]
    assert ledger.times("looked") == 0


def test_an_operation_that_deletes_is_looked_at_before_it_does(clock: VirtualTime, ledger: Ledger) -> None:
    def delete_looked_at(resource: list[Any]) -> str:
        current_batch().ask_scope()
        return remove_all(resource)

    ledger.has_steps = False
    ledger.looked = [Rejected("no")]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append, 1), (delete_looked_at,), (append, 2), (delete_looked_at,)])
    assert kinds(answers) == [1, Rejected, 2, "deleted"]
    assert "k" not in ledger.kept


def test_a_scope_that_says_anything_but_a_not_saved_is_told_so(clock: VirtualTime, ledger: Ledger) -> None:
    ledger.looked = [True]  # type: ignore[list-item]
    with ledger.processor() as processor:
        answers = run_all(clock, processor, [(append_looked_at, 1)])
    assert kinds(answers) == [BatchAborted]
    assert "operation_returned returned True" in str(answers[0])


def test_with_batching_off_an_operation_is_looked_at_too(ledger: Ledger) -> None:
    ledger.looked = [Rejected("it sent COMMIT"), Conflict("deadlock"), None]
    processor = ledger.processor(batching=False)
    with pytest.raises(Rejected):
        processor.run("k", append_looked_at, 1)
    assert processor.run("k", append_looked_at, 2) == 2
    assert ledger.kept["k"] == [2]


def test_with_batching_off_the_scope_of_many_keys_looks_too(ledger: Ledger) -> None:
    ledger.looked = [Rejected("it sent COMMIT"), None]
    processor = Processor(open_resources=partial(Shelf, ledger), min_duration=0, batching=False)
    with pytest.raises(Rejected):
        processor.run("k", append_looked_at, 1)
    assert processor.run("k", append_looked_at, 2) == 2
    assert ledger.kept["k"] == [2]


# -- many keys ------------------------------------------------------------------------------------------------------


def run_bulk(clock: VirtualTime, processor: Processor[list[Any]], calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, *call) for call in calls]
    clock.advance(50)
    return [caller.get(block=False) for caller in callers]


@pytest.mark.parametrize("kind", [Rejected, Undecided, Conflict])
@pytest.mark.parametrize("raises", [True, False])
def test_what_an_operation_did_to_the_transaction_of_a_bulk_replays_all_of_its_keys(
    clock: VirtualTime, ledger: Ledger, kind: type[NotSaved], raises: bool
) -> None:
    ledger.verdicts = {Own: kind("the transaction is aborted")}
    ledger.looked = [kind("the transaction is aborted")]
    bad = (raise_it, Own()) if raises else (append_looked_at, 9)
    calls = [("a", append, 1), ("a", *bad), ("b", append, 2), ("c", append, 3)]
    with Processor(open_resources=partial(Shelf, ledger), min_duration=0, max_duration=5, max_attempts=3) as processor:
        answers = run_bulk(clock, processor, calls)
    if kind is Rejected or (kind is Undecided and raises):
        assert kinds(answers) == [1, Own if raises else kind, 2, 3]
        assert ledger.kept == {"a": [1], "b": [2], "c": [3]}
    elif kind is Conflict and raises:  # it does so each time
        assert kinds(answers) == [SaveFailed, SaveFailed, 2, 3]
        assert ledger.kept == {"a": [], "b": [2], "c": [3]}
    else:
        assert kinds(answers) == [1, 9, 2, 3]
        assert ledger.kept == {"a": [1, 9], "b": [2], "c": [3]}


@pytest.mark.parametrize("kind", [Undecided, TooEarly])
def test_an_operation_of_a_bulk_is_not_to_blame_for_what_those_of_other_keys_have_changed(
    clock: VirtualTime, ledger: Ledger, kind: type[NotSaved]
) -> None:
    ledger.bad = {1}  # which the database refuses when the second key's operation has it sent
    ledger.looked = [kind("what came before was refused")]
    calls: list[tuple[Any, ...]] = [("a", append, 1), ("b", append_looked_at, 2), ("b", append, 3), ("c", append, 4)]
    with Processor(open_resources=partial(Shelf, ledger), min_duration=0, max_duration=5) as processor:
        answers = run_bulk(clock, processor, calls)
    assert kinds(answers) == [Refused, 2, 3, 4]
    assert ledger.kept == {"a": [], "b": [2, 3], "c": [4]}
    assert ledger.rows == ["row 2"]
    assert ledger.times("looked") == 2  # the second time it is without the others


def test_an_operation_of_a_bulk_that_is_undecided_with_nothing_before_it_is_told_so(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.looked = [Undecided("what came before was refused") for _ in range(2)]
    calls: list[tuple[Any, ...]] = [("a", append, 1), ("b", append_looked_at, 2), ("b", append, 3)]
    with Processor(open_resources=partial(Shelf, ledger), min_duration=0, max_duration=5) as processor:
        answers = run_bulk(clock, processor, calls)
    assert kinds(answers) == [1, Undecided, 3]
    assert ledger.kept == {"a": [1], "b": [3]}


def test_nothing_is_applied_any_more_in_the_transaction_of_a_bulk_that_was_spoiled(
    clock: VirtualTime, ledger: Ledger
) -> None:
    rounds: list[int] = []

    def note(resource: list[Any]) -> None:
        rounds.append(ledger.times("load"))

    ledger.looked = [Rejected("the transaction is aborted")]
    calls: list[tuple[Any, ...]] = [("a", append_looked_at, 9), ("b", note)]
    with Processor(open_resources=partial(Shelf, ledger), min_duration=0, max_duration=5) as processor:
        assert kinds(run_bulk(clock, processor, calls)) == [Rejected, None]
    assert rounds == [3]


def test_a_lost_connection_of_a_bulk_ends_the_batch_that_met_it_and_replays_the_others(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.looked = [NotSaved("the connection is lost")]
    calls = [("a", append, 1), ("a", append_looked_at, 9), ("b", append, 2)]
    with Processor(open_resources=partial(Shelf, ledger), min_duration=0, max_duration=5) as processor:
        answers = run_bulk(clock, processor, calls)
    assert kinds(answers) == [SaveFailed, SaveFailed, 2]
    assert answers[0].retry_safe
    assert ledger.kept == {"a": [], "b": [2]}


def test_a_bulk_in_which_half_of_a_key_s_operations_are_refused_saves_the_other_half_and_all_other_keys(
    clock: VirtualTime, ledger: Ledger
) -> None:
    ledger.bad = set(range(0, 100, 2))
    calls = [("a", append, number) for number in range(100)] + [(key, append, 1) for key in "bcd"]
    with Processor(open_resources=partial(Shelf, ledger), min_duration=0, max_duration=5) as processor:
        answers = run_bulk(clock, processor, calls)
    assert kinds(answers) == [*[Refused if number in ledger.bad else number for number in range(100)], 1, 1, 1]
    assert ledger.kept == {"a": list(range(1, 100, 2)), "b": [1], "c": [1], "d": [1]}

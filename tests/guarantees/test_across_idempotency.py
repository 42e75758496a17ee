"""Idempotency keys in bulks and across keys: one record an operation, saved with all its keys or with none."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import gevent
import pytest

from geventbatch import Conflict, IdempotencyKeyReused, LoadFailed, Rejected, SaveFailed, current_batch
from geventbatch._idempotency.outcome_name import name_of
from geventbatch.errors import PartlySaved, Repeated
from geventbatch.scopes import OutcomeName
from tests.support.keeping_ledger import KeepingLedger, call
from tests.support.ledger import append, append_to_all
from tests.support.plain import Odd, Taken

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Account, Accounts

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["partly", "whole"])
def ledger(request: pytest.FixtureRequest) -> KeepingLedger:
    return KeepingLedger(partly=request.param == "partly")


def refuse_all(accounts: Accounts, seat: int) -> None:
    accounts[0].append("half")
    raise Taken(seat)


def refuse_one(account: Account, seat: int) -> None:
    account.append("half")
    raise Taken(seat)


def transfer(accounts: Accounts, amount: int) -> tuple[int, int]:
    source, target = accounts
    source.append(-amount)
    target.append(amount)
    return len(source), len(target)


def answers(callers: list[Any]) -> list[Any]:
    return [caller.get() for caller in callers]


# -- sent again ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [True, False])
def test_what_was_saved_across_keys_is_not_applied_again(
    clock: VirtualTime, ledger: KeepingLedger, batching: bool
) -> None:
    with ledger.processor(batching=batching) as processor:
        first = call(processor, "ab", "x", transfer, 5).get()
        assert (first, call(processor, "ab", "x", transfer, 5).get()) == ((1, 1), (1, 1))
        assert call(processor, "ab", "y", transfer, 5).get() == (2, 2)
    assert ledger.kept == {"a": [-5, -5], "b": [5, 5]}
    assert len(ledger.outcomes) == 2


@pytest.mark.parametrize("batching", [True, False])
def test_what_one_key_of_a_bulk_has_saved_is_not_applied_again(
    clock: VirtualTime, ledger: KeepingLedger, batching: bool
) -> None:
    with ledger.processor(batching=batching) as processor:
        assert call(processor, "a.", "x", append, 1).get() == call(processor, "a.", "x", append, 1).get() == 1
        assert call(processor, "b.", "x", append, 1).get() == 1  # of another key
    assert ledger.kept == {"a": [1], "b": [1]}


@pytest.mark.parametrize("batching", [True, False])
def test_an_error_that_is_recorded_is_raised_again_and_nothing_else_is_saved(
    clock: VirtualTime, ledger: KeepingLedger, batching: bool
) -> None:
    with ledger.processor(batching=batching) as processor:
        for _ in range(2):
            error = call(processor, "ab", "x", refuse_all, 5).get()
            assert type(error) is Taken
            assert error.seat == 5
    assert {key: kept for key, kept in ledger.kept.items() if kept} == {}
    assert len(ledger.outcomes) == 1


def test_one_that_is_sent_again_in_a_component_is_answered_and_its_neighbours_are_saved(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    with ledger.processor() as processor:
        call(processor, "ab", "x", transfer, 5).get()
        ledger.save_time = 1
        blocker = call(processor, "abcde", None, append_to_all, "m")
        clock.advance(0.5)
        callers = [
            call(processor, "ab", "x", transfer, 5),
            call(processor, "bc", "y", transfer, 7),
            call(processor, "c.", "z", append, 1),
            call(processor, "de", "x", transfer, 9),
            call(processor, "d.", None, append, 2),
        ]
        clock.advance(5)
        assert answers([blocker, *callers]) == ["m", (1, 1), (3, 2), 1, (2, 2), 2]
    assert ledger.kept == {"a": [-5, "m"], "b": [5, "m", -7], "c": ["m", 7, 1], "d": ["m", -9, 2], "e": ["m", 9]}
    replayed = ledger.loads[2:]
    if ledger.partly:  # what is not connected with it was saved the first time
        assert [sorted(keys) for keys in replayed] == [list("abcde"), list("abc")]
    else:
        assert [sorted(keys) for keys in replayed] == [list("abcde"), list("abcde")]


@pytest.mark.parametrize("form", ["a.", "ab"])
def test_two_at_the_same_time_are_applied_once_and_both_have_the_answer(
    clock: VirtualTime, ledger: KeepingLedger, form: str
) -> None:
    operation = append if form == "a." else append_to_all
    with ledger.processor() as processor:
        ledger.save_time = 1
        blocker = call(processor, "ab", None, append_to_all, 0)
        clock.advance(0.5)
        callers = [call(processor, form, "x", operation, 1), call(processor, form, "x", operation, 1)]
        clock.advance(3)
        assert answers([blocker, *callers]) == [0, 1, 1]
    assert ledger.kept == {"a": [0, 1], "b": [0] if form == "a." else [0, 1]}
    assert len(ledger.outcomes) == 1
    assert len(ledger.saves) == 2


def test_two_that_raise_at_the_same_time_each_have_an_error_of_their_own_by_one_record(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    with ledger.processor() as processor:
        ledger.save_time = 0.1
        blocker = call(processor, "abc", None, append_to_all, 0)
        clock.advance(0.05)
        sent = [("ab", refuse_all), ("ab", refuse_all), ("c.", refuse_one), ("c.", refuse_one)]
        callers = [call(processor, keys, "x", operation, 5) for keys, operation in sent]
        clock.advance(3)
        errors = answers([blocker, *callers])[1:]
    assert [(type(error), error.seat) for error in errors] == [(Taken, 5)] * 4
    assert len({id(error) for error in errors}) == 4
    assert ledger.kept == {"a": [0], "b": [0], "c": [0]}
    assert len(ledger.outcomes) == 2


def test_a_bulk_in_which_everything_was_sent_again_saves_nothing_more(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    with ledger.processor() as processor:
        for keys, operation in [("ab", append_to_all), ("c.", append)]:
            call(processor, keys, "x", operation, 1).get()
        ledger.load_time = 0.5
        callers = [call(processor, "ab", "x", append_to_all, 1), call(processor, "c.", "x", append, 1)]
        clock.advance(3)
        assert answers(callers) == [1, 1]
        assert len(ledger.loads) == 3
    assert ledger.kept == {"a": [1], "b": [1], "c": [1]}


# -- which record -------------------------------------------------------------------------------------------------


def test_a_transfer_the_other_way_round_is_refused_and_nothing_of_it_is_saved(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    with ledger.processor() as processor:
        call(processor, "ab", "x", transfer, 5).get()
        error = call(processor, "ba", "x", transfer, 5).get()
        assert type(error) is IdempotencyKeyReused
        assert (error.key, error.keys, error.idempotency_key, error.retry_safe) == ("b", ("b", "a"), "x", True)
        assert "keys 'b', 'a'" in str(error)
        assert "in another order" in str(error)
        assert type(call(processor, "ab", "x", transfer, 6).get()) is IdempotencyKeyReused
    assert ledger.kept == {"a": [-5], "b": [5]}


def test_one_idempotency_key_on_other_keys_is_another_record_also_in_one_component(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    with ledger.processor() as processor:
        ledger.save_time = 1
        blocker = call(processor, "abc", None, append_to_all, 0)
        clock.advance(0.5)
        forms = ["ab", "bc", "abc", "a.", "a"]
        callers = [call(processor, one, "x", append if one == "a." else append_to_all, one) for one in forms]
        clock.advance(3)
        assert answers([blocker, *callers]) == [0, *forms]
    assert ledger.kept == {"a": [0, "ab", "abc", "a.", "a"], "b": [0, "ab", "bc", "abc"], "c": [0, "bc", "abc"]}
    assert len(ledger.outcomes) == 5
    assert len(ledger.saves) == 2


def test_a_scope_of_many_keys_is_told_names_that_say_keys_and_idempotency_key(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    seen: list[Any] = []
    ledger.on_save = lambda _: seen.extend(
        (name, name.keys, name.idempotency_key, name.across)
        for batch in dict.fromkeys(current_batch().bulk.values())
        for name in batch.outcomes
        if isinstance(name, OutcomeName)
    )
    with ledger.processor() as processor:
        call(processor, "ba", "x", transfer, 5).get()
        call(processor, "b.", "y", append, 5).get()
    assert [one[1:] for one in seen] == [(("a", "b"), "x", True), (("b",), "y", False)]
    assert {len(one[0]) for one in seen} == {34}
    assert set(ledger.outcomes) == {one[0] for one in seen}


def test_equal_keys_have_one_name_whatever_their_types_and_others_have_another() -> None:
    def name(*keys: Any) -> OutcomeName:
        return name_of(keys, "x", across=True)

    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    same: list[tuple[Any, Any]] = [
        (1, True),
        (1, 1.0),
        (1, Decimal("1.00")),
        (0.5, Decimal("0.50")),
        (-0.0, 0),
        ((1, ("a", 2)), (1.0, ("a", Decimal(2)))),
        (noon, noon.astimezone(timezone(timedelta(hours=2)))),
    ]
    for one, other in same:
        assert one == other
        assert name(one, "b") == name("b", other)
    others: list[Any] = [1, "1", b"1", ("1",), (1,), 1.5, UUID(int=1), noon, noon.replace(tzinfo=None), "a\nb", None]
    names = [name(one, "b") for one in others] + [name(one) for one in others]
    names += [name_of((one,), "x", across=False) for one in others]
    assert len(set(names)) == 3 * len(others)


def test_a_name_is_the_same_in_every_process() -> None:
    program = (
        "from uuid import UUID; from geventbatch._idempotency.outcome_name import name_of; "
        "print(name_of(('b', ('seat', 12), UUID(int=7), 3, b'a'), 'x', across=True), end=' '); "
        "print(name_of(('b',), 'x', across=False))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    ]
    # What is recorded outlives a release: these texts never change.
    assert told == ["c42efd8a47ed74bd3fdca9829910f1f6:x 2e85c584523161d45710ece8d438385f:x\n"] * 2


def test_keys_that_have_no_text_are_refused_at_the_door_across_and_by_their_operation_alone_in_a_bulk(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    class Own:
        pass

    own = Own()
    with ledger.processor(worker_number_for_key=lambda key, workers: 0) as processor:
        with pytest.raises(TypeError, match=r"cannot tell the keys 'a', .* from others in a record: .* Own"):
            processor.run_across(["a", own], append_to_all, 1, idempotency_key="x")
        assert ledger.loads == []
        with pytest.raises(TypeError, match="was not applied, since its key cannot be recorded"):
            processor.run(own, append, 1, idempotency_key="x")
        assert processor.run(own, append, 2) == 2
    assert ledger.kept == {own: [2]}


def test_the_door_asks_whether_each_of_the_keys_may_have_outcomes(clock: VirtualTime, ledger: KeepingLedger) -> None:
    asked: list[Any] = []

    def check_outcomes(key: Any) -> None:
        asked.append(key)
        if key == "c":
            raise ValueError("c can have none")

    ledger.check_outcomes = check_outcomes  # type: ignore[attr-defined]
    with ledger.processor() as processor:
        assert processor.run_across([*"ab"], append_to_all, 1, idempotency_key="x") == 1
        with pytest.raises(ValueError, match="c can have none"):
            processor.run_across([*"bc"], append_to_all, 1, idempotency_key="x")
        assert processor.run_across([*"bc"], append_to_all, 2) == 2
    assert asked == ["a", "b", "b", "c"]
    assert ledger.kept == {"a": [1], "b": [1, 2], "c": [2]}


def test_keys_are_named_as_the_store_normalizes_them(clock: VirtualTime, ledger: KeepingLedger) -> None:
    ledger.normalize_key = lambda key: str(key).lower()  # type: ignore[attr-defined]
    with ledger.processor() as processor:
        assert processor.run_across(["A", 1], append_to_all, 1, idempotency_key="x") == 1
        assert processor.run_across(["a", "1"], append_to_all, 1, idempotency_key="x") == 1
        assert type(call(processor, "1A", "x", append_to_all, 1).get()) is IdempotencyKeyReused
        assert processor.run("A", append, 2, idempotency_key="x") == processor.run("a", append, 2, idempotency_key="x")
    assert ledger.kept == {"a": [1, 2], "1": [1]}


def test_what_the_client_sends_again_identifies_it(clock: VirtualTime, ledger: KeepingLedger) -> None:
    with ledger.processor() as processor:
        assert call(processor, "ab", "x", append_to_all, "first", identified_by=(1,)).get() == "first"
        assert call(processor, "ab", "x", append_to_all, "second", identified_by=(1,)).get() == "first"
        for keys, again in [("ab", 2), ("ba", 1)]:
            error = call(processor, keys, "x", append_to_all, "third", identified_by=(again,)).get()
            assert type(error) is IdempotencyKeyReused
    assert ledger.kept == {"a": ["first"], "b": ["first"]}


# -- errors that are in no save --------------------------------------------------------------------------------------


def test_an_error_that_is_not_recorded_is_told_only_after_the_store_was_asked_once_for_all_of_them(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    with ledger.processor(recorded_errors=()) as processor:
        ledger.save_time = 1
        blocker = call(processor, "abcd", None, append_to_all, "m")
        clock.advance(0.5)
        callers = [
            call(processor, "ab", "u", refuse_all, 1),
            call(processor, "c.", "v", refuse_one, 2),
            call(processor, "d.", "w", append, 3),
        ]
        clock.advance(5)
        assert [type(one) for one in answers([blocker, *callers])] == [str, Taken, Taken, int]
    assert [{name.split(":")[1] for name in names} for names in ledger.asked] == [{"u", "v"}]
    assert len(ledger.outcomes) == 1


def test_one_that_raises_when_it_is_sent_again_has_the_answer_that_was_saved(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    # The second time it is judged by a state in which the first is; and its error is in no save.
    def once_only(accounts: Accounts, mark: int) -> int:
        if mark in accounts[0]:
            raise Odd
        return int(append_to_all(accounts, mark))

    with ledger.processor(recorded_errors=(), clean_errors=(Odd,)) as processor:
        assert call(processor, "ab", "x", once_only, 1).get() == 1
        ledger.load_time = 1
        callers = [
            call(processor, "ab", "x", once_only, 1),
            call(processor, "bc", None, append_to_all, 2),
            call(processor, "d.", "x", append, 3),
        ]
        clock.advance(9)
        assert answers(callers) == [1, 2, 3]
    assert ledger.kept == {"a": [1], "b": [1, 2], "c": [2], "d": [3]}


@pytest.mark.parametrize("error", [Conflict("deadlock"), OSError("away")])
def test_where_asking_fails_what_asked_is_replayed_or_fails_and_the_others_are_saved(
    clock: VirtualTime, ledger: KeepingLedger, error: Exception
) -> None:
    with ledger.processor(recorded_errors=()) as processor:
        ledger.save_time = 1
        blocker = call(processor, "abc", None, append_to_all, "m")
        clock.advance(0.5)
        callers = [
            call(processor, "ab", "x", refuse_all, 5),
            call(processor, "b.", "y", append, 1),
            call(processor, "c.", "z", append, 2),
        ]
        raising = [error]

        def on_ask(names: list[str]) -> None:
            if raising:
                raise raising.pop()

        ledger.on_ask = on_ask
        clock.advance(9)
        blocker.get()
        refused, one, other = answers(callers)
    assert other == 2
    if isinstance(error, Conflict):
        assert (type(refused), one) == (Taken, 1)
        assert ledger.kept == {"a": ["m"], "b": ["m", 1], "c": ["m", 2]}
    else:
        assert (type(refused), type(one)) == (LoadFailed, LoadFailed)
        assert refused.retry_safe
        assert ledger.kept == {"a": ["m"], "b": ["m"], "c": ["m", 2]}


# -- replays, kills and what a save says -------------------------------------------------------------------------


def test_after_a_conflict_each_is_recorded_once_with_the_answer_of_the_last_attempt(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    conflicts = [Conflict("changed"), Conflict("changed")]

    def on_save(resources: dict[Any, Account]) -> None:
        if conflicts:
            ledger.kept = {key: [*ledger.kept.get(key, ()), "other"] for key in "ab"}
            raise conflicts.pop()

    with ledger.processor() as processor:
        ledger.on_save = on_save
        assert call(processor, "ab", "x", transfer, 5).get() == (3, 3)
        assert call(processor, "ab", "x", transfer, 5).get() == (3, 3)
    assert ledger.kept["a"] == ["other", "other", -5]


def test_a_save_whose_outcome_is_unknown_may_be_sent_again(clock: VirtualTime, ledger: KeepingLedger) -> None:
    def saved_and_lost(resources: dict[Any, Account]) -> None:
        ledger.kept |= resources
        bulk = current_batch().bulk
        ledger.outcomes |= {name: text for batch in bulk.values() for name, text in batch.outcomes.items()}
        raise OSError("the answer is lost")

    with ledger.processor() as processor:
        ledger.on_save = saved_and_lost
        error = call(processor, "ab", "x", transfer, 5).get()
        assert type(error) is SaveFailed
        assert not error.retry_safe
        ledger.on_save = lambda _: None
        assert call(processor, "ab", "x", transfer, 5).get() == (1, 1)
    assert ledger.kept == {"a": [-5], "b": [5]}


def test_a_worker_that_is_killed_in_the_save_leaves_all_or_nothing_recorded(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    def killed(resources: dict[Any, Account]) -> None:
        ledger.on_save = lambda _: None
        raise gevent.GreenletExit

    with ledger.processor() as processor:
        ledger.on_save = killed
        error = call(processor, "ab", "x", transfer, 5).get()
        assert not error.retry_safe
        assert (ledger.kept, ledger.outcomes) == ({}, {})
        assert call(processor, "ab", "x", transfer, 5).get() == (1, 1)
    assert ledger.kept == {"a": [-5], "b": [5]}


def test_where_a_save_is_refused_the_culprit_is_found_and_all_others_are_recorded(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    def on_save(resources: dict[Any, Account]) -> None:
        if any("bad" in account for account in resources.values()):
            raise Rejected("a constraint")

    with ledger.processor() as processor:
        ledger.save_time = 0.1
        blocker = call(processor, "abcd", None, append_to_all, 0)
        clock.advance(0.05)
        ledger.on_save = on_save
        marks = {"ab": "ok", "bc": "bad", "cd": "fine"}
        callers = [call(processor, keys, "x", append_to_all, mark) for keys, mark in marks.items()]
        clock.advance(20)
        blocker.get()
        assert [type(one) for one in answers(callers)] == [str, Rejected, str]
        clock.advance(1)
        assert call(processor, "cd", "x", append_to_all, "fine").get() == "fine"
    assert ledger.kept == {"a": [0, "ok"], "b": [0, "ok"], "c": [0, "fine"], "d": [0, "fine"]}
    assert len(ledger.outcomes) == 2


def test_where_expired_outcomes_were_in_the_way_all_are_replayed_and_no_attempt_is_counted(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    in_the_way = [Repeated("expired ones are deleted", outcomes={})] * 3

    def on_save(resources: dict[Any, Account]) -> None:
        if in_the_way:
            raise PartlySaved(dict.fromkeys(resources, in_the_way.pop())) if ledger.partly else in_the_way.pop()

    with ledger.processor(max_attempts=1) as processor:
        ledger.save_time = 0.1
        blocker = call(processor, "abcd", None, append_to_all, 0)
        clock.advance(0.05)
        ledger.on_save = on_save
        callers = [call(processor, "ab", "x", append_to_all, 1), call(processor, "c.", None, append, 2)]
        clock.advance(3)
        assert answers([blocker, *callers]) == [0, 1, 2]
    assert ledger.kept == {"a": [0, 1], "b": [0, 1], "c": [0, 2], "d": [0]}
    assert not in_the_way


def test_outcomes_that_nobody_has_asked_for_are_a_failure_and_no_endless_replay(
    clock: VirtualTime, ledger: KeepingLedger
) -> None:
    def on_save(resources: dict[Any, Account]) -> None:
        wrong = Repeated("wrong", outcomes={"nothing": "="})
        raise PartlySaved({"a": wrong}) if ledger.partly else wrong

    with ledger.processor() as processor:
        ledger.on_save = on_save
        error = call(processor, "ab", "x", transfer, 5).get()
    assert type(error) is SaveFailed
    assert error.retry_safe


def test_what_is_recorded_already_is_named_by_its_idempotency_keys() -> None:
    known = name_of(("a", "b"), "known", across=True)
    assert str(Repeated(outcomes={known: "="})) == "not saved: the idempotency key 'known' is recorded already"
    many = {f"key {number}": "=" for number in range(7)}
    assert str(Repeated(outcomes=many)) == (
        "not saved: the idempotency keys 'key 0', 'key 1', 'key 2', 'key 3', 'key 4' and 2 more are recorded already"
    )
    assert str(Repeated(outcomes={})) == "not saved: outcomes that have expired were in the way"
    assert str(Repeated("in my words", outcomes=many)) == "in my words"

"""Idempotency keys in bulks and across keys over the stores: recorded once, in the transaction that saves all keys."""

from __future__ import annotations

import random
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchError, IdempotencyKeyReused, Processor, ResourceMissing, SaveFailed, current_batch
from tests.stores.test_stores import (
    ANY,
    Another,
    adapter,  # noqa: F401 - a fixture
    all_of,
    another,  # noqa: F401 - a fixture
    assert_as_good_as_new,
    class_of,
    over,
    place,  # noqa: F401 - a fixture
    proxy_of,
    spawned,
)
from tests.stores.test_stores_across import KEYS, After, Bank
from tests.support.adapters.base import TooLittle
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.support.adapters.base import Adapter, Case

over_recorded = over(lambda case: case.has_across and case.has_outcomes)
over_unlocked = over(lambda case: case.has_across and case.has_outcomes and not case.has_locks)
over_rows = over(lambda case: case.has_across and case.has_outcomes and case.has_rows)
over_cut = over(lambda case: case.has_across and case.has_outcomes and case.has_proxy)
over_sql = over(lambda case: case.has_across and case.has_outcomes and case.has_sql)
over_documents = over(lambda case: case.has_across and case.has_outcomes and "document" in case.name)

Sent = tuple[Any, str | None, "Callable[..., Any]", Any]
"""Keys (a text: of `run`), idempotency key, operation, argument."""


def send(processor: Processor[Any], keys: Any, name: str | None, operation: Callable[..., Any], *args: Any) -> Any:
    identified_by = None if name is None else args
    if isinstance(keys, str):
        return processor.run(keys, operation, *args, idempotency_key=name, identified_by=identified_by)
    return processor.run_across(keys, operation, *args, idempotency_key=name, identified_by=identified_by)


def together(processor: Processor[Any], sent: Iterable[Sent]) -> list[Any]:
    """What the callers of these were told; all in one bulk."""
    return all_of([spawned(send, processor, *one) for one in sent])


def transfers(bank: Bank, count: int = 5) -> list[Sent]:
    """One in each of the first pairs of accounts."""
    return [((f"n{2 * n}", f"n{2 * n + 1}"), f"transfer-{n}", bank.transfer, 1) for n in range(count)]


# -- sent again -------------------------------------------------------------------------------------------------


@over_recorded
@pytest.mark.parametrize("batching", [True, False])
def test_a_transfer_that_is_sent_again_is_not_applied_again_and_the_other_way_round_it_is_refused(
    adapter: Adapter,  # noqa: F811
    batching: bool,
) -> None:
    bank = Bank(adapter)
    with bank.processor(batching=batching) as processor:
        assert [send(processor, ("n0", "n1"), "a", bank.transfer, 3) for _ in range(3)] == [(7, 13)] * 3
        assert send(processor, ("n0", "n2"), "a", bank.transfer, 3) == (4, 13)
        error = answer_of(send, processor, ("n1", "n0"), "a", bank.transfer, 3)
    assert isinstance(error, IdempotencyKeyReused)
    assert (error.key, error.keys, error.retry_safe) == ("n1", ("n1", "n0"), True)
    assert bank.totals(["n0", "n1", "n2"]) == [4, 13, 13]
    assert adapter.outcomes() == 2


@over_recorded
def test_of_many_in_one_bulk_those_that_were_saved_are_answered_and_the_others_are_saved(
    case: Case,
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    with bank.processor() as processor:
        before = together(processor, [*transfers(bank), ("n18", "single", adapter.add, 1)])
        metrics = processor.subscribe_batch_metrics()
        new: list[Sent] = [
            (("n1", "n12"), "new", bank.transfer, 2),
            (("n14", "n15"), "new", bank.transfer, 1),
            ("n16", "new", adapter.add, 1),
            (("n17", "n19"), None, bank.transfer, 1),
        ]
        answers = together(processor, [*transfers(bank, 2), ("n18", "single", adapter.add, 1), *new])
    assert answers == [*before[:2], 11, (9, 12), (9, 11), 11, (9, 11)]
    assert bank.totals() == [9, 9, *[9, 11] * 4, 10, 10, 12, 10, 9, 11, 11, 9, 11, 11]
    assert adapter.outcomes() == 9
    attempts = {metric.key: metric.attempts for metric in metrics}
    # Only what is connected with a repeated one is replayed, if there is anything left to apply; of classes, all is.
    assert sorted(attempts.values()) == ([1, 1, 2, 2, 2, 2] if "mapped" in case.name else [1, 1, 1, 1, 1, 2])


@over(lambda case: case.has_across and "document" in case.name and case.name.endswith("postgresql-bulk"))
def test_outcomes_of_many_operations_cost_no_round_trip_of_their_own(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor() as processor:
        send(processor, "n18", None, adapter.add, 0)
        before = proxy_of(adapter).round_trips
        together(processor, [*transfers(bank), ("n10", "single", adapter.add, 1)])
        assert proxy_of(adapter).round_trips == before + 2
    assert adapter.outcomes() == 6


@over_recorded
def test_one_idempotency_key_in_one_bulk_is_applied_once(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor() as processor:
        answers = together(processor, [*transfers(bank), *transfers(bank)])
        assert answers == [(9, 11)] * 10
        assert together(processor, transfers(bank)) == [(9, 11)] * 5
    assert bank.totals() == [*[9, 11] * 5, *[10] * 10]
    assert adapter.outcomes() == 5


@over_recorded
def test_run_finds_what_it_has_recorded_in_the_other_form_of_the_store_and_run_across_has_its_own_record(
    case: Case,
    adapter: Adapter,  # noqa: F811
) -> None:
    adapter.put("k", 10)
    adapter.put("m", 10)
    with adapter.processor() as many, Processor(open_resource=adapter.store(), min_duration=0, max_duration=5) as one:
        assert [run.run("k", adapter.add, 1, idempotency_key="a") for run in (many, one)] == [11, 11]
        assert [run.run("m", adapter.add, 1, idempotency_key="a") for run in (one, many)] == [11, 11]

        def add(resources: tuple[Any, ...], amount: int) -> int:
            return adapter.add(resources[0], amount)

        for run in (many, one):
            assert send(run, ("k",), "a", add, 1) == 12
    assert (adapter.get("k"), adapter.get("m"), adapter.outcomes()) == (12, 11, 3)


@over_recorded
def test_an_error_is_the_outcome_and_is_given_again_and_makes_no_new_resource(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor(missing="make") as processor:
        errors = together(
            processor,
            [
                (("n0", "new"), "a", bank.transfer, 11),
                (("n2", "new 2"), "a", bank.transfer, 1),
                (("n4", "n2"), "a", bank.transfer, 11),
                ("new 3", "a", adapter.take, 1),
            ],
        )
        assert [type(error) for error in errors] == [TooLittle, tuple, TooLittle, TooLittle]
        assert adapter.outcomes() == 4
        adapter.put("n0", 100)
        assert isinstance(answer_of(send, processor, ("n0", "new"), "a", bank.transfer, 11), TooLittle)
    assert bank.totals(["n0", "n2", "n4", "new", "new 2", "new 3"]) == [100, 9, 10, None, 1, None]


@over_recorded
def test_what_makes_new_resources_is_recorded_with_them_and_applied_once(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)

    def both(accounts: tuple[Any, ...]) -> list[int]:
        return [adapter.add(account, 1) for account in accounts]

    sent: list[Any] = [
        (("new 1", "new 2"), "a", both),
        (("new 2", "n0"), "b", both),
        (("n2", "n3"), "c", both),
        ("new 3", "d", adapter.add, 1),
    ]
    with bank.processor(missing="make") as processor:
        for _ in range(2):
            assert together(processor, sent) == [[1, 1], [2, 11], [11, 11], 1]
    assert bank.totals(["new 1", "new 2", "new 3", "n0", "n2", "n3"]) == [1, 2, 1, 11, 11, 11]
    assert adapter.outcomes() == 4


@over_recorded
def test_an_error_that_is_not_recorded_is_told_after_the_store_was_asked(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor(recorded_errors=()) as processor:
        assert send(processor, ("n0", "n1"), "a", bank.transfer, 6) == (4, 16)
        sent: list[Sent] = [
            (("n0", "n1"), "a", bank.transfer, 6),  # there is too little now, but it was saved
            (("n0", "n2"), "a", bank.transfer, 6),
            (("n4", "n5"), "a", bank.transfer, 6),
        ]
        answers = together(processor, sent)
    assert (answers[0], type(answers[1]), answers[2]) == ((4, 16), TooLittle, (4, 16))
    assert bank.totals(["n0", "n1", "n2", "n4", "n5"]) == [4, 16, 10, 4, 16]
    assert adapter.outcomes() == 2


@over_recorded
@pytest.mark.parametrize("alone", [True, False])
def test_outcomes_that_have_expired_are_in_nobodys_way(adapter: Adapter, alone: bool) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor() as processor:
        for total in (9, 8):
            sent = transfers(bank, 2) if alone else [*transfers(bank, 2), (("n8", "n9"), f"{total}", bank.transfer, 1)]
            assert together(processor, sent)[:2] == [(total, 20 - total)] * 2
            adapter.expire_outcomes()
        assert together(processor, transfers(bank, 2)) == [(7, 13)] * 2
        assert together(processor, transfers(bank, 2)) == [(7, 13)] * 2
    assert bank.totals(["n0", "n1", "n2", "n3", "n8"]) == [7, 13, 7, 13, 10 if alone else 8]


@over(lambda case: case.has_across and case.has_outcomes and case.has_rows)
def test_what_repeats_or_has_expired_costs_nobody_an_attempt(case: Case, adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor(max_attempts=1) as processor:
        together(processor, transfers(bank, 2))
        adapter.expire_outcomes()
        together(processor, transfers(bank, 1))  # again
        metrics = processor.subscribe_batch_metrics()
        new = [(("n8", "n9"), "new", bank.transfer, 1), (("n1", "n10"), "new", bank.transfer, 1)]
        answers = together(processor, [*transfers(bank, 2), *new])
    assert answers == [(8, 12), (8, 12), (9, 11), (11, 11)]
    if "document" in case.name:
        assert sorted(metric.attempts for metric in metrics) == [1, 1, 2]


# -- saved with all keys or with none ----------------------------------------------------------------------------


@over_unlocked
def test_of_what_somebody_else_has_changed_nothing_is_recorded_and_of_the_others_all(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    sent = transfers(bank)
    sent[0] = (*sent[0][:2], After(partial(adapter.put, "n3", 50), bank.transfer), 1)
    with bank.processor(max_attempts=1) as processor:
        answers = together(processor, sent)
        assert [isinstance(answer, SaveFailed) for answer in answers] == [False, True, False, False, False]
        assert adapter.outcomes() == 4
    assert bank.totals() == [9, 11, 10, 50, *[9, 11] * 3, *[10] * 10]


@over_unlocked
def test_after_a_conflict_it_is_recorded_with_the_answer_of_the_last_attempt(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    happens = After(partial(adapter.put, "n1", 50), bank.transfer)
    with bank.processor() as processor:
        sent: list[Sent] = [(("n0", "n1"), "a", happens, 1), (("n1", "n2"), "b", bank.transfer, 1)]
        assert together(processor, sent) == [(9, 51), (50, 11)]
        assert send(processor, ("n1", "n2"), "b", bank.transfer, 1) == (50, 11)
    assert bank.totals(["n0", "n1", "n2"]) == [9, 50, 11]
    assert adapter.outcomes() == 2


@over_rows
def test_a_repeated_one_is_told_before_its_row_violates_a_constraint_and_a_culprit_is_not_recorded(
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    with bank.processor() as processor:
        assert send(processor, ("n0", "n1"), "a", bank.noted, 1, "row") == (9, 11)
        sent: list[Any] = [
            (("n0", "n1"), "a", bank.noted, 1, "row"),
            (("n2", "n3"), "b", bank.noted, 1, "row"),
            (("n4", "n5"), "c", bank.noted, 1, "row 2"),
            (("n5", "n6"), "d", bank.noted, 1, "row 3"),
            ("n8", "e", adapter.add_with_row, 1, "row 4"),
        ]
        for _ in range(2):
            answers = together(processor, sent)
            assert class_of(answers.pop(1)) == "IntegrityError"
            assert answers == [(9, 11), (9, 11), (10, 11), 11]
    assert bank.totals() == [9, 11, 10, 10, 9, 10, 11, 10, 11, *[10] * 11]
    assert sorted(adapter.rows()) == ["row", "row 2", "row 3", "row 4"]
    assert adapter.outcomes() == 4


@over_sql
def test_a_repeated_one_has_its_outcome_when_its_own_sql_violates_a_constraint(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)

    def insert(accounts: tuple[Any, ...], amount: int) -> list[int]:
        totals = adapter.transfer(accounts, amount)
        adapter.insert(accounts[0], "row")
        return totals

    with bank.processor() as processor:
        for _ in range(2):
            sent: list[Sent] = [(("n0", "n1"), "a", insert, 1), (("n2", "n3"), None, bank.transfer, 1)]
            assert together(processor, sent)[0] == [9, 11]
    assert bank.totals(["n0", "n1", "n2", "n3"]) == [9, 11, 8, 12]
    assert adapter.rows() == ["row"]
    assert adapter.outcomes() == 1


@over_documents
def test_a_repeated_one_is_told_before_what_it_has_made_cannot_be_encoded(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)

    def spoil_if_less(accounts: tuple[Any, ...]) -> int:
        if accounts[0]["total"] < 10:
            accounts[1]["total"] = object()
            return 0
        return adapter.take(accounts[0], 1)

    with bank.processor() as processor:
        sent: list[Any] = [
            (("n0", "n1"), "a", spoil_if_less),
            (("n2", "n3"), "a", bank.transfer, 1),
        ]
        for _ in range(2):
            assert together(processor, sent) == [9, (9, 11)]
    assert bank.totals(["n0", "n1", "n2", "n3"]) == [9, 10, 9, 11]


# -- two processes, kills and lost answers ---------------------------------------------------------------------


@over_recorded
def test_of_two_processors_that_are_given_the_same_at_once_each_is_applied_once(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    dice = random.Random(1)
    sent: list[Any] = []
    for number in range(30):
        keys = dice.sample(["n0", "n1", "n2", "n3", "n4", "n5", "n6"], 2)
        one = dice.random() < 0.3
        sent.append((keys[0], f"{number}", adapter.add, 0) if one else (tuple(keys), f"{number}", bank.transfer, 1))
    with ExitStack() as stack:
        both = [stack.enter_context(bank.processor(max_attempts=100, max_bulk=4)) for _ in range(2)]
        callers = [[spawned(send, one, *each) for each in dice.sample(sent, len(sent))] for one in both]
        told = [all_of(some) for some in callers]
        assert not [one for some in told for one in some if isinstance(one, BaseException)]
        answers = [together(one, sent) for one in both]
    assert answers[0] == answers[1]
    assert sorted(map(str, told[0])) == sorted(map(str, told[1])) == sorted(map(str, answers[0]))
    assert sum(total or 0 for total in bank.totals()) == 200
    moved = {f"n{n}": 10 for n in range(7)}
    for keys, _, operation, _ in sent:
        if operation == bank.transfer:
            moved[keys[0]] -= 1
            moved[keys[1]] += 1
    assert bank.totals(list(moved)) == list(moved.values())
    assert adapter.outcomes() == 30


def some_transfers(seed: int) -> list[tuple[list[str], str]]:
    """Transfers between any two of a few accounts, each with its idempotency key."""
    dice = random.Random(seed)
    return [(dice.sample(["n0", "n1", "n2", "n3", "n4", "n5"], 2), f"{seed}-{number}") for number in range(40)]


def after(sent: list[tuple[list[str], str]], total: int) -> list[int]:
    """What the accounts have when each was applied once."""
    totals = dict.fromkeys(KEYS, total)
    for (source, target), _ in sent:
        totals[source] -= 1
        totals[target] += 1
    return list(totals.values())


@over_recorded
def test_two_processes_that_are_sent_the_same_at_once_apply_each_once_and_give_one_answer(
    case: Case,
    adapter: Adapter,  # noqa: F811
    another: Another,  # noqa: F811
) -> None:
    bank = Bank(adapter, 100)
    sent = some_transfers(1)
    with another.opened(case, adapter), bank.processor(max_attempts=200) as processor:
        told = spawned(another.transfers, sent[::-1], 40)
        ours = together(processor, [(tuple(keys), name, adapter.transfer, 1) for keys, name in sent])
        assert told.get() == ours[::-1]
    assert bank.totals() == after(sent, 100)
    assert adapter.outcomes() == 40


@over_recorded
def test_what_a_process_was_doing_that_is_killed_may_be_sent_again(
    case: Case,
    adapter: Adapter,  # noqa: F811
    another: Another,  # noqa: F811
) -> None:
    bank = Bank(adapter, 100)
    sent = some_transfers(2)
    with suppress(OSError, ValueError), another.opened(case, adapter):  # its pipes are closed
        told = spawned(another.transfers, sent, 3)
        wait_until(lambda: adapter.outcomes() > 0)
        another.kill()
        told.join()
    with bank.processor(max_attempts=200) as processor:
        answers = together(processor, [(tuple(keys), name, adapter.transfer, 1) for keys, name in sent])
        assert not [one for one in answers if isinstance(one, BaseException)]
    assert bank.totals() == after(sent, 100)
    assert adapter.outcomes() == 40


@over_cut
def test_who_sends_again_after_the_answer_to_a_commit_was_lost_has_the_outcome_of_all_keys(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor() as processor:
        send(processor, "n10", None, adapter.add, 0)
        rule = proxy_of(adapter).cut_after(adapter.commit_marker, adapter.commit_answer)
        together(processor, transfers(bank))
        assert rule.met == 1
        assert together(processor, transfers(bank)) == [(9, 11)] * 5
        assert together(processor, transfers(bank)) == [(9, 11)] * 5
    assert bank.totals() == [*[9, 11] * 5, *[10] * 10]
    assert adapter.outcomes() == 5
    adapter.clear()
    assert_as_good_as_new(adapter)


@over_cut
def test_who_sends_again_until_there_is_an_answer_is_applied_once_whatever_message_is_cut_off(
    case: Case,
    adapter: Adapter,  # noqa: F811
) -> None:
    dice = random.Random(case.name)
    proxy = proxy_of(adapter)
    bank = Bank(adapter, 100)

    def until_answered(processor: Processor[Any], sent: Sent) -> Any:
        while True:
            try:
                return send(processor, *sent)
            except BatchError:
                gevent.sleep(0)

    sent = [(tuple(dice.sample(["n0", "n1", "n2", "n3"], 2)), f"{n}", bank.transfer, 1) for n in range(12)]
    with bank.processor(max_attempts=10) as processor:
        for turn in range(10):
            marker = dice.choice([ANY, adapter.commit_marker])
            _ = proxy.cut_before(marker) if dice.random() < 0.5 else proxy.cut_after(marker)
            some = sent[turn : turn + 3]  # some of them not for the first time
            told = all_of([spawned(until_answered, processor, one) for one in some])
            proxy.forget_rules()
            assert not [one for one in told if isinstance(one, BaseException)]
    expected = dict.fromkeys(["n0", "n1", "n2", "n3"], 100)
    for (source, target), *_ in sent:
        expected[source] -= 1
        expected[target] += 1
    assert bank.totals(list(expected)) == list(expected.values())
    assert adapter.outcomes() == 12


@over_recorded
def test_a_worker_that_is_killed_between_load_and_save_records_nothing(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)

    with bank.processor() as processor:
        callers = [spawned(send, processor, *one) for one in transfers(bank)]
        callers += [spawned(send, processor, ("n8", "n9"), "h", kill_its_worker)]
        answers = all_of(callers)
        assert all(isinstance(answer, BatchError) and answer.retry_safe for answer in answers)
        assert adapter.outcomes() == 0
        assert together(processor, transfers(bank)) == [(9, 11)] * 5
    assert bank.totals() == [*[9, 11] * 5, *[10] * 10]
    assert adapter.outcomes() == 5


def kill_its_worker(accounts: tuple[Any, ...]) -> None:
    raise gevent.GreenletExit


@over_recorded
def test_once_one_of_its_keys_is_deleted_it_is_missing_when_it_is_sent_again_unless_missing_ones_are_made(
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)

    def close(account: Any) -> None:
        current_batch().delete()

    with bank.processor() as processor:
        assert send(processor, ("n0", "n1"), "a", bank.transfer, 3) == (7, 13)
        assert send(processor, "n2", "b", adapter.add, 1) == 11
        for key in ("n1", "n2"):
            processor.run(key, close)
        across, alone = together(processor, [(("n0", "n1"), "a", bank.transfer, 3), ("n2", "b", adapter.add, 1)])
        assert [type(across), type(alone)] == [ResourceMissing, ResourceMissing]
        assert (across.key, across.keys, across.retry_safe) == ("n1", ("n0", "n1"), True)
    with bank.processor(missing="make") as processor:
        sent: list[Sent] = [(("n0", "n1"), "a", bank.transfer, 3), ("n2", "b", adapter.add, 1)]
        assert together(processor, sent) == [(7, 13), 11]
    assert bank.totals(["n0", "n1", "n2"]) == [7, None, None]

"""Operations across keys over the stores: what they connect is saved together or not at all, the rest as if alone."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Processor, ResourceMissing, SaveFailed, current_batch
from tests.stores.test_stores import (
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
from tests.support.adapters.base import TooLittle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.adapters.base import Adapter

over_across = over(lambda case: case.has_across)
over_unlocked = over(lambda case: case.has_across and not case.has_locks)
over_rows = over(lambda case: case.has_across and case.has_rows)

PAIRS = [(f"n{number}", f"n{number + 1}") for number in range(0, 20, 2)]
KEYS = [key for pair in PAIRS for key in pair]


class Bank:
    """Accounts in a store, and operations on them."""

    def __init__(self, adapter: Adapter, total: int = 10) -> None:  # noqa: F811
        self.adapter = adapter
        for key in KEYS:
            adapter.put(key, total)

    def processor(self, **options: Any) -> Processor[Any]:
        """One that runs all that comes together as one bulk."""
        return self.adapter.processor(**{"workers": 1, "max_batches": 1, "max_attempts": 20, **options})

    def transfer(self, accounts: tuple[Any, ...], amount: int) -> tuple[int, int]:
        source, target = accounts
        return self.adapter.take(source, amount), self.adapter.add(target, amount)

    def noted(self, accounts: tuple[Any, ...], amount: int, text: str) -> tuple[int, int]:
        current_batch().add_row(self.adapter.row(text))
        return self.transfer(accounts, amount)

    def totals(self, keys: list[str] = KEYS) -> list[int | None]:
        return [self.adapter.get(key) for key in keys]


class After:
    """An operation before which something happens once, while the bulk is between load and save."""

    def __init__(self, happens: Callable[[], object], then: Callable[..., Any]) -> None:
        self._happens: Callable[[], object] | None = happens
        self._then = then

    def __call__(self, *args: Any) -> Any:
        happens, self._happens = self._happens, None
        if happens is not None:
            gevent.spawn(happens).get()  # not as the operation, which may write to no other database
        return self._then(*args)


def together(processor: Processor[Any], runs: dict[Any, tuple[Any, ...]]) -> dict[Any, Any]:
    """What the callers of these operations were told, by the keys of each; all in one bulk."""
    callers = {
        keys: spawned(processor.run, keys, *run)
        if isinstance(keys, str)
        else spawned(processor.run_across, list(keys), *run)
        for keys, run in runs.items()
    }
    return dict(zip(callers, all_of(list(callers.values())), strict=True))


def transfers(bank: Bank) -> dict[Any, tuple[Any, ...]]:
    """One from the first to the second account of each pair."""
    return dict.fromkeys(PAIRS, (bank.transfer, 1))


def noted_transfers(bank: Bank) -> dict[Any, tuple[Any, ...]]:
    """The same, each with a row."""
    return {pair: (bank.noted, 1, pair[0]) for pair in PAIRS}


def is_lost(answer: Any) -> bool:
    return isinstance(answer, SaveFailed) and answer.retry_safe


# -- together ---------------------------------------------------------------------------------------------------


@over_across
def test_what_an_operation_changes_at_several_keys_is_saved_and_a_refused_one_changes_nothing(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor() as processor:
        answers = together(processor, transfers(bank) | {("n4", "n11"): (bank.transfer, 100)})
    assert isinstance(answers.pop(("n4", "n11")), TooLittle)
    assert list(answers.values()) == [(9, 11)] * 10
    assert bank.totals() == [9, 11] * 10


@over(lambda case: case.has_across and "document" in case.name and case.name.endswith("postgresql-bulk"))
@pytest.mark.parametrize("rows", [False, True])
def test_operations_across_keys_are_one_round_trip_for_the_load_and_one_for_the_save(
    adapter: Adapter,  # noqa: F811
    rows: bool,
) -> None:
    bank = Bank(adapter)
    with bank.processor() as processor:
        processor.run(KEYS[0], adapter.add, 0)
        before = proxy_of(adapter).round_trips
        runs = noted_transfers(bank) if rows else transfers(bank)
        together(processor, runs)
        assert proxy_of(adapter).round_trips == before + 2
    assert bank.totals() == [9, 11] * 10


@over(lambda case: case.name == "sqlalchemy-document-version-postgresql-bulk")
def test_a_save_after_one_that_has_lost_claims_first_which_costs_one_round_trip_and_saves_two(
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    trips = []
    with bank.processor() as processor:
        processor.run(KEYS[0], adapter.add, 0)
        for lost in (True, True, False, False):
            runs = transfers(bank)
            if lost:
                runs[PAIRS[0]] = (After(partial(adapter.put, "n3", 50), bank.transfer), 1)
            before = proxy_of(adapter).round_trips
            together(processor, runs)
            trips.append(proxy_of(adapter).round_trips - before)
    assert trips == [5 + 2, 3 + 2, 3, 2]  # two for a replay; a message that was refused is rolled back
    assert bank.totals() == [6, 14, 6, 53, *[6, 14] * 8]


@over_rows
def test_rows_of_an_operation_across_keys_are_inserted_once(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    runs = noted_transfers(bank)
    with bank.processor() as processor:
        together(processor, runs | {("n1", "n2", "n5"): (lambda _: current_batch().add_row(adapter.row("chain")),)})
    assert sorted(adapter.rows()) == sorted([*(pair[0] for pair in PAIRS), "chain"])
    assert bank.totals() == [9, 11] * 10


def close(accounts: tuple[Any, ...], bank: Bank) -> None:
    """Close the first account; what it has goes to the second one."""
    source, target = accounts
    bank.adapter.add(target, bank.adapter.total(source))
    current_batch().delete(current_batch().keys[0])


@over_across
def test_an_operation_across_keys_deletes_one_of_them_and_changes_the_others(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    runs = transfers(bank) | {("n3", "n5"): (close, bank), ("n2", "n6"): (bank.transfer, 1)}
    with bank.processor() as processor:
        answers = together(processor, runs)
    assert not [answer for answer in answers.values() if isinstance(answer, Exception)]
    assert bank.totals() == [9, 11, 8, None, 9, 22, 10, 11, *[9, 11] * 6]


@over_unlocked
def test_when_somebody_else_has_changed_one_key_none_that_is_connected_with_it_is_deleted(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    runs = transfers(bank)
    runs[PAIRS[0]] = (After(partial(adapter.put, "n3", 50), bank.transfer), 1)
    runs[PAIRS[1]] = (close, bank)
    runs[PAIRS[2]] = (close, bank)
    with bank.processor(max_attempts=1) as processor:
        answers = together(processor, runs)
    assert [pair for pair, answer in answers.items() if is_lost(answer)] == [PAIRS[1]]
    assert bank.totals() == [9, 11, 10, 50, None, 20, *[9, 11] * 7]


@over_across
def test_unbatched_operations_across_keys_are_saved_whole_or_not_at_all(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    with bank.processor(batching=False) as processor:
        assert processor.run_across(["n0", "n1"], bank.transfer, 3) == (7, 13)
        with pytest.raises(TooLittle):
            processor.run_across(["n0", "n1"], bank.transfer, 30)
        with pytest.raises(TypeError):
            processor.run_across(["n0", "n1"], spoil_second(bank))
    assert bank.totals(["n0", "n1"]) == [7, 13]


# -- nothing is half there --------------------------------------------------------------------------------------


@over_unlocked
def test_when_somebody_else_has_changed_one_key_nothing_of_those_connected_with_it_is_saved(
    case: Any,
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    runs = noted_transfers(bank) if case.has_rows else transfers(bank)
    operation, *args = runs[PAIRS[0]]
    runs[PAIRS[0]] = (After(partial(adapter.put, "n3", 50), operation), *args)
    runs[("n5", "n6")] = (bank.transfer, 2)  # connects the pairs (n4, n5) and (n6, n7)
    with bank.processor(max_attempts=1) as processor:
        answers = together(processor, runs)
    assert [pair for pair, answer in answers.items() if is_lost(answer)] == [("n2", "n3")]
    assert bank.totals() == [9, 11, 10, 50, 9, 9, 11, 11, *[9, 11] * 6]
    if case.has_rows:
        assert sorted(adapter.rows()) == sorted(pair[0] for pair in PAIRS if pair != ("n2", "n3"))


@over_unlocked
def test_a_lost_key_is_a_replay_of_those_that_are_connected_with_it_and_of_no_others(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    runs = transfers(bank)
    runs[PAIRS[0]] = (After(partial(adapter.put, "n3", 50), bank.transfer), 1)
    runs[("n3", "n5")] = (bank.transfer, 20)
    runs["n9"] = (adapter.add, 0)
    with bank.processor() as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, runs)
    assert answers[("n2", "n3")] == (9, 51)
    assert answers[("n3", "n5")] == (31, 31)
    assert bank.totals() == [9, 11, 9, 31, 9, 31, *[9, 11] * 7]
    attempts = {metric.key: metric.attempts for metric in metrics}
    assert sorted(attempts.values()) == [1] * 8 + [2]


@over_unlocked
def test_a_key_that_was_only_read_is_compared_if_something_connected_with_it_is_saved(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)

    def follow(accounts: tuple[Any, ...]) -> int:
        price, account = accounts
        return adapter.add(account, adapter.total(price))

    with bank.processor() as processor:
        answers = together(
            processor, {("n0", "n1"): (After(partial(adapter.put, "n0", 70), follow),), "n2": (adapter.add, 1)}
        )
    assert answers == {("n0", "n1"): 80, "n2": 11}
    assert bank.totals(["n0", "n1", "n2"]) == [70, 80, 11]


@over(lambda case: case.has_across and ("document" in case.name or case.name.startswith("redis")))
def test_what_operations_have_only_read_is_compared_with_what_they_connect_and_not_made(
    case: Any,
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)

    def look(accounts: tuple[Any, ...]) -> list[int]:
        return [adapter.total(account) for account in accounts]

    with bank.processor(missing="make") as processor:
        transfer = bank.transfer if case.has_locks else After(partial(adapter.put, "n2", 70), bank.transfer)
        callers = [
            spawned(processor.run_across, ["n0", "n1"], transfer, 1),
            spawned(partial(processor.run_across, ["n1", "n2", "new"], look, read_only=True)),
        ]
        assert all_of(callers) == [(9, 11), [11, 10 if case.has_locks else 70, 0]]
    assert bank.totals(["n0", "n1", "new"]) == [9, 11, None]


@over(lambda case: case.has_across and case.has_rows and "document" in case.name and not case.has_locks)
def test_what_was_only_read_is_compared_for_the_rows_that_operations_have_added(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)

    def look(accounts: tuple[Any, ...]) -> list[int]:
        return [adapter.total(account) for account in accounts]

    with bank.processor() as processor:
        noted = After(partial(adapter.put, "n0", 70), bank.noted)
        callers = [
            spawned(partial(processor.run_across, ["n0", "n1"], look, read_only=True)),
            spawned(processor.run_across, ["n1", "n2"], noted, 0, "row"),
        ]
        assert all_of(callers) == [[70, 10], (10, 10)]
    assert adapter.rows() == ["row"]


@over_unlocked
def test_when_a_key_has_vanished_nothing_of_those_connected_with_it_is_saved(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    runs = transfers(bank)
    runs[PAIRS[0]] = (After(partial(adapter.remove, "n3"), bank.transfer), 1)
    with bank.processor() as processor:
        answers = together(processor, runs)
    assert isinstance(answers.pop(("n2", "n3")), ResourceMissing)
    assert list(answers.values()) == [(9, 11)] * 9
    assert bank.totals() == [9, 11, 10, None, *[9, 11] * 8]


@over(
    lambda case: (
        case.has_across and case.name not in {"sqlalchemy-document-lock-mariadb-bulk", "sql-pymysql-mariadb-bulk"}
    )
)  # it locks what is not there
@pytest.mark.parametrize("attempts", [1, 20])
def test_when_somebody_else_has_inserted_a_new_key_nothing_of_those_connected_with_it_is_saved(
    adapter: Adapter,  # noqa: F811
    attempts: int,
) -> None:
    bank = Bank(adapter)
    runs = transfers(bank)
    runs[PAIRS[0]] = (After(partial(adapter.put, "new 1", 50), bank.transfer), 1)
    runs[("n3", "new 1")] = (bank.transfer, 2)
    runs[("n5", "new 2", "new 3")] = (lambda accounts: [adapter.add(account, 1) for account in accounts],)
    with bank.processor(missing="make", max_attempts=attempts) as processor:
        answers = together(processor, runs)
    lost = attempts == 1
    assert [pair for pair, answer in answers.items() if is_lost(answer)] == (
        [("n2", "n3"), ("n3", "new 1")] if lost else []
    )
    assert bank.totals() == [9, 11, *([10, 10] if lost else [9, 9]), 9, 12, *[9, 11] * 7]
    assert bank.totals(["new 1", "new 2", "new 3"]) == [50 if lost else 52, 1, 1]


@over_across
def test_a_missing_key_is_the_answer_of_those_that_name_it_and_nothing_of_them_is_saved(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    runs = transfers(bank) | {("n0", "nobody"): (bank.transfer, 1), ("n0", "n2"): (bank.transfer, 1)}
    with bank.processor() as processor:
        answers = together(processor, runs)
    missing = answers.pop(("n0", "nobody"))
    assert isinstance(missing, ResourceMissing)
    assert missing.key == "nobody"
    assert not [answer for answer in answers.values() if isinstance(answer, Exception)]
    assert bank.totals() == [8, 11, 10, 11, *[9, 11] * 8]


def spoil_second(bank: Bank) -> Callable[..., None]:
    def spoil(accounts: tuple[Any, ...]) -> None:
        bank.adapter.add(accounts[0], 5)
        accounts[1]["total"] = object()

    return spoil


@over(lambda case: case.has_across and "document" in case.name)
def test_what_cannot_be_encoded_at_one_key_is_the_error_of_its_operation_and_nothing_of_that_is_saved(
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    runs = transfers(bank)
    runs[("n1", "n2")] = (spoil_second(bank),)
    runs[("n1", "n4")] = (bank.transfer, 1)
    with bank.processor() as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(processor, runs)
    assert isinstance(answers.pop(("n1", "n2")), TypeError)
    assert not [answer for answer in answers.values() if isinstance(answer, Exception)]
    assert bank.totals() == [9, 10, 9, 11, 10, 11, *[9, 11] * 7]
    assert sorted(metric.attempts > 1 for metric in metrics) == [False] * 7 + [True]


@over_rows
def test_a_value_that_the_database_refuses_is_the_error_of_its_operation_and_nothing_of_that_is_saved(
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    runs = noted_transfers(bank)
    runs["n15"] = (adapter.add_with_row, 100, "n4")
    runs[("n1", "n2")] = (bank.noted, 100, "n8")  # too little, and so no second row
    runs[("n3", "n5")] = (bank.noted, 1, "n8")
    with bank.processor() as processor:
        answers = together(processor, runs)
    raised = {keys: class_of(answer) for keys, answer in answers.items() if isinstance(answer, Exception)}
    assert raised.pop(("n1", "n2")) == "TooLittle"
    assert set(raised.values()) == {"IntegrityError"}
    assert len(raised) == 2
    assert {"n15"} <= raised.keys() or {("n4", "n5")} <= raised.keys()
    expected = [10] * 20
    for keys, answer in answers.items():
        if isinstance(answer, Exception):
            continue
        if isinstance(keys, str):
            expected[KEYS.index(keys)] += 100
        else:
            expected[KEYS.index(keys[0])] -= 1
            expected[KEYS.index(keys[1])] += 1
    assert bank.totals() == expected
    assert len(adapter.rows()) == len(set(adapter.rows())) == 10


@over(lambda case: case.has_across and case.has_rows and not case.has_locks)
def test_after_a_refused_value_a_lost_key_is_still_that_of_all_that_is_connected(adapter: Adapter) -> None:  # noqa: F811
    bank = Bank(adapter)
    adapter.put("n19", 10)
    runs = noted_transfers(bank)
    runs["n15"] = (adapter.add_with_row, 100, "n4")
    changes: Iterator[Callable[[], object]] = iter([lambda: None, partial(adapter.put, "n3", 50), *[lambda: None] * 20])

    def change(accounts: Any, *args: Any) -> Any:
        gevent.spawn(next(changes)).get()  # in the second round, which writes by steps
        return bank.noted(accounts, *args)

    runs[PAIRS[0]] = (change, 1, "n0")
    with bank.processor() as processor:
        answers = together(processor, runs)
    assert (
        sum(isinstance(answer, Exception) and class_of(answer) == "IntegrityError" for answer in answers.values()) == 1
    )
    assert answers[("n2", "n3")] in {(9, 51), (9, 11)}
    assert bank.totals(["n2", "n3"]) == [9, 51 if answers[("n2", "n3")] == (9, 51) else 50]


@over(lambda case: case.has_across and case.has_proxy)
@pytest.mark.parametrize("changed", [False, True])
def test_when_the_answer_to_a_save_is_lost_all_that_is_connected_is_told_the_truth(
    case: Any,
    adapter: Adapter,  # noqa: F811
    changed: bool,
) -> None:
    proxy = proxy_of(adapter)
    for cut in (proxy.cut_after, proxy.cut_before):
        bank = Bank(adapter)
        runs = transfers(bank)
        runs[("n4", "n6")] = (bank.transfer, 1)
        there = 10
        if changed and not case.has_locks:
            there = 100
            runs[PAIRS[0]] = (After(partial(adapter.put, "n3", there), bank.transfer), 1)
        with bank.processor() as processor:
            rule = cut(adapter.commit_marker)
            answers = together(processor, runs)
        assert rule.met == 1
        for keys, before, after in [
            (pair, [10, 10], [9, 11]) for pair in PAIRS if pair not in {("n2", "n3"), ("n4", "n5"), ("n6", "n7")}
        ] + [(("n2", "n3"), [10, there], [9, there + 1]), (("n4", "n5", "n6", "n7"), [10] * 4, [8, 11, 10, 11])]:
            told = [answer for named, answer in answers.items() if set(named) <= set(keys)]
            failed = [answer for answer in told if isinstance(answer, Exception)]
            assert len(failed) in {0, len(told)}
            assert not failed or not case.knows_outcome
            assert bank.totals(list(keys)) in ([before, after] if failed else [after])
    adapter.clear()
    assert_as_good_as_new(adapter)


# -- several processes ------------------------------------------------------------------------------------------


@over_across
def test_money_that_two_processes_move_at_once_is_neither_lost_nor_made(
    case: Any,
    adapter: Adapter,  # noqa: F811
    another: Another,  # noqa: F811
) -> None:
    dice = random.Random(3)
    bank = Bank(adapter, 100)
    theirs = [(dice.sample(KEYS, 2), f"transfer-{number}") for number in range(60)]

    def runs() -> dict[Any, tuple[Any, ...]]:
        named = [dice.sample(KEYS, dice.choice([2, 2, 3])) for _ in range(20)]
        return {tuple(keys): (spread, adapter, dice.randint(1, 150)) for keys in named}

    with bank.processor(max_attempts=200) as processor, another.opened(case, adapter):
        told = spawned(another.transfers, theirs, 20)
        answers = [answer for _ in range(5) for answer in together(processor, runs()).values()]
        failed = [answer for answer in told.get() if not isinstance(answer, list) and "TooLittle" not in answer]
    assert failed == []
    assert all(answer is None or isinstance(answer, TooLittle) for answer in answers)
    assert sum(total or 0 for total in bank.totals()) == 100 * len(KEYS)


def spread(accounts: tuple[Any, ...], adapter: Adapter, amount: int) -> None:  # noqa: F811
    """Take *amount* from the first one, and give each other one its part."""
    adapter.take(accounts[0], amount)
    for account in accounts[1:-1]:
        adapter.add(account, amount // 2)
        amount -= amount // 2
    adapter.add(accounts[-1], amount)

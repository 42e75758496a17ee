"""An operation that raises changes nothing, and nobody is judged by what it left behind (guarantee 18)."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchAborted, BatchTimeout, Conflict, Processor, current_batch
from geventbatch._watch import log
from geventbatch.errors import CannotUndo
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime


class NotEnough(Exception):
    """There is less than was to be taken."""


class Crash(BaseException):
    """What no ``except Exception`` sees."""


class Lock:
    """Of it there is no copy."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@dataclass
class Account:
    """It changes first and checks then, as is right in a transaction."""

    balance: int
    history: list[int] = field(default_factory=list)

    def withdraw(self, amount: int) -> int:
        self.history.append(-amount)
        self.balance -= amount
        if self.balance < 0:
            raise NotEnough(amount)
        return self.balance


class Undoing:
    """A scope that copies its list as a tuple; it counts, and may take its time or refuse."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def __enter__(self) -> Account:
        self.bank.loads += 1
        self.loaded = self.checkpoint_of(self.bank.account)
        self.account = deepcopy(self.bank.account)
        return self.account

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is None:
            self.bank.account = deepcopy(self.account)
            self.bank.saves += 1

    @staticmethod
    def checkpoint_of(account: Account) -> tuple[int, tuple[int, ...]]:
        return account.balance, tuple(account.history)

    def checkpoint(self) -> object:
        self.bank.happen("checkpoint")
        return self.checkpoint_of(self.account)

    def restore(self, checkpoint: Any) -> Account:
        self.bank.happen("restore")
        balance, history = self.loaded if checkpoint is None else checkpoint
        self.account = Account(balance, list(history))
        return self.account


class Bank:
    """One account, opened in one form or another."""

    def __init__(self, balance: int = 100) -> None:
        self.account = Account(balance)
        self.loads = self.saves = 0
        self.log: list[str] = []
        self.on: dict[str, Callable[[], object]] = {}

    def happen(self, what: str) -> None:
        self.log.append(what)
        self.on.get(what, lambda: None)()

    def load(self, key: str) -> Account:
        self.loads += 1
        return deepcopy(self.account)

    def save(self, key: str, account: Account) -> None:
        self.saves += 1
        self.account = account

    @contextmanager
    def open(self, key: str) -> Iterator[Account]:
        account = self.load(key)
        history = account.history  # a scope may hold, and save, a part of what it gave
        yield account
        self.save(key, Account(account.balance, history))

    @contextmanager
    def open_whole(self, key: str) -> Iterator[Account]:
        account = self.load(key)
        yield account
        self.save(key, account)

    def load_many(self, keys: list[str]) -> dict[str, Account]:
        return {key: self.load(key) for key in keys}

    def save_many(self, accounts: dict[str, Account]) -> None:
        for key, account in accounts.items():
            self.save(key, account)

    def processor(self, form: str = "undoing", **options: Any) -> Processor[Account]:
        forms: dict[str, dict[str, Any]] = {
            "undoing": {"open_resource": lambda _: Undoing(self)},
            "pair": {"load_resource": self.load, "save_resource": self.save},
            "scope": {"open_resource": self.open},
            "bulk": {"load_resources": self.load_many, "save_resources": self.save_many},
        }
        return Processor(**{"min_duration": 0, "max_duration": 5, **forms[form], **options})


FORMS = ("undoing", "pair", "scope", "bulk")


def answers_of(processor: Processor[Any], *operations: Any) -> list[Any]:
    """What the callers of *operations*, functions with their arguments, have got."""
    callers = [gevent.spawn(answer_of, processor.run, "k", *operation) for operation in operations]
    return [caller.get() for caller in callers]


def withdrawals(processor: Processor[Account], *amounts: int) -> list[Any]:
    return answers_of(processor, *((Account.withdraw, amount) for amount in amounts))


def told(answers: list[Any]) -> list[Any]:
    return [type(answer) if isinstance(answer, BaseException) else answer for answer in answers]


# What is saved, and who is judged by what


@pytest.mark.parametrize("options", [{}, {"copy_resource": None}, {"copy_resource": deepcopy}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_what_changes_first_and_checks_then_is_right_as_in_a_transaction(
    clock: VirtualTime, form: str, options: dict[str, Any]
) -> None:
    bank = Bank(100)
    with bank.processor(form, **options) as processor:
        assert told(withdrawals(processor, 30, 1000, 30)) == [70, NotEnough, 40]
    assert bank.account == Account(40, [-30, -30])
    assert bank.saves == 1


@pytest.mark.parametrize("copy", ["default", "none", "own"])
@pytest.mark.parametrize("form", FORMS)
def test_nobody_is_judged_by_what_another_one_left_behind_however_many_raise(
    clock: VirtualTime, form: str, copy: str
) -> None:
    copies: dict[str, Any] = {
        "default": {},
        "none": {"copy_resource": None},
        "own": {"copy_resource": lambda account: Account(account.balance, list(account.history))},
    }
    bank = Bank(10)
    # What a scope holds of its resource on its own is not brought back by a copy of the whole.
    scope: dict[str, Any] = {"open_resource": bank.open_whole} if (form, copy) == ("scope", "own") else {}
    with bank.processor(form, **copies[copy], **scope) as processor:
        found = told(withdrawals(processor, *[1000, 1, 500, 10, 1] * 6))
    balance = 10
    expected: list[Any] = []
    for amount in [1000, 1, 500, 10, 1] * 6:
        if amount <= balance:
            balance -= amount
            expected.append(balance)
        else:
            expected.append(NotEnough)
    assert found == expected
    assert bank.account == Account(0, [-1] * 10)


@pytest.mark.parametrize("form", FORMS)
def test_a_resource_that_can_be_copied_is_loaded_twice_at_the_most_however_many_raise(
    clock: VirtualTime, form: str
) -> None:
    bank = Bank(1000)
    with bank.processor(form) as processor:
        assert told(withdrawals(processor, *[1, 5000] * 200))[-2:] == [800, NotEnough]
    assert bank.loads == (1 if form == "undoing" else 2)


@pytest.mark.parametrize("form", ["pair", "scope", "bulk"])
def test_what_cannot_be_copied_is_loaded_for_each_that_raises_and_that_is_told_once(
    clock: VirtualTime, form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_logged", set())
    bank = Bank(100)
    bank.account.history = [Lock()]  # type: ignore[list-item]
    load = bank.load

    def load_anew(key: str) -> Account:
        bank.account, account = Account(bank.account.balance), bank.account
        found = load(key)
        bank.account = account
        found.history.append(Lock())  # type: ignore[arg-type]
        return found

    bank.load = load_anew  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING, "geventbatch"), bank.processor(form) as processor:
        assert told(withdrawals(processor, 1, *[1000] * 8, 1)) == [99, *[NotEnough] * 8, 98]
        assert bank.loads == 9
        assert told(withdrawals(processor, 1, *[1000] * 8, 1)) == [97, *[NotEnough] * 8, 96]
        clock.advance(1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "cannot be undone in memory" in line
    assert "lock" in line.lower()
    assert "clean_errors=(NotEnough,)" in line


def test_a_scope_written_by_hand_keeps_the_very_objects_that_it_gave(clock: VirtualTime) -> None:
    given: list[Any] = []
    saved: list[Any] = []

    class Seats(dict[str, list[str]]):
        __slots__ = ("count",)
        count: int

    @contextmanager
    def scope(key: str) -> Iterator[Seats]:
        seats = Seats({"first": ["Ann"]})
        seats.count = 1
        given.append((seats, seats["first"]))
        yield seats
        saved.append((seats, seats["first"], deepcopy(dict(seats)), seats.count))

    def spoil(seats: Seats) -> None:
        seats["first"].append("nobody")
        seats["second"] = []
        del seats.count
        raise NotEnough

    def book(seats: Seats, name: str) -> int:
        seats["first"].append(name)
        seats.count += 1
        return seats.count

    with Processor(open_resource=scope, min_duration=0) as processor:
        assert told(answers_of(processor, (book, "Bob"), (spoil,), (book, "Cid"))) == [2, NotEnough, 3]
    assert saved == [(*given[-1], {"first": ["Ann", "Bob", "Cid"]}, 3)]
    assert all(one is other for one, other in zip(saved[0][:2], given[-1], strict=True))


def test_an_answer_is_of_the_state_that_is_saved_and_nothing_changes_it_any_more(clock: VirtualTime) -> None:
    bank = Bank(100)

    def history(account: Account) -> dict[str, list[int]]:
        return {"history": account.history}

    with bank.processor("scope") as processor:
        found = answers_of(
            processor, (history,), (Account.withdraw, 1), (Account.withdraw, 500), (history,), (Account.withdraw, 2)
        )
    assert (found[0], found[3]) == ({"history": []}, {"history": [-1]})
    assert bank.account.history == [-1, -2]


def test_what_returns_what_is_still_to_run_is_undone_like_any_other(clock: VirtualTime) -> None:
    async def later() -> None: ...

    def change_and_return_a_coroutine(account: Account) -> Any:
        account.balance = 0
        return later()

    bank = Bank(100)
    with bank.processor(clean_errors=(Exception,)) as processor:
        found = answers_of(processor, (Account.withdraw, 1), (change_and_return_a_coroutine,), (Account.withdraw, 2))
    assert told(found) == [99, TypeError, 97] or issubclass(told(found)[1], TypeError)
    assert bank.account == Account(97, [-1, -2])


@pytest.mark.parametrize("form", FORMS)
def test_a_clean_error_is_a_promise_that_is_taken_at_its_word(clock: VirtualTime, form: str) -> None:
    bank = Bank(100)
    with bank.processor(form, clean_errors=(NotEnough,)) as processor:
        assert told(withdrawals(processor, 1000, 1)) == [NotEnough, NotEnough]
    assert (bank.loads, bank.log) == (1, [])


def test_an_operation_on_what_is_immutable_has_nothing_to_be_undone(clock: VirtualTime) -> None:
    runs: list[str] = []

    def note(resource: None, what: str) -> None:
        runs.append(what)
        if what == "bad":
            raise NotEnough

    with Processor(min_duration=0) as processor:
        assert told(answers_of(processor, (note, "a"), (note, "bad"), (note, "b"))) == [None, NotEnough, None]
    assert runs == ["a", "bad", "b"]


# What it costs


def test_each_that_raises_costs_one_restoring_and_a_copy_only_if_somebody_has_returned_since_the_last_one(
    clock: VirtualTime,
) -> None:
    bank = Bank(100)
    with bank.processor() as processor:
        withdrawals(processor, 1000, 1000, 1, 1000, 1000, 1000, 1, 1000)
    assert bank.log.count("restore") == 6
    assert bank.log == ["restore", "restore", "restore", "checkpoint", "restore", "restore", "restore", "checkpoint"]


def test_applying_again_comes_to_one_more_pass_at_the_most(clock: VirtualTime) -> None:
    """However dear a copy is, and however often somebody raises."""
    for pattern in ([1, 1000], [1, 1, 1, 1000], [1000, 1], [1] * 50 + [1000], [1] * 10 + [1000] * 3):
        bank = Bank(500)
        applied: list[int] = []

        def withdraw(account: Account, amount: int, applied: list[int] = applied) -> int:
            applied.append(amount)
            return account.withdraw(amount)

        bank.on["checkpoint"] = lambda: clock.spend(0.01)
        amounts = (pattern * 400)[:400]
        with bank.processor(max_duration=500) as processor:
            answers_of(processor, *((withdraw, amount) for amount in amounts))
        assert len(applied) <= 2 * 400 + 1
        assert bank.loads == 1
        assert bank.account.history == [-1] * amounts.count(1)


def test_a_copy_is_taken_once_applying_again_has_cost_as_much(clock: VirtualTime) -> None:
    bank = Bank(1000)

    def withdraw_slowly(account: Account, amount: int) -> int:
        clock.spend(0.001)
        return account.withdraw(amount)

    bank.on["restore"] = bank.on["checkpoint"] = lambda: clock.spend(0.005)
    amounts = [1] * 12 + [5000] * 3 + [1, 5000, 1, 5000]
    with bank.processor(max_duration=50) as processor:
        answers_of(processor, *((withdraw_slowly, amount) for amount in amounts))
    # The first one has twelve applied again, which is dearer than a copy; the others after it nobody, or one or two.
    assert bank.log == ["restore", "checkpoint", *["restore"] * 4]


def test_where_every_second_one_raises_a_copy_is_made_ahead_and_hardly_anything_is_applied_again(
    clock: VirtualTime,
) -> None:
    bank, applied = Bank(1000), [0]

    def withdraw(account: Account, amount: int) -> int:
        applied[0] += 1
        return account.withdraw(amount)

    with bank.processor() as processor:
        answers = told(answers_of(processor, *((withdraw, amount) for amount in [1, 5000] * 200)))
    assert answers == [one for number in range(200) for one in (999 - number, NotEnough)]
    assert applied[0] <= 400 + 10
    assert bank.account.history == [-1] * 200
    assert bank.loads == 1


@pytest.mark.parametrize("seed", range(40))
def test_however_they_raise_each_costs_one_copy_at_the_most_and_everybody_finds_what_the_others_have_left(
    clock: VirtualTime, seed: int
) -> None:
    rng = Random(seed)
    often, dear = rng.choice([0.1, 0.5, 0.9]), rng.choice([0, 0, 0.001, 0.01])
    amounts = [rng.choice([1, 2]) if rng.random() < often else 5000 for _ in range(60)]
    for place in range(rng.randrange(50), 60, 2):  # and in turns
        amounts[place - 1 : place + 1] = [1, 5000]
    bank, applied = Bank(1000), [0]
    rows: list[object] = []
    bank.on["checkpoint"] = lambda: clock.spend(dear)
    no_more = rng.random() < 0.3  # copies are to be had, behind the first few
    if no_more:
        bank.on["checkpoint"] = lambda: _refuse(bank.log.count("checkpoint") in {6, 7})

    def withdraw(account: Account, amount: int) -> int:
        applied[0] += 1
        clock.spend(0.001)
        if seed % 2:
            current_batch().add_row(amount)
        return account.withdraw(amount)

    class Auditing(Undoing):
        takes_rows = True

        def __exit__(self, kind: object, error: object, traceback: object) -> None:
            rows.extend(current_batch().rows)
            super().__exit__(kind, error, traceback)

    with bank.processor(open_resource=lambda _: Auditing(bank), max_duration=500) as processor:
        answers = told(answers_of(processor, *((withdraw, amount) for amount in amounts)))
    balance, expected = 1000, []
    for amount in amounts:
        balance -= amount if amount < 5000 else 0
        expected.append(balance if amount < 5000 else NotEnough)
    assert answers == expected
    assert bank.account.history == [-amount for amount in amounts if amount < 5000]
    assert rows == [amount for amount in amounts if amount < 5000 and seed % 2]
    assert bank.log.count("restore") == amounts.count(5000)
    copies = "".join("r" if one == "restore" else "c" for one in bank.log)
    assert "cc" not in copies
    assert not copies.startswith("c")
    assert no_more or applied[0] <= 2 * len(amounts) + 1


def _refuse(refused: bool) -> None:
    if refused:
        raise CannotUndo("not now")


def test_nothing_is_copied_or_restored_where_nobody_raises(clock: VirtualTime) -> None:
    def refuse_to_copy(account: Account) -> Account:
        raise AssertionError

    bank = Bank(100)
    with bank.processor("pair", copy_resource=refuse_to_copy) as processor:
        assert withdrawals(processor, 1, 2, 3) == [99, 97, 94]
    with bank.processor() as processor:
        assert withdrawals(processor, 1, 2, 3) == [93, 91, 88]
    assert bank.log == []


def test_the_hub_has_its_turns_while_a_thousand_are_applied_again(clock: VirtualTime) -> None:
    bank = Bank(10**9)
    turns: list[float] = []

    def withdraw_slowly(account: Account, amount: int) -> int:
        clock.spend(0.001)
        return account.withdraw(amount)

    def watch() -> None:
        while True:
            turns.append(clock.now())
            gevent.sleep(0.001)

    with bank.processor(max_duration=50) as processor:
        watcher = gevent.spawn(watch)
        answers_of(processor, *((withdraw_slowly, 1) for _ in range(500)), (withdraw_slowly, 10**10))
        watcher.kill()
    assert max(later - earlier for earlier, later in pairwise(turns)) < 0.01


# Those that are applied again


def test_one_that_raises_when_it_is_applied_again_has_its_new_error_and_is_undone_too(clock: VirtualTime) -> None:
    bank = Bank(100)
    runs: list[str] = []

    def once(account: Account) -> None:
        runs.append("once")
        account.balance -= 50
        if len(runs) > 1:
            raise KeyError("not twice")

    with bank.processor() as processor:
        found = answers_of(
            processor,
            (Account.withdraw, 1),
            (once,),
            (Account.withdraw, 2),
            (Account.withdraw, 900),
            (Account.withdraw, 3),
        )
    assert told(found) == [99, KeyError, 97, NotEnough, 94]
    assert bank.account == Account(94, [-1, -2, -3])


def test_each_is_applied_again_in_a_fresh_copy_of_its_callers_context(clock: VirtualTime) -> None:
    from contextvars import ContextVar

    mark: ContextVar[str] = ContextVar("mark", default="none")
    seen: list[str] = []

    def note(account: Account) -> None:
        seen.append(mark.get())
        mark.set("changed")

    def caller(colour: str) -> None:
        mark.set(colour)
        processor.run("k", note)

    with Bank().processor() as processor:
        callers = [gevent.spawn(caller, colour) for colour in ("red", "green")]
        refused = gevent.spawn(withdrawals, processor, 1000)
        gevent.joinall(callers, raise_error=True)
        assert told(refused.get()) == [NotEnough]
    assert seen == ["red", "green"] * 2


def test_an_error_that_comes_after_a_conflict_is_judged_by_what_is_there_then(clock: VirtualTime) -> None:
    bank = Bank(10)
    scope = Undoing(bank)
    leave = scope.__exit__
    conflicts = [Conflict()]

    def exit_once(self: Undoing, kind: object, error: object, traceback: object) -> None:
        if kind is None and conflicts:
            bank.account = Account(5000)
            raise conflicts.pop()
        Undoing.__exit__(self, kind, error, traceback)

    class Contended(Undoing):
        __exit__ = exit_once

    with bank.processor(open_resource=lambda _: Contended(bank)) as processor:
        assert withdrawals(processor, 5, 1000) == [4995, 3995]
    assert leave is not None


# Scopes that cannot undo


@pytest.mark.parametrize("what", [CannotUndo("something was sent"), ValueError("a mistake")], ids=repr)
def test_what_a_scope_cannot_take_back_has_the_batch_loaded_again_for_each(clock: VirtualTime, what: Exception) -> None:
    def refuse() -> None:
        raise what

    bank = Bank(100)
    bank.on["restore"] = refuse
    with bank.processor() as processor:
        assert told(withdrawals(processor, 1, *[1000] * 7, 2)) == [99, *[NotEnough] * 7, 97]
    assert bank.loads == 8
    assert bank.account == Account(97, [-1, -2])


@pytest.mark.parametrize("what", [CannotUndo("something was sent"), ValueError("a mistake")], ids=repr)
def test_without_a_copy_the_next_one_is_undone_from_the_copy_before(clock: VirtualTime, what: Exception) -> None:
    def refuse() -> None:
        raise what

    bank = Bank(100)
    bank.on["checkpoint"] = refuse
    with bank.processor() as processor:
        assert told(withdrawals(processor, *[1, 1000] * 3)) == [99, NotEnough, 98, NotEnough, 97, NotEnough]
    assert (bank.loads, bank.log.count("checkpoint")) == (1, 1)


def test_what_cannot_be_copied_is_saved_before_applying_it_again_comes_to_more_than_one_pass(
    clock: VirtualTime,
) -> None:
    def refuse() -> None:
        raise CannotUndo("there is a lock in it")

    for pattern in ([1, 1000], [1, 1, 1, 1000], [1000, 1], [1] * 50 + [1000], [1] * 10 + [1000] * 3):
        bank = Bank(500)
        bank.on["checkpoint"] = refuse
        applied: list[int] = []

        def withdraw(account: Account, amount: int, applied: list[int] = applied) -> int:
            applied.append(amount)
            return account.withdraw(amount)

        amounts = (pattern * 400)[:400]
        with bank.processor(max_duration=500) as processor:
            answers = answers_of(processor, *((withdraw, amount) for amount in amounts))
        assert told(answers).count(NotEnough) == amounts.count(1000)
        assert len(applied) <= 2 * 400 + 1
        assert bank.loads <= 1 + amounts.count(1000)
        assert bank.account.history == [-1] * amounts.count(1)


def test_a_scope_that_cannot_undo_goes_step_by_step_if_it_can(clock: VirtualTime) -> None:
    bank = Bank(100)

    class Stepping(Undoing):
        steps = True

        def begin_steps(self) -> None:
            bank.log.append("begin")
            self.step = self.checkpoint_of(self.account)

        def keep(self) -> None:
            bank.log.append("keep")
            self.step = self.checkpoint_of(self.account)

        def undo(self) -> Account:
            bank.log.append("undo")
            self.account = Account(self.step[0], list(self.step[1]))
            return self.account

        def restore(self, checkpoint: Any) -> Account:
            raise CannotUndo("something was sent")

    with bank.processor(open_resource=lambda _: Stepping(bank)) as processor:
        assert told(withdrawals(processor, 1, 1000, 1000, 2)) == [99, NotEnough, NotEnough, 97]
    assert bank.log == ["begin", "keep", "undo", "undo", "keep"]
    assert bank.loads == 2


def test_a_copy_of_a_mapped_instance_would_be_saved_by_nobody_and_is_not_taken(clock: VirtualTime) -> None:
    from tests.support.mapped_trains import Train  # one of SQLAlchemy's

    saved: list[Any] = []
    loaded: list[Any] = []

    def load(key: str) -> Any:
        loaded.append(Train(name="ICE 1"))
        return loaded[-1]

    def rename(train: Any, name: str) -> str:
        train.name = name
        if name == "bad":
            raise NotEnough
        return name

    with Processor(
        load_resource=load, save_resource=lambda _, train: saved.append((train, train.name)), min_duration=0
    ) as processor:
        assert told(answers_of(processor, (rename, "a"), (rename, "bad"), (rename, "bad"), (rename, "b"))) == [
            "a",
            NotEnough,
            NotEnough,
            "b",
        ]
    assert saved == [(loaded[-1], "b")]


@pytest.mark.parametrize("form", ["pair", "scope"])
def test_a_load_that_gives_a_living_object_has_nothing_applied_to_it_twice_and_that_is_told(
    clock: VirtualTime, form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_logged", set())
    account = Account(100)

    @contextmanager
    def scope(key: str) -> Iterator[Account]:
        yield account

    def check_first(account: Account, amount: int) -> int:
        if amount > account.balance:
            raise NotEnough
        return account.withdraw(amount)

    options: Any = (
        {"load_resource": lambda _: account, "save_resource": lambda *_: None}
        if form == "pair"
        else {"open_resource": scope}
    )
    with (
        caplog.at_level(logging.WARNING, "geventbatch"),
        Processor[Account](**{"min_duration": 0, "max_duration": 5, **options}) as processor,
    ):
        found = answers_of(processor, *((check_first, amount) for amount in (1, 1000, 2, 1000, 3, 1000)))
        assert told(found) == [99, NotEnough, 97, NotEnough, 94, NotEnough]
        # The first one cannot be undone; from then on it is brought back in place.
        found = withdrawals(processor, 1, 2, 1000, 3, 1000, 4)
        assert told(found) == [93, 91, NotEnough, NotEnough, NotEnough, NotEnough]
        clock.advance(1)
    assert account == Account(-909, [-1, -2, -3, -1, -2, -1000])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the next load returned the same object" in line
    assert "Let the load return a new object each time" in line


# Every way out answers everybody


@pytest.mark.parametrize("what", ["restore", "checkpoint"])
def test_a_crash_while_it_undoes_answers_everybody(clock: VirtualTime, what: str) -> None:
    def crash() -> None:
        raise Crash

    bank = Bank(100)
    bank.on[what] = crash
    with bank.processor() as processor:
        found = withdrawals(processor, 1, 1000, 2)
        assert told(found) == [BatchAborted] * 3
        assert all(error.retry_safe for error in found)
        del bank.on[what]
        assert withdrawals(processor, 1) == [99]


@pytest.mark.parametrize("where", ["restore", "checkpoint", "again"])
@pytest.mark.parametrize("how", ["deadline", "kill"])
def test_the_deadline_or_a_kill_while_it_undoes_answers_everybody(clock: VirtualTime, where: str, how: str) -> None:
    workers: list[Any] = []
    runs: list[int] = []

    def hang() -> None:
        workers.append(gevent.getcurrent())
        gevent.sleep(100)

    def hang_the_second_time(account: Account) -> None:
        runs.append(1)
        if len(runs) > 1 and where == "again":
            hang()

    bank = Bank(100)
    bank.on[where] = hang
    with bank.processor(max_duration=1) as processor:
        callers = [
            gevent.spawn(answer_of, processor.run, "k", *one)
            for one in ((Account.withdraw, 1), (hang_the_second_time,), (Account.withdraw, 1000), (Account.withdraw, 2))
        ]
        clock.advance(0.5)
        if how == "kill":
            gevent.kill(workers[0])
        found = [caller.get() for caller in callers]
        assert told(found) == [BatchTimeout if how == "deadline" else BatchAborted] * 4
        assert all(error.retry_safe for error in found)
        bank.on.clear()
        runs.clear()
        assert withdrawals(processor, 1) == [99]


# What operators see


def test_a_batch_that_undoes_for_long_says_whose_error_could_be_named_once(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_logged", set())
    bank = Bank(100)
    bank.on["restore"] = lambda: clock.spend(0.02)
    with caplog.at_level(logging.WARNING, "geventbatch"), bank.processor() as processor:
        for _ in range(3):
            withdrawals(processor, 1, 1000)
        clock.advance(1)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "clean_errors=(NotEnough,)" in line
    assert "Account.withdraw" in line


@pytest.mark.parametrize(("undoing", "loading"), [(0.009, 0.0), (0.2, 1.0)])
def test_a_batch_that_undoes_for_less_than_10_ms_or_a_fifth_of_its_time_says_nothing(
    clock: VirtualTime,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    undoing: float,
    loading: float,
) -> None:
    monkeypatch.setattr(log, "_logged", set())
    bank = Bank(100)
    bank.on["restore"] = lambda: clock.spend(undoing)

    class Slow(Undoing):
        def __enter__(self) -> Account:
            gevent.sleep(loading)
            return super().__enter__()

    with (
        caplog.at_level(logging.WARNING, "geventbatch"),
        bank.processor(open_resource=lambda _: Slow(bank), max_blocking_time=None) as processor,
    ):
        withdrawals(processor, 1, 1000)
        clock.advance(1)
    assert not caplog.records


def test_the_metric_of_a_batch_says_how_often_it_has_undone_and_what_that_took(clock: VirtualTime) -> None:
    bank = Bank(100)
    bank.on["restore"] = lambda: clock.spend(0.25)
    with bank.processor() as processor:
        metrics = processor.subscribe_batch_metrics()
        withdrawals(processor, 1, 1000, 2, 1000)
        withdrawals(processor, 1)
        assert processor.stats().undone_total == 2
    first, second = metrics
    assert (first.undone, second.undone) == (2, 0)
    assert first.undo_duration == pytest.approx(0.5, abs=0.01)
    assert second.undo_duration == 0


def test_rows_of_what_raised_are_dropped_and_those_of_the_others_are_there_once(clock: VirtualTime) -> None:
    bank = Bank(100)
    rows: list[list[object]] = []

    class Auditing(Undoing):
        takes_rows = True

        def __exit__(self, kind: object, error: object, traceback: object) -> None:
            rows.append(current_batch().rows)
            super().__exit__(kind, error, traceback)

    def withdraw(account: Account, amount: int) -> int:
        current_batch().add_row(amount)
        return account.withdraw(amount)

    with bank.processor(open_resource=lambda _: Auditing(bank)) as processor:
        answers_of(processor, *((withdraw, amount) for amount in (1, 1000, 2, 3, 1000, 4)))
    assert rows == [[1, 2, 3, 4]]

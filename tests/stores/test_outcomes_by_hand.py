"""Outcomes in an `open_resources` of one's own, over Python's sqlite3: docs/own-stores.md says how to write it."""

from __future__ import annotations

import json
import random
import sqlite3
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Conflict, IdempotencyKeyReused, Processor, current_batch
from geventbatch.errors import Repeated
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from pathlib import Path

TABLES = """
CREATE TABLE accounts (name TEXT PRIMARY KEY, balance INTEGER NOT NULL);
CREATE TABLE outcomes (id TEXT PRIMARY KEY, outcome TEXT NOT NULL);
"""

Account = dict[str, int]


class Accounts:
    """Accounts by name. Nothing is locked from load to save: a save compares."""

    all_or_nothing = True
    keeps_outcomes = True

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)

    def __call__(self, keys: list[str]) -> AccountsScope:
        return AccountsScope(self.connection, keys)


class AccountsScope:
    def __init__(self, connection: sqlite3.Connection, keys: list[str]) -> None:
        self.connection = connection
        self.keys = keys

    def __enter__(self) -> dict[str, Account]:
        gevent.sleep(0)
        self.loaded = self.balances()
        self.accounts = {name: {"balance": balance} for name, balance in self.loaded.items()}
        return self.accounts

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                self.save()
            except BaseException:
                self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")

    def recorded(self, names: list[str]) -> dict[str, str]:
        asked = "SELECT id, outcome FROM outcomes WHERE id IN (SELECT value FROM json_each(?))"
        return dict(self.connection.execute(asked, [json.dumps(names)]))

    def save(self) -> None:
        new: dict[str, str] = {}
        for batch in set(current_batch().bulk.values()):
            new |= batch.outcomes
        there = self.recorded(list(new))
        if there:
            raise Repeated("recorded already", outcomes=there)
        if self.balances() != self.loaded:
            raise Conflict("changed by another writer")
        changes = [(account["balance"], name) for name, account in self.accounts.items()]
        self.connection.executemany("UPDATE accounts SET balance = ? WHERE name = ?", changes)
        self.connection.executemany("INSERT INTO outcomes VALUES (?, ?)", new.items())

    def balances(self) -> dict[str, int]:
        asked = "SELECT name, balance FROM accounts WHERE name IN (SELECT value FROM json_each(?))"
        return dict(self.connection.execute(asked, [json.dumps(self.keys)]))


def transfer(accounts: tuple[Account, ...], amount: int) -> int:
    source, target = accounts
    if source["balance"] < amount:
        raise ValueError("too little")
    source["balance"] -= amount
    target["balance"] += amount
    return source["balance"]


def deposit(account: Account, amount: int) -> int:
    account["balance"] += amount
    return account["balance"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "accounts.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(TABLES)
        connection.executemany("INSERT INTO accounts VALUES (?, 100)", [(name,) for name in "abcdef"])
    connection.close()
    return path


def opened(stack: ExitStack, path: Path, **options: Any) -> Processor[Account]:
    accounts = Accounts(path)
    stack.callback(accounts.connection.close)
    return stack.enter_context(Processor(open_resources=accounts, min_duration=0, max_duration=5, **options))


def sent_to(processor: Processor[Account], keys: list[str], amount: int, name: str) -> Any:
    return gevent.spawn(partial(processor.run_across, idempotency_key=name), keys, transfer, amount)


def balances(path: Path) -> dict[str, int]:
    with sqlite3.connect(path) as connection:
        found = dict(connection.execute("SELECT name, balance FROM accounts"))
    connection.close()
    return found


def test_what_is_sent_again_has_its_outcome_and_the_others_of_its_bulk_are_saved(path: Path) -> None:
    with ExitStack() as stack:
        accounts = opened(stack, path)
        for left in (70, 70):
            assert accounts.run_across([*"ab"], transfer, 30, idempotency_key="1") == left
        error = answer_of(accounts.run_across, [*"ba"], transfer, 30, idempotency_key="1")
        assert isinstance(error, IdempotencyKeyReused)
        sent = [(["a", "b"], 30, "1"), (["b", "c"], 10, "2"), (["d", "e"], 10, "1")]
        callers = [sent_to(accounts, *one) for one in sent]
        callers.append(gevent.spawn(partial(accounts.run, idempotency_key="1"), "f", deposit, 5))
        assert [caller.get() for caller in callers] == [70, 120, 90, 105]
        with pytest.raises(ValueError, match="too little"):
            accounts.run_across([*"ab"], transfer, 300, idempotency_key="3")
        accounts.run("a", deposit, 1000)
        with pytest.raises(ValueError, match="too little"):
            accounts.run_across([*"ab"], transfer, 300, idempotency_key="3")
    assert balances(path) == {"a": 1070, "b": 120, "c": 110, "d": 90, "e": 110, "f": 105}


def test_two_processors_that_are_sent_the_same_apply_each_once(path: Path) -> None:
    dice = random.Random(1)
    sent = [(dice.sample("abcdef", 2), f"{number}") for number in range(40)]
    with ExitStack() as stack:
        both = [opened(stack, path, max_attempts=100, max_bulk=3) for _ in range(2)]
        callers = [sent_to(one, keys, 1, name) for keys, name in sent for one in both]
        answers = [caller.get() for caller in callers]
    assert answers[::2] == answers[1::2]
    expected = dict.fromkeys("abcdef", 100)
    for (source, target), _ in sent:
        expected[source] -= 1
        expected[target] += 1
    assert balances(path) == expected

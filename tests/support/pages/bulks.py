"""For docs/bulks.md."""

from contextlib import contextmanager

from geventbatch import Processor


class Account:
    """A resource."""

    def __init__(self, balance):
        self.balance = balance

    def withdraw(self, amount):
        self.balance -= amount

    def deposit(self, amount):
        self.balance += amount
        return self.balance


class database:  # noqa: N801 - the page calls it so
    """Balances in memory."""

    balances = {"Ann": 1, "shop": 0}

    @classmethod
    @contextmanager
    def transaction(cls):
        yield cls

    @classmethod
    def load_for_update(cls, keys):
        return {key: Account(cls.balances[key]) for key in keys}

    @classmethod
    def save(cls, accounts):
        cls.balances |= {key: account.balance for key, account in accounts.items()}


def transfer(accounts, amount):
    source, target = accounts
    source.withdraw(amount)
    target.deposit(amount)


def check(page):
    assert page["balance"] == 11
    assert database.balances == {"Ann": 1, "shop": 10}
    assert page["Processor"] is Processor

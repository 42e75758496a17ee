"""The application of the pages on Django: `bank.models` and `bank.processors`, as a project would have them."""

import sys
from types import ModuleType

from tests.support.django_project import start
from tests.support.django_project.bank import models as tested

assert start


class BankAccount(tested.Account):
    """With what the pages call."""

    class Meta:
        app_label = "bank"
        proxy = True

    def deposit(self, amount):
        self.balance += int(amount)
        return self.balance


sys.modules["bank.models"] = models = ModuleType("bank.models")
models.Account = Account = BankAccount

REPLACED = {
    'by="number"': 'by="name"',
    "from bank.processors import accounts\n": "",
}
"""All is one file here."""


def open_account(name):
    """One with nothing in it."""
    start.create_tables("default")
    Account.objects.create(name=name)

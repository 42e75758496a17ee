"""For docs/keys.md: the wallet, on a database of its own."""

import os
import tempfile
from uuid import uuid4

os.environ["DATABASE_URL"] = f"sqlite:///{tempfile.mkdtemp(prefix='page-')}/wallet.sqlite"
os.environ["DJANGO_SETTINGS_MODULE"] = "examples.wallet.settings"

import django

django.setup()

from django.core.management import call_command
from django.db.transaction import atomic

from examples.wallet.ledger import _accounts
from examples.wallet.models import Account, Kind, Ledger, Movement, Pending
from examples.wallet.ordering import credit, debit
from examples.wallet.processors import accounts
from geventbatch import Processor, current_batch
from geventbatch.stores import DjangoStore

call_command("migrate", verbosity=0)
source, target = (Account.objects.create(owner=name, balance=10).pk for name in ("Ann", "Bob"))
amount, reference = 3, uuid4()


def balances():
    return list(Account.objects.order_by("pk").values_list("balance", flat=True))


def check(page):
    assert balances() == [7, 13]
    accounts.run(source, page["_send"], target, 2, uuid4())
    assert Pending.objects.get().amount == 2
    assert balances() == [5, 13]

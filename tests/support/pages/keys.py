"""For docs/keys.md: the wallet, on a database of its own, with vouchers."""

import os
import tempfile
from uuid import uuid4

os.environ["DATABASE_URL"] = f"sqlite:///{tempfile.mkdtemp(prefix='page-')}/wallet.sqlite"
os.environ["DJANGO_SETTINGS_MODULE"] = "examples.wallet.settings"

import django

django.setup()

from django.core.management import call_command
from django.db import connection, models
from django.db.transaction import atomic

from examples.wallet.models import Account, Kind, Movement, Pending
from examples.wallet.outbox import credit, debit


class Voucher(models.Model):
    id = models.CharField(max_length=20, primary_key=True)
    worth = models.IntegerField()

    class Meta:
        app_label = "wallet"

    def __str__(self):
        return self.id

    def use(self):
        worth, self.worth = self.worth, 0
        return worth


call_command("migrate", verbosity=0)
with connection.schema_editor() as editor:
    editor.create_model(Voucher)
Voucher.objects.create(id="SPRING", worth=5)
ann, shop = (Account.objects.create(owner=name, balance=20).pk for name in ("Ann", "shop"))
reference = uuid4()


def balances():
    return list(Account.objects.order_by("pk").values_list("balance", flat=True))


def check(page):
    assert balances() == [20, 30]
    assert Movement.objects.get().amount == 10
    assert Voucher.objects.get().worth == 0
    page["accounts"].run(ann, page["_send"], shop, 2, uuid4())
    assert Pending.objects.get().amount == 2

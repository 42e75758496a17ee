#!/usr/bin/env bash
# Django 5.2.19 on SQLite: a Decimal with more digits than its DecimalField has is saved without an error, and can never be loaded again.
#
# save(), bulk_create() and update() with F() send the number as it is, and SQLite keeps no limit. Loading rounds it in a context of max_digits digits, and that
# raises decimal.InvalidOperation with no word of the field or the row. One such row spoils every query that returns it: all() fails for the others, too.
# full_clean() refuses the value, but save() does not call it, and it cannot see what F() computes. defer() and update() still reach the row.
#
# Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet django==5.2.19
cat > "$folder/run.py" <<'PYTHON'
from decimal import Decimal, InvalidOperation

import django
from django.conf import settings

settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
django.setup()
from django.core.exceptions import ValidationError
from django.db import connection, models


class Account(models.Model):
    balance = models.DecimalField(max_digits=10, decimal_places=2)

    class Meta:
        app_label = "bank"


with connection.schema_editor() as editor:
    editor.create_model(Account)


def balances(accounts):
    try:
        return [str(account.balance) for account in accounts]
    except InvalidOperation:
        return "InvalidOperation"


def create(value):
    return Account.objects.create(balance=Decimal(value))


rich, other = create("99999999.99"), create("5")
before = balances(Account.objects.all())
Account.objects.filter(pk=rich.pk).update(balance=models.F("balance") + Decimal("0.01"))
huge = create("1e30")
try:
    huge.full_clean()
    checked = "accepted"
except ValidationError:
    checked = "ValidationError"
found = {
    "all": balances(Account.objects.all()),
    "F": balances(Account.objects.filter(pk=rich.pk)),
    "save": balances(Account.objects.filter(pk=huge.pk)),
    "other": balances(Account.objects.filter(pk=other.pk)),
}
deferred = len(Account.objects.defer("balance"))
Account.objects.exclude(pk=other.pk).update(balance=0)
after = balances(Account.objects.all())
print(f"Django {django.__version__}: before {before}; saved, then loaded {found}; full_clean: {checked}; after update() {after}")
assert before == ["99999999.99", "5.00"], before
assert found == {"all": "InvalidOperation", "F": "InvalidOperation", "save": "InvalidOperation", "other": ["5.00"]}, found
assert (checked, deferred, after) == ("ValidationError", 3, ["0.00", "5.00", "0.00"]), (checked, deferred, after)
PYTHON
"$folder/venv/bin/python" "$folder/run.py"

"""For docs/django.md."""

from contextlib import suppress
from types import SimpleNamespace

import gevent
import pytest

from tests.support.pages.bank import REPLACED, Account, open_account


def check(page):
    from django.contrib.admin import site
    from django.core.exceptions import ValidationError
    from django.test import RequestFactory

    open_account("Ann")
    answer = page["deposit"](RequestFactory().post("/", {"amount": "5"}), "Ann")
    assert answer.content == b'{"balance": 5}'

    request = RequestFactory().post("/", {"amount": "5"})
    request.user = SimpleNamespace(is_authenticated=True)
    assert page["deposit_of_user"](request, "Ann").content == b'{"balance": 10}'

    def refuse(account):
        account.balance += 1
        raise ValidationError("no")

    callers = [
        gevent.spawn(page["accounts"].run, "Ann", refuse),
        gevent.spawn(page["accounts"].run, "Ann", len_of_name),
    ]
    with suppress(ValidationError):
        callers[0].get()
    assert callers[1].get() == 3

    with pytest.raises(ValidationError):  # its note is blank
        page["accounts"].run("Ann", page["withdraw"], 1)
    assert page["accounts"].run("Ann", Account.deposit, 0) == 10

    shown = Account.objects.get(name="Ann")
    assert page["accounts"].run("Ann", Account.deposit, 5) == 15
    shown.note = "seen"
    page["AccountAdmin"](Account, site).save_model(None, shown, SimpleNamespace(changed_data=["note"]), change=True)
    saved = Account.objects.get(name="Ann")
    assert (saved.balance, saved.note) == (15, "seen")


def len_of_name(account):
    return len(account.name)

"""For docs/django.md."""

from tests.pages.bank import REPLACED, open_account


def check(page):
    from django.test import RequestFactory

    open_account("Ann")
    answer = page["deposit"](RequestFactory().post("/", {"amount": "5"}), "Ann")
    assert answer.content == b'{"balance": 5}'

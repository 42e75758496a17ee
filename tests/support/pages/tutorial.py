"""For docs/tutorial.md: its blocks are `examples/tutorial`, which its own test runs on PostgreSQL; here on SQLite."""

import json
import os
import tempfile

os.environ["DATABASE_URL"] = f"sqlite:///{tempfile.mkdtemp(prefix='page-')}/accounts.sqlite"

from django.conf import settings

settings.configure(
    INSTALLED_APPS=["examples.tutorial.bank"],
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": os.environ["DATABASE_URL"].removeprefix("sqlite:///"),
        }
    },
    ALLOWED_HOSTS=["*"],
)

import django

django.setup()

from django.test import RequestFactory
from sqlalchemy.orm import Session

from examples.tutorial.django_batched import move, withdraw
from examples.tutorial.models import Account, Base, engine

Base.metadata.create_all(engine)
with Session(engine) as session, session.begin():
    session.add_all([Account(number=1, balance=5), Account(number=2, balance=0)])


def check(page):
    def take(amount):
        body = json.dumps({"amount": amount})
        return withdraw(RequestFactory().post("/", body, content_type="application/json"), 1).status_code

    assert [take(3), take(3)] == [200, 409]
    client = page["app"].test_client()
    asked = [client.post("/accounts/1/withdrawals", json={"amount": 2}) for _ in range(2)]
    assert [one.status_code for one in asked] == [200, 409]
    body = json.dumps({"amount": 0})
    moved = move(RequestFactory().post("/", body, content_type="application/json"), 1, 2)
    assert (moved.status_code, json.loads(moved.content)) == (200, {"balance": 0})
    with Session(engine) as session, session.begin():
        session.get_one(Account, 1).balance = 7
    asked = [client.post("/accounts/1/transfers/2", json={"amount": 4}) for _ in range(2)]
    assert [(one.status_code, one.json) for one in asked] == [(200, {"balance": 3}), (409, {"error": "not enough"})]
    with Session(engine) as session:
        assert session.get_one(Account, 2).balance == 4

"""For docs/idempotency.md."""

import re

from flask import Flask, abort, request

from geventbatch import Processor
from geventbatch.stores import DjangoStore, SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.pages.bank import REPLACED, Account, open_account
from tests.support.pages.trains import Base, Train, engine, run_trains

app = Flask(__name__)
first = idempotency_table("first_outcomes", Base.metadata)
trains = Processor(
    open_resource=SQLAlchemyStore.mapped(engine, Train, by="name", idempotency=first), min_duration=0, max_duration=5
)
REPLACED = REPLACED | {
    "class Outcome(OutcomeModel):\n    pass": "class PageOutcome(OutcomeModel):\n    class Meta: app_label = 'bank'",
    "idempotency=Outcome": "idempotency=PageOutcome",
}
run_trains("ICE 1")


def check(page):
    client = app.test_client()
    for _ in range(2):
        answer = client.post("/trains/ICE 1/seats/13", json={"passenger": "Bob"}, headers={"Idempotency-Key": "b"})
        assert answer.json == {"seat": 13}
    assert page["seat"] == 12

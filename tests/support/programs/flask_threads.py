"""A Flask application for servers with threads, without gevent's patch. Operations meet, so two are in two threads."""

import os
from contextlib import suppress
from threading import Barrier

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from gevent import monkey
from sqlalchemy.orm import Mapped, mapped_column

from geventbatch.integrations.flask import GeventBatch
from geventbatch.stores import SQLAlchemyStore

assert not monkey.is_module_patched("threading")
db = SQLAlchemy()
batches = GeventBatch()
accounts = batches.processor(
    make_store=lambda: SQLAlchemyStore.mapped(db.session, Account), min_duration=0, max_duration=30
)
saved: dict[int, int] = {}
numbers = batches.processor(
    load_resource=lambda key: [saved.get(key, 0)],
    save_resource=lambda key, resource: saved.update({key: resource[0]}),
    min_duration=0,
    max_duration=30,
)
meeting = Barrier(int(os.environ["MEETING"]))
met: set[int] = set()


class Account(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


def meet(number: int) -> None:
    if number not in met:  # not again in a replay
        met.add(number)
        meeting.wait(30)


def deposit(account: Account) -> int:
    meet(account.id)
    account.balance += 1
    return account.balance


def count(number: list[int]) -> int:
    meet(3)
    number[0] += 1
    return number[0]


app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE"]
db.init_app(app)
batches.init_app(app)
with app.app_context(), suppress(Exception):
    db.create_all()
    db.session.add_all([Account(id=1, balance=0), Account(id=2, balance=0)])
    db.session.commit()


@app.before_request
def log_in() -> None:
    db.session.get(Account, 1)


@app.get("/<int:number>")
def view(number: int) -> str:
    answer = accounts.run(number, deposit) if number in {1, 2} else numbers.run(number, count)
    return str(answer)

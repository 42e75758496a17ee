"""The same view, batched."""

from flask import Flask, request

from examples.tutorial.models import Account, engine
from geventbatch.integrations.flask import GeventBatch
from geventbatch.stores import SQLAlchemyStore

app = Flask(__name__)
batches = GeventBatch(app)


class NotEnough(Exception):
    pass


accounts = batches.processor(
    open_resource=SQLAlchemyStore.mapped(engine, Account, by="number"),
    min_duration=0,
    max_duration=5,
    max_batches=20,
    clean_errors=(NotEnough,),  # raised before anything is changed: there is nothing to undo
)


def take(account, amount):
    if account.balance < amount:
        raise NotEnough
    account.balance -= amount
    return account.balance


@app.post("/accounts/<int:number>/withdrawals")
def withdraw(number):
    try:
        return {"balance": accounts.run(number, take, request.json["amount"])}
    except NotEnough:
        return {"error": "not enough"}, 409


def transfer(found, amount):
    source, target = found  # in the order in which the keys were named
    balance = take(source, amount)
    target.balance += amount
    return balance


@app.post("/accounts/<int:number>/transfers/<int:target>")
def move(number, target):
    try:
        return {"balance": accounts.run_across([number, target], transfer, request.json["amount"])}
    except NotEnough:
        return {"error": "not enough"}, 409

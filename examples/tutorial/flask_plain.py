"""A view of Flask: each request locks the row, changes it, and lets go."""

from flask import Flask, request
from sqlalchemy.orm import Session

from examples.tutorial.models import Account, engine

app = Flask(__name__)


@app.post("/accounts/<int:number>/withdrawals")
def withdraw(number):
    with Session(engine) as session, session.begin():
        account = session.get_one(Account, number, with_for_update=True)
        if account.balance < request.json["amount"]:
            return {"error": "not enough"}, 409
        account.balance -= request.json["amount"]
        return {"balance": account.balance}

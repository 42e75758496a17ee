"""The same view, batched."""

import json

from django.http import JsonResponse
from django.urls import path

from examples.tutorial.bank.models import Account
from geventbatch import Processor
from geventbatch.stores import DjangoStore


class NotEnough(Exception):
    pass


accounts = Processor(
    open_resource=DjangoStore(Account, by="number"),
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


def withdraw(request, number):
    amount = json.loads(request.body)["amount"]
    try:
        return JsonResponse({"balance": accounts.run(number, take, amount)})
    except NotEnough:
        return JsonResponse({"error": "not enough"}, status=409)


def transfer(found, amount):
    source, target = found  # in the order in which the keys were named
    balance = take(source, amount)
    target.balance += amount
    return balance


def move(request, number, target):
    amount = json.loads(request.body)["amount"]
    try:
        return JsonResponse({"balance": accounts.run_across([number, target], transfer, amount)})
    except NotEnough:
        return JsonResponse({"error": "not enough"}, status=409)


urlpatterns = [
    path("accounts/<int:number>/withdrawals", withdraw),
    path("accounts/<int:number>/transfers/<int:target>", move),
]

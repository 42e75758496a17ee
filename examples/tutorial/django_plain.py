"""A view of Django: each request locks the row, changes it, and lets go."""

import json

from django.db.transaction import atomic
from django.http import JsonResponse
from django.urls import path

from examples.tutorial.bank.models import Account


@atomic
def withdraw(request, number):
    amount = json.loads(request.body)["amount"]
    account = Account.objects.select_for_update().get(number=number)
    if account.balance < amount:
        return JsonResponse({"error": "not enough"}, status=409)
    account.balance -= amount
    account.save()
    return JsonResponse({"balance": account.balance})


urlpatterns = [path("accounts/<int:number>/withdrawals", withdraw)]

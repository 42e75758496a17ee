from django.db import transaction
from django.http import HttpRequest, HttpResponse

from tests.support.django_project.bank import processors
from tests.support.django_project.bank.models import Account


def add(account: Account, amount: int) -> int:
    account.balance += amount
    return account.balance


def deposit(request: HttpRequest, name: str) -> HttpResponse:
    return HttpResponse(str(processors.accounts.run(name, add, 1)))


@transaction.non_atomic_requests
def exempt_deposit(request: HttpRequest, name: str) -> HttpResponse:
    return deposit(request, name)

"""The wallet over HTTP, as JSON.

A status of 201 means that the movement is saved; 202, that it is debited and will be credited. Whoever sends a
reference of their own (a UUID) may ask again after any failure: a movement that is saved already is not made again.

`ATOMIC_REQUESTS` makes each request a transaction. Those that run operations must not be one, since what is answered
is saved, whatever becomes of the request: they are `non_atomic_requests`.
"""

from __future__ import annotations

import json
import os
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from django.db import IntegrityError
from django.db.models import Sum
from django.db.transaction import non_atomic_requests
from django.http import HttpRequest, JsonResponse
from django.views.decorators.http import require_GET, require_POST

from examples.wallet import outbox, processors, transfers
from examples.wallet.models import Account, Kind, Movement, Pending
from examples.wallet.refusals import NotUnderstood, ReferenceUsed, UnknownAccount

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 2**53 - 1
"""The largest number that every JSON parser reads as it was written."""


@require_GET
def overview(request: HttpRequest) -> JsonResponse:
    """All the money."""
    return JsonResponse(
        {
            "accounts": Account.objects.count(),
            "balances": Account.objects.aggregate(sum=Sum("balance", default=0))["sum"],
            "pending": Pending.underway(),
        }
    )


@require_GET
@non_atomic_requests
def health(request: HttpRequest) -> JsonResponse:
    """How busy this worker is."""
    stats = processors.accounts.stats()
    told = {"accounts": repr(processors.accounts), "operations": stats.operations_total, "batches": stats.batches_total}
    return JsonResponse({**told, "worker": os.getpid()})


@require_POST
def open_account(request: HttpRequest) -> JsonResponse:
    """Open an empty account."""
    owner = _sent(request).get("owner")
    if not isinstance(owner, str) or not 1 <= len(owner.strip()) <= 80 or not owner.isprintable():
        raise NotUnderstood('send {"owner": "a name of 1 to 80 printable characters"}')
    return _shown_account(Account.objects.create(owner=owner.strip()), HTTPStatus.CREATED)


@require_GET
def account(request: HttpRequest, number: int) -> JsonResponse:
    """What is in it."""
    found = Account.objects.filter(pk=_existing(number)).first()
    if found is None:
        raise UnknownAccount(f"there is no account {number}")
    return _shown_account(found, HTTPStatus.OK)


@require_POST
@non_atomic_requests
def deposit(request: HttpRequest, number: int) -> JsonResponse:
    """Put money into an account."""
    sent = _sent(request)
    amount, reference = _number(sent, "amount"), _reference(sent)
    target = _existing(number)
    movement = _once(Kind.DEPOSIT, reference, lambda: transfers.deposit(target, amount, reference))
    return _shown(movement, HTTPStatus.CREATED, (None, target, amount))


@require_POST
@non_atomic_requests
def transfer(request: HttpRequest) -> JsonResponse:
    """Move money from one account to another one."""
    sent = _sent(request)
    source, target, amount, reference = _transfer(sent)
    movement = _once(Kind.TRANSFER, reference, lambda: transfers.transfer(source, target, amount, reference))
    return _shown(movement, HTTPStatus.CREATED, (source, target, amount))


@require_POST
@non_atomic_requests
def pending_transfer(request: HttpRequest) -> JsonResponse:
    """Take money from one account, to be put into another one soon."""
    source, target, amount, reference = _transfer(_sent(request))
    movement = _once(Kind.DEBIT, reference, lambda: outbox.send(source, target, amount, reference))
    return _shown(movement, HTTPStatus.ACCEPTED, (source, None, amount))


def _once(kind: Kind, reference: UUID, run: Callable[[], Movement]) -> Movement:
    """Run the operation; if its reference was saved before, give what was saved then."""
    try:
        return run()
    except IntegrityError:
        found = Movement.objects.filter(reference=reference, kind=kind).first()
        if found is None:
            raise
        return found


# -- what was sent, and what is shown ---------------------------------------------------------------------------


def _sent(request: HttpRequest) -> dict[str, Any]:
    try:
        sent = json.loads(request.body)
    except ValueError:
        sent = None
    # A page of another site cannot send this type without being asked.
    if request.content_type != "application/json" or not isinstance(sent, dict):
        raise NotUnderstood("send an object as application/json")
    return sent


def _transfer(sent: dict[str, Any]) -> tuple[int, int, int, UUID]:
    source, target = _number(sent, "source"), _number(sent, "target")
    if source == target:
        raise NotUnderstood("source and target are the same account")
    return source, target, _number(sent, "amount"), _reference(sent)


def _existing(number: int) -> int:
    """A number from a path, which may be longer than a column is wide."""
    if number > MOST:
        raise UnknownAccount(f"there is no account {number}")
    return number


def _number(sent: dict[str, Any], name: str) -> int:
    number = sent.get(name)
    if type(number) is not int or not 1 <= number <= MOST:
        raise NotUnderstood(f"{name} must be a whole number above 0")
    return number


def _reference(sent: dict[str, Any]) -> UUID:
    if "reference" not in sent:
        return uuid4()
    try:
        return UUID(sent["reference"])
    except (ValueError, AttributeError, TypeError):
        raise NotUnderstood("reference must be a UUID") from None


def _shown(movement: Movement, status: HTTPStatus, asked: tuple[int | None, int | None, int]) -> JsonResponse:
    if (movement.source_id, movement.target_id, movement.amount) != asked:
        raise ReferenceUsed(f"the reference {movement.reference} belongs to another {movement.kind}")
    told = {
        "reference": str(movement.reference),
        "kind": movement.kind,
        "amount": movement.amount,
        "source_balance": movement.source_balance,
        "target_balance": movement.target_balance,
    }
    return JsonResponse(told, status=status)


def _shown_account(found: Account, status: HTTPStatus) -> JsonResponse:
    return JsonResponse({"account": found.pk, "owner": found.owner, "balance": found.balance}, status=status)

"""Ordering: two keys, one after the other, always in the same order.

`in_one_transaction` is the way without batches. Whoever locks two rows, locks the lower number first, and so nobody
waits for somebody who waits for them. It is right beside batches, which lock the same rows.

`in_two_runs` takes from the one account in its batch, and then gives to the other one in that one's batch. What is
ordered is when money is where: first it leaves, then it arrives, and at no time can it be spent twice. But nothing
holds the two together. When the process dies between them, the money has left and never arrives; only the audit shows
it, as a debit without a credit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db.transaction import atomic

from examples.wallet import processors
from examples.wallet.models import Account, Kind, Movement
from examples.wallet.refusals import UnknownAccount
from geventbatch import current_batch

if TYPE_CHECKING:
    from uuid import UUID


def in_one_transaction(source_number: int, target_number: int, amount: int, reference: UUID) -> Movement:
    """Move *amount*, and return when it is saved."""
    with atomic():
        both = Account.objects.select_for_update().filter(pk__in=(source_number, target_number)).order_by("pk")
        locked = {account.pk: account for account in both}
        for number in (source_number, target_number):
            if number not in locked:
                raise UnknownAccount(f"there is no account {number}")
        source, target = locked[source_number], locked[target_number]
        source.take(amount)
        target.put(amount)
        Account.objects.bulk_update(locked.values(), ["balance"])
        movement = Movement.of(Kind.TRANSFER, reference, amount, source=source, target=target)
        movement.save(force_insert=True)
    return movement


def in_two_runs(source: int, target: int, amount: int, reference: UUID) -> Movement:
    """Move *amount*, and return when it is saved. An error of the second run leaves it in neither account."""
    processors.accounts.run(source, debit, amount, reference)
    return processors.accounts.run(target, credit, amount, reference)


def debit(source: Account, amount: int, reference: UUID) -> Movement:
    """The operation on the account that pays."""
    source.take(amount)
    movement = Movement.of(Kind.DEBIT, reference, amount, source=source)
    current_batch().add_row(movement)
    return movement


def credit(target: Account, amount: int, reference: UUID) -> Movement:
    """The operation on the account that is paid. A second one of the same reference is refused by the database."""
    target.put(amount)
    movement = Movement.of(Kind.CREDIT, reference, amount, target=target)
    current_batch().add_row(movement)
    return movement

"""Ordering, without batches: one transaction locks both rows, the lower number first.

So nobody waits in a circle for rows. It is right beside batches, which lock the same rows in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.db.transaction import atomic

from examples.wallet.models import Account, Kind, Movement
from examples.wallet.refusals import UnknownAccount

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

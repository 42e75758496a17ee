"""Pending transfers through an outbox: two batches, and a row that holds them together.

It is for accounts in two databases, which no transaction spans; here both are in one, for the sake of a short example.

`send` takes the money and adds a row to the outbox, in one batch of the account that pays: both are saved, or neither.
`finish`, in a process of its own, finds the rows, has each credited, and deletes them. Wherever that ends half-way, it
is done again, and that is harmless, since a credit can be saved only once: its reference is unique.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from django.db import IntegrityError
from gevent.pool import Pool

from examples.wallet import processors
from examples.wallet.models import Account, Kind, Movement, Pending
from examples.wallet.refusals import UnknownAccount
from geventbatch import BatchError, current_batch

if TYPE_CHECKING:
    from uuid import UUID

AT_ONCE: Final = 500
"""Pending transfers of one round; those for the same account are credited in one batch."""

_log = logging.getLogger(__name__)


def send(source: int, target: int, amount: int, reference: UUID) -> Movement:
    """Take *amount* from *source*, and return when that is saved, and that it is due to *target*."""
    try:
        return processors.accounts.run(source, _send, target, amount, reference)
    except IntegrityError:
        # Not looked up before: a foreign key sees to it, and only who names an account that is not there pays for that.
        if not Account.objects.filter(pk=target).exists():
            raise UnknownAccount(f"there is no account {target}") from None
        raise


def _send(source: Account, target: int, amount: int, reference: UUID) -> Movement:
    movement = debit(source, amount, reference)
    current_batch().add_row(Pending(reference=reference, target_id=target, amount=amount))
    return movement


def debit(source: Account, amount: int, reference: UUID) -> Movement:
    """Take *amount* from the account that pays."""
    source.take(amount)
    movement = Movement.of(Kind.DEBIT, reference, amount, source=source)
    current_batch().add_row(movement)
    return movement


def credit(target: Account, amount: int, reference: UUID) -> Movement:
    """Give *amount* to the account that is paid. The database refuses a second credit of the same reference."""
    target.put(amount)
    movement = Movement.of(Kind.CREDIT, reference, amount, target=target)
    current_batch().add_row(movement)
    return movement


def finish() -> int:
    """Credit what is pending, the oldest first, and give how much of it was credited: one round."""
    pending = list(Pending.objects.order_by("at")[:AT_ONCE])
    credited = _credited(pending)  # and not deleted, when somebody was killed in between
    to_do = [one for one in pending if one.reference not in credited]
    done = Pool(AT_ONCE).map(_credit, to_do)
    credited.update(one.reference for one, is_done in zip(to_do, done, strict=True) if is_done)
    Pending.objects.filter(reference__in=credited).delete()
    return len(credited)


def _credited(pending: list[Pending]) -> set[UUID]:
    references = [one.reference for one in pending]
    found = Movement.objects.filter(kind=Kind.CREDIT, reference__in=references)
    return set(found.values_list("reference", flat=True))


def _credit(pending: Pending) -> bool:
    """Whether it is certainly credited; if not, the next round looks again."""
    try:
        processors.accounts.run(pending.target_id, credit, pending.amount, pending.reference)
    except (BatchError, IntegrityError) as error:
        _log.warning("%s is still pending: %s", pending, error)
        return False
    return True

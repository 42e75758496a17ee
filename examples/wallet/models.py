"""Accounts, and what is written down about each operation.

Amounts are whole cents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from django.db import models
from django.utils import timezone

from examples.wallet.refusals import InsufficientFunds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID


class Accounts(models.QuerySet["Account"]):
    """Locks as an UPDATE does, the store's locks of its batches too: rows that refer to an account need not wait.

    Else two batches would deadlock that each add a pending transfer to the other one's account.
    """

    def select_for_update(
        self,
        nowait: bool = False,
        skip_locked: bool = False,
        of: Sequence[str] = (),
        no_key: bool = True,
    ) -> Self:
        """Django's own, with another default."""
        return super().select_for_update(nowait, skip_locked, of, no_key)


class Account(models.Model):
    """Somebody's money."""

    owner: models.CharField[str, str] = models.CharField(max_length=80)
    balance: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)

    objects: ClassVar[models.Manager[Account]] = models.Manager.from_queryset(Accounts)()

    class Meta:
        base_manager_name = "objects"
        constraints: ClassVar = [
            # Behind `take`, for whoever does not come this way.
            models.CheckConstraint(condition=models.Q(balance__gte=0), name="balance_not_below_zero"),
        ]

    def __str__(self) -> str:
        return f"account {self.pk} of {self.owner}"

    def put(self, amount: int) -> None:
        """Add *amount*."""
        self.balance += amount

    def take(self, amount: int) -> None:
        """Subtract *amount*, if it is there."""
        if self.balance < amount:
            raise InsufficientFunds(f"account {self.pk} has not got {amount}")
        self.balance -= amount


class Kind(models.TextChoices):
    """What an operation did."""

    DEPOSIT = "deposit"
    TRANSFER = "transfer"
    DEBIT = "debit"
    """The first half of a transfer in two batches."""
    CREDIT = "credit"
    """The second half."""


class Movement(models.Model):
    """One line of the audit: what one operation has done, saved with it."""

    reference: models.UUIDField[UUID, UUID] = models.UUIDField()
    """Chosen by whoever asked, so that asking again does nothing again."""
    kind: models.CharField[str, str] = models.CharField(max_length=8, choices=Kind)
    amount: models.BigIntegerField[int, int] = models.BigIntegerField()
    source: models.ForeignKey[Account | None, Account | None] = models.ForeignKey(
        Account, models.PROTECT, null=True, related_name="+"
    )
    source_balance: models.BigIntegerField[int | None, int | None] = models.BigIntegerField(null=True)
    """What was left."""
    target: models.ForeignKey[Account | None, Account | None] = models.ForeignKey(
        Account, models.PROTECT, null=True, related_name="+"
    )
    target_balance: models.BigIntegerField[int | None, int | None] = models.BigIntegerField(null=True)
    at: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now)

    source_id: int | None
    target_id: int | None

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["reference", "kind"], name="movement_once"),
            models.CheckConstraint(condition=models.Q(amount__gt=0), name="movement_amount_above_zero"),
        ]

    def __str__(self) -> str:
        return f"{self.kind} {self.reference}"

    @classmethod
    def of(
        cls, kind: Kind, reference: UUID, amount: int, *, source: Account | None = None, target: Account | None = None
    ) -> Movement:
        """The line on an operation that has just changed these accounts."""
        return cls(
            reference=reference,
            kind=kind,
            amount=amount,
            source=source,
            source_balance=source and source.balance,
            target=target,
            target_balance=target and target.balance,
        )


class Pending(models.Model):
    """The outbox: a transfer that is debited and not yet known to be credited."""

    reference: models.UUIDField[UUID, UUID] = models.UUIDField(primary_key=True)
    target: models.ForeignKey[Account, Account] = models.ForeignKey(Account, models.PROTECT, related_name="+")
    amount: models.BigIntegerField[int, int] = models.BigIntegerField()
    at: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now, db_index=True)

    target_id: int

    def __str__(self) -> str:
        return f"{self.amount} for account {self.target_id}"

    @classmethod
    def underway(cls) -> int:
        """How much was taken from accounts and has not arrived in others. A row may outlive its credit for a moment."""
        credited = Movement.objects.filter(kind=Kind.CREDIT).values("reference")
        found = cls.objects.exclude(reference__in=credited).aggregate(sum=models.Sum("amount", default=0))
        return int(found["sum"])

"""Accounts, the ledger that loads them on first touch, and what is written down about each operation.

Amounts are whole cents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.db import connection, models
from django.utils import timezone
from django.utils.functional import cached_property

from examples.wallet.refusals import InsufficientFunds, UnknownAccount
from geventbatch import Conflict

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID


class Account(models.Model):
    """Somebody's money."""

    owner: models.CharField[str, str] = models.CharField(max_length=80)
    balance: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)

    class Meta:
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


class Ledger(models.Model):
    """One row, for whose lock everybody waits who moves money; and the accounts that its batch has touched.

    A batch on the ledger may touch any account. Each is loaded, and locked, when an operation first asks for it, and
    those that have changed are saved with the ledger, in the same transaction.
    """

    name: models.CharField[str, str] = models.CharField(max_length=20, unique=True)
    operations: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    batches: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    """The version: each save adds one."""

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - they are Django's
        """Save the accounts that have changed, and the ledger. The store calls this at the end of a batch."""
        changed = [account for account in self._touched.values() if account.balance != self._loaded[account.pk]]
        self._check(changed)
        if changed:
            Account.objects.bulk_update(changed, ["balance"])
        super().save(*args, **kwargs)

    def accounts(self, *numbers: int) -> list[Account]:
        """The accounts of these numbers, in this order. In an operation only: it may ask the database."""
        new = [number for number in numbers if number not in self._touched]
        if new:
            # Locked in the order of their numbers, as `ordering` does. SQLite has no such lock: see `_check`.
            for account in Account.objects.select_for_update(no_key=True).filter(pk__in=new).order_by("pk"):
                self._touched[account.pk] = account
                self._loaded[account.pk] = account.balance
        for number in numbers:
            if number not in self._touched:
                raise UnknownAccount(f"there is no account {number}")
        return [self._touched[number] for number in numbers]

    def _check(self, changed: list[Account]) -> None:
        """Where accounts were not locked, see whether they are as they were loaded. Nobody else writes now."""
        if connection.features.has_select_for_update or not changed:
            return
        found = Account.objects.in_bulk([account.pk for account in changed])
        for account in changed:
            if account.pk not in found or found[account.pk].balance != self._loaded[account.pk]:
                raise Conflict(f"{account} was changed by somebody else; nothing was written")

    @cached_property
    def _touched(self) -> dict[int, Account]:
        return {}

    @cached_property
    def _loaded(self) -> dict[int, int]:
        """What the balances were."""
        return {}


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

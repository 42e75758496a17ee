"""Accounts, the ledger that loads them on first touch, and what is written down about each operation.

Amounts are whole cents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from django.db import connection, models
from django.utils import timezone
from django.utils.functional import cached_property

from examples.wallet.refusals import InsufficientFunds, UnknownAccount
from geventbatch import Conflict

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
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


class Ledger(models.Model):
    """One row, for whose lock everybody waits who moves money; and the accounts that its batch has touched.

    A batch on the ledger may touch any account. Each is loaded, and locked, when an operation first touches it, and
    those that have changed are saved with the ledger, in the same transaction.
    """

    name: models.CharField[str, str] = models.CharField(max_length=20, unique=True)
    operations: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    batches: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    """The version: each save adds one."""

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the accounts that have changed, and the ledger. The store calls this at the end of a batch."""
        changed = self.changed
        self._check(changed)
        if changed:
            Account.objects.bulk_update(changed, ["balance"])
        super().save(*args, **kwargs)

    @property
    def changed(self) -> list[Account]:
        """The accounts that this batch has changed."""
        return [one.account for one in self._touched.values() if one is not None and one.is_changed]

    def has_touched(self, number: int) -> bool:
        """Whether this batch has looked for that account."""
        return number in self._touched

    def touch(self, numbers: Collection[int]) -> None:
        """Load accounts, and lock them, in the batch's transaction."""
        # In the order of their numbers, as in `ordering`. SQLite has no such lock: see `_check`.
        found = Account.objects.select_for_update().filter(pk__in=numbers).order_by("pk")
        self._touched.update(dict.fromkeys(numbers))
        self._touched.update((account.pk, _Touched(account, account.balance)) for account in found)

    def account(self, number: int) -> Account:
        """One that was touched."""
        touched = self._touched[number]
        if touched is None:
            raise UnknownAccount(f"there is no account {number}")
        return touched.account

    def _check(self, changed: list[Account]) -> None:
        """Where accounts were not locked, see whether they are as they were loaded. Nobody else writes now."""
        if connection.features.has_select_for_update or not changed:
            return
        balances = dict(Account.objects.filter(pk__in=[one.pk for one in changed]).values_list("pk", "balance"))
        for account in changed:
            touched = self._touched[account.pk]
            if touched is None or balances.get(account.pk) != touched.loaded_balance:
                raise Conflict(f"{account} was changed by somebody else; nothing was written")

    @cached_property
    def _touched(self) -> dict[int, _Touched | None]:
        """None for what is not there."""
        return {}


class _Touched(NamedTuple):
    """An account that a batch of the ledger has loaded."""

    account: Account
    loaded_balance: int

    @property
    def is_changed(self) -> bool:
        return self.account.balance != self.loaded_balance


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

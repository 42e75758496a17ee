"""Accounts as Django's models, and the ledger key: one row in whose batches any account may be changed.

Applications had the ledger before there was `run_across`. `tests.support.django_project.start`, which sets Django up,
has to be imported before this.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from django.db import models
from django.utils.functional import cached_property

from geventbatch import current_batch

if TYPE_CHECKING:
    from collections.abc import Collection


class Account(models.Model):
    """Somebody's money."""

    id: models.BigIntegerField[int, int] = models.BigIntegerField(primary_key=True)
    balance: models.BigIntegerField[int, int] = models.BigIntegerField()
    transfers: models.BigIntegerField[int, int] = models.BigIntegerField()
    """How many it took part in."""

    class Meta:
        """See Django."""

        app_label = "transfers"
        db_table = "accounts"

    def __str__(self) -> str:
        return f"account {self.pk}"


class Movement(models.Model):
    """One line of the audit."""

    source: models.BigIntegerField[int, int] = models.BigIntegerField()
    target: models.BigIntegerField[int, int] = models.BigIntegerField()
    amount: models.BigIntegerField[int, int] = models.BigIntegerField()

    class Meta:
        """See Django."""

        app_label = "transfers"
        db_table = "movements"

    def __str__(self) -> str:
        return f"{self.amount} from {self.source} to {self.target}"


class Ledger(models.Model):
    """One row, for whose lock everybody waits who moves money; and the accounts that its batch has touched."""

    name: models.CharField[str, str] = models.CharField(max_length=20, unique=True)
    operations: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    batches: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    """The version."""

    wanted: ClassVar[dict[object, tuple[int, int]]] = {}
    """The accounts of each operation that is waiting in this process."""

    using: ClassVar[str]
    """The alias of its database."""

    class Meta:
        """See Django."""

        app_label = "transfers"
        db_table = "ledgers"

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Save the accounts that have changed, and the ledger. The store calls this at the end of a batch."""
        changed = [account for account, before in self._touched.values() if account.transfers != before]
        if changed:
            Account.objects.using(self.using).bulk_update(changed, ["balance", "transfers"])
        super().save(*args, **kwargs)

    def accounts(self, *numbers: int) -> list[Account]:
        """Give accounts; those that were not touched yet are loaded together with what others are waiting for."""
        if not all(number in self._touched for number in numbers):
            self._touch({*numbers, *chain(*self.wanted.values())} - self._touched.keys())
        return [self._touched[number][0] for number in numbers]

    def _touch(self, numbers: Collection[int]) -> None:
        """Load accounts, and lock them, in the batch's transaction."""
        found = Account.objects.using(self.using).select_for_update().filter(pk__in=numbers).order_by("pk")
        self._touched.update((account.pk, (account, account.transfers)) for account in found)

    @cached_property
    def _touched(self) -> dict[int, tuple[Account, int]]:
        """By number: each with its number of transfers when it was loaded."""
        return {}


def transfer_in_ledger(ledger: Ledger, source: int, target: int, amount: int, audit: bool) -> None:  # noqa: FBT001 - as `run` passes it
    """The operation on the ledger."""
    move(tuple(ledger.accounts(source, target)), source, target, amount)
    ledger.operations += 1
    if audit:
        current_batch().add_row(Movement(source=source, target=target, amount=amount))


def move(accounts: tuple[Any, ...], source: int, target: int, amount: int) -> None:  # noqa: ARG001 - for the audit
    """The operation across keys, on rows of any ORM."""
    payer, paid = accounts
    if payer.balance < amount:
        raise ValueError("insufficient funds")
    payer.balance -= amount
    payer.transfers += 1
    paid.balance += amount
    paid.transfers += 1


def move_with_row(accounts: tuple[Any, ...], source: int, target: int, amount: int) -> None:
    """The same, with a line of the audit."""
    move(accounts, source, target, amount)
    current_batch().add_row(Movement(source=source, target=target, amount=amount))


def add(account: Any) -> None:
    """The operation on one key."""
    account.balance += 1
    account.transfers += 1

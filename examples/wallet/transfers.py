"""Operations on accounts, batched: what the views use. A transfer has two keys, and is saved at both or at neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.wallet import processors
from examples.wallet.models import Kind, Movement
from geventbatch import current_batch

if TYPE_CHECKING:
    from uuid import UUID

    from examples.wallet.models import Account


def deposit(target: int, amount: int, reference: UUID) -> Movement:
    """Put *amount* into an account, and return when it is saved."""
    return processors.accounts.run(target, _deposit, amount, reference)


def transfer(source: int, target: int, amount: int, reference: UUID) -> Movement:
    """Move *amount* from one account to another one, and return when it is saved."""
    return processors.accounts.run_across([source, target], _transfer, amount, reference)


def _deposit(target: Account, amount: int, reference: UUID) -> Movement:
    target.put(amount)
    return _noted(Movement.of(Kind.DEPOSIT, reference, amount, target=target))


def _transfer(accounts: tuple[Account, ...], amount: int, reference: UUID) -> Movement:
    source, target = accounts
    source.take(amount)  # raises InsufficientFunds; nothing is changed before
    target.put(amount)
    return _noted(Movement.of(Kind.TRANSFER, reference, amount, source=source, target=target))


def _noted(movement: Movement) -> Movement:
    current_batch().add_row(movement)
    return movement

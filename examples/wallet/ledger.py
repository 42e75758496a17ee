"""One ledger key: every operation is in the batch of the ledger, which may change any account. What the views use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from examples.wallet import processors
from examples.wallet.models import Kind, Ledger, Movement
from geventbatch import current_batch

if TYPE_CHECKING:
    from uuid import UUID

LEDGER = "main"


def deposit(target: int, amount: int, reference: UUID) -> Movement:
    """Put *amount* into an account, and return when it is saved."""
    return processors.ledger.run(LEDGER, _deposit, target, amount, reference)


def transfer(source: int, target: int, amount: int, reference: UUID) -> Movement:
    """Move *amount* from one account to another one, and return when it is saved."""
    return processors.ledger.run(LEDGER, _transfer, source, target, amount, reference)


def _deposit(ledger: Ledger, number: int, amount: int, reference: UUID) -> Movement:
    (target,) = ledger.accounts(number)
    target.put(amount)
    return _noted(ledger, Movement.of(Kind.DEPOSIT, reference, amount, target=target))


def _transfer(ledger: Ledger, source_number: int, target_number: int, amount: int, reference: UUID) -> Movement:
    source, target = ledger.accounts(source_number, target_number)
    source.take(amount)
    target.put(amount)
    return _noted(ledger, Movement.of(Kind.TRANSFER, reference, amount, source=source, target=target))


def _noted(ledger: Ledger, movement: Movement) -> Movement:
    ledger.operations += 1
    current_batch().add_row(movement)
    return movement

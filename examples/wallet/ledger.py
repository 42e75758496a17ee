"""One ledger key: every operation is in the batch of the ledger, which may change any account. What the views use."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Final

from examples.wallet import processors
from examples.wallet.models import Account, Kind, Ledger, Movement
from geventbatch import current_batch

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

LEDGER: Final = "main"

_wanted: Final[dict[object, tuple[int, ...]]] = {}
"""The accounts of each operation that is waiting in this process."""


def deposit(target: int, amount: int, reference: UUID) -> Movement:
    """Put *amount* into an account, and return when it is saved."""
    return _run((target,), lambda ledger: _deposit(ledger, target, amount, reference))


def transfer(source: int, target: int, amount: int, reference: UUID) -> Movement:
    """Move *amount* from one account to another one, and return when it is saved."""
    return _run((source, target), lambda ledger: _transfer(ledger, source, target, amount, reference))


def _run(numbers: tuple[int, ...], operation: Callable[[Ledger], Movement]) -> Movement:
    caller = object()
    _wanted[caller] = numbers
    try:
        return processors.ledger.run(LEDGER, operation)
    finally:
        del _wanted[caller]


def _deposit(ledger: Ledger, number: int, amount: int, reference: UUID) -> Movement:
    (target,) = _accounts(ledger, number)
    target.put(amount)
    return _noted(ledger, Movement.of(Kind.DEPOSIT, reference, amount, target=target))


def _transfer(ledger: Ledger, source_number: int, target_number: int, amount: int, reference: UUID) -> Movement:
    source, target = _accounts(ledger, source_number, target_number)
    source.take(amount)
    target.put(amount)
    return _noted(ledger, Movement.of(Kind.TRANSFER, reference, amount, source=source, target=target))


def _accounts(ledger: Ledger, *numbers: int) -> list[Account]:
    """Touch the accounts; and when that asks the database, in the same statement those that others are waiting for."""
    if not all(map(ledger.has_touched, numbers)):
        others = () if current_batch().alone else chain(*_wanted.values())
        ledger.touch({number for number in (*numbers, *others) if not ledger.has_touched(number)})
    return [ledger.account(number) for number in numbers]


def _noted(ledger: Ledger, movement: Movement) -> Movement:
    ledger.operations += 1
    current_batch().add_row(movement)
    return movement

"""Mapped classes at many keys in mode "version": what somebody else changes between load and save."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa

from tests.support.mapped import COMPARING, opening
from tests.support.mapped_many import Account, Base, Meanwhile, balances, bulk, deposit, together, transfer

if TYPE_CHECKING:
    from tests.support.mapped import Bed

opened_bed = opening(Base, COMPARING)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(*[Account(id=number, balance=100) for number in range(1, 21)])
    return bed


def test_what_somebody_else_has_changed_is_replayed_with_its_component_and_nothing_else(bed: Bed) -> None:
    write = sa.update(Account).where(Account.id == 2).values(balance=50)
    first = Meanwhile(lambda: bed.write(write), transfer)
    others = Meanwhile(lambda: None, transfer), Meanwhile(lambda: None, deposit)
    with bulk(bed) as processor:
        answers = together(processor, ([1, 2], first, 10), ([3, 4], others[0], 10), (5, others[1], 1))
    assert answers == [90, 90, 101]
    assert (first.count, others[0].count, others[1].count) == (2, 1, 1)
    assert balances(bed) == {1: 90, 2: 60, 3: 90, 4: 110, 5: 101}


def test_an_account_that_is_only_read_is_compared_too(bed: Bed) -> None:
    def pay_if_rich(accounts: tuple[Account, ...]) -> int:
        rich, target = accounts
        if rich.balance == 100:
            target.balance += 1
        return target.balance

    operation = Meanwhile(lambda: bed.write(sa.update(Account).where(Account.id == 1).values(balance=0)), pay_if_rich)
    with bulk(bed) as processor:
        assert together(processor, ([1, 2], operation), (3, deposit, 1)) == [100, 101]
    assert balances(bed) == {1: 0, 3: 101}


def test_what_an_operation_across_keys_has_refused_or_only_read_is_compared_and_not_touched(bed: Bed) -> None:
    def look(accounts: tuple[Account, ...]) -> int:
        return accounts[0].balance

    write = sa.update(Account).where(Account.id == 2).values(balance=50)
    reads = Meanwhile(lambda: bed.write(write), look)
    with bulk(bed) as processor:
        callers: list[Any] = [
            gevent.spawn(processor.run_across, [2, 1], reads, read_only=True),
            gevent.spawn(processor.run_across, [1, 3], transfer, 10),
            gevent.spawn(processor.run, 4, deposit, 1),
        ]
        assert [caller.get() for caller in callers] == [50, 90, 101]
    assert balances(bed) == {1: 90, 2: 50, 3: 110, 4: 101}
    assert reads.count == 2

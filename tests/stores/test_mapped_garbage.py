"""A batch of instances of mapped classes goes when it is over: the garbage collector finds nothing of it."""

from __future__ import annotations

import gc
import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import gevent
import pytest
import sqlalchemy as sa

from geventbatch import Processor, ResourceMissing
from tests.support.callers import answer_of
from tests.support.mapped import opening, session_of
from tests.support.mapped_many import (
    Account,
    Base,
    Line,
    Meanwhile,
    bulk,
    deposit,
    together,
    transfer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.mapped import Bed

opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(*[Account(id=number, balance=1000) for number in range(1, 21)])
    return bed


def garbage(call: Callable[[], object]) -> list[str]:
    """The kinds of the objects that a *call* leaves to the collector, after some that fill the caches."""
    for _ in range(3):
        call()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        call()
        gc.collect()
        return sorted(f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def kinds(processor: Processor[Any], *runs: tuple[Any, ...]) -> list[type]:
    """The types of what callers are told. (A greenlet would hold an error, whose frames hold the greenlet.)"""

    def kind(keys: Any, *run: Any) -> type:
        return type(answer_of(processor.run_across if isinstance(keys, list) else processor.run, keys, *run))

    callers = [gevent.spawn(kind, *run) for run in runs]
    return [caller.get() for caller in callers]


def look(account: Account) -> int:
    return int(session_of(account).scalar(sa.select(sa.func.count()).select_from(Account)) or 0)


def add_line(account: Account) -> None:
    account.balance += 1
    session_of(account).add(Line(text=f"{account.id}"))


def refuse(account: Account, amount: int) -> None:
    account.balance -= amount
    raise ValueError(amount)


def test_a_batch_of_one_key_leaves_nothing(bed: Bed) -> None:
    with bed.processor(Account) as processor:
        assert garbage(lambda: together(processor, (1, deposit, 1), (2, look), (3, add_line))) == []


def test_a_bulk_of_single_keys_leaves_nothing(bed: Bed) -> None:
    with bulk(bed) as processor:
        runs: Any = [*[(number, deposit, 1) for number in range(1, 18)], (18, look), (19, add_line)]
        assert garbage(lambda: together(processor, *runs)) == []


def test_operations_across_keys_leave_nothing(bed: Bed) -> None:
    with bulk(bed) as processor:
        runs: Any = [([1, 2], transfer, 0), ([2, 3], transfer, 0), ([4, 5], transfer, 0), (6, deposit, 1)]
        assert garbage(lambda: together(processor, *runs)) == []


def test_what_is_undone_or_in_conflict_or_missing_leaves_nothing(bed: Bed) -> None:
    def write() -> None:
        bed.write(sa.update(Account).where(Account.id == 3).values(note=f"{next(notes)}"))

    def call() -> None:
        meanwhile = Meanwhile(write if bed.mode == "version" else lambda: None, deposit)
        answers = kinds(
            processor,
            (1, deposit, 1),
            (2, refuse, 1),
            (3, meanwhile, 1),
            ([4, 5], transfer, 5000),
            ([4, 5], transfer, 0),
            (99, deposit, 1),
        )
        assert answers == [int, ValueError, int, ValueError, int, ResourceMissing]
        assert meanwhile.count == (2 if bed.mode == "version" else 1)

    notes = itertools.count()
    with bulk(bed) as processor:
        assert garbage(call) == []


def test_sessions_of_a_bulk_make_nothing_for_a_rollback_that_does_not_come(bed: Bed) -> None:
    def count(account: Account) -> int:
        account.balance += 1
        return sum(type(one) is WeakKeyDictionary for one in gc.get_objects())

    with bulk(bed) as processor:
        together(processor, (1, count))
        before = together(processor, (1, count))[0]
        counts = together(processor, *[(number, count) for number in range(1, 21)])
    assert max(counts) <= before

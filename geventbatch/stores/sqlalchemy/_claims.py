"""Claims of many rows at once: locked in the order of their primary keys, and compared with what was loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy.orm.attributes import instance_state

from geventbatch._batch import batch_at_hand
from geventbatch.stores.sqlalchemy._transaction import is_doubtful

if TYPE_CHECKING:
    from collections.abc import Iterable

    from geventbatch.stores.sqlalchemy._loaded_resource import LoadedResource
    from geventbatch.stores.sqlalchemy._transaction import Transaction

_MOST = 5_000
"""Rows of one statement: drivers and servers bound the number of parameters."""


def claim_all(transaction: Transaction, loaded: Iterable[LoadedResource]) -> list[LoadedResource]:
    """Lock the rows that are not claimed yet, and return those that are not as loaded. Switches: yes."""
    groups: dict[tuple[Any, ...], list[LoadedResource]] = {}
    for one in loaded:
        if one.claimed:
            continue
        if one.identity is None:
            one.claimed = True
            continue
        state: Any = instance_state(one.resource)
        names = () if one.mapping.token else tuple(one.seen)
        mapper = one.mapping.mapper if one.mapping.token else state.mapper
        groups.setdefault((mapper, names), []).append(one)
    if groups:
        transaction.begin_to_write()
    lost: list[LoadedResource] = []
    for (mapper, names), some in sorted(groups.items(), key=_in_order):
        for first in range(0, len(some), _MOST):
            lost += _claim(transaction, mapper, names, some[first : first + _MOST])
    return lost


def compare_all(transaction: Transaction, loaded: Iterable[LoadedResource]) -> bool:
    """Return whether the rows, which are not locked, are as loaded. Switches: yes."""
    for one in loaded:
        if one.claimed or one.identity is None:
            continue
        if one.mapping.token:
            if not one.is_there(transaction.connection):
                return False
        elif claim_all(transaction, [one]):
            return False
    return True


def _in_order(group: tuple[tuple[Any, tuple[str, ...]], list[LoadedResource]]) -> tuple[int, str, tuple[str, ...]]:
    """Return the place of a group of rows among others: the same in every process."""
    (mapper, names), some = group
    return some[0].mapping.rank, str(mapper), names


def _claim(
    transaction: Transaction, mapper: Any, names: tuple[str, ...], some: list[LoadedResource]
) -> list[LoadedResource]:
    mapping = some[0].mapping
    found: dict[Any, Any] = {}
    width = len(mapper.primary_key)
    for there in transaction.connection.execute(
        *mapping.claim_all(mapper, [one.identity or () for one in some], names)
    ):
        found[tuple(there[:width])] = there[width:]
    lost = []
    for one in some:
        row: Any = found.get(one.identity)
        one.claimed = row is not None and (tuple(row) == one.token if mapping.token else one.is_same(row))
        if not one.claimed and row is None and mapping.token and is_doubtful(batch_at_hand()):
            # A policy hides the row from the lock, and from the write: the flush will say so.
            one.claimed = one.is_there(transaction.connection)
        if not one.claimed:
            lost.append(one)
    return lost

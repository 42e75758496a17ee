"""Rows of a bulk are locked in the order of their keys, in every statement; a foreign writer may use another order."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import sqlalchemy as sa

from tests.stores.test_stores import (
    adapter,  # noqa: F401 - a fixture
    over,
    place,  # noqa: F401 - a fixture
)
from tests.stores.test_stores_across import KEYS, PAIRS, Bank, close, together, transfers
from tests.support.adapters.sqlalchemy import DOCUMENTS, Entry
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.adapters.sqlalchemy import SQLAlchemyAdapter

over_servers = over(lambda case: case.has_across and "document" in case.name and "sqlite" not in case.name)

_OF_POSTGRES = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"

_WAITING = {
    "postgresql": _OF_POSTGRES,
    "pgbouncer": _OF_POSTGRES,
    # not information_schema.innodb_trx: who asks again within 100 ms is told what was
    "mariadb": "SELECT variable_value > 0 FROM information_schema.global_status"
    " WHERE variable_name = 'INNODB_ROW_LOCK_CURRENT_WAITS'",
}


def is_waiting(adapter: SQLAlchemyAdapter) -> bool:  # noqa: F811
    """Whether a transaction waits for a row."""
    with adapter.direct.connect() as connection:
        return bool(connection.exec_driver_sql(_WAITING[adapter.place.server]).scalar())


def in_order(adapter: SQLAlchemyAdapter) -> list[str]:  # noqa: F811
    """The keys in the database's own order."""
    with adapter.direct.connect() as connection:
        return list(connection.scalars(sa.select(DOCUMENTS.c.key).order_by(DOCUMENTS.c.key)))


def unlocked(adapter: SQLAlchemyAdapter) -> list[str]:  # noqa: F811
    """The keys that nobody has locked."""
    found: list[str] = []
    for key in in_order(adapter):
        with adapter.direct.connect() as connection:
            one = sa.select(DOCUMENTS.c.key).where(DOCUMENTS.c.key == key).with_for_update(skip_locked=True)
            found += connection.scalars(one)
    return found


@contextmanager
def heavy(adapter: SQLAlchemyAdapter) -> Iterator[sa.Connection]:  # noqa: F811
    """A transaction of somebody else's that a server that has to end one of two does not choose."""
    with adapter.direct.connect() as connection, connection.begin():
        if adapter.place.server != "mariadb":
            connection.exec_driver_sql("SET LOCAL deadlock_timeout = '60s'")
        connection.execute(sa.insert(Entry), [{"text": f"heavy {number}"} for number in range(100)])
        yield connection


@over_servers
def test_a_deadlock_with_a_writer_that_locks_the_other_way_round_is_replayed_and_counted(
    adapter: SQLAlchemyAdapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    runs = transfers(bank) | {("n3", "n5"): (bank.transfer, 1)}
    *_, last = keys = in_order(adapter)
    with bank.processor() as processor:
        with heavy(adapter) as connection:
            connection.execute(adapter.update(last, 50))
            bulk = gevent.spawn(together, processor, runs)
            wait_until(lambda: is_waiting(adapter))
            connection.execute(adapter.update(keys[0], 60))
        answers = bulk.get()
        assert processor.stats().conflicts_total > 0
    assert not [answer for answer in answers.values() if isinstance(answer, Exception)]
    expected = dict(zip(KEYS, [9, 11] * 10, strict=True)) | {"n3": 10, "n5": 12}
    expected |= {keys[0]: 59, last: 50 + expected[last] - 10}
    assert dict(zip(KEYS, bank.totals(), strict=True)) == expected


def make(accounts: tuple[Any, ...], bank: Bank) -> None:
    bank.adapter.add(accounts[0], 1)


@over_servers
def test_a_bulk_that_waits_for_a_row_has_locked_those_before_it_and_none_behind_it(
    adapter: SQLAlchemyAdapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    runs: dict[Any, tuple[Any, ...]] = transfers(bank)
    for pair in (PAIRS[0], PAIRS[5], PAIRS[9]):  # some are updated and some are deleted, which is two statements
        runs[pair] = (close, bank)
    keys = in_order(adapter)
    with bank.processor(missing="make") as processor:
        runs[("a new one", keys[0])] = (make, bank)
        with heavy(adapter) as connection:
            connection.execute(adapter.update(keys[10], 10))
            bulk = gevent.spawn(together, processor, runs)
            wait_until(lambda: is_waiting(adapter))
            assert unlocked(adapter) == keys[11:]
        answers = bulk.get()
    assert not [answer for answer in answers.values() if isinstance(answer, Exception)]

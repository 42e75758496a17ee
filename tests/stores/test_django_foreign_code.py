"""What receivers of signals and triggers write while a bulk is saved: no key that is not connected overwrites it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import connections
from django.db.models import F
from django.db.models.signals import post_save, pre_delete

from tests.stores.test_django_across import MODES, account, opened, store_of, ticket, totals
from tests.support.callers import answer_of
from tests.support.django_accounts import MARIADB, opening

from geventbatch import Processor  # isort: skip
from tests.support.django_project.bank.models import Account, Ticket  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator

alias = opening("sqlite", "postgresql", MARIADB)

TRIGGERS = {
    "sqlite": "CREATE TRIGGER charge AFTER UPDATE ON {ticket} BEGIN {update}; END",
    "mysql": "CREATE TRIGGER charge AFTER UPDATE ON {ticket} FOR EACH ROW {update}",
    "postgresql": "CREATE TRIGGER charge AFTER UPDATE ON {ticket} FOR EACH ROW EXECUTE FUNCTION charge()",
}


@contextmanager
def receiving() -> Iterator[None]:
    """Take 1 from account b at each save of a ticket."""

    def charge(using: str, **_: Any) -> None:
        Account.objects.using(using).filter(name="b").update(balance=F("balance") - 1)

    post_save.connect(charge, sender=Ticket)
    try:
        yield
    finally:
        post_save.disconnect(charge, sender=Ticket)


def make_trigger(alias: str) -> None:
    """Take 1 from account b at each UPDATE of a ticket."""
    with connections[alias].cursor() as cursor:
        update = f"UPDATE {Account._meta.db_table} SET balance = balance - 1 WHERE name = 'b'"  # noqa: S608 - ours
        vendor = connections[alias].vendor
        if vendor == "postgresql":
            cursor.execute(
                f"CREATE FUNCTION charge() RETURNS trigger AS $$ BEGIN {update}; RETURN NEW; END $$ LANGUAGE plpgsql"
            )
        cursor.execute(TRIGGERS[vendor].format(ticket=Ticket._meta.db_table, update=update))


def together(processor: Processor[Any], *runs: Any) -> list[Any]:
    """What the callers were told, each of whom named a key or a list of keys, an operation and its arguments."""

    def call(keys: Any, *run: Any) -> Any:
        try:
            return answer_of(processor.run_across if isinstance(keys, list) else processor.run, keys, *run)
        finally:
            for connection in connections.all(initialized_only=True):
                connection.close()

    return [one.get() for one in [gevent.spawn(call, *run) for run in runs]]


def give(resources: Any, amount: int) -> None:
    """Add to the first one."""
    first = resources[0] if isinstance(resources, tuple) else resources
    if isinstance(first, Ticket):
        first.total += amount
    else:
        first.balance += amount


def balance(alias: str, name: str = "b") -> int:
    return int(Account.objects.using(alias).get(name=name).balance)


@MODES
@pytest.mark.parametrize("across", [True, False])
def test_what_a_receiver_writes_is_not_overwritten_by_keys_that_are_not_connected(
    alias: str, mode: str, across: bool, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = ([ticket(1), account("c")], [account("b"), account("d")]) if across else (ticket(1), account("b"))
    other = [ticket(2), account("e")] if across else ticket(2)
    with opened(alias, mode) as processor, receiving():
        for _ in range(2):
            assert together(processor, (first, give, 5), (second, give, 9), (other, give, 7)) == [None, None, None]
    assert balance(alias) == 10 + 2 * (9 - 2)
    assert [total for total, _ in totals(alias)] == [0, 10, 14, 0]
    (told,) = [line for line in caplog.messages if "in a transaction of its own" in line]  # once
    assert "bank.Ticket" in told
    assert "receivers of signals" in told


@MODES
def test_what_a_trigger_writes_is_not_overwritten_by_keys_that_are_not_connected(alias: str, mode: str) -> None:
    make_trigger(alias)
    with opened(alias, mode) as processor:
        first, second, other = [ticket(1), account("c")], [account("b"), account("d")], [ticket(2), account("e")]
        assert together(processor, (first, give, 5), (second, give, 9), (other, give, 7)) == [None, None, None]
    assert balance(alias) == 10 + 9 - 2
    assert [total for total, _ in totals(alias)] == [0, 5, 7, 0]


@MODES
def test_what_a_receiver_writes_stays_where_a_store_of_single_keys_runs_operations_across(
    alias: str, mode: str
) -> None:
    with opened(alias, mode):
        pass
    store = store_of(alias, mode)
    with (
        Processor(open_resource=store, min_duration=0, max_duration=10, max_batches=1) as processor,
        receiving(),
    ):
        answers = together(
            processor,
            ([account("e"), account("f")], lambda _: gevent.sleep(0.1)),  # the others wait for it
            ([ticket(1), account("c")], give, 5),
            ([account("b"), account("d")], give, 9),
        )
    assert answers == [None, None, None]
    assert balance(alias) == 10 + 9 - 1


@MODES
def test_what_a_receiver_writes_at_another_key_of_its_own_operations_may_be_overwritten(alias: str, mode: str) -> None:
    # As by `save()` of an instance that was loaded before.
    received: list[int] = []

    def charge(using: str, **_: Any) -> None:
        received.append(Ticket.objects.using(using).filter(number=1).update(total=F("total") - 1))

    post_save.connect(charge, sender=Account)
    try:
        with opened(alias, mode) as processor:
            received.clear()
            assert together(processor, ([ticket(1), account("b")], both)) == [None]
    finally:
        post_save.disconnect(charge, sender=Account)
    assert received == [1]
    assert [total for total, _ in totals(alias)] == [0, 9, 0, 0]


def both(found: tuple[Any, ...]) -> None:
    for one in found:
        give(one, 9)


def delete(found: tuple[Any, ...]) -> None:
    found[0].delete()


@MODES
def test_what_a_receiver_of_a_deletion_writes_is_not_overwritten(alias: str, mode: str) -> None:
    def charge(using: str, **_: Any) -> None:
        Account.objects.using(using).filter(name="b").update(balance=F("balance") - 1)

    pre_delete.connect(charge, sender=Ticket)
    try:
        with opened(alias, mode) as processor:
            runs = ([ticket(1), account("c")], delete), ([account("b")], give, 9)
            assert together(processor, *runs) == [None, None]
    finally:
        pre_delete.disconnect(charge, sender=Ticket)
    assert balance(alias) == 10 + 9 - 1
    assert not Ticket.objects.using(alias).filter(number=1).exists()


def test_statements_of_an_operation_are_committed_with_its_keys_where_others_are_saved_apart(alias: str) -> None:
    def rename(resources: Any, amount: int) -> None:
        give(resources, amount)
        Account.objects.using(alias).filter(name="f").update(balance=F("balance") + 1)

    with opened(alias, "lock") as processor, receiving():
        runs = [([ticket(1), account("c")], give, 5), ([ticket(2), account("d")], rename, 7)]
        assert together(processor, *runs, ([account("b"), account("e")], give, 9)) == [None, None, None]
    assert (balance(alias), balance(alias, "f")) == (10 + 9 - 2, 11)
    assert [total for total, _ in totals(alias)] == [0, 5, 7, 0]

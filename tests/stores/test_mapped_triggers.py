"""Mapped classes at many keys: triggers and listeners that write the rows of other batches of the bulk."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from tests.stores.test_mapped_neighbours import (
    Base,
    Seat,
    Wallet,
    balances,
    bulk,
    deposit,
    deposit_second,
    seat,
    version,
    wallet,
)
from tests.support.mapped import opening
from tests.support.mapped_many import together

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.mapped import Bed

__all__ = ["version"]

opened_bed = opening(Base)

_CHARGE = "UPDATE beside_wallets SET balance = balance - 1, version = version + 1 WHERE id = NEW.owner_id"
_PLPGSQL = "LANGUAGE plpgsql"
_MADE = {
    "sqlite": [f"CREATE TRIGGER charge AFTER UPDATE ON beside_seats BEGIN {_CHARGE}; END"],
    "mariadb": [f"CREATE TRIGGER charge AFTER UPDATE ON beside_seats FOR EACH ROW {_CHARGE}"],
    "postgresql": [
        f"CREATE OR REPLACE FUNCTION charge() RETURNS trigger AS $$ BEGIN {_CHARGE}; RETURN NEW; END $$ {_PLPGSQL}",
        "CREATE TRIGGER charge AFTER UPDATE ON beside_seats FOR EACH ROW EXECUTE FUNCTION charge()",
    ],
}


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(*[Wallet(id=number, balance=100) for number in range(1, 21)])
    bed.add(*[Seat(id=number, owner_id=number) for number in range(1, 21)])
    return bed


@pytest.fixture
def charging(bed: Bed) -> Iterator[None]:
    """A trigger that charges the owner of a seat that is changed."""
    for statement in _MADE[bed.server]:
        bed.write(sa.text(statement))
    yield
    bed.write(sa.text("DROP TRIGGER charge ON beside_seats" if bed.server == "postgresql" else "DROP TRIGGER charge"))


def note(resources: Any) -> None:
    one = resources[0] if isinstance(resources, tuple) else resources
    one.note = "taken"


@pytest.mark.usefixtures("charging")
def test_what_a_trigger_writes_at_another_key_of_the_bulk_is_not_overwritten(
    bed: Bed, version: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "geventbatch")
    with bulk(bed, version, max_attempts=1) as processor:
        answers = together(
            processor,
            ([seat(1), wallet(2)], note),
            ([wallet(1), wallet(3)], lambda wallets: deposit(wallets[0], 9)),
            (seat(4), note),
            (wallet(4), deposit, 9),
            (wallet(5), deposit, 9),
        )
    assert [answers[0], answers[2], answers[4]] == [None, None, 109]
    assert balances(bed) == {1: 108, 4: 108, 5: 109}
    told = [one.getMessage() for one in caplog.records if "has a trigger" in one.getMessage()]
    assert [one.split(" has ")[0] for one in told] == ["the table beside_seats"]


@pytest.mark.usefixtures("charging")
def test_what_a_trigger_writes_at_another_key_that_operations_connect_is_overwritten(bed: Bed) -> None:
    """As by any session that has loaded the row before."""
    with bulk(bed) as processor:
        together(processor, ([seat(1), wallet(2)], note), ([wallet(2), wallet(1)], deposit_second, 9))
    assert balances(bed)[1] == 109


@pytest.mark.parametrize("event", ["before_update", "after_update"])
def test_what_a_listener_sends_as_a_flush_runs_is_not_overwritten(bed: Bed, event: str) -> None:
    def charge(_: object, connection: sa.Connection, changed: Seat) -> None:
        table: Any = Wallet.__table__
        connection.execute(sa.update(table).where(table.c.id == changed.owner_id).values(balance=table.c.balance - 1))

    sa.event.listen(Seat, event, charge)
    try:
        with bulk(bed, max_attempts=1) as processor:
            for _ in range(2):
                together(processor, ([seat(1), wallet(2)], note), ([seat(3), wallet(1)], deposit_both, 9))
                bed.write(sa.update(Seat).values(note=None))
    finally:
        sa.event.remove(Seat, event, charge)
    assert balances(bed) == {1: 116, 3: 98}


def deposit_both(resources: tuple[Seat, Wallet], amount: int) -> None:
    note(resources)
    deposit_second(resources, amount)


@pytest.mark.parametrize("event", ["before_update", "after_update"])
def test_a_listener_that_is_added_after_the_first_bulk_is_called_in_the_next(bed: Bed, event: str) -> None:
    def take(taken: Seat, by: str) -> None:
        taken.note = by

    def hear(mapper: object, connection: object, changed: Seat) -> None:
        heard.append(changed.id)

    heard: list[int] = []
    with bulk(bed) as processor:
        together(processor, *[(seat(number), take, "Ann") for number in (1, 2)])
        sa.event.listen(Seat, event, hear)
        try:
            together(processor, *[(seat(number), take, "Bob") for number in (1, 2)])
        finally:
            sa.event.remove(Seat, event, hear)
    assert heard == [1, 2]

"""Mapped classes at many keys: rows beside the resources of one batch that another batch of the bulk writes too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import gevent.event
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.support.mapped import opening
from tests.support.mapped_many import Meanwhile, together

if TYPE_CHECKING:
    from tests.support.mapped import Bed


class Base(DeclarativeBase):
    pass


class Wallet(Base):
    __tablename__ = "beside_wallets"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(sa.CheckConstraint("balance >= 0"), default=100)
    version: Mapped[int] = mapped_column(default=1)
    seats: Mapped[list[Seat]] = relationship(back_populates="owner")


class Seat(Base):
    __tablename__ = "beside_seats"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int | None] = mapped_column(sa.ForeignKey("beside_wallets.id"))
    note: Mapped[str | None] = mapped_column(sa.String(40))
    owner: Mapped[Wallet | None] = relationship(back_populates="seats")


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(*[Wallet(id=number, balance=100) for number in range(1, 21)])
    bed.add(*[Seat(id=number, owner_id=number) for number in range(1, 21)])
    return bed


@pytest.fixture(params=[None, "version"])
def version(request: pytest.FixtureRequest) -> Any:
    """The version column of the store, if it has one."""
    return None if request.param is None else {"wallet": request.param}


def bulk(bed: Bed, version: Any = None, **options: Any) -> Processor[Any]:
    store = bed.store({"seat": Seat, "wallet": Wallet}, version=version)  # type: ignore[arg-type]
    return Processor(
        open_resources=store.open_resources, **{"min_duration": 0, "max_duration": 20, "max_batches": 1, **options}
    )


def wallet(number: int) -> tuple[str, int]:
    return "wallet", number


def seat(number: int) -> tuple[str, int]:
    return "seat", number


def balances(bed: Bed) -> dict[int, int]:
    with bed.other.connect() as connection:
        rows = connection.execute(sa.select(Wallet.id, Wallet.balance))
        return {number: left for number, left in rows if left != 100}


def deposit(wallet: Wallet, amount: int) -> int:
    wallet.balance += amount
    return wallet.balance


def charge_owner(seat: Any, amount: int) -> int:
    """Change a row beside the resource."""
    seat = seat[0] if isinstance(seat, tuple) else seat
    seat.owner.balance -= amount
    return seat.owner.balance  # type: ignore[no-any-return]


def deposit_second(resources: tuple[Any, Wallet], amount: int) -> int:
    return deposit(resources[1], amount)


def test_a_row_beside_one_batch_that_is_another_one_s_resource_is_never_overwritten(bed: Bed, version: Any) -> None:
    for order in (1, -1):
        for runs in (
            (([seat(3), wallet(4)], charge_owner, 5), ([seat(5), wallet(3)], deposit_second, 9)),
            ((seat(3), charge_owner, 5), (wallet(3), deposit, 9)),
            ((wallet(2), deposit, 7), ([seat(3), wallet(1)], charge_owner, 5), (wallet(3), deposit, 9)),
        ):
            bed.write(sa.update(Wallet).values(balance=100))
            with bulk(bed, version, max_attempts=1) as processor:
                together(processor, *runs[::order])
            assert balances(bed)[3] == 104


def test_that_holds_for_a_processor_of_single_keys_too(bed: Bed, version: Any) -> None:
    store = bed.store({"seat": Seat, "wallet": Wallet}, version=version)  # type: ignore[arg-type]
    begun = gevent.event.Event()
    with Processor(open_resource=store, min_duration=0, max_duration=10, max_batches=1) as processor:
        others: list[Any] = []

        def start(resources: tuple[Any, ...]) -> None:
            others.append(gevent.spawn(processor.run_across, [seat(3), wallet(4)], charge_owner, 5))
            others.append(gevent.spawn(processor.run_across, [seat(5), wallet(3)], deposit_second, 9))
            gevent.spawn(begun.set)
            begun.wait()

        processor.run_across([seat(1), wallet(1)], start)
        assert [other.get() for other in others] in ([95, 104], [104, 109])
    assert balances(bed) == {3: 104}


def test_many_batches_of_a_bulk_that_change_one_row_beside_use_up_no_attempts(bed: Bed, version: Any) -> None:
    bed.write(sa.update(Seat).values(owner_id=20))
    runs: list[Any] = [([seat(number), wallet(number)], charge_owner, 1) for number in range(1, 13)]
    with bulk(bed, version, max_attempts=1) as processor:
        answers = together(processor, *runs, (wallet(15), deposit, 1))
    assert answers == [*range(99, 87, -1), 101]
    assert balances(bed) == {20: 88, 15: 101}


def test_a_row_that_moves_to_another_collection_is_not_taken_from_the_batch_that_has_it(bed: Bed) -> None:
    def hand_over(wallets: tuple[Wallet, ...]) -> None:
        for one in list(wallets[0].seats):
            one.owner = wallets[1]

    def note(seat: Seat) -> int | None:
        seat.note = f"of {seat.owner_id}"
        return seat.owner_id

    with bulk(bed, max_attempts=1) as processor:
        answers = together(processor, ([wallet(3), wallet(4)], hand_over), (seat(3), note))
    with Session(bed.other) as session:
        found = session.get_one(Seat, 3)
        assert (found.owner_id, found.note) == (4, f"of {answers[1]}")


@pytest.mark.parametrize("event", ["before_flush", "before_commit"])
def test_what_a_listener_changes_is_found_when_it_is_written(bed: Bed, event: str) -> None:
    maker = sessionmaker(bed.engine)

    @sa.event.listens_for(maker, event)
    def _(session: Session, *_: object) -> None:
        for one in list(session.identity_map.values()):
            if isinstance(one, Seat) and one.note == "charge" and one.owner_id == 3:
                owner = session.get_one(Wallet, 3)
                if owner.version == 1:
                    owner.balance -= 5
                    owner.version = 2

    def charge(resources: tuple[Seat, Any]) -> None:
        resources[0].note = "charge"

    charges = Meanwhile(lambda: None, charge)
    store = SQLAlchemyStore.mapped(maker, {"seat": Seat, "wallet": Wallet}, mode=bed.mode, pipeline=bed.pipeline)
    with Processor(
        open_resources=store.open_resources, min_duration=0, max_duration=10, max_batches=1, max_attempts=1
    ) as processor:
        runs = ([seat(3), wallet(4)], charges), ([seat(5), wallet(3)], deposit_second, 9), (wallet(8), deposit, 1)
        answers = together(processor, *runs)
    assert answers[2] == 101
    assert balances(bed) == {3: 104, 8: 101}
    assert charges.count == 2

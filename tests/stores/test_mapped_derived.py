"""What the database computes of a row is read as if what the operations before have changed had been saved."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, object_session, relationship

from tests.support.mapped import Bed, opening


class Base(DeclarativeBase):
    pass


class Booking(Base):
    __tablename__ = "derived_bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int] = mapped_column(sa.ForeignKey("derived_trains.id"))
    open: Mapped[bool] = mapped_column(default=True)


class Train(Base):
    __tablename__ = "derived_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    places: Mapped[int]
    sold: Mapped[int] = mapped_column(default=0)
    left: Mapped[int] = mapped_column("free", sa.Computed("places - sold", persisted=True))
    double: Mapped[int] = column_property(sa.literal_column("2") * sold)
    booked: Mapped[int] = column_property(
        sa.select(sa.func.count())
        .where(Booking.train_id == sa.literal_column("derived_trains.id"))
        .correlate_except(Booking)
        .scalar_subquery()
    )
    bookings: Mapped[list[Booking]] = relationship()
    opened: Mapped[list[Booking]] = relationship(
        viewonly=True, primaryjoin="and_(Booking.train_id == Train.id, Booking.open.is_(True))"
    )


class Account(Base):
    __tablename__ = "derived_accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(20), unique=True)
    balance: Mapped[int] = mapped_column(server_default="5")
    limit: Mapped[int] = mapped_column("most", default=7)


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1, places=2))
    return bed


class Full(Exception):
    pass


def sell(train: Train) -> int:
    if train.left < 1:
        raise Full
    train.sold += 1
    return train.sold


def kinds(answers: list[Any]) -> list[Any]:
    return [type(answer) if isinstance(answer, Exception) else answer for answer in answers]


def test_a_generated_column_is_fresh_for_each_operation(bed: Bed) -> None:
    assert kinds(bed.together(Train, 1, sell, sell, sell, sell, sell)) == [1, 2, Full, Full, Full]
    assert bed.read(sa.select(Train.sold)) == 2


def take(train: Train) -> int:
    train.sold += 1
    return train.sold


def test_where_nobody_reads_what_is_computed_all_are_saved_at_once(bed: Bed) -> None:
    assert bed.together(Train, 1, *[take] * 20) == list(range(1, 21))
    assert len(bed.updates()) == 1


def test_who_reads_what_is_computed_first_behind_many_finds_it_fresh(bed: Bed) -> None:
    answers = bed.together(Train, 1, *[take] * 5, lambda train: (train.left, train.double), take, sell)
    assert kinds(answers) == [1, 2, 3, 4, 5, (-3, 10), 6, Full]


def test_who_changes_a_row_and_then_reads_what_is_computed_of_it_finds_what_it_makes_of_both_changes(bed: Bed) -> None:
    def takes_and_looks(train: Train) -> int:
        train.sold += 1
        return train.left

    alone, together = [1, 1, 0], [1, 0, 0]
    on_sqlite = bed.engine.dialect.name == "sqlite"  # where the batch is cut behind each change
    assert bed.together(Train, 1, take, takes_and_looks, takes_and_looks) == (alone if on_sqlite else together)


def test_an_operation_that_raises_between_makes_no_difference(bed: Bed) -> None:
    def fails(train: Train) -> None:
        raise Full

    answers = bed.together(Train, 1, fails, sell, fails, sell, fails, sell)
    assert kinds(answers) == [Full, 1, Full, 2, Full, Full]


def test_a_column_property_is_fresh_for_each_operation(bed: Bed) -> None:
    def counts(train: Train) -> tuple[int, int]:
        found = train.double, train.booked
        train.sold += 1
        train.bookings.append(Booking(id=train.sold))
        return found

    assert bed.together(Train, 1, counts, counts, counts) == [(0, 0), (2, 1), (4, 2)]


def test_a_relationship_that_is_only_looked_at_is_fresh_for_each_operation(bed: Bed) -> None:
    bed.add(Booking(id=1, train_id=1), Booking(id=2, train_id=1))

    def closes(train: Train) -> int:
        found = len(train.opened)
        train.bookings[found - 1].open = False
        return found

    assert bed.together(Train, 1, closes, closes) == [2, 1]


def test_where_nothing_is_changed_nothing_is_loaded_anew(bed: Bed) -> None:
    def looks(train: Train) -> tuple[int, int, int]:
        return train.left, train.double, train.booked

    assert bed.together(Train, 1, looks, looks, looks) == [(2, 0, 0)] * 3
    assert sum("FROM derived_trains" in statement for statement in bed.statements) <= 2  # the lock, and the load


def test_a_row_that_is_new_has_its_defaults_for_the_operation_behind(bed: Bed) -> None:
    def opens(account: Account) -> Any:
        return (account.id is None, account.balance, account.limit)

    answers = bed.together(Account, "ann", opens, opens, by="name", missing=lambda key: Account(name=key))
    assert answers == [(True, None, None), (False, 5, 7)]
    assert bed.read(sa.select(Account.balance)) == 5


def test_a_row_that_is_new_and_has_all_that_it_will_have_is_saved_once(bed: Bed) -> None:
    def opens(account: Account) -> Any:
        account.balance += 1
        return account.balance

    made = {"id": 1, "balance": 1, "limit": 1}
    answers = bed.together(Account, "ann", opens, opens, by="name", missing=lambda key: Account(name=key, **made))
    assert answers == [2, 3]
    assert sum("INSERT INTO derived_accounts" in one for one in bed.statements) == 1
    assert not any("UPDATE derived_accounts" in one for one in bed.statements)


def test_another_row_that_was_changed_is_computed_anew(bed: Bed) -> None:
    bed.add(Train(id=2, places=5))

    def moves(train: Train) -> int:
        session = object_session(train)
        assert session is not None
        other = session.get_one(Train, 2)
        found = other.left
        other.sold += 1
        return found

    assert bed.together(Train, 1, moves, moves, moves) == [5, 4, 3]


def test_a_row_that_was_added_beside_the_resource_has_its_key_and_defaults_behind_the_save(bed: Bed) -> None:
    def books(train: Train) -> None:
        train.bookings.append(Booking())

    def looks(train: Train) -> list[tuple[bool, int | None, bool | None]]:
        return [(booking.id is None, booking.train_id, booking.open) for booking in train.bookings]

    assert bed.together(Train, 1, books, looks) == [None, [(True, None, None)]]
    assert bed.together(Train, 1, looks, looks) == [[(False, 1, True)]] * 2


def book_and_flush(train: Train) -> int:
    session: Any = object_session(train)
    session.add(Booking(id=1 + session.scalar(sa.select(sa.func.count()).select_from(Booking)), train_id=1))
    session.flush()
    return len(train.opened)


def count(train: Train) -> tuple[int, int]:
    return train.booked, len(train.opened)


def test_what_an_operation_has_flushed_itself_is_counted_behind_it_and_in_it(bed: Bed) -> None:
    answers = bed.together(Train, 1, count, book_and_flush, count, count, book_and_flush, count)
    if bed.server == "sqlite":  # which does not let operations write
        assert [type(answers[1]), type(answers[4])] == [RuntimeError] * 2
        assert [answers[index] for index in (0, 2, 3, 5)] == [(0, 0)] * 4
    else:
        assert answers == [(0, 0), 1, (1, 1), (1, 1), 2, (2, 2)]

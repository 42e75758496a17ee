"""Relationships of mapped classes show the operations behind what those before have done without them, by keys."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tests.support.mapped import Bed, opening, session_of


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "relationships_owners"
    id: Mapped[int] = mapped_column(primary_key=True)


class Train(Base):
    __tablename__ = "relationships_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(sa.ForeignKey(Owner.id))
    owner: Mapped[Owner] = relationship()
    wagons: Mapped[list[Wagon]] = relationship(order_by="Wagon.id")


class Wagon(Base):
    __tablename__ = "relationships_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Owner(id=1), Owner(id=2))
    bed.add(Train(id=1, owner_id=1, wagons=[Wagon(id=1), Wagon(id=2)]), Train(id=2, owner_id=1))
    return bed


def look(train: Train) -> tuple[int, list[int]]:
    return train.owner.id, [wagon.id for wagon in train.wagons]


def add_by_key(train: Train) -> None:
    session_of(train).add(Wagon(id=3, train_id=train.id))


def change_key(train: Train) -> None:
    train.owner_id = 2


def move_by_key(train: Train) -> None:
    train.wagons[0].train_id = 2


def delete(train: Train) -> None:
    session_of(train).delete(train.wagons[0])


def test_what_was_added_by_its_foreign_key_is_in_the_collection(bed: Bed) -> None:
    assert bed.together(Train, 1, look, add_by_key, look) == [(1, [1, 2]), None, (1, [1, 2, 3])]


def test_another_foreign_key_leads_to_another_instance(bed: Bed) -> None:
    assert bed.together(Train, 1, look, change_key, look) == [(1, [1, 2]), None, (2, [1, 2])]


def test_what_was_moved_by_its_foreign_key_is_gone(bed: Bed) -> None:
    assert bed.together(Train, 1, look, move_by_key, look) == [(1, [1, 2]), None, (1, [2])]


def test_what_was_deleted_is_in_no_collection(bed: Bed) -> None:
    assert bed.together(Train, 1, look, delete, look, delete, look) == [(1, [1, 2]), None, (1, [2]), None, (1, [])]


def test_what_was_deleted_and_flushed_is_in_none_either(bed: Bed) -> None:
    def flush(train: Train) -> None:
        delete(train)
        session_of(train).flush()

    if bed.server != "sqlite":  # where nothing is flushed before the save
        assert bed.together(Train, 1, look, flush, look) == [(1, [1, 2]), None, (1, [2])]
    assert bed.together(Train, 2, look) == [(1, [])]


def test_who_is_refused_has_deleted_nothing(bed: Bed) -> None:
    def refused(train: Train) -> None:
        delete(train)
        session_of(train).add(Wagon(id=2, train_id=1))  # which is there

    answers = bed.together(Train, 1, look, *[refused, look] * 3)
    assert answers[::2] == [(1, [1, 2])] * 4
    assert all(isinstance(answer, Exception) for answer in answers[1::2])
    assert bed.read(sa.select(sa.func.count()).select_from(Wagon)) == 2

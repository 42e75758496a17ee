"""A relationship's list that an operation has put in another order, before it is saved and loaded anew."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tests.support.mapped import Bed, opening


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "collections_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    wagons: Mapped[list[Wagon]] = relationship(order_by="Wagon.name")


class Wagon(Base):
    __tablename__ = "collections_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("collections_trains.id"))
    name: Mapped[str] = mapped_column(sa.String(10))


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1, wagons=[Wagon(name="b"), Wagon(name="c")]))
    return bed


def names(train: Train) -> list[str]:
    return [wagon.name for wagon in train.wagons]


def reverse(train: Train) -> None:
    train.wagons.reverse()


def append(train: Train) -> None:
    train.wagons.append(Wagon(name="a"))


def test_the_list_of_a_relationship_is_in_the_order_that_operations_have_left_until_the_save(bed: Bed) -> None:
    assert bed.together(Train, 1, names, append, names, reverse, names) == [
        ["b", "c"],
        None,
        ["b", "c", "a"],
        None,
        ["a", "c", "b"],
    ]
    assert bed.together(Train, 1, names) == [["a", "b", "c"]]

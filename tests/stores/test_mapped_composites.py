"""A composite that several operations of a batch change in place, where something is looked at in between."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, composite, mapped_column

from tests.support.mapped import Bed, opening


class Base(DeclarativeBase):
    pass


@dataclass
class Place:
    x: int
    y: int


class Train(Base):
    """With a column that the database computes, so that what has changed is looked at behind each operation."""

    __tablename__ = "composites_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    x: Mapped[int]
    y: Mapped[int]
    next: Mapped[int] = mapped_column(sa.Computed("x + 1"))
    place: Mapped[Place] = composite("x", "y")


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1, place=Place(1, 2)))
    return bed


class Refused(Exception):
    pass


def move(train: Train) -> int:
    train.place.y += 1
    return train.place.y


def move_and_raise(train: Train) -> None:
    train.place.y += 100
    raise Refused


def test_all_that_operations_have_changed_in_a_composite_is_saved(bed: Bed) -> None:
    assert bed.together(Train, 1, move, move, move) == [3, 4, 5]
    assert bed.read(sa.select(Train.y)) == 5


def test_all_but_that_of_who_raised_is_saved(bed: Bed) -> None:
    answers = bed.together(Train, 1, move, move_and_raise, move, move_and_raise, move_and_raise, move)
    assert [answer for answer in answers if not isinstance(answer, Refused)] == [3, 4, 5]
    assert bed.read(sa.select(Train.y)) == 5

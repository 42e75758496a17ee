"""What an operation has its session write in bulk (`bulk_insert_mappings` and so on), and what is said to that."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session

from tests.support.mapped import Bed, opening

if TYPE_CHECKING:
    from collections.abc import Callable


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "bulk_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)


class Wagon(Base):
    __tablename__ = "bulk_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    seats: Mapped[int] = mapped_column(default=10)


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1), Wagon(id=1), Wagon(id=2))
    return bed


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def in_bulk(write: Callable[[Any], object]) -> Callable[[Train], int]:
    def operation(train: Train) -> int:
        write(object_session(train))
        return sell(train)

    return operation


REFUSED: dict[str, Callable[[Any], object]] = {
    "insert": lambda session: session.bulk_insert_mappings(Wagon, [{"id": 3}, {"id": 1}]),
    "save": lambda session: session.bulk_save_objects([Wagon(id=3), Wagon(id=1)]),
    "update": lambda session: session.bulk_update_mappings(Wagon, [{"id": 1, "seats": None}]),
}


@pytest.mark.parametrize("write", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("swallows", [False, True])
def test_what_the_database_says_to_it_is_told_to_who_sent_it(
    bed: Bed, write: Callable[[Any], object], swallows: bool
) -> None:
    def refused(train: Train) -> None:
        with suppress(*[IntegrityError] * swallows):
            in_bulk(write)(train)

    answers = bed.together(Train, 1, sell, refused, sell, refused, sell)
    assert [answers[0], answers[2], answers[4]] == [1, 2, 3]
    kind = RuntimeError if bed.server == "sqlite" else IntegrityError
    assert [type(answers[1]), type(answers[3])] == [kind, kind]
    if bed.server == "sqlite":
        assert "would write to SQLite" in str(answers[1])
    assert bed.read(sa.select(Train.sold)) == 3
    assert bed.read(sa.select(sa.func.count()).select_from(Wagon)) == 2


def test_in_a_savepoint_it_goes_on_with_the_rest(bed: Bed) -> None:
    def refused(train: Train) -> int:
        session: Any = object_session(train)
        with suppress(IntegrityError), session.begin_nested():
            REFUSED["insert"](session)
        return sell(train)

    answers = bed.together(Train, 1, sell, refused, sell, refused)
    if bed.server == "sqlite":  # which does not let operations write
        assert [answers[0], type(answers[1]), answers[2], type(answers[3])] == [1, RuntimeError, 2, RuntimeError]
    else:
        assert answers == [1, 2, 3, 4]
    assert bed.read(sa.select(sa.func.count()).select_from(Wagon)) == 2

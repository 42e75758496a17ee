"""What the session of a batch does not hold: relationships that are queried at each look, and what was taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    WriteOnlyMapped,
    make_transient_to_detached,
    mapped_column,
    object_session,
    relationship,
)

from tests.support.mapped import Bed, opening

if TYPE_CHECKING:
    from collections.abc import Callable


class Base(DeclarativeBase):
    pass


class Line(Base):
    __tablename__ = "unheld_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)


class Train(Base):
    __tablename__ = "unheld_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    line_id: Mapped[int] = mapped_column(sa.ForeignKey(Line.id))
    line: Mapped[Line] = relationship()
    logs: WriteOnlyMapped[Log] = relationship(order_by="Log.id")
    notes: DynamicMapped[Note] = relationship(order_by="Note.id")


class Log(Base):
    __tablename__ = "unheld_logs"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))


class Note(Base):
    __tablename__ = "unheld_notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Line(id=1))
    bed.add(Train(id=1, line_id=1))
    bed.add(Log(id=1, train_id=1), Note(id=1, train_id=1))
    return bed


def session_of(train: Train) -> Any:
    return object_session(train)


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def look(train: Train) -> list[list[int]]:
    return [[one.id for one in session_of(train).scalars(train.logs.select())], [one.id for one in train.notes]]


def log(train: Train) -> None:
    train.logs.add(Log(id=2))


def note(train: Train) -> None:
    train.notes.append(Note(id=2))


def beside(train: Train) -> None:
    session_of(train).add_all([Log(id=2, train_id=1), Note(id=2, train_id=1)])


def delete(train: Train) -> None:
    session_of(train).delete(session_of(train).get(Note, 1))


@pytest.mark.parametrize(
    ("change", "found"),
    [(log, [[1, 2], [1]]), (note, [[1], [1, 2]]), (beside, [[1, 2], [1, 2]]), (delete, [[1], []])],
)
@pytest.mark.parametrize("raises", [False, True])
def test_relationships_that_are_queried_show_what_those_before_have_changed(
    bed: Bed, change: Callable[[Train], None], found: list[list[int]], *, raises: bool
) -> None:
    def changed(train: Train) -> Any:
        change(train)
        if raises:
            raise LookupError
        return look(train) if session_of(train).autoflush else None

    answers = bed.together(Train, 1, sell, look, changed, look, sell)
    assert answers[:2] == [1, [[1], [1]]]
    if raises:
        assert isinstance(answers[2], LookupError)
        assert answers[3:] == [[[1], [1]], 2]
    else:
        assert answers[2:] == [None if bed.server == "sqlite" else found, found, 2]


def expunge(train: Train) -> int:
    session_of(train).expunge(train.line)
    return train.line.sold


def detach(train: Train) -> int:
    line = train.line
    sa.orm.make_transient(line)
    make_transient_to_detached(line)
    return train.sold


@pytest.mark.parametrize("take_out", [expunge, detach])
def test_what_one_operation_takes_out_of_the_session_is_there_for_those_behind(
    bed: Bed, take_out: Callable[[Train], int]
) -> None:
    def change(train: Train) -> int:
        train.line.sold += 1
        return train.line.sold

    answers = bed.together(Train, 1, take_out, change, sell, change)
    assert answers == [0, 1, 1, 2]
    assert bed.read(sa.select(Line.sold)) == 2

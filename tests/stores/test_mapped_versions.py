"""A mapped row is written once in a save where only something beside it has changed."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session, relationship

from geventbatch import current_batch
from tests.support.mapped import Bed, opening


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "versions_notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(10))
    counted_id: Mapped[int | None] = mapped_column(sa.ForeignKey("versions_counted.id"))


class Stock(Base):
    __tablename__ = "versions_stocks"
    id: Mapped[int] = mapped_column(primary_key=True)
    left: Mapped[int] = mapped_column("free", default=5)
    saves: Mapped[int] = mapped_column(default=1)


class Counted(Base):
    __tablename__ = "versions_counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    left: Mapped[int] = mapped_column("free", default=5)
    saves: Mapped[int] = mapped_column()
    note: Mapped[Note | None] = relationship()
    __mapper_args__ = {"version_id_col": saves}  # noqa: RUF012


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Stock(id=1), Counted(id=1))
    bed.statements.clear()
    return bed


def sell(stock: Any) -> None:
    stock.left -= 1


def note(_: Any) -> None:
    current_batch().add_row(Note(text="a"))


def add(stock: Any) -> None:
    session: Any = object_session(stock)
    session.add(Note(text="b"))


def saved(bed: Bed, entity: Any) -> int:
    """How often the row was updated, but for a statement that locks it."""
    assert bed.read(sa.select(sa.func.count()).select_from(Note)) > 0
    return sum("SET" in one and "saves" in one.partition("SET")[2].partition("WHERE")[0] for one in bed.updates())


@pytest.mark.parametrize("operations", [[note], [add], [note, note], [sell, note], [add, note], [sell, add, note]])
def test_a_save_counts_the_version_in_one_update(bed: Bed, operations: list[Any]) -> None:
    assert bed.together(Stock, 1, *operations, version="saves") == [None] * len(operations)
    counts = bed.mode == "version" or sell in operations
    assert saved(bed, Stock) == (1 if counts else 0)
    assert bed.read(sa.select(Stock.saves)) == (2 if counts else 1)


@pytest.mark.parametrize("operations", [[note], [add], [note, note], [sell, note], [add, note], [sell, add, note]])
def test_a_save_has_sqlalchemy_count_its_version_once(bed: Bed, operations: list[Any]) -> None:
    before = bed.read(sa.select(Counted.saves))
    assert bed.together(Counted, 1, *operations) == [None] * len(operations)
    counts = bed.mode == "version" or sell in operations
    assert saved(bed, Counted) == (1 if counts else 0)
    assert bed.read(sa.select(Counted.saves)) == (before + 1 if counts else before)


def test_a_row_that_only_another_one_refers_to_is_counted_too(bed: Bed) -> None:
    def put(stock: Counted) -> None:
        stock.note = Note(text="c")

    before = bed.read(sa.select(Counted.saves))
    assert bed.together(Counted, 1, put, put) == [None, None]
    assert bed.read(sa.select(Counted.saves)) == before + (1 if bed.mode == "version" else 0)

"""Models that SQLAlchemy takes: they work, in every mode, or are refused by name when the store is made."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    column_property,
    mapped_column,
    relationship,
    synonym,
)

from tests.support.mapped import EVERYWHERE, ON_POSTGRES, Bed, opened, opening

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Odd(Base):
    """Names that drivers and templates stumble over."""

    __tablename__ = "models_100%_odd: table"
    id: Mapped[int] = mapped_column("id%s", primary_key=True)
    count: Mapped[int] = mapped_column("50% off", default=0)
    note: Mapped[Any] = mapped_column("a(b):c%(d)s", sa.JSON, default=list)
    parts: Mapped[list[OddPart]] = relationship(lazy="joined")


class OddPart(Base):
    __tablename__ = "models_%%_parts"
    id: Mapped[int] = mapped_column("%id", primary_key=True)
    odd_id: Mapped[int] = mapped_column(sa.ForeignKey(Odd.id))
    count: Mapped[int] = mapped_column("%", default=0)


class Seat(Base):
    __tablename__ = "models_seats"
    train: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    colour: Mapped[Colour] = mapped_column(sa.Enum(Colour), default=Colour.RED)
    first: Mapped[str] = mapped_column("first_name", sa.String(20), default="Ann")
    last: Mapped[str] = mapped_column(sa.String(20), default="Lee")
    taken: Mapped[int] = mapped_column(default=0)
    name: Mapped[str] = synonym("first")
    folded: Mapped[str] = column_property(sa.func.lower(last))

    @hybrid_property
    def full(self) -> str:
        return f"{self.first} {self.last}"

    @full.inplace.setter
    def _full(self, value: str) -> None:
        self.first, self.last = value.split()


class Closed(Base):
    """With a relationship that must not be loaded, and one that is only looked at."""

    __tablename__ = "models_closed"
    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)
    things: Mapped[list[Thing]] = relationship(lazy="raise")
    shown: Mapped[list[Thing]] = relationship(viewonly=True, order_by="Thing.id")
    group_a: Mapped[int] = mapped_column(default=1, deferred=True, deferred_group="group")
    group_b: Mapped[int] = mapped_column(default=2, deferred=True, deferred_group="group")
    strict: Mapped[int] = mapped_column(default=3, deferred=True, deferred_raiseload=True)


class Thing(Base):
    __tablename__ = "models_things"
    id: Mapped[int] = mapped_column(primary_key=True)
    closed_id: Mapped[int] = mapped_column(sa.ForeignKey("models_closed.id"))


class Employee(Base):
    __tablename__ = "models_employees"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(10))
    days: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "employee"}  # noqa: RUF012


class Manager(Employee):
    budget: Mapped[int | None] = mapped_column()
    __mapper_args__ = {"polymorphic_identity": "manager"}  # noqa: RUF012


class Shown(DeclarativeBase):
    pass


class Stock(Shown):
    __tablename__ = "models_stocks"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(10))
    version: Mapped[int] = mapped_column(default=1)
    count: Mapped[int] = mapped_column(default=0)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "stock"}  # noqa: RUF012


class Spare(Stock):
    __mapper_args__ = {"polymorphic_identity": "spare"}  # noqa: RUF012


class StockView(DeclarativeBase):
    pass


class Seen(StockView):
    __tablename__ = "models_seen"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]
    count: Mapped[int]


opened_bed = opening(Base)


def test_names_with_percent_signs_are_names(bed: Bed) -> None:
    bed.add(Odd(id=1, parts=[OddPart(id=1)]))

    def changes(odd: Odd) -> tuple[int, int]:
        odd.count += 1
        odd.note.append("100%")
        odd.parts[0].count += 1
        return odd.count, odd.parts[0].count

    assert bed.together(Odd, 1, changes, changes) == [(1, 1), (2, 2)]
    with Session(bed.other) as session:
        odd = session.get_one(Odd, 1)
        assert (odd.count, odd.note, odd.parts[0].count) == (2, ["100%", "100%"], 2)


def test_a_class_with_a_key_of_two_columns_synonyms_hybrids_and_enums_works(bed: Bed) -> None:
    bed.add(Seat(train="ICE 1", number=2), Seat(train="ICE 1", number=3))

    def paint(seat: Seat) -> Any:
        seat.colour = Colour.BLUE
        seat.full = "Eve Fox"
        seat.taken += 1
        return seat.taken

    def rename(seat: Seat) -> Any:
        seat.name = "Bob"
        return seat.full

    assert bed.together(Seat, ("ICE 1", 2), paint, rename) == [1, "Bob Fox"]
    with Session(bed.other) as session:
        seat = session.get_one(Seat, ("ICE 1", 2))
        assert (seat.colour, seat.full, seat.taken, seat.folded) == (Colour.BLUE, "Bob Fox", 1, "fox")
        assert session.get_one(Seat, ("ICE 1", 3)).taken == 0


def test_what_must_not_be_loaded_is_not_loaded(bed: Bed) -> None:
    bed.add(Closed(id=1, things=[Thing(id=1)]))

    def counts(closed: Closed) -> Any:
        closed.count += 1
        return closed.count, len(closed.shown), closed.group_a

    assert bed.together(Closed, 1, counts, counts) == [(1, 1, 1), (2, 1, 1)]
    assert bed.read(sa.select(Closed.count)) == 2

    def opens(closed: Closed) -> Any:
        return closed.things

    (answer,) = bed.together(Closed, 1, opens)
    assert "lazy='raise'" in str(answer)

    def raises(closed: Closed) -> Any:
        return closed.strict

    (answer,) = bed.together(Closed, 1, raises)
    assert "raiseload=True" in str(answer)


@pytest.mark.parametrize("entity", [Employee, Manager])
def test_an_instance_of_a_class_below_in_the_same_table_works(bed: Bed, entity: Any) -> None:
    bed.add(Manager(id=1, budget=5))

    def spends(manager: Any) -> int:
        manager.budget -= 1
        manager.days += 1
        return int(manager.budget)

    assert bed.together(entity, 1, spends, spends) == [4, 3]
    assert bed.read(sa.select(Manager.budget)) == 3
    assert bed.read(sa.select(Manager.days)) == 2


@pytest.mark.parametrize("setting", ON_POSTGRES)
@pytest.mark.parametrize("version", [None, "version"])
def test_a_view_is_a_resource_and_what_somebody_else_has_changed_is_noticed(
    setting: tuple[Any, ...], version: str | None, tmp_path: Path
) -> None:
    with opened(setting, Shown, tmp_path) as bed:
        bed.add(Stock(id=1))
        bed.write(sa.text("CREATE VIEW models_seen AS SELECT id, version, count FROM models_stocks"))
        somebody = [] if bed.mode == "lock" else [10]

        def take(seen: Seen) -> int:
            seen.count += 1
            if somebody:
                bed.write(sa.update(Stock).values(count=somebody.pop()))
            return seen.count

        before = 10 if somebody else 0
        assert bed.together(Seen, 1, take, take, version=version) == [before + 1, before + 2]
        assert bed.read(sa.select(Stock.count)) == before + 2
        assert bed.read(sa.select(Stock.version)) == (1 if version is None else 2)


def change_id(stock: Stock) -> None:
    stock.id = 2


def change_kind(stock: Stock) -> None:
    stock.kind = "spare"


@pytest.mark.parametrize("setting", EVERYWHERE)
@pytest.mark.parametrize("change", [change_id, change_kind])
def test_what_a_load_finds_the_row_by_is_not_changed(
    setting: tuple[Any, ...], change: Callable[[Stock], None], tmp_path: Path
) -> None:
    def count(stock: Stock) -> int:
        stock.count += 1
        return stock.count

    with opened(setting, Shown, tmp_path) as bed:
        bed.add(Stock(id=1))
        first, refused, last = bed.together(Stock, 1, count, change, count)
        assert (first, last) == (1, 2)
        assert isinstance(refused, ValueError)
        assert "by which the operations behind it are to find the row" in str(refused)
        assert bed.read(sa.select(Stock.count).where(Stock.id == 1, Stock.kind == "stock")) == 2

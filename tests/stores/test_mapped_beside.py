"""Rows beside the resource that operations change: nobody else's change of them is written over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tests.support.mapped import COMPARING, Bed, opening, session_of

if TYPE_CHECKING:
    from collections.abc import Callable


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "beside_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    wagons: Mapped[list[Wagon]] = relationship(order_by="Wagon.id")


class Wagon(Base):
    __tablename__ = "beside_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("beside_trains.id"))
    taken: Mapped[int] = mapped_column(default=0)
    notes: Mapped[Any] = mapped_column(sa.JSON, default=list)


class Pair(Base):
    __tablename__ = "beside_pairs"
    one: Mapped[int] = mapped_column(primary_key=True)
    two: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


class Meter(Base):
    __tablename__ = "beside_meters"
    id: Mapped[int] = mapped_column(primary_key=True)
    level: Mapped[int] = mapped_column(default=0)
    saves: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": saves}  # noqa: RUF012


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1), Train(id=2))
    bed.add(Wagon(id=1, train_id=1), Wagon(id=2, train_id=1), Pair(one=1, two=2), Pair(one=1, two=3), Meter(id=1))
    return bed


def found(train: Train, entity: Any, key: object) -> Any:
    instance = session_of(train).get(entity, key)
    assert instance is not None
    return instance


class Once:
    """Somebody else writes, while an operation runs for the first time."""

    def __init__(self, bed: Bed, write: sa.Executable) -> None:
        self.runs = 0
        self._bed = bed
        self._write = write

    def __call__(self) -> None:
        self.runs += 1
        if self.runs == 1:
            self._bed.write(self._write)


def seat(train: Train, once: Callable[[], None]) -> int:
    wagon = found(train, Wagon, 1)
    once()
    wagon.taken += 1
    return int(wagon.taken)


def note(train: Train, once: Callable[[], None]) -> Any:
    wagon = train.wagons[0]
    once()
    wagon.notes.append("mine")
    return list(wagon.notes)


def pair(train: Train, once: Callable[[], None]) -> int:
    both = [found(train, Pair, (1, 2)), found(train, Pair, (1, 3))]
    once()
    for one in both:
        one.count += 1
    return int(sum(one.count for one in both))


def measure(train: Train, once: Callable[[], None]) -> int:
    meter = found(train, Meter, 1)
    once()
    meter.level += 1
    return int(meter.level)


def let_go(train: Train, once: Callable[[], None]) -> int:
    """Take out of the collection what has nobody in it."""
    free = [wagon for wagon in train.wagons if not wagon.taken]
    once()
    for wagon in free:
        train.wagons.remove(wagon)
    return len(free)


def scrap(train: Train, once: Callable[[], None]) -> int:
    free = [wagon for wagon in train.wagons if not wagon.taken]
    once()
    for wagon in free:
        session_of(train).delete(wagon)
    return len(free)


@pytest.mark.parametrize(
    ("operation", "write", "expected"),
    [
        (seat, sa.update(Wagon).values(taken=10), 11),
        (note, sa.update(Wagon).values(notes=["theirs"]), ["theirs", "mine"]),
        (pair, sa.update(Pair).where(Pair.two == 3).values(count=10), 12),
        (measure, sa.update(Meter).values(level=10, saves=Meter.saves + 1), 11),
        (let_go, sa.update(Wagon).where(Wagon.id == 1).values(taken=10), 1),
        (scrap, sa.update(Wagon).where(Wagon.id == 1).values(taken=10), 1),
    ],
    ids=["assigned", "changed in place", "composite keys", "counted by SQLAlchemy", "moved", "deleted"],
)
def test_a_row_that_somebody_else_has_changed_since_it_was_read_has_the_batch_replayed(
    bed: Bed, operation: Callable[..., object], write: sa.Executable, expected: object
) -> None:
    once = Once(bed, write)
    assert bed.together(Train, 1, lambda train: operation(train, once)) == [expected]
    assert once.runs == 2
    assert bed.together(Train, 1, lambda train: operation(train, lambda: None))[0] != expected  # which was saved


def test_a_row_that_somebody_else_has_deleted_has_the_batch_replayed(bed: Bed) -> None:
    once = Once(bed, sa.delete(Wagon).where(Wagon.id == 1))

    def takes(train: Train) -> int:
        wagons = list(train.wagons)
        once()
        for wagon in wagons:
            wagon.taken += 1
        return len(wagons)

    assert bed.together(Train, 1, takes) == [1]
    assert once.runs == 2
    assert bed.read(sa.select(Wagon.taken)) == 1


def test_a_row_that_only_this_batch_changes_is_saved_at_the_first_attempt(bed: Bed) -> None:
    runs: list[int] = []

    def takes(train: Train) -> int:
        runs.append(1)
        wagon = found(train, Wagon, 1)
        wagon.taken += 1
        session_of(train).scalars(sa.select(Wagon)).all()  # which flushes
        wagon.taken += 1
        return int(wagon.taken)

    assert bed.together(Train, 1, takes, takes, takes) == [2, 4, 6]
    # Without a conflict. On SQLite, who asks for what those before have changed is applied again behind their save.
    assert len(runs) == (7 if bed.server == "sqlite" else 3)
    assert bed.read(sa.select(Wagon.taken).where(Wagon.id == 1)) == 6


def test_a_row_that_is_only_read_is_not_compared(bed: Bed) -> None:
    once = Once(bed, sa.update(Wagon).values(taken=10))

    def reads(train: Train) -> int:
        taken = found(train, Wagon, 1).taken
        once()
        train.sold += 1
        return int(taken)

    assert bed.together(Train, 1, reads) == [0]
    assert once.runs == 1
    assert bed.read(sa.select(Train.sold).where(Train.id == 1)) == 1


def test_a_row_that_is_new_is_not_compared(bed: Bed) -> None:
    def grows(train: Train) -> int:
        train.wagons.append(Wagon(id=10 + len(train.wagons)))
        return len(train.wagons)

    assert bed.together(Train, 1, grows, grows) == [3, 4]
    assert [one for one in bed.statements if "beside_wagons" in one and one.rstrip().endswith("UPDATE")] == []


def test_a_row_that_the_operation_itself_has_rewritten_by_a_statement_is_no_conflict(bed: Bed) -> None:
    if bed.server == "sqlite":  # where an operation writes nothing by itself
        return
    runs: list[int] = []

    def rewrites(train: Train) -> int:
        runs.append(1)
        wagon = found(train, Wagon, 1)
        session_of(train).connection().execute(sa.text("UPDATE beside_wagons SET taken = 5"))
        wagon.taken = 7
        return int(wagon.taken)

    assert bed.together(Train, 1, rewrites) == [7]
    assert len(runs) == 1
    assert bed.read(sa.select(Wagon.taken).where(Wagon.id == 1)) == 7


# -- what is asked for, and what was loaded -----------------------------------------------------------------------


class Sold(Exception):
    """So much was found."""


def asks(train: Train) -> object:
    return session_of(train).scalar(sa.select(Train.sold).where(Train.id == 1))


def asks_and_raises(train: Train) -> object:
    raise Sold(asks(train))


def loads_anew_and_raises(train: Train) -> object:
    session_of(train).refresh(train)
    raise Sold(train.sold)


@pytest.mark.parametrize("opened_bed", COMPARING, indirect=True)
@pytest.mark.parametrize("operation", [asks, asks_and_raises, loads_anew_and_raises])
def test_nobody_is_answered_of_the_row_as_it_was_behind_one_who_has_asked_for_it_as_it_is(
    bed: Bed, operation: Callable[[Train], object]
) -> None:
    once = Once(bed, sa.update(Train).where(Train.id == 1).values(sold=10))

    def first(train: Train) -> object:
        once()
        return operation(train)

    def raises(train: Train) -> None:
        raise Sold(train.sold)

    found, *others = bed.together(Train, 1, first, lambda train: train.sold)
    assert (found.args[0] if isinstance(found, Sold) else found, *others) == (10, 10)
    once.runs = 0
    bed.write(sa.update(Train).values(sold=0))
    found, other = bed.together(Train, 1, first, raises)  # and nobody returns
    assert (found.args[0] if isinstance(found, Sold) else found, other.args[0]) == (10, 10)


@pytest.mark.parametrize("opened_bed", COMPARING, indirect=True)
def test_where_all_have_raised_nothing_is_saved_though_they_have_asked_and_flushed(bed: Bed) -> None:
    def flushes(train: Train) -> None:
        train.sold += 1
        session_of(train).flush()
        raise Sold(train.sold)

    found, other = bed.together(Train, 1, asks_and_raises, flushes)
    assert found.args == (0,)
    assert isinstance(other, RuntimeError if bed.server == "sqlite" else Sold)
    assert bed.read(sa.select(Train.sold).where(Train.id == 1)) == 0

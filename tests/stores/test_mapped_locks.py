"""In mode "lock", what is loaded with the row is no older than the lock; and every table of the class is locked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship

from tests.stores.test_sqlalchemy_store import Trips
from tests.support.mapped import LOCKING, Bed, opening
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Booking(Base):
    __tablename__ = "locked_bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int] = mapped_column(sa.ForeignKey("locked_trains.id"))


class Line(Base):
    __tablename__ = "locked_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    speed: Mapped[int]


class Train(Base):
    __tablename__ = "locked_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    line_id: Mapped[int] = mapped_column(sa.ForeignKey("locked_lines.id"))
    sold: Mapped[int] = mapped_column(default=0)
    bookings: Mapped[list[Booking]] = relationship(lazy="joined")
    line: Mapped[Line] = relationship(lazy="joined", innerjoin=True)


class Counted(Base):
    __table__ = Train.__table__
    count = column_property(
        sa.select(sa.func.count())
        .where(Booking.train_id == Train.__table__.c.id)
        .correlate_except(Booking)
        .scalar_subquery()
    )


class Vehicle(Base):
    __tablename__ = "locked_vehicles"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(10))
    seats: Mapped[int]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}  # noqa: RUF012


class Bus(Vehicle):
    __tablename__ = "locked_buses"
    id: Mapped[int] = mapped_column(sa.ForeignKey("locked_vehicles.id"), primary_key=True)
    line: Mapped[int]
    __mapper_args__ = {"polymorphic_identity": "bus"}  # noqa: RUF012


opened_bed = opening(Base, LOCKING)


_WAITING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%locked_%'",
    "mariadb": "SELECT count(*) FROM information_schema.processlist "
    "WHERE info LIKE '%locked_%FOR UPDATE%' AND time_ms > 100 AND id <> CONNECTION_ID()",
}


def waits(bed: Bed) -> bool:
    with bed.other.connect() as connection:
        return bool(connection.exec_driver_sql(_WAITING[bed.server].replace("%", "%%")).scalar())


def read_while_locked(bed: Bed, entity: Any, read: Any, lock: sa.Select[Any], *writes: sa.Executable) -> Any:
    """What an operation reads whose batch waited while somebody else wrote."""
    with bed.other.connect() as connection:
        connection.execute(lock.with_for_update())
        caller = gevent.spawn(bed.together, entity, 1, read)
        wait_until(lambda: waits(bed))
        for write in writes:
            connection.execute(write)
        connection.commit()
    return caller.get()[0]


def test_what_is_joined_to_the_row_is_as_it_is_when_the_row_is_locked(bed: Bed) -> None:
    bed.add(Train(id=1, line=Line(id=1, speed=100), bookings=[Booking(id=1)]))
    found = read_while_locked(
        bed,
        Train,
        lambda train: (len(train.bookings), train.line.speed),
        sa.select(Train.id),
        sa.insert(Booking).values(id=2, train_id=1),
        sa.update(Line).values(speed=200),
    )
    assert found == (2, 200)


def test_what_a_subquery_counts_is_as_it_is_when_the_row_is_locked(bed: Bed) -> None:
    bed.add(Train(id=1, line=Line(id=1, speed=100), bookings=[Booking(id=1)]))
    write = sa.insert(Booking).values(id=2, train_id=1)
    assert read_while_locked(bed, Counted, lambda train: train.count, sa.select(Train.id), write) == 2


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


@pytest.mark.parametrize("locked", [Vehicle, Bus])
def test_every_table_of_a_class_is_locked(bed: Bed, locked: Any) -> None:
    bed.add(Bus(id=1, seats=1, line=1))
    found = read_while_locked(
        bed,
        Bus,
        lambda bus: (bus.seats, bus.line),
        sa.select(locked.__table__.c.id),
        sa.update(locked.__table__).values({"seats" if locked is Vehicle else "line": 2}),
    )
    assert found == ((2, 1) if locked is Vehicle else (1, 2))


def test_the_lock_and_the_load_are_one_message(bed: Bed, tmp_path: Path) -> None:
    bed.add(Train(id=1, line=Line(id=1, speed=100)))
    if bed.server == "postgresql":
        bed.engine.dispose()
        trips = Trips(bed.engine, tmp_path / "trace")
        with bed.processor(Train) as processor:
            processor.run(1, sell)
            assert trips.of(lambda: processor.run(1, sell)) == (2 if bed.pipeline else 7)
    else:
        assert bed.together(Train, 1, sell) == [1]
    assert sum(" FOR " in statement and "JOIN" not in statement for statement in bed.statements) in {1, 2}


def test_a_class_that_is_loaded_from_its_own_table_is_locked_by_its_load(bed: Bed) -> None:
    bed.add(Bus(id=1, seats=1, line=1))
    bed.statements.clear()
    assert bed.together(Bus, 1, lambda bus: bus.line) == [1]
    assert len([statement for statement in bed.statements if " FOR " in statement]) == 1

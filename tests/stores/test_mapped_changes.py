"""What counts as a change of a mapped instance: what the database would see change, and nothing else."""

from __future__ import annotations

import enum
import os
import pickle
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    composite,
    mapped_column,
    object_session,
    relationship,
)

from geventbatch import SaveFailed
from tests.support.mapped import COMPARING, ON_POSTGRES, Bed, opening

if TYPE_CHECKING:
    from collections.abc import Callable

BERLIN = ZoneInfo("Europe/Berlin")


class Base(DeclarativeBase):
    pass


class Seats:
    """Without an `__eq__`."""

    def __init__(self, taken: dict[str, Any]) -> None:
        self.taken = taken


class SeatsColumn(sa.TypeDecorator[Seats]):
    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: Seats | None, dialect: sa.Dialect) -> Any:
        return None if value is None else {"taken": value.taken}

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Seats | None:
        return None if value is None else Seats(value["taken"])


class Sealed(sa.TypeDecorator[Any]):
    """Binds one value in another way each time, as encryption does."""

    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return {"salt": os.urandom(8).hex(), "value": value}

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return value["value"]


class Stamp(sa.TypeDecorator[datetime]):
    """A moment with its zone."""

    impl = sa.String(60)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> Any:
        return None if value is None else f"{value.isoformat()}"

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


@dataclass
class Point:
    x: int
    y: int


class Train(Base):
    __tablename__ = "changed_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)
    document: Mapped[Any] = mapped_column(sa.JSON, default=dict)
    tracked: Mapped[Any] = mapped_column(MutableDict.as_mutable(sa.JSON()), default=lambda: {"a": {"b": 1}})
    pickled: Mapped[Any] = mapped_column(sa.PickleType, default=lambda: {"names": {"Ann", "Bob"}})
    seats: Mapped[Seats] = mapped_column(SeatsColumn, default=lambda: Seats({}))
    sealed: Mapped[Any] = mapped_column(Sealed, default=lambda: [1])
    photo: Mapped[Any] = mapped_column(sa.LargeBinary, default=b"123")
    departs: Mapped[datetime] = mapped_column(Stamp, default=lambda: datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN))
    late: Mapped[Any] = mapped_column(sa.JSON, default=dict, deferred=True)
    x: Mapped[int] = mapped_column(default=1)
    y: Mapped[int] = mapped_column(default=2)
    place: Mapped[Point] = composite("x", "y")
    kind: Mapped[str] = mapped_column(sa.String(10))
    wagons: Mapped[list[Wagon]] = relationship(back_populates="train", order_by="Wagon.id")
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "train"}  # noqa: RUF012


class Night(Train):
    beds: Mapped[Any] = mapped_column(sa.JSON, default=lambda: [1], nullable=True)
    __mapper_args__ = {"polymorphic_identity": "night"}  # noqa: RUF012


class Wagon(Base):
    __tablename__ = "changed_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int] = mapped_column(sa.ForeignKey("changed_trains.id"))
    document: Mapped[Any] = mapped_column(sa.JSON, default=dict)
    train: Mapped[Train] = relationship(back_populates="wagons")


class PostgresBase(DeclarativeBase):
    pass


class Columns(PostgresBase):
    __tablename__ = "changed_columns"
    id: Mapped[int] = mapped_column(primary_key=True)
    binary: Mapped[Any] = mapped_column(JSONB, default=dict)
    array: Mapped[Any] = mapped_column(ARRAY(sa.Integer), default=lambda: [1, 2])
    prices: Mapped[Any] = mapped_column(ARRAY(sa.Numeric), default=lambda: [Decimal("1.0")])
    price: Mapped[Decimal] = mapped_column(sa.Numeric, default=Decimal("1.0"))
    level: Mapped[float] = mapped_column(sa.Float, default=0.0)


opened_bed = opening(Base)
opened_comparing = opening(Base, COMPARING)
opened_postgres = opening(PostgresBase, ON_POSTGRES)


@pytest.fixture
def comparing(opened_comparing: Bed) -> Bed:
    opened_comparing.clear()
    return opened_comparing


@pytest.fixture
def postgres(opened_postgres: Bed) -> Bed:
    opened_postgres.clear()
    return opened_postgres


def query(resource: Any) -> None:
    """Where the session flushes by itself, it does so here."""
    session = object_session(resource)
    assert session is not None
    session.scalars(sa.select(Wagon.id)).all()


def pay(train: Train) -> str:
    train.document["paid"] = True
    return repr(train.document)


def weigh(train: Train) -> str:
    train.document["weight"] = 2.0
    return repr(train.document)


def turn(train: Train) -> str:
    train.document["order"] = dict(reversed(train.document["order"].items()))
    return repr(train.document)


def look(train: Train) -> str:
    return repr(train.document)


@pytest.mark.parametrize("change", [pay, weigh, turn])
def test_what_python_calls_equal_and_the_database_does_not_is_saved(bed: Bed, change: Callable[[Train], str]) -> None:
    bed.add(Train(id=1, kind="train", document={"paid": 1, "weight": 2, "order": {"a": 1, "b": 2}}))
    (answer,) = bed.together(Train, 1, change)
    assert answer == repr(bed.read(sa.select(Train.document)))
    assert bed.together(Train, 1, look) == [answer]


def test_what_was_flushed_by_a_query_and_then_changed_again_is_saved(bed: Bed) -> None:
    bed.add(Train(id=1, kind="train", document={"paid": 1}))

    def changes(train: Train) -> None:
        pay(train)
        query(train)
        train.document["paid"] = 1

    assert bed.together(Train, 1, changes) == [None]
    assert repr(bed.read(sa.select(Train.document))) == "{'paid': 1}"


def take(train: Train) -> None:
    train.seats.taken["12"] = "Ann"


def rename(train: Train) -> None:
    train.pickled["names"].add("Eve")


def nest(train: Train) -> None:
    train.tracked["a"]["b"] = True


def seal(train: Train) -> None:
    train.sealed.append(2)


def develop(train: Train) -> None:
    train.photo = bytearray(b"456")
    query(train)
    train.photo.extend(b"7")


def move(train: Train) -> None:
    train.place.x = 5


def delay(train: Train) -> None:
    train.late["minutes"] = 5


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (take, lambda train: train.seats.taken == {"12": "Ann"}),
        (rename, lambda train: train.pickled == {"names": {"Ann", "Bob", "Eve"}}),
        (nest, lambda train: repr(train.tracked["a"]["b"]) == "True"),
        (seal, lambda train: train.sealed == [1, 2]),
        (develop, lambda train: train.photo == b"4567"),
        (move, lambda train: (train.x, train.y) == (5, 2)),
        (delay, lambda train: train.late == {"minutes": 5}),
    ],
)
def test_a_value_that_is_changed_in_place_is_saved(
    bed: Bed, change: Callable[[Train], None], shown: Callable[[Train], bool]
) -> None:
    bed.add(Train(id=1, kind="train"))
    assert bed.together(Train, 1, change) == [None]
    assert shown(bed.read(sa.select(Train).options(sa.orm.undefer(Train.late))))


def test_what_was_only_looked_at_is_not_written(bed: Bed) -> None:
    bed.add(Night(id=1, wagons=[Wagon(id=1)]))

    def looks(train: Night) -> object:
        return repr((train.document, train.tracked, train.seats, train.place, train.late, train.beds, train.wagons))

    (answer,) = bed.together(Train, 1, looks)
    assert isinstance(answer, str)
    assert bed.updates() == []


def test_one_change_writes_one_column(bed: Bed) -> None:
    bed.add(Train(id=1, kind="train"))

    def count(train: Train) -> None:
        train.count += 1

    assert bed.together(Train, 1, count) == [None]
    bed.statements = [statement.replace('"', "").replace("`", "") for statement in bed.statements]
    assert any("SET count=" in statement for statement in bed.statements)
    assert not any("document=" in statement or "sealed=" in statement for statement in bed.statements)


def test_a_value_that_is_changed_to_another_and_back_is_not_written(bed: Bed) -> None:
    bed.add(Train(id=1, kind="train", document={"a": 1}))

    def changes(train: Train) -> None:
        train.document["a"] = 2

    def back(train: Train) -> None:
        train.document["a"] = 1

    assert bed.together(Train, 1, changes, back) == [None, None]
    assert bed.updates() == []


def test_two_hours_of_one_name_are_not_one(bed: Bed) -> None:
    bed.add(Train(id=1, kind="train", departs=datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN)))

    def delays(train: Train) -> None:
        train.departs = train.departs.astimezone(BERLIN).replace(fold=1)

    assert bed.together(Train, 1, delays) == [None]
    assert bed.read(sa.select(Train.departs)).isoformat() == "2026-10-25T02:30:00+01:00"


def test_a_column_of_a_child_that_is_changed_in_place_is_saved(bed: Bed) -> None:
    bed.add(Night(id=1))

    def sleeps(train: Night) -> None:
        train.beds.append(2)

    assert bed.together(Train, 1, sleeps) == [None]
    assert bed.read(sa.select(Night.beds)) == [1, 2]


def test_a_row_beside_the_resource_that_is_changed_in_place_is_saved(bed: Bed) -> None:
    bed.add(Train(id=1, kind="train", wagons=[Wagon(id=1, document={"full": 0}), Wagon(id=2)]))

    def fills(train: Train) -> None:
        train.wagons[0].document["full"] = False

    assert bed.together(Train, 1, fills) == [None]
    assert bed.read(sa.select(Wagon.document).where(Wagon.id == 1)) == {"full": False}
    assert not any("UPDATE changed_wagons" in one and "2" in one.partition("WHERE")[2] for one in bed.statements)


def test_what_is_loaded_anew_is_compared_with_that(bed: Bed) -> None:
    bed.add(Train(id=1, kind="train", document={"a": 1}))

    def refreshes(train: Train) -> None:
        session = object_session(train)
        assert session is not None
        session.expire(train)
        train.document["a"] = True

    assert bed.together(Train, 1, refreshes) == [None]
    assert repr(bed.read(sa.select(Train.document))) == "{'a': True}"


@pytest.mark.parametrize("name", ["document", "late", "sealed", "pickled", "count"])
def test_a_column_that_somebody_else_has_changed_is_a_conflict(comparing: Bed, name: str) -> None:
    comparing.add(Train(id=1, kind="train", count=7, document=[7], late=[7], sealed=[7], pickled=[7]))
    runs: list[Any] = []

    def changes(train: Train) -> Any:
        value = getattr(train, name)
        if not runs:
            comparing.write(sa.update(Train).values({name: 8 if name == "count" else [8]}))
        runs.append(value)
        train.x += 1
        return value

    assert comparing.together(Train, 1, changes) == [8 if name == "count" else [8]]
    assert len(runs) == 2
    assert comparing.read(sa.select(Train.x)) == 2


def test_a_row_that_was_deleted_and_made_anew_with_the_same_version_is_another_row(comparing: Bed) -> None:
    comparing.add(Train(id=1, kind="train", count=1, document=["old"]))
    runs: list[Any] = []

    def appends(train: Train) -> Any:
        if not runs:
            comparing.write(sa.delete(Train))
            comparing.add(Train(id=1, kind="train", count=1, document=["new"]))
        runs.append(1)
        train.document.append("mine")
        return list(train.document)

    assert comparing.together(Train, 1, appends, version="count") == [["new", "mine"]]
    assert comparing.read(sa.select(Train.document)) == ["new", "mine"]


class Counted(Base):
    __tablename__ = "changed_counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    log: Mapped[Any] = mapped_column(sa.JSON)
    saves: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": saves}  # noqa: RUF012


def test_so_it_is_where_sqlalchemy_counts(comparing: Bed) -> None:
    comparing.add(Counted(id=1, log=["old"]))
    runs: list[Any] = []

    def appends(counted: Counted) -> Any:
        if not runs:
            comparing.write(sa.delete(Counted))
            comparing.add(Counted(id=1, log=["new"]))
        runs.append(1)
        counted.log.append("mine")
        return list(counted.log)

    assert comparing.together(Counted, 1, appends) == [["new", "mine"]]
    assert comparing.read(sa.select(Counted.log)) == ["new", "mine"]
    assert comparing.read(sa.select(Counted.saves)) == 2


class Lockable:
    """Can be neither bound as JSON nor pickled."""

    def __reduce__(self) -> Any:
        raise ValueError("not to be pickled")


class Opaque(sa.TypeDecorator[Any]):
    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return {"salt": os.urandom(8).hex()}

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return Lockable()


class Closed(Base):
    __tablename__ = "changed_closed"
    id: Mapped[int] = mapped_column(primary_key=True)
    opaque: Mapped[Any] = mapped_column(Opaque)


def test_a_column_whose_changes_cannot_be_told_is_named_when_it_is_loaded(bed: Bed) -> None:
    bed.add(Closed(id=1, opaque=1))
    (answer,) = bed.together(Closed, 1, look)
    assert "changed_closed.opaque of Closed has changed cannot be told" in str(answer)
    assert answer.retry_safe
    assert not isinstance(answer, SaveFailed)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("binary", {"a": True}, "{'a': True}"),
        ("array", [1, 2, 3], "[1, 2, 3]"),
        ("prices", [Decimal("1.00")], "[Decimal('1.00')]"),
    ],
)
def test_what_postgres_has_is_compared_as_it_is_bound(postgres: Bed, name: str, value: Any, shown: str) -> None:
    postgres.add(Columns(id=1, binary={"a": 1}))

    def changes(columns: Columns) -> None:
        there = getattr(columns, name)
        there.clear()
        there.update(value) if isinstance(there, dict) else there.extend(value)

    assert postgres.together(Columns, 1, changes) == [None]
    assert repr(postgres.read(sa.select(getattr(Columns, name)))) == shown


def test_a_number_that_is_equal_and_written_otherwise_is_saved(postgres: Bed) -> None:
    postgres.add(Columns(id=1))

    def changes(columns: Columns) -> None:
        columns.price = Decimal("1.00")
        columns.level = -0.0

    assert postgres.together(Columns, 1, changes) == [None]
    columns = postgres.read(sa.select(Columns))
    assert (str(columns.price), repr(columns.level)) == ("1.00", "-0.0")


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


class Painted(Base):
    __tablename__ = "changed_painted"
    id: Mapped[int] = mapped_column(primary_key=True)
    colour: Mapped[Colour] = mapped_column(sa.Enum(Colour, native_enum=False, length=20))
    coats: Mapped[int] = mapped_column(default=0)


def test_a_text_that_the_enum_of_its_column_cannot_read_back_is_refused_to_its_own_operation(bed: Bed) -> None:
    bed.add(Painted(id=1, colour=Colour.RED))

    def paint(painted: Painted) -> None:
        painted.colour = cast("Any", "green")  # which SQLAlchemy writes, and then fails to load

    def count(painted: Painted) -> int:
        painted.coats += 1
        return painted.coats

    refused, *others = bed.together(Painted, 1, paint, count, count)
    assert isinstance(refused, ValueError)
    assert "is no value of its Enum" in str(refused)
    assert others == [1, 2]
    assert bed.read(sa.select(Painted.coats)) == 2


# -- what is answered of it ---------------------------------------------------------------------------------------


RETURNED: list[tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], None]]] = [
    (lambda train: train.seats, lambda seats: seats.taken, lambda train: train.seats.taken.update({"1": "Ann"})),
    (lambda train: train.tracked, dict, lambda train: train.tracked.update({"1": "Ann"})),
    (lambda train: [train.tracked], lambda answer: dict(answer[0]), lambda train: train.tracked.clear()),
    (lambda train: train.place, lambda place: (place.x, place.y), lambda train: setattr(train.place, "x", 7)),
]


@pytest.mark.parametrize(("returned", "shown", "change"), RETURNED, ids=["object", "mutable", "in a list", "composite"])
def test_an_object_in_a_column_is_answered_as_it_was_then(
    bed: Bed, returned: Callable[[Any], Any], shown: Callable[[Any], Any], change: Callable[[Any], None]
) -> None:
    bed.add(Train(id=1, kind="train"))
    alone = bed.together(Train, 1, returned)[0]
    answer, _ = bed.together(Train, 1, returned, change)
    assert type(answer) is type(alone)
    assert shown(answer) == shown(alone)


class Ticket:
    """In a document, and with something below itself."""

    def __init__(self, name: str) -> None:
        self.names = [name]
        self.below: list[Ticket] = []


class Slotted:
    __slots__ = ("ticket",)

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket


@dataclass
class Corner:
    """A composite that holds an object."""

    left: Ticket
    right: Ticket


class Ticketed(Base):
    __tablename__ = "changed_ticketed"
    id: Mapped[int] = mapped_column(primary_key=True)
    tickets: Mapped[Any] = mapped_column(sa.PickleType)
    left: Mapped[Any] = mapped_column(sa.PickleType)
    right: Mapped[Any] = mapped_column(sa.PickleType)
    corner: Mapped[Corner] = composite("left", "right")


DEEP: list[Callable[[Ticketed], Any]] = [
    lambda one: one.tickets["first"],
    lambda one: one.tickets["first"].below[0],
    lambda one: one.tickets,
    lambda one: [one.tickets["slotted"].ticket],
    lambda one: {"all": one.tickets["slotted"]},
    lambda one: one.corner.left,
    lambda one: one.corner,
]


@pytest.mark.parametrize("returned", DEEP, ids=map(str, range(len(DEEP))))
def test_an_object_that_lies_deep_in_a_column_is_answered_as_it_was_then(
    bed: Bed, returned: Callable[[Ticketed], Any]
) -> None:
    first = Ticket("Ann")
    first.below.append(Ticket("Ben"))
    tickets = {"first": first, "slotted": Slotted(Ticket("Eve"))}
    bed.add(Ticketed(id=1, tickets=tickets, corner=Corner(Ticket("Joe"), Ticket("Zoe"))))

    def change(one: Ticketed) -> None:
        for ticket in (one.tickets["first"], one.tickets["first"].below[0], one.tickets["slotted"].ticket):
            ticket.names.append("changed")
        one.corner.left.names.append("changed")

    answer, error = bed.together(Ticketed, 1, returned, change)
    assert error is None
    assert b"changed" not in pickle.dumps(answer)
    assert type(answer) is type(bed.together(Ticketed, 1, returned)[0])
    assert bed.read(sa.select(Ticketed)).tickets["first"].names == ["Ann", "changed"]

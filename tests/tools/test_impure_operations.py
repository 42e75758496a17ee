"""What else `check_operations` finds: aliases, reads of what a save computes, what is still to run."""

from __future__ import annotations

import gc
import warnings
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column, relationship

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.testing import ImpureOperation, check_operations
from geventbatch.testing._computed import computed_of
from tests.guarantees.test_unfinished import UNFINISHED
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@dataclass
class Passenger:
    name: str
    friends: list[Any] = field(default_factory=list)


@dataclass
class Train:
    seats: dict[Any, Any] = field(default_factory=lambda: {1: ["Ann"], 2: []})
    log: list[Any] = field(default_factory=list)
    both: tuple[list[Any], ...] = ()

    def __post_init__(self) -> None:
        self.again = self.log  # which it has twice before any operation, and nobody complains of


@pytest.fixture(params=[True, False], ids=["batching", "alone"])
def processor(request: pytest.FixtureRequest) -> Iterator[Processor[Any]]:
    kept = Train()

    @contextmanager
    def scope(_: object) -> Iterator[Train]:
        train = deepcopy(kept)
        yield train
        vars(kept).update(vars(train))

    with Processor(open_resource=scope, min_duration=0, batching=request.param) as processor:
        yield processor


def keep(train: Train, names: Any) -> None:
    train.seats[3] = names


def keep_inside(train: Train, names: Any) -> None:
    train.log.append({"names": (names,)})


def keep_what_it_holds(train: Train, names: dict[str, Any]) -> None:
    train.seats[3] = names["Ann"]


def move(train: Train) -> None:
    train.seats[3] = train.seats[1]


def log_all(train: Train) -> None:
    train.log.append(train.seats)


def pair_up(train: Train) -> None:
    train.both = (train.seats[2], train.seats[2])


ALIASES: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (keep, (["Bob"],), "put argument 1 into the resource, as resource.seats[3]"),
    (keep, (Passenger("Bob"),), "put argument 1 into the resource, as resource.seats[3]"),
    (keep, ((["Bob"],),), "put argument 1[0] into the resource, as resource.seats[3][0]"),
    (keep_inside, ({"Bob"},), "put argument 1 into the resource, as resource.log[0]['names'][0]"),
    (keep_what_it_holds, ({"Ann": [1]},), "put argument 1['Ann'] into the resource, as resource.seats[3]"),
    (move, (), "put one object into resource.seats[1] and resource.seats[3]"),
    (log_all, (), "put one object into resource.seats and resource.log[0]"),
    (pair_up, (), "into resource.seats[2] and resource.both[0]"),
]


@pytest.mark.parametrize("alias", ALIASES, ids=range(len(ALIASES)))
def test_what_is_put_into_the_resource_and_is_elsewhere_too_is_an_alias(
    processor: Processor[Any], alias: tuple[Any, ...]
) -> None:
    operation, args, told = alias
    with pytest.raises(ImpureOperation) as raised, check_operations(processor):
        processor.run("k", operation, *args)
    assert told in str(raised.value)
    assert "Put a copy there (aliases); nothing of it was saved" in str(raised.value)
    with check_operations(processor, skip=["aliases"]):
        assert processor.run("k", operation, *args) is None


def keep_a_copy(train: Train, names: Any) -> None:
    train.seats[3] = deepcopy(names)


def reorder(train: Train) -> None:
    train.seats[2], train.seats[1] = train.seats[1], train.seats[2]
    train.log = train.again


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        (keep_a_copy, (["Bob"],)),
        (keep, ("Bob",)),
        (keep, ((1, "Bob"),)),
        (keep, (datetime(2026, 1, 1, tzinfo=UTC),)),
        (reorder, ()),
    ],
    ids=range(5),
)
def test_copies_and_what_cannot_change_are_no_aliases(
    processor: Processor[Any], operation: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    with check_operations(processor):
        assert processor.run("k", operation, *args) is None


# -- what is still to run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unfinished", UNFINISHED, ids=[one[0].__name__ for one in UNFINISHED])
def test_what_is_still_to_run_is_complained_of_and_python_warns_of_nothing(unfinished: tuple[Any, ...]) -> None:
    operation, called, instead = unfinished
    with (
        Processor(load_resource=load_nothing, save_resource=lambda *_: None, min_duration=0) as processor,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        complaint = complaint_of(processor, operation)
        gc.collect()
    assert f"returned {called}: " in complaint
    assert instead in complaint
    assert complaint.endswith("(unfinished); nothing of it was saved")
    assert caught == []


def load_nothing(_: object) -> list[int]:
    return []


def complaint_of(processor: Processor[Any], operation: Callable[..., Any]) -> str:
    with pytest.raises(ImpureOperation) as raised, check_operations(processor):
        processor.run("k", operation)
    return str(raised.value)


# -- what a save computes --------------------------------------------------------------------------------------------


class Base(DeclarativeBase): ...


class Booking(Base):
    __tablename__ = "impure_bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    train: Mapped[int] = mapped_column(sa.ForeignKey("impure_trains.id"))
    changed: Mapped[datetime | None] = mapped_column(onupdate=lambda: datetime.now(UTC))


class Row(Base):
    __tablename__ = "impure_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    places: Mapped[int] = mapped_column(default=5)
    sold: Mapped[int] = mapped_column(default=0)
    left: Mapped[int] = mapped_column("free", sa.Computed("places - sold"))
    double: Mapped[int] = column_property(sa.literal_column("2") * sold)
    touched: Mapped[datetime | None] = mapped_column(server_onupdate=sa.FetchedValue())
    bookings: Mapped[list[Booking]] = relationship()

    def has_room(self) -> bool:
        return self.left is None or self.left > 0

    def sell(self) -> int:
        self.sold += 1
        return self.places - self.sold


def twin_of(row: Row) -> Row:
    return Row(id=row.id, places=row.places, sold=row.sold, bookings=[Booking(id=1, train=1)])


READS: list[tuple[Callable[[Row], Any], str]] = [
    (lambda row: row.left, "resource.left"),
    (lambda row: row.has_room(), "resource.left"),
    (lambda row: row.double, "resource.double"),
    (lambda row: row.touched, "resource.touched"),
    (lambda row: row.bookings[0].changed if row.bookings else None, "resource.bookings[0].changed"),
]


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[Processor[Row]]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/trains")
    Base.metadata.create_all(engine)
    store = SQLAlchemyStore.mapped(engine, Row, missing=lambda key: Row(id=key, places=5, sold=0))
    with Processor(open_resource=store, min_duration=0, max_duration=5) as processor:
        yield processor
    engine.dispose()


@pytest.mark.parametrize(("read", "where"), READS, ids=[str(number) for number in range(len(READS))])
def test_who_reads_what_a_save_computes_is_told_where(
    rows: Processor[Row], read: Callable[[Row], Any], where: str
) -> None:
    for read_only in (False, True):
        with pytest.raises(ImpureOperation) as raised, check_operations(rows, copy=twin_of):
            rows.run(1, read, read_only=read_only)
        assert f"read {where}, which the database or the ORM computes at a save" in str(raised.value)
        assert str(raised.value).endswith("Compute it here (computed); nothing of it was saved")
    with check_operations(rows, copy=twin_of, skip=["computed"]):
        assert isinstance(answer_of(rows.run, 1, read), int | bool | None)


def test_who_computes_it_of_the_columns_is_left_alone_and_the_class_is_as_it_was(rows: Processor[Row]) -> None:
    before = dict(vars(Row)), dict(vars(Booking))
    with check_operations(rows, copy=twin_of):
        assert rows.run(1, Row.sell) == 4
        assert rows.run(1, lambda row: sa.select(Row.left).where(Row.id == row.id).subquery() is not None)
    assert (dict(vars(Row)), dict(vars(Booking))) == before


def test_of_what_is_not_mapped_nothing_is_computed() -> None:
    assert computed_of(Train) == computed_of(dict) == computed_of(int) == set()
    assert computed_of(Row) == {"left", "double", "touched"}

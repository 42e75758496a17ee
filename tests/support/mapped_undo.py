"""Mapped instances with all that they can have, and operations that change it in all ways, then raise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import sqlalchemy as sa
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.ext.orderinglist import ordering_list
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    attribute_keyed_dict,
    composite,
    deferred,
    mapped_column,
    object_session,
    reconstructor,
    relationship,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.mapped import Bed

    Operation = Callable[[Any], object]


class Base(DeclarativeBase):
    pass


class Weight:
    """An object of one's own, which changes in place and is equal to none."""

    def __init__(self, tons: int) -> None:
        self.tons = tons


class Weighing(sa.TypeDecorator[Weight]):
    impl = sa.JSON
    cache_ok = True

    def process_bind_param(self, value: Weight | None, _: Any) -> Any:
        return None if value is None else {"tons": value.tons}

    def process_result_value(self, value: Any, _: Any) -> Weight | None:
        return None if value is None else Weight(value["tons"])


@dataclass
class Place:
    """A composite, which changes in place."""

    x: int
    y: int


class Line(Base):
    __tablename__ = "undo_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(20))
    trains: Mapped[list[Train]] = relationship(back_populates="line")


class Train(Base):
    __tablename__ = "undo_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    taken: Mapped[int] = mapped_column(default=0)
    amount: Mapped[Any] = mapped_column(sa.Numeric(10, 2))
    note: Mapped[str | None] = deferred(mapped_column(sa.String(80)))
    seats: Mapped[dict[str, Any]] = mapped_column(sa.JSON)
    tags: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(sa.JSON))
    log: Mapped[list[Any]] = mapped_column(MutableList.as_mutable(sa.PickleType))
    blob: Mapped[Any] = mapped_column(sa.PickleType)
    weight: Mapped[Weight] = mapped_column(Weighing)
    x: Mapped[int]
    y: Mapped[int]
    version: Mapped[int] = mapped_column(default=1)
    line_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Line.id))
    place: Mapped[Place] = composite("x", "y")
    line: Mapped[Line | None] = relationship(back_populates="trains")
    wagons: Mapped[list[Wagon]] = relationship(
        back_populates="train", cascade="all, delete-orphan", order_by="Wagon.id"
    )
    stops: Mapped[list[Stop]] = relationship(
        order_by="Stop.position", collection_class=ordering_list("position"), lazy="selectin"
    )
    doors: Mapped[dict[str, Door]] = relationship(
        collection_class=attribute_keyed_dict("name"), cascade="all, delete-orphan"
    )
    names: AssociationProxy[list[str]] = association_proxy("wagons", "name")

    @hybrid_property
    def free(self) -> int:
        return 10 - self.taken

    @free.inplace.setter
    def _set_free(self, value: int) -> None:
        self.taken = 10 - value

    @cached_property
    def cached(self) -> dict[str, int]:
        return {"taken": self.taken}


class Wagon(Base):
    __tablename__ = "undo_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))
    name: Mapped[str] = mapped_column(sa.String(20))
    seats: Mapped[Any] = mapped_column(sa.JSON, default=list)
    train: Mapped[Train | None] = relationship(back_populates="wagons")


class Stop(Base):
    __tablename__ = "undo_stops"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))
    name: Mapped[str] = mapped_column(sa.String(20))
    position: Mapped[int | None]


class Door(Base):
    __tablename__ = "undo_doors"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))
    name: Mapped[str] = mapped_column(sa.String(20))
    state: Mapped[str] = mapped_column(sa.String(20), default="shut")


class Told(Base):
    """Of which each instance has something in memory from its load on."""

    __tablename__ = "undo_told"
    id: Mapped[int] = mapped_column(primary_key=True)
    taken: Mapped[int] = mapped_column(default=0)

    @reconstructor
    def begin(self) -> None:
        self.events: list[str] = []


_TABLES: Final = Base.metadata.sorted_tables


def fill(bed: Bed) -> None:
    bed.clear()
    lines = [Line(id=1, name="north"), Line(id=2, name="south")]
    train = Train(
        id=1,
        amount=1,
        note="n",
        seats={"1": "Ann"},
        tags={"a": 1},
        log=["made"],
        blob={"deep": [1]},
        weight=Weight(80),
        place=Place(1, 2),
        line=lines[0],
        wagons=[Wagon(id=n, name=name, seats=[]) for n, name in enumerate("abcd", 1)],
        stops=[Stop(id=1, name="A"), Stop(id=2, name="B")],
        doors={"l": Door(id=1, name="l"), "r": Door(id=2, name="r")},
    )
    bed.add(*lines, train, Told(id=1))
    bed.statements.clear()


class Refused(Exception):
    pass


def shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: shown(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(one) for one in value]
    if isinstance(value, Base):
        held = {name: one for name, one in vars(value).items() if not isinstance(one, (Base, list))}
        return {name: repr(one) for name, one in sorted(held.items()) if name != "_sa_instance_state"}
    return repr(vars(value)) if isinstance(value, Weight) else repr(value)


def rows(bed: Bed) -> list[Any]:
    with bed.other.begin() as connection:
        tables = [connection.execute(sa.select(table).order_by(table.c.id)).all() for table in _TABLES]
    return [shown(list(map(tuple, table))) for table in tables]


def take(train: Train) -> int:
    train.taken += 1
    return train.taken


def assign_columns(train: Train) -> None:
    train.taken += 100
    train.amount = 7
    train.line_id = 2


def change_in_place(train: Train) -> None:
    train.seats["2"] = {"deep": ["Ben"]}
    train.tags["b"] = 2
    train.log.append("changed")
    train.blob["deep"].append(2)
    train.weight.tons += 1
    train.place.x += 10


def assign_objects(train: Train) -> None:
    train.seats = {"all": "Zoe"}
    train.tags = {"z": 26}
    train.log = ["z"]
    train.blob = [train.seats]
    train.weight = Weight(1)
    train.place = Place(9, 9)


def take_seat(train: Train) -> Any:
    train.seats[str(len(train.seats) + 1)] = ["Eve"]
    train.tags[str(len(train.tags))] = 0
    train.log.append(len(train.log))
    train.blob["deep"].append(len(train.blob["deep"]))
    train.weight.tons += 1
    train.place.y += 1
    return [shown(one) for one in (train.seats, train.tags, train.log, train.blob, train.weight, train.place)]


def delete_attribute(train: Train) -> None:
    del train.line_id
    del train.seats


def leave_attributes(train: Train) -> None:
    train.plain = ["raised"]  # type: ignore[attr-defined]
    train.cached["taken"] = 100
    if hasattr(train, "kept"):
        train.kept["all"].append("raised")
        del train.kept


def keep_attributes(train: Train) -> Any:
    if not hasattr(train, "kept"):
        train.kept = {"all": [], "seats": train.seats, "wagons": train.wagons}  # type: ignore[attr-defined]
    train.kept["all"].append(train.cached["taken"])  # type: ignore[attr-defined]
    assert train.kept["seats"] is train.seats  # type: ignore[attr-defined]
    assert train.kept["wagons"] is train.wagons  # type: ignore[attr-defined]
    return list(train.kept["all"])  # type: ignore[attr-defined]


def keep_cached(train: Train) -> list[int]:
    train.cached.setdefault("kept", len(train.cached))
    train.cached[str(len(train.cached))] = train.taken
    return list(train.cached.values())


def set_hybrid(train: Train) -> None:
    train.free = 0


def load_meanwhile(train: Train) -> None:
    assert train.note == "n"
    assert train.line is not None
    assert [wagon.name for wagon in train.wagons]
    train.note = "changed"
    train.line.name = "changed"
    train.wagons[0].name = "changed"


def look(train: Train) -> Any:
    if not hasattr(train, "other"):
        train.other = object_session(train).get(Line, 2)  # type: ignore[attr-defined, union-attr]
    return [
        train.note,
        train.line and train.line.name,
        [(wagon.name, list(wagon.seats)) for wagon in train.wagons],
        [(stop.name, stop.position) for stop in train.stops],
        sorted((name, door.state) for name, door in train.doors.items()),
        list(train.names),
    ]


def change_children(train: Train) -> None:
    for wagon in train.wagons:
        wagon.name += "!"
        wagon.seats.append("raised")
        wagon.plain = "raised"  # type: ignore[attr-defined]
    train.stops[0].name = "!"
    train.doors["l"].state = "open"


def seat_in_wagon(train: Train) -> Any:
    train.wagons[0].seats.append(len(train.wagons[0].seats))
    return list(train.wagons[0].seats)


def append_children(train: Train) -> None:
    train.wagons.append(Wagon(name="raised"))
    train.wagons.insert(0, Wagon(name="raised"))
    train.stops.append(Stop(name="raised"))
    train.doors["new"] = Door(name="new")


def append_one(train: Train) -> int:
    train.wagons.append(Wagon(id=100 + len(train.wagons), name=f"w{len(train.wagons)}", seats=[]))
    train.stops.insert(0, Stop(id=100 + len(train.stops), name=f"s{len(train.stops)}"))
    train.doors[str(len(train.doors))] = Door(id=100 + len(train.doors), name=str(len(train.doors)))
    return len(train.wagons)


def append_to_unloaded(train: Train) -> None:
    session: Any = object_session(train)
    session.add(Wagon(name="raised", train=train))
    train.wagons.append(Wagon(name="raised"))


def append_one_to_unloaded(train: Train) -> None:
    session: Any = object_session(train)
    session.add(Wagon(id=200 + len(session.new), name="backref", seats=[], train=train))


def remove_children(train: Train) -> None:
    del train.wagons[0]
    train.stops.pop()
    del train.doors["l"]


def remove_one(train: Train) -> int:
    train.wagons.pop()
    return len(train.wagons)


def replace_children(train: Train) -> None:
    train.wagons = [Wagon(name="raised")]
    train.stops = []
    train.doors = {}


def reorder(train: Train) -> None:
    train.wagons.reverse()
    train.stops.sort(key=lambda stop: stop.name, reverse=True)


def move_away(train: Train) -> None:
    other = Line(name="raised")
    train.line = other
    for wagon in train.wagons:
        wagon.train = None


def move_along(train: Train) -> Any:
    train.line = train.other  # type: ignore[attr-defined]
    return len(train.line.trains) if "trains" in vars(train.line) else train.line.name


def expire(train: Train) -> None:
    session: Any = object_session(train)
    session.expire(train)
    train.taken += 50


def refresh(train: Train) -> None:
    session: Any = object_session(train)
    session.refresh(train)
    train.seats["raised"] = "raised"


def add_beside(train: Train) -> None:
    session: Any = object_session(train)
    session.add(Line(name="raised"))
    session.add(Stop(name="raised"))


def add_one_beside(train: Train) -> None:
    session: Any = object_session(train)
    session.add(Line(id=50 + len(session.new), name="beside"))


def forget_child(train: Train) -> None:
    session: Any = object_session(train)
    wagon = session.get(Wagon, 1)
    session.expunge(wagon)
    wagon.name = "raised"


ANYWHERE: Final[list[Operation]] = [
    assign_columns,
    change_in_place,
    assign_objects,
    delete_attribute,
    leave_attributes,
    set_hybrid,
    add_beside,
]
"""They send nothing, whatever is loaded."""

LOADING: Final[list[Operation]] = [
    load_meanwhile,
    change_children,
    append_children,
    append_to_unloaded,
    remove_children,
    replace_children,
    reorder,
    move_away,
    forget_child,
    expire,
    refresh,
]

UNLOADED: Final[list[Operation]] = [take, take_seat, keep_cached, add_one_beside, append_one_to_unloaded, take]
"""They are applied before those that raise, and behind; nothing has to be loaded for them."""

LOADED: Final[list[Operation]] = [*UNLOADED, keep_attributes, append_one, seat_in_wagon, remove_one, move_along]


def named(change: Operation) -> str:
    return getattr(change, "__name__", "")


def raised(change: Operation) -> Operation:
    def refused(train: Any) -> None:
        change(train)
        raise Refused

    return refused

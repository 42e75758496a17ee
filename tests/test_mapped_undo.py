"""What an operation that raised has changed of mapped instances is undone in memory, where it has sent nothing.

Each kind of change is tried for itself: what is answered, what is found, and what is written afterwards, is the same as
without that operation.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import pytest
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

from geventbatch import Processor, current_batch
from geventbatch.errors import CannotUndo, SaveFailed
from tests.mapped import EVERYWHERE, Bed, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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

SOME: Final = [EVERYWHERE[0], EVERYWHERE[1], EVERYWHERE[5]]


@pytest.fixture(scope="module", params=SOME)
def opened_bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with opened(request.param, Base, tmp_path_factory.mktemp("bed")) as bed:
        yield bed


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


@pytest.fixture
def bed(opened_bed: Bed) -> Bed:
    fill(opened_bed)
    return opened_bed


class Refused(Exception):
    pass


def found(train: Train) -> list[Any]:
    """All that is to be seen of it, without loading what is not loaded."""
    values = {name: value for name, value in vars(train).items() if name != "_sa_instance_state"}
    state: Any = sa.inspect(train)
    session: Any = object_session(train)
    kept = {name: value for name, value in values.items() if name not in state.mapper.relationships}
    children = {name: shown(values[name]) for name in sorted(values) if name in state.mapper.relationships}
    return [
        {name: shown(value) for name, value in sorted(kept.items()) if name != "place" and "Proxy" not in name},
        children,
        sorted(str(sa.inspect(one).identity) + type(one).__name__ for one in session.identity_map.values()),
        len(session.new),
        sorted(state.unloaded - {"place"}),  # a composite is made of its columns again
        sorted(state.expired_attributes),
    ]


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


def applied(bed: Bed, operations: list[Operation], *, copies: bool, entity: type[Base] = Train) -> list[Any]:
    """What *operations* answer, one by one in one batch, and what is written: those that raise are undone.

    A copy is made behind each of the others, or never.
    """
    fill(bed)
    answers: list[Any] = []
    verdicts: list[Any] = []

    def apply(resource: Any) -> None:
        batch: Any = current_batch()
        scope, mark, done = batch.scope, None, 0
        since: list[Operation] = []
        for operation in operations:
            try:
                answer = operation(resource)
            except Refused as error:
                verdict = scope.operation_raised(error)
                resource = scope.restore(mark)
                verdicts.append(verdict)
                batch.completed = done
                for again in since:
                    again(resource)
                    assert scope.operation_returned() is None
                    batch.completed += 1
            else:
                assert scope.operation_returned() is None
                batch.completed += 1
                answers.append(answer)
                since.append(operation)
                if copies:
                    mark, done, since = scope.checkpoint(), batch.completed, []
        answers.append(found(resource))

    with Processor(open_resource=bed.store(entity), clean_errors=(), min_duration=0, max_duration=10) as processor:
        processor.run(1, apply)
    assert not any(verdicts)
    written = [one for one in bed.statements if any(word in one for word in ("INSERT ", "UPDATE ", "DELETE "))]
    return [answers, [one for one in written if "FOR " not in one], rows(bed)]


# -- each kind of change -------------------------------------------------------------------------------------------


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
    assert train.taken == 0
    train.taken = 50


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


def find_child(train: Train) -> Any:
    session: Any = object_session(train)
    return session.get(Wagon, 2).name


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


def both(bed: Bed, change: Operation, first: list[Operation], others: list[Operation], *, copies: bool) -> list[Any]:
    """What comes of *others* with an operation that makes *change* and raises among them, and without it."""
    refused = raised(change)
    operations = [*first, refused, *others, refused, refused, *others, refused, *others, refused]
    without = [*first, *others, *others, *others]
    return [applied(bed, operations, copies=copies), applied(bed, without, copies=copies)]


COPIES: Final = pytest.mark.parametrize("copies", [False, True], ids=["loaded", "copied"])


@COPIES
@pytest.mark.parametrize("change", ANYWHERE, ids=named)
def test_what_an_operation_has_changed_is_as_if_it_had_not_been(bed: Bed, change: Operation, copies: bool) -> None:
    found, without = both(bed, change, [], UNLOADED, copies=copies)
    assert found == without


@COPIES
@pytest.mark.parametrize("change", [*ANYWHERE, *LOADING[:-2]], ids=named)
def test_what_it_has_changed_of_what_was_loaded_meanwhile_too(bed: Bed, change: Operation, copies: bool) -> None:
    found, without = both(bed, change, [look], LOADED, copies=copies)
    assert found == without


@COPIES
@pytest.mark.parametrize("change", LOADING, ids=named)
def test_what_it_has_loaded_is_as_if_it_had_not_been(bed: Bed, change: Operation, copies: bool) -> None:
    def load_and_change(train: Train) -> None:
        look(train)
        change(train)

    found, without = both(bed, load_and_change, [], [], copies=copies)
    assert found == without


# -- what cannot be undone in memory -------------------------------------------------------------------------------


def flush(train: Train) -> None:
    train.taken += 1
    session: Any = object_session(train)
    session.flush()


def query(train: Train) -> None:
    train.taken += 1
    session: Any = object_session(train)
    session.scalar(sa.select(sa.func.count()).select_from(Line))


def write(train: Train) -> None:
    session: Any = object_session(train)
    session.execute(sa.insert(Line).values(id=70, name="raised"))


def begin_savepoint(train: Train) -> None:
    session: Any = object_session(train)
    with session.begin_nested():
        train.taken += 1


def delete_child(train: Train) -> None:
    session: Any = object_session(train)
    session.delete(session.get(Wagon, 1))


def restored(bed: Bed, *changes: Operation, entity: type[Base] = Train) -> list[Any]:
    """What the scope says to undoing each of *changes* in a batch: None, or why it cannot."""
    told: list[Any] = []

    def apply(resource: Any) -> None:
        batch: Any = current_batch()
        for change in changes:
            change(resource)
            assert batch.scope.operation_raised(Refused()) is None
            try:
                resource = batch.scope.restore(None)
            except CannotUndo as error:
                told.append(str(error))
                raise Refused from error
            told.append(None)

    options: dict[str, Any] = {"open_resource": bed.store(entity), "min_duration": 0, "max_duration": 10}
    with Processor(**options, clean_errors=()) as processor, suppress(Refused):
        processor.run(1, apply)
    return told


@pytest.mark.parametrize("change", [flush, query, write, begin_savepoint, delete_child], ids=named)
def test_what_was_sent_or_is_to_be_deleted_is_not_undone_in_memory(bed: Bed, change: Operation) -> None:
    if bed.server == "sqlite" and change is query:  # which flushes nothing there
        assert restored(bed, change) == [None]
        return
    if bed.server == "sqlite" and change is not delete_child:
        with pytest.raises(RuntimeError, match="to SQLite"):
            restored(bed, change)
        return
    (why,) = restored(bed, change)
    assert "on 1 have done cannot be undone in memory: something was" in why


def test_a_query_that_only_reads_is_undone_in_memory(bed: Bed) -> None:
    def read(train: Train) -> None:
        session: Any = object_session(train)
        assert session.scalar(sa.select(sa.func.count()).select_from(Line)) == 2
        train.taken += 1

    assert restored(bed, read, read) == [None, None]


def test_what_a_class_has_in_memory_from_its_load_on_is_copied_from_the_first_that_raised_on(bed: Bed) -> None:
    def tell(told: Told) -> None:
        told.events.append("raised")

    def see(told: Told) -> list[str]:
        told.events.append(f"seen {len(told.events)}")
        return list(told.events)

    store = bed.store(Told)
    told: list[Any] = []

    def apply(resource: Told) -> None:
        scope: Any = current_batch()
        scope = scope.scope
        told.append(see(resource))
        tell(resource)
        assert scope.operation_raised(Refused()) is None
        resource = scope.restore(None)
        told.append(see(resource))

    with Processor(open_resource=store, clean_errors=(), min_duration=0, max_duration=10) as processor:
        with pytest.raises(SaveFailed, match="events of Told was not copied"):
            processor.run(1, apply)
        processor.run(1, apply)
    assert told == [["seen 0"], ["seen 0"], ["seen 0"]]


def test_many_that_were_loaded_at_once_are_copied_from_the_first_that_raised_on(bed: Bed) -> None:
    bed.add(*[Stop(id=n, train_id=1, name="more", position=n) for n in range(10, 20)])

    def rename(train: Train) -> None:
        for stop in train.stops:
            stop.name = "raised"

    store = bed.store(Train)

    def apply(train: Train) -> list[str]:
        scope: Any = current_batch()
        scope = scope.scope
        rename(train)
        assert scope.operation_raised(Refused()) is None
        return [stop.name for stop in scope.restore(None).stops]

    with Processor(open_resource=store, clean_errors=(), min_duration=0, max_duration=10) as processor:
        with pytest.raises(SaveFailed, match="nothing was copied"):
            processor.run(1, apply)
        assert processor.run(1, apply) == ["A", "B", *["more"] * 10]


def test_a_new_resource_is_as_it_was_made(bed: Bed) -> None:
    def make(key: int) -> Train:
        return Train(
            id=key, amount=1, seats={"1": ["Ann"]}, tags={"a": 1}, log=[], blob=[1], weight=Weight(1), place=Place(1, 2)
        )

    def change(train: Train) -> None:
        change_in_place_of(train)
        train.wagons.append(Wagon(name="raised"))
        train.taken = 5

    def change_in_place_of(train: Train) -> None:
        train.seats["1"].append("Ben")
        train.tags["b"] = 2
        train.log.append(1)
        train.blob.append(2)
        train.weight.tons = 2

    def apply(train: Train) -> list[Any]:
        scope: Any = current_batch()
        scope = scope.scope
        for _ in range(2):
            change(train)
            assert scope.operation_raised(Refused()) is None
            train = scope.restore(None)
        return [shown(one) for one in (train.seats, train.tags, train.log, train.blob, train.weight, train.wagons)]

    store = bed.store(Train, missing=make)
    with Processor(open_resource=store, clean_errors=(), min_duration=0, max_duration=10) as processor:
        answer = processor.run(7, apply)
    assert answer == [{"1": ["'Ann'"]}, {"a": "1"}, [], ["1"], "{'tons': 1}", []]
    assert rows(bed)[2][1][4:6] == [{"1": ["'Ann'"]}, {"a": "1"}]
    assert len(rows(bed)[-1]) == 4

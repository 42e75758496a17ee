"""Collections of classes of one's own, and attributes in ``__slots__``: undone exactly, or loaded once more."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import (
    DeclarativeBase,
    KeyFuncDict,
    Mapped,
    attribute_keyed_dict,
    mapped_column,
    reconstructor,
    relationship,
)
from sqlalchemy.orm import collections as sa_collections
from sqlalchemy.orm.collections import collection_adapter

from geventbatch import Processor
from tests.support.callers import answer_of
from tests.support.mapped import EVERYWHERE, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.mapped import Bed


F = TypeVar("F", bound="Callable[..., Any]")


def role(name: str) -> Callable[[F], F]:
    """One of SQLAlchemy's decorators, which have no types."""
    return cast("Callable[[F], F]", getattr(sa_collections.collection, name))


class Refused(Exception):
    pass


class Visible(list[Any]):
    """Which does not show all that it holds."""

    def __iter__(self) -> Iterator[Any]:
        return iter([self[place] for place in range(len(self)) if not self[place].name.startswith("h")])


class Slotted(list[Any]):
    __slots__ = ("__dict__", "__weakref__", "told")  # SQLAlchemy needs the first two


class Telling(list[Any]):
    """It keeps something beside its members."""

    def __init__(self, *members: Any) -> None:
        super().__init__(*members)
        self.told: list[str] = []


class Counting(set[Any]):
    told = 0


class Choosing:
    """Told by what it is called with."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, book: Any) -> str:
        self.seen.append(book.name)
        return f"{len(book.name)} {book.name}"


class Keyed(KeyFuncDict[Any, Any]):
    def __init__(self) -> None:
        super().__init__(Choosing())


class Ordered(OrderedDict[str, Any]):
    @role("appender")
    @role("internally_instrumented")
    def put(self, book: Any, _sa_initiator: Any = None) -> None:
        self.__setitem__(book.name, book, _sa_initiator)  # type: ignore[call-arg]

    @role("remover")
    @role("internally_instrumented")
    def take(self, book: Any, _sa_initiator: Any = None) -> None:
        self.__delitem__(book.name, _sa_initiator)  # type: ignore[call-arg]

    @role("iterator")
    def all(self) -> Iterator[Any]:
        return iter(self.values())


class Own:
    """No list, and no set."""

    __emulates__ = set

    def __init__(self) -> None:
        self._books: dict[str, Any] = {}

    @role("appender")
    def put(self, book: Any) -> None:
        self._books[book.name] = book

    @role("remover")
    def take(self, book: Any) -> None:
        del self._books[book.name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._books.values())


CLASSES: Final[list[Any]] = [
    set,
    attribute_keyed_dict("name"),
    Visible,
    Slotted,
    Telling,
    Counting,
    Keyed,
    Ordered,
    Own,
]


def model(kind: Any) -> tuple[type[DeclarativeBase], Any, Any]:
    class Base(DeclarativeBase):
        pass

    class Book(Base):
        __tablename__ = "collection_books"
        id: Mapped[int] = mapped_column(primary_key=True)
        shelf_id: Mapped[int | None] = mapped_column(sa.ForeignKey("collection_shelves.id"))
        name: Mapped[str] = mapped_column(sa.String(20))

    class Shelf(Base):
        __tablename__ = "collection_shelves"
        id: Mapped[int] = mapped_column(primary_key=True)
        taken: Mapped[int] = mapped_column(default=0)
        books = relationship(Book, collection_class=kind, order_by=Book.id, cascade="all, delete-orphan")

    return Base, Shelf, Book


IDS: Final = {name: number for number, name in enumerate(("b", "ha", "c", "d", "y", "z"), 10)}


def told_by(books: Any) -> Any:
    """Whether it has nothing beside its members but what those that are in it have told; the database has not that."""
    told = getattr(books, "told", None)
    return told <= len(books) if isinstance(told, int) else set(told or ()) <= {"b", "ha", "c", "d"}


def answers(bed: Bed, entity: Any, *operations: Callable[[Any], Any]) -> list[Any]:
    with Processor(open_resource=bed.store(entity), min_duration=0.05, max_duration=30) as processor:
        callers = [gevent.spawn(answer_of, processor.run, 1, operation) for operation in operations]
        return [caller.get() for caller in callers]


@pytest.fixture(params=[EVERYWHERE[0], EVERYWHERE[1]])
def where(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: getattr(kind, "__name__", ""))
def test_a_collection_of_ones_own_class_is_as_if_who_raised_had_not_been(where: Any, tmp_path: Path, kind: Any) -> None:
    base, shelves, book = model(kind)

    def put(name: str) -> Callable[[Any], Any]:
        def operation(shelf: Any) -> Any:
            adapter: Any = collection_adapter(shelf.books)
            adapter.append_with_event(book(id=IDS[name], name=name))
            if isinstance(shelf.books, OrderedDict):
                shelf.books.move_to_end("a", last=name == "b")
            if isinstance(shelf.books, (Slotted, Telling, Counting)):
                books: Any = shelf.books
                told = getattr(books, "told", [])
                books.told = told + 1 if isinstance(told, int) else [*told, name]
            shelf.taken += 1
            names = [one.name for one in adapter]
            is_in_order = isinstance(shelf.books, (list, Own))
            size = len(getattr(shelf.books, "_books", shelf.books))
            return names if is_in_order else sorted(names), told_by(shelf.books), size

        return operation

    def refuse(shelf: Any) -> None:
        adapter: Any = collection_adapter(shelf.books)
        put("z")(shelf)
        if isinstance(shelf.books, Telling):
            shelf.books.told.append("raised")
        for one in list(adapter)[:2]:
            adapter.remove_with_event(one)
        raise Refused

    def refuse_to_replace(shelf: Any) -> None:
        shelf.books = type(shelf.books)() if isinstance(shelf.books, (list, set)) else shelf.books
        put("y")(shelf)
        raise Refused

    accepted = [put(name) for name in ("b", "ha", "c", "d")]
    others = [refuse, accepted[0], refuse, refuse_to_replace, accepted[1], refuse, refuse, accepted[2], refuse]
    found: list[Any] = []
    with opened(where, base, tmp_path) as bed:
        for operations in ([*others, accepted[3]], accepted):
            bed.clear()
            bed.add(shelves(id=1), book(id=1, shelf_id=1, name="a"), book(id=2, shelf_id=1, name="h"))
            told = answers(bed, shelves, *operations)
            with bed.other.begin() as connection:
                rows = connection.execute(sa.select(book.__table__).order_by(sa.text("id"))).all()
            kept = [one for one in told if not isinstance(one, Refused)]
            found.append([kept, list(map(tuple, rows)), len(told) - len(kept)])
    assert found[0][:2] == found[1][:2]
    assert [one[2] for one in found] == [6, 0]
    assert all(is_told for _, is_told, _ in found[0][0])


def slotted() -> tuple[type[DeclarativeBase], Any]:
    class Base(DeclarativeBase):
        pass

    class Noted:
        __slots__ = ("__own", "events", "note")

        events: list[str]

        def see(self) -> str:
            try:
                self.__own: int = self.__own + 1
            except AttributeError:
                self.__own = 1
            return f"{self.__own} {getattr(self, 'note', None)} {self.events}"

    class Shelf(Noted, Base):
        __tablename__ = "slotted_shelves"
        __slots__ = ()
        id: Mapped[int] = mapped_column(primary_key=True)
        taken: Mapped[int] = mapped_column(default=0)

        @reconstructor
        def begin(self) -> None:
            self.events: list[str] = []

    return Base, Shelf


def test_what_an_instance_has_in_slots_is_as_if_who_raised_had_not_been(where: Any, tmp_path: Path) -> None:
    base, shelves = slotted()

    def take(shelf: Any) -> Any:
        shelf.taken += 1
        seen = shelf.see()
        shelf.events.append(shelf.taken)
        if shelf.taken == 2:
            shelf.note = "noted"
        if shelf.taken == 4:
            del shelf.note
        return seen

    def refuse(shelf: Any) -> None:
        take(shelf)
        shelf.events.append("raised")
        shelf.note = "raised"
        raise Refused

    def write(shelf: Any) -> None:
        refuse_after_flush = sa.inspect(shelf).session
        shelf.taken += 1
        refuse_after_flush.flush()
        refuse(shelf)

    found: list[Any] = []
    with opened(where, base, tmp_path) as bed:
        writes = [write] if bed.server != "sqlite" else [refuse]
        for operations in (
            [refuse, take, refuse, refuse, take, refuse, take, take, refuse, take],
            [refuse, take, take, *writes, take, take, *writes, refuse, take],
            [take] * 5,
        ):
            bed.clear()
            bed.add(shelves(id=1, taken=0))
            told = answers(bed, shelves, *operations)
            found.append([one for one in told if not isinstance(one, Refused)])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5

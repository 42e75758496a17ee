"""What an operation returns of a mapped class: its collections are copied, what cannot be is told of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.ext.orderinglist import ordering_list
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    WriteOnlyMapped,
    attribute_keyed_dict,
    mapped_column,
    relationship,
)

from tests.support.mapped import EVERYWHERE, opening

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.mapped import Bed


class Base(DeclarativeBase):
    pass


class Counted(list[Any]):
    """Of the user's own."""

    def count_of_wagons(self) -> int:
        return len(self)


class Train(Base):
    __tablename__ = "trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    wagons: Mapped[list[Wagon]] = relationship(order_by="Wagon.id")
    ordered: Mapped[list[Wagon]] = relationship(
        order_by="Wagon.place", collection_class=ordering_list("place"), overlaps="wagons"
    )
    unordered: Mapped[set[Wagon]] = relationship(overlaps="wagons,ordered")
    named: Mapped[dict[str, Wagon]] = relationship(
        collection_class=attribute_keyed_dict("name"), overlaps="wagons,ordered,unordered"
    )
    counted: Mapped[list[Wagon]] = relationship(collection_class=Counted, overlaps="wagons,ordered,unordered,named")
    asked: DynamicMapped[Wagon] = relationship(overlaps="wagons,ordered,unordered,named,counted")
    written: WriteOnlyMapped[Wagon] = relationship(overlaps="wagons,ordered,unordered,named,counted,asked")
    names: AssociationProxy[list[str]] = association_proxy("wagons", "name", creator=lambda name: Wagon(name=name))
    set_of_names: AssociationProxy[set[str]] = association_proxy(
        "unordered", "name", creator=lambda name: Wagon(name=name)
    )
    ids_by_name: AssociationProxy[dict[str, int]] = association_proxy(
        "named", "place", creator=lambda name, place: Wagon(name=name, place=place)
    )


class Wagon(Base):
    __tablename__ = "wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("trains.id"))
    name: Mapped[str] = mapped_column(sa.String(20))
    place: Mapped[int] = mapped_column(default=0)


opened_bed = opening(Base, EVERYWHERE[:2])


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1))
    return bed


def add_to(collection: Any, name: str) -> None:
    if isinstance(collection, dict):
        collection[name] = Wagon(name=name)
    elif hasattr(collection, "append"):
        collection.append(Wagon(name=name))
    else:
        collection.add(Wagon(name=name))


@pytest.mark.parametrize(
    ("attribute", "kind"), [("wagons", list), ("ordered", list), ("unordered", set), ("named", dict)]
)
def test_a_collection_of_a_relationship_is_answered_as_it_was(
    bed: Bed, caplog: pytest.LogCaptureFixture, attribute: str, kind: type
) -> None:
    def adding(name: str) -> Callable[[Train], Any]:
        def add(train: Train) -> Any:
            add_to(getattr(train, attribute), name)
            return getattr(train, attribute)

        return add

    answers = bed.together(Train, 1, *map(adding, "abc"))
    assert [type(one) for one in answers] == [kind] * 3
    assert [len(one) for one in answers] == [1, 2, 3]
    told = [one.getMessage() for one in caplog.records if "the batch's own" in one.getMessage()]
    assert len(told) == 1  # of the rows in it, which are not copied
    assert "returned its Wagon" in told[0]


def test_a_collection_of_a_class_of_ones_own_is_answered_as_it_is_and_told_of(
    bed: Bed, caplog: pytest.LogCaptureFixture
) -> None:
    answer, *_ = bed.together(Train, 1, lambda train: train.counted)
    assert answer.count_of_wagons() == 0
    assert "returned its Counted, which is the batch's own" in caplog.text


def test_what_has_any_attribute_is_no_collection(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    class Open:
        def __getattr__(self, name: str) -> str:
            return name

    one = Open()
    assert bed.together(Train, 1, lambda _: one) == [one]
    assert "the batch's own" not in caplog.text


def test_one_in_another_container_is_copied_too_and_once_where_it_is_twice(bed: Bed) -> None:
    def add(train: Train) -> Any:
        train.wagons.append(Wagon(name="a"))
        return {"first": train.wagons, "second": (1, train.wagons)}

    first, second = bed.together(Train, 1, add, add)
    assert [len(one["first"]) for one in (first, second)] == [1, 2]
    assert first["second"][1] is first["first"]


def test_what_an_association_proxy_shows_is_answered_as_it_was(bed: Bed) -> None:
    def add(train: Train) -> Any:
        train.names.append(f"w{len(train.names)}")
        return train.names

    assert bed.together(Train, 1, add, add) == [["w0"], ["w0", "w1"]]

    def add_to_set(train: Train) -> Any:
        train.set_of_names.add(f"s{len(train.set_of_names)}")
        return train.set_of_names

    assert bed.together(Train, 1, add_to_set, add_to_set) == [{"w0", "w1", "s2"}, {"w0", "w1", "s2", "s3"}]

    def add_to_dict(train: Train) -> Any:
        train.ids_by_name[f"d{len(train.ids_by_name)}"] = 7
        return train.ids_by_name

    answers = bed.together(Train, 1, add_to_dict, add_to_dict)
    assert [len(one) for one in answers] == [5, 6]
    assert answers[0]["d4"] == 7


@pytest.mark.parametrize("attribute", ["asked", "written"])
def test_what_asks_the_database_only_when_it_is_read_is_told_of(
    bed: Bed, caplog: pytest.LogCaptureFixture, attribute: str
) -> None:
    bed.together(Train, 1, lambda train: getattr(train, attribute))
    told = [one.getMessage() for one in caplog.records if "the batch's own" in one.getMessage()]
    assert len(told) == 1
    assert "Return values of it" in told[0]

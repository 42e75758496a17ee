"""What a trigger finds in a row that is deleted over mapped classes: what the operations before have made of it."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from geventbatch import current_batch
from tests.support.mapped import Bed, opening, session_of


class Base(DeclarativeBase):
    pass


class Kept(Base):
    __tablename__ = "triggers_kept"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(20))


class Train(Base):
    __tablename__ = "triggers_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(20), default="")
    wagons: Mapped[list[Wagon]] = relationship(order_by="Wagon.id", cascade="all, delete-orphan")


class Wagon(Base):
    __tablename__ = "triggers_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey("triggers_trains.id"))
    text: Mapped[str] = mapped_column(sa.String(20), default="")


class Plain(Base):
    """With nothing beside it, that a deletion would have to look for."""

    __tablename__ = "triggers_plain"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(sa.String(20), default="")


_ddl: Any = sa.DDL  # which has no types
_KEEP = "INSERT INTO triggers_kept (text) VALUES (OLD.text)"
for _table in ("trains", "wagons", "plain"):
    _name, _of = f"triggers_keep_{_table}", f"AFTER DELETE ON triggers_{_table} FOR EACH ROW"
    for _dialect, _statement in (
        ("sqlite", f"CREATE TRIGGER {_name} {_of} BEGIN {_KEEP}; END"),
        ("mysql", f"CREATE TRIGGER {_name} {_of} {_KEEP}"),
        ("mariadb", f"CREATE TRIGGER {_name} {_of} {_KEEP}"),
        (
            "postgresql",
            f"CREATE FUNCTION {_name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {_KEEP}; RETURN NULL; END $$",
        ),
        ("postgresql", f"CREATE TRIGGER {_name} {_of} EXECUTE FUNCTION {_name}()"),
    ):
        sa.event.listen(Base.metadata, "after_create", _ddl(_statement).execute_if(dialect=_dialect))


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.write(sa.delete(Kept))  # what clearing has kept
    bed.add(Train(id=1, wagons=[Wagon(), Wagon()]), Plain(id=1))
    return bed


def kept(bed: Bed) -> list[str]:
    with Session(bed.other) as session:
        return sorted(session.scalars(sa.select(Kept.text)))


def change(one: Any) -> str:
    one.text += "a"
    return str(one.text)


def change_all(train: Train) -> str:
    for wagon in train.wagons:
        change(wagon)
    return change(train)


def delete_changed(one: Any) -> str:
    """What it changes itself is not written, as alone."""
    one.text = "by itself"
    session_of(one).delete(one)
    return "deleted"


def delete_by_batch(one: Any) -> str:
    one.text = "by itself"
    current_batch().delete()
    return "deleted"


def delete_and_raise(one: Any) -> str:
    session_of(one).delete(one)
    raise LookupError


@pytest.mark.parametrize("delete", [delete_changed, delete_by_batch])
def test_a_trigger_finds_what_those_before_have_changed_in_what_is_deleted(bed: Bed, delete: Any) -> None:
    answers = bed.together(Plain, 1, change, delete_and_raise, change, delete)
    assert [answers[0], *answers[2:]] == ["a", "aa", "deleted"]
    assert isinstance(answers[1], LookupError)
    assert kept(bed) == ["aa"]


def test_it_finds_that_in_what_goes_with_the_resource_too(bed: Bed) -> None:
    def delete(train: Train) -> str:
        session_of(train).delete(train)
        return "deleted"

    assert bed.together(Train, 1, change_all, change_all, delete) == ["a", "aa", "deleted"]
    assert kept(bed) == ["aa", "aa", "aa"]


def test_it_finds_that_in_what_is_deleted_beside_the_resource(bed: Bed) -> None:
    def delete(train: Train) -> int:
        session_of(train).delete(train.wagons[0])
        return len(train.wagons)

    assert bed.together(Train, 1, change_all, delete, change_all) == ["a", 2, "aa"]
    assert kept(bed) == ["a"]


def test_a_deletion_of_what_nobody_has_changed_parts_nothing_before_it(bed: Bed) -> None:
    def delete(train: Train) -> None:
        session_of(train).delete(train.wagons[0])

    assert bed.together(Train, 1, change, change, delete) == ["a", "aa", None]
    assert kept(bed) == [""]
    assert sum("UPDATE triggers_trains" in one for one in bed.updates()) == 1

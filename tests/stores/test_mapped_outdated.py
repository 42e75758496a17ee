"""What an operation reads of rows that it has changed itself is not what operations before it had loaded of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from tests.support.mapped import Bed, opening, session_of

if TYPE_CHECKING:
    from collections.abc import Callable


class Base(DeclarativeBase):
    pass


class Line(Base):
    __tablename__ = "outdated_lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(20))


class Train(Base):
    __tablename__ = "outdated_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    line_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Line.id))
    line: Mapped[Line | None] = relationship()
    wagons: Mapped[list[Wagon]] = relationship(order_by="Wagon.id")


class Wagon(Base):
    __tablename__ = "outdated_wagons"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))
    seats: Mapped[int] = mapped_column(default=10)


class Full(Exception):
    pass


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Line(id=1, name="north"), Line(id=2, name="south"))
    bed.add(Train(id=1, line_id=1, wagons=[Wagon(id=1), Wagon(id=2)]))
    return bed


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def look(train: Train) -> Any:
    return train.line and train.line.name, [(wagon.id, wagon.seats) for wagon in train.wagons]


def add(train: Train) -> Any:
    session_of(train).add(Wagon(id=3, train_id=train.id))
    if len(train.wagons) > 2:  # as many applications ask, behind what they have done
        raise Full
    return len(train.wagons)


def move(train: Train) -> Any:
    train.line_id = 2
    return train.line and train.line.name


def delete(train: Train) -> Any:
    session = session_of(train)
    session.delete(session.get(Wagon, 2))
    if session.autoflush:
        session.flush()
    return look(train)


def executing(statement: sa.Executable, **options: Any) -> Callable[[Train], Any]:
    def execute(train: Train) -> Any:
        session_of(train).execute(statement, execution_options=options)
        return look(train)

    return execute


def alone(bed: Bed, *operations: Callable[[Train], Any]) -> list[Any]:
    found: list[Any] = []
    for operation in operations:
        with Session(bed.other, autoflush=bed.server != "sqlite") as session:
            try:
                found.append(operation(session.get_one(Train, 1)))
                session.commit()
            except Full as full:
                found.append(type(full))
    return found


def told(answers: list[Any]) -> list[Any]:
    return [type(answer) if isinstance(answer, Exception) else answer for answer in answers]


@pytest.mark.parametrize("change", [add, move, delete])
def test_who_reads_what_others_have_loaded_finds_what_it_has_done_itself(
    bed: Bed, change: Callable[[Train], Any]
) -> None:
    operations = (sell, look, change, look, sell)
    answers = bed.together(Train, 1, *operations)
    bed.clear()
    bed.add(Line(id=1, name="north"), Line(id=2, name="south"))
    bed.add(Train(id=1, line_id=1, wagons=[Wagon(id=1), Wagon(id=2)]))
    assert told(answers) == alone(bed, *operations)
    if bed.server != "sqlite":
        assert answers[2] not in (2, "north", answers[1])


@pytest.mark.parametrize("behind", [(), (sell,)])
def test_it_does_so_where_the_batch_goes_step_by_step(bed: Bed, behind: tuple[Any, ...]) -> None:
    def refused(train: Train) -> None:
        train.sold = None  # type: ignore[assignment]

    operations = (refused, sell, refused, look, add, look, *behind)
    answers = told(bed.together(Train, 1, *operations))
    assert [answers[0], answers[2]] == [sa.exc.IntegrityError] * 2
    assert answers[1] == 1
    assert answers[3] == ("north", [(1, 10), (2, 10)])
    if bed.server == "sqlite":
        assert answers[4] == 2
    else:
        assert answers[4:6] == [Full, answers[3]]
    assert answers[6:] == [2] * len(behind)


STATEMENTS: list[tuple[sa.Executable, dict[str, Any]]] = [
    (sa.update(Wagon).values(seats=Wagon.seats + 1), {}),
    (sa.update(Wagon).values(seats=Wagon.seats + 1), {"synchronize_session": False}),
    (sa.text("UPDATE outdated_wagons SET seats = 0"), {}),
    (sa.insert(Wagon).values(id=3, train_id=1, seats=5), {}),
    (sa.delete(Wagon).where(Wagon.id == 2), {"synchronize_session": False}),
    (sa.text("UPDATE outdated_lines SET name = 'changed'"), {}),
]


@pytest.mark.parametrize(("statement", "options"), STATEMENTS)
def test_who_sends_a_statement_of_its_own_reads_what_it_has_made_of_what_others_have_loaded(
    bed: Bed, statement: sa.Executable, options: dict[str, Any]
) -> None:
    if bed.server == "sqlite":  # which does not let operations write
        answers = bed.together(Train, 1, sell, look, executing(statement, **options), look, sell)
        assert told(answers) == [1, answers[1], RuntimeError, answers[1], 2]
        return
    operations = (sell, look, executing(statement, **options), look, sell)
    answers = bed.together(Train, 1, *operations)
    bed.clear()
    bed.add(Line(id=1, name="north"), Line(id=2, name="south"))
    bed.add(Train(id=1, line_id=1, wagons=[Wagon(id=1), Wagon(id=2)]))
    assert answers == alone(bed, *operations)
    assert answers[2] != answers[1]


def test_who_does_not_read_it_is_not_applied_again(bed: Bed) -> None:
    times: list[int] = []

    def change(train: Train) -> int:
        times.append(train.id)
        session_of(train).add(Wagon(id=3, train_id=1))
        train.line_id = 2
        return sell(train)

    answers = bed.together(Train, 1, sell, look, change, look, sell)
    assert answers == [1, answers[1], 2, ("south", [(1, 10), (2, 10), (3, 10)]), 3]
    assert times == [1]


def test_who_has_loaded_it_itself_costs_no_load(bed: Bed) -> None:
    def book(train: Train) -> int:
        wagons = len(train.wagons)
        session_of(train).add(Wagon(id=3 + wagons, train_id=train.id))
        return wagons

    assert bed.together(Train, 1, sell, sell, book) == [1, 2, 2]
    loads = [one for one in bed.statements if "FROM outdated_trains" in one and "outdated_trains.sold" in one]
    compares = bed.mode == "version" and bed.server != "postgresql"  # the row, when it is saved
    assert len(loads) == 1 + compares


def test_who_puts_something_where_those_before_have_found_nothing_finds_it(bed: Bed) -> None:
    bed.add(Train(id=2))

    def assign(train: Train) -> Any:
        train.line_id = 1
        return look(train)

    def add(train: Train) -> Any:
        session_of(train).add(Wagon(id=9, train_id=2))
        return look(train)

    found, assigned, last = bed.together(Train, 2, look, assign, look)
    assert (found, assigned, last) == ((None, []), ("north", []), ("north", []))
    found, added, last = bed.together(Train, 2, look, add, look)
    assert found == ("north", [])
    assert last == ("north", [(9, 10)])
    if bed.server != "sqlite":  # where an operation's queries do not find what it has changed itself
        assert added == last

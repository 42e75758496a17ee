"""What a column's type raises of a value that it does not take is told as SQLAlchemy tells it alone."""

from __future__ import annotations

from typing import Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session

from geventbatch import BatchError, Processor, current_batch
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.callers import answer_of
from tests.support.mapped import Bed, opening


class Base(DeclarativeBase):
    pass


class Even(sa.TypeDecorator[int]):
    """Takes even numbers."""

    impl = sa.Integer
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: object) -> Any:
        if value is not None and value % 2:
            raise LookupError(f"{value} is odd")
        return value


class Train(Base):
    __tablename__ = "refusals_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    pairs: Mapped[int] = mapped_column(Even, default=0)
    seats: Mapped[Any] = mapped_column(sa.JSON, default=dict)


OUTCOMES = idempotency_table("refusals_outcomes", Base.metadata)


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(Train(id=1))
    return bed


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def assign_odd(train: Train) -> None:
    train.pairs = 1


def assign_set(train: Train) -> None:
    train.seats = {"a": {1, 2}}


def add_odd(_: Train) -> None:
    current_batch().add_row((Train, {"id": 2, "pairs": 3}))


def assign_odd_and_add_what_is_there(train: Train) -> None:
    train.pairs = 1
    current_batch().add_row((Train, {"id": 1}))


def test_an_operation_that_has_made_two_wrong_values_is_told_of_one_of_them(bed: Bed) -> None:
    before, error, behind = bed.together(Train, 1, sell, assign_odd_and_add_what_is_there, sell)
    assert (before, behind) == (1, 2)
    assert isinstance(error, StatementError)
    assert bed.read(sa.select(Train.sold)) == 2


def told_alone(bed: Bed, operation: Any) -> BaseException:
    with Session(bed.other) as session:
        operation(session.get_one(Train, 1))
        with pytest.raises((StatementError, TypeError)) as found:
            session.commit()
    return found.value


@pytest.mark.parametrize("operation", [assign_odd, assign_set])
def test_what_a_type_does_not_take_is_told_as_alone(bed: Bed, operation: Any) -> None:
    alone = told_alone(bed, operation)
    answers = bed.together(Train, 1, sell, operation, sell)
    assert answers[::2] == [1, 2]
    assert type(answers[1]) is type(alone)
    assert type(getattr(answers[1], "orig", None)) is type(getattr(alone, "orig", None))
    assert isinstance(alone, StatementError) or operation is assign_set  # psycopg encodes JSON itself
    assert bed.read(sa.select(Train.sold)) == 2


def test_so_it_is_of_a_row_that_was_added(bed: Bed) -> None:
    answers = bed.together(Train, 1, sell, add_odd, sell)
    assert answers[::2] == [1, 2]
    assert type(answers[1]) is StatementError
    assert isinstance(answers[1].orig, LookupError)


# -- errors that are nobody else's ------------------------------------------------------------------------------

HUGE = 10**5000
"""Python does not write so long a number out, and so no error that has it among its parameters can say what it is."""


def sell_more_than_can_be_said(train: Train) -> None:
    train.sold = HUGE


def look(train: Train) -> int:
    found: Any = object_session(train)
    return int(found.scalar(sa.select(sa.func.count()).select_from(Train)))


@pytest.mark.parametrize("keyed", [False, True], ids=["", "keyed"])
def test_an_error_that_cannot_say_what_it_is_is_that_of_its_own_operation(bed: Bed, keyed: bool) -> None:
    operations = (sell, sell_more_than_can_be_said, look, sell, sell_more_than_can_be_said, look, sell)
    answers = together_keyed(bed, *operations) if keyed else bed.together(Train, 1, *operations)
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert [answer for answer in answers if answer not in refused] == [1, 1, 2, 1, 3]
    assert len(refused) == 2
    assert not any(isinstance(answer, BatchError) for answer in refused)
    assert bed.read(sa.select(Train.sold)) == 3


def sell_text(train: Train) -> None:
    train.sold = "x"  # type: ignore[assignment]  # a wrong one


def sell_nothing(train: Train) -> None:
    train.sold = None  # type: ignore[assignment]  # likewise


def raise_behind_a_change(train: Train) -> None:
    train.sold += 1000
    raise LookupError(train.sold)


@pytest.mark.parametrize("wrong", [sell_text, sell_nothing])
def test_a_wrong_value_under_an_idempotency_key_is_the_error_of_its_own_operation(bed: Bed, wrong: Any) -> None:
    if wrong is sell_text and bed.server == "sqlite":
        wrong = assign_odd  # SQLite takes any text
    operations = (sell, wrong, raise_behind_a_change, sell, wrong, sell, raise_behind_a_change, wrong, sell)
    answers = together_keyed(bed, *operations)
    assert [answer for answer in answers if isinstance(answer, int)] == [1, 2, 3, 4]
    assert [str(answer) for answer in answers if isinstance(answer, LookupError)] == ["1001", "1003"]
    assert not any(isinstance(answer, BatchError) for answer in answers)
    assert bed.read(sa.select(Train.sold)) == 4


def together_keyed(bed: Bed, *operations: Any) -> list[Any]:
    """As `Bed.together`, each under an idempotency key of its own."""
    store = bed.store(Train, idempotency=OUTCOMES)
    with Processor(open_resource=store, min_duration=0, max_duration=10, recorded_errors=()) as processor:
        callers = [
            gevent.spawn(answer_of, processor.run, 1, operation, idempotency_key=str(number))
            for number, operation in enumerate(operations)
        ]
        return [caller.get() for caller in callers]

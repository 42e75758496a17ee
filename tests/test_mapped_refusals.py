"""What a column's type raises of a value that it does not take is told as SQLAlchemy tells it alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import StatementError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from geventbatch import current_batch
from tests.mapped import EVERYWHERE, Bed, opened

if TYPE_CHECKING:
    from collections.abc import Iterator


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


@pytest.fixture(scope="module", params=EVERYWHERE)
def opened_bed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with opened(request.param, Base, tmp_path_factory.mktemp("bed")) as bed:
        yield bed


@pytest.fixture
def bed(opened_bed: Bed) -> Bed:
    opened_bed.clear()
    opened_bed.add(Train(id=1))
    return opened_bed


def sell(train: Train) -> int:
    train.sold += 1
    return train.sold


def assign_odd(train: Train) -> None:
    train.pairs = 1


def assign_set(train: Train) -> None:
    train.seats = {"a": {1, 2}}


def add_odd(_: Train) -> None:
    current_batch().add_row((Train, {"id": 2, "pairs": 3}))


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

"""A store of several classes of which two have the same rows: a key of each names one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import LoadFailed
from tests.support.mapped import opening
from tests.support.mapped_many import bulk, together

if TYPE_CHECKING:
    from tests.support.mapped import Bed


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "same_accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(sa.String(9), default="plain")
    balance: Mapped[int] = mapped_column(default=100)
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "plain"}  # noqa: RUF012 - SQLAlchemy's form


class Savings(Account):
    __mapper_args__ = {"polymorphic_identity": "savings"}  # noqa: RUF012


class Row(Base):
    """The same table, as something else sees it."""

    __table__ = Account.__table__


class Parent(Base):
    __tablename__ = "same_parents"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=100)


class Left(Parent):
    __tablename__ = "same_left"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=100)
    __mapper_args__ = {"concrete": True}  # noqa: RUF012


class Right(Parent):
    __tablename__ = "same_right"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=100)
    __mapper_args__ = {"concrete": True}  # noqa: RUF012


opened_bed = opening(Base)


@pytest.fixture
def bed(bed: Bed) -> Bed:
    bed.add(*[Savings(id=number) for number in range(1, 4)])
    return bed


def deposit(account: Any) -> int:
    account.balance += 1
    return int(account.balance)


def deposit_all(accounts: tuple[Any, ...]) -> list[int]:
    return [deposit(account) for account in accounts]


def balance(bed: Bed) -> int:
    return int(bed.read(sa.select(Account.balance).where(Account.id == 1)))


CLASSES = {"account": Account, "savings": Savings, "row": Row, "again": Savings}
OTHERS = pytest.mark.parametrize("other", ["savings", "row", "again"])


@OTHERS
def test_single_keys_of_two_classes_that_name_one_row_lose_no_change(bed: Bed, other: str) -> None:
    with bulk(bed, CLASSES) as processor:
        answers = together(processor, (("account", 1), deposit), ((other, 1), deposit), ((other, 2), deposit))
    assert sorted(answers) == [101, 101, 102]
    assert balance(bed) == 102


@OTHERS
def test_operations_across_keys_of_two_classes_that_name_one_row_lose_no_change(bed: Bed, other: str) -> None:
    with bulk(bed, CLASSES) as processor:
        answers = together(
            processor, ([("account", 1), ("account", 2)], deposit_all), ([(other, 1), (other, 3)], deposit_all)
        )
    assert sorted(answers) == [[101, 101], [102, 101]]
    assert balance(bed) == 102


@OTHERS
def test_an_operation_that_names_one_row_by_two_classes_is_told_so(bed: Bed, other: str) -> None:
    with bulk(bed, CLASSES) as processor:
        (told,) = together(processor, ([("account", 1), (other, 1)], deposit_all))
    assert isinstance(told, LoadFailed)
    assert "names the same row as" in str(told)
    assert "always name it by one of the classes" in str(told)
    assert balance(bed) == 100


def test_concrete_classes_have_rows_of_their_own(bed: Bed) -> None:
    bed.add(Left(id=1), Right(id=1))
    with bulk(bed, {"left": Left, "right": Right}) as processor:
        assert together(processor, ([("left", 1), ("right", 1)], deposit_all)) == [[101, 101]]
        assert together(processor, (("left", 1), deposit), (("right", 1), deposit)) == [102, 102]

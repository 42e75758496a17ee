"""Mapped classes at many keys: models of accounts and seats, processors of bulks, and operations of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from geventbatch import Processor
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.mapped import Bed


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "many_accounts"
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(sa.CheckConstraint("balance >= 0"))
    note: Mapped[str | None] = mapped_column(sa.String(40), unique=True)


class Counted(Base):
    __tablename__ = "many_counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]
    version: Mapped[int] = mapped_column(default=1)
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012 - SQLAlchemy's form


class Train(Base):
    __tablename__ = "many_trains"
    name: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)
    seats: Mapped[list[Seat]] = relationship(back_populates="train")


class Seat(Base):
    __tablename__ = "many_seats"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_name: Mapped[str] = mapped_column(sa.ForeignKey("many_trains.name"))
    taken_by: Mapped[str | None] = mapped_column(sa.String(20))
    train: Mapped[Train] = relationship(back_populates="seats", lazy="joined")


class Line(Base):
    __tablename__ = "many_lines"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    text: Mapped[str] = mapped_column(sa.String(40))


def bulk(bed: Bed, entity: Any = Account, **options: Any) -> Processor[Any]:
    """A processor that runs all that comes together as one bulk."""
    store = bed.store(entity, **options)
    return Processor(open_resources=store.open_resources, min_duration=0, max_duration=10, workers=1, max_batches=1)


def together(processor: Processor[Any], *runs: tuple[Any, ...]) -> list[Any]:
    """What the callers of these operations are told: each is a key, or a list of keys, with an operation of it."""
    callers = [
        gevent.spawn(answer_of, processor.run_across if isinstance(keys, list) else processor.run, keys, *run)
        for keys, *run in runs
    ]
    return [caller.get() for caller in callers]


def balances(bed: Bed) -> dict[int, int]:
    with bed.other.connect() as connection:
        rows = connection.execute(sa.select(Account.id, Account.balance))
        return {number: left for number, left in rows if left != 100}


def deposit(account: Account, amount: int) -> int:
    account.balance += amount
    return account.balance


def transfer(accounts: tuple[Account, ...], amount: int) -> int:
    source, target = accounts
    source.balance -= amount
    target.balance += amount
    if source.balance < 0:
        raise ValueError("too little")
    return source.balance


def overdraw(accounts: tuple[Account, ...], amount: int) -> None:
    """Leave to the database what is refused."""
    accounts[0].balance -= amount
    accounts[1].balance += amount


def deposit_all(accounts: tuple[Account, ...], amount: int) -> None:
    for account in accounts:
        account.balance += amount


class Meanwhile:
    """An operation in which somebody else writes, the first time."""

    def __init__(self, writes: Callable[[], object], then: Callable[..., Any]) -> None:
        self._writes: Callable[[], object] | None = writes
        self._then = then
        self.count = 0

    def __call__(self, resource: Any, *args: Any) -> Any:
        self.count += 1
        writes, self._writes = self._writes, None
        if writes is not None:
            writes()
        return self._then(resource, *args)

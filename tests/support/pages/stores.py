"""For docs/stores.md."""

from contextvars import ContextVar
from typing import Any

import redis
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from geventbatch import Processor, current_batch
from tests.support.pages.trains import DJANGO_TRAIN as REPLACED
from tests.support.pages.trains import Train, TrainModel, engine

client = redis.Redis()

current_tenant: ContextVar[str] = ContextVar("current_tenant")
SCHEMAS = {"north": "north", "south": "south"}


class _Base(DeclarativeBase):
    pass


class Seat(_Base):
    """The seat of the page."""

    __tablename__ = "page_seats"
    id: Mapped[int] = mapped_column(primary_key=True)
    price: Mapped[int]
    passenger: Mapped[str | None]


class Wallet(_Base):
    """The wallet of the page."""

    __tablename__ = "page_wallets"
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(unique=True)
    balance: Mapped[int]

    def pay(self, price: int) -> None:
        if price > self.balance:
            raise ValueError(price)
        self.balance -= price

    def put(self, amount: int) -> int:
        self.balance += amount
        return self.balance


_Base.metadata.create_all(engine)
with Session(engine) as _session:
    _session.add_all([Seat(id=12, price=30), Wallet(owner="Ann", balance=50)])
    _session.commit()


def check(page: dict[str, Any]) -> None:
    """One operation has changed a seat and a wallet."""
    with page["bookings"]:
        assert page["left"] == 30
    with Session(engine) as session:
        assert session.get_one(Seat, 12).passenger == "Ann"

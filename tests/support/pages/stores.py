"""For docs/stores.md."""

import sqlite3
import tempfile
from contextlib import closing
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import redis
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from geventbatch import Processor, current_batch
from tests.support.pages.trains import DJANGO_TRAIN as REPLACED
from tests.support.pages.trains import Train, TrainModel, engine

client = redis.Redis()

current_tenant: ContextVar[str] = ContextVar("current_tenant")
SCHEMAS = {"north": "north", "south": "south"}

_directory = tempfile.TemporaryDirectory()
path = Path(_directory.name) / "accounts.sqlite"
with closing(sqlite3.connect(path)) as _made:
    _made.execute("CREATE TABLE account (name TEXT PRIMARY KEY, balance INTEGER CHECK (balance >= 0))")
    _made.execute("INSERT INTO account VALUES ('a', 10)")
    _made.commit()


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
    """The store that is written there: what breaks a rule fails alone, as the database's own error."""

    def add(account: dict[str, int], amount: int) -> int:
        account["balance"] += amount
        return account["balance"]

    with page["bookings"]:
        assert page["left"] == 30
    with Session(engine) as session:
        assert session.get_one(Seat, 12).passenger == "Ann"
    with page["accounts"] as accounts:
        assert accounts.run("a", add, 5) == 15
        with pytest.raises(sqlite3.IntegrityError):
            accounts.run("a", add, -20)
        assert accounts.run("a", add, 0) == 15
    _directory.cleanup()

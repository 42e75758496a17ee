"""Read by mypy and pyright, never run: the stores and integrations tell a processor what its resource is."""

from typing import Any, assert_type

import redis
import sqlalchemy as sa
from django.db import models
from flask import Flask
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from geventbatch import Processor, current_batch, stop_all
from geventbatch.integrations.flask import GeventBatch
from geventbatch.stores import DjangoStore, RedisStore, SQLAlchemyStore, SQLStore


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "trains"

    name: Mapped[str] = mapped_column(primary_key=True)
    seats: Mapped[int]

    def book(self, seat: int) -> bool:
        current_batch().add_row(("booked", seat))
        return seat < self.seats


class Account(models.Model):  # noqa: DJ008 - nobody shows it
    def deposit(self, amount: int) -> int:
        return amount


def load(state: str) -> Train:
    return Train(name=state)


def text(train: Train) -> str:
    return train.name


engine = sa.create_engine("sqlite://")

mapped = Processor(open_resource=SQLAlchemyStore.mapped(engine, Train, by="name"))
assert_type(mapped, Processor[Train])
assert_type(mapped.run("k", Train.book, 12), bool)
mapped.run("k", Train.book, "twelve")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

documents = Processor(open_resource=SQLAlchemyStore.documents(engine, "trains", encode=text, decode=load))
assert_type(documents, Processor[Train])

accounts = Processor(open_resource=DjangoStore(Account))
assert_type(accounts, Processor[Account])
assert_type(accounts.run(42, Account.deposit, 5), int)

DjangoStore(Train)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]

cached = Processor(open_resource=RedisStore(redis.Redis(), decode=lambda state: [len(state)]))
assert_type(cached.run("k", len), int)

batches = GeventBatch(Flask(__name__))
trains = batches.processor(open_resource=SQLAlchemyStore.mapped(engine, Train))
assert_type(trains.run("k", Train.book, 12), bool)

assert_type(stop_all(5), bool)
assert_type(current_batch().alone, bool)
assert_type(current_batch().rows, list[object])


LOAD = "SELECT name, seats FROM trains WHERE name = %(key)s FOR UPDATE"
SAVE = "UPDATE trains SET seats = %(seats)s WHERE name = %(key)s"

rows = Processor(open_resource=SQLStore(print, load=LOAD, save=SAVE, key=str, row=Train))
assert_type(rows, Processor[Train])
assert_type(rows.run("k", Train.book, 12), bool)
rows.run("k", Train.book, "twelve")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(Processor(open_resource=SQLStore(print, load=LOAD, save=SAVE, row=dict)), Processor[dict[str, Any]])
assert_type(Processor(open_resource=SQLStore(print, load=LOAD, save=SAVE)), Processor[Any])
SQLStore(print, load=LOAD, save=SAVE, mode="x")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]

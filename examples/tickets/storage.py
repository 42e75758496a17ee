"""Where the trains are kept: a document each, in a table of SQLite or PostgreSQL, or in Redis (`redis_storage`).

Two workers may have a batch of the same train at the same time. On PostgreSQL the second one waits for the first one's
row lock. SQLite has no such lock: whoever saves second finds that the version is another one than it has loaded, and
its batch loads again and replays. So it is with Redis.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import sqlalchemy as sa

from examples.tickets.domain import Train, UnknownTrain
from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table

if TYPE_CHECKING:
    from examples.tickets.redis_storage import RedisTrains
    from geventbatch.stores import RedisStore

# Batches that may run at once, each with a connection of its own: PostgreSQL starts out with 100 connections for all
# workers together.
CONNECTIONS = 20


@dataclass(frozen=True)
class SeatMap:
    """A train as it is saved, and how many saves it took."""

    train: Train
    saves: int


class Store:
    """The trains in one database."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(sa.make_url(url))
        self.open_train = self._trains()

    def seat_map(self, name: str) -> SeatMap:
        """The train as it was last saved, without waiting for any batch."""
        trains = self.open_train.table.c
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(trains.state, trains.version).where(trains.key == name)).one_or_none()
        if row is None:
            raise UnknownTrain(f"there is no train {name}")
        # The first version was saved to have the train there.
        return SeatMap(decode(row.state), saves=row.version - 1)

    def names(self) -> list[str]:
        """All trains, in the order of the alphabet."""
        key = self.open_train.table.c.key
        with self._engine.connect() as connection:
            return list(connection.scalars(sa.select(key).order_by(key)))

    def create(self, trains: Mapping[str, int]) -> None:
        """Add the tables and the trains (names and numbers of seats) that are not there yet.

        Workers that start together meet here. Whoever is second finds everything in place.
        """
        self.open_train.create_table()
        add(trains, self._trains(missing=lambda name: Train.empty(name, trains[name])))

    def close(self) -> None:
        """Close the connections that no batch is using."""
        self._engine.dispose()

    def _trains(self, missing: Literal["raise"] | Callable[[str], Train] = "raise") -> SQLAlchemyStore[Train]:
        return SQLAlchemyStore.documents(
            self._engine,
            "seat_maps",
            encode=encode,
            decode=decode,
            missing=missing,
            idempotency=idempotency_table("outcomes"),
        )


AnyStore: TypeAlias = "Store | RedisTrains"


def open_store(url: str) -> AnyStore:
    """The trains at ``redis://…``, or in the SQL database of any other URL."""
    if not url.startswith("redis"):
        return Store(url)
    # Only here: who keeps no trains in Redis need not have its driver.
    from examples.tickets.redis_storage import RedisTrains

    return RedisTrains(url)


def add(trains: Iterable[str], adding: "SQLAlchemyStore[Train] | RedisStore[Train]") -> None:
    """Open each train once, where *adding* makes the missing ones."""
    with Processor(open_resource=adding, batching=False, max_duration=60) as processor:
        for name in trains:
            processor.run(name, lambda _: None)


def encode(train: Train) -> str:
    """A train as it is saved."""
    return json.dumps(vars(train))


def decode(state: str | bytes) -> Train:
    """The train that was saved so."""
    return Train(**json.loads(state))


def _engine(url: sa.URL) -> sa.Engine:
    if url.drivername in ("postgres", "postgresql"):
        # The driver has to be named: psycopg 3 works with gevent, SQLAlchemy's default for these does not.
        url = url.set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, pool_size=CONNECTIONS, max_overflow=0)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _use_wal)
    return engine


def _use_wal(connection: sqlite3.Connection, _: object) -> None:
    """With a write-ahead log, readers wait for nobody."""
    connection.execute("PRAGMA journal_mode = WAL")

"""Where the trains are kept: one row each, with a JSON document and a version, through SQLAlchemy.

`Store.open_train` is what a `geventbatch.Processor` takes as its `open_resource`: entering loads, leaving saves, and
leaving with an exception rolls back. The same lines serve SQLite and PostgreSQL.

Two workers may have a batch of the same train at the same time. The version tells them: whoever saves second finds
another one than it has loaded, and its batch loads again and replays. PostgreSQL spares them the work: its row lock
lets the second one load only when the first has saved. SQLite has no such lock and ignores the clause.
"""

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from examples.tickets.domain import Train, UnknownTrain
from geventbatch import Conflict, NotSaved, current_batch

# Batches that may run at once, each with a connection of its own: PostgreSQL starts out with 100 connections for all
# workers together.
CONNECTIONS = 20

TRAINS = sa.Table(
    "trains",
    sa.MetaData(),
    sa.Column("name", sa.String(80), primary_key=True),
    # Counts the saves, since each save adds one.
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("document", sa.JSON, nullable=False),
)

LOAD = sa.select(TRAINS.c.version, TRAINS.c.document).where(TRAINS.c.name == sa.bindparam("train"))
LOCK_AND_LOAD = LOAD.with_for_update()
SAVE = (
    sa.update(TRAINS)
    .where(TRAINS.c.name == sa.bindparam("train"), TRAINS.c.version == sa.bindparam("loaded"))
    .values(version=TRAINS.c.version + 1, document=sa.bindparam("changed"))
)
# In this shape because both databases understand it, and SQLAlchemy has no construct for the two of them.
ADD = sa.text("INSERT INTO trains (name, version, document) VALUES (:train, 0, :document) ON CONFLICT DO NOTHING")
BOUND = sa.text("SELECT set_config('statement_timeout', :milliseconds, true)")


@dataclass(frozen=True)
class SeatMap:
    """A train as it is saved, and how many saves it took."""

    train: Train
    saves: int


class Store:
    """The trains in one database.

    A `gevent.Timeout` may fire wherever a driver waits. So every connection is given back with `with`: SQLAlchemy then
    closes one that was interrupted in the middle of a statement, in place of handing it to the next batch.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(sa.make_url(url))

    @contextmanager
    def open_train(self, name: str) -> Iterator[Train]:
        """Load the train, let a batch change it, save it."""
        with self._engine.connect() as connection:
            self._bound(connection)
            found = _load(connection, LOCK_AND_LOAD, name)
            yield found.train
            _save(connection, found)
            # When this fails, nobody knows whether the rows are there: it goes up as it is, never as a NotSaved.
            connection.commit()

    def seat_map(self, name: str) -> SeatMap:
        """The train as it was last saved, without waiting for any batch."""
        with self._engine.connect() as connection:
            return _load(connection, LOAD, name)

    def names(self) -> list[str]:
        """All trains, in the order of the alphabet."""
        with self._engine.connect() as connection:
            return list(connection.scalars(sa.select(TRAINS.c.name).order_by(TRAINS.c.name)))

    def create(self, trains: Mapping[str, int], *, attempts: int = 20) -> None:
        """Add the table and the trains (names and numbers of seats) that are not there yet.

        Workers that start together meet here, and then a database refuses one of them (SQLite its switch to WAL,
        PostgreSQL its second CREATE TABLE). The loser looks again, and finds everything in place.
        """
        for attempt in range(1, attempts + 1):
            try:
                self._add(trains)
                return
            except DBAPIError:
                if attempt == attempts:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        """Close the connections that no batch is using."""
        self._engine.dispose()

    def _add(self, trains: Mapping[str, int]) -> None:
        with self._engine.begin() as connection:
            TRAINS.create(connection, checkfirst=True)
            for name, seat_count in trains.items():
                document = _document(Train.empty(name, seat_count))
                connection.execute(ADD.bindparams(sa.bindparam("document", type_=sa.JSON)), _added(name, document))

    def _bound(self, connection: sa.Connection) -> None:
        """Let the database give up when the batch does: a statement that nobody waits for would hold its locks."""
        if self._engine.dialect.name == "postgresql":
            milliseconds = int(current_batch().remaining() * 1000)
            connection.execute(BOUND, {"milliseconds": str(max(1, milliseconds))})


def _added(name: str, document: dict[str, Any]) -> dict[str, Any]:
    return {"train": name, "document": document}


def _load(connection: sa.Connection, statement: sa.Select[tuple[int, Any]], name: str) -> SeatMap:
    row = connection.execute(statement, {"train": name}).one_or_none()
    if row is None:
        raise UnknownTrain(f"there is no train {name}")
    return SeatMap(Train(name, row.document["seats"], row.document["changes"]), saves=row.version)


def _save(connection: sa.Connection, loaded: SeatMap) -> None:
    """Write the train, unless somebody else did since it was loaded. Nothing is written before COMMIT."""
    train = loaded.train
    try:
        changed = {"train": train.name, "loaded": loaded.saves, "changed": _document(train)}
        rows = connection.execute(SAVE, changed).rowcount
    except SQLAlchemyError as error:
        raise _not_saved(error) from error
    if rows == 0:
        raise Conflict(f"{train.name} was changed since version {loaded.saves}")


def _not_saved(error: SQLAlchemyError) -> NotSaved:
    """A database that was busy with another writer is worth a replay; any other failure will only happen again."""
    return Conflict(str(error)) if _is_busy(error) else NotSaved(str(error))


def _is_busy(error: SQLAlchemyError) -> bool:
    original = error.orig if isinstance(error, DBAPIError) else None
    if isinstance(original, sqlite3.Error):
        return original.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
    # Serialization failure and deadlock.
    return getattr(original, "sqlstate", None) in ("40001", "40P01")


def _document(train: Train) -> dict[str, Any]:
    return {"seats": train.seats, "changes": train.changes}


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "sqlite":
        return _sqlite_engine(url)
    if url.drivername in ("postgres", "postgresql"):
        # The driver has to be named: psycopg 3 works with gevent, SQLAlchemy's default for these does not.
        url = url.set(drivername="postgresql+psycopg")
    return sa.create_engine(url, pool_size=CONNECTIONS, max_overflow=0, pool_pre_ping=True)


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    """A file. The driver blocks the whole process, so nothing here lasts long.

    Python's driver begins a transaction with the UPDATE and not with the SELECT. The write lock is thus held from
    UPDATE to COMMIT, where no greenlet switches: a batch never waits for another one of its own process. For one of
    another process it waits up to the `timeout` below, and replays then.
    """
    engine = sa.create_engine(url, pool_size=CONNECTIONS, max_overflow=0, connect_args={"timeout": 0.5})

    @sa.event.listens_for(engine, "connect")
    def use_wal(connection: sqlite3.Connection, _: object) -> None:
        # With a write-ahead log, readers wait for nobody.
        connection.execute("PRAGMA journal_mode = WAL")

    return engine

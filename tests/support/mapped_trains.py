"""Mapped classes for the tests of what operations do in the session of their batch, on SQLite and on servers."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, relationship

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "mapped_trains"
    __table_args__ = (sa.CheckConstraint("taken >= 0", name="not_negative"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(sa.String(80), unique=True)
    taken: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=1)
    note: Mapped[str | None] = mapped_column(sa.Text)
    seats: Mapped[dict[str, Any]] = mapped_column(sa.JSON, default=dict)
    bookings: Mapped[list[Booking]] = relationship(
        back_populates="train", cascade="all, delete-orphan", order_by="Booking.id"
    )


class Booking(Base):
    __tablename__ = "mapped_bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int | None] = mapped_column(sa.ForeignKey(Train.id))
    text: Mapped[str] = mapped_column(sa.String(80), unique=True)
    train: Mapped[Train | None] = relationship(back_populates="bookings")


class Form(NamedTuple):
    """A store on a server."""

    server: Literal["sqlite", "postgresql", "mariadb"]
    mode: Literal["lock", "version"]
    version: str | None = None
    pipeline: bool = True

    def __str__(self) -> str:
        """For the name of a test."""
        return "-".join([self.server, self.mode, *([self.version] if self.version else []), *self._plain])

    @property
    def _plain(self) -> list[str]:
        return ["plain"] if not self.pipeline else []


SERVERS: Final = [
    pytest.param(form, id=str(form), marks=marks)
    for form, marks in (
        (Form("postgresql", "lock"), ()),
        (Form("postgresql", "version", "version", pipeline=False), ()),
        (Form("postgresql", "lock", pipeline=False), pytest.mark.variants),
        (Form("postgresql", "version"), pytest.mark.variants),
        (Form("mariadb", "lock"), pytest.mark.mariadb),
        (Form("mariadb", "version", "version"), pytest.mark.mariadb),
    )
]
SQLITE: Final = [pytest.param(form, id=str(form)) for form in (Form("sqlite", "version"),)]


class Place:
    """The tables of one test, in which there is the ICE 1."""

    def __init__(self, form: Form, engine: sa.Engine, direct: sa.Engine) -> None:
        self.form = form
        self.engine = engine
        self.direct = direct

    def store(self, bind: Any = None, **options: Any) -> SQLAlchemyStore[Train]:
        _, mode, version, pipeline = self.form
        shown: dict[str, Any] = {"mode": mode, "version": version, "pipeline": pipeline, "by": "name", **options}
        return SQLAlchemyStore.mapped(self.engine if bind is None else bind, Train, **shown)

    def run(self, *runs: tuple[Any, ...], bind: Any = None, **options: Any) -> list[Any]:
        """What the callers of these operations were told, who ran them in one batch."""
        settings: dict[str, Any] = {"min_duration": 0.02, "max_duration": 30}
        kept = {name: options.pop(name) for name in list(options) if name in _OF_PROCESSOR}
        with Processor(open_resource=self.store(bind, **options), **{**settings, **kept}) as opened:
            self.metrics = opened.subscribe_batch_metrics()
            callers = [gevent.spawn(answer_of, opened.run, "ICE 1", *run) for run in runs]
            return [caller.get() for caller in callers]

    def attempts(self) -> list[int]:
        """Of the batches of the last `run`."""
        return [metric.attempts for metric in self.metrics]

    def scalar(self, statement: Any) -> Any:
        with self.direct.begin() as connection:
            return connection.scalar(statement)

    @property
    def taken(self) -> int | None:
        """Of the ICE 1; None when it is gone."""
        return self.scalar(sa.select(Train.taken).where(Train.name == "ICE 1"))  # type: ignore[no-any-return]

    @property
    def texts(self) -> list[str]:
        """Of the bookings."""
        with self.direct.begin() as connection:
            return list(connection.scalars(sa.select(Booking.text).order_by(Booking.id)))

    def book(self, *texts: str) -> None:
        """There are bookings of the ICE 1."""
        with Session(self.direct) as session:
            train = session.scalars(sa.select(Train)).one()
            train.bookings += [Booking(text=text) for text in texts]
            session.commit()


_OF_PROCESSOR: Final = ("clean_errors", "max_duration", "min_duration", "batching", "max_attempts")


@contextmanager
def places(directory: Path) -> Iterator[Callable[[Form], Place]]:
    """One place for each server, emptied for each test."""
    with ExitStack() as stack:
        engines: dict[str, tuple[sa.Engine, sa.Engine]] = {}

        def place(form: Form) -> Place:
            if form.server not in engines:
                found = PLACES[form.server](stack.enter_context(fresh(form.server, directory)))
                engine, direct = found.engine(None, pool_size=2, max_overflow=0), found.beside()
                stack.callback(engine.dispose)
                Base.metadata.create_all(direct)
                engines[form.server] = engine, direct
            engine, direct = engines[form.server]
            with direct.begin() as connection:
                for table in reversed(Base.metadata.sorted_tables):
                    connection.execute(sa.delete(table))
                connection.execute(sa.insert(Train).values(id=1, name="ICE 1", taken=0, version=1, seats={}))
            return Place(form, engine, direct)

        yield place


def session_of(resource: object) -> Session:
    session = object_session(resource)
    assert session is not None
    return session


def take(train: Train, count: int = 1) -> int:
    train.taken += count
    return train.taken

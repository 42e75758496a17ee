"""What several pages speak of: a train in a database of SQLite, by SQLAlchemy and by Django."""

import os
import tempfile
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

os.environ["DJANGO_SETTINGS_MODULE"] = "tests.support.django_project.settings"

import django

django.setup()

from django.db import models

engine = sa.create_engine(f"sqlite:///{Path(tempfile.mkdtemp(prefix='page-')) / 'trains.sqlite'}")


class SeatTaken(Exception):
    """What a refusal raises."""


class Base(DeclarativeBase):
    """Of the mapped classes."""


class Train(Base):
    """A mapped class."""

    __tablename__ = "mapped_trains"

    name: Mapped[str] = mapped_column(primary_key=True)
    seats: Mapped[dict[str, str]] = mapped_column(MutableDict.as_mutable(sa.JSON), default=dict)

    def book(self, seat: int, passenger: str) -> int:
        if str(seat) in self.seats:
            raise SeatTaken(seat)
        self.seats[str(seat)] = passenger
        return seat


class TrainModel(models.Model):  # noqa: DJ008 - nobody shows it
    """A model."""

    name = models.CharField(max_length=80, unique=True)

    class Meta:
        app_label = "bank"


DJANGO_TRAIN = {"DjangoStore(Train": "DjangoStore(TrainModel"}
"""A page may call both by one name."""


def run_trains(*names: str) -> None:
    """Create the table, and these trains."""
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all(Train(name=name, seats={}) for name in names)


def seats(name: str) -> dict[str, str]:
    """What is committed."""
    with Session(engine) as session:
        return dict(session.get_one(Train, name).seats)

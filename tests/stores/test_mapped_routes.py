"""Sessions that have some classes in another database: nothing that is for that one goes into the batch's."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, object_session, sessionmaker

from geventbatch import LoadFailed, Processor
from geventbatch.stores import SQLAlchemyStore
from geventbatch.testing import joined_engine
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Train(Base):
    __tablename__ = "routes_trains"
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int] = mapped_column(default=0)


class Audit(Base):
    __tablename__ = "routes_audits"
    id: Mapped[int] = mapped_column(primary_key=True)
    train_id: Mapped[int]


def test_what_is_in_another_database_is_refused_to_its_own_operation(tmp_path: Path) -> None:
    trains, audits = (sa.create_engine(f"sqlite:///{tmp_path / name}.sqlite") for name in ("trains", "audits"))
    for engine in (trains, audits):
        Base.metadata.create_all(engine)  # both have both
    sessions = sessionmaker(binds={Train: trains, Audit: audits})
    with sessions() as session, session.begin():
        session.add(Train(id=1))

    def sell(train: Train) -> int:
        train.sold += 1
        return train.sold

    def query(train: Train) -> int:
        session = object_session(train)
        assert session is not None
        return len(session.scalars(sa.select(Audit)).all())

    def audit(train: Train) -> None:
        session = object_session(train)
        assert session is not None
        session.add(Audit(train_id=1))

    with Processor(open_resource=SQLAlchemyStore.mapped(sessions, Train), min_duration=0) as processor:
        assert processor.run(1, sell) == 1
        for operation in (query, audit):
            refused = answer_of(processor.run, 1, operation)
            assert isinstance(refused, RuntimeError), refused
            assert "is in another database" in str(refused)
        assert processor.run(1, sell) == 2
    for engine in (trains, audits):
        with engine.connect() as connection:
            assert connection.scalar(sa.select(sa.func.count()).select_from(Audit)) == 0
        engine.dispose()


def test_what_flask_sqlalchemy_has_by_a_bind_key_is_refused_too(tmp_path: Path) -> None:
    app = Flask("routes")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'trains.sqlite'}"
    app.config["SQLALCHEMY_BINDS"] = {"audits": f"sqlite:///{tmp_path / 'audits.sqlite'}"}
    database = SQLAlchemy(app)

    class Coach(database.Model):  # type: ignore[name-defined,misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        sold: Mapped[int] = mapped_column(default=0)

    class Entry(database.Model):  # type: ignore[name-defined,misc]
        __bind_key__ = "audits"
        id: Mapped[int] = mapped_column(primary_key=True)

    with app.app_context():
        engine, audits = database.engine, database.engines["audits"]
        Coach.metadata.create_all(engine)
        Entry.metadata.create_all(engine)  # it is there too
        Entry.metadata.create_all(audits)
        database.session.add(Coach(id=1))
        database.session.commit()
        database.session.remove()
        store = SQLAlchemyStore.mapped(database.session, Coach)

    def sell(coach: Any) -> int:
        coach.sold += 1
        return int(coach.sold)

    def note(coach: Any) -> None:
        session = object_session(coach)
        assert session is not None
        session.add(Entry(id=1))

    with Processor(open_resource=store, min_duration=0) as processor:
        assert processor.run(1, sell) == 1
        for around in (app.app_context(), nullcontext()):
            with around:
                refused = answer_of(processor.run, 1, note)
            assert isinstance(refused, RuntimeError), refused
            assert "is in another database" in str(refused)
        assert processor.run(1, sell) == 2
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Entry)) == 0
    engine.dispose()
    audits.dispose()


def test_an_engine_that_was_replaced_after_the_store_was_made_is_named_as_such(tmp_path: Path) -> None:
    app = Flask("replaced")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'trains.sqlite'}"
    database = SQLAlchemy(app)

    class Wagon(database.Model):  # type: ignore[name-defined,misc]
        id: Mapped[int] = mapped_column(primary_key=True)

    with app.app_context():
        engine = database.engine
        Wagon.metadata.create_all(engine)
        store = SQLAlchemyStore.mapped(database.session, Wagon, missing=lambda _: Wagon())
        engines: Any = database.engines
        with Processor(open_resource=store, min_duration=0) as processor, engine.connect() as connection:
            for other in (connection, joined_engine(connection)):
                engines[None] = other
                refused = answer_of(processor.run, 1, str)
                assert isinstance(refused, LoadFailed), refused
                assert "or its engine was replaced after the store was made (by init_app)" in str(refused.__cause__)
            connection.rollback()
            engines[None] = engine
            assert processor.run(1, str)
        with pytest.raises(TypeError, match=r"a store needs an Engine, in a test joined_engine\(connection\)"):
            SQLAlchemyStore.mapped(sessionmaker(connection), Wagon)
        database.session.remove()
    engine.dispose()


def test_a_session_that_reads_from_a_replica_has_its_batches_where_it_writes(tmp_path: Path) -> None:
    leader, replica = (sa.create_engine(f"sqlite:///{tmp_path / name}.sqlite") for name in ("leader", "replica"))

    class Routing(Session):
        def get_bind(self, mapper: Any = None, *, clause: Any = None, **_: Any) -> sa.Engine:
            return leader if self._flushing or isinstance(clause, sa.Update) else replica

    Base.metadata.create_all(leader)
    with Session(leader) as session, session.begin():
        session.add_all([Train(id=1), Audit(id=1, train_id=1)])

    def sell(train: Train) -> int:
        session = object_session(train)
        assert session is not None
        train.sold += len(session.scalars(sa.select(Audit)).all())
        return train.sold

    store = SQLAlchemyStore.mapped(sessionmaker(class_=Routing), Train)
    with Processor(open_resource=store, min_duration=0) as processor:
        assert processor.run(1, sell) == 1
    with Session(leader) as session:
        assert session.get_one(Train, 1).sold == 1
    leader.dispose()
    replica.dispose()

"""Sessions that have some classes in another database: nothing that is for that one goes into the batch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session, sessionmaker

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.callers import answer_of

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

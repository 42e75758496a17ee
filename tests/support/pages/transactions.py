"""For docs/transactions.md."""

import sqlalchemy as sa

from geventbatch import Processor, current_batch
from geventbatch.stores import SQLAlchemyStore
from tests.support.pages.trains import Base, Train, engine, run_trains

bookings = sa.Table("bookings", Base.metadata, sa.Column("seat", sa.Integer), sa.Column("passenger", sa.String))


def check(page):
    run_trains("ICE 1")
    with Processor(open_resource=SQLAlchemyStore.mapped(engine, Train, by="name"), min_duration=0) as trains:
        trains.run("ICE 1", page["book"], 12, "Ann")
    with engine.begin() as connection:
        assert connection.execute(sa.select(bookings)).all() == [(12, "Ann")]
    assert page["current_batch"] is current_batch

"""For docs/moving.md."""

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.support.pages.trains import engine

store = SQLAlchemyStore.documents(engine, "moved_trains", missing=lambda key: {})
store.create_table()


class SeatTaken(Exception):
    pass


def check(page):
    assert page["trains"].run("ICE 1", len) == 0
    page["trains"].stop()


__all__ = ["Processor"]

"""For docs/migrating.md."""

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from geventbatch import Processor
from geventbatch.stores import SQLAlchemyStore
from tests.support.pages.trains import SeatTaken, Train, engine, run_trains, seats

# SQLite has neither; it has one writer at a time.
REPLACED = {'text("SELECT pg_advisory_xact_lock(hashtext(:name))")': 'text("SELECT :name")'}
run_trains("ICE 1")


def check(page):
    for seat, book in enumerate((page["book"], page["book_with_advisory_lock"])):
        assert book("ICE 1", seat, "Ann") == seat
        try:
            book("ICE 1", seat, "Bob")
        except SeatTaken:
            continue
        raise AssertionError("it was booked twice")
    assert seats("ICE 1") == {"0": "Ann", "1": "Ann"}

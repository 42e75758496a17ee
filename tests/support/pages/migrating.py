"""For docs/migrating.md."""

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from tests.support.pages.trains import SeatTaken, Train, engine, run_trains, seats

# SQLite has neither; it has one writer at a time.
REPLACED = {'text("SELECT pg_advisory_xact_lock(hashtext(:name))")': 'text("SELECT :name")'}
run_trains("ICE 1")


def check(page):
    assert page["book"]("ICE 1", 0, "Ann") == 0
    try:
        page["book"]("ICE 1", 0, "Bob")
    except SeatTaken:
        assert seats("ICE 1") == {"0": "Ann"}
    else:
        raise AssertionError("it was booked twice")

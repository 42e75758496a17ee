"""The page of the tickets in a real browser (`tests.support.browser`).

Left out of a plain `pytest`; `pytest -m browser` runs it, and fails where Chromium is missing.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Page, browser, keep
from tests.support.servers import ask, database, seats_in, store, tickets, wait_until

pytestmark = pytest.mark.browser

TRAIN = "Rack Railway"
# One that would run, if a page took it for more than text.
ANN = "Ann <img src=x onerror=\"document.title='broken'\">"


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with browser(tmp_path) as page:
        yield page


def test_a_booking_made_through_the_page_shows_on_it_and_so_do_those_of_others(page: Page, tmp_path: Path) -> None:
    with (
        database("sqlite", tmp_path) as url,
        store(url, {}) as trains,
        tickets(url, tmp_path) as server,
    ):
        page.open(f"http://{server.host}:{server.port}/")
        page.click(f"a[href$='{TRAIN.split()[1]}']")
        wait_until(lambda: page.count("#seats button") == 30)

        page.click("button[data-seat='12']")
        page.type("#passenger", ANN)
        page.click("#book")
        wait_until(lambda: page.text("#message") == f"Seat 12 is booked for {ANN}.")
        wait_until(lambda: page.text("button[data-seat='12']") == f"12\n{ANN}")
        assert seats_in(trains, TRAIN) == {12: ANN}

        ask(server, "POST", "/trains/Rack%20Railway/seats/5", {"passenger": "Bob"})
        wait_until(lambda: page.text("button[data-seat='5']") == "5\nBob")
        counted = "28 of 30 seats are free. 2 bookings and cancellations went into 2 saves, all workers together."
        assert page.text("#counts") == counted

        page.click("button[data-seat='5']")
        page.click("#book")
        wait_until(lambda: page.text("#message") == f"seat 5 of {TRAIN} is taken")
        keep(page.screenshot())

        page.click("button[data-seat='12']")
        page.click("#cancel")
        wait_until(lambda: page.text("#message") == f"Seat 12 is cancelled for {ANN}.")
        assert seats_in(trains, TRAIN) == {5: "Bob"}
        assert page.title() == TRAIN

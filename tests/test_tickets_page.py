"""The page in a real browser: Chromium, driven through chromedriver's own protocol (W3C WebDriver), no library between.

Left out of a plain `pytest`; `pytest -m browser` runs it, and fails where Chromium is missing.
"""

import base64
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from examples.client import Connection
from tests.servers import ask, database, seats_in, store, tickets, wait_until

pytestmark = pytest.mark.browser

TRAIN = "Rack Railway"
# One that would run, if a page took it for more than text.
ANN = "Ann <img src=x onerror=\"document.title='broken'\">"

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1000,800",
]


class Page:
    """What a person does with a page, and sees on it."""

    def __init__(self, driver: Connection, session: str) -> None:
        self._driver = driver
        self._session = session

    def open(self, url: str) -> None:
        self._tell("POST", "url", {"url": url})

    def click(self, selector: str) -> None:
        self._tell("POST", f"element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._tell("POST", f"element/{self._find(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        return str(self._tell("GET", f"element/{self._find(selector)}/text"))

    def title(self) -> str:
        return str(self._tell("GET", "title"))

    def count(self, selector: str) -> int:
        return len(self._tell("POST", "elements", {"using": "css selector", "value": selector}))

    def screenshot(self) -> bytes:
        return base64.b64decode(self._tell("GET", "screenshot"))

    def close(self) -> None:
        self._driver.ask("DELETE", f"/session/{self._session}")

    def _find(self, selector: str) -> str:
        (found,) = self._tell("POST", "element", {"using": "css selector", "value": selector}).values()
        return str(found)

    def _tell(self, method: str, command: str, sent: object = None) -> Any:
        status, answer = self._driver.ask(method, f"/session/{self._session}/{command}", sent)
        assert status == 200, answer
        return answer["value"]


@contextmanager
def chromedriver() -> Iterator[Connection]:
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            ports = (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
            port = next(int(found[1]) for found in ports if found)
            connection = Connection("127.0.0.1", port)
            yield connection
            connection.close()
        finally:
            process.terminate()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with chromedriver() as driver:
        options = {"args": [*ARGUMENTS, f"--user-data-dir={tmp_path / 'chromium'}"]}
        status, answer = driver.ask(
            "POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        )
        assert status == 200, answer
        page = Page(driver, answer["value"]["sessionId"])
        yield page
        page.close()


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
        _keep(page.screenshot())

        page.click("button[data-seat='12']")
        page.click("#cancel")
        wait_until(lambda: page.text("#message") == f"Seat 12 is cancelled for {ANN}.")
        assert seats_in(trains, TRAIN) == {5: "Bob"}
        assert page.title() == TRAIN


def _keep(picture: bytes) -> None:
    """For a person to look at, where SCREENSHOT says."""
    if path := os.environ.get("SCREENSHOT"):
        Path(path).write_bytes(picture)

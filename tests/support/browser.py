"""A real browser: Chromium, driven through chromedriver's own protocol (W3C WebDriver), no library between."""

import base64
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.client import Connection

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
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

    def content(self, selector: str) -> str:
        """All text of the first one that there is, seen or not, in one step: the page may replace it meanwhile."""
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return str(self._tell("POST", "execute/sync", {"script": script, "args": [selector]}))

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


@contextmanager
def browser(directory: Path, *arguments: str, size: str = "1000,800") -> Iterator[Page]:
    """Start one, which keeps what it has in *directory*."""
    given = [*ARGUMENTS, f"--window-size={size}", f"--user-data-dir={directory / 'chromium'}", *arguments]
    with chromedriver() as driver:
        status, answer = driver.ask(
            "POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": given}}}}
        )
        assert status == 200, answer
        page = Page(driver, answer["value"]["sessionId"])
        yield page
        page.close()


def keep(picture: bytes) -> None:
    """For a person to look at, where SCREENSHOT says."""
    if path := os.environ.get("SCREENSHOT"):
        Path(path).write_bytes(picture)

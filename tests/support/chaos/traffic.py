"""Load of a given shape on the application, in place of faults: a closed loop, or so many calls a second."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import gevent

from examples.client import Connection
from examples.server import Server
from tests.support.chaos.places import place_of
from tests.support.chaos.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONFIGURATION = Path(__file__).with_name("gunicorn.conf.py")

SERVED: Final = 200
REFUSED: Final = 503

MOST_WAITING: Final = 1500
"""Calls that an open loop has waiting at once: what this machine and its workers have connections for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call was answered, and when it was made and answered (`time.monotonic()`)."""

    made: float
    answered: float
    status: int
    """0: there was none."""
    error: str
    retry_safe: bool
    retry_after: str

    @property
    def seconds(self) -> float:
        return self.answered - self.made

    def is_typed_refusal(self) -> bool:
        return (self.status, self.error, self.retry_safe) == (REFUSED, "ProcessorOverloaded", True) and bool(
            self.retry_after
        )


@contextmanager
def running(store: str, *, slow: float = 0.0, **options: Any) -> Iterator[tuple[Server, Path]]:
    """gunicorn over an empty store, which takes *slow* seconds for a save, and where its workers write how they are."""
    with TemporaryDirectory(prefix="chaos-") as directory, place_of(store) as place:
        for name in ("workers", "watched"):
            Path(directory, name).mkdir()
        if slow:
            place.slow_down(slow)
        # No call is to meet the end of its connection: it could not know what became of it.
        told = Settings(store=store, url=place.url(None), directory=directory, rows=False, keepalive=3600, **options)
        with Server(CONFIGURATION, told.environment(), log=Path(directory, "gunicorn.log")) as server:
            yield server, Path(directory, "watched")


class Traffic:
    """Calls, and their answers."""

    def __init__(self, server: Server, asks: Callable[[], dict[str, object]]) -> None:
        """*asks* gives what the next call asks for."""
        self._address = (server.host, server.port)
        self._asks = asks
        # -- mutable state ---------------------------------------------------------------------------------
        self.answers: list[Answer] = []
        self._free: list[Connection] = []

    def take(self) -> list[Answer]:
        """All answers since the last time."""
        taken, self.answers = self.answers, []
        return taken

    def ask(self, connection: Connection, asked: dict[str, object] | None = None) -> int:
        """Call once, and give the status."""
        made = time.monotonic()
        try:
            status, body = connection.ask("POST", "/", {"deadline": "calm", **(asked or self._asks())})
            told = (status, body.get("error", ""), body.get("retry_safe", False))
        except OSError as error:
            told = (0, type(error).__name__, False)
        self.answers.append(Answer(made, time.monotonic(), *told, connection.headers.get("retry-after", "")))
        return told[0]

    def closed_loop(self, callers: int, seconds: float) -> list[Answer]:
        """So many callers, of whom each comes again when it is answered; who was refused, a little later."""
        end = time.monotonic() + seconds

        def call() -> None:
            connection = Connection(*self._address)
            while time.monotonic() < end:
                if self.ask(connection) != SERVED:
                    gevent.sleep(0.2)
            connection.close()

        _all([gevent.spawn(call) for _ in range(callers)])
        return self.take()

    def capacity(self, callers: int, seconds: float) -> float:
        """Calls that are served in a second, by a closed loop that has found its pace."""
        self.closed_loop(callers, seconds / 4)
        answers = self.closed_loop(callers, seconds)
        return sum(answer.status == SERVED for answer in answers) / (answers[-1].answered - answers[0].made)

    def paced_loop(self, callers: int, rate: float, seconds: float) -> list[Answer]:
        """So many callers, who together make *rate* calls a second if they are answered in time."""
        begun = time.monotonic()

        def call(number: int) -> None:
            connection = Connection(*self._address)
            due = begun + number / rate
            while due < begun + seconds:
                gevent.sleep(max(0.0, due - time.monotonic()))
                self.ask(connection)
                due = max(due + callers / rate, time.monotonic())
            connection.close()

        _all([gevent.spawn(call, number) for number in range(callers)])
        return self.take()

    def open_loop(self, *phases: tuple[float, float]) -> list[Answer]:
        """Make so many calls a second for so many seconds, answered or not; then the next phase.

        Gives the answers in the order in which the calls were made.
        """
        waiting: set[gevent.Greenlet[..., None]] = set()

        def call() -> None:
            connection = self._free.pop() if self._free else Connection(*self._address)
            self.ask(connection)
            self._free.append(connection)

        for rate, seconds in phases:
            begun = time.monotonic()
            made = 0
            while (now := time.monotonic()) < begun + seconds:
                while made < (now - begun) * rate and len(waiting) < MOST_WAITING:
                    made += 1
                    one = gevent.spawn(call)
                    waiting.add(one)
                    one.rawlink(waiting.discard)
                gevent.sleep(0.002)
        _all(list(waiting))
        return sorted(self.take(), key=lambda answer: answer.made)


def _all(greenlets: list[gevent.Greenlet[..., None]]) -> None:
    for one in gevent.joinall(greenlets):
        one.get()


def percentile(values: list[float], part: float) -> float:
    """The value that this part of them does not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0

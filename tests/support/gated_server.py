"""Servers for `tests.support.programs.gunicorn_app`, whose batches load when a gate is open; and their clients."""

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

import gevent
from gevent.event import Event

from examples.client import Connection
from tests.support.servers import wait_until

ROOT = Path(__file__).parents[2]


class GatedServer:
    """A server that runs *command*; it prints its port, and logs to stderr. Leaving its `with` ends it."""

    def __init__(self, directory: Path, command: Sequence[str], **environment: str) -> None:
        directory.mkdir()
        self._gate, self._saved, self._hooks, self._log = (
            directory / name for name in ("gate", "saved", "hooks", "log")
        )
        for empty in (self._saved, self._hooks):
            empty.touch()
        given = {"GATE": str(self._gate), "SAVED": str(self._saved), "HOOKS": str(self._hooks), **environment}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **given},
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self.port = self._find_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            error.add_note(self.log())
        self.end()

    def _find_port(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline() or 0)

    def ask(self, word: str = "") -> tuple[int, Any]:
        """Have *word* saved, or ask how it is: on a connection of its own."""
        connection = Connection("127.0.0.1", self.port)
        try:
            return connection.ask("GET", f"/{word}")
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        status, health = self.ask()
        assert status == 200
        return dict(health)

    def open_gate(self) -> None:
        self._gate.touch()

    def saved(self) -> list[str]:
        return self._saved.read_text().split()

    def hooks(self) -> list[str]:
        return self._hooks.read_text().split()

    def log(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        return self.process.wait(45)

    def end(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def wait_until_pending(server: GatedServer, count: int) -> dict[str, Any]:
    """Wait until so many operations are admitted; give the health at that time."""
    found: dict[str, Any] = {}

    def all_are_in() -> bool:
        found.update(server.health())
        return f"{count} operations pending" in found["processor"]

    wait_until(all_are_in)
    return found


def is_ending(server: GatedServer, pid: int) -> bool:
    """Say whether this worker takes no more: another one answers, or nobody, or one that is saving its last."""
    health = health_of(server)
    return health is None or health["pid"] != pid or "stopping" in health["processor"]


def is_other(server: GatedServer, pid: int) -> bool:
    health = health_of(server)
    return health is not None and health["pid"] != pid


def health_of(server: GatedServer) -> dict[str, Any] | None:
    """Give it, unless nobody answers: the parent keeps the socket open when a worker ends."""
    try:
        with gevent.Timeout(1, TimeoutError):
            return server.health()
    except OSError:
        return None


class Crowd:
    """Clients that have one word after another saved, and keep a book of what they were answered."""

    def __init__(self, server: GatedServer) -> None:
        self._server = server
        self._words = (f"word{number}" for number in count())
        self._over = Event()
        self.statuses: Counter[int] = Counter()
        self.saved: list[str] = []
        self.workers: set[int] = set()
        self._clients = [gevent.spawn(self._work) for _ in range(10)]

    def go_home(self) -> None:
        self._over.set()
        gevent.joinall(self._clients, raise_error=True)

    def _work(self) -> None:
        while not self._over.is_set():
            self._ask(next(self._words))

    def _ask(self, word: str) -> None:
        try:
            status, health = self._server.ask(word)
        except ConnectionRefusedError:
            self._over.set()
        except OSError:
            self.statuses[0] += 1
        else:
            self.statuses[status] += 1
            if status == 200:
                self.saved.append(word)
                self.workers.add(health["pid"])


@contextmanager
def crowd_of(server: GatedServer) -> Iterator[Crowd]:
    """Load on *server*. In the end what is saved is what the clients were answered, or the test fails."""
    server.open_gate()
    crowd = Crowd(server)
    try:
        yield crowd
    finally:
        crowd.go_home()
    assert sorted(server.saved()) == sorted(crowd.saved)

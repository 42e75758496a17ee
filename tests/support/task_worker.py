"""A worker of a task queue with `tests.support.programs.words`, as a process group of its own."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from tests.support.redis_server import redis_url

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]


class TaskWorker:
    """A worker that runs *command*, and whose tasks the program *application* sends."""

    def __init__(self, folder: Path, application: str, command: Sequence[str], **environment: str) -> None:
        self._folder = folder
        folder.mkdir()
        self._application = application
        self._command = command
        self._environment = {
            **os.environ,
            "FOLDER": str(folder),
            "REDIS_URL": redis_url(),
            "QUEUE": f"tasks-{uuid4().hex}",
            **environment,
        }
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def send(self, **numbers: int) -> None:
        """Send so many tasks of each name."""
        arguments = [word for name, number in numbers.items() for word in (name, str(number))]
        subprocess.run(
            [sys.executable, "-m", self._application, *arguments], cwd=ROOT, env=self._environment, check=True
        )

    def kill(self) -> None:
        """End all of its processes at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def start_again(self, **environment: str) -> None:
        """Start it anew, with this in its environment too."""
        assert self.process.poll() is not None
        self._environment.update(environment)
        self.process = self._started()

    def open_gates(self, *names: str) -> None:
        for name in names:
            (self._folder / name).touch()

    def notes(self, beginning: str) -> list[str]:
        """Give what was noted with this *beginning*, without it."""
        return [line.removeprefix(beginning).strip() for line in self._lines("notes") if line.startswith(beginning)]

    def saved(self) -> list[str]:
        return sorted(self._lines("saved"))

    def ledger(self) -> list[str]:
        with closing(sqlite3.connect(self._folder / "ledger.sqlite")) as connection:
            row = connection.execute("SELECT state FROM ledger").fetchone()
        return [] if row is None else sorted(json.loads(row[0]))

    def log(self) -> str:
        return (self._folder / "log").read_text()

    def _lines(self, name: str) -> list[str]:
        file = self._folder / name
        return file.read_text().splitlines() if file.exists() else []


@contextmanager
def task_worker(folder: Path, application: str, command: Sequence[str], **environment: str) -> Iterator[TaskWorker]:
    worker = TaskWorker(folder, application, command, **environment)
    try:
        yield worker
    except BaseException as error:
        error.add_note(worker.log())
        raise
    finally:
        worker.kill()


def words_of(name: str, number: int) -> list[str]:
    return sorted(f"{name}{index}" for index in range(number))

"""Servers whose threads gevent has not patched: operations run unbatched, and that is told once."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import gevent
import pytest

from tests.support.servers import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
FLASK = "tests.support.programs.flask_threads"
DJANGO = "tests.support.programs.django_threads"
GUNICORN = ["gunicorn", "--worker-class", "gthread", "--threads", "8", "--no-control-socket", "--bind"]
TOLD = "gevent has not patched this process, which calls run(): each operation loads and saves by itself"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serving(log: Path, port: int, *command: str, database: str, meeting: int = 3) -> Iterator[None]:
    with log.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "DATABASE": database, "MEETING": str(meeting)},
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is not None or accepts(port))
        yield
    except BaseException as error:
        error.add_note(log.read_text())
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask(port: int, number: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/{number}", timeout=PATIENCE) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize(
    "server", ["flask run", "flask under gunicorn --threads", "django runserver", "django under gunicorn --threads"]
)
def test_requests_in_threads_run_unbatched_by_themselves_and_the_server_says_so_once(
    server: str, tmp_path: Path
) -> None:
    port, file = free_port(), tmp_path / "accounts.sqlite"
    commands = {
        "flask run": ["flask", "--app", FLASK, "run", "--port", str(port)],
        "flask under gunicorn --threads": [*GUNICORN, f"127.0.0.1:{port}", f"{FLASK}:app"],
        "django runserver": [DJANGO, "runserver", "--noreload", str(port)],
        "django under gunicorn --threads": [*GUNICORN, f"127.0.0.1:{port}", f"{DJANGO}:application"],
    }
    database = f"sqlite:///{file}" if server.startswith("flask") else str(file)
    log = tmp_path / "log"
    with serving(log, port, "-m", *commands[server], database=database):
        for answer in ("1", "2"):
            asked = [gevent.spawn(ask, port, number) for number in (1, 2, 3)]
            assert [one.get() for one in asked] == [answer] * 3
    assert log.read_text().count(TOLD) == 1
    assert log.read_text().count("a pair of functions, which compares nothing") == server.startswith("flask")


@pytest.mark.parametrize(
    "server", ["flask under gunicorn", "flask under uWSGI", "django under gunicorn", "django under uWSGI"]
)
def test_a_server_that_answers_in_its_main_thread_says_so_too(server: str, tmp_path: Path) -> None:
    port, file = free_port(), tmp_path / "accounts.sqlite"
    framework, _, name = server.split()
    application = f"{FLASK}:app" if framework == "flask" else f"{DJANGO}:application"
    command = ["-m", "gunicorn", "--no-control-socket", "--bind", f"127.0.0.1:{port}", application]
    if name == "uWSGI":
        command = ["-c", "import pyuwsgi; pyuwsgi.run()", "--http-socket", f"127.0.0.1:{port}", "--module", application]
    log = tmp_path / "log"
    database = f"sqlite:///{file}" if framework == "flask" else str(file)
    with serving(log, port, *command, database=database, meeting=1):
        assert [ask(port, 1), ask(port, 1)] == ["1", "2"]
    assert log.read_text().count(TOLD) == 1

"""Whatever ends a worker, the database holds exactly what the clients were told. (Each signal: test_gunicorn.)

What gunicorn does not allow for, and what the clients here therefore put up with (without an answer, and without any
change either):

- A connection that no worker has accepted when the last of them closes the socket is reset by the kernel. HUP and
  max_requests keep the socket open: there, everybody is answered.
- On INT and QUIT a worker accepts until it exits. Whoever comes while it stops gets a 503, or is reset with the exit.
- A kept connection that sends its next call while its worker ends. The clients here use one for each call, as behind a
  proxy that does not keep them.
"""

import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gevent
import sqlalchemy as sa
from gevent.event import Event

from examples.server import ROOT, Server
from tests.support.logs import unexpected
from tests.support.servers import (
    ask,
    database,
    ready_workers,
    seats_in,
    side_by_side,
    store,
    tickets,
    wait_until,
    waiting_for_a_lock,
)

CLIENTS = 50
LINE = {"Coast Line": CLIENTS * 4}
PATH = "/trains/Coast%20Line/seats"
# Answers that a signal has to come after: the load is then well under way.
WARM = 100


class Crowd:
    """Clients that book and cancel their own seats, and keep a book of what they were told."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._over = Event()
        self.told: dict[int, str] = {}
        self.answers: Counter[int] = Counter()
        self.refused = 0
        """Calls that did not reach the server, since nobody listened any more."""
        self.reset = 0
        """Calls that were connected, and got no answer."""
        self._clients = [gevent.spawn(self._work, number) for number in range(CLIENTS)]

    @property
    def changes(self) -> int:
        return self.answers[200] + self.answers[201]

    def go_home(self) -> None:
        self._over.set()
        gevent.joinall(self._clients, raise_error=True)

    def _work(self, number: int) -> None:
        while not self._over.is_set():
            self._call(number * 4 + random.randint(1, 4), f"client {number}")

    def _call(self, seat: int, name: str) -> None:
        method = "DELETE" if seat in self.told else "POST"
        try:
            status, _ = ask(self._server, method, f"{PATH}/{seat}", {"passenger": name})
        except ConnectionRefusedError:
            self.refused += 1
            self._over.set()
        except OSError:
            self.reset += 1
        else:
            self.answers[status] += 1
            self._note(status, seat, name)

    def _note(self, status: int, seat: int, name: str) -> None:
        if status == 201:
            self.told[seat] = name
        elif status == 200:
            del self.told[seat]


@contextmanager
def crowded(kind: str, directory: Path, *arguments: str, batching: bool = True) -> Iterator[tuple[Server, Crowd]]:
    """A server under load. In the end the database agrees with the clients, or the test fails."""
    with (
        database(kind, directory) as url,
        store(url, LINE) as trains,
        tickets(url, directory, batching=batching, arguments=arguments) as server,
    ):
        crowd = Crowd(server)
        try:
            wait_until(lambda: crowd.changes > WARM)
            yield server, crowd
        finally:
            crowd.go_home()
        assert seats_in(trains, "Coast Line") == crowd.told
        assert trains.seat_map("Coast Line").train.changes == crowd.changes
        assert crowd.answers.keys() <= {200, 201, 503, 504}


def test_whoever_waits_when_the_signal_comes_is_saved_and_answered(tmp_path: Path) -> None:
    def run(sent: signal.Signals, *arguments: str) -> None:
        directory = _directory(tmp_path, sent, *arguments)
        with (
            database("postgresql", directory) as url,
            store(url, LINE) as trains,
            tickets(url, directory, arguments=arguments) as server,
        ):
            with trains._engine.begin() as connection:
                connection.execute(sa.text("SELECT * FROM seat_maps FOR UPDATE"))
                bookings = [
                    gevent.spawn(ask, server, "POST", f"{PATH}/{seat}", {"passenger": "Ann"}) for seat in range(1, 21)
                ]
                workers = _wait_until_pending(server, len(bookings))
                server.process.send_signal(sent)
                wait_until(lambda: all(_is_ending(server, workers) for _ in range(10)))

            assert [booking.get()[0] for booking in bookings] == [201] * 20
            assert seats_in(trains, "Coast Line") == dict.fromkeys(range(1, 21), "Ann")

    side_by_side(run, (signal.SIGTERM,), (signal.SIGQUIT, "--preload"))


def test_what_was_answered_before_the_end_is_in_the_database(tmp_path: Path) -> None:
    def run(sent: signal.Signals, batching: bool) -> None:
        with crowded("sqlite", _directory(tmp_path, sent, batching), batching=batching) as (server, _):
            server.process.send_signal(sent)

            assert server.wait() == 0

    side_by_side(run, (signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGQUIT, False))


def test_ctrl_c_that_reaches_all_processes_at_once_loses_nothing_and_ends_without_a_traceback(tmp_path: Path) -> None:
    with crowded("sqlite", tmp_path, "--preload") as (server, _):
        os.killpg(server.process.pid, signal.SIGINT)

        assert server.wait() == 0
    assert unexpected(_log(tmp_path)) == []


def test_reloads_and_restarts_under_load_answer_everybody(tmp_path: Path) -> None:
    def reload(kind: str, *arguments: str) -> None:
        directory = _directory(tmp_path, kind)
        with crowded(kind, directory, *arguments) as (server, crowd):
            before = _workers(server)
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: ready_workers(directory) == 4 and not before & _workers(server))
            _check_that_everybody_was_answered(crowd)

    def restart() -> None:
        directory = _directory(tmp_path, "restart")
        with crowded("sqlite", directory, "--max-requests", "100") as (_, crowd):
            wait_until(lambda: ready_workers(directory) >= 4)
            _check_that_everybody_was_answered(crowd)

    side_by_side(lambda run, *case: run(*case), (reload, "postgresql", "--preload"), (restart,))


def test_preloaded_workers_answer_others_while_a_batch_waits_for_its_database(tmp_path: Path) -> None:
    with (
        database("postgresql", tmp_path) as url,
        store(url, LINE) as trains,
        tickets(url, tmp_path, workers=1, arguments=["--preload"]) as server,
    ):
        with trains._engine.begin() as connection:
            connection.execute(sa.text("SELECT * FROM seat_maps FOR UPDATE"))
            booking = gevent.spawn(ask, server, "POST", f"{PATH}/1", {"passenger": "Ann"})
            wait_until(lambda: waiting_for_a_lock(trains))

            assert ask(server, "GET", "/healthz")[0] == 200
            assert not booking.ready()
        assert booking.get()[0] == 201


def test_the_command_says_where_it_serves_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.tickets", "--port", "0"]
    environment = {**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path / 'tickets.sqlite'}"}
    log = (tmp_path / "gunicorn.log").open("wb")
    with log, subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log) as process:
        assert process.stdout is not None
        assert re.match(rb"Tickets are sold at http://127.0.0.1:\d+/", process.stdout.readline())
        wait_until(lambda: ready_workers(tmp_path) == 2)
        process.send_signal(signal.SIGINT)

        assert process.wait() == 0


def _check_that_everybody_was_answered(crowd: Crowd) -> None:
    crowd.go_home()
    assert (crowd.refused, crowd.reset, crowd.answers[503]) == (0, 0, 0)


def _directory(parent: Path, *case: object) -> Path:
    """A directory for one of several cases."""
    directory = parent / "-".join(map(str, case))
    directory.mkdir()
    return directory


def _wait_until_pending(server: Server, count: int) -> set[int]:
    """Wait until the workers have admitted so many bookings, all together; give the workers."""
    pending: dict[int, int] = {}

    def all_are_in() -> bool:
        _, health = ask(server, "GET", "/healthz")
        found = re.search(r"(\d+) operations pending", health["processor"])
        assert found, health
        pending[health["worker"]] = int(found[1])
        return sum(pending.values()) == count

    wait_until(all_are_in)
    return set(pending)


def _is_ending(server: Server, workers: set[int]) -> bool:
    """Say whether these workers take no more: another one answers, or nobody, or one that is saving its last."""
    try:
        _, health = ask(server, "GET", "/healthz")
    except OSError:
        return True
    return health["worker"] not in workers or "stopping" in health["processor"]


def _workers(server: Server) -> set[int]:
    """The workers that answer now; ten calls find them all, or nearly always."""
    return {ask(server, "GET", "/healthz")[1]["worker"] for _ in range(10)}


def _log(directory: Path) -> str:
    return (directory / "gunicorn.log").read_text()

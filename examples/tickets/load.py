"""Clients that book and cancel over HTTP as fast as they are answered: a process of its own.

    python -m examples.tickets.load HOST PORT TRAIN [TRAIN …] --seconds 2 --clients 100

Each train has its share of the clients. It prints one line of JSON: what those of each train were told, and what they
hold in the end.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote

import gevent

from examples.client import Connection

# One booking in so many goes for any seat of the train, where mostly somebody else sits.
ODDITY = 10


@dataclass
class Report:
    """What the clients of one train were told."""

    train: str = ""
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    """How many answers of each HTTP status; "None" where the connection broke before one."""
    held: dict[str, list[int]] = field(default_factory=dict)
    """The seats that each client was told to hold."""
    unsure: list[int] = field(default_factory=list)
    """Seats of which nobody knows, since an answer was missing or said so."""
    backends: Counter[str] = field(default_factory=Counter)
    """How many answers came from each backend, where the answers name one."""

    @classmethod
    def from_json(cls, text: str) -> list[Self]:
        """What another process printed."""
        reports = [cls(**each) for each in json.loads(text)]
        for report in reports:
            report.statuses, report.backends = Counter(report.statuses), Counter(report.backends)
        return reports


class Client:
    """Books a seat, cancels it, and so on. Mostly one of its own few, so that most of what it asks for succeeds."""

    def __init__(self, name: str, connection: Connection, seats: Sequence[int], all_seats: int, report: Report) -> None:
        self.name = name
        self._connection = connection
        self._seats = seats
        self._all_seats = all_seats
        self._report = report
        self._held = report.held.setdefault(name, [])

    def work(self, path: str, is_over: Callable[[], bool]) -> None:
        """Ask until it is over."""
        while not is_over():
            if self._held:
                self._cancel(path, self._held[0])
            else:
                self._book(path, self._choose())
        self._connection.close()

    def _choose(self) -> int:
        if random.randrange(ODDITY) == 0:
            return random.randint(1, self._all_seats)
        return random.choice(self._seats)

    def _book(self, path: str, seat: int) -> None:
        if self._ask("POST", path, seat) == 201:
            self._held.append(seat)

    def _cancel(self, path: str, seat: int) -> None:
        if self._ask("DELETE", path, seat) != 503:
            self._held.remove(seat)

    def _ask(self, method: str, path: str, seat: int) -> int | None:
        """The status; None when it leaves unknown what became of the seat."""
        started = time.perf_counter()
        status = self._status(method, f"{path}/{seat}")
        if status is not None:
            self._report.latencies.append(time.perf_counter() - started)
        self._report.statuses[str(status)] += 1
        if status is None or (status >= 500 and status != 503):
            self._report.unsure.append(seat)
            return None
        return status

    def _status(self, method: str, path: str) -> int | None:
        try:
            status, _ = self._connection.ask(method, path, {"passenger": self.name})
        except OSError:
            return None
        if backend := self._connection.headers.get("x-backend"):
            self._report.backends[backend] += 1
        return status


def run(host: str, port: int, report: Report, clients: int, is_over: Callable[[], bool]) -> None:
    """Let that many clients work on the train of the report until it is over."""
    path = f"/trains/{quote(report.train)}/seats"
    connection = Connection(host, port)
    _, seat_map = connection.ask("GET", path)
    connection.close()
    # What an earlier run has left: its clients had the same names.
    for seat, holder in seat_map["taken"].items():
        report.held.setdefault(holder, []).append(int(seat))
    crowd = [_client(number, clients, seat_map["seats"], Connection(host, port), report) for number in range(clients)]
    started = time.monotonic()
    gevent.joinall([gevent.spawn(client.work, path, is_over) for client in crowd], raise_error=True)
    report.seconds = time.monotonic() - started


def main() -> None:
    """Run the load that the command line describes, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m examples.tickets.load")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("trains", metavar="train", nargs="+")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=100)
    chosen = parser.parse_args()
    reports = [Report(train) for train in chosen.trains]
    share = chosen.clients // len(reports)
    connection = Connection(chosen.host, chosen.port)
    connection.ask("GET", "/healthz")  # a server that has just been started takes its time
    connection.close()
    until = time.monotonic() + chosen.seconds
    loads = [
        gevent.spawn(run, chosen.host, chosen.port, report, share, lambda: time.monotonic() > until)
        for report in reports
    ]
    gevent.joinall(loads, raise_error=True)
    json.dump([vars(report) for report in reports], sys.stdout)


def _client(number: int, clients: int, seats: int, connection: Connection, report: Report) -> Client:
    own = range(1 + number % seats, seats + 1, clients)
    return Client(f"client {number}", connection, own, seats, report)


if __name__ == "__main__":
    main()

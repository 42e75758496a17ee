"""Clients that book and cancel over HTTP as fast as they are answered: a process of its own.

    python -m examples.tickets.load HOST PORT TRAIN --seconds 2 --clients 100

It prints one line of JSON: what the clients were told, and what they hold in the end.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import quote

import gevent

from examples.client import Connection

# One booking in so many goes for any seat of the train, where mostly somebody else sits.
ODDITY = 10


@dataclass
class Report:
    """What a run of the load was told."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    """How many answers of each HTTP status; "None" where the connection broke before one."""
    held: dict[str, list[int]] = field(default_factory=dict)
    """The seats that each client was told to hold."""
    unsure: list[int] = field(default_factory=list)
    """Seats of which nobody knows, since an answer was missing or said so."""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What another process printed."""
        report = cls(**json.loads(text))
        report.statuses = Counter(report.statuses)
        return report


class Client:
    """Books a seat, cancels it, and so on. Mostly one of its own few, so that most of what it asks for succeeds."""

    def __init__(self, name: str, connection: Connection, seats: Sequence[int], all_seats: int, report: Report) -> None:
        self.name = name
        self._connection = connection
        self._seats = seats
        self._all_seats = all_seats
        self._report = report
        self._held = report.held.setdefault(name, [])

    def work(self, path: str, until: float) -> None:
        """Ask until the time is up."""
        while time.monotonic() < until:
            if self._held:
                self._cancel(path, self._held[0])
            else:
                self._book(path, self._choose())

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
            return self._connection.ask(method, path, {"passenger": self.name})[0]
        except OSError:
            return None


def run(host: str, port: int, train: str, seconds: float, clients: int) -> Report:
    """Let that many clients work on one train for that long."""
    report, path = Report(), f"/trains/{quote(train)}/seats"
    _, seat_map = Connection(host, port).ask("GET", path)
    # What an earlier run has left: its clients had the same names.
    for seat, holder in seat_map["taken"].items():
        report.held.setdefault(holder, []).append(int(seat))
    crowd = [_client(number, clients, seat_map["seats"], Connection(host, port), report) for number in range(clients)]
    started = time.monotonic()
    gevent.joinall([gevent.spawn(client.work, path, started + seconds) for client in crowd], raise_error=True)
    report.seconds = time.monotonic() - started
    return report


def main() -> None:
    """Run the load that the command line describes, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m examples.tickets.load")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("train")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=100)
    chosen = parser.parse_args()
    report = run(chosen.host, chosen.port, chosen.train, chosen.seconds, chosen.clients)
    json.dump(vars(report), sys.stdout)


def _client(number: int, clients: int, seats: int, connection: Connection, report: Report) -> Client:
    own = range(1 + number % seats, seats + 1, clients)
    return Client(f"client {number}", connection, own, seats, report)


if __name__ == "__main__":
    main()

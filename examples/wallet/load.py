"""Clients that move money over HTTP as fast as they are answered: a process of its own.

    python -m examples.wallet.load HOST PORT 1 2 3 --seconds 2 --clients 100

moves money between the accounts 1, 2 and 3, and prints one line of JSON: what the clients asked for, and what they were
told.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self
from uuid import uuid4

import gevent

from examples.client import Connection

FUNDS = 1000
"""What is in each account when it begins."""
KINDS = ("transfer", "transfer", "transfer", "deposit")


class Asked(NamedTuple):
    """One movement that a client asked for, and what came of it."""

    reference: str
    kind: str
    amount: int
    source: int | None
    target: int | None
    outcome: str
    """"saved", "refused" (nothing was changed) or "unknown"."""


@dataclass
class Report:
    """What a run of the load was told."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    """How many answers of each HTTP status; "None" where the connection broke before one."""
    asked: list[Asked] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What another process printed."""
        report = cls(**json.loads(text))
        report.statuses = Counter(report.statuses)
        report.asked = [Asked(*one) for one in report.asked]
        return report

    def add(self, asked: Asked, status: int | None, seconds: float) -> None:
        """Count an answer."""
        self.statuses[str(status)] += 1
        self.asked.append(asked)
        if status is not None:
            self.latencies.append(seconds)


class Client:
    """Moves random amounts between random accounts; some of what it asks for is more than there is."""

    def __init__(self, connection: Connection, accounts: Sequence[int], kinds: Sequence[str], report: Report) -> None:
        self.report = report
        self._connection = connection
        self._accounts = accounts
        self._kinds = kinds

    def work(self, is_over: Callable[[Report], bool]) -> None:
        """Ask until it is over."""
        while not is_over(self.report):
            self.ask(random.choice(self._kinds))

    def close(self) -> None:
        """Close its connection."""
        self._connection.close()

    def ask(self, kind: str) -> None:
        """Ask for one movement."""
        amount = random.randint(1, FUNDS)
        source, target = random.sample(self._accounts, 2)
        reference = str(uuid4())
        body: dict[str, object] = {"reference": reference, "amount": amount}
        if kind == "deposit":
            path = f"/accounts/{target}/deposits"
        else:
            path = "/transfers" if kind == "transfer" else "/pending-transfers"
            body |= {"source": source, "target": target}
        started = time.perf_counter()
        status = self._status(path, body)
        seconds = time.perf_counter() - started
        kept = Asked(reference, kind, amount, None if kind == "deposit" else source, target, _outcome(status))
        self.report.add(kept, status, seconds)

    def _status(self, path: str, body: object) -> int | None:
        try:
            return self._connection.ask("POST", path, body)[0]
        except OSError:
            return None


def open_accounts(host: str, port: int, count: int) -> list[int]:
    """Open accounts with something in each."""
    connection = Connection(host, port)
    numbers = []
    for n in range(count):
        _, opened = connection.ask("POST", "/accounts", {"owner": f"client {n}"})
        numbers.append(opened["account"])
    for number in numbers:
        connection.ask("POST", f"/accounts/{number}/deposits", {"amount": FUNDS})
    connection.close()
    return numbers


def run(clients: Sequence[Client], is_over: Callable[[Report], bool]) -> None:
    """Let the clients work until it is over."""
    started = time.monotonic()
    gevent.joinall([gevent.spawn(client.work, is_over) for client in clients], raise_error=True)
    for client in clients:
        client.close()
        client.report.seconds = time.monotonic() - started


def main() -> None:
    """Run the load that the command line describes, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m examples.wallet.load")
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("accounts", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--clients", type=int, default=100)
    chosen = parser.parse_args()
    until = time.monotonic() + chosen.seconds
    report = Report()
    connections = (Connection(chosen.host, chosen.port) for _ in range(chosen.clients))
    run([Client(one, chosen.accounts, KINDS, report) for one in connections], lambda _: time.monotonic() > until)
    json.dump(vars(report), sys.stdout)


def _outcome(status: int | None) -> str:
    if status in (201, 202):
        return "saved"
    return "refused" if status in (404, 409, 503, 504) else "unknown"


if __name__ == "__main__":
    main()

"""What a transfer costs in each of the ways, measured without HTTP: a table.

    python -m examples.wallet.compare

It takes the database that DATABASE_URL names, in which no accounts may be yet, or a file of SQLite.
Each measurement is a process of its own, which runs as many clients in a closed loop as a gunicorn worker might have.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from gevent import monkey

WAYS = {
    "in_one_transaction": "one transaction each",
    "across": "run_across",
    "outbox": "outbox",
}
SHOWN = {
    "spread": "between any two of {accounts} accounts",
    "hot": "between one account and any of {accounts} others, either way",
}
COLUMNS = "{:<27}{:>24}{:>27}{:>27}{:>12}{:>13}"
TITLES = ("", "transfers/s", "p50 ms", "p99 ms", "statements", "round trips")
TITLES_BELOW = ("", "", "", "", "/ transfer", "/ transfer")
RICH = 10**9


class Round(NamedTuple):
    """What one process has measured."""

    transfers: int
    seconds: float
    """Until the last one has arrived."""
    p50: float
    p99: float
    """Seconds until a client was answered."""
    statements: int


@dataclass(frozen=True)
class Load:
    """Who does what for how long."""

    ways: Sequence[str]
    rounds: int
    seconds: float
    clients: int
    accounts: int
    delay: float
    """Seconds that the network takes, each way."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.wallet.compare", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--accounts", type=int, default=100)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--delay", type=float, default=0.0, metavar="MS", help="put PostgreSQL that far away, each way")
    chosen = parser.parse_args()
    load = Load(chosen.ways, chosen.rounds, chosen.seconds, chosen.clients, chosen.accounts, chosen.delay / 1000)
    with _database(os.environ.get("DATABASE_URL")) as url:
        print(_heading(load, url), flush=True)
        try:
            for where, shown in SHOWN.items():
                print("", COLUMNS.format(*TITLES), COLUMNS.format(*TITLES_BELOW), sep="\n")
                print(f"transfers {shown.format(accounts=load.accounts)}", flush=True)
                _print_ways(url, where, load)
        finally:
            _renew(accounts=0)


def _print_ways(url: str, where: str, load: Load) -> None:
    rounds: dict[str, list[Round]] = {way: [] for way in load.ways}
    for _ in range(load.rounds):  # in turn, so that none has all the quiet moments of the machine
        for way, measured in rounds.items():
            measured.append(_measure(url, way, where, load))
    for way, measured in rounds.items():
        cells = [
            _spread([one.transfers / one.seconds for one in measured], ",.0f"),
            _spread([one.p50 * 1000 for one in measured], ".1f"),
            _spread([one.p99 * 1000 for one in measured], ".1f"),
            f"{median(one.statements / one.transfers for one in measured):.2f}",
            _round_trips(url, way, where, load),
        ]
        print(COLUMNS.format(f"  {WAYS[way]}", *cells), flush=True)


def _round_trips(url: str, way: str, where: str, load: Load) -> str:
    """Per transfer, in a round of their own, since counting takes its time."""
    if url.startswith("sqlite"):
        return "none"
    from examples.wallet.relay import Relay

    with Relay(url) as relay:
        measured = _measure(relay.url, way, where, load)
        return f"{relay.round_trips / measured.transfers:.2f}"


def _measure(url: str, way: str, where: str, load: Load) -> Round:
    """Run `examples.wallet.measure` in a process of its own, on books that are as good as new."""
    from examples.wallet.relay import Relay

    if load.delay and not url.startswith("sqlite"):
        with Relay(url, load.delay) as relay:
            return _ended(relay.url, way, where, load)
    return _ended(url, way, where, load)


def _ended(url: str, way: str, where: str, load: Load) -> Round:
    # With one more, which is the hot one.
    _renew(load.accounts + 1)
    options = {"seconds": load.seconds, "clients": load.clients, "accounts": load.accounts}
    arguments = [way, where, *(f"--{name}={value}" for name, value in options.items())]
    ended = subprocess.run(
        [sys.executable, "-m", "examples.wallet.measure", *arguments],
        env={**os.environ, "DATABASE_URL": url},
        stdout=subprocess.PIPE,
        timeout=load.seconds + 120,
        check=True,
    )
    _check(load.accounts + 1)
    return Round(**json.loads(ended.stdout))


def _renew(accounts: int) -> None:
    """Begin with empty books, and rich accounts, numbered from 1."""
    from django.db import connection

    from examples.wallet.models import Account, Movement, Pending

    with connection.cursor() as cursor:
        for model in (Pending, Movement, Account):
            cursor.execute(f'DELETE FROM "{model._meta.db_table}"')  # noqa: S608, SLF001 - our own tables
    Account.objects.bulk_create(
        Account(pk=number, owner=f"account {number}", balance=RICH) for number in range(1, accounts + 1)
    )
    connection.close()


def _check(accounts: int) -> None:
    """Whatever is faster, it must be right."""
    from django.db import connection
    from django.db.models import Sum

    from examples.wallet.models import Account

    money = Account.objects.aggregate(sum=Sum("balance"))["sum"]
    connection.close()
    if money != RICH * accounts:
        raise AssertionError(f"{money - RICH * accounts} too much is in the accounts")


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _heading(load: Load, url: str) -> str:
    away = f", {load.delay * 1000:g} ms away each way" if load.delay else ""
    return (
        f"{load.clients} clients in a closed loop in one process, {url.partition(':')[0]}{away}.\n"
        f"Each measurement is the median (least to most) of {load.rounds} rounds of {load.seconds:g} s."
    )


@contextmanager
def _database(url: str | None) -> Iterator[str]:
    """The given one, or a file that is gone afterwards; with its tables, and set up for this process too."""
    from examples.wallet.__main__ import migrate

    with TemporaryDirectory(prefix="wallet-") as directory:
        os.environ["DATABASE_URL"] = url or f"sqlite:///{Path(directory, 'wallet.sqlite')}"
        migrate()
        _refuse_used()
        yield os.environ["DATABASE_URL"]


def _refuse_used() -> None:
    from django.db import connection

    from examples.wallet.models import Account

    if Account.objects.exists():
        sys.exit("DATABASE_URL names a database in which accounts are: measuring would delete them")
    connection.close()


def read_options(arguments: Sequence[str] | None = None) -> Any:
    """The command line of one measurement."""
    parser = argparse.ArgumentParser(prog="python -m examples.wallet.measure")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("where", choices=SHOWN)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--accounts", type=int, required=True)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    monkey.patch_all()
    main()

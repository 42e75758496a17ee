"""The same load on two servers in turn, one with batching and one without, and what came of it as a table."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from examples.client import Connection
from examples.server import ROOT, Server
from examples.table import Row, Statuses, show
from examples.wallet.load import Report, open_accounts

CONFIGURATION = Path(__file__).with_name("gunicorn.conf.py")
# Each server has this many turns, so that neither has all the quiet moments of the machine.
TURNS = 2
ACCOUNTS = 100
MOST_SHOWN = 5
MEANING = Statuses(answered=("201",), refused=("409",), again=("503", "504"), unknown="500, cut")


def print_table(seconds: float, clients: int, workers: int, database_url: str | None) -> bool:
    """Print the table; True when the database holds what the clients were told."""
    rows = [Row("batching", MEANING), Row("batching=False", MEANING)]
    with _database(database_url) as url, _server(url, workers, "on") as on, _server(url, workers, "off") as off:
        from examples.wallet.audit import differences  # which needs the settings

        accounts = open_accounts(on.host, on.port, ACCOUNTS)
        print(_heading(seconds, clients, workers, url), flush=True)
        wrong: list[str] = []
        for _ in range(TURNS):
            for row, server in zip(rows, (on, off), strict=True):
                before = _counts(server, workers)
                report = _load(server, accounts, seconds / (2 * TURNS), clients)
                after = _counts(server, workers)
                operations, batches = (late - early for late, early in zip(after, before, strict=True))
                row.add(report.seconds, report.latencies, report.statuses, operations, batches)
                wrong += differences(report)[:MOST_SHOWN]
    show(rows, counted="run")  # those too that were refused
    print(*wrong or ["Checked: money is conserved, and the audit agrees with all balances and answers."], sep="\n")
    return not wrong


def _counts(server: Server, workers: int) -> tuple[int, int]:
    """The operations and batches of all workers so far: each new connection may reach another one."""
    found: dict[int, tuple[int, int]] = {}
    while len(found) < workers:
        connection = Connection(server.host, server.port)
        _, told = connection.ask("GET", "/healthz")
        connection.close()
        found[told["worker"]] = told["operations"], told["batches"]
    return sum(one[0] for one in found.values()), sum(one[1] for one in found.values())


def _load(server: Server, accounts: list[int], seconds: float, clients: int) -> Report:
    """Run the clients in a process of their own, so that they do not share a hub with anybody."""
    command = [sys.executable, "-m", "examples.wallet.load", server.host, str(server.port), *map(str, accounts)]
    command += ["--seconds", str(seconds), "--clients", str(clients)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=seconds + 60)
    return Report.from_json(ended.stdout.decode())


def _server(url: str, workers: int, batching: str) -> Server:
    return Server(CONFIGURATION, {"DATABASE_URL": url, "BATCHING": batching}, ["--workers", str(workers)])


@contextmanager
def _database(url: str | None) -> Iterator[str]:
    """The given one, or a file that is gone afterwards; with its tables, and set up for this process too."""
    from examples.wallet.__main__ import migrate

    with TemporaryDirectory(prefix="wallet-") as directory:
        os.environ["DATABASE_URL"] = url or f"sqlite:///{Path(directory, 'wallet.sqlite')}"
        migrate()
        yield os.environ["DATABASE_URL"]


def _heading(seconds: float, clients: int, workers: int, url: str) -> str:
    return (
        f"{clients} clients in a closed loop on {ACCOUNTS} accounts, three transfers to a deposit; gunicorn workers: "
        f"{workers}; {url.partition(':')[0]}.\n"
        f"Each server has {TURNS} turns of {seconds / (2 * TURNS):g} s, one after the other one's, "
        "measured until the last answer."
    )

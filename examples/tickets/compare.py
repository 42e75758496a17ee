"""The same load on two servers in turn, one with batching and one without, and what came of it as a table."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from examples.server import ROOT, Server
from examples.table import Row, Statuses, show
from examples.tickets.domain import taken
from examples.tickets.load import Report
from examples.tickets.settings import CONFIGURATION, TRAINS
from examples.tickets.storage import AnyStore, SeatMap, open_store

TRAIN = "ICE 1"
# Each server has this many turns, so that neither has all the quiet moments of the machine.
TURNS = 2
MEANING = Statuses(answered=("200", "201"), refused=("409", "403"), again=("503",), unknown="5xx, cut")


def compare(seconds: float, clients: int, workers: int, database_url: str | None) -> bool:
    """Print the table; True when the database holds what the clients were told."""
    rows = [Row("batching", MEANING), Row("batching=False", MEANING)]
    with _database(database_url) as url, _server(url, workers, "on") as on, _server(url, workers, "off") as off:
        store = open_store(url)
        print(_heading(seconds, clients, workers, url), flush=True)
        wrong = [
            problem
            for _ in range(TURNS)
            for row, server in zip(rows, (on, off), strict=True)
            for problem in _turn(row, server, store, seconds / (2 * TURNS), clients)
        ]
        store.close()
    show(rows)
    print(*wrong or ["Checked: every seat, and every change answered as saved, is in the database."], sep="\n")
    return not wrong


def _turn(row: Row, server: Server, store: AnyStore, seconds: float, clients: int) -> list[str]:
    before = store.seat_map(TRAIN)
    [report] = load(server.host, server.port, [TRAIN], seconds, clients)
    after = store.seat_map(TRAIN)
    changes, saves = after.train.changes - before.train.changes, after.saves - before.saves
    row.add(report.seconds, report.latencies, report.statuses, changes, saves)
    return differences(report, before, after)


def differences(report: Report, before: SeatMap, after: SeatMap) -> list[str]:
    """Where the database says something else than the clients were told."""
    found = taken(after.train.seats)
    told = {seat: name for name, seats in report.held.items() for seat in seats}
    wrong = [
        f"seat {seat}: the clients were told {told.get(seat)}, the database has {found.get(seat)}"
        for seat in sorted((told.keys() | found.keys()) - set(report.unsure))
        if told.get(seat) != found.get(seat)
    ]
    answered = report.statuses["200"] + report.statuses["201"]
    saved = after.train.changes - before.train.changes
    if not answered <= saved <= answered + len(report.unsure):
        wrong.append(f"{answered} changes were answered as saved, the database has {saved}")
    return wrong


def load(host: str, port: int, trains: Sequence[str], seconds: float, clients: int) -> list[Report]:
    """Run the clients in a process of their own, so that they do not share a hub with anybody."""
    command = [sys.executable, "-m", "examples.tickets.load", host, str(port), *trains]
    command += ["--seconds", str(seconds), "--clients", str(clients)]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=seconds + 60)
    return Report.from_json(ended.stdout.decode())


def _server(url: str, workers: int, batching: str) -> Server:
    return Server(CONFIGURATION, {"DATABASE_URL": url, "BATCHING": batching}, ["--workers", str(workers)])


@contextmanager
def _database(url: str | None) -> Iterator[str]:
    """The given one, or a file that is gone afterwards; with its trains, so that nobody waits for them."""
    with TemporaryDirectory(prefix="tickets-") as directory:
        url = url or f"sqlite:///{Path(directory, 'tickets.sqlite')}"
        store = open_store(url)
        store.create(TRAINS)
        store.close()
        yield url


def _heading(seconds: float, clients: int, workers: int, url: str) -> str:
    database = url.partition(":")[0]
    return (
        f"{clients} clients in a closed loop on one train ({TRAIN}, {TRAINS[TRAIN]} seats), "
        f"{workers} gunicorn workers, {database}.\n"
        f"Each server has {TURNS} turns of {seconds / (2 * TURNS):g} s, one after the other one's, "
        "measured until the last answer."
    )

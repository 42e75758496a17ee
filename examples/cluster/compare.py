"""The same load routed by train and in turn, with one backend and with more: a table.

    python -m examples.cluster.compare

The trains are in the database that DATABASE_URL names, postgresql://… or redis://…, or else in a PostgreSQL of its own,
which is gone afterwards. All backends run all the time; nginx sends work to some of them, and is reloaded in between.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence

from examples.cluster.backends import Cluster
from examples.cluster.database import database
from examples.table import Row, show
from examples.tickets.compare import MEANING, differences, load
from examples.tickets.storage import AnyStore, open_store

ROUTINGS = {"by train": True, "in turn": False}
LOADS = {
    "one train": {"ICE 1": 400},
    "50 trains": {f"Shuttle {number}": 40 for number in range(1, 51)},
}
"""The trains of each load, with their seats."""
MOST_SHOWN = 5


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m examples.cluster.compare", description=__doc__)
    parser.add_argument("--backends", type=int, nargs="+", default=[1, 2, 3, 4], metavar="N")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=100)
    chosen = parser.parse_args()
    return 0 if compare(chosen.backends, chosen.rounds, chosen.seconds, chosen.clients) else 1


def compare(backends: Sequence[int], rounds: int, seconds: float, clients: int) -> bool:
    """Print a table for each load; True when the database holds what the clients were told."""
    wrong: list[str] = []
    with database(os.environ.get("DATABASE_URL")) as url, Cluster(url, max(backends)) as cluster:
        print(_heading(rounds, seconds, clients, url), flush=True)
        for name, trains in LOADS.items():
            measured = _Load(cluster, url, list(trains), seconds, clients)
            measured.store.create(trains)
            rows = {
                (count, routing): Row(f"{count} {routing}", MEANING, replays=0)
                for count in backends
                for routing in ROUTINGS
            }
            # One after the other, again and again, so that none has all the quiet moments of the machine.
            for _ in range(rounds):
                for (count, routing), row in rows.items():
                    cluster.route(count, by_train=ROUTINGS[routing])
                    wrong += measured.turn(row)
            measured.store.close()
            print(f"\n{name}")
            show(list(rows.values()))
    told = wrong[:MOST_SHOWN] or ["Checked: every seat, and every change answered as saved, is in the database."]
    print(*told, sep="\n")
    return not wrong


class _Load:
    """One load, sent through the nginx of a cluster."""

    def __init__(self, cluster: Cluster, url: str, trains: Sequence[str], seconds: float, clients: int) -> None:
        self.store: AnyStore = open_store(url)
        self._cluster = cluster
        self._trains = trains
        self._seconds = seconds
        self._clients = clients

    def turn(self, row: Row) -> list[str]:
        """Send it for some time; give where the database says something else than the clients were told."""
        nginx = self._cluster.nginx
        replays = self._replays()
        before = {train: self.store.seat_map(train) for train in self._trains}
        reports = load(nginx.host, nginx.port, self._trains, self._seconds, self._clients)
        latencies: list[float] = []
        statuses: Counter[str] = Counter()
        wrong: list[str] = []
        operations = batches = 0
        for report in reports:
            after = self.store.seat_map(report.train)
            operations += after.train.changes - before[report.train].train.changes
            batches += after.saves - before[report.train].saves
            latencies += report.latencies
            statuses += report.statuses
            wrong += differences(report, before[report.train], after)
        row.add(max(report.seconds for report in reports), latencies, statuses, operations, batches)
        row.replays = (row.replays or 0) + self._replays() - replays
        return wrong

    def _replays(self) -> int:
        return sum(self._cluster.health(name)["replays"] for name in self._cluster.backends)


def _heading(rounds: int, seconds: float, clients: int, url: str) -> str:
    return (
        f"{clients} clients in a closed loop; so many backends, by train or in turn; {url.partition(':')[0]}.\n"
        f"Each line is {rounds} turns of {seconds:g} s, one after the other lines'. Clients, nginx, backends and "
        "database share this machine's cores."
    )


if __name__ == "__main__":
    sys.exit(main())

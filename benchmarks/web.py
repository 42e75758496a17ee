"""The tickets application over HTTP: what is left of its throughput with batches, and with a transaction per request.

`examples/tickets` under gunicorn with one gevent worker, 200 and 1,000 connections of wrk, which book the seats of one
train in PostgreSQL and give them back. The endpoint with nothing behind it; with a wait of 2 ms and nothing else, which
is what greenlets cost that wait for whatever it be; as it is, with batches, and so with Python's own settings of the
garbage collector; with a transaction for each request, by `SELECT … FOR UPDATE` and by one atomic `UPDATE … WHERE`, on
psycopg and a fair pool at the best of several sizes.

The ways take turns in one run; each figure is the median of the turns (least to most), each ratio that of one turn.
After each turn the changes in the database are compared with the answers. Worker, wrk and server share the machine's
cores.

Run it from the repository: ``python -m benchmarks.web [--short] [--json FILE]``. It needs wrk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from gevent import monkey

monkey.patch_all()

import psycopg

from benchmarks.ways import server_settings, spread
from examples.client import Connection
from examples.server import Server
from examples.tickets.domain import Train
from examples.tickets.settings import CONFIGURATION
from examples.tickets.storage import Store, encode
from tests.support.servers import database

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING, ONLY_WAIT = "nothing", "only a wait"
BATCHED = ("batched", "default gc")
PER_REQUEST = ("row lock", "atomic UPDATE")
POOLS = (2, 5, 20)
WRK = which("wrk") or ""

CONNECTIONS = (200, 1000)
TRAINS = {f"Train{connections}": 2 * connections for connections in CONNECTIONS}
"""Seats enough that one has been booked long before it is given back."""


class Turn(NamedTuple):
    """What one way reached in one turn."""

    rate: float
    """Changes answered as saved, per second."""
    p50: float
    p99: float
    """Milliseconds."""
    refused: int
    operations: float
    """In one batch, the median."""
    load_and_save: float
    """Milliseconds of one batch, the median."""
    cpu: float
    """Microseconds of the worker for each change."""


@dataclass
class Way:
    """One of the ways, and the server that goes it."""

    name: str
    pool: int | None
    server: Server
    url: str
    turns: list[Turn] = field(default_factory=list)

    def turn(self, connections: int, seconds: float) -> Turn:
        """Have wrk send for so long; compare its answers with what is in the database."""
        train = f"Train{connections}"
        begin_empty(self.url, train)
        before = self._measured()
        script, at = Path(__file__).with_name("web.lua"), f"http://{self.server.host}:{self.server.port}"
        command = [WRK, "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout=30s", "-s", str(script), at]
        command += ["--", train, str(TRAINS[train])]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(ended.stdout.splitlines()[-1])
        if found["broken"]:
            raise AssertionError(f"{self.name}: {found['broken']} connections broke")
        measured = self._measured()
        changed = found["answered"] - found["refused"]
        self._check(train, changed, connections)
        return Turn(
            changed / found["seconds"],
            found["p50"],
            found["p99"],
            found["refused"],
            measured["operations"],
            measured["load_and_save"] * 1000,
            (measured["cpu"] - before["cpu"]) / max(1, changed) * 1e6,
        )

    def _check(self, train: str, changed: int, connections: int) -> None:
        if self.name in {NOTHING, ONLY_WAIT}:
            return
        before, saved = -1, (at_once := changes(self.url, self.name, train))
        while before != saved:  # what was sent and not answered any more comes to its end
            time.sleep(0.2)
            before, saved = saved, changes(self.url, self.name, train)
        if not changed <= at_once <= saved <= changed + connections:
            raise AssertionError(f"{self.name}: {changed} changes were answered, but {saved} are in the database")

    def _measured(self) -> dict[str, float]:
        connection = Connection(self.server.host, self.server.port)
        _, found = connection.ask("GET", "/measured")
        connection.close()
        measured: dict[str, float] = found
        return measured


# -- the database -------------------------------------------------------------------------------------------


def create_trains(url: str) -> None:
    """Have them in both forms: a document, as the example keeps them, and a row with an array of seats."""
    store = Store(url)
    store.create(TRAINS)
    store.close()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE trains (name text PRIMARY KEY, seats text[], changes bigint)")
        for train, seats in TRAINS.items():
            connection.execute("INSERT INTO trains VALUES (%s, %s, 0)", (train, [None] * seats))


def begin_empty(url: str, train: str) -> None:
    """Set all its seats free."""
    empty = Train.empty(train, TRAINS[train])
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE seat_maps SET state = %s WHERE key = %s", (encode(empty), train))
        connection.execute("UPDATE trains SET seats = %s, changes = 0 WHERE name = %s", (empty.seats, train))


def changes(url: str, way: str, train: str) -> int:
    """How many there were since."""
    of_document = "SELECT (state::json->>'changes')::bigint FROM seat_maps WHERE key = %s"
    of_row = "SELECT changes FROM trains WHERE name = %s"
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(of_document if way in BATCHED else of_row, (train,)).fetchone()
    assert row is not None
    return int(row[0])


# -- the table ----------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """What a way reached with so many connections."""

    connections: int
    way: str
    pool: int | None
    turns: list[Turn]


@dataclass
class Benchmark:
    """Servers on one database, which are kept: one that nobody asks costs nothing."""

    url: str
    stack: ExitStack
    servers: dict[tuple[str, int | None], Server] = field(default_factory=dict)

    def way(self, name: str, pool: int | None = None) -> Way:
        """Have a server for it."""
        if (name, pool) not in self.servers:
            environment = {"DATABASE_URL": self.url, "WAY": name, "POOL": str(pool)}
            if name == "default gc":
                environment["GEVENTBATCH_FREEZE"] = "0"
            arguments = ("--workers", "1", "benchmarks.web_app:app")
            self.servers[name, pool] = self.stack.enter_context(Server(CONFIGURATION, environment, arguments))
        return Way(name, pool, self.servers[name, pool], self.url)

    def best_pool(self, name: str, connections: int, pools: Sequence[int]) -> Way:
        """Try all of them for a second."""
        ways = [self.way(name, pool) for pool in pools]
        return ways[0] if len(ways) == 1 else max(ways, key=lambda way: way.turn(connections, 1).rate)

    def measure(self, connections: int, turns: int, seconds: float, pools: Sequence[int]) -> list[Line]:
        """Let all ways take turns."""
        ways = [self.way(name) for name in (NOTHING, ONLY_WAIT, *BATCHED)]
        ways += [self.best_pool(name, connections, pools) for name in PER_REQUEST]
        for way in ways:
            way.turn(connections, min(1.0, seconds))
        for _ in range(turns):
            for way in ways:
                way.turns.append(way.turn(connections, seconds))
        return [Line(connections, way.name, way.pool, way.turns) for way in ways]


COLUMNS = "{:<28}{:>26}{:>18}{:>10}{:>32}{:>24}{:>9}{:>11}{:>12}"
HEADS = ("changes/s", "% of nothing's", "p50 ms", "p99 ms", "CPU µs/change", "refused", "per batch", "load, save")


def show(lines: list[Line]) -> None:
    """Print them, with their part of what nothing reached in the same turn."""
    print(f"\n{lines[0].connections:,} connections")
    print(COLUMNS.format("", *HEADS))
    for line in lines:
        rates = [turn.rate for turn in line.turns]
        parts = [turn.rate / nothing.rate * 100 for turn, nothing in zip(line.turns, lines[0].turns, strict=True)]
        in_batches = line.way in BATCHED
        cells = [
            spread(rates, ",.0f"),
            spread(parts, ".0f"),
            f"{statistics.median(turn.p50 for turn in line.turns):,.1f}",
            spread([turn.p99 for turn in line.turns], ",.1f"),
            spread([turn.cpu for turn in line.turns], ",.0f"),
            f"{sum(turn.refused for turn in line.turns):,}",
            f"{statistics.median(turn.operations for turn in line.turns):,.0f}" if in_batches else "",
            f"{statistics.median(turn.load_and_save for turn in line.turns):,.1f} ms" if in_batches else "",
        ]
        name = line.way if line.pool is None else f"{line.way}, pool of {line.pool}"
        print(COLUMNS.format(f"  {name}", *cells).rstrip(), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each, and 200 connections only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    chosen = parser.parse_args()
    if not WRK:
        sys.exit("benchmarks.web needs wrk, which is not on the PATH: apt-get install wrk (Debian), brew install wrk")
    turns, seconds, pools = (1, 1.0, (5,)) if chosen.short else (5, 3.0, POOLS)
    numbers = CONNECTIONS[:1] if chosen.short else CONNECTIONS
    everything: list[Line] = []
    with TemporaryDirectory() as directory, database("postgresql", Path(directory)) as url, ExitStack() as stack:
        create_trains(url)
        print(server_settings(url))
        benchmark = Benchmark(url, stack)
        for connections in numbers:
            lines = benchmark.measure(connections, turns, seconds, pools)
            show(lines)
            everything += lines
    if chosen.json:
        written: list[dict[str, Any]] = [
            line._asdict() | {"turns": [one._asdict() for one in line.turns]} for line in everything
        ]
        chosen.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()

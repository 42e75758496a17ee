"""One hot row in PostgreSQL: what each way reaches, with 1 to 5,000 callers in a closed loop in one process.

Per request, with psycopg and a fair pool at the best of several sizes: `SELECT … FOR UPDATE`, one atomic
`UPDATE … WHERE`, version and retry, an advisory lock. Against batches of `SQLAlchemyStore.documents` with a
`min_duration` of 0, 1, 10 and 100 ms, in mode "lock", and in mode "version" without and with `reuse_resource`. With 0,
1 and 2 ms of round trip added by a proxy, in a process of its own.

The ways take turns in one run; each figure is the median of the turns (least to most). With one caller, batches say
what it waits beside load and save, too. After each turn the counter in the database is compared with the operations
that were answered. Callers, proxy and server share the machine's cores.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.hot_row [--short] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gevent import monkey

monkey.patch_all()

import gevent

from benchmarks.as_served import as_served
from benchmarks.away import away, round_trip
from benchmarks.ways import (
    Advisory,
    Atomic,
    Batches,
    ForUpdate,
    PerRequest,
    Retry,
    Way,
    begin_at_zero,
    check,
    closed_loop,
    create_tables,
    server_settings,
    spread,
)
from geventbatch.stores import Reuse
from tests.support.servers import postgres_url

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "hot"
POOLS = (1, 2, 5, 20)

PER_REQUEST: dict[str, type[PerRequest]] = {
    "SELECT … FOR UPDATE": ForUpdate,
    "UPDATE … WHERE": Atomic,
    "version, retry": Retry,
    "advisory lock": Advisory,
}
BATCHED: dict[str, Callable[[str], Way]] = {
    "batches, lock": lambda url: Batches(url, "lock"),
    "batches, lock, 1 ms": lambda url: Batches(url, "lock", 0.001),
    "batches, lock, 10 ms": lambda url: Batches(url, "lock", 0.01),
    "batches, lock, 100 ms": lambda url: Batches(url, "lock", 0.1),
    "batches, version": lambda url: Batches(url, "version"),
    "batches, version, reuse": lambda url: Batches(url, "version", reuse=Reuse()),
}

AHEAD = ("batches, lock", "UPDATE … WHERE")


class Turn(NamedTuple):
    """What a way reached in one turn."""

    rate: float
    p50: float
    p99: float
    replays: float
    beyond: float | None
    """Microseconds that a lone caller of batches waits beside load and save, the median."""


@dataclass(frozen=True)
class Line:
    """What a way reached."""

    milliseconds_away: float
    callers: int
    way: str
    pool: int | None
    turns: list[Turn]

    @property
    def rates(self) -> list[float]:
        """Operations per second, of each turn."""
        return [turn.rate for turn in self.turns]


def turn(way: Way, callers: int, warm_up: float, seconds: float) -> tuple[Turn, int]:
    """Have *callers* add to the counter again and again; give also how many were answered in all."""
    loop = closed_loop(way, lambda: way.add(KEY), callers, warm_up, seconds)
    gevent.sleep(0.01)  # until the last metric has been looked at
    beyond = [(taken - inside) * 1e6 for taken, inside in zip(loop.every, way.inside, strict=False)]
    return Turn(
        loop.rate,
        loop.percentile(50),
        loop.percentile(99),
        way.replays / len(loop.every),
        statistics.median(beyond) if beyond and callers == 1 else None,
    ), len(loop.every)


@dataclass(frozen=True)
class Place:
    """A database, and how far it is away."""

    url: str
    reached: str
    """The URL of the proxy that delays."""
    milliseconds: float

    def checked(self, opens: Callable[[str], Way], callers: int, warm_up: float, seconds: float) -> Turn:
        """Take a turn, and compare its result with what the database has."""
        begin_at_zero(self.url, [KEY])
        with opens(self.reached) as way:
            reached, answered = turn(way, callers, warm_up, seconds)
        check(self.url, way.table, answered)
        return reached

    def measure(self, callers: int, turns: int, seconds: float) -> list[Line]:
        """Let all ways take turns."""
        pools = {name: self._best_pool(name, callers, min(0.3, seconds)) for name in PER_REQUEST}
        ways = {name: per_request(name, pool) for name, pool in pools.items()} | BATCHED
        lines = [Line(self.milliseconds, callers, name, pools.get(name), []) for name in ways]
        for _ in range(turns):
            for line, opens in zip(lines, ways.values(), strict=True):
                line.turns.append(self.checked(opens, callers, min(0.2, seconds), seconds))
        return lines

    def _best_pool(self, name: str, callers: int, seconds: float) -> int:
        rates = {
            pool: self.checked(per_request(name, pool), callers, 0.1, seconds).rate for pool in POOLS if pool <= callers
        }
        return max(rates, key=rates.__getitem__)


def per_request(name: str, pool: int) -> Callable[[str], Way]:
    """Give what opens that way."""
    return lambda url: PER_REQUEST[name](url, pool)


COLUMNS = "{:<32}{:>28}{:>26}{:>25}{:>10}{:>10}"


def show(lines: list[Line]) -> None:
    """Print them under their titles, with their ratios to two of them in the same turns."""
    first = lines[0]
    print(f"\n{first.callers:,} callers, {first.milliseconds_away:g} ms away")
    print(COLUMNS.format("", "operations/s", "× FOR UPDATE", "× UPDATE", "p50 ms", "p99 ms"))
    against = [next(line for line in lines if line.way == way) for way in list(PER_REQUEST)[:2]]
    for line in lines:
        ratios = [
            spread([one / other for one, other in zip(line.rates, to.rates, strict=True)], ",.1f") for to in against
        ]
        cells = [
            spread(line.rates, ",.0f"),
            *ratios,
            f"{statistics.median(turn.p50 for turn in line.turns):,.1f}",
            f"{statistics.median(turn.p99 for turn in line.turns):,.1f}",
        ]
        name = line.way if line.pool is None else f"{line.way}, pool of {line.pool}"
        beyond = [turn.beyond for turn in line.turns if turn.beyond is not None]
        note = f"   load + save + {spread(beyond, ',.0f')} µs" if beyond else ""
        print(COLUMNS.format(f"  {name}", *cells) + note, flush=True)


def crossing(lines: list[Line]) -> str:
    """Say from how many callers on batches are ahead of the atomic `UPDATE`; *lines* are of one distance."""
    rates = {way: {line.callers: statistics.median(line.rates) for line in lines if line.way == way} for way in AHEAD}
    batches, updates = rates.values()
    # However many come, the row takes so many UPDATEs; a batch takes as long as that of a lone caller, and takes all.
    foretold = max(updates.values()) / batches[1]
    before: tuple[float, float] | None = None
    for callers in sorted(batches):
        at, ratio = math.log(callers), math.log(batches[callers] / updates[callers])
        if ratio >= 0:
            seen = at if before is None else before[0] - before[1] * (at - before[0]) / (ratio - before[1])
            return f"{math.exp(seen):.0f} callers (the UPDATEs a second × the seconds of a batch: {foretold:.0f})"
        before = at, ratio
    return f"more callers than were tried (the UPDATEs a second × the seconds of a batch: {foretold:.0f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each, fewer callers and distances")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    chosen = parser.parse_args()
    turns, seconds = (1, 0.2) if chosen.short else (3, 0.7)
    numbers = (1, 20, 1000) if chosen.short else (1, 5, 20, 100, 1000, 5000)
    distances = (0, 2) if chosen.short else (0, 1, 2)
    url = postgres_url()
    create_tables(url)
    print(server_settings(url), as_served(), sep="\n")
    lines: list[Line] = []
    for milliseconds in distances:
        with away(url, milliseconds / 1000) as reached:
            print(f"\n{milliseconds} ms away, SELECT 1 takes {round_trip(reached) * 1000:.2f} ms")
            for callers in numbers:
                measured = Place(url, reached, milliseconds).measure(callers, turns, seconds)
                show(measured)
                lines += measured
            of_distance = [line for line in lines if line.milliseconds_away == milliseconds]
            print(f"\n{milliseconds} ms away, batches are ahead of UPDATE … WHERE from {crossing(of_distance)}")
    if chosen.json:
        written = [vars(line) | {"turns": [one._asdict() for one in line.turns]} for line in lines]
        chosen.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()

"""Many keys: 1,000 callers in a closed loop on 10,000 counters in PostgreSQL, each time on one of them at random.

Per request, with psycopg and a fair pool at the best of several sizes: `SELECT … FOR UPDATE` in a transaction, and one
atomic `UPDATE … WHERE`. Against batches of `SQLAlchemyStore.documents`, of one key each, and in bulks of up to 100 and
of up to 1,000 keys, in the modes "lock" and "version". With 0 and 1 ms of round trip added by a proxy.

The ways take turns in one run; each figure is the median of the turns (least to most), each ratio that of one turn.
After each turn the counters in the database are compared with the operations that were answered. Callers, proxy and
server share the machine's cores.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.many_keys [--short] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gevent import monkey

monkey.patch_all()


from benchmarks.as_served import as_served
from benchmarks.away import away, round_trip
from benchmarks.ways import (
    Atomic,
    Batches,
    ForUpdate,
    PerRequest,
    Way,
    begin_at_zero,
    check,
    closed_loop,
    create_tables,
    server_settings,
    spread,
)
from tests.support.servers import postgres_url

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = 10_000
CALLERS = 1_000
POOLS = (2, 5, 20)

TRANSACTION = "transaction, FOR UPDATE"
PER_KEY = "batches of one key, lock"

PER_REQUEST: dict[str, type[PerRequest]] = {TRANSACTION: ForUpdate, "UPDATE … WHERE": Atomic}
BATCHED: dict[str, Callable[[str], Way]] = {
    PER_KEY: lambda url: Batches(url, "lock"),
    "batches of one key, version": lambda url: Batches(url, "version"),
    "bulks of 100, lock": lambda url: Batches(url, "lock", max_bulk=100),
    "bulks of 1,000, lock": lambda url: Batches(url, "lock", max_bulk=1000),
    "bulks of 1,000, version": lambda url: Batches(url, "version", max_bulk=1000),
}


@dataclass(frozen=True)
class Line:
    """What a way reached."""

    milliseconds_away: float
    way: str
    pool: int | None
    rates: list[float]
    """Operations per second, of each turn."""
    p99: list[float]
    """Milliseconds."""


def turn(way: Way, keys: int, callers: int, seconds: float) -> tuple[float, float, int]:
    """Give operations per second, milliseconds of the 99th percentile, and how many were answered in all."""
    chance = random.Random(0)
    loop = closed_loop(way, lambda: way.add(f"key {chance.randrange(keys)}"), callers, min(0.5, seconds), seconds)
    return loop.rate, loop.percentile(99), len(loop.every)


def checked(url: str, reached: str, opens: Callable[[str], Way], size: tuple[int, int, float]) -> tuple[float, float]:
    """Take a turn, and compare its result with what the database has."""
    begin_at_zero(url, [f"key {number}" for number in range(size[0])])
    with opens(reached) as way:
        rate, p99, answered = turn(way, *size)
    check(url, way.table, answered)
    return rate, p99


def measure(url: str, reached: str, milliseconds: float, turns: int, size: tuple[int, int, float]) -> list[Line]:
    """Let all ways take turns."""
    ways: dict[str, Callable[[str], Way]] = {}
    lines: list[Line] = []
    for name, kind in PER_REQUEST.items():
        rates = {pool: checked(url, reached, _of(kind, pool), (*size[:2], 0.3))[0] for pool in POOLS}
        pool = max(rates, key=rates.__getitem__)
        ways[name] = _of(kind, pool)
        lines.append(Line(milliseconds, name, pool, [], []))
    ways |= BATCHED
    lines += [Line(milliseconds, name, None, [], []) for name in BATCHED]
    for _ in range(turns):
        for line in lines:
            rate, p99 = checked(url, reached, ways[line.way], size)
            line.rates.append(rate)
            line.p99.append(p99)
    return lines


def _of(kind: type[PerRequest], pool: int) -> Callable[[str], Way]:
    return lambda url: kind(url, pool)


COLUMNS = "{:<36}{:>28}{:>24}{:>24}{:>10}"


def show(lines: list[Line]) -> None:
    """Print them, with their ratios to two of them in the same turns."""
    print(COLUMNS.format("", "operations/s", "× transaction", "× per key", "p99 ms"))
    against = [next(line for line in lines if line.way == way) for way in (TRANSACTION, PER_KEY)]
    for line in lines:
        ratios = [
            spread([one / other for one, other in zip(line.rates, to.rates, strict=True)], ",.1f") for to in against
        ]
        name = line.way if line.pool is None else f"{line.way}, pool of {line.pool}"
        cells = (spread(line.rates, ",.0f"), *ratios, f"{statistics.median(line.p99):,.0f}")
        print(COLUMNS.format(f"  {name}", *cells), flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each, near the database")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    chosen = parser.parse_args()
    turns, size = (1, (KEYS, CALLERS, 0.3)) if chosen.short else (5, (KEYS, CALLERS, 1.0))
    url = postgres_url()
    create_tables(url)
    print(server_settings(url), as_served(), sep="\n")
    lines: list[Line] = []
    for milliseconds in (0,) if chosen.short else (0, 1):
        with away(url, milliseconds / 1000) as reached:
            print(f"\n{CALLERS:,} callers, {KEYS:,} keys, {milliseconds} ms away", end="")
            print(f": SELECT 1 takes {round_trip(reached) * 1000:.2f} ms")
            measured = measure(url, reached, milliseconds, turns, size)
            show(measured)
            lines += measured
    if chosen.json:
        chosen.json.write_text(json.dumps([vars(line) for line in lines], indent=1))


if __name__ == "__main__":
    main()

"""Transfers between accounts in PostgreSQL: 20, 100 and 1,000 callers in a closed loop in one process.

With `run_across` over documents, mapped classes and Django models. Against the plain transaction that locks both rows
in order, at the best of several pools, through psycopg and by Django's means; against one ledger key in whose batches
all accounts are changed; and against batches of one transfer. With 0 and 1 ms of round trip added by a proxy.

- One account is in every transfer, the other is one of 100: with a row of an audit each, and without.
- Any two of 10,000 accounts.
- Operations of one key on 10,000 accounts: bulks, against batches of one key.
- How long Redis is held by the script that saves 1,000 hashes which transfers connect.

The ways take turns in one run; each figure is the median of the turns (least to most), each ratio that of one turn.
After each turn the sum of all accounts, the number of transfers and the rows of the audit are compared with what was
answered. Where there is a target, it is printed beside what was reached. Callers, proxy and server share the machine's
cores.

The garbage collector is set as in a server's worker, before the first turn, for every way alike.

Run it from the repository: ``python -m benchmarks.transfers [--short] [--json FILE] [--without FORM …]
[--shapes SHAPE …] [--callers NUMBER …]``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from gevent import monkey

monkey.patch_all()


from benchmarks.as_served import as_served
from benchmarks.away import away, round_trip
from benchmarks.transfer_ways import (
    Batched,
    DjangoTransaction,
    Form,
    LedgerKey,
    Transaction,
    begin_rich,
    check,
    create_tables,
)
from benchmarks.transfers_in_redis import Held, hold
from benchmarks.ways import closed_loop, server_settings, spread
from tests.support.servers import postgres_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

POOLS = (2, 5, 20)
MANY = 10_000

PLAIN = "transaction"
LEDGER = "ledger key, audit"


@dataclass(frozen=True)
class Way:
    """A way, as a line of a table."""

    opens: Callable[..., Any]
    """With a URL; and with a pool, if it has `pooled`."""
    audit: bool = False
    pooled: bool = False
    form: Form | None = None
    """Of the store across whose keys it runs."""


@dataclass(frozen=True)
class Target:
    """What a way is to reach."""

    ratio: float
    against: str
    """Another way, in the same turn."""
    callers: int
    milliseconds: float | None = None
    """How far away; None: wherever."""

    def reached(self, ratio: float) -> str:
        """Say whether."""
        told = "reached" if ratio >= self.ratio else "MISSED"
        return f"  target {self.ratio:.3g} × {self.against}: {ratio:,.1f}, {told}"


@dataclass(frozen=True)
class Shape:
    """Which accounts are in a transfer."""

    title: str
    accounts: int
    ways: dict[str, Way]
    targets: dict[str, tuple[Target, ...]]
    against: tuple[str, ...]
    """The ways whose ratios are shown."""
    keys: int = 2
    hot: bool = False

    def pick(self, chance: random.Random) -> tuple[int, int]:
        """Give two, or for operations of one key only the first of them."""
        if self.hot:
            pair = 0, chance.randrange(1, self.accounts)
            return pair if chance.random() < 0.5 else pair[::-1]
        first, second = chance.randrange(self.accounts), chance.randrange(self.accounts - 1)
        return first, second + (second >= first)


def _batched(form: Form, mode: Any = "lock", **options: Any) -> Way:
    return Way(partial(Batched, form=form, mode=mode, **options), audit=options.get("audit", False), form=form)


HOT: Final = Shape(
    "one account in every transfer, the other of 100",
    101,
    {
        PLAIN: Way(Transaction, pooled=True),
        "transaction, audit": Way(partial(Transaction, audit=True), audit=True, pooled=True),
        "transaction, Django": Way(DjangoTransaction, pooled=True),
        LEDGER: Way(partial(LedgerKey, audit=True), audit=True),
        "ledger key": Way(LedgerKey),
        "one transfer a batch, documents": _batched("documents", alone=True),
        "documents": _batched("documents"),
        "documents, version": _batched("documents", "version"),
        "documents, audit": _batched("documents", audit=True),
        "mapped": _batched("mapped"),
        "mapped, audit": _batched("mapped", audit=True),
        "Django": _batched("Django"),
        "Django, audit": _batched("Django", audit=True),
    },
    {
        "documents": (Target(25, PLAIN, 100), Target(3, LEDGER, 100), Target(20_000 / 600, PLAIN, 1000)),
        "mapped": (Target(15, PLAIN, 100),),
        "Django": (Target(8, PLAIN, 100),),
        **{f"{form}, audit": (Target(1, LEDGER, 100),) for form in get_args(Form)},
    },
    (PLAIN, LEDGER),
    hot=True,
)

SPREAD: Final = Shape(
    f"any two of {MANY:,} accounts",
    MANY,
    {
        PLAIN: Way(Transaction, pooled=True),
        "transaction, Django": Way(DjangoTransaction, pooled=True),
        "ledger key": Way(LedgerKey),
        "one transfer a batch, documents": _batched("documents", alone=True),
        "documents": _batched("documents"),
        "documents, version": _batched("documents", "version"),
        "mapped": _batched("mapped"),
        "Django": _batched("Django"),
    },
    {form: (Target(2, PLAIN, 1000, 0), Target(5, PLAIN, 1000, 1)) for form in get_args(Form)},
    (PLAIN, "ledger key"),
)

SINGLE: Final = Shape(
    f"operations of one key, {MANY:,} keys",
    MANY,
    {
        f"{form}, {name}": _batched(form, of_keys=of_keys)
        for form in get_args(Form)
        for name, of_keys in (("batches of one key", "each"), ("bulks", "many"))
    },
    {
        "mapped, bulks": (Target(8, "mapped, batches of one key", 1000, 1),),
        "Django, bulks": (Target(5, "Django, batches of one key", 1000, 1),),
    },
    tuple(f"{form}, batches of one key" for form in get_args(Form)),
    keys=1,
)


@dataclass
class Line:
    """What a way reached."""

    shape: str
    milliseconds_away: float
    callers: int
    way: str
    pool: int | None = None
    rates: list[float] = field(default_factory=list)
    """Per second, of each turn."""
    p99: list[float] = field(default_factory=list)
    """Milliseconds."""

    def ratios(self, to: Line) -> list[float]:
        """Give those of each turn."""
        return [one / other if other else float("nan") for one, other in zip(self.rates, to.rates, strict=True)]


def turn(way: Any, shape: Shape, callers: int, seconds: float) -> tuple[float, float, int]:
    """Give operations per second, milliseconds of the 99th percentile, and how many were answered in all."""
    chance = random.Random(0)

    def run() -> None:
        source, target = shape.pick(chance)
        if shape.keys == 1:
            way.add(source)
        else:
            way.transfer(source, target, 1)

    loop = closed_loop(way, run, callers, min(0.4, seconds), seconds)
    return loop.rate, loop.percentile(99), len(loop.every)


@dataclass(frozen=True)
class Place:
    """A database, and how far it is away."""

    url: str
    reached: str
    """The URL of the proxy that delays."""
    milliseconds: float

    def checked(self, shape: Shape, way: Way, pool: int | None, callers: int, seconds: float) -> tuple[float, float]:
        """Take a turn, and compare its result with what the database has."""
        begin_rich(self.url, shape.accounts)
        with way.opens(self.reached, **({} if pool is None else {"pool": pool})) as opened:
            rate, p99, answered = turn(opened, shape, callers, seconds)
        check(self.url, opened, shape.accounts, answered, keys=shape.keys, audit=way.audit)
        return rate, p99

    def measure(self, shape: Shape, callers: int, turns: int, seconds: float) -> list[Line]:
        """Let all ways take turns."""
        lines = [Line(shape.title, self.milliseconds, callers, name) for name in shape.ways]
        for line in lines:
            way = shape.ways[line.way]
            line.pool = self._best_pool(shape, way, callers, min(0.3, seconds)) if way.pooled else None
        for _ in range(turns):
            for line in lines:
                rate, p99 = self.checked(shape, shape.ways[line.way], line.pool, callers, seconds)
                line.rates.append(rate)
                line.p99.append(p99)
        return lines

    def _best_pool(self, shape: Shape, way: Way, callers: int, seconds: float) -> int:
        rates = {pool: self.checked(shape, way, pool, callers, seconds)[0] for pool in POOLS}
        return max(rates, key=rates.__getitem__)


COLUMNS = "{:<40}{:>27}{:>24}{:>24}{:>9}"


def show(shape: Shape, lines: list[Line]) -> Iterator[str]:
    """Print them, with their ratios to others in the same turns. Give those cells in which the plain way wins."""
    by_way = {line.way: line for line in lines}
    against = [by_way[way] for way in shape.against if way in by_way]
    titles = [f"× {line.way}" for line in against] if shape.keys == 2 else ["× batches of one key"]
    print(f"\n{lines[0].callers:,} callers, {lines[0].milliseconds_away:g} ms away: {shape.title}")
    print(COLUMNS.format("", "per second", *titles[:2], *[""] * (2 - len(titles)), "p99 ms"))
    for line in lines:
        to = against if shape.keys == 2 else [one for one in against if one.way.split(",")[0] == line.way.split(",")[0]]
        ratios = [spread(line.ratios(other), ",.1f") for other in to]
        name = line.way if line.pool is None else f"{line.way}, pool of {line.pool}"
        cells = [spread(line.rates, ",.0f"), *ratios, *[""] * (2 - len(ratios)), f"{statistics.median(line.p99):,.0f}"]
        targets = [
            target.reached(statistics.median(line.ratios(by_way[target.against])))
            for target in shape.targets.get(line.way, ())
            if target.against in by_way
            and target.callers == line.callers
            and target.milliseconds in {None, line.milliseconds_away}
        ]
        print(COLUMNS.format(f"  {name}", *cells) + ",".join(targets), flush=True)
        if shape.ways[line.way].form is not None and statistics.median(line.ratios(to[0])) < 1:
            place = f"{line.callers:,} callers, {line.milliseconds_away:g} ms away, {shape.title}"
            yield f"{line.way}: {statistics.median(line.ratios(to[0])):.1f} × {to[0].way} ({place})"


def without(shape: Shape, forms: Sequence[str]) -> Shape:
    """Give the shape without the ways that need one of *forms*."""
    ways = {name: way for name, way in shape.ways.items() if way.form not in forms}
    return Shape(**{**vars(shape), "ways": ways})


def show_held(turns: int) -> list[tuple[int, int, list[Held]]]:
    """Print for how long Redis is held, by the number of hashes and their size."""
    found = []
    print("\nfor how long Redis is held by a batch of transfers, ms")
    print(COLUMNS.format("", "by its longest command", "by all of them", "commands", ""))
    for size in (16, 1024):
        for keys in (100, 1000):
            held = [hold(keys, size) for _ in range(turns)]
            longest, everything, commands = zip(*held, strict=True)
            cells = [spread(longest, ".2f"), spread(everything, ".2f"), f"{statistics.median(commands):,.0f}", ""]
            print(COLUMNS.format(f"  {keys:,} connected hashes of {size:,} B", *cells), flush=True)
            found.append((keys, size, held))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each, fewer callers, near the database")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    parser.add_argument("--without", nargs="+", choices=(*get_args(Form), "Redis"), default=(), help="leave forms out")
    parser.add_argument("--shapes", nargs="+", choices=("hot", "spread", "single"), default=("hot", "spread", "single"))
    parser.add_argument("--callers", nargs="+", type=int, default=(20, 100, 1000), help="so many, one after the other")
    chosen = parser.parse_args()
    turns, seconds = (1, 0.3) if chosen.short else (3, 1.0)
    shapes = {"hot": HOT, "spread": SPREAD, "single": SINGLE}
    url = postgres_url()
    create_tables(url)
    print(server_settings(url), as_served(), sep="\n")
    lines: list[Line] = []
    losing: list[str] = []
    for milliseconds in (0,) if chosen.short else (0, 1):
        with away(url, milliseconds / 1000) as reached:
            print(f"\n{milliseconds} ms away, SELECT 1 takes {round_trip(reached) * 1000:.2f} ms")
            for shape in (without(shapes[name], chosen.without) for name in chosen.shapes):
                several = tuple(chosen.callers)
                for callers in (1000,) if shape.keys == 1 else (20, 1000) if chosen.short else several:
                    measured = Place(url, reached, milliseconds).measure(shape, callers, turns, seconds)
                    losing += show(shape, measured)
                    lines += measured
    print("\nwhere batches lose:", *(losing or ["nowhere"]), sep="\n  ")
    held = [] if "Redis" in chosen.without else show_held(turns)
    if chosen.json:
        chosen.json.write_text(json.dumps({"lines": [vars(line) for line in lines], "held": held}, indent=1))


if __name__ == "__main__":
    main()

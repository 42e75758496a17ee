"""Durable execution and durable objects on one hot record and on transfers, over HTTP, beside the library.

`SELECT … FOR UPDATE` and batches behind one gevent worker of gunicorn, on PostgreSQL; virtual objects of Restate (its
server, and its Python SDK in hypercorn); workflows of DBOS on the same PostgreSQL, behind gunicorn's threads; Durable
Objects in workerd, on local files. Callers in a closed loop, each with a connection of its own; an answer only when it
is durable. For batches, Restate and DBOS each operation has an idempotency key.

The peers take turns; a rate is the median of the rounds (least to most), what else there is that of the middle one.
After each turn the accounts are compared with the answers. CPU is that of server, SDK and database.

Then what serves is killed half-way, by SIGKILL. Callers send again what was not answered if it has a key, and else go
on. "Unknown" are operations without answer and key; "stored - answered" are those of them that are saved all the same,
which would be done twice if they were sent again.

Run it from the repository: ``python -m benchmarks.durable [--short]``, with the extra "durable". The servers of Restate
and of Durable Objects come from npm, into a temporary folder, which is gone at the end; what is not here is left out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from uuid import uuid4

from gevent import monkey

monkey.patch_all()

import gevent
import psycopg
import sqlalchemy as sa

from benchmarks.durable_peers import HOST, PEERS, LeftOut, Running
from examples.client import Connection
from geventbatch.stores.sqlalchemy import idempotency_table
from tests.support.servers import database, end_postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CUSTOMERS: Final = 200
HOT: Final = "hot"
KILLED: Final = "killed"
MERCHANT: Final = "merchant"
KILLED_UNDER: Final = 20
"""Callers."""

WARM_UP: Final = 0.5
"""Seconds that are not counted."""

PAUSE: Final = 0.05
"""Seconds before an operation that failed is sent again."""

FLOOR: Final = "SELECT … FOR UPDATE"


class Turn(NamedTuple):
    """What a peer reached in one turn."""

    rate: float
    p50: float
    p99: float
    """Milliseconds, as `p50`."""

    cpu: float
    """Milliseconds of an operation."""


class Course(NamedTuple):
    """How long, and how many callers."""

    seconds: float
    rounds: int
    hot: Sequence[int]
    transfers: Sequence[int]


LONG: Final = Course(3, 2, (1, 20, 100), (20, 100))
SHORT: Final = Course(0.5, 1, (1, 20, 100), (20,))


class AfterKill(NamedTuple):
    """What a kill has left."""

    unknown: int
    failed: int
    """Tries."""

    beyond: int
    """What is stored, less what was answered."""

    silence: float
    """Seconds, the longest."""


@dataclass
class Load:
    """Callers in a closed loop, each of which does *what*, until it is stopped."""

    running: Running
    what: Callable[[int], tuple[str, Sequence[str]]]
    """Return action and accounts of the operation of this number."""

    sends_again: bool = False
    """True if an operation that has failed is sent again, with its key."""

    # -- mutable state -------------------------------------------------------------------------------------
    numbers: Iterator[int] = field(default_factory=itertools.count)
    answered_at: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    """Seconds."""

    failed: int = 0
    unknown: int = 0
    stopped: bool = False
    broken: str = ""
    """What has failed, where nothing may."""

    def call(self) -> None:
        """Be a caller."""
        connection = Connection(HOST, self.running.port)
        while not self.stopped:
            begun = time.perf_counter()
            if self._is_answered(connection, *self.running.ask(*self.what(next(self.numbers)))):
                now = time.perf_counter()
                self.answered_at.append(now)
                self.took.append(now - begun)
        connection.close()

    def _is_answered(self, connection: Connection, path: str, body: object) -> bool:
        key = uuid4().hex if self.running.is_keyed else None
        while True:
            try:
                status, said = connection.ask("POST", path, body, key=key)
            except (OSError, ValueError):
                status, said = 0, None
            if status == 200:
                return True
            self.failed += 1
            if not self.sends_again:
                self.stopped, self.broken = True, f"{path} was answered with {status}: {said}"
                return False
            gevent.sleep(PAUSE)
            if key is None:
                self.unknown += 1
                return False

    def run(self, callers: int, seconds: float, halfway: Callable[[], object] = lambda: None) -> Turn:
        """Run it, and return what it has reached behind the warm-up."""
        greenlets = [gevent.spawn(self.call) for _ in range(callers)]
        gevent.sleep(WARM_UP)
        first, cpu, begun = len(self.took), self.running.cpu_time(), time.perf_counter()
        gevent.sleep(seconds / 2)
        halfway()
        gevent.sleep(seconds / 2)
        took, spent, lasted = sorted(self.took[first:]), self.running.cpu_time() - cpu, time.perf_counter() - begun
        self.stopped = True
        gevent.joinall(greenlets, raise_error=True)
        assert not self.broken, self.broken
        if not took:
            return Turn(0, 0, 0, 0)
        p50, p99 = (took[int(len(took) * part)] * 1000 for part in (0.5, 0.99))
        return Turn(len(took) / lasted, p50, p99, spent / len(took) * 1000)

    def silence(self) -> float:
        """Return the longest time without an answer."""
        times = itertools.pairwise(sorted(self.answered_at))
        return max((later - earlier for earlier, later in times), default=0.0)


def value(running: Running, account: str) -> int:
    """Return what an account has, as the peer says; after a kill it may take a while to say so."""
    connection = Connection(HOST, running.port)
    give_up_at = time.monotonic() + 60
    path, body = running.ask("read", [account])
    while True:
        try:
            status, found = connection.ask("POST", path, body)
            if status == 200:
                connection.close()
                return int(found)
        except (OSError, ValueError):
            pass
        assert time.monotonic() < give_up_at, f"nobody says what {account} has"
        gevent.sleep(PAUSE)


@dataclass
class Place:
    """A peer that runs, and all that it has reached so far."""

    name: str
    running: Running
    hot: dict[int, list[Turn]] = field(default_factory=dict)
    transfers: dict[int, list[Turn]] = field(default_factory=dict)
    kills: dict[str, AfterKill] = field(default_factory=dict)

    def measure_hot(self, callers: int, seconds: float) -> None:
        """Have all add to one account."""
        before = value(self.running, HOT)
        load = Load(self.running, lambda _: ("add", [HOT]))
        self.hot.setdefault(callers, []).append(load.run(callers, seconds))
        self._compare(HOT, value(self.running, HOT) - before, len(load.took))

    def measure_transfers(self, callers: int, seconds: float) -> None:
        """Have customers pay the merchant."""
        before = self._sums()
        load = Load(self.running, lambda number: ("transfer", [customer(number), MERCHANT]))
        self.transfers.setdefault(callers, []).append(load.run(callers, seconds))
        after = self._sums()
        self._compare(MERCHANT, after[0] - before[0], len(load.took))
        self._compare("the customers", before[1] - after[1], len(load.took))

    def measure_kill(self, what: str, seconds: float) -> None:
        """Kill it half-way, and see what has become of the operations."""
        before = value(self.running, KILLED)
        load = Load(self.running, lambda _: ("add", [KILLED]), sends_again=True)
        load.run(KILLED_UNDER, seconds, self.running.kills[what])
        beyond = value(self.running, KILLED) - before - len(load.took)
        assert 0 <= beyond <= load.unknown, f"{self.name}: {load.unknown} are unknown, and {beyond} too many are there"
        self.kills[what] = AfterKill(load.unknown, load.failed, beyond, load.silence())

    def _sums(self) -> tuple[int, int]:
        asked = [gevent.spawn(value, self.running, customer(number)) for number in range(CUSTOMERS)]
        gevent.joinall(asked, raise_error=True)
        return value(self.running, MERCHANT), sum(int(one.get()) for one in asked)

    def _compare(self, account: str, stored: int, answered: int) -> None:
        assert stored == answered, f"{self.name}: {answered} were answered, {account} has changed by {stored}"


def customer(number: int) -> str:
    """Return the key of a customer."""
    return f"customer-{number % CUSTOMERS}"


def create_tables(url: str) -> None:
    """Create the accounts in PostgreSQL, and the table of recorded outcomes."""
    metadata = sa.MetaData()
    idempotency_table("outcomes", metadata)
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    metadata.create_all(engine)
    engine.dispose()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE accounts (key text PRIMARY KEY, value bigint NOT NULL)")
        names = [HOT, KILLED, MERCHANT, *map(customer, range(CUSTOMERS))]
        connection.cursor().executemany("INSERT INTO accounts VALUES (%s, 0)", [(name,) for name in names])


def spread(numbers: Sequence[float]) -> str:
    """Return the median, and the least and the most if there are several."""
    middle = f"{statistics.median(numbers):,.0f}"
    return middle if len(numbers) == 1 else f"{middle} ({min(numbers):,.0f} to {max(numbers):,.0f})"


def shown(title: str, of: dict[str, dict[int, list[Turn]]]) -> Iterator[str]:
    """Return the lines of a table for each number of callers."""
    for callers in sorted({callers for turns in of.values() for callers in turns}):
        yield f"{title}, {callers} caller{'s' if callers > 1 else ''}"
        yield f"{'':<22}{'operations/s':>24}  {'× FOR UPDATE':>12}  {'p50 ms':>8}  {'p99 ms':>8}  {'CPU ms':>7}"
        floor = statistics.median(turn.rate for turn in of[FLOOR][callers])
        for name, turns in of.items():
            rates = [turn.rate for turn in turns[callers]]
            middle = sorted(turns[callers])[len(rates) // 2]
            yield (
                f"{name:<22}{spread(rates):>24}  {statistics.median(rates) / floor:>12.2f}"
                f"  {middle.p50:>8.1f}  {middle.p99:>8.1f}  {middle.cpu:>7.2f}"
            )
        yield ""


def shown_kills(places: Sequence[Place]) -> Iterator[str]:
    """Return the lines of the table of kills."""
    yield f"SIGKILL half-way, {KILLED_UNDER} callers"
    yield f"{'':<34}{'failed tries':>13}  {'unknown':>8}  {'stored - answered':>18}  {'longest silence s':>18}"
    for place in places:
        for what, left in place.kills.items():
            name = f"{place.name}, its {what}"
            yield f"{name:<34}{left.failed:>13,}  {left.unknown:>8,}  {left.beyond:>18,}  {left.silence:>18.1f}"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.durable", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="to see that it works")
    parser.add_argument(
        "--only", action="append", metavar="PEER", choices=PEERS, help="beside the first; again for more"
    )
    chosen = parser.parse_args()
    wanted = [name for name in PEERS if not chosen.only or name in {FLOOR, *chosen.only}]
    with tempfile.TemporaryDirectory(prefix="durable-") as folder:
        try:
            left_out, places = measured(Path(folder), wanted, SHORT if chosen.short else LONG)
        finally:
            end_postgres()
    print(*shown("one hot record", {place.name: place.hot for place in places}), sep="\n")
    print(*shown("transfers to one merchant", {place.name: place.transfers for place in places}), sep="\n")
    print(*shown_kills(places), sep="\n")
    print(*(f"\nleft out: {name}: {why}" for name, why in left_out.items()), sep="")
    return 0


def measured(folder: Path, wanted: Sequence[str], course: Course) -> tuple[dict[str, str], list[Place]]:
    """Return what is left out and why, and the others with what they have reached."""
    left_out: dict[str, str] = {}
    places: list[Place] = []
    with database("postgresql", folder) as url, ExitStack() as stack:
        create_tables(url)
        for number, name in enumerate(wanted):
            (own := folder / str(number)).mkdir()
            try:
                places.append(Place(name, stack.enter_context(PEERS[name](own, url))))
            except LeftOut as error:
                left_out[name] = str(error)
        for _ in range(course.rounds):
            for callers in course.hot:
                for place in places:
                    place.measure_hot(callers, course.seconds)
            for callers in course.transfers:
                for place in places:
                    place.measure_transfers(callers, course.seconds)
        for place in places:
            for what in place.running.kills:
                place.measure_kill(what, max(course.seconds, 1.0))
    return left_out, places


if __name__ == "__main__":
    sys.exit(main())

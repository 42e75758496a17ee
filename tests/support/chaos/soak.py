"""Half the capacity for long, with keys that come and go: memory, greenlets, connections and descriptors stay flat.

    python -m tests.support.chaos.soak [--seconds 3600] [--store postgres-lock]

Flat is judged for each worker: the first fifth of the time is left out, since caches fill and pools open; of the rest,
the median of the last third may be above that of the first third by no more than `MAY_GROW` says. Else it exits with 1.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse
import itertools
import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import gevent

from examples.client import Connection
from tests.support.chaos.places import STORES
from tests.support.chaos.traffic import SERVED, Traffic, running
from tests.support.chaos.watch import Look, looks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CALLERS: Final = 20
LIVE_KEYS: Final = 40
SECONDS_OF_A_KEY: Final = 8.0
"""So long a key is asked for; then it is removed."""

MAY_GROW: Final[dict[str, tuple[float, float]]] = {
    "memory": (0.03, 3.0),
    "greenlets": (0.0, 12.0),  # a key may be the first of its shard
    "connections": (0.0, 6.0),  # in a pool of ten
    "descriptors": (0.0, 6.0),
}
"""By which part of itself, and by how much beside."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.chaos.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--store", choices=STORES, default="postgres-lock")
    told = parser.parse_args()
    wrong = list(soak(told.store, told.seconds))
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


class Keys:
    """Keys that come and go: one of those that live now is asked for, in turn."""

    def __init__(self, living: int) -> None:
        self._living = living
        # -- mutable state ---------------------------------------------------------------------------------
        self.gone = 0
        self._turns = itertools.count()

    def ask(self) -> dict[str, object]:
        turn = next(self._turns)
        asked: dict[str, object] = {"keys": [f"key {self.gone + turn % self._living}"], "name": str(turn)}
        if turn % 2:
            asked["idempotency_key"] = str(turn)
        return asked

    def come_and_go(self, traffic: Traffic, server: Any) -> None:
        connection = Connection(server.host, server.port)
        while True:
            gevent.sleep(SECONDS_OF_A_KEY / self._living)
            self.gone += 1
            if self.gone > self._living:  # long after the last call for it
                traffic.ask(connection, {"keys": [f"key {self.gone - self._living}"]})


def soak(store: str, seconds: float) -> Iterator[str]:
    """Print how the workers are; give what is wrong."""
    with running(store, workers=2, watched=min(10.0, seconds / 60)) as (server, watched):
        # Many more keys than live later, so that every shard has had its first one.
        capacity = Traffic(server, Keys(1000).ask).capacity(CALLERS, max(2.0, min(seconds / 10, 10.0)))
        keys = Keys(LIVE_KEYS)
        traffic = Traffic(server, keys.ask)
        print(f"{store}: half of {capacity:,.0f} calls a second for {seconds:,.0f} s", flush=True)
        coming = gevent.spawn(keys.come_and_go, traffic, server)
        showing = gevent.spawn(_show, watched, seconds / 12)
        begun = time.time()
        failed = served = 0
        for _ in range(12):  # so that answers do not pile up here
            answers = traffic.paced_loop(CALLERS, capacity / 2, seconds / 12)
            served += sum(answer.status == SERVED for answer in answers)
            failed += sum(answer.status != SERVED for answer in answers)
        lasted = time.time() - begun
        gevent.killall([coming, showing])
        seen = [look for look in looks(watched) if begun <= look.at <= begun + lasted]
    print(f"{served:,} calls were served, {failed:,} were not; {keys.gone:,} keys came and went")
    if failed:
        yield f"{failed} calls were not served"
    for pid in sorted({look.pid for look in seen}):
        yield from _growth(pid, [look for look in seen if look.pid == pid and look.at >= begun + lasted / 5])


def _show(watched: Path, seconds: float) -> None:
    print("       s     pid  memory, MiB  greenlets  connections  descriptors")
    begun = time.time()
    while True:
        gevent.sleep(seconds)
        for look in {look.pid: look for look in looks(watched)}.values():
            print(
                f"{look.at - begun:8.0f} {look.pid:7} {look.memory:12.1f} {look.greenlets:10} {look.connections:12}"
                f" {look.descriptors:12}",
                flush=True,
            )


def _growth(pid: int, seen: list[Look]) -> Iterator[str]:
    third = len(seen) // 3
    for name, (part, beside) in MAY_GROW.items():
        values: list[float] = [getattr(look, name) for look in seen]
        first, last = median(values[:third]), median(values[-third:])
        print(f"worker {pid}: {name} {first:,.1f} at first, {last:,.1f} at last")
        if last > first * (1 + part) + beside:
            yield f"worker {pid}: {name} grew from {first:,.1f} to {last:,.1f}"


if __name__ == "__main__":
    sys.exit(main())

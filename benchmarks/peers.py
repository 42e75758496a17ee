"""The same load on what one could take instead: operations per second, and CPU time of each.

1,000 callers in a closed loop on 1, 64 and 1,000 keys; a load and a save wait 1 ms each, in memory. A lock for each key
(gevent), an actor for each key (pykka, under gevent), a batcher for each key (async-batcher, asyncio), a loader
(aiodataloader, asyncio, which keeps no order for each key and has no load and save: its one function waits for both,
and then adds), and `Processor`, with a load and a save for each key, and with bulks. Each is used as its documentation
says, in a process of its own.

They take turns in one run; each figure is the median of the turns (least to most). Each process compares its counters
with the operations that were answered.

Run it from the repository: ``python -m benchmarks.peers [--short] [--json FILE]``. It needs the extra "benchmarks".
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

CALLERS = 1000
WAIT = 0.001
"""Seconds of a load, and of a save."""

WARM_UP = 0.5
"""Seconds that are not counted."""


class Reached(NamedTuple):
    """What one process measured."""

    rate: float
    nanoseconds: float
    """CPU time of an operation."""


class Store:
    """Counters, and how many operations were answered."""

    def __init__(self, keys: int) -> None:
        """Begin at zero."""
        self.values = dict.fromkeys(range(keys), 0)
        self.answered = 0

    def check(self) -> None:
        """Compare them."""
        if sum(self.values.values()) != self.answered:
            raise AssertionError(f"{self.answered} were answered, but the counters are at {sum(self.values.values())}")


class Counter:
    """A resource."""

    def __init__(self, value: int) -> None:
        """Be what was loaded."""
        self.value = value

    def add(self, amount: int) -> int:
        """Be an operation."""
        self.value += amount
        return self.value


# -- gevent -------------------------------------------------------------------------------------------------


def under_gevent(make: Callable[[Store], Callable[[int], object]], keys: int, seconds: float) -> Reached:
    """Measure what *make* gives for a store: called with a key, it adds one and returns when that is saved."""
    import gevent

    store = Store(keys)
    add = make(store)
    stopped = False

    def call(key: int) -> None:
        while not stopped:
            add(key)
            store.answered += 1

    callers = [gevent.spawn(call, caller % keys) for caller in range(CALLERS)]
    gevent.sleep(WARM_UP)
    before, cpu, begun = store.answered, time.process_time(), time.perf_counter()
    gevent.sleep(seconds)
    count, cpu, took = store.answered - before, time.process_time() - cpu, time.perf_counter() - begun
    stopped = True
    gevent.joinall(callers, raise_error=True)
    store.check()
    return Reached(count / took, cpu / max(1, count) * 1e9)


def processor(store: Store) -> Callable[[int], object]:
    """Batches."""
    import gevent

    from geventbatch import Processor

    def load(key: int) -> Counter:
        gevent.sleep(WAIT)
        return Counter(store.values[key])

    def save(key: int, counter: Counter) -> None:
        gevent.sleep(WAIT)
        store.values[key] = counter.value

    opened = Processor(load_resource=load, save_resource=save, min_duration=0, max_duration=30)
    return lambda key: opened.run(key, Counter.add, 1)


def bulk_processor(store: Store) -> Callable[[int], object]:
    """The same, with one load and one save for all keys that are ready."""
    import gevent

    from geventbatch import Processor

    def load(keys: Sequence[int]) -> dict[int, Counter]:
        gevent.sleep(WAIT)
        return {key: Counter(store.values[key]) for key in keys}

    def save(counters: dict[int, Counter]) -> None:
        gevent.sleep(WAIT)
        store.values.update((key, counter.value) for key, counter in counters.items())

    opened = Processor(
        load_resources=load, save_resources=save, max_bulk=1000, max_batches=2, min_duration=0, max_duration=30
    )
    return lambda key: opened.run(key, Counter.add, 1)


def lock_per_key(store: Store) -> Callable[[int], object]:
    """Each operation by itself, one after the other."""
    import gevent
    from gevent.lock import BoundedSemaphore

    locks = {key: BoundedSemaphore() for key in store.values}

    def add(key: int) -> None:
        with locks[key]:
            gevent.sleep(WAIT)
            counter = Counter(store.values[key])
            counter.add(1)
            gevent.sleep(WAIT)
            store.values[key] = counter.value

    return add


def actor_per_key(store: Store) -> Callable[[int], object]:
    """The same, by actors."""
    import pykka

    class Actor(pykka.ThreadingActor):
        use_daemon_thread = True

        def __init__(self, key: int) -> None:
            super().__init__()
            self._key = key

        def on_receive(self, message: Any) -> int:
            time.sleep(WAIT)
            counter = Counter(store.values[self._key])
            counter.add(message)
            time.sleep(WAIT)
            store.values[self._key] = counter.value
            return counter.value

    actors = {key: Actor.start(key) for key in store.values}
    return lambda key: actors[key].ask(1)


# -- asyncio ------------------------------------------------------------------------------------------------


def under_asyncio(make: Callable[[Store], Callable[[int], Awaitable[object]]], keys: int, seconds: float) -> Reached:
    """Do the same as `under_gevent`."""
    import asyncio

    async def measure() -> Reached:
        store = Store(keys)
        add = make(store)
        stopped = False

        async def call(key: int) -> None:
            while not stopped:
                await add(key)
                store.answered += 1

        callers = [asyncio.ensure_future(call(caller % keys)) for caller in range(CALLERS)]
        await asyncio.sleep(WARM_UP)
        before, cpu, begun = store.answered, time.process_time(), time.perf_counter()
        await asyncio.sleep(seconds)
        count, cpu, took = store.answered - before, time.process_time() - cpu, time.perf_counter() - begun
        stopped = True
        await asyncio.gather(*callers)
        store.check()
        return Reached(count / took, cpu / max(1, count) * 1e9)

    return asyncio.run(measure())


def batcher_per_key(store: Store) -> Callable[[int], Awaitable[object]]:
    """Batches of async-batcher, without a window."""
    import asyncio

    from async_batcher.batcher import AsyncBatcher

    class Batcher(AsyncBatcher[int, int]):  # type: ignore[misc]  # it has no types
        def __init__(self, key: int) -> None:
            super().__init__(max_queue_time=0)
            self._key = key

        async def process_batch(self, batch: list[int]) -> list[int]:
            await asyncio.sleep(WAIT)
            counter = Counter(store.values[self._key])
            answers = [counter.add(amount) for amount in batch]
            await asyncio.sleep(WAIT)
            store.values[self._key] = counter.value
            return answers

    batchers = {key: Batcher(key) for key in store.values}
    return lambda key: batchers[key].process(1)


def loader(store: Store) -> Callable[[int], Awaitable[object]]:
    """Batches of aiodataloader."""
    import asyncio

    from aiodataloader import DataLoader

    class Loader(DataLoader[int, int]):
        cache = False

        async def batch_load_fn(self, keys: Sequence[int]) -> list[int]:
            await asyncio.sleep(2 * WAIT)
            for key in keys:
                store.values[key] += 1
            return [store.values[key] for key in keys]

    return Loader().load


# -- the table ----------------------------------------------------------------------------------------------

PEERS: dict[str, Callable[[int, float], Reached]] = {
    "geventbatch": lambda keys, seconds: under_gevent(processor, keys, seconds),
    "geventbatch, bulks": lambda keys, seconds: under_gevent(bulk_processor, keys, seconds),
    "lock per key, gevent": lambda keys, seconds: under_gevent(lock_per_key, keys, seconds),
    "pykka": lambda keys, seconds: under_gevent(actor_per_key, keys, seconds),
    "async-batcher": lambda keys, seconds: under_asyncio(batcher_per_key, keys, seconds),
    "aiodataloader": lambda keys, seconds: under_asyncio(loader, keys, seconds),
}
UNDER_GEVENT = tuple(PEERS)[:4]
OURS = UNDER_GEVENT[0]
COLUMNS = "{:<24}{:>30}{:>30}{:>28}{:>26}"


def turn(peer: str, keys: int, seconds: float) -> Reached:
    """Have a process measure it."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.peers", "--peer", peer, "--keys", str(keys), "--seconds", str(seconds)],
        stdout=subprocess.PIPE,
        check=True,
        timeout=seconds + 60,
    )
    return Reached(*json.loads(ended.stdout))


def show(keys: int, turns: dict[str, list[Reached]]) -> None:
    """Print what each reached, and its ratios to ours in the same turns."""
    print(f"\n{keys:,} key{'s' * (keys > 1)}")
    print(COLUMNS.format("", "operations/s", "CPU ns per operation", "ours ÷ its operations/s", "ours ÷ its CPU"))
    for peer, reached in turns.items():
        pairs = list(zip(turns[OURS], reached, strict=True))
        cells = [
            spread([one.rate for one in reached], ",.0f"),
            spread([one.nanoseconds for one in reached], ",.0f"),
            spread([ours.rate / its.rate for ours, its in pairs], ",.2f"),
            spread([ours.nanoseconds / its.nanoseconds for ours, its in pairs], ".2f"),
        ]
        print(COLUMNS.format(f"  {peer}", *cells), flush=True)


def spread(values: list[float], form: str) -> str:
    """The median, and between what it lies."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one short turn each")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--keys", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peer:
        if chosen.peer in UNDER_GEVENT:
            from gevent import monkey

            monkey.patch_all()
        print(json.dumps(PEERS[chosen.peer](chosen.keys, chosen.seconds)))
        return
    number, seconds = (1, 0.5) if chosen.short else (5, 2.0)
    results: dict[int, dict[str, list[Reached]]] = {}
    for keys in (1, 64, 1000):
        turns: dict[str, list[Reached]] = {peer: [] for peer in PEERS}
        for _ in range(number):
            for peer, reached in turns.items():
                reached.append(turn(peer, keys, seconds))
        show(keys, turns)
        results[keys] = turns
    if chosen.json:
        written = [
            {"keys": keys, "peer": peer, "turns": [one._asdict() for one in reached]}
            for keys, turns in results.items()
            for peer, reached in turns.items()
        ]
        chosen.json.write_text(json.dumps(written, indent=1))


if __name__ == "__main__":
    main()

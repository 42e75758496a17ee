"""For how long Redis is held by a batch of transfers that connect many hashes: its scripts, by its own slow log."""

from __future__ import annotations

from typing import Any, NamedTuple

import gevent
import redis
from gevent.event import Event

from benchmarks.transfer_ways import RICH, move_in_documents
from geventbatch import Processor
from geventbatch.stores import RedisStore
from tests.support.redis_server import connected, redis_url


class Held(NamedTuple):
    """Milliseconds in which it does nothing else."""

    longest: float
    """By the command, or script, that took the longest."""
    everything: float
    """By all of them together."""
    commands: int


def hold(keys: int, size: int) -> Held:
    """Have one batch of transfers connect so many hashes, of about so many bytes each."""
    filling = "x" * max(0, size - 40)
    url = redis_url()
    with connected(url) as beside, redis.Redis.from_url(url) as client:
        beside.flushdb()
        store: RedisStore[dict[str, Any]] = RedisStore(
            client, missing=lambda _: {"balance": RICH, "transfers": 0, "filling": filling}
        )
        with Processor(
            open_resource=store, min_duration=0, max_duration=30, max_bulk=keys, max_batches=1, name="held"
        ) as processor:
            _transfer_along(processor, keys)  # makes them
            before = beside.config_get("slowlog-*")
            # With 0, it would log each call of a script by itself, and take longer for that than for the call.
            beside.config_set("slowlog-log-slower-than", 100)
            beside.config_set("slowlog-max-len", 100_000)
            _transfer_along(processor, keys, beside.slowlog_reset)
            told = [one for one in beside.slowlog_get(100_000) if not one["command"].startswith(b"SLOWLOG")]
            for name in ("slowlog-log-slower-than", "slowlog-max-len"):
                beside.config_set(name, before[name])
            final = [_numbers(processor, str(number)) for number in range(keys)]
        beside.flushdb()
    if sum(balance for balance, _ in final) != keys * RICH or sum(count for _, count in final) != 4 * (keys - 1):
        raise AssertionError("what is in Redis is not what was answered")
    milliseconds = [one["duration"] / 1000 for one in told]
    return Held(max(milliseconds), sum(milliseconds), len(milliseconds))


def _transfer_along(processor: Processor[Any], keys: int, before: Any = lambda: None) -> None:
    """Transfer from each to the next one, all in one batch: a worker is held until all of them wait for it."""
    gone = Event()
    holding = gevent.spawn(processor.run, "holding", lambda _: gone.wait())
    gevent.sleep(0.05)
    transfers: list[gevent.Greenlet[..., Any]] = [
        gevent.spawn(processor.run_across, (str(number), str(number + 1)), move_in_documents, number, number + 1, 1)
        for number in range(keys - 1)
    ]
    gevent.sleep(0.05)
    before()
    gone.set()
    gevent.joinall([holding, *transfers], raise_error=True)


def _numbers(processor: Processor[Any], key: str) -> tuple[int, int]:
    return processor.run(key, lambda account: (account["balance"], account["transfers"]), read_only=True)

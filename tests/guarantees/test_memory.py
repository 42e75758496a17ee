"""What an open key keeps in memory: a server may have 100,000 of them."""

from __future__ import annotations

import gc
import tracemalloc
from typing import TYPE_CHECKING

import gevent
from gevent.event import AsyncResult, Event

from geventbatch import COMPILED, Processor

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = 300


def bytes_for_each(call: Callable[[int], object], all_wait: Callable[[], object]) -> float:
    """Return the bytes that each of `KEYS` greenlets takes, which wait inside *call*."""
    gevent.sleep(0)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        callers = [gevent.spawn(call, key) for key in range(KEYS)]
        all_wait()
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    gevent.killall(callers)
    return taken / KEYS


def test_an_open_key_takes_little_more_than_its_two_greenlets() -> None:
    loaded: list[int] = []
    all_loaded = Event()

    def load(key: int) -> list[int]:
        loaded.append(key)
        if len(loaded) == KEYS:
            all_loaded.set()
        return []

    def all_wait() -> None:
        assert all_loaded.wait(30)
        gevent.sleep(0)  # the last worker goes on to wait for operations

    waiting = bytes_for_each(lambda _: AsyncResult().wait(), lambda: gevent.sleep(0))
    with Processor(load_resource=load, min_duration=30) as processor:
        bytes_for_each(lambda key: processor.run(key, list.append, 1), all_wait)  # what is made once, is made here
    loaded.clear()
    all_loaded.clear()
    with Processor(load_resource=load, min_duration=30) as processor:
        open_key = bytes_for_each(lambda key: processor.run(key, list.append, 1), all_wait)
    assert waiting < open_key < (2.4 if COMPILED else 2.1) * waiting  # compiled code needs more of the C stack

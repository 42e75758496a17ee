"""Callers that have their answers come back before a batch that loads nothing takes its operations."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import gevent
import pytest

from geventbatch import Processor

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


class Cached:
    """A store whose resource is cached: it loads in no time, and its save takes a millisecond."""

    def __init__(self, *, reused: bool = True) -> None:
        self.reused = reused
        self.saved: list[int] = []
        self.opened: Callable[[], object] = int

    def __call__(self, key: object) -> CachedScope:
        self.opened()
        return CachedScope(self)


class CachedScope:
    def __init__(self, store: Cached) -> None:
        self._store = store
        self.reused = store.reused

    def __enter__(self) -> list[int]:
        if not self.reused:
            gevent.sleep(0.001)
        self._resource: list[int] = []
        return self._resource

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None:
            gevent.sleep(0.001)
            self._store.saved.append(len(self._resource))


def count(resource: list[int]) -> None:
    resource.append(1)


def run_again_and_again(store: Cached, callers: int) -> None:
    def one() -> None:
        for _ in range(10):
            processor.run("k", count)

    with Processor(open_resource=store, min_duration=0, max_duration=5) as processor:
        gevent.joinall([gevent.spawn(one) for _ in range(callers)], raise_error=True)


@pytest.mark.parametrize("callers", [100, 1000])
def test_all_callers_of_a_batch_share_the_next_one_though_it_loads_nothing(clock: VirtualTime, callers: int) -> None:
    store = Cached()
    run_again_and_again(store, callers)
    assert store.saved == [callers] * 10


def test_a_batch_that_loads_begins_its_load_while_callers_are_woken(clock: VirtualTime) -> None:
    store = Cached(reused=False)
    began: list[float] = []
    store.opened = lambda: began.append(clock.now())
    run_again_and_again(store, 1000)
    assert store.saved == [1000] * 10
    assert [round(later - earlier, 6) for earlier, later in pairwise(began)] == [0.002] * 9

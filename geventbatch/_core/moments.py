"""Moments at which something is due, kept in order, so that one timer of the hub is enough for all of them.

Each batch that waits for operations needs two, the end of its window and its deadline: as timers of their own they took
600 bytes.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf
from typing import Any, final

import gevent

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.process import here
from geventbatch._for_mypyc import mypyc_attr


@mypyc_attr(native_class=True)
class Timed:
    """Something that is due at a moment."""

    __slots__ = ()

    def due(self) -> None:
        """Do what is due. `Moments` calls this in the hub, once for each time that it was added."""
        raise NotImplementedError


@final
class Moments:
    """The moments of one kind, of one process. No method switches greenlets, except `_ring`, in the hub."""

    def __init__(self, priority: int = 0) -> None:
        """Start without a timer; those of a lower *priority* ring later, if several are due at once."""
        self._priority = priority
        self._epoch = here.epoch
        # -- mutable state ---------------------------------------------------------------------------------
        self._heap: list[tuple[float, int, Timed]] = []
        self._added = 0  # which orders those of one moment
        self._holders = 0
        self._loop: Any = None  # the loop of the timer
        self._timer: Any = None  # rings at the first moment
        self._rings_at = inf  # monotonic seconds

    def add(self, when: float, what: Timed) -> None:
        """Let *what* be due at *when*, in monotonic seconds. It cannot be taken back."""
        self._added += 1
        heappush(self._heap, (when, self._added, what))
        if when < self._rings_at or self._loop is not gevent.get_hub().loop:
            self._start()

    def hold(self) -> None:
        """Keep the hub alive until `let_go`: without a holder the timer does not, as gevent is to detect deadlocks."""
        self._holders += 1
        if self._holders == 1 and self._timer is not None:
            self._timer.ref = True

    def let_go(self) -> None:
        """End one `hold`."""
        self._holders -= 1
        if not self._holders and self._timer is not None:
            self._timer.ref = False

    def close(self) -> None:
        """Forget all moments."""
        self._heap.clear()
        self._stop()

    def _start(self) -> None:
        self._stop()
        self._rings_at = when = self._heap[0][0]
        self._loop = loop = gevent.get_hub().loop
        seconds = max(0.0, when - _clock.monotonic())
        self._timer = timer = loop.timer(seconds, ref=self._holders > 0, priority=self._priority)
        timer.start(self._ring, update=True)

    def _stop(self) -> None:
        self._rings_at = inf
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _ring(self) -> None:
        process.notice_fork()
        self._stop()
        heap, now = self._heap, _clock.monotonic()
        try:
            # Greenlets may run in between, which may also fork: the parent's are not to go on in the child.
            while self._epoch == here.epoch and heap and heap[0][0] <= now:
                heappop(heap)[2].due()
        finally:
            if self._epoch != here.epoch:
                self.close()
            elif heap and heap[0][0] < self._rings_at:
                self._start()

"""The `gevent.Timeout` that batches run under (guarantee 6)."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

import gevent

from geventbatch import _clock, _process

if TYPE_CHECKING:
    from geventbatch._batch import Batch


class Alarm(gevent.Timeout):
    """Answers a batch's callers at its deadline, then interrupts the greenlet that runs it at the place where it waits.

    A worker keeps one for all its batches: while batches follow one another its timer is left running, and when it
    fires too early for the batch at hand, it is set again for the rest. It is thrown at most once, since a worker whose
    batch ended by deadline is not used again; so nobody can take the deadline of one batch for that of another.
    """

    def __init__(self, seconds: float) -> None:
        """Be ready to ring *seconds* after the start of a batch."""
        super().__init__(seconds)
        self.timer: Any  # the stubs do not know what gevent's watchers have: `ref` and `active`
        self.greenlet = gevent.getcurrent()
        # -- mutable state ---------------------------------------------------------------------------------
        self.batch: Batch | None = None  # which the current greenlet runs, or is about to
        self.armed = False  # the timer runs, and keeps the hub alive

    def arm(self) -> None:
        """Ring at the deadline of the batch. Switches: no."""
        timer = self.timer
        timer.ref = self.armed = True
        if not (timer.active or timer.pending):  # pending: it is about to ring, and will be set again then
            self.start()

    def relax(self) -> None:
        """There is no batch for a while. Switches: no.

        A timer that runs on does no harm, and is there for the next batch; but nobody's deadlock has to wait for it.
        """
        self.batch = None
        self.timer.ref = self.armed = False

    def _on_expiration(self, previous: Any, ex: Any) -> None:
        # In the hub, on time, wherever the greenlet waits. (gevent's hook for subclasses.)
        batch = self.batch
        if batch is None or batch.returned or batch.epoch != _process.epoch:
            self.armed = False
            return
        left = batch.deadline - _clock.monotonic()
        if left > 0:
            self._again(batch.left_at_pause if left == inf else left, previous, ex)
        else:
            batch.expire()
            previous.throw(ex)

    def _again(self, seconds: float, previous: Any, ex: Any) -> None:
        self.timer.close()
        self.timer = gevent.get_hub().loop.timer(seconds, priority=-1)
        self.timer.start(self._on_expiration, previous, ex, update=True)

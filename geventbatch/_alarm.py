"""The `gevent.Timeout` that batches run under (guarantee 6)."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, final

import gevent

from geventbatch._clock import clock as _clock
from geventbatch._process import here
from geventbatch._timeout import MaxDuration

if TYPE_CHECKING:
    from geventbatch._batch import Batch


@final
class Alarm:
    """Answers a batch's callers at its deadline, then interrupts the greenlet that runs it at the place where it waits.

    A worker keeps one for all its batches: while batches follow one another its timer is left running, and when it
    fires too early for the batch at hand, it is set again for the rest. It is thrown at most once, since a worker whose
    batch ended by deadline is not used again; so nobody can take the deadline of one batch for that of another.
    """

    def __init__(self, seconds: float) -> None:
        """Be ready to ring *seconds* after the start of a batch."""
        self.greenlet: Any = gevent.getcurrent()
        self.timeout: Any = MaxDuration(self, seconds)
        # -- mutable state ---------------------------------------------------------------------------------
        self.batch: Batch | None = None  # which the current greenlet runs, or is about to
        self.armed = False  # the timer runs, and keeps the hub alive

    def arm(self) -> None:
        """Ring at the deadline of the batch. Switches: no."""
        timer = self.timeout.timer
        timer.ref = self.armed = True
        if not (timer.active or timer.pending):  # pending: it is about to ring, and will be set again then
            self.timeout.start()

    def relax(self) -> None:
        """There is no batch for a while. Switches: no.

        A timer that runs on does no harm, and is there for the next batch; but nobody's deadlock has to wait for it.
        """
        self.batch = None
        self.timeout.timer.ref = self.armed = False

    def close(self) -> None:
        """Ring no more."""
        self.timeout.close()
        self.timeout = None

    def ring(self, previous: Any, ex: Any) -> None:
        """The timer has fired. In the hub, on time, wherever the greenlet waits."""
        batch = self.batch
        if batch is None or batch.returned or batch.epoch != here.epoch:
            self.armed = False
            return
        left = batch.deadline - _clock.monotonic()
        if left > 0:
            self.timeout.again(batch.left_at_pause if left == inf else left, previous, ex)
        else:
            batch.expire()
            previous.throw(ex)

"""The `gevent.Timeout` that batches run under (guarantee 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import gevent

from geventbatch._alarm_timeout import MaxDuration
from geventbatch._core import process
from geventbatch._core.process import here

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt


_SHORTEST: Final = 0.001
"""Seconds after which the alarm looks again whether a pause is over."""


@final
class Alarm:
    """Answers a batch's callers at its deadline, then interrupts its greenlet at the place where that waits.

    A worker keeps one alarm for all its batches. While batches follow one another, its timer is left running. If it
    fires too early for the batch at hand, it is set again for the rest of the time. The alarm is thrown at most once:
    a worker whose batch ended by deadline is not used again. So no batch gets the deadline of another one.
    """

    def __init__(self, seconds: float) -> None:
        """Belong to the current greenlet; ring *seconds* after the start of a batch."""
        self.greenlet: Any = gevent.getcurrent()
        self.timeout: Any = MaxDuration(self, seconds)
        # -- mutable state ---------------------------------------------------------------------------------
        self.attempt: Attempt | None = None  # the attempt that the greenlet runs, or is about to run
        self.armed = False  # the timer runs, and keeps the hub alive

    def arm(self) -> None:
        """Ring at the deadline of the batch. Switches: no."""
        timer = self.timeout.timer
        timer.ref = self.armed = True
        if not (timer.active or timer.pending):  # pending: it is about to ring, and will be set again then
            self.timeout.start()

    def relax(self) -> None:
        """Watch no batch for now. Switches: no.

        The timer may run on, for the next batch. It no longer keeps the hub alive: gevent is to detect deadlocks.
        """
        self.attempt = None
        self.timeout.timer.ref = self.armed = False

    def close(self) -> None:
        """Close the timer."""
        self.timeout.close()
        self.timeout = None

    def ring(self, previous: Any, ex: Any) -> None:
        """End the batch, if its deadline has come. The timer calls this in the hub, wherever the greenlet waits."""
        process.notice_fork()
        attempt = self.attempt
        if attempt is None or attempt.dispatcher.epoch != here.epoch:
            self.armed = False
            return
        left = attempt.remaining()
        if left > 0:
            self.timeout.again(left, previous, ex)
        elif attempt.paused_at is not None:
            self.timeout.again(_SHORTEST, previous, ex)
        else:
            attempt.expire()
            previous.throw(ex)

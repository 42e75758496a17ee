"""The `gevent.Timeout` that batches run under (guarantee 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import gevent

from geventbatch._alarm_timeout import MaxDuration
from geventbatch._core.process import here

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt


_SHORTEST: Final = 0.001
"""Seconds after which it looks again whether a pause is over."""


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
        self.attempt: Attempt | None = None  # the one that the greenlet runs, or is about to
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
        self.attempt = None
        self.timeout.timer.ref = self.armed = False

    def forget(self, attempt: Attempt) -> None:
        """The code of *attempt* has returned. Another one of its bulk may lead by now."""
        if self.attempt is attempt:
            self.attempt = None

    def close(self) -> None:
        """Ring no more."""
        self.timeout.close()
        self.timeout = None

    def ring(self, previous: Any, ex: Any) -> None:
        """The timer has fired. In the hub, on time, wherever the greenlet waits."""
        attempt = self.attempt
        if attempt is None or attempt.batch.epoch != here.epoch:
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

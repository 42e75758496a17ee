"""The `gevent.Timeout` that batches run under (guarantee 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, final

import gevent

from geventbatch._alarm_timeout import MaxDuration
from geventbatch._core.clock import clock as _clock
from geventbatch._core.moments import Timed
from geventbatch._core.process import here

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.moments import Moments


_SHORTEST: Final = 0.001
"""Seconds after which the alarm looks again whether a pause is over."""


@final
class Alarm(Timed):
    """Answers a batch's callers at its deadline, then interrupts its greenlet at the place where that waits.

    A worker keeps one alarm for all its batches. While batches follow one another, it stays among the deadlines. If it
    is due too early for the batch at hand, it is put there again for the rest of the time. The alarm is thrown at most
    once: a worker whose batch ended by deadline is not used again. So no batch gets the deadline of another one.
    """

    __slots__ = ("_deadlines", "_queued", "armed", "attempt", "greenlet", "timeout")

    def __init__(self, deadlines: Moments) -> None:
        """Belong to the current greenlet, and be one of *deadlines*."""
        self._deadlines = deadlines
        # -- mutable state ---------------------------------------------------------------------------------
        self.greenlet: Any = gevent.getcurrent()
        self.attempt: Attempt | None = None  # the attempt that the greenlet runs, or is about to run
        self.armed = False  # it will be due, and keeps the hub alive
        self.timeout: Any = None  # what was thrown
        self._queued = False

    def arm(self) -> None:
        """Ring at the deadline of the batch. Switches: no."""
        attempt = self.attempt
        if attempt is not None and not self.armed:
            self.armed = True
            self._deadlines.hold()
            if not self._queued:
                self._queue(attempt.deadline)

    def _queue(self, when: float) -> None:
        self._queued = True
        self._deadlines.add(when, self)

    def relax(self) -> None:
        """Watch no batch for now. Switches: no.

        It may stay among the deadlines, for the next batch. It no longer keeps the hub alive: gevent is to detect
        deadlocks.
        """
        self.attempt = None
        if self.armed:
            self.armed = False
            self._deadlines.let_go()

    def close(self) -> None:
        """Watch no batch any more."""
        self.relax()
        self.greenlet = None
        if self.timeout is not None:
            self.timeout.close()
            self.timeout = None

    def due(self) -> None:
        """End the batch, if its deadline has come, wherever the greenlet waits."""
        self._queued = False
        attempt = self.attempt
        if attempt is None or attempt.dispatcher.epoch != here.epoch:
            self.relax()
            return
        left = attempt.remaining()
        if left > 0 or attempt.paused_at is not None:
            self._queue(_clock.monotonic() + (left if left > 0 else _SHORTEST))
            return
        attempt.expire()
        self.timeout = MaxDuration(attempt.dispatcher.options.max_duration)
        self.greenlet.throw(self.timeout)

"""The exception of an alarm. It is not compiled, since mypyc cannot extend gevent's `Timeout`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent

if TYPE_CHECKING:
    from geventbatch._core.deadline import Alarm


class MaxDuration(gevent.Timeout):
    """Thrown at the deadline. Users read its name in the traceback of interrupted code."""

    timer: Any  # the stubs lack attributes of gevent's timers

    def __init__(self, alarm: Alarm, seconds: float) -> None:
        """Belong to *alarm*."""
        super().__init__(seconds)
        self._alarm = alarm

    def _on_expiration(self, previous: Any, ex: Any) -> None:  # gevent's hook for subclasses
        self._alarm.ring(previous, ex)

    def again(self, seconds: float, previous: Any, ex: Any) -> None:
        """Ring once more in *seconds*; *previous* and *ex* are gevent's arguments."""
        self.timer.close()
        self.timer = gevent.get_hub().loop.timer(seconds, priority=-1)
        self.timer.start(self._on_expiration, previous, ex, update=True)

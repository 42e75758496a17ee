"""A bell: it wakes the greenlet that runs a batch, and waits for operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import gevent

from geventbatch._core.moments import Timed
from geventbatch._core.process import here

if TYPE_CHECKING:
    from geventbatch._core.batch import Batch


@final
class Bell(Timed):
    """The bell of one batch: a `Waiter` would keep 300 bytes more of C stack for each batch that waits."""

    __slots__ = ("_greenlet", "_queued", "_rung")

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self._greenlet: Any = None  # the one that waits
        self._rung = False  # a callback is on its way
        self._queued = False  # among the ends of windows

    def wait(self, batch: Batch) -> None:
        """Wait until `ring` or the end of the window, or until it is woken for nothing. Switches: yes."""
        windows = batch.dispatcher.windows
        self._rung = False
        self._greenlet = gevent.getcurrent()
        windows.hold()
        try:
            if not self._queued:
                self._queued = True
                windows.add(batch.window_end, self)
            if batch.open:  # a signal handler may have closed it before the bell was set
                here.hub.switch()
        finally:
            self._greenlet = None
            windows.let_go()

    def ring(self) -> None:
        """Wake the greenlet soon, if one waits. Switches: no."""
        if self._greenlet is not None and not self._rung:
            self._rung = True
            gevent.get_hub().loop.run_callback(self._wake)

    def due(self) -> None:
        """Wake the greenlet, since the window has ended."""
        self._queued = False
        self._wake()

    def _wake(self) -> None:
        greenlet, self._greenlet = self._greenlet, None
        if greenlet is not None:  # else it has gone on: the timer was quicker, or a kill
            greenlet.switch()

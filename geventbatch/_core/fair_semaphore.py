"""FairSemaphore: ``max_batches`` of them, each for a batch that runs, first come, first served."""

from __future__ import annotations

from collections import deque

import gevent
from gevent.hub import Waiter


class FairSemaphore:
    """A semaphore that hands over: gevent's lets whoever comes by overtake the one that it is about to wake."""

    def __init__(self, count: int) -> None:
        """Start with *count* free slots."""
        # -- mutable state ---------------------------------------------------------------------------------
        self._free = count
        self._waiters: deque[Waiter[None]] = deque()  # while somebody waits, no slot is free

    def __enter__(self) -> None:
        """Take a slot. Switches: yes, while there is none.

        Woken by whoever leaves. Whoever is killed here leaves the queue, or gives on the slot that it was just handed.
        """
        if self._free:
            self._free -= 1
            return
        waiter: Waiter[None] = Waiter()
        self._waiters.append(waiter)
        try:
            waiter.get()
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        """Hand the slot to the first who waits, or have it free. Switches: no."""
        if self._waiters:
            gevent.get_hub().loop.run_callback(self._waiters.popleft().switch, None)
        else:
            self._free += 1

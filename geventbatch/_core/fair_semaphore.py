"""A semaphore that is first come, first served: its slots are the ``max_batches`` that may run at once."""

from __future__ import annotations

from collections import deque

import gevent
from gevent.hub import Waiter


class FairSemaphore:
    """A semaphore that hands its slot to the first waiter. gevent's lets a newcomer overtake a waiter about to wake."""

    def __init__(self, count: int) -> None:
        """Start with *count* free slots."""
        # -- mutable state ---------------------------------------------------------------------------------
        self._free = count
        self._waiters: deque[Waiter[None]] = deque()  # while it has any, no slot is free

    def __enter__(self) -> None:
        """Take a slot. Switches: yes, while none is free.

        Woken by `__exit__`. A waiter that is killed leaves the queue, or passes on the slot that it was just handed.
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
        """Hand the slot to the first waiter, or set it free. Switches: no."""
        if self._waiters:
            gevent.get_hub().loop.run_callback(self._waiters.popleft().switch, None)
        else:
            self._free += 1

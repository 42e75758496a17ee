"""What is not done where something ends, since it may wait there: telling a log, recording a span.

So a greenlet of its own does it, which has a context of its own too, since gevent copies none (guarantee 11); in other
threads, whose hub may never run again, it is done at once.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from typing import TYPE_CHECKING, Final

import gevent

from geventbatch._core import process

if TYPE_CHECKING:
    from collections.abc import Callable

_log: Final = logging.getLogger("geventbatch")

MOST: Final = 1000
"""Calls that wait to be made; more of them are dropped, and counted."""


class Later:
    """Makes calls, one after the other, in the order they came."""

    def __init__(self, dropped: str) -> None:
        """Log *dropped*, with how many were dropped and how many waited, when some were."""
        self._message = dropped
        # -- mutable state ---------------------------------------------------------------------------------
        self._calls: deque[Callable[[], object]] = deque()
        self._dropped = 0
        self._teller: gevent.Greenlet[[], None] | None = None
        process.after_fork(self.forget)

    def add(self, call: Callable[[], object]) -> None:
        """Make *call* soon. Switches: no, in the thread that has batches."""
        if process.here.thread is None or not process.in_thread():
            _safely(call)
        elif len(self._calls) >= MOST:
            self._dropped += 1
        else:
            self._calls.append(call)
            if self._teller is None or self._teller.ready():  # it may have been killed before its first step
                self._teller = gevent.spawn(self._make_all)

    def _make_all(self) -> None:
        try:
            while self._calls:
                _safely(self._calls.popleft())
        finally:
            if self._calls:  # it was killed, or a call has raised a kill: that ends no other call
                self._teller = gevent.spawn(self._make_all)
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            _log.warning(self._message, dropped, MOST)

    def forget(self) -> None:
        """After a fork: the calls are the parent's."""
        self._calls.clear()
        self._dropped = 0
        self._teller = None


def _safely(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:  # of a log handler of the application's: that is not logged again
        if logging.raiseExceptions:
            traceback.print_exc()

"""Work that may wait (logging, exporting spans), moved to another greenlet so that the end of a batch never waits.

The greenlet has a context of its own, since gevent copies none (guarantee 11). In another thread, whose hub may never
run again, the work is done at once.
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
"""Calls that may be queued; more of them are dropped, and counted."""


class Later:
    """Makes calls, one after the other, in the order they came."""

    def __init__(self, dropped: str) -> None:
        """Log the message *dropped* after calls were dropped. It has a ``%d`` for their number, and one for `MOST`."""
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
        """Drop all calls after a fork: they are the parent's."""
        self._calls.clear()
        self._dropped = 0
        self._teller = None


def _safely(call: Callable[[], object]) -> None:
    try:
        call()
    except Exception:  # perhaps of a log handler of the application's, so it is not logged
        if logging.raiseExceptions:
            traceback.print_exc()

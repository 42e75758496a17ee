"""The CPU time of the thread that has batches: it tells code that keeps the hub from a machine that is busy.

Read at most every `OFTEN` seconds, at turns of the hub and behind calls that took a while: a call that has kept the hub
since is compared with the last reading. Linux says how long a thread was ready to run and had no CPU. Elsewhere, a
thread that has never given up the CPU by itself was ready all the time.
"""

from __future__ import annotations

import os
import resource
import time
from typing import TYPE_CHECKING, Final, final

from geventbatch._core.clock import clock as _clock

if TYPE_CHECKING:
    from collections.abc import Callable

OFTEN: Final = 0.02
"""Seconds."""

_real: Final = time.monotonic

_SCHEDSTAT: Final = "/proc/thread-self/schedstat"


def of_the_kernel() -> float:
    """Return the seconds for which this thread was ready to run and had no CPU, by Linux."""
    file = os.open(_SCHEDSTAT, os.O_RDONLY)
    try:
        return int(os.read(file, 100).split()[1]) / 1e9
    finally:
        os.close(file)


@final
class BySwitches:
    """The same where the kernel does not say it: as far as is certain."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self._seconds = 0.0
        self._last = (0.0, 0.0, -1)

    def read(self) -> float:
        """Return the seconds so far."""
        return self.add(_real(), time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw)

    def add(self, now: float, used: float, given_up: int) -> float:
        """Return the seconds until *now*, with so much CPU time, which was *given_up* so many times."""
        before, used_before, given_up_before = self._last
        self._last = now, used, given_up
        if given_up == given_up_before:
            self._seconds += max(0.0, now - before - (used - used_before))
        return self._seconds


def _reader() -> Callable[[], float]:
    try:
        of_the_kernel()
    except (OSError, IndexError, ValueError):
        return BySwitches().read
    return of_the_kernel


@final
class Cpu:
    """What the thread has had at the last reading."""

    def __init__(self) -> None:
        self._wanted = _reader()
        # -- mutable state ---------------------------------------------------------------------------------
        self.at = 0.0  # monotonic seconds
        self._used = 0.0  # seconds of CPU time
        self._in_vain = 0.0  # seconds without a CPU, though ready

    def look(self, now: float) -> None:
        """Read what the thread has had by *now*. Switches: no."""
        self.at, self._used, self._in_vain = now, time.thread_time(), self._without_cpu()

    def forget(self) -> None:
        """Begin anew in the child of a fork, whose thread has had nothing yet. Switches: no."""
        if self._wanted is not of_the_kernel:
            self._wanted = BySwitches().read
        self.at = self._used = self._in_vain = 0.0

    def since(self) -> tuple[float, float]:
        """Return the seconds of CPU time since the last reading, and the seconds without a CPU. Switches: no."""
        used, in_vain = time.thread_time() - self._used, self._without_cpu() - self._in_vain
        return used, in_vain if _clock.monotonic is _real else 0.0  # virtual time passes without a CPU

    def _without_cpu(self) -> float:
        try:
            return self._wanted()
        except OSError:  # no file can be opened, as in a process that has too many open: batches have to go on
            return self._in_vain


cpu: Final = Cpu()

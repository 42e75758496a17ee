"""Turns on the hub: so that no amount of work of ours keeps it from its timers and sockets (guarantee 10).

A gate has greenlets behind it that want to go on: up to 32 that have their answer, or one worker
that paused between two operations. Gates open one after another in the order they came. Between two of them everything
that the first let through has run, and as soon as the hub has been busy for `SLICE` seconds it looks at its timers and
sockets.

Nobody waits for the opening of another one's gate, so nobody can be killed there and strand the rest: the next step is
a callback of the hub.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from gevent.hub import Waiter

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.process import here

_Gate = Any  # what has a `set` that lets somebody through


SLICE: Final = 0.003
"""Seconds that the hub may be kept in one piece."""

WIDTH: Final = 32
"""Callers that go on in one piece."""

_TIMER: Final = 1e-6  # any positive time: `sleep(0)` is a callback and not a timer, and never lets the sockets in


_MILLISECOND: Final = 0.001
"""For libuv, which warns of shorter ones. It does not count its iterations either."""


class _Turn:
    """The gate of one greenlet that paused."""

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter: Waiter[None] = Waiter()

    def set(self) -> None:
        """Let it go on, at once; does nothing when it was killed."""
        self.waiter.switch(None)


class Pace:
    """The hub's turns; there is one for the one thread that has batches."""

    def __init__(self) -> None:
        """Start with nobody waiting."""
        # -- mutable state ---------------------------------------------------------------------------------
        self._gates: deque[_Gate] = deque()
        self._widths: deque[int] = deque()  # how many wait behind each
        self._loop: Any = None  # the loop that a step is scheduled on; another one has never heard of it
        self._timer: Any = None  # the timer of that step, if it is one
        self._iteration = -1  # the loop's, when it was last seen to have turned
        self._slice_end = 0.0  # the end of the slice that began then

    def add(self, gate: _Gate, width: int) -> None:
        """Open *gate*, with *width* behind it, when its turn comes. Switches: no; works in the hub too."""
        self._gates.append(gate)
        self._widths.append(width)
        loop = here.hub.loop
        if self._loop is not loop:
            self._loop = loop
            loop.run_callback(self._step)

    def wait(self) -> None:
        """Let everybody else have a turn. Switches: yes. Woken by `_step`; a waiter that is killed leaves alone."""
        turn = _Turn()
        self.add(turn, WIDTH)
        turn.waiter.get()

    def idle(self) -> bool:
        """Whether every gate is open."""
        return not self._gates

    def slice_end(self, now: float) -> float:
        """Say when the hub will have been kept for long enough; *now* counts as its turn if it has had one."""
        left = self._slice_end - now
        if not 0 < left <= SLICE:
            iteration = here.hub.loop.iteration
            if iteration != self._iteration or left > 0:  # the hub has turned since, or the clock is another one
                self._iteration = iteration
                self._slice_end = now + SLICE
        return self._slice_end

    def _step(self) -> None:
        """Open the next gates, in the hub, and come back when all that went through has had its turn."""
        # First, so that a signal handler that adds a gate in the middle of this schedules a step of its own.
        self._loop = None
        turned = self._timer is not None
        self._close_timer()
        now = _clock.monotonic()
        if turned:
            self._slice_end = now + SLICE
        due = now >= self.slice_end(now)
        if not due:
            self._open_gates()
        if self._gates and self._loop is None:
            self._loop = loop = here.hub.loop
            if due:
                self._timer = loop.timer(_TIMER if loop.iteration >= 0 else _MILLISECOND)
                self._timer.start(self._step)
            else:
                loop.run_callback(self._step)  # behind the callbacks of the gates

    def _open_gates(self) -> None:
        gates, widths = self._gates, self._widths
        left = WIDTH
        while gates and widths[0] <= left:
            left -= widths.popleft()
            gates.popleft().set()

    def _close_timer(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def forget(self) -> None:
        """After a fork: those who wait here are the parent's."""
        self._gates.clear()
        self._widths.clear()


pace: Final = Pace()
process.after_fork(pace.forget)

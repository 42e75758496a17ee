"""Turns on the hub: no amount of work of ours keeps it from its timers and sockets (guarantee 10).

A gate holds greenlets that want to go on: up to 32 callers that have their answer, or one worker that paused between
two operations. Gates open one after another in the order they came. Before the next gate opens, every greenlet of the
one before has run. As soon as the hub has been busy for `SLICE` seconds, it looks at its timers and sockets.

The next gate is opened by a callback of the hub, not by a greenlet. So no kill can strand the gates behind it.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from gevent.hub import Waiter

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.cpu import OFTEN, cpu
from geventbatch._core.process import here

_Gate = Any  # any object whose `set` lets its greenlets through


SLICE: Final = 0.003
"""Seconds that the hub may be kept in one piece."""

WIDTH: Final = 32
"""Callers that go on in one piece."""

_TIMER: Final = 1e-6  # seconds; any positive time: `sleep(0)` is a callback, not a timer, and never polls the sockets

_MILLISECOND: Final = 0.001
"""Seconds. For libuv, which warns of shorter timers (and does not count its iterations)."""


class _Turn:
    """The gate of one greenlet that paused."""

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter: Waiter[None] = Waiter()

    def set(self) -> None:
        """Let the greenlet go on, at once; do nothing if it was killed."""
        self.waiter.switch(None)


class Pace:
    """The turns of the one hub that has batches."""

    def __init__(self) -> None:
        """Start without a gate."""
        # -- mutable state ---------------------------------------------------------------------------------
        self._gates: deque[_Gate] = deque()
        self._widths: deque[int] = deque()  # greenlets behind each gate
        self._loop: Any = None  # the loop that the next step is scheduled on
        self._timer: Any = None  # the timer of the next step, if it needs one
        self._iteration = -1  # the loop's iteration at the last turn that was seen
        self._slice_end = 0.0  # monotonic seconds; the end of the slice that began at that turn

    def add(self, gate: _Gate, width: int) -> None:
        """Open *gate*, which holds *width* greenlets, when its turn comes. Switches: no; works in the hub too."""
        self._gates.append(gate)
        self._widths.append(width)
        loop = here.hub.loop
        if self._loop is not loop:
            self._loop = loop
            loop.run_callback(self._step)

    def wait(self) -> None:
        """Let all other greenlets have a turn. Switches: yes, until `_step` wakes it. A kill ends only this wait."""
        turn = _Turn()
        self.add(turn, WIDTH)
        turn.waiter.get()

    def idle(self) -> bool:
        """Return whether every gate is open."""
        return not self._gates

    def slice_end(self, now: float) -> float:
        """Return the time at which the hub is due a turn. If it has had one since the last call, *now* counts as it."""
        left = self._slice_end - now
        if not 0 < left <= SLICE:
            iteration = here.hub.loop.iteration
            if iteration != self._iteration or left > 0:  # the hub has turned since, or the clock was replaced
                self._iteration = iteration
                self._slice_end = now + SLICE
                if not 0 <= now - cpu.at < OFTEN:
                    cpu.look(now)
        return self._slice_end

    def _step(self) -> None:
        """Open the next gates, in the hub, and schedule the step after them."""
        # Reset first: a signal handler that adds a gate in the middle of this schedules a step of its own.
        self._loop = None
        turned = self._timer is not None
        self._close_timer()
        now = _clock.monotonic()
        if turned:
            self._slice_end = now + SLICE
            if not 0 <= now - cpu.at < OFTEN:
                cpu.look(now)
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
        """Drop all gates after a fork: their greenlets are the parent's."""
        self._gates.clear()
        self._widths.clear()


pace: Final = Pace()
process.after_fork(pace.forget)
process.after_fork(cpu.forget)

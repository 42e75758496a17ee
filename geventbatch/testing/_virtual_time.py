"""Time that a test controls, under gevent's own hub.

    with virtual_time() as clock:
        caller = gevent.spawn(processor.run, "key", operation)
        clock.advance(0.1)                      # a tenth of a virtual second, microseconds of a real one

Inside the block ``hub.loop`` is a proxy whose timers are virtual: when nothing is ready to run, the time jumps to the
next timer. ``gevent.sleep``, ``Timeout``, ``Event.wait(timeout)``, ``Queue.get(timeout)`` and the rest run unmodified.

Only timers are virtual. Real watchers (sockets, subprocesses, threads) are passed through to the real loop, but never
mix them with virtual time: a greenlet that waits for a socket is not ready, so the time jumps ahead at once, and its
timeout, if any, fires first.
"""

# ruff: noqa: ARG002, FBT001, FBT002 - the proxies have gevent's signatures

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import gevent
from gevent.hub import Waiter

from geventbatch._core.clock import clock as _clock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["VirtualTime", "virtual_time"]

# Not zero, so that code which takes 0.0 for "long ago" behaves as it does on a machine that is up for a while.
_MONOTONIC_START = 1000.0
_WALL_START = 1_000_000_000.0


@contextmanager
def virtual_time(seed: int | None = None) -> Generator[VirtualTime, None, None]:
    """Replace the time of this thread's hub, and the library's own clocks, until the block ends.

    A deadlock still raises `gevent.exceptions.LoopExit`. A greenlet that still sleeps when the block ends is never
    woken, so end it inside. ``time.monotonic`` and ``time.time`` stay real.

    Args:
        seed: None runs ready callbacks, and timers of one moment, in gevent's order: as they were started.
            An integer shuffles both, always in the same way for the same seed, to try another interleaving.

    Yields:
        The clock, a `VirtualTime` that stands at 0.0.

    Raises:
        RuntimeError: Inside another `virtual_time`, or in a thread other than the main one.
    Switches: no.
    """
    hub: Any = gevent.get_hub()  # its loop is not declared as replaceable
    if not hub.main_hub:
        raise RuntimeError("virtual_time() works in the main thread only: it replaces clocks that all threads share")
    if isinstance(hub.loop, _VirtualLoop):
        raise RuntimeError("virtual_time() cannot be nested: the time is virtual already")  # noqa: TRY004 - a state
    loop = _VirtualLoop(hub.loop) if seed is None else _ShuffledLoop(hub.loop, seed)
    clocks = _clock.monotonic, _clock.wall
    hub.loop, _clock.monotonic, _clock.wall = loop, loop.now, loop.wall
    try:
        yield VirtualTime(loop)
    finally:
        _clock.monotonic, _clock.wall = clocks
        if hub.loop is loop:  # else the hub was destroyed
            hub.loop = loop.real
        loop.end()


class VirtualTime:
    """The clock of `virtual_time`; do not make one by hand."""

    def __init__(self, loop: _VirtualLoop) -> None:
        self._loop = loop

    def __repr__(self) -> str:
        return f"<VirtualTime at {self.now()} s, {self.timers} timers>"

    def now(self) -> float:
        """Return the virtual seconds since the block began, rounded to a nanosecond so that 0.1 three times is 0.3.

        Switches: no.
        """
        return round(self._loop.now() - _MONOTONIC_START, 9)

    @property
    def timers(self) -> int:
        """The number of started virtual timers, including the timers of sleeping greenlets; 0 when nothing leaked.

        Switches: no.
        """
        return self._loop.active

    def advance(self, seconds: float) -> None:
        """Sleep for *seconds*, and return after everything else that happens until then.

        This includes all that is due at the very same time, and all that it makes ready. If several greenlets advance
        to one moment, the first returns first, and what it makes ready runs before the next returns. Returns exactly
        *seconds* later, unless `spend` moved the time on further. Never returns if something is always ready, such as a
        loop of ``gevent.sleep(0)``.

        Args:
            seconds: How far, finite and not negative.

        Raises:
            ValueError: *seconds* is negative, infinite or NaN.
            RuntimeError: The block has ended.
        Switches: yes.
        """
        self._loop.wait_settled(_duration("advance", seconds))

    def settle(self) -> None:
        """Let everything that is ready now, and all that it makes ready, run without moving the time.

        Timers that are already due count as ready. Never returns if something is always ready.

        Raises:
            RuntimeError: The block has ended.
        Switches: yes.
        """
        self._loop.wait_settled(0.0)

    def spend(self, seconds: float) -> None:
        """Move the clock as *seconds* of CPU-bound work would: timers become due, but fire only when the hub runs.

        Args:
            seconds: How far, finite and not negative.

        Raises:
            ValueError: *seconds* is negative, infinite or NaN.
            RuntimeError: The block has ended.
        Switches: no.
        """
        self._loop.spend(_duration("spend", seconds))


def _duration(method: str, seconds: float) -> float:
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{method}({seconds!r}): seconds must be finite and not negative")
    return seconds


class _VirtualLoop:
    """A proxy for a real loop, with timers of its own; everything else is the real loop's.

    Guarantees:

    - The time moves only when no callback is ready, no timer is due and no `settle` waits for that; or by `spend`.
    - Timers with ``ref=False`` never keep the loop alive: they fire only before one that does.
    - Timers that are due together fire together, before the callbacks that they make ready, as in the real loop.
    """

    def __init__(self, real: Any) -> None:
        self.real = real
        self.active = 0
        """The number of started timers."""
        self.iteration = 0  # turns in which a timer could fire, as in a real loop
        self._time = _MONOTONIC_START
        self._refs = 0  # started timers that keep the loop alive
        self._starts = 0  # timers ever started, which orders the timers of one moment
        self._heap: list[_Entry] = []  # keeps the entries of stopped timers until they come to the top
        self._settling: deque[Waiter[None]] = deque()
        self._ended = False
        # Of the lowest priority, so that the real loop runs it only when nothing else is pending.
        self._jumper = real.idle()
        self._jumper.priority = real.MINPRI  # gevent's cffi loop loses it as an argument

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @property
    def error_handler(self) -> Any:
        """The real loop's, which reads it; a running hub sets it on the loop that it sees."""
        return self.real.error_handler

    @error_handler.setter
    def error_handler(self, value: Any) -> None:
        self.real.error_handler = value

    def now(self) -> float:
        """Return virtual seconds on the scale of the virtual monotonic clock, so that deadlines are met exactly."""
        return self._time

    def wall(self) -> float:
        return self._time - _MONOTONIC_START + _WALL_START

    def update_now(self) -> None:
        """Do nothing: virtual time is never out of date."""

    update = update_now

    def timer(self, after: float, repeat: float = 0.0, ref: bool = True, priority: int | None = None) -> _VirtualTimer:
        return _VirtualTimer(self, after, repeat, ref, priority)

    def spend(self, seconds: float) -> None:
        self._check_running()
        self._time += seconds

    def wait_settled(self, after: float) -> None:
        waiter: Waiter[None] = Waiter()
        with self.timer(after) as timer:
            timer.start(self._settling.append, waiter)
            waiter.get()

    def end(self) -> None:
        self._ended = True
        for entry in self._heap:
            entry[3].stop()
        self._jumper.close()

    def schedule(self, timer: _VirtualTimer, due: float) -> None:
        self._check_running()
        self._starts += 1
        timer.entry = (due, self._tiebreak(), self._starts, timer)
        heapq.heappush(self._heap, timer.entry)
        self.active += 1
        self.count_ref(timer.ref)

    def unschedule(self, timer: _VirtualTimer) -> None:
        timer.entry = None
        self.active -= 1
        self._refs -= timer.ref

    def count_ref(self, change: int) -> None:
        self._refs += change
        if not self._jumper.active:
            self._jumper.start(self._on_idle)

    def _check_running(self) -> None:
        if self._ended:
            raise RuntimeError("this virtual time has ended: its virtual_time() block was left")

    def _tiebreak(self) -> float:
        return 0.0

    def _interrupts_timers(self) -> bool:
        return False

    def _on_idle(self) -> None:
        # libev gets here with callbacks left if it ran some for longer than the switch interval; libuv always does.
        if self.real._callbacks:  # noqa: SLF001 - no public name says whether any is left
            return
        self.iteration += 1
        due = self._next_due()
        if due <= self._time:
            self._fire_due()
        elif self._settling:
            self._settling.popleft().switch(None)
        elif self._refs:
            self._time = due
            self._fire_due()
        else:
            self._jumper.stop()  # a deadlock then raises LoopExit

    def _next_due(self) -> float:
        heap = self._heap
        while heap and heap[0][3].entry is not heap[0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def _fire_due(self) -> None:
        last = self._starts  # timers started meanwhile wait for the next round, after the callbacks
        while self._next_due() <= self._time and self._heap[0][2] <= last:
            self._fire(heapq.heappop(self._heap))
            if self._interrupts_timers():
                return

    def _fire(self, entry: _Entry) -> None:
        due, _, _, timer = entry
        callback, args = timer.callback, timer.args
        timer.after = due - self._time
        self.unschedule(timer)
        if timer.repeat:
            self.schedule(timer, max(due + timer.repeat, self._time))
        try:
            callback(*args)
        except BaseException:  # the hub decides, as in the real loop
            self.real.handle_error(timer, *sys.exc_info())
        if not timer.active:
            timer.stop()


class _ShuffledLoop(_VirtualLoop):
    """Runs ready callbacks and timers in an order decided by a seed.

    Each ready callback queues one call of `_run_one` in the real loop, which runs any ready callback.
    """

    def __init__(self, real: Any, seed: int) -> None:
        super().__init__(real)
        self._random = random.Random(seed)
        self._ready: list[_Callback] = []

    def run_callback(self, callback: Callable[..., object], *args: Any) -> _Callback:
        ready = self._add_ready(callback, args)
        self.real.run_callback(self._run_one)
        return ready

    def run_callback_threadsafe(self, callback: Callable[..., object], *args: Any) -> _Callback:
        ready = self._add_ready(callback, args)
        self.real.run_callback_threadsafe(self._run_one)
        return ready

    def _add_ready(self, callback: Callable[..., object], args: tuple[Any, ...]) -> _Callback:
        ready = _Callback(callback, args)
        self._ready.append(ready)
        return ready

    def _tiebreak(self) -> float:
        return self._random.random()

    def _interrupts_timers(self) -> bool:
        # Timers that are due together by the clock may be microseconds apart in reality, with callbacks in between.
        return bool(self._random.getrandbits(1))

    def _run_one(self) -> None:
        chosen = self._ready.pop(self._random.randrange(len(self._ready)))
        callback, args = chosen.callback, chosen.args
        chosen.callback = None
        if callback is None or args is None:  # stopped
            return
        try:
            callback(*args)
        except BaseException:  # the hub decides, as in the real loop
            self.real.handle_error(chosen, *sys.exc_info())
        finally:
            chosen.args = None


class _Callback:
    """The result of `run_callback`, with the life that gevent expects of it.

    Pending until it is called; true until it has returned.
    """

    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args: tuple[Any, ...] | None = args

    def __bool__(self) -> bool:
        return self.args is not None

    def __repr__(self) -> str:
        return f"<virtual callback={self.callback!r} args={self.args!r}>"

    @property
    def pending(self) -> bool:
        return self.callback is not None

    def stop(self) -> None:
        self.callback = self.args = None

    close = stop


class _VirtualTimer:
    """A timer of a virtual loop that behaves like libev's, gevent's default.

    So starting an active one changes its callback and not its time, and one that was stopped goes on where it was.
    (Under libuv it would begin anew; code that works under both makes a new timer.)
    """

    __slots__ = ("_closed", "_ref", "after", "args", "callback", "entry", "loop", "priority", "repeat")

    def __init__(self, loop: _VirtualLoop, after: float, repeat: float, ref: bool, priority: int | None) -> None:
        if not math.isfinite(after) or not math.isfinite(repeat):
            raise ValueError(f"virtual time never gets there: after={after!r}, repeat={repeat!r}")
        if repeat < 0:
            raise ValueError(f"repeat must be positive or zero: {repeat!r}")
        self.loop = loop
        self.repeat = repeat
        self.priority = priority  # without effect: timers of one moment fire in the order of their start
        self._ref = bool(ref)
        self._closed = False
        self.after = after
        """Seconds left, while it is not active."""
        self.callback: Any = None
        self.args: Any = None
        self.entry: _Entry | None = None
        """Its entry in the loop's heap, while it is active."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"due at {self.entry[0] - _MONOTONIC_START} s" if self.entry else "not active"
        return f"<virtual timer {state} callback={self.callback!r} args={self.args!r}>"

    @property
    def active(self) -> bool:
        return self.entry is not None

    @property
    def pending(self) -> bool:
        """Return False: it goes from active to called in one step."""
        return False

    @property
    def at(self) -> float:
        return self.entry[0] if self.entry else self.after

    @property
    def ref(self) -> bool:
        return self._ref

    @ref.setter
    def ref(self, value: bool) -> None:
        if self.active:
            self.loop.count_ref(bool(value) - self._ref)
        self._ref = bool(value)

    def start(self, callback: Callable[..., object], *args: Any, update: bool | None = None) -> None:
        self._bind(callback, args)
        if not self.active:
            self.loop.schedule(self, self.loop.now() + max(0.0, self.after))

    def again(self, callback: Callable[..., object], *args: Any, update: bool | None = None) -> None:
        self.stop()
        if self.repeat:
            self._bind(callback, args)
            self.loop.schedule(self, self.loop.now() + self.repeat)

    def stop(self) -> None:
        if self.entry is not None:
            self.after = self.entry[0] - self.loop.now()
            self.loop.unschedule(self)
        self.callback = self.args = None

    def close(self) -> None:
        self.stop()
        self._closed = True

    def _bind(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        if self._closed:
            raise ValueError("this timer is closed: it cannot be started again")
        if not callable(callback):
            raise TypeError(f"Expected callable, not {callback!r}")
        self.callback, self.args = callback, args


_Entry = tuple[float, float, int, _VirtualTimer]
"""Due time, tie-breaker, number, timer. Void unless it is the timer's own entry."""

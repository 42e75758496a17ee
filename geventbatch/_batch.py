"""A batch: the operations of one key that are loaded, applied and saved together, and their answers.

No method here switches greenlets, but for `pause` and `wait_for_operations`. So an outcome, once fixed by `end`, is
fixed for everybody at once, and every way out of a batch leads through `end` (guarantees 2, 3 and 7).
"""

from __future__ import annotations

from contextvars import Context
from math import inf
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import gevent
from gevent.event import AsyncResult
from gevent.hub import Waiter

from geventbatch import _clock, _process
from geventbatch._failure import Failure, aborted, save_failed, timed_out
from geventbatch._metrics import BatchMetric
from geventbatch._operation import BROKEN, STARTED, WAITING, WITHDRAWN
from geventbatch._pace import WIDTH, pace

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch._alarm import Alarm
    from geventbatch._lane import Lane
    from geventbatch._operation import Operation
    from geventbatch._state import State
    from geventbatch.errors import Conflict, Phase

T = TypeVar("T")

_EXACT: Final = 4
"""Broken operations of a batch that may cost it one load each."""

_SHORTEST: Final = 0.001
"""Seconds: what `remaining` gives at the least, since databases take 0 for "no limit"."""


class Batch:
    """One key's load, operations, save and answers.

    Of it, `key` and `remaining` are for users, who get it from `current_batch`. The rest is the library's own.
    """

    __slots__ = (
        "alarm",
        "attempts",
        "behind",
        "bell",
        "broken",
        "completed",
        "conflict",
        "conflicts",
        "context",
        "deadline",
        "ended",
        "epoch",
        "exact",
        "failure",
        "fatal",
        "key",
        "lane",
        "left_at_pause",
        "load_duration",
        "loaded",
        "now",
        "open",
        "operations",
        "outer",
        "phase",
        "returned",
        "save_duration",
        "size",
        "spent",
        "started",
        "state",
        "waiting",
        "window_end",
    )

    # -- mutable state: the operations and who waits for them -----------------------------------------------
    behind: Batch | None  # the next batch of its lane
    waiting: int  # callers that are still there
    size: int  # operations that may have to be applied
    open: bool  # takes operations
    ended: bool  # the outcome is fixed: by `failure`, else by each operation's own
    failure: Failure | None
    # -- mutable state: how far the greenlet that runs it has come -------------------------------------------
    phase: Phase | Literal["queued"]
    loaded: bool
    completed: int  # operations that returned, in this attempt
    attempts: int
    alarm: Alarm | None  # none where no hub could ring it
    deadline: float  # infinite while it pauses; then it will have
    left_at_pause: float  # so much time left
    now: float  # the time, as it was last read
    started: float
    load_duration: float
    save_duration: float
    conflicts: int
    conflict: Conflict | None  # of the last attempt, until the next one begins
    broken: BaseException | None  # what the first broken operation of this attempt raised
    exact: int  # broken operations that may still cost a load each, so that none is judged by what another one left
    returned: bool  # its code has
    spent: bool  # its greenlet runs no other batch
    fatal: BaseException | None  # and ends of this
    bell: Waiter[None] | None  # there while that greenlet waits for operations
    outer: Batch | None  # the batch (of another processor) that it is run inside of

    def __init__(self, state: State, key: Hashable, lane: Lane | None = None, window_end: float = 0.0) -> None:
        """Open it, on a *lane* unless its caller runs it alone; from *window_end* on it may close."""
        self.state = state
        self.key = key
        self.lane = lane
        self.epoch = state.epoch
        self.window_end = window_end
        self.context = Context()  # of its loads and saves (guarantee 11)
        self.operations: list[Operation[Any]] = []  # in the order they came
        # One is made for each batch: values that many share are stored in a row, which is quick.
        self.behind = self.broken = self.failure = self.alarm = self.conflict = self.fatal = self.bell = self.outer = (
            None
        )
        self.ended = self.loaded = self.returned = self.spent = False
        self.open = True
        self.waiting = self.size = self.completed = self.attempts = self.conflicts = 0
        self.exact = _EXACT
        self.phase = "queued"
        self.deadline = self.left_at_pause = inf
        self.now = self.started = self.load_duration = self.save_duration = 0.0

    def __repr__(self) -> str:
        """Sum up its state on one line."""
        state = "ended" if self.ended else self.phase
        left = "" if self.deadline == inf or self.ended else f", {self.remaining():.3f} s left"
        taking = ", open" if self.open else ""
        return (
            f"<Batch {self.key!r}: {state}{taking}, {len(self.operations)} operations, {self.waiting} waiting, "
            f"attempt {self.attempts}{left}>"
        )

    # -- for users ----------------------------------------------------------------------------------------

    def remaining(self) -> float:
        """Seconds until the deadline, never under 0.001: ready to be a statement timeout. Switches: no."""
        left = min(self.deadline - _clock.monotonic(), self.state.options.max_duration)
        return max(_SHORTEST, left)

    # -- callers come and go ------------------------------------------------------------------------------

    def add(self, operation: Operation[Any]) -> None:
        """Take *operation* last; its caller is to wait for its group."""
        operations = self.operations
        operation.group = operations[-1].group if len(operations) % WIDTH else AsyncResult()
        operations.append(operation)
        self.waiting += 1
        self.size += 1
        if self.size == self.state.options.max_batch_size:
            self.close()
        elif self.bell is not None:
            self._ring(self.bell)

    def withdraw(self, operation: Operation[Any]) -> None:
        """The caller of *operation* has left, by a kill or a Timeout of its own (guarantee 7)."""
        if self.ended or operation.state == WITHDRAWN:
            return
        self.waiting -= 1
        self.state.pending -= 1
        if operation.state == WAITING:
            operation.state = WITHDRAWN
            self.size -= 1

    def close(self) -> None:
        """Take no more operations."""
        self.open = False
        if self.bell is not None:
            self._ring(self.bell)

    # -- the greenlet that runs it ------------------------------------------------------------------------

    def over(self) -> bool:
        """Whether the outcome was fixed while a user's function ran. In a child of a fork, never return."""
        if self.epoch != _process.epoch:
            _process.park()
        return self.ended

    def pause(self) -> None:
        """Let the hub have a turn, at no cost to the deadline (guarantee 10). Switches: yes."""
        left = self.deadline - _clock.monotonic()
        self.left_at_pause = max(left, _SHORTEST)
        self.deadline = inf
        try:
            pace.wait()
        finally:
            self.deadline = _clock.monotonic() + left

    def wait_for_operations(self, seconds: float) -> None:
        """Wait for the next operation or the end of the window. Switches: yes.

        Woken by `add` and by `close`, which `stop` and the deadline call too, else by the window's own timer.
        """
        bell: Waiter[None] = Waiter()
        self.bell = bell
        timer = gevent.get_hub().loop.timer(seconds)
        timer.start(bell.switch, None)
        try:
            if self.open:  # a signal handler may have closed it before there was a bell
                bell.get()
        finally:
            self.bell = None
            timer.close()

    def _ring(self, bell: Waiter[None]) -> None:
        self.bell = None
        gevent.get_hub().loop.run_callback(bell.switch, None)  # does nothing when its greenlet went on by itself

    # -- the outcome --------------------------------------------------------------------------------------

    def end(self, failure: Failure | None = None) -> None:
        """Fix the outcome of every operation, and begin to wake their callers. The first call counts."""
        if self.ended:
            return
        self.ended = True
        self.failure = failure
        if self.open:
            self.close()
        if self.waiting:  # else it may be of another thread, which has no business with the count
            self.state.pending -= self.waiting
            self.waiting = 0
        if self.lane is not None:
            width = len(self.operations)
            for first in self.operations[::WIDTH]:
                pace.add(first.group, width if width < WIDTH else WIDTH)  # noqa: FURB136 - min() costs a batch 50 ns
                width -= WIDTH
        if self.state.subscriptions and self.attempts:
            self.state.publish(self.metric())

    def expire(self) -> None:
        """The deadline has passed; its greenlet is not used again (guarantee 11)."""
        self.spent = True
        if self.conflict is not None:  # while it waited to replay: nothing was written
            self.end(save_failed(self.key, self.conflict, ", and max_duration passed before the replay"))
        elif self.phase == "load":
            self.fail_load(timed_out(self.key, "load", self.state.options.max_duration))
        else:
            phase: Phase = "save" if self.phase == "save" else "operations"
            self.end(timed_out(self.key, phase, self.state.options.max_duration))

    def fail_load(self, failure: Failure) -> None:
        """Answer everybody who waits for the key, those in the batches behind too (guarantee 3)."""
        if self.ended:  # those who came since then are the next batch's
            return
        # Cut off first: who comes while a watcher's copy of the error is made is the next batch's. And that copy, which
        # only a batch that began to run needs, is made last: a `repr` of the user's may switch there, or be killed.
        behind = [] if self.lane is None else self.lane.cut_behind()
        for batch in (*behind, self):
            batch.end(failure)

    def abort(self, cause: BaseException) -> None:
        """It was killed, or the greenlet that runs it was."""
        self.spent = True
        self.end(aborted(self.key, cause, saving=self.phase == "save"))

    def answer(self, operation: Operation[T]) -> T:
        """Return or raise the outcome of *operation*."""
        if self.failure is None:
            return operation.answer()
        raise self.failure.exception()

    def metric(self) -> BatchMetric:
        """Sum it up for the watchers."""
        error = None if self.failure is None else self.failure.exception()
        now = _clock.monotonic()
        total_duration = now - self.started
        running = now - self.now  # the load or save that it is in the middle of
        return BatchMetric(
            key=self.key,
            started_at=_clock.wall() - total_duration,
            operation_count=sum(operation.state in {STARTED, BROKEN} for operation in self.operations),
            load_duration=self.load_duration + (running if self.phase == "load" and self.conflict is None else 0.0),
            save_duration=self.save_duration + (running if self.phase == "save" else 0.0),
            total_duration=total_duration,
            attempts=self.attempts,
            error=error,
        )

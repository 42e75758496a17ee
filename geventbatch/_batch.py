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

from geventbatch import _process, _report
from geventbatch._clock import clock as _clock
from geventbatch._failure import Failure, aborted, load_failed, save_failed, timed_out
from geventbatch._live import stack_of
from geventbatch._operation import SETTLED, WAITING, WITHDRAWN
from geventbatch._pace import WIDTH, pace
from geventbatch._process import here
from geventbatch._shown import shown
from geventbatch._summary import tell

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch._alarm import Alarm
    from geventbatch._lane import Lane
    from geventbatch._operation import Operation
    from geventbatch._state import State
    from geventbatch._steps import Steps
    from geventbatch._undo import Undo
    from geventbatch.errors import Conflict, NotSaved, Phase

T = TypeVar("T")

_NONE: Final[Any] = ()
"""In place of lists that hardly any batch needs."""

_SHORTEST: Final = 0.001
"""Seconds: what `remaining` gives at the least, since databases take 0 for "no limit"."""


class Batch:
    """One key's load, operations, save and answers.

    Users get it from `current_batch`. For them are `key`, `alone`, `remaining`, `add_row`, `rows`, `delete`, `deleted`,
    `completed`, `outcomes`, `bulk`, `ask_scope` and `cut`. The rest is the library's own.
    """

    __slots__ = (
        "after",
        "alarm",
        "aside",
        "asked",
        "attempts",
        "behind",
        "bell",
        "broken",
        "bulk",
        "closed",
        "completed",
        "conflict",
        "conflicts",
        "context",
        "cut_off",
        "deadline",
        "deleted",
        "doubted",
        "ended",
        "epoch",
        "failure",
        "fatal",
        "halted",
        "key",
        "lane",
        "left_at_pause",
        "load_conflict",
        "load_duration",
        "loaded",
        "mates",
        "now",
        "open",
        "opened",
        "operations",
        "outcomes",
        "outer",
        "parts",
        "phase",
        "reads",
        "rejections",
        "returned",
        "rows_added",
        "save_duration",
        "saved",
        "scope",
        "size",
        "spent",
        "started",
        "state",
        "steps",
        "stepwise",
        "turn",
        "undo",
        "verdict",
        "waiting",
        "waiting_at_close",
        "window_end",
    )

    # -- mutable state: the operations and who waits for them -----------------------------------------------
    behind: Batch | None  # the next batch of its lane
    waiting: int  # callers that are still there
    size: int  # operations that may have to be applied
    open: bool  # takes operations
    closed: float  # when it took no more; not there while it is open
    waiting_at_close: int  # likewise
    ended: bool  # the outcome is fixed: by `failure`, else by each operation's own
    failure: Failure | None
    # -- mutable state: the attempt at hand -----------------------------------------------------------------
    scope: Any  # what `open_resource` gave
    saved: Any  # what that has still to do when it is saved; not there for a load and save pair
    completed: int  # operations that returned
    reads: int  # operations that were said to be read-only
    rows_added: Any  # pairs: what, and how many operations had returned by then; -1 in the load
    outcomes: Any  # a dict of texts by idempotency key, for the store to record with the save (see `_idempotency`)
    deleted: bool  # the last operation that returned deletes the resource
    cut_off: bool  # what is behind it is applied to what the next load gives, as also behind such a deletion
    halted: bool  # no operation is to be applied any more; or there is something to see to behind each, or this one
    doubted: bool  # the scope has to look at what the operation at hand has done
    steps: Steps | None  # what judges the attempt step by step
    broken: BaseException | None  # what the first broken operation raised
    verdict: NotSaved | None  # of the scope, on what an operation did: it cannot be saved any more
    # -- mutable state: how far the greenlet that runs it has come -------------------------------------------
    phase: Phase | Literal["queued"]
    loaded: bool
    attempts: int
    alarm: Alarm | None  # none where no hub could ring it
    deadline: float  # infinite while it pauses; then it will have
    left_at_pause: float  # so much time left; not there before the first pause
    now: float  # the time, as it was last read; not there before it starts to run
    started: float  # likewise
    turn: int  # of the hub, as it was last seen; -1 if unknown
    load_duration: float
    save_duration: float
    aside: float  # seconds in which it waited to replay, or left its scope without saving
    conflicts: int
    conflict: Conflict | None  # of the last attempt, until the next one begins
    load_conflict: bool  # it was its load's; not there before the first one
    parts: Any  # lists of operations: those that are not settled, the last one first (see `_parts`)
    rejections: int  # operations or saves that the store refused
    stepwise: bool  # its attempts are judged step by step, where the scope can
    asked: Any  # operations that raised whose idempotency keys are still to be looked for in the store
    after: Any  # what the scopes that saved it have still to do
    undo: Undo | None  # there once an operation that raised had to be undone
    returned: bool  # its code has
    spent: bool  # its greenlet runs no other batch
    fatal: BaseException | None  # and ends of this
    bell: Waiter[None] | None  # there while that greenlet waits for operations
    outer: Batch | None  # the batch (of another processor) that it is run inside of
    bulk: Any  # a dict by key: the batches that are loaded with it, or are to be saved with it; empty if it has no bulk
    mates: dict[Batch, None] | None  # those that share its deadline, itself too (see `_bulk`)

    def __init__(
        self, state: State, key: Hashable, opened: float, lane: Lane | None = None, window_end: float = 0.0
    ) -> None:
        """Open it, on a *lane* unless its caller runs it alone; from *window_end* on it may close."""
        self.state = state
        self.opened = opened
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
        self.scope = self.verdict = self.mates = self.steps = self.undo = None
        self.ended = self.loaded = self.returned = self.spent = self.deleted = self.halted = False
        self.doubted = self.stepwise = self.cut_off = False
        self.open = True
        self.waiting = self.size = self.completed = self.reads = self.attempts = self.conflicts = self.rejections = 0
        # Each its own, from the first one on.
        self.parts = self.rows_added = self.outcomes = self.asked = self.after = self.bulk = _NONE
        self.phase = "queued"
        self.deadline = inf
        self.load_duration = self.save_duration = self.aside = 0.0

    def __repr__(self) -> str:
        """Sum up its state on one line."""
        state = "ended" if self.ended else self.phase
        left = "" if self.deadline == inf or self.ended else f", {self.remaining():.3f} s left"
        taking = ", open" if self.open else ""
        return (
            f"<Batch {shown(self.key)}: {state}{taking}, {len(self.operations)} operations, {self.waiting} waiting, "
            f"attempt {self.attempts}{left}>"
        )

    # -- for users ----------------------------------------------------------------------------------------

    def remaining(self) -> float:
        """Seconds until the deadline, never under 0.001: ready to be a statement timeout. Switches: no."""
        left = min(self.deadline - _clock.monotonic(), self.state.options.max_duration)
        return max(_SHORTEST, left)

    @property
    def alone(self) -> bool:
        """Whether it runs in the greenlet or thread of its one caller (``batching=False``)."""
        return self.lane is None

    def add_row(self, row: object) -> None:
        """Have the store insert *row* with the save, in its transaction: an audit line, an event of an outbox.

        It is dropped when the operation raises, and when the batch is replayed, which adds it again. Lists and dicts in
        it are inserted as the operation has left them, whatever those behind it do to them in the resource.

        Args:
            row: What the store inserts: see there.

        Raises:
            RuntimeError: What the processor's ``open_resource`` gave inserts no rows.
        Switches: no.
        """
        if not getattr(self.scope, "takes_rows", False):
            raise RuntimeError(f"add_row: {type(self.scope).__name__} inserts no rows beside the resource")
        mark = -1 if self.phase == "load" else self.completed
        if not self.rows_added:
            self.rows_added = []
        self.rows_added.append((mark, row))
        if self.phase == "operations":
            self.halted = True  # so that it is looked at when the operation has returned

    @property
    def rows(self) -> list[object]:
        """What was added for the save, in the order of the operations."""
        return [row for _, row in self.rows_added]

    def delete(self) -> None:
        """Have the store delete the resource, when the operation has returned.

        The operations before are saved with it; those behind are applied to what the next load gives.

        Raises:
            RuntimeError: What the processor's ``open_resource`` gave deletes nothing.
        Switches: no.
        """
        if not getattr(self.scope, "deletes", False):
            raise RuntimeError(f"delete: {type(self.scope).__name__} deletes no resources")
        self.deleted = self.halted = True

    def ask_scope(self) -> None:
        """Have the scope's ``operation_returned`` asked when the operation at hand has returned. For a scope to call.

        It does nothing in a load or a save. Switches: no.
        """
        if self.phase == "operations":
            self.doubted = self.halted = True

    def cut(self) -> None:
        """Have the operations behind the one at hand applied to what the next load gives. For a scope to call.

        It does nothing in a load or a save. Switches: no.
        """
        if self.phase == "operations":
            self.cut_off = self.halted = True

    # -- callers come and go ------------------------------------------------------------------------------

    def add(self, operation: Operation[Any]) -> None:
        """Take *operation* last; its caller is to wait for its group."""
        operations = self.operations
        operation.group = operations[-1].group if len(operations) % WIDTH else AsyncResult()
        operations.append(operation)
        self.waiting += 1
        self.size += 1
        most = self.state.max_batch_size
        if most is not None and self.size == most:
            self.close()
        elif self.bell is not None:
            self._ring(self.bell)

    def withdraw(self, operation: Operation[Any]) -> None:
        """The caller of *operation* has left, by a kill or a Timeout of its own (guarantee 7)."""
        if self.ended or operation.state == WITHDRAWN:
            return
        self.waiting -= 1
        self.state.pending -= 1
        self.state.counts.withdrawn += 1
        if operation.state == WAITING:
            operation.state = WITHDRAWN
            self.size -= 1

    def close(self) -> None:
        """Take no more operations."""
        if self.open:
            self.open = False
            self.closed = _clock.monotonic()
            self.waiting_at_close = self.waiting
        if self.bell is not None:
            self._ring(self.bell)

    # -- the greenlet that runs it ------------------------------------------------------------------------

    def over(self) -> bool:
        """Whether the outcome was fixed while a user's function ran. In a child of a fork, never return."""
        if self.epoch != here.epoch:
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

    def begin_attempt(self) -> None:
        """Forget what the attempt before has left."""
        self.completed = 0
        self.broken = self.verdict = self.steps = None
        self.deleted = self.doubted = self.cut_off = False
        self.halted = self.ended
        self.rows_added = self.outcomes = _NONE

    def forget_operation(self) -> None:
        """The operation at hand has raised: what it wanted of the store is void."""
        while self.rows_added and self.rows_added[-1][0] == self.completed:
            self.rows_added.pop()
        self.deleted = self.doubted = self.cut_off = False
        self.halted = self.ended or self.steps is not None

    # -- the outcome --------------------------------------------------------------------------------------

    def end(self, failure: Failure | None = None) -> None:
        """Fix the outcome of every operation, and begin to wake their callers. The first call counts."""
        if self.ended:
            return
        self.ended = self.halted = True
        self.failure = failure
        if self.open:
            self.close()
        state = self.state
        waiting = self.waiting
        if waiting:  # else it may be of another thread, which has no business with the count
            state.pending -= waiting
            self.waiting = 0
        if self.lane is not None:
            operations = self.operations
            first, left = 0, len(operations)
            while left > 0:
                pace.add(operations[first].group, left if left < WIDTH else WIDTH)  # noqa: FURB136 - min() costs 50 ns
                first += WIDTH
                left -= WIDTH
        if failure is not None and self.lane is not None:  # else its caller does that: it may be of another thread
            _report.failed(self, failure, waiting)
        counts = state.counts
        if self.attempts:
            counts.batches += 1
            if failure is not None:
                counts.failed_batches += 1
            if state.subscriptions or self.undo is not None:
                tell(self, waiting)
        counts.answered += waiting if self.lane is not None else 1  # last of all: see `_watch.outcomes`

    def expire(self) -> None:
        """The deadline has passed; its greenlet is not used again (guarantee 11)."""
        for batch in (self,) if self.mates is None else tuple(self.mates):
            batch.time_out()

    def time_out(self) -> None:
        """Answer its callers, after the deadline has passed."""
        self.spent = True
        if self.conflict is not None:  # while it waited to replay: nothing was written
            self.fail_conflict(self.conflict, ", and max_duration passed before the replay")
        elif self.phase == "load":
            self.fail_load(timed_out(self.key, "load", self.state.options.max_duration, stack_of(self)))
        else:
            phase: Phase = "save" if self.phase == "save" else "operations"
            self.end(timed_out(self.key, phase, self.state.options.max_duration, stack_of(self)))

    def fail_load(self, failure: Failure) -> None:
        """Answer everybody who waits for the key, those in the batches behind too (guarantee 3)."""
        if self.ended:  # those who came since then are the next batch's
            return
        # Cut off first: who comes while a watcher's copy of the error is made is the next batch's. And that copy, which
        # only a batch that began to run needs, is made last: a `repr` of the user's may switch there, or be killed.
        behind = [] if self.lane is None else self.lane.cut_behind()
        for batch in (*behind, self):
            batch.end(failure)

    def fail_conflict(self, conflict: Conflict, why: str) -> None:
        """There is no replay after *conflict*."""
        if self.load_conflict:
            self.fail_load(load_failed(self.key, conflict, why))
        else:
            self.end(save_failed(self.key, conflict, why))

    def abort(self, cause: BaseException) -> None:
        """It was killed, or the greenlet that runs it was."""
        self.spent = True
        self.end(aborted(self.key, cause, saving=self.phase == "save"))

    def answer(self, operation: Operation[T]) -> T:
        """Return or raise the outcome of *operation*."""
        if self.failure is None or operation.state == SETTLED:
            return operation.answer()
        raise self.failure.exception()

"""A batch: the operations of one key that are loaded, applied and saved together, and their answers.

No method here switches greenlets, but for `wait_for_operations`. So an outcome, once fixed by `end`, is fixed for
everybody at once, and every way out of a batch leads through `end` (guarantees 2, 3 and 7).
"""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import gevent
from gevent.event import AsyncResult
from gevent.hub import Waiter

from geventbatch._core.clock import clock as _clock
from geventbatch._core.hub_turns import WIDTH, pace
from geventbatch._core.operation import SETTLED, WAITING, WITHDRAWN
from geventbatch._failure import Failure, aborted
from geventbatch._safe_repr import shown
from geventbatch._watch import log
from geventbatch._watch.summary import tell

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.dispatcher import Dispatcher
    from geventbatch._core.key_queue import KeyQueue
    from geventbatch._core.operation import Operation
    from geventbatch.errors import Phase

T = TypeVar("T")

_SHORTEST: Final = 0.001
"""Seconds: what `remaining` gives at the least, since databases take 0 for "no limit"."""


class Batch:
    """One key's operations, those who wait for them, and their answers.

    Users get it from `current_batch`, and see of it what `geventbatch.Batch` has. What is of its way from load to save,
    its `Attempt` has.
    """

    __slots__ = (
        "attempt",
        "behind",
        "bell",
        "closed",
        "dispatcher",
        "ended",
        "epoch",
        "failure",
        "key",
        "key_queue",
        "loaded",
        "open",
        "opened",
        "operations",
        "reads",
        "size",
        "tried",
        "waiting",
        "waiting_at_close",
        "window_end",
    )

    # -- mutable state -------------------------------------------------------------------------------------
    attempt: Attempt | None  # there from when it starts to run until its greenlet has let go of it
    tried: int  # how often it was loaded, once its greenlet has let go
    behind: Batch | None  # the next batch of its key queue
    waiting: int  # callers that are still there
    size: int  # operations that may have to be applied
    reads: int  # operations that were said to be read-only
    open: bool  # takes operations
    loaded: bool  # what comes now is applied only if its window is open
    closed: float  # when it took no more; not there while it is open
    waiting_at_close: int  # likewise
    bell: Waiter[None] | None  # there while the greenlet that runs it waits for operations
    ended: bool  # the outcome is fixed: by `failure`, else by each operation's own
    failure: Failure | None

    def __init__(
        self,
        dispatcher: Dispatcher,
        key: Hashable,
        opened: float,
        key_queue: KeyQueue | None = None,
        window_end: float = 0.0,
    ) -> None:
        """Open it, on a *key_queue* unless its caller runs it alone; from *window_end* on it may close."""
        self.dispatcher = dispatcher
        self.opened = opened
        self.key = key
        self.key_queue = key_queue
        self.epoch = dispatcher.epoch
        self.window_end = window_end
        self.operations: list[Operation[Any]] = []  # in the order they came
        # One is made for each batch: values that many share are stored in a row, which is quick.
        self.attempt = self.behind = self.failure = self.bell = None
        self.ended = self.loaded = False
        self.open = True
        self.waiting = self.size = self.reads = self.tried = 0

    def __repr__(self) -> str:
        """Sum up its state on one line."""
        attempt = self.attempt
        state = "ended" if self.ended else self.phase
        left = "" if attempt is None or self.ended else f", {self.remaining():.3f} s left"
        taking = ", open" if self.open else ""
        return (
            f"<Batch {shown(self.key)}: {state}{taking}, {len(self.operations)} operations, {self.waiting} waiting, "
            f"attempt {self.attempts}{left}>"
        )

    # -- for users: see `geventbatch.Batch` ----------------------------------------------------------------

    def remaining(self) -> float:
        """Seconds until the deadline, never under 0.001."""
        most: float = self.dispatcher.options.max_duration
        attempt = self.attempt
        if attempt is None:
            return _SHORTEST if self.ended else most
        return max(_SHORTEST, min(attempt.remaining(), most))

    @property
    def alone(self) -> bool:
        """Whether it runs in the greenlet or thread of its one caller (``batching=False``)."""
        return self.key_queue is None

    def add_row(self, row: object) -> None:
        """Have the store insert *row* with the save."""
        attempt = self.attempt
        if attempt is None or not getattr(attempt.scope, "takes_rows", False):
            raise RuntimeError(f"add_row: {type(self.scope).__name__} inserts no rows beside the resource")
        attempt.add_row(row)

    @property
    def rows(self) -> list[object]:
        """What was added for the save, in the order of the operations."""
        return [] if self.attempt is None else [row for _, row in self.attempt.rows_added]

    def delete(self) -> None:
        """Have the store delete the resource, when the operation has returned."""
        attempt = self.attempt
        if attempt is None or not getattr(attempt.scope, "deletes", False):
            raise RuntimeError(f"delete: {type(self.scope).__name__} deletes no resources")
        attempt.delete()
        self.ask_scope()

    @property
    def deleted(self) -> bool:
        """Whether the last operation that returned deletes the resource."""
        return self.attempt is not None and self.attempt.deleted

    @property
    def completed(self) -> int:
        """Operations that returned, in the attempt at hand."""
        return 0 if self.attempt is None else self.attempt.completed

    @property
    def outcomes(self) -> dict[str, str]:
        """Texts by idempotency key, for the store to record with the save (see `once`)."""
        return {} if self.attempt is None else self.attempt.outcomes

    @property
    def bulk(self) -> dict[Any, Batch]:
        """By key: the batches that are loaded with it, or are to be saved with it; empty if it has no bulk."""
        return {} if self.attempt is None else self.attempt.bulk or {}

    def ask_scope(self, *, first: bool = False) -> None:
        """Have the scope's ``operation_returned`` asked when the operation at hand has returned."""
        if self.attempt is not None and (first or self.attempt.phase == "operations"):
            self.attempt.doubt()

    def cut(self) -> None:
        """Have the operations behind the one at hand applied to what the next load gives."""
        if self.attempt is not None and self.attempt.phase == "operations":
            self.attempt.cut()

    def let_go(self) -> Attempt | None:
        """Give its attempt, whose greenlet is through with it; afterwards there is none, and so no cycle."""
        attempt, self.attempt = self.attempt, None
        if attempt is not None:
            self.tried = attempt.attempts
        return attempt

    # -- for our own stores and watchers ------------------------------------------------------------------

    @property
    def phase(self) -> Phase | Literal["queued", "replay"]:
        """What it is doing; 'replay' is the wait before one."""
        return "queued" if self.attempt is None else self.attempt.phase

    @property
    def attempts(self) -> int:
        """How often it was loaded."""
        return self.tried if self.attempt is None else self.attempt.attempts

    @property
    def conflicts(self) -> int:
        """How often somebody else had changed the resource."""
        return 0 if self.attempt is None else self.attempt.conflicts

    @property
    def rejections(self) -> int:
        """Operations or saves that the store refused."""
        return 0 if self.attempt is None else self.attempt.rejections

    @property
    def in_bulk(self) -> bool:
        """Whether it is loaded and saved in one scope with others."""
        return self.attempt is not None and self.attempt.mates is not None

    @property
    def stepwise(self) -> bool:
        """Whether the attempt at hand is judged step by step."""
        return self.attempt is not None and self.attempt.steps is not None

    @property
    def overdue(self) -> bool:
        """Whether its code, which was interrupted, has not returned yet."""
        return self.ended and self.attempt is not None and self.attempt.spent

    @property
    def context(self) -> Context:
        """That of its load and its save; an empty one where it does not run."""
        return Context() if self.attempt is None else self.attempt.context

    def forget_operation(self) -> None:
        """Take back what the operation at hand wanted of the store."""
        if self.attempt is not None:
            self.attempt.forget_operation()

    @property
    def scope(self) -> Any:
        """What ``open_resource`` gave for the attempt at hand."""
        return None if self.attempt is None else self.attempt.scope

    # -- callers come and go ------------------------------------------------------------------------------

    def add(self, operation: Operation[Any]) -> None:
        """Take *operation* last; its caller is to wait for its group."""
        operations = self.operations
        operation.group = operations[-1].group if len(operations) % WIDTH else AsyncResult()
        operations.append(operation)
        self.waiting += 1
        self.size += 1
        most = self.dispatcher.max_batch_size
        if most is not None and self.size == most:
            self.close()
        elif self.bell is not None:
            self._ring(self.bell)

    def withdraw(self, operation: Operation[Any]) -> None:
        """The caller of *operation* has left, by a kill or a Timeout of its own (guarantee 7)."""
        if self.ended or operation.state == WITHDRAWN:
            return
        self.waiting -= 1
        self.dispatcher.pending -= 1
        self.dispatcher.counts.withdrawn += 1
        if operation.state == WAITING:
            operation.state = WITHDRAWN
            self.size -= 1

    def close(self) -> None:
        """Take no more operations."""
        if self.open:
            self.shut(_clock.monotonic())
        if self.bell is not None:
            self._ring(self.bell)

    def shut(self, now: float) -> None:
        """It is open, and takes no more operations, in the greenlet that runs it."""
        self.open = False
        self.closed = now
        self.waiting_at_close = self.waiting

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

    def end(self, failure: Failure | None = None) -> None:  # noqa: C901 - every batch passes it, in one piece
        """Fix the outcome of every operation, and begin to wake their callers. The first call counts."""
        if self.ended:
            return
        self.ended = True
        self.failure = failure
        attempt = self.attempt
        if attempt is not None:
            attempt.must_look = True
        if self.open:
            self.close()
        dispatcher = self.dispatcher
        waiting = self.waiting
        if waiting:  # else it may be of another thread, which has no business with the count
            dispatcher.pending -= waiting
            self.waiting = 0
        if self.key_queue is not None:
            operations = self.operations
            first, left = 0, len(operations)
            while left > 0:
                pace.add(operations[first].group, left if left < WIDTH else WIDTH)  # noqa: FURB136 - min() costs 50 ns
                first += WIDTH
                left -= WIDTH
        if failure is not None and self.key_queue is not None:  # else its caller does that: it may be of another thread
            log.failed(self, failure, waiting)
        counts = dispatcher.counts
        if attempt is not None and attempt.attempts:
            counts.batches += 1
            if failure is not None:
                counts.failed_batches += 1
            if dispatcher.subscriptions or attempt.undo is not None:
                tell(attempt, waiting)
        counts.answered += waiting if self.key_queue is not None else 1  # last of all: see `_watch.outcomes`

    def fail_load(self, failure: Failure) -> None:
        """Answer everybody who waits for the key, those in the batches behind too (guarantee 3)."""
        if self.ended:  # those who came since then are the next batch's
            return
        # Cut off first: who comes while a watcher's copy of the error is made is the next batch's. And that copy, which
        # only a batch that began to run needs, is made last: a `repr` of the user's may switch there, or be killed.
        behind = [] if self.key_queue is None else self.key_queue.cut_behind()
        for batch in (*behind, self):
            batch.end(failure)

    def abort(self, cause: BaseException) -> None:
        """It was killed, or the greenlet that runs it was, which runs no other batch."""
        attempt = self.attempt
        if attempt is not None:
            attempt.spent = True
        self.end(aborted(self.key, cause, saving=attempt is not None and attempt.phase == "save"))

    def answer(self, operation: Operation[T]) -> T:
        """Return or raise the outcome of *operation*."""
        if self.failure is None or operation.state == SETTLED:
            return operation.answer()
        raise self.failure.exception()

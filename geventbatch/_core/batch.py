"""A batch: the operations of one key that are loaded, applied and saved together, and their answers.

No method here switches greenlets, except `wait_for_operations`. So `end` fixes the outcome for all callers at once.
Every way out of a batch leads through `end` (guarantees 2, 3 and 7).
"""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from gevent.event import AsyncResult

from geventbatch._core.bell import Bell
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import settle
from geventbatch._core.hub_turns import WIDTH, pace
from geventbatch._core.operation import SETTLED, WAITING, WITHDRAWN
from geventbatch._failure import Failure, aborted
from geventbatch._safe_repr import shown
from geventbatch._watch import log
from geventbatch._watch.summary import tell
from geventbatch.errors import named, not_started

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.dispatcher import Dispatcher
    from geventbatch._core.key_queue import KeyQueue
    from geventbatch._core.operation import Operation
    from geventbatch._options import Options
    from geventbatch.errors import OperationCancelled, Phase

T = TypeVar("T")

NO_KEY: Final = object()
"""Stands for the only key of an operation."""

_SHORTEST: Final = 0.001
"""Seconds: the least that `remaining` returns, since databases take 0 for "no limit"."""


class Batch:
    """The operations of one key, the number of their callers, and their answers.

    Users get it from `current_batch`, with the attributes of `geventbatch.Batch`. The state of its way from load to
    save is in its `Attempt`.
    """

    __slots__ = (
        "attempt",
        "attempts",
        "behind",
        "bell",
        "closed",
        "dispatcher",
        "ended",
        "failure",
        "key",
        "key_queue",
        "loaded",
        "open",
        "opened",
        "operations",
        "reads",
        "size",
        "waiting",
        "waiting_at_close",
        "window_end",
    )

    # -- mutable state -------------------------------------------------------------------------------------
    attempt: Attempt | None  # set while it runs: from its start until `let_go`
    attempts: int  # the number of its loads
    behind: Batch | None  # the next batch of its key queue
    waiting: int  # callers that are still there
    size: int  # operations that may have to be applied
    reads: int  # operations that were declared read-only
    open: bool  # takes operations
    loaded: bool  # new operations are applied only while its window is open
    closed: float  # monotonic seconds when it closed; unset while it is open
    waiting_at_close: int  # callers that waited then; unset while it is open
    bell: Bell | None  # wakes the greenlet that runs it; set once that has waited for operations
    ended: bool  # the outcome is fixed: by `failure`, or else by each operation's own
    failure: Failure | None

    def __init__(
        self,
        dispatcher: Dispatcher,
        key: Hashable,
        opened: float,
        key_queue: KeyQueue | None = None,
        window_end: float = 0.0,
    ) -> None:
        """Open a batch, on a *key_queue* unless it is unbatched; from *window_end* on it may close."""
        self.dispatcher = dispatcher
        self.opened = opened
        self.key = key
        self.key_queue = key_queue
        self.window_end = window_end
        self.operations: list[Operation[Any]] = []  # in the order they came
        # Every batch pays for this: an assignment to many attributes is the quickest way to fill them.
        self.attempt = self.behind = self.failure = self.bell = None
        self.ended = self.loaded = False
        self.open = True
        self.waiting = self.size = self.reads = self.attempts = 0

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
        """Return the seconds until the deadline, at least 0.001."""
        most: float = self.dispatcher.options.max_duration
        attempt = self.attempt
        if attempt is None:
            return _SHORTEST if self.ended else most
        return max(_SHORTEST, min(attempt.remaining(), most))

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """Its key; inside an operation across keys, all keys of the operation, in the order in which it named them."""
        return (self.key,)

    @property
    def alone(self) -> bool:
        """True for an unbatched operation, which runs in its caller's own greenlet or thread."""
        return self.key_queue is None

    def add_row(self, row: object) -> None:
        """Let the store insert *row* with the save."""
        attempt = self.attempt
        if attempt is None or not getattr(attempt.scope, "takes_rows", False):
            raise self._refusal("add_row", "inserts no rows beside the resource")
        attempt.add_row(row)

    @property
    def rows(self) -> list[object]:
        """The rows that were added for the save, in the order of the operations."""
        return [] if self.attempt is None else [row for _, row in self.attempt.rows_added or ()]

    def delete(self, key: Hashable = NO_KEY, /) -> None:
        """Let the store delete the resource, at one of the operation's keys, when the operation has returned."""
        attempt = self.attempt
        if attempt is None or not getattr(attempt.scope, "deletes", False):
            raise self._refusal("delete", "deletes no resources")
        attempt.delete(self._own(key))
        self.ask_scope()

    def _refusal(self, call: str, what: str) -> RuntimeError:
        """Return the error of a *call* that the store does not obey, with the scope's advice."""
        advice = getattr(self.scope, "deletes_if", None) if call == "delete" else None
        return RuntimeError(
            f"{call}: the store of the processor {self.dispatcher.options.name} {what}{f': {advice}' if advice else ''}"
        )

    def _own(self, key: Any) -> Hashable:
        """Return the one of the operation's keys that *key* means. Raise if it is none of them."""
        keys = self.keys
        if key is NO_KEY and not keys[1:]:
            return keys[0]
        if key is NO_KEY:
            raise RuntimeError(f"delete: the operation has the {named(keys)}: say which one, as in delete({keys[0]!r})")
        normalize = self.dispatcher.options.store.normalize_key
        asked = key if key in keys or normalize is None else normalize(key)
        if asked not in keys:
            raise RuntimeError(f"delete: the operation has the {named(keys)}, and not the key {shown(key)}")
        return keys[keys.index(asked)]

    @property
    def deleted(self) -> bool:
        """Return whether the last operation that returned deletes the resource."""
        return bool(self.deleted_keys)

    @property
    def deleted_keys(self) -> tuple[Hashable, ...]:
        """The keys whose resources the last operation that returned deletes."""
        return () if self.attempt is None else self.attempt.deleted

    @property
    def completed(self) -> int:
        """The number of operations that have returned, in the attempt at hand."""
        return 0 if self.attempt is None else self.attempt.completed

    @property
    def outcomes(self) -> dict[str, str]:
        """Outcomes as text, by idempotency key, for the store to record with the save (see `once`)."""
        attempt = self.attempt
        if attempt is None:
            return {}
        if attempt.outcomes is None:
            attempt.outcomes = {}  # a scope may keep it from its load on
        return attempt.outcomes

    @property
    def bulk(self) -> dict[Any, Batch]:
        """By key: the batches loaded with it, or to be saved with it; empty without a bulk."""
        return {} if self.attempt is None else self.attempt.bulk or {}

    def ask_scope(self, *, first: bool = False) -> None:
        """Ask the scope's ``operation_returned`` when the operation at hand has returned."""
        if self.attempt is not None and (first or self.attempt.phase == "operations"):
            self.attempt.doubt()

    def cut(self) -> None:
        """Apply the operations behind the one at hand to the resource of another load."""
        if self.attempt is not None and self.attempt.phase == "operations":
            self.attempt.cut()

    def let_go(self) -> Attempt | None:
        """Drop its attempt, with which the greenlet is finished, and return it: else the two would form a cycle."""
        attempt, self.attempt = self.attempt, None
        return attempt

    # -- for our own stores and watchers ------------------------------------------------------------------

    @property
    def phase(self) -> Phase | Literal["queued", "replay"]:
        """The phase that it is in; 'replay' is the wait before a replay."""
        return "queued" if self.attempt is None else self.attempt.phase

    @property
    def conflicts(self) -> int:
        """The number of its conflicts."""
        return 0 if self.attempt is None else self.attempt.conflicts

    @property
    def rejections(self) -> int:
        """The number of its operations and saves that the store refused."""
        return 0 if self.attempt is None else self.attempt.rejections

    @property
    def in_bulk(self) -> bool:
        """Return whether it is loaded and saved in one scope with others."""
        return self.attempt is not None and self.attempt.mates is not None

    @property
    def stepwise(self) -> bool:
        """Return whether the attempt at hand is judged step by step."""
        return self.attempt is not None and self.attempt.steps is not None

    @property
    def overdue(self) -> bool:
        """Return whether its callers were answered that it failed, but its code has not returned yet."""
        return self.failure is not None and self.attempt is not None

    @property
    def context(self) -> Context:
        """The context of its load and save; an empty one while it does not run."""
        return Context() if self.attempt is None else self.attempt.context

    def forget_operation(self) -> None:
        """Drop the rows and the deletion of the operation at hand."""
        if self.attempt is not None:
            self.attempt.forget_operation()

    @property
    def scope(self) -> Any:
        """The scope of the attempt at hand."""
        return None if self.attempt is None else self.attempt.scope

    def opener(self, options: Options) -> Any:
        """Return what opens its scope, with its key."""
        return options.open_resource

    # -- in the key queue ---------------------------------------------------------------------------------

    @property
    def loads(self) -> tuple[Hashable, ...]:
        """The keys to load for it."""
        return (self.key,)

    @property
    def taken(self) -> bool:
        """True if a worker has taken it from its key queue."""
        return self.attempt is not None or self.ended

    def come_first(self, key_queue: KeyQueue) -> None:
        """Wait for a worker: all that was before it in *key_queue* has ended, and it may have been taken with that."""
        if not self.taken:
            key_queue.shard.put(self)

    def cut_off(self) -> Batch | None:
        """Return what ends with it, which was cut off its key queue."""
        return self

    @property
    def nodes(self) -> Sequence[Batch]:
        """What stands for it in its key queues."""
        return (self,)

    def whole(self) -> Batch:
        """Return what it stands for in its key queue."""
        return self

    def count_keys(self, started: int) -> Iterable[tuple[Hashable, int]]:
        """Return its keys, and how many operations each has had of those that were *started*."""
        return ((self.key, started),)

    def listed(self) -> Batch | None:
        """Return what to show for it among the live batches."""
        return self

    def free(self) -> None:
        """Let the next batch of the key run: it has ended, and its code has returned."""
        self.let_go()
        if self.key_queue is not None:
            self.key_queue.drop(self)

    # -- callers come and go ------------------------------------------------------------------------------

    def add(self, operation: Operation[Any]) -> None:
        """Append *operation*, and give it a group for its caller to wait for."""
        operations = self.operations
        if operations:
            operation.group = operations[-1].group if len(operations) % WIDTH else AsyncResult()
            operations.append(operation)
        else:  # most have one alone: a list of it is smaller than one that it was appended to
            operation.group = AsyncResult()
            self.operations = [operation]
        self.waiting += 1
        self.size += 1
        most = self.dispatcher.max_batch_size
        if most is not None and self.size == most:
            self.close()
        elif self.bell is not None:
            self.bell.ring()

    def withdraw(self, operation: Operation[Any]) -> None:
        """Count off the caller of *operation*, which has left by a kill or a Timeout of its own (guarantee 7)."""
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
            self.bell.ring()

    def shut(self, now: float) -> None:
        """Close it, in the greenlet that runs it; it must be open."""
        self.open = False
        self.closed = now
        self.waiting_at_close = self.waiting

    def wait_for_operations(self) -> None:
        """Wait for the next operation or the end of the window. Switches: yes.

        Woken by `add` and by `close`, which `stop` and the deadline call too, else by the end of the window.
        """
        if self.bell is None:
            self.bell = Bell()
        self.bell.wait(self)

    def cancel(self, operation: Operation[Any], seconds: float) -> OperationCancelled:
        """Withdraw *operation*, which has not started within *seconds*. Return the error for its caller."""
        error = self.not_started(seconds)  # a crossing knows what it waits for until it leaves
        self.withdraw(operation)
        return error

    def not_started(self, seconds: float) -> OperationCancelled:
        """Return the error for a caller that leaves, since its operation has not started within *seconds*."""
        return not_started((self.key,), seconds)

    # -- the outcome --------------------------------------------------------------------------------------

    def end(self, failure: Failure | None = None) -> None:  # noqa: C901 - every batch passes it, in one piece
        """Fix the outcome of every operation, and begin to wake their callers. The first call counts."""
        if self.ended:
            return
        self.ended = True
        attempt = self.attempt
        if attempt is not None:
            attempt.must_look = True
            if failure is not None:
                failure = failure.in_parts(attempt.parts)
        self.failure = failure
        if self.open:
            self.close()
        dispatcher = self.dispatcher
        waiting = self.waiting
        if waiting:  # an unbatched operation has none: it may run in another thread, and is not in the count
            dispatcher.pending -= waiting
            self.waiting = 0
        if self.key_queue is not None:
            operations = self.operations
            first, left = 0, len(operations)
            while left > 0:
                pace.add(operations[first].group, left if left < WIDTH else WIDTH)  # noqa: FURB136 - min() costs 50 ns
                first += WIDTH
                left -= WIDTH
        if failure is not None and self.key_queue is not None:  # `run_alone` does it for an unbatched one
            log.failed(dispatcher.options.name, failure, waiting)
        counts = dispatcher.counts
        if attempt is not None and self.attempts:
            counts.batches += 1
            if failure is not None:
                counts.failed_batches += 1
            if dispatcher.subscriptions or attempt.undo is not None:
                tell(attempt, waiting)
        counts.answered += waiting if self.key_queue is not None else 1  # last of all: see `_watch.counted`

    def fail_load(self, failure: Failure) -> None:
        """Answer all callers that wait for the key, also in the batches behind (guarantee 3)."""
        if self.ended:  # operations that came since its end belong to the next batch
            return
        # The batches behind are cut off first: an operation that comes while the error is copied for a watcher belongs
        # to a new batch. This batch, the only one that needs the copy, ends last: a `repr` of the user's may switch
        # there, or be killed.
        behind = [] if self.key_queue is None else self.key_queue.cut_behind()
        for batch in (*behind, self):
            batch.end(failure)

    def abort(self, cause: BaseException) -> None:
        """End the batch, since it or its greenlet was killed by *cause*; the greenlet runs no other batch."""
        attempt = self.attempt
        if attempt is not None:
            attempt.spent = True
            if attempt.committed and not self.ended:
                settle(attempt)
        self.end(aborted(self.key, cause, saving=attempt is not None and attempt.phase == "save"))

    def answer(self, operation: Operation[T]) -> T:
        """Return or raise the outcome of *operation*."""
        if self.failure is None or operation.state == SETTLED:
            return operation.answer()
        raise self.failure.of(operation).exception()

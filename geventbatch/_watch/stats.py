"""A picture of a processor at this moment: its counters, and what each live batch is doing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock

if TYPE_CHECKING:
    from collections.abc import Hashable
    from types import FrameType

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.batch import Batch
    from geventbatch._core.dispatcher import Dispatcher

_DEEPEST: Final = 20
"""Frames of a stack, at the most."""

_OURS: Final = ("geventbatch._", "geventbatch.integrations.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorStats:
    """Counters of a processor, in this process. Names that end in ``_total`` only grow, from its first `run` on."""

    keys: int
    """Keys that have live batches; keys of equal hash count as one."""
    batches: int
    """Live batches: queued or running."""
    operations: int
    """Operations whose callers wait."""
    workers: int
    """Greenlets that run batches, or are ready to."""
    operations_per_second: float
    """Operations answered per second, over the last ten seconds or less."""
    operations_total: int
    """Operations whose callers were answered, whatever the answer."""
    batches_total: int
    """Batches that began to run and ended."""
    failed_batches_total: int
    """Batches that failed as a whole, those of a missing resource too, of which nothing is logged."""
    conflicts_total: int
    """Loads and saves that raised `Conflict`, since the resource was changed elsewhere."""
    withdrawn_total: int
    """Operations whose callers left before the answer: by a kill, a Timeout of their own, ``start_timeout``."""
    overloaded_total: int
    """Operations that were refused with `ProcessorOverloaded`."""
    undone_total: int
    """Operations whose changes were undone, since they raised; each time counts."""
    undo_duration: float
    """Seconds that undoing took, in all; see `BatchMetric`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveBatch:
    """A batch that has not ended, or whose code has not returned yet. Durations are in seconds."""

    key: Hashable
    phase: Literal["queued", "load", "operations", "save", "replay"]
    """The phase that it is in; 'replay' is the wait before a replay."""
    age: float
    """Time since it opened."""
    running: float | None
    """Time since it started; None while it is queued."""
    remaining: float | None
    """Time until its deadline; None while it is queued, and from its end on."""
    overdue: bool
    """True if its callers were answered that it failed, but its code has not returned yet: it still holds its key."""
    waiting: int
    """Callers that wait for it."""
    operations: int
    attempts: int
    stack: tuple[str, ...]
    """The place where its code waits, the innermost frame last: 'file:line in function'. Empty if it is unknown."""
    keys: tuple[Hashable, ...] = ()
    """`key`; of an operation across keys, all its keys."""
    waits_at: tuple[Hashable, ...] = ()
    """Keys at which others came before it that have not ended. Empty once it runs, and while it waits for a worker."""
    waits_for: tuple[tuple[Hashable, ...], ...] = ()
    """For each of `waits_at`, the keys of the batch that is the first there. That one runs, or waits at another key."""


def stats_of(dispatcher: Dispatcher) -> ProcessorStats:
    """Return the counters of *dispatcher*."""
    counts = dispatcher.counts
    return ProcessorStats(
        keys=len(dispatcher.key_queues),
        batches=dispatcher.batch_count(),
        operations=dispatcher.pending + len(dispatcher.alone),
        workers=sum(shard.workers for shard in tuple(dispatcher.shards.values())),
        operations_per_second=counts.rate(),
        operations_total=counts.answered,
        batches_total=counts.batches,
        failed_batches_total=counts.failed_batches,
        conflicts_total=counts.conflicts,
        withdrawn_total=counts.withdrawn,
        overloaded_total=counts.overloaded,
        undone_total=counts.undone,
        undo_duration=counts.undo_seconds,
    )


def live_batch(batch: Batch) -> LiveBatch:
    """Return a picture of *batch*."""
    now = _clock.monotonic()
    attempt = batch.attempt  # read once: for another thread it may be gone at the next read
    before = before_of(batch) if attempt is None else []
    return LiveBatch(
        key=batch.key,
        phase="queued" if attempt is None else attempt.phase,
        age=now - batch.opened,
        running=None if attempt is None else now - attempt.started,
        remaining=None if attempt is None or batch.ended else batch.remaining(),
        overdue=batch.overdue,
        waiting=1 if batch.key_queue is None and not batch.ended else batch.waiting,
        operations=len(batch.operations),
        attempts=batch.attempts if attempt is None else attempt.batch.attempts,  # of its component, if it has one
        stack=() if attempt is None else stack_of(attempt),
        keys=batch.loads,
        waits_at=tuple([key for key, _ in before]),
        waits_for=tuple([first.loads for _, first in before]),
    )


def before_of(batch: Batch) -> list[tuple[Hashable, Batch]]:
    """Return the keys at which *batch* is not the first, with the batch that is."""
    found = []
    for node in batch.nodes:
        key_queue = node.key_queue
        if key_queue is not None and key_queue.first is not None and key_queue.first is not node:
            found.append((key_queue.key, key_queue.first.whole()))
    return found


def stack_of(attempt: Attempt) -> tuple[str, ...]:
    """Return the place where the code of the batch waits: see `LiveBatch.stack`."""
    greenlet: Any = None if attempt.alarm is None else attempt.alarm.greenlet
    if greenlet is None or process.running.get(greenlet) is not attempt:
        return ()  # another batch of its bulk may lead
    frames: list[str] = []
    frame: FrameType | None = greenlet.gr_frame  # None while it runs
    while frame is not None and len(frames) < _DEEPEST and not frame.f_globals.get("__name__", "").startswith(_OURS):
        frames.append(f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}")
        frame = frame.f_back
    return tuple(reversed(frames))

"""What watchers see of batches, and how they cannot hurt them (guarantee 16)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from gevent.event import Event

from geventbatch._core import process

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from geventbatch._core.batch import Batch
    from geventbatch.errors import BatchError, Phase

HELD: Final = 1024
"""Metrics that a subscription holds for a slow reader; the newest are dropped and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetric:
    """One batch that ended. Durations are in seconds, over all its attempts.

    What `load_duration`, `apply_duration` and `save_duration` leave of `total_duration` it waited for replays, or left
    its resource without saving it. The batches of a bulk share these times.
    """

    key: Hashable
    started_at: float
    """`time.time` when it started to run."""
    operation_count: int
    """Operations that were started."""
    load_duration: float
    save_duration: float
    total_duration: float
    """From its start to its answers; the wait in the queue is not part of it."""
    attempts: int
    """How often it was loaded: 1 without a replay."""
    error: BatchError | None
    """Why it failed as a whole; None when it was saved, or had nothing to save."""
    queue_wait: float
    """From its opening to its start: until the batch before had ended, a worker was free, ``max_batches`` let it."""
    window: float
    """From its opening until it took no more operations."""
    apply_duration: float
    conflicts: int
    """How often somebody else had changed the resource."""
    raised: int
    """Of the started operations, those that raised; their callers have that."""
    withdrawn: int
    """Operations whose callers had left before the answers."""
    waiting_at_close: int
    """Callers that waited for it when it took no more operations."""
    phase: Phase | None
    """What it was doing when it failed: 'load', 'operations' or 'save'; None when it has no error."""
    operation_name: str | None
    """The qualified name of its operations, if they have one and the same."""
    undone: int = 0
    """How often what an operation had changed was undone, since it raised."""
    undo_duration: float = 0.0
    """What that took, applying others again included; and attempts that were given up for it, and the loads after them.
    It is part of the durations above."""


class Watcher(Protocol):
    """Who is shown metrics: a subscription, or an adapter in `geventbatch.integrations`."""

    def publish(self, metric: BatchMetric) -> None:
        """See *metric*. It must not switch."""

    def close(self) -> None:
        """There are no more."""


class BatchWatcher(Watcher, Protocol):
    """One that sees batches too, from their beginning on: for traces."""

    def begin(self, batches: list[Batch]) -> None:
        """*batches* are about to be loaded together, for the first time or again. In the context of load and save."""

    def end(self, batch: Batch, metric: BatchMetric) -> None:
        """*batch* has ended: called in place of `publish`. It must not switch."""


class MetricSubscription:
    """An iterator of `BatchMetric`, from `Processor.subscribe_batch_metrics`.

    It belongs to the greenlet that reads it. It ends after the last metric when the processor has stopped, or when
    closed; one that is no longer referenced is forgotten.

    Attributes:
        missed: How many metrics were dropped because 1,024 were waiting to be read.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self._closed = False
        self._restart()

    def _restart(self) -> None:
        self._epoch = process.here.epoch
        self.missed = 0
        self._held: deque[BatchMetric] = (
            deque()
        )  # a deque, since a processor with batching=False publishes from threads
        self._bell = Event()  # set when there is something to look at

    def __iter__(self) -> Iterator[BatchMetric]:
        """Give itself."""
        return self

    def __next__(self) -> BatchMetric:
        """Wait for the next metric. Switches: yes, while there is none.

        Woken by `publish` and `close`, which `stop` calls at its end.
        """
        while True:
            self._notice_fork()
            if self._held:
                return self._held.popleft()
            if self._closed:
                raise StopIteration
            self._bell.clear()
            if not self._held and not self._closed:  # another thread may have rung before the bell was cleared
                self._bell.wait()

    def close(self) -> None:
        """End after what it holds. Switches: no."""
        self._closed = True
        self._bell.set()

    def publish(self, metric: BatchMetric) -> None:
        """Hold *metric* for the reader, or drop it. Switches: no."""
        self._notice_fork()
        if self._closed:
            return
        if len(self._held) < HELD:
            self._held.append(metric)
            self._bell.set()
        else:
            self.missed += 1

    def _notice_fork(self) -> None:
        if self._epoch != process.here.epoch:
            self._restart()  # what it holds, and who waits, is the parent's

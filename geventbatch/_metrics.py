"""What watchers see of batches, and how they cannot hurt them (guarantee 16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gevent.queue import SimpleQueue

from geventbatch import _process

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from geventbatch.errors import BatchError

HELD: Final = 1024
"""Metrics that a subscription holds for a slow reader; the newest are dropped and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetric:
    """One batch that ended. Durations are in seconds, over all its attempts."""

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


class BatchMetrics:
    """An iterator of `BatchMetric`, from `Processor.subscribe_batch_metrics`.

    It belongs to the greenlet that reads it. It ends after the last metric when the processor has stopped, or when closed;
    one that is no longer referenced is forgotten.

    Attributes:
        missed: How many metrics were dropped because 1,024 were waiting to be read.
    """

    def __init__(self) -> None:
        """Hold nothing."""
        self.missed = 0
        self._closed = False
        self._restart()

    def _restart(self) -> None:
        self._thread = _process.native_thread()
        self._queue: SimpleQueue[BatchMetric | None] = SimpleQueue()

    def __iter__(self) -> Iterator[BatchMetric]:
        """Give itself."""
        return self

    def __next__(self) -> BatchMetric:
        """Wait for the next metric. Switches: yes, while there is none.

        Woken by `publish` and `close`, which `stop` calls at its end.
        """
        metric = self._queue.get() if len(self._queue) or not self._closed else None
        if metric is None:
            raise StopIteration
        return metric

    def close(self) -> None:
        """End after what it holds. Switches: no."""
        self._closed = True
        self._put(None)

    def publish(self, metric: BatchMetric) -> None:
        """Hold *metric* for the reader, or drop it. Switches: no."""
        if len(self._queue) < HELD:
            self._put(metric)
        else:
            self.missed += 1

    def _put(self, metric: BatchMetric | None) -> None:
        if _process.native_thread() == self._thread:
            self._queue.put(metric)
        else:  # a processor with batching=False in a thread: a put from there would lose the wake-up
            self._queue.hub.loop.run_callback_threadsafe(self._queue.put, metric)

    def after_fork(self) -> None:
        """In a child, drop what the parent's batches left."""
        self._restart()

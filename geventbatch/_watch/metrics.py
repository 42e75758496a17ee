"""Metrics of batches for watchers, which cannot hurt a batch (guarantee 16)."""

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
"""Metrics that a subscription holds for a slow reader; further ones are dropped and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetric:
    """One batch that ended. Durations are in seconds, over all its attempts.

    The rest of `total_duration` beside `load_duration`, `apply_duration` and `save_duration` was spent waiting for
    replays, or exiting the scope without a save. The batches of a bulk share these times.
    """

    key: Hashable
    started_at: float
    """`time.time` when it started to run."""
    operation_count: int
    """Operations that were started."""
    load_duration: float
    save_duration: float
    total_duration: float
    """Time from its start to its answers, without the wait in the queue."""
    attempts: int
    """Loads: 1 without a replay."""
    error: BatchError | None
    """The error of the batch as a whole; None if it was saved, or had nothing to save."""
    queue_wait: float
    """Time from its opening to its start: it waits for the batch before, a free worker, and ``max_batches``."""
    window: float
    """Time from its opening until it took no more operations."""
    apply_duration: float
    conflicts: int
    """Loads and saves that raised `Conflict`, since the resource was changed elsewhere."""
    raised: int
    """Started operations that raised; their callers got the errors."""
    withdrawn: int
    """Operations whose callers had left before the answers."""
    waiting_at_close: int
    """Callers that waited for it when it took no more operations."""
    phase: Phase | None
    """The phase in which it failed: 'load', 'operations' or 'save'; None without an error."""
    operation_name: str | None
    """The qualified name of its operations, if they all have the same."""
    undone: int = 0
    """Operations whose changes were undone, since they raised; each time counts."""
    undo_duration: float = 0.0
    """Time for undoing: applying other operations again, and attempts that were given up, with the loads after them.
    It is part of the durations above."""
    keys: tuple[Hashable, ...] = ()
    """All its keys: `key`, or those that operations across keys connect. Such a batch is saved as one."""
    bulk_keys: int = 0
    """Keys that its last load had; 0 if it opened its key, or the keys of its operation, by itself."""


class Watcher(Protocol):
    """A receiver of metrics: a subscription, or an adapter in `geventbatch.integrations`."""

    def publish(self, metric: BatchMetric) -> None:
        """Take *metric*. It must not switch."""

    def close(self) -> None:
        """End: no metric follows."""


class BatchWatcher(Watcher, Protocol):
    """A watcher that sees batches too, from their beginning on: for traces."""

    def begin(self, batches: list[Batch]) -> None:
        """See *batches*, which are about to be loaded together, perhaps again. In the context of load and save."""

    def end(self, batch: Batch, metric: BatchMetric) -> None:
        """See the end of *batch*. Called in place of `publish`. It must not switch."""


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
        self._bell = Event()  # set by `publish` and `close`

    def __iter__(self) -> Iterator[BatchMetric]:
        """Return itself."""
        return self

    def __next__(self) -> BatchMetric:
        """Wait for the next metric. Switches: yes, while there is none.

        Woken by `publish` and `close`, which `stop` calls at its end.
        """
        while True:
            process.notice_fork()
            self._notice_fork()
            if self._held:
                return self._held.popleft()
            if self._closed:
                raise StopIteration
            self._bell.clear()
            if not self._held and not self._closed:  # another thread may have set the bell just before it was cleared
                self._bell.wait()

    def close(self) -> None:
        """End the iteration after the metrics that it holds. Switches: no."""
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
            self._restart()  # the metrics that it holds, and the waiter, are the parent's

"""Outcomes of operations since an exporter last looked, counted by one piece of code for all exporters.

With ``batching=False``, any thread may end a batch, or look. A signal handler that stops a processor looks too, in the
middle of a look of the same thread.
"""

from __future__ import annotations

from operator import sub
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import ref

from gevent import monkey

from geventbatch import _seam

if TYPE_CHECKING:
    from geventbatch._core.batch import Batch
    from geventbatch._core.counts import Counts
    from geventbatch._processor import Processor
    from geventbatch._watch.metrics import BatchMetric

new_lock: Final[Any] = monkey.get_original("_thread", "RLock")
"""A lock of threads, not of greenlets: it is held for a few additions, during which nothing switches."""


class Counted(NamedTuple):
    """Operations by outcome, and other counts: see `ProcessorStats`."""

    returned: int = 0
    raised: int = 0
    failed: int = 0
    unknown: int = 0
    withdrawn: int = 0
    refused: int = 0
    conflicts: int = 0
    undone: int = 0
    undo_seconds: float = 0.0


OUTCOMES: Final = Counted._fields[:6]

_NOTHING: Final[tuple[Any, ...]] = (0, 0, 0, 0, 0, 0.0)


class Outcomes:
    """Counts what one processor does, for one exporter, from now on."""

    def __init__(self, processor: Processor[Any]) -> None:
        self._processor = ref(processor)
        # -- mutable state ---------------------------------------------------------------------------------
        self._lock = new_lock()
        self._counts: Counts | None = None  # at the last look; after a fork there are new ones
        self._of_batches = 0  # answers in batches that `of_batch` has counted
        self._last: tuple[Any, ...] = _NOTHING  # all other counts at the last look
        self.new()

    def of_batch(self, batch: Batch, metric: BatchMetric) -> Counted:
        """Return the new counts, with the answers of *batch*, which has ended as *metric* says. Switches: no."""
        answered = len(batch.operations) - metric.withdrawn
        raised = min(metric.raised, answered)  # callers of some may have left
        failed, *others = self._new(answered)
        error, rest = metric.error, answered - raised
        if error is None:
            return Counted(rest, raised, failed, 0, *others)
        if error.retry_safe:
            return Counted(0, raised, failed + rest, 0, *others)
        return Counted(0, raised, failed, rest, *others)

    def new(self) -> Counted:
        """Return the new counts since the last call. Switches: no."""
        failed, *others = self._new()
        return Counted(0, 0, failed, 0, *others)

    def _new(self, of_batches: int = 0) -> tuple[Any, ...]:
        """Return the new answers that `of_batch` does not count, and the new counts of all else.

        Such answers are of batches that never began: they failed with the load of another one. A batch adds its answers
        to the counts only after `of_batch`, so that a look in between does not take them for such.
        """
        processor = self._processor()
        if processor is None:
            return _NOTHING
        counts = _seam.dispatcher_of(processor).counts
        with self._lock:
            if counts is not self._counts:
                self._counts, self._of_batches, self._last = counts, 0, _NOTHING
            self._of_batches += of_batches
            while True:
                last = self._last
                now = (
                    counts.answered - self._of_batches,
                    counts.withdrawn,
                    counts.overloaded,
                    counts.conflicts,
                    counts.undone,
                    counts.undo_seconds,
                )
                highest = tuple(map(max, now, last))  # with batching=False a thread may have set one back
                if self._last is last:  # else a signal handler has looked meanwhile
                    self._last = highest
                    return tuple(map(sub, highest, last))

    def forget_lock(self) -> None:
        """Make a new lock after a fork, since a thread of the parent's may have held the old one. Switches: no."""
        self._lock = new_lock()

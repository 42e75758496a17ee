"""What has become of operations since an exporter looked last: counted once, whichever exporter it is.

With ``batching=False`` any thread may end a batch, or look. And a signal handler that stops a processor looks too, in
the middle of a look of the same thread.
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
"""Of threads, and not of greenlets: it is held for a few additions, in which nothing switches."""


class Counted(NamedTuple):
    """Operations by outcome, and what else is counted: see `ProcessorStats`."""

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
    """What one processor has done, for one exporter. What was before it was made is not counted."""

    def __init__(self, processor: Processor[Any]) -> None:
        self._processor = ref(processor)
        # -- mutable state ---------------------------------------------------------------------------------
        self._lock = new_lock()
        self._counts: Counts | None = None  # those that were seen last: after a fork there are others
        self._told = 0  # answers of batches that have told what became of them
        self._last: tuple[Any, ...] = _NOTHING  # what was seen of the rest
        self.new()

    def of_batch(self, batch: Batch, metric: BatchMetric) -> Counted:
        """Return what is new, the answers of *batch* included, which has ended as *metric* says. Switches: no."""
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
        """Return what is new since the last call. Switches: no."""
        failed, *others = self._new()
        return Counted(0, 0, failed, 0, *others)

    def _new(self, told: int = 0) -> tuple[Any, ...]:
        """Return what is new of answers that no batch tells of, and of what follows the outcomes of answers.

        Such an answer is one of a batch that never began: that has failed with another one's load. A batch counts its
        answers behind telling of them, so that nobody who looks between takes them for such.
        """
        processor = self._processor()
        if processor is None:
            return _NOTHING
        counts = _seam.dispatcher_of(processor).counts
        with self._lock:
            if counts is not self._counts:
                self._counts, self._told, self._last = counts, 0, _NOTHING
            self._told += told
            while True:
                last = self._last
                now = (
                    counts.answered - self._told,
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
        """After a fork: a thread of the parent's may have held it. Switches: no."""
        self._lock = new_lock()

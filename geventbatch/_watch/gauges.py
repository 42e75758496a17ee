"""What is there of a processor at this moment, for the exporters."""

from __future__ import annotations

from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

from geventbatch import _seam
from geventbatch._core import process

if TYPE_CHECKING:
    from geventbatch._processor import Processor


class Gauges(NamedTuple):
    """By the names of the metrics. With nothing but defaults: of no processor, or of one that has stopped."""

    live_batches: float = 0
    overdue_batches: float = 0
    waiting_operations: float = 0
    workers: float = 0
    max_duration_seconds: float = 0

    def with_other(self, other: Gauges) -> Gauges:
        """Sum up two processors of one name."""
        longest = max(self.max_duration_seconds, other.max_duration_seconds)
        return Gauges(*map(add, self, other))._replace(max_duration_seconds=longest)


def gauges_of(processor: Processor[Any], last: Gauges) -> Gauges:
    """Look at *processor*; in another thread what is overdue is as it was at the *last* look. Switches: no."""
    stats, overdue = processor.stats(), last.overdue_batches
    if process.in_thread():  # else the batches may change meanwhile
        overdue = sum([batch.overdue for batch in _seam.dispatcher_of(processor).batches()])
    longest = _seam.options_of(processor).max_duration
    return Gauges(stats.batches, overdue, stats.operations, stats.workers, longest)

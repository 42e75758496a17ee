"""Gauges of a processor at this moment, for the exporters."""

from __future__ import annotations

from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

from geventbatch import _seam
from geventbatch._core import process

if TYPE_CHECKING:
    from geventbatch._processor import Processor


class Gauges(NamedTuple):
    """The gauges, by the names of the metrics. The defaults stand for no processor, or for one that has stopped."""

    live_batches: float = 0
    overdue_batches: float = 0
    waiting_operations: float = 0
    workers: float = 0
    max_duration_seconds: float = 0

    def with_other(self, other: Gauges) -> Gauges:
        """Return the gauges of two processors of the same name together."""
        longest = max(self.max_duration_seconds, other.max_duration_seconds)
        return Gauges(*map(add, self, other))._replace(max_duration_seconds=longest)


def gauges_of(processor: Processor[Any], last: Gauges) -> Gauges:
    """Return the gauges of *processor*. In another thread, overdue batches are taken from *last*. Switches: no."""
    stats, overdue = processor.stats(), last.overdue_batches
    if process.in_thread():  # in another one, the batches may change during the sum
        overdue = sum([batch.overdue for batch in _seam.dispatcher_of(processor).batches()])
    longest = _seam.options_of(processor).max_duration
    return Gauges(stats.batches, overdue, stats.operations, stats.workers, longest)

"""A batch that ends, summed up: for those who watch, and for the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from geventbatch._clock import clock as _clock
from geventbatch._metrics import BatchMetric
from geventbatch._operation import BROKEN, SETTLED, STARTED, common_name
from geventbatch.errors import LoadFailed

if TYPE_CHECKING:
    from geventbatch._batch import Batch
    from geventbatch._failure import Failure
    from geventbatch.errors import Phase

_WAS_STARTED: Final = frozenset({STARTED, BROKEN, SETTLED})


def tell(batch: Batch, waiting: int) -> None:
    """Say what has become of *batch*, so many callers of which are about to be answered. Switches: no."""
    if batch.undo is not None:
        batch.undo.tell(batch)
    if batch.state.subscriptions:
        batch.state.publish(metric_of(batch, waiting), batch)


def metric_of(batch: Batch, waiting: int) -> BatchMetric:
    """Sum *batch* up, when so many of its callers are about to be answered."""
    failure = batch.failure
    error = None if failure is None else failure.exception()
    now = _clock.monotonic()
    total_duration = now - batch.started
    running = now - batch.now  # the load, save or wait that it is in the middle of
    load_duration, save_duration, aside = batch.load_duration, batch.save_duration, batch.aside
    if batch.phase == "save":
        save_duration += running
    elif batch.conflict is not None:
        aside += running
    elif batch.phase == "load":
        load_duration += running
    started = [operation for operation in batch.operations if operation.state in _WAS_STARTED]
    failed = failure is not None
    return BatchMetric(
        key=batch.key,
        started_at=_clock.wall() - total_duration,
        operation_count=len(started),
        load_duration=load_duration,
        save_duration=save_duration,
        total_duration=total_duration,
        attempts=batch.attempts,
        error=error,
        queue_wait=batch.started - batch.opened,
        window=batch.closed - batch.opened,
        apply_duration=max(0.0, total_duration - load_duration - save_duration - aside),
        conflicts=batch.conflicts,
        raised=sum(one.error is not None and (one.state == SETTLED or not failed) for one in started),
        withdrawn=0 if batch.lane is None else len(batch.operations) - waiting,
        waiting_at_close=batch.waiting_at_close,
        phase=None if failure is None else failure.phase or _failed_phase(batch, failure),
        operation_name=common_name(started),
        undone=0 if batch.undo is None else batch.undo.count,
        undo_duration=0.0 if batch.undo is None else batch.undo.seconds,
    )


def _failed_phase(batch: Batch, failure: Failure) -> Phase:
    """What *batch* was doing when it met *failure*; that of a conflict is met when its replay is given up."""
    if issubclass(failure.kind, LoadFailed):
        return "load"
    return "save" if batch.conflict is not None or batch.phase == "queued" else batch.phase

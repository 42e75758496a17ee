"""The summary of a batch that ends, for watchers and the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geventbatch._core.clock import clock as _clock
from geventbatch._core.operation import SETTLED, WAS_STARTED, common_name
from geventbatch._watch.metrics import BatchMetric
from geventbatch.errors import LoadFailed

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._failure import Failure
    from geventbatch.errors import Phase


def tell(attempt: Attempt, waiting: int) -> None:
    """Publish the summary of a batch, of which *waiting* callers are about to be answered. Switches: no."""
    if attempt.undo is not None:
        attempt.undo.tell(attempt)
    if attempt.dispatcher.subscriptions:
        attempt.dispatcher.publish(metric_of(attempt, waiting), attempt.batch)


def metric_of(attempt: Attempt, waiting: int) -> BatchMetric:
    """Return the metric of the attempt's batch, of which *waiting* callers are about to be answered."""
    batch = attempt.batch
    failure = batch.failure
    error = None if failure is None else failure.exception()
    now = _clock.monotonic()
    total_duration = now - attempt.started
    running = now - attempt.now  # seconds since the load, save or wait at hand began
    load_duration, save_duration, aside = attempt.load_duration, attempt.save_duration, attempt.aside
    if attempt.phase == "save":
        save_duration += running
    elif attempt.phase == "replay":
        aside += running
    elif attempt.phase == "load":
        load_duration += running
    started = [operation for operation in batch.operations if operation.state in WAS_STARTED]
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
        queue_wait=attempt.started - batch.opened,
        window=batch.closed - batch.opened,
        apply_duration=max(0.0, total_duration - load_duration - save_duration - aside),
        conflicts=attempt.conflicts,
        raised=sum(one.error is not None and (one.state == SETTLED or not failed) for one in started),
        withdrawn=0 if attempt.alone else len(batch.operations) - waiting,
        waiting_at_close=batch.waiting_at_close,
        phase=None if failure is None else failure.phase or _failed_phase(attempt, failure),
        operation_name=common_name(started),
        keys=batch.loads,
        bulk_keys=attempt.loaded_with,
        undone=0 if attempt.undo is None else attempt.undo.count,
        undo_duration=0.0 if attempt.undo is None else attempt.undo.seconds,
    )


def _failed_phase(attempt: Attempt, failure: Failure) -> Phase:
    """Return the phase in which the batch failed; for a conflict of a save, that is the save, not the replay."""
    if issubclass(failure.kind, LoadFailed):
        return "load"
    return "save" if attempt.phase == "replay" else attempt.phase

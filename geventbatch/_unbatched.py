"""The off-switch: each operation runs unbatched, in its caller's own greenlet or thread (guarantee 19)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import gevent

from geventbatch._check_values import check_key
from geventbatch._core import process
from geventbatch._core.attempt import Attempt
from geventbatch._core.batch import Batch
from geventbatch._core.clock import clock as _clock
from geventbatch._core.deadline import Alarm
from geventbatch._core.moments import Moments
from geventbatch._watch import log
from geventbatch.errors import OperationCancelled, not_started

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch._core.dispatcher import Dispatcher
    from geventbatch._core.operation import Operation


T = TypeVar("T")


def run_alone(dispatcher: Dispatcher, key: Hashable, operation: Operation[T], start_timeout: float | None) -> T:
    """Load, apply *operation*, save, and return its answer, all in the caller's greenlet or thread."""
    process.check_not_inside(dispatcher)
    check_key(key)
    return run_batch_alone(Batch(dispatcher, key, _clock.monotonic()), operation, start_timeout)


def run_batch_alone(batch: Batch, operation: Operation[T], start_timeout: float | None) -> T:
    """Run *batch*, which has just opened, for *operation*: see `run_alone`."""
    dispatcher, now = batch.dispatcher, batch.opened
    batch.operations.append(operation)
    batch.reads = int(operation.read_only)
    batch.close()
    batch.waiting_at_close = 1
    if now >= dispatcher.counts.next_sample:
        dispatcher.counts.sample(now)
    dispatcher.admit_alone(batch)
    start = None if start_timeout is None else Start(operation, start_timeout)
    # Without a hub, nothing can ring an alarm: there the deadline is only checked before the save.
    deadlines = Moments(priority=-1) if process.has_hub() else None
    alarm = None if deadlines is None else Alarm(deadlines)
    attempt = Attempt(batch, alarm, _clock.monotonic())
    try:
        try:
            attempt.run()
        except gevent.Timeout as error:
            if start is None or error is not start.timeout:
                raise
            start.fired = True
        finally:
            if alarm is not None and deadlines is not None:
                alarm.close()
                deadlines.close()
            if start is not None:
                start.close()
        attempt.run_after()
    finally:
        if batch.failure is not None:
            log.failed(dispatcher.options.name, batch.failure, 1)
        batch.let_go()
        dispatcher.leave_alone(batch)
    if batch.dispatcher.epoch != process.here.epoch:
        process.park()
    if start is not None and start.is_late():  # even if the load has turned the Timeout into another error
        raise not_started(batch.loads, start.seconds)
    return batch.answer(operation)


class Start:
    """The ``start_timeout`` of an operation: it interrupts a load that takes longer, but nothing after the load."""

    def __init__(self, operation: Operation[Any], seconds: float) -> None:
        self.seconds = seconds
        self.fired = False
        self._latest = _clock.monotonic() + seconds
        self.timeout = gevent.Timeout.start_new(seconds) if process.has_hub() else None
        self._started = False
        self.callable = self.__wrapped__ = operation.callable
        operation.callable = self

    def __call__(self, resource: Any, *args: Any) -> Any:
        self.close()
        if self.is_late():
            raise OperationCancelled
        self._started = True
        return self.callable(resource, *args)

    def is_late(self) -> bool:
        """Return whether the time has passed before the operation started."""
        return not self._started and (self.fired or _clock.monotonic() >= self._latest)

    def close(self) -> None:
        """Cancel the timer."""
        if self.timeout is not None:
            self.timeout.close()

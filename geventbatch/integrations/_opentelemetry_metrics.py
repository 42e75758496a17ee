"""Metrics of processors for OpenTelemetry, named and labelled as in `geventbatch.integrations.prometheus`."""

from __future__ import annotations

from operator import add
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from opentelemetry import metrics as _metrics

from geventbatch._watch.counted import OUTCOMES, Counted, Outcomes, new_lock
from geventbatch._watch.gauges import Gauges, gauges_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from opentelemetry.metrics import CallbackOptions, MeterProvider

    from geventbatch._core.batch import Batch
    from geventbatch._processor import Processor
    from geventbatch._watch.metrics import BatchMetric


class Sums:
    """The counts of the processors of one name."""

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self._lock = new_lock()
        self.counted = Counted()
        self.failed_batches: dict[tuple[str, str], int] = {}  # by phase and error

    def add(self, new: Counted) -> None:
        """Add the counts of *new*."""
        with self._lock:
            while True:
                before = self.counted
                after: Any = map(add, before, new)
                after = Counted(*after)
                if self.counted is before:  # else a signal handler has added something
                    self.counted = after
                    return

    def add_failed(self, phase: str, error: str) -> None:
        """Add a batch that has failed."""
        with self._lock:
            self.failed_batches[phase, error] = self.failed_batches.get((phase, error), 0) + 1


class Measured:
    """The metrics of one processor."""

    def __init__(self, instruments: Instruments, processor: Processor[Any]) -> None:
        """Count from now on."""
        self._instruments = instruments
        self.name = processor.name
        # -- mutable state ---------------------------------------------------------------------------------
        self.outcomes = Outcomes(processor)
        self._gauges = Gauges()  # at the last read
        self._closed = False

    def end(self, batch: Batch, metric: BatchMetric) -> None:
        """Count *batch*, which has ended, and its answers. Switches: no."""
        sums = self._instruments.of(self.name)
        sums.add(self.outcomes.of_batch(batch, metric))
        if metric.error is not None:
            sums.add_failed(str(metric.phase), type(metric.error).__name__)

    def close(self) -> None:
        """Add the last counts; the gauges go back to 0. Switches: no."""
        self._closed = True
        self.catch_up()

    def catch_up(self) -> None:
        """Add the counts that came with no batch's end. Switches: no."""
        self._instruments.of(self.name).add(self.outcomes.new())

    def look(self, processor: Processor[Any]) -> Gauges:
        """Return the gauges. Switches: no."""
        self._gauges = Gauges() if self._closed else gauges_of(processor, self._gauges)
        return self._gauges


class Instruments:
    """The metrics of one provider. Gauges and counters are read when they are collected."""

    def __init__(self, provider: MeterProvider | None) -> None:
        self.provider = provider
        meter = _metrics.get_meter("geventbatch", meter_provider=provider)
        self._size = meter.create_histogram("geventbatch_batch_operations", "", "Operations that a batch has started")
        self._wait, self._load, self._apply, self._save, self._total = (
            meter.create_histogram(f"geventbatch_batch_{name}", "s", what)
            for name, what in (
                ("wait_seconds", "From a batch's opening to its start"),
                ("load_seconds", "Loading, over all attempts of a batch"),
                ("apply_seconds", "Operations, over all attempts of a batch"),
                ("save_seconds", "Saving, over all attempts of a batch"),
                ("seconds", "From a batch's start to its answers"),
            )
        )
        for name, counted, what in (
            ("operations", self._operations, "Operations by what became of them"),
            ("failed_batches", self._failed_batches, "Batches that failed as a whole"),
            ("conflicts", self._sum("conflicts"), "Conflicts: another writer had changed a resource"),
            ("undone", self._sum("undone"), "Changes of an operation that raised were undone"),
            ("undo_seconds", self._sum("undo_seconds"), "Seconds that undoing took"),
        ):
            meter.create_observable_counter(f"geventbatch_{name}_total", [counted], "", what)
        for name, unit, what in (
            ("live_batches", "", "Batches that are queued or running"),
            ("overdue_batches", "", "Failed batches whose code has not returned, and holds their key"),
            ("waiting_operations", "", "Operations whose callers wait"),
            ("workers", "", "Greenlets that run batches, or would"),
            ("max_duration_seconds", "s", "How long a batch may take"),
        ):
            meter.create_observable_gauge(f"geventbatch_{name}", [self._gauge(name)], unit, what)
        # -- mutable state ---------------------------------------------------------------------------------
        self._sums: dict[str, Sums] = {}  # by name of processors
        self._measured: WeakKeyDictionary[Processor[Any], Measured] = WeakKeyDictionary()

    def measure(self, processor: Processor[Any]) -> Measured:
        """Show *processor* from now on."""
        measured = self._measured[processor] = Measured(self, processor)
        return measured

    def leave(self, processor: Processor[Any]) -> None:
        """Show *processor* no more; its counts stay."""
        self._measured.pop(processor, None)

    def of(self, name: str) -> Sums:
        """Return the counts of the processors named *name*."""
        return self._sums.setdefault(name, Sums())

    def add_batch(self, name: str, metric: BatchMetric) -> None:
        """Add a batch that has ended."""
        labels = {"processor": name}
        self._size.record(metric.operation_count, labels)
        self._wait.record(metric.queue_wait, labels)
        self._load.record(metric.load_duration, labels)
        self._apply.record(metric.apply_duration, labels)
        self._save.record(metric.save_duration, labels)
        self._total.record(metric.total_duration, labels)

    def forget(self) -> None:
        """Drop the parent's counts after a fork."""
        self._sums.clear()
        for measured in self._measured.values():
            measured.outcomes.forget_lock()

    def _caught_up(self) -> list[tuple[str, Sums]]:
        for measured in tuple(self._measured.values()):
            measured.catch_up()
        return list(self._sums.items())

    def _operations(self, _: CallbackOptions) -> Iterable[_metrics.Observation]:
        for name, sums in self._caught_up():
            for outcome, count in zip(OUTCOMES, sums.counted, strict=False):
                yield _metrics.Observation(count, {"processor": name, "outcome": outcome})

    def _failed_batches(self, _: CallbackOptions) -> Iterable[_metrics.Observation]:
        for name, sums in self._caught_up():
            for (phase, error), count in tuple(sums.failed_batches.items()):
                yield _metrics.Observation(count, {"processor": name, "phase": phase, "error": error})

    def _sum(self, field: str) -> Callable[[CallbackOptions], Iterable[_metrics.Observation]]:
        def look(_: CallbackOptions) -> Iterable[_metrics.Observation]:
            caught_up = self._caught_up()
            return [_metrics.Observation(getattr(sums.counted, field), {"processor": name}) for name, sums in caught_up]

        return look

    def _gauge(self, field: str) -> Callable[[CallbackOptions], Iterable[_metrics.Observation]]:
        def look(_: CallbackOptions) -> Iterable[_metrics.Observation]:
            sums: dict[str, Gauges] = {}
            for processor, measured in tuple(self._measured.items()):
                sums[measured.name] = sums.get(measured.name, Gauges()).with_other(measured.look(processor))
            return [_metrics.Observation(getattr(one, field), {"processor": name}) for name, one in sums.items()]

        return look

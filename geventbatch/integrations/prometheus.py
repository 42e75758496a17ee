"""Metrics of all processors for Prometheus, by one call at import time.

    from geventbatch.integrations import prometheus

    prometheus.watch()

They are in the default registry of ``prometheus_client`` then, or in the one that is given, and come out wherever that
is scraped. The label ``processor`` is `Processor.name`; a key is never a label. docs/watching.md lists them.

With several processes (``PROMETHEUS_MULTIPROC_DIR``) each writes what it has into that folder, and the one that is
scraped sums it up. So these are plain counters, histograms and gauges, for which a batch is counted when it ends. What
no end of a batch tells of, a timer looks at: once a second, until all processors have stopped. Without that folder each
scrape does too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary, ref

import gevent

from geventbatch import _seam
from geventbatch._core import process
from geventbatch._watch import log
from geventbatch._watch.counted import OUTCOMES, Outcomes
from geventbatch._watch.gauges import Gauges, gauges_of

try:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram
except ModuleNotFoundError as missing:
    if missing.name != "prometheus_client":
        raise
    raise ImportError(
        "geventbatch.integrations.prometheus needs prometheus_client: pip install 'geventbatch[prometheus]'",
        name="prometheus_client",
    ) from missing

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics import MetricWrapperBase

    from geventbatch._core.batch import Batch
    from geventbatch._processor import Processor
    from geventbatch._watch.counted import Counted
    from geventbatch._watch.metrics import BatchMetric

__all__ = ["watch"]

_M = TypeVar("_M", bound="MetricWrapperBase")

INTERVAL: Final = 1.0
"""Seconds between two looks at the gauges."""

_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def watch(registry: CollectorRegistry = REGISTRY) -> None:
    """Have *registry* show the metrics of all processors: those that are there, and those that will be made.

    A second call changes nothing.

    Args:
        registry: Of ``prometheus_client``; by default its own.

    Raises:
        ValueError: *registry* has other metrics of these names.
    Switches: no.
    """
    if registry not in _exports:
        _exports[registry] = _Export(registry)


class _Series:
    """The metrics of the processors of one name."""

    def __init__(self, metrics: _Metrics, name: str) -> None:
        self.size, self.wait, self.load, self.apply, self.save, self.total = (
            histogram.labels(name) for histogram in metrics.histograms
        )
        outcomes = (metrics.operations.labels(name, outcome) for outcome in OUTCOMES)
        others = (metric.labels(name) for metric in (metrics.conflicts, metrics.undone, metrics.undo_seconds))
        self.counters = (*outcomes, *others)  # in the order of Counted
        self.gauges = [gauge.labels(name) for gauge in metrics.gauges]
        self._name = name
        self._failed_batches = metrics.failed_batches

    def add_batch(self, metric: BatchMetric) -> None:
        """Add a batch that has ended, but for its answers."""
        self.size.observe(metric.operation_count)
        self.wait.observe(metric.queue_wait)
        self.load.observe(metric.load_duration)
        self.apply.observe(metric.apply_duration)
        self.save.observe(metric.save_duration)
        self.total.observe(metric.total_duration)
        if metric.error is not None:
            self._failed_batches.labels(self._name, metric.phase, type(metric.error).__name__).inc()

    def add(self, new: Counted) -> None:
        """Add what is new."""
        for counter, count in zip(self.counters, new, strict=True):
            if count:
                counter.inc(count)

    def set_gauges(self, values: Gauges) -> None:
        """Show *values*."""
        for gauge, value in zip(self.gauges, values, strict=True):
            gauge.set(value)


class _Metrics:
    """The metrics, in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def named(kind: type[_M], name: str, what: str, *labels: str, **options: Any) -> _M:
            return kind(f"geventbatch_{name}", what, ("processor", *labels), registry=registry, **options)

        self.histograms = (
            named(Histogram, "batch_operations", "Operations that a batch has started", buckets=_SIZES),
            named(Histogram, "batch_wait_seconds", "From a batch's opening to its start", buckets=_SECONDS),
            named(Histogram, "batch_load_seconds", "Loading, over all attempts of a batch", buckets=_SECONDS),
            named(Histogram, "batch_apply_seconds", "Its operations, likewise", buckets=_SECONDS),
            named(Histogram, "batch_save_seconds", "Saving, likewise", buckets=_SECONDS),
            named(Histogram, "batch_seconds", "From a batch's start to its answers", buckets=_SECONDS),
        )
        self.operations = named(Counter, "operations_total", "Operations by what became of them", "outcome")
        self.failed_batches = named(Counter, "failed_batches_total", "Batches that failed as a whole", "phase", "error")
        self.conflicts = named(Counter, "conflicts_total", "Somebody else had changed a resource")
        self.undone = named(Counter, "undone_total", "What an operation that raised had changed was undone")
        self.undo_seconds = named(Counter, "undo_seconds_total", "What that took")
        self.gauges = tuple(
            named(Gauge, name, what, multiprocess_mode=mode)
            for name, what, mode in (
                ("live_batches", "Batches that are queued or run", "livesum"),
                ("overdue_batches", "Failed batches whose code has not returned, and holds their key", "livesum"),
                ("waiting_operations", "Operations whose callers wait", "livesum"),
                ("workers", "Greenlets that run batches, or would", "livesum"),
                ("max_duration_seconds", "How long a batch may take", "livemax"),
            )
        )  # in the order of Gauges


class _Watcher:
    """Sees the batches of one processor."""

    def __init__(self, export: _Export, processor: Processor[Any]) -> None:
        self._export = export
        self._processor = ref(processor)
        self.series = export.series_of(processor.name)
        # -- mutable state ---------------------------------------------------------------------------------
        self.outcomes = Outcomes(processor)
        self.gauges = Gauges()  # as they were last
        self.closed = False

    def __repr__(self) -> str:
        return f"{__name__} of {self._processor()!r}"

    def end(self, batch: Batch, metric: BatchMetric) -> None:
        """Add a batch that has ended. Switches: no."""
        self._export.keep_fresh()
        self.series.add_batch(metric)
        self.series.add(self.outcomes.of_batch(batch, metric))

    def publish(self, metric: BatchMetric) -> None:
        """Nothing: `end` is called in its place."""

    def close(self) -> None:
        """Add what is left; the gauges go back to 0. The timer notices by itself. Switches: no."""
        self.closed = True
        self._export.refresh()

    def look(self, processor: Processor[Any]) -> Gauges:
        """Add what no batch has told of, and give what is there now."""
        self.series.add(self.outcomes.new())
        self.gauges = Gauges() if self.closed else gauges_of(processor, self.gauges)
        return self.gauges


class _Export:
    """The metrics of one registry, and who fills them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        registry.register(self)  # first of all, so that it is asked before the metrics are
        self._metrics = _Metrics(registry)
        # -- mutable state ---------------------------------------------------------------------------------
        self._series: dict[str, _Series] = {}  # by the name of the processors
        self._watchers: WeakKeyDictionary[Processor[Any], _Watcher] = WeakKeyDictionary()
        self._timer: Any = None  # there while a processor may run batches
        for processor in process.processors():
            self.add(processor)
        process.watchers.append(self.add)
        process.at_first_run(self._start)
        process.after_fork(self._forget)

    def describe(self) -> list[Any]:
        """Give no metric of its own."""
        return []

    def collect(self) -> list[Any]:
        """Bring the metrics up to date: called at a scrape, before they are read."""
        self.refresh()
        return []

    def add(self, processor: Processor[Any]) -> None:
        """Watch *processor*."""
        self._watchers[processor] = watcher = _Watcher(self, processor)
        _seam.watch(processor, watcher)

    def series_of(self, name: str) -> _Series:
        """Give the metrics of the processors of this name, which begin at 0."""
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = _Series(self._metrics, name)
        return series

    def refresh(self) -> None:
        """Bring up to date what no batch that ends tells of. Switches: no; any thread may call."""
        sums = dict.fromkeys(self._series, Gauges())
        for processor in process.processors():
            watcher = self._watchers.get(processor)
            if watcher is not None:
                sums[processor.name] = sums[processor.name].with_other(watcher.look(processor))
        for name, values in sums.items():
            self._series[name].set_gauges(values)

    # -- the timer, in the thread that has batches ----------------------------------------------------------

    def keep_fresh(self) -> None:
        """Have the gauges looked at, from now on."""
        active = self._timer is not None and self._timer.active
        if not active and process.here.thread is not None and process.in_thread():
            self._start()

    def _start(self) -> None:
        self._close_timer()  # perhaps of a virtual time that has ended
        # Without a reference: nobody's deadlock, and no end of a program, has to wait for it.
        self._timer = gevent.get_hub().loop.timer(INTERVAL, INTERVAL, ref=False)
        self._timer.start(self._tick)

    def _tick(self) -> None:
        try:
            self.refresh()
        except Exception as error:
            self._close_timer()  # until a batch ends, or the log would be full of it
            log.watcher_failed(self, error)
        else:
            if all(watcher.closed for watcher in self._watchers.values()):
                self._close_timer()

    def _close_timer(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _forget(self) -> None:
        """After a fork: the timer is the parent's, and a thread of the parent's may have held a lock."""
        self._close_timer()
        for watcher in self._watchers.values():
            watcher.outcomes.forget_lock()


_exports: Final[dict[CollectorRegistry, _Export]] = {}

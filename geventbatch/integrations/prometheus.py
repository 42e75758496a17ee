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

from operator import add, sub
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, ref

import gevent
from gevent import monkey

from geventbatch import _process, _report, _seam

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

    from geventbatch._counts import Counts
    from geventbatch._metrics import BatchMetric
    from geventbatch._processor import Processor

__all__ = ["watch"]

_M = TypeVar("_M", bound="MetricWrapperBase")

INTERVAL: Final = 1.0
"""Seconds between two looks at the gauges."""

_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_new_lock: Any = monkey.get_original("_thread", "allocate_lock")


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


class _Seen(NamedTuple):
    """What was counted of a processor: see `ProcessorStats`."""

    answered: int = 0
    withdrawn: int = 0
    overloaded: int = 0
    conflicts: int = 0
    undone: int = 0
    undo_seconds: float = 0.0


class _Gauges(NamedTuple):
    """What is there at this moment."""

    live: float = 0
    overdue: float = 0
    waiting: float = 0
    workers: float = 0
    max_duration: float = 0

    def with_other(self, other: _Gauges) -> _Gauges:
        """Sum up two processors of one name."""
        return _Gauges(*map(add, self, other))._replace(max_duration=max(self.max_duration, other.max_duration))


class _Series:
    """The metrics of the processors of one name."""

    def __init__(self, metrics: _Metrics, name: str) -> None:
        self.size, self.wait, self.load, self.apply, self.save, self.total = (
            histogram.labels(name) for histogram in metrics.histograms
        )
        outcomes = ("returned", "raised", "failed", "unknown", "withdrawn", "refused")
        self.returned, self.raised, self.failed, self.unknown, self.withdrawn, self.refused = (
            metrics.operations.labels(name, outcome) for outcome in outcomes
        )
        self.conflicts = metrics.conflicts.labels(name)
        self.undone, self.undo_seconds = metrics.undone.labels(name), metrics.undo_seconds.labels(name)
        self.gauges = [gauge.labels(name) for gauge in metrics.gauges]
        self._name = name
        self._failed_batches = metrics.failed_batches

    def add_batch(self, metric: BatchMetric, answered: int) -> None:
        """Add a batch that has ended, and its answers."""
        self.size.observe(metric.operation_count)
        self.wait.observe(metric.queue_wait)
        self.load.observe(metric.load_duration)
        self.apply.observe(metric.apply_duration)
        self.save.observe(metric.save_duration)
        self.total.observe(metric.total_duration)
        raised = min(metric.raised, answered)  # callers of some may have left
        if raised:
            self.raised.inc(raised)
        error = metric.error
        if error is None:
            self.returned.inc(answered - raised)
        else:
            (self.failed if error.retry_safe else self.unknown).inc(answered - raised)
            self._failed_batches.labels(self._name, metric.phase, type(error).__name__).inc()

    def add_counts(self, new: _Seen) -> None:
        """Add what needs no metric to be counted."""
        for counter, count in (
            (self.withdrawn, new.withdrawn),
            (self.refused, new.overloaded),
            (self.conflicts, new.conflicts),
            (self.undone, new.undone),
            (self.undo_seconds, new.undo_seconds),
        ):
            if count:
                counter.inc(count)

    def set_gauges(self, values: _Gauges) -> None:
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
        )  # in the order of _Gauges


class _Watcher:
    """Sees the batches of one processor."""

    def __init__(self, export: _Export, processor: Processor[Any]) -> None:
        self._export = export
        self._processor = ref(processor)
        self.series = export.series_of(processor.name)
        # -- mutable state ---------------------------------------------------------------------------------
        self.lock: Any = _new_lock()  # held for a few additions, in which nothing switches
        self._counts: Counts | None = None  # those that were seen last: after a fork there are others
        self._seen = _Seen()  # of them
        self._overdue = 0
        self.closed = False
        self._take(answers=True)  # what was before is not counted

    def __repr__(self) -> str:
        return f"{__name__} of {self._processor()!r}"

    def publish(self, metric: BatchMetric) -> None:
        """Add a batch that has ended. Switches: no."""
        self._export.keep_fresh()
        new = self._take(answers=True)
        self.series.add_batch(metric, new.answered)
        self.series.add_counts(new)

    def close(self) -> None:
        """Add what is left; the gauges go back to 0. The timer notices by itself. Switches: no."""
        self.closed = True
        self.catch_up(answers=True)
        self._export.refresh()

    def catch_up(self, *, answers: bool = False) -> None:
        """Add what was counted since the last batch ended.

        *answers* are there whose batch is not going to be shown: it has failed before it began to run. Another thread
        is not to ask for them, which may come between an answer and its metric.
        """
        new = self._take(answers=answers)
        self.series.add_counts(new)
        if new.answered:
            self.series.failed.inc(new.answered)

    def _take(self, *, answers: bool) -> _Seen:
        """Give what was counted since the last call."""
        processor = self._processor()
        if processor is None:
            return _Seen()
        counts = _seam.state_of(processor).counts
        with self.lock:
            last = self._seen if counts is self._counts else _Seen()
            answered = counts.answered if answers else last.answered
            others = counts.withdrawn, counts.overloaded, counts.conflicts, counts.undone, counts.undo_seconds
            now = _Seen(answered, *others)
            highest: Any = map(max, now, last)
            now = _Seen(*highest)  # with batching=False a thread may have set one back
            self._counts, self._seen = counts, now
        new: Any = map(sub, now, last)
        return _Seen(*new)

    def gauges(self, processor: Processor[Any]) -> _Gauges:
        """Look at it."""
        stats = processor.stats()
        if _process.in_thread():  # else the batches may change meanwhile
            batches = _seam.state_of(processor).batches()
            self._overdue = sum([batch.ended and batch.spent for batch in batches])
        longest = _seam.options_of(processor).max_duration
        return _Gauges(stats.batches, self._overdue, stats.operations, stats.workers, longest)


class _Export:
    """The metrics of one registry, and who fills them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        registry.register(self)  # first of all, so that it is asked before the metrics are
        self._metrics = _Metrics(registry)
        # -- mutable state ---------------------------------------------------------------------------------
        self._series: dict[str, _Series] = {}  # by the name of the processors
        self._watchers: WeakKeyDictionary[Processor[Any], _Watcher] = WeakKeyDictionary()
        self._timer: Any = None  # there while a processor may run batches
        for processor in _process.processors():
            self.add(processor)
        _process.watchers.append(self.add)
        _process.at_first_run(self._start)
        _process.after_fork(self._forget)

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

    def refresh(self, *, answers: bool = False) -> None:
        """Bring up to date what no batch that ends tells of. Switches: no; any thread may call."""
        sums = dict.fromkeys(self._series, _Gauges())
        for processor in _process.processors():
            watcher = self._watchers.get(processor)
            if watcher is not None:
                watcher.catch_up(answers=answers)
                if not watcher.closed:
                    sums[processor.name] = sums[processor.name].with_other(watcher.gauges(processor))
        for name, values in sums.items():
            self._series[name].set_gauges(values)

    # -- the timer, in the thread that has batches ----------------------------------------------------------

    def keep_fresh(self) -> None:
        """Have the gauges looked at, from now on."""
        active = self._timer is not None and self._timer.active
        if not active and _process.here.thread is not None and _process.in_thread():
            self._start()

    def _start(self) -> None:
        self._close_timer()  # perhaps of a virtual time that has ended
        # Without a reference: nobody's deadlock, and no end of a program, has to wait for it.
        self._timer = gevent.get_hub().loop.timer(INTERVAL, INTERVAL, ref=False)
        self._timer.start(self._tick)

    def _tick(self) -> None:
        try:
            self.refresh(answers=True)
        except Exception as error:
            self._close_timer()  # until a batch ends, or the log would be full of it
            _report.watcher_failed(self, error)
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
            watcher.lock = _new_lock()


_exports: Final[dict[CollectorRegistry, _Export]] = {}

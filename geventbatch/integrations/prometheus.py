"""Metrics of all processors for Prometheus, by one call at import time.

    from geventbatch.integrations import prometheus

    prometheus.watch()

The metrics are then in *registry*, by default the default registry of ``prometheus_client``, and are exported wherever
that is scraped. The label ``processor`` is `Processor.name`; a key is never a label. docs/watching.md lists the
metrics.

With several processes (``PROMETHEUS_MULTIPROC_DIR``), each writes its values into that folder, and the scraped process
sums them up. So these are plain counters, histograms and gauges, and a batch is counted when it ends. A timer reads
everything else once a second, until all processors have stopped; without that folder, each scrape reads it too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary, ref

import gevent
from gevent import monkey
from gevent._hub_local import get_hub_if_exists

from geventbatch import _seam
from geventbatch._core import process
from geventbatch._watch import log, setup_check
from geventbatch._watch.counted import OUTCOMES, Outcomes
from geventbatch._watch.gauges import Gauges, gauges_of
from geventbatch._watch.problem import SetupProblem

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
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics import MetricWrapperBase

    from geventbatch._core.batch import Batch
    from geventbatch._processor import Processor
    from geventbatch._watch.counted import Counted
    from geventbatch._watch.metrics import BatchMetric

__all__ = ["watch"]

_M = TypeVar("_M", bound="MetricWrapperBase")

INTERVAL: Final = 1.0
"""Seconds between two reads of the gauges."""

_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def watch(registry: CollectorRegistry = REGISTRY) -> None:
    """Export the metrics of all processors, present and future, in *registry*.

    A second call changes nothing.

    Args:
        registry: Of ``prometheus_client``; by default its own.

    Raises:
        ValueError: *registry* has other metrics with these names.
    Switches: no.
    """
    if registry not in _exports:
        _exports[registry] = _Export(registry)


class _Series:
    """The metrics of all processors of one name."""

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
        """Add a batch that has ended, without its answers."""
        self.size.observe(metric.operation_count)
        self.wait.observe(metric.queue_wait)
        self.load.observe(metric.load_duration)
        self.apply.observe(metric.apply_duration)
        self.save.observe(metric.save_duration)
        self.total.observe(metric.total_duration)
        if metric.error is not None:
            self._failed_batches.labels(self._name, metric.phase, type(metric.error).__name__).inc()

    def add(self, new: Counted) -> None:
        """Add the counts of *new*."""
        for counter, count in zip(self.counters, new, strict=True):
            if count:
                counter.inc(count)

    def set_gauges(self, values: Gauges) -> None:
        """Set the gauges to *values*."""
        for gauge, value in zip(self.gauges, values, strict=True):
            gauge.set(value)


class _Metrics:
    """All metrics, in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def named(kind: type[_M], name: str, what: str, *labels: str, **options: Any) -> _M:
            return kind(f"geventbatch_{name}", what, ("processor", *labels), registry=registry, **options)

        self.histograms = (
            named(Histogram, "batch_operations", "Operations that a batch has started", buckets=_SIZES),
            named(Histogram, "batch_wait_seconds", "From a batch's opening to its start", buckets=_SECONDS),
            named(Histogram, "batch_load_seconds", "Loading, over all attempts of a batch", buckets=_SECONDS),
            named(Histogram, "batch_apply_seconds", "Operations, over all attempts of a batch", buckets=_SECONDS),
            named(Histogram, "batch_save_seconds", "Saving, over all attempts of a batch", buckets=_SECONDS),
            named(Histogram, "batch_seconds", "From a batch's start to its answers", buckets=_SECONDS),
        )
        self.operations = named(Counter, "operations_total", "Operations by what became of them", "outcome")
        self.failed_batches = named(Counter, "failed_batches_total", "Batches that failed as a whole", "phase", "error")
        self.conflicts = named(Counter, "conflicts_total", "Conflicts: another writer had changed a resource")
        self.undone = named(Counter, "undone_total", "Changes of an operation that raised were undone")
        self.undo_seconds = named(Counter, "undo_seconds_total", "Seconds that undoing took")
        self.gauges = tuple(
            named(Gauge, name, what, multiprocess_mode=mode)
            for name, what, mode in (
                ("live_batches", "Batches that are queued or running", "livesum"),
                ("overdue_batches", "Failed batches whose code has not returned, and holds their key", "livesum"),
                ("waiting_operations", "Operations whose callers wait", "livesum"),
                ("workers", "Greenlets that run batches, or would", "livesum"),
                ("max_duration_seconds", "How long a batch may take", "livemax"),
            )
        )  # in the order of Gauges


class _Watcher:
    """Watches the batches of one processor."""

    def __init__(self, export: _Export, processor: Processor[Any]) -> None:
        self._export = export
        self._processor = ref(processor)
        self.series = export.series_of(processor.name)
        # -- mutable state ---------------------------------------------------------------------------------
        self.outcomes = Outcomes(processor)
        self.gauges = Gauges()  # at the last read
        self.closed = False

    def __repr__(self) -> str:
        return f"{__name__} of {self._processor()!r}"

    def end(self, batch: Batch, metric: BatchMetric) -> None:
        """Add a batch that has ended. Switches: no."""
        self._export.keep_fresh()
        self.series.add_batch(metric)
        self.series.add(self.outcomes.of_batch(batch, metric))

    def publish(self, metric: BatchMetric) -> None:
        """Do nothing: the processor calls `end` instead."""

    def close(self) -> None:
        """Add the last counts; the gauges go back to 0. The timer notices by itself. Switches: no."""
        self.closed = True
        self._export.refresh()

    def look(self, processor: Processor[Any]) -> Gauges:
        """Add the counts that came with no batch's end; return the gauges."""
        self.series.add(self.outcomes.new())
        self.gauges = Gauges() if self.closed else gauges_of(processor, self.gauges)
        return self.gauges


class _Export:
    """The metrics of one registry, and their watchers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        registry.register(self)  # first, to be asked before the metrics are
        self._metrics = _Metrics(registry)
        # -- mutable state ---------------------------------------------------------------------------------
        self._series: dict[str, _Series] = {}  # by name of processors
        self._watchers: WeakKeyDictionary[Processor[Any], _Watcher] = WeakKeyDictionary()
        self._timer: Any = None  # set while a processor may run batches
        for processor in process.processors():
            self.add(processor)
        process.watchers.append(self.add)
        process.at_first_run(self._start)
        process.after_fork(self._forget)

    def describe(self) -> list[Any]:
        """Describe nothing: this collector has no metric of its own."""
        return []

    def collect(self) -> list[Any]:
        """Update the metrics before a scrape reads them."""
        self.refresh()
        return []

    def add(self, processor: Processor[Any]) -> None:
        """Watch *processor*."""
        self._watchers[processor] = watcher = _Watcher(self, processor)
        _seam.watch(processor, watcher)

    def series_of(self, name: str) -> _Series:
        """Return the metrics of the processors named *name*, which begin at 0."""
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = _Series(self._metrics, name)
        return series

    def refresh(self) -> None:
        """Add the counts that came with no batch's end, and set the gauges. Switches: no; any thread may call."""
        sums = dict.fromkeys(self._series, Gauges())
        for processor in process.processors():
            watcher = self._watchers.get(processor)
            if watcher is not None:
                sums[processor.name] = sums[processor.name].with_other(watcher.look(processor))
        for name, values in sums.items():
            self._series[name].set_gauges(values)

    # -- the timer, in the thread that has batches ----------------------------------------------------------

    def keep_fresh(self) -> None:
        """Make sure that the timer runs."""
        active = self._timer is not None and self._timer.active
        if not active and _has_hub():
            self._start()

    def _start(self) -> None:
        self._close_timer()  # it may be of a virtual time that has ended
        # Without a reference, so that it keeps neither a deadlock from being noticed nor a program from ending.
        self._timer = gevent.get_hub().loop.timer(INTERVAL, INTERVAL, ref=False)
        self._timer.start(self._tick)

    def _tick(self) -> None:
        try:
            self.refresh()
        except Exception as error:
            self._close_timer()  # until a batch ends; else each tick would log the error
            log.watcher_failed(self, error)
        else:
            if all(watcher.closed for watcher in self._watchers.values()):
                self._close_timer()

    def _close_timer(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _forget(self) -> None:
        """Drop the parent's timer after a fork, and locks that its threads may have held."""
        self._close_timer()
        for watcher in self._watchers.values():
            watcher.outcomes.forget_lock()


def _has_hub() -> bool:
    """Return whether a timer of this thread rings: it has batches, or it runs unbatched in a patched process."""
    if process.here.thread is not None:
        return process.in_thread()
    hub: Any = get_hub_if_exists()
    return monkey.is_module_patched("threading") and hub is not None and bool(hub.main_hub)


_exports: Final[dict[CollectorRegistry, _Export]] = {}


_SHOWN: Final = 10
"""The number of process ids in a message."""


def _of_the_dead() -> Iterator[SetupProblem]:
    """Find gauges that processes have left: `mark_process_dead` deletes their files, if somebody calls it."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    pids = {int(file.stem.rpartition("_")[2]) for file in Path(folder or ".").glob("gauge_live*_[0-9]*.db")}
    dead = sorted(pid for pid in pids if not _lives(pid)) if folder and _exports else []
    if dead:
        yield SetupProblem(
            "prometheus-dead",
            f"{folder} has the gauges of {len(dead)} processes that have ended ({', '.join(map(str, dead[:_SHOWN]))}"
            f"{', …' if len(dead) > _SHOWN else ''}), as if these still ran: a sum such as geventbatch_live_batches "
            "counts them.",
            "Call prometheus_client.multiprocess.mark_process_dead(pid) now, and when a worker has ended: with "
            "gunicorn in child_exit, under uWSGI in uwsgi.atexit. Start scripts of the application without "
            "PROMETHEUS_MULTIPROC_DIR: they leave gauges too.",
        )


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


setup_check.looks.append(_of_the_dead)

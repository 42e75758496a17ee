"""What Prometheus and OpenTelemetry count alike, whoever looks, and whenever."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry

from geventbatch import Processor
from geventbatch.integrations import opentelemetry
from tests.watching.test_prometheus import outcomes, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch._watch.metrics import BatchMetric
    from geventbatch.testing import VirtualTime

    Exported = Callable[[], dict[str, float]]

pytestmark = pytest.mark.usefixtures("no_other_processors")

ROOT = Path(__file__).parents[2]


def nothing(*args: object) -> None:
    """An operation, a load or a save."""


@contextmanager
def through_prometheus() -> Iterator[Exported]:
    with watched(CollectorRegistry()) as registry:
        yield lambda: outcomes(registry)


@contextmanager
def through_opentelemetry() -> Iterator[Exported]:
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader])

    def exported() -> dict[str, float]:
        found: Any = reader.get_metrics_data()
        metrics = [metric for one in found.resource_metrics for scope in one.scope_metrics for metric in scope.metrics]
        (operations,) = [metric for metric in metrics if metric.name == "geventbatch_operations_total"]
        return {one.attributes["outcome"]: one.value for one in operations.data.data_points if one.value}

    opentelemetry.instrument(meter_provider=meters)
    try:
        yield exported
    finally:
        opentelemetry.uninstrument()
        opentelemetry._instruments.clear()
        meters.shutdown()


@pytest.fixture(params=[through_prometheus, through_opentelemetry])
def exported(request: pytest.FixtureRequest) -> Iterator[Exported]:
    with request.param() as exported:
        yield exported


class Counts:
    """Those of a processor, which let somebody else look while one reads them: once."""

    def __init__(self, processor: Processor[Any], between: Callable[[], object]) -> None:
        self._counts = processor._current().counts
        self.between: Callable[[], object] | None = between

    def __getattr__(self, name: str) -> Any:
        if name == "withdrawn" and self.between is not None:
            between, self.between = self.between, None
            between()
        return getattr(self._counts, name)


class State:
    """That of a processor, with these counts."""

    def __init__(self, processor: Processor[Any], between: Callable[[], object]) -> None:
        self._state = processor._current()
        self.counts = Counts(processor, between)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


@pytest.fixture
def trains(exported: Exported) -> Iterator[Processor[None]]:
    """It has counted what no batch has told of."""
    with Processor(min_duration=0, name="trains") as processor:
        counts = processor._current().counts
        counts.overloaded += 3
        counts.answered += 2  # of a batch that never began
        yield processor


def test_who_looks_in_the_middle_of_a_look_has_nothing_counted_twice(
    trains: Processor[None], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(trains, exported)
    monkeypatch.setattr(trains, "_current", lambda: state)
    trains.run("k", nothing)  # a batch that ends is a look
    assert state.counts.between is None
    assert exported() == {"returned": 1, "failed": 2, "refused": 3}


def test_a_signal_handler_that_stops_a_processor_in_the_middle_of_a_look_neither_hangs_nor_counts_twice(
    trains: Processor[None], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(trains, lambda: trains.stop(timeout=0))
    monkeypatch.setattr(trains, "_current", lambda: state)
    exported()
    assert state.counts.between is None
    assert exported() == {"failed": 2, "refused": 3}


def test_who_looks_between_the_metric_of_a_batch_and_its_end_takes_its_answers_for_no_failure(
    exported: Exported,
) -> None:
    class Looking:
        def publish(self, metric: BatchMetric) -> None:
            exported()

        def close(self) -> None: ...

    before, after = Looking(), Looking()
    processor: Processor[None] = Processor(min_duration=0, name="trains")
    watchers, processor._subscriptions[:] = processor._subscriptions[:], []
    processor._watch(before)
    processor._subscriptions.extend(watchers)
    processor._watch(after)
    processor.run("k", nothing)
    assert exported() == {"returned": 1}
    processor.stop()


def test_answers_whose_batch_never_began_have_failed_and_no_thread_that_loses_a_count_brings_them_back(
    clock: VirtualTime, exported: Exported
) -> None:
    with Processor(min_duration=0, max_duration=50, name="trains") as processor:
        processor.run("k", nothing)
        counts = processor._current().counts
        counts.answered += 2
        assert exported() == {"returned": 1, "failed": 2}
        counts.answered -= 1  # by a thread that was in the middle of an addition
        assert exported() == {"returned": 1, "failed": 2}
        counts.answered += 2
        assert exported() == {"returned": 1, "failed": 3}


THREADS = """
import json, sys, threading
from prometheus_client import REGISTRY
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from geventbatch import Processor
from geventbatch.integrations import opentelemetry, prometheus

reader = InMemoryMetricReader()
prometheus.watch()
opentelemetry.instrument(meter_provider=MeterProvider([reader]))
sys.setswitchinterval(1e-6)

def load(key):
    if key == "failed":
        raise OSError

def save(key, resource):
    if key == "unknown":
        raise OSError

def apply(resource, key):
    if key == "raised":
        raise OSError

processor = Processor(load_resource=load, save_resource=save, batching=False, name="trains")

def call():
    for number in range(100):
        for key in ("returned", "raised", "failed", "unknown"):
            try:
                processor.run(key, apply, key)
            except Exception:
                pass

def look():
    while not done:
        read()

def read():
    data = reader.get_metrics_data()
    (metrics,) = [scope.metrics for one in data.resource_metrics for scope in one.scope_metrics]
    (operations,) = [metric for metric in metrics if metric.name == "geventbatch_operations_total"]
    registry = [one for family in REGISTRY.collect() for one in family.samples if one.name == operations.name]
    return (
        {one.attributes["outcome"]: one.value for one in operations.data.data_points if one.value},
        {one.labels["outcome"]: one.value for one in registry if one.value},
    )

done = []
looking = threading.Thread(target=look)
threads = [threading.Thread(target=call) for _ in range(8)]
for one in (looking, *threads):
    one.start()
for one in threads:
    one.join()
done.append(True)
looking.join()
print(json.dumps(read()))
"""


def test_threads_that_run_and_look_at_once_have_each_answer_counted_once_and_as_what_it_was() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, capture_output=True, text=True, check=True)
    each = {"returned": 800, "raised": 800, "failed": 800, "unknown": 800}
    assert json.loads(done.stdout) == [each, each]

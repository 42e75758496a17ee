"""Traces and metrics for OpenTelemetry, as its own SDK sees them."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from geventbatch import BatchTimeout, Conflict, Processor, ProcessorOverloaded, SaveFailed
from geventbatch._core.clock import clock as library
from geventbatch._core.operation import Operation, name_of
from geventbatch._idempotency.once import Once
from geventbatch.integrations import opentelemetry
from geventbatch.testing import check_operations, faults
from tests.support.callers import answer_of, in_a_thread
from tests.support.children import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from geventbatch.testing import VirtualTime


pytestmark = pytest.mark.usefixtures("no_other_processors")


class Seen:
    """What was recorded."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(span_limits=SpanLimits(max_links=1000))
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.tracers.get_tracer("the application")
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader])

    def instrument(self, *processors: Processor[Any], **options: Any) -> None:
        opentelemetry.instrument(*processors, tracer_provider=self.tracers, meter_provider=self.meters, **options)

    def spans(self, name: str = "batch seats") -> list[ReadableSpan]:
        for _ in range(3):
            gevent.sleep(0)
        return [span for span in self.exporter.get_finished_spans() if span.name == name]

    def metrics(self) -> dict[str, dict[tuple[Any, ...], Any]]:
        for _ in range(3):
            gevent.sleep(0)
        found = self.reader.get_metrics_data()
        assert found is not None
        return {
            metric.name: {
                tuple(dict(point.attributes or {}).values()): getattr(point, "value", getattr(point, "sum", None))
                for point in metric.data.data_points
            }
            for resource in found.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture(scope="module", autouse=True)
def _no_provider_is_left() -> Iterator[None]:
    """In the child of a fork one waits for threads: greenlets of later tests would run there."""
    yield
    gc.unfreeze()
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) in {TracerProvider, MeterProvider}]


@pytest.fixture
def seen() -> Iterator[Seen]:
    seen = Seen()
    yield seen
    opentelemetry.uninstrument()
    opentelemetry._instruments.clear()
    seen.tracers.shutdown()
    seen.meters.shutdown()


def make(**options: Any) -> Processor[Any]:
    return Processor(**{"min_duration": 0, "max_duration": 5, "name": "seats", **options})


def nothing(*args: object) -> None:
    """An operation, a load or a save."""


def trace_id(span: Any) -> int:
    return int(span.get_span_context().trace_id)


def sleeping(seconds: float) -> Callable[..., None]:
    def sleep(*args: object) -> None:
        gevent.sleep(seconds)

    return sleep


def span_id(span: Any) -> int:
    return int(span.get_span_context().span_id)


def test_a_batch_has_one_span_with_links_to_all_its_callers_and_none_as_its_parent(
    clock: VirtualTime, seen: Seen
) -> None:
    seen.instrument()
    callers = []
    with make(load_resource=sleeping(1), save_resource=sleeping(2)) as processor:

        def call() -> None:
            with seen.tracer.start_as_current_span("call") as span:
                callers.append(span.get_span_context())
                processor.run("k", nothing)

        gevent.joinall([gevent.spawn(call) for _ in range(50)], raise_error=True)
    (batch,) = seen.spans()
    assert batch.parent is None
    assert {link.context.trace_id for link in batch.links} == {caller.trace_id for caller in callers}
    assert len(batch.links) == 50
    assert batch.attributes is not None
    assert dict(batch.attributes) == {
        "geventbatch.processor": "seats",
        "geventbatch.operation": "nothing",
        "geventbatch.operation_count": 50,
        "geventbatch.attempts": 1,
        "geventbatch.conflicts": 0,
        "geventbatch.raised": 0,
        "geventbatch.withdrawn": 0,
        "geventbatch.wait_seconds": 0.0,
        "geventbatch.load_seconds": 1.0,
        "geventbatch.apply_seconds": 0.0,
        "geventbatch.save_seconds": 2.0,
    }
    assert batch.context is not None
    assert trace_id(batch) not in {caller.trace_id for caller in callers}


def test_the_span_of_each_caller_tells_its_own_wait_and_its_batch(clock: VirtualTime, seen: Seen) -> None:
    seen.instrument()
    with make(load_resource=sleeping(1)) as processor:

        def call(after: float) -> None:
            gevent.sleep(after)
            with seen.tracer.start_as_current_span(f"after {after}"):
                processor.run("k", nothing)

        gevent.joinall([gevent.spawn(call, after) for after in (0, 0.25, 0.5)], raise_error=True)
    (batch,) = seen.spans()
    for after in (0, 0.25, 0.5):
        (caller,) = seen.spans(f"after {after}")
        (event,) = caller.events
        assert event.name == "geventbatch.operation_started"
        assert dict(event.attributes or {}) == {
            "geventbatch.processor": "seats",
            "geventbatch.wait_seconds": 1 - after,
            "geventbatch.batch.trace_id": format(trace_id(batch), "032x"),
            "geventbatch.batch.span_id": format(span_id(batch), "016x"),
        }


def test_load_and_save_are_inside_of_the_span_and_operations_inside_of_their_callers(seen: Seen) -> None:
    seen.instrument()
    found: dict[str, tuple[int, object]] = {}

    def see(where: str) -> None:
        with seen.tracer.start_as_current_span(where) as span:
            found[where] = trace_id(span), baggage.get_baggage("who")

    def load(key: str) -> None:
        see(f"load {key}")

    def save(key: str, resource: None) -> None:
        see(f"save {key}")

    def operation(resource: None, number: int) -> None:
        see(f"operation {number}")

    own: dict[int, int] = {}
    with make(load_resource=load, save_resource=save) as processor:

        def call(number: int) -> None:
            context.attach(baggage.set_baggage("who", number))
            with seen.tracer.start_as_current_span("call") as span:
                own[number] = trace_id(span)
                processor.run(number % 3, operation, number)

        for _ in range(3):
            gevent.joinall([gevent.spawn(call, number) for number in range(30)], raise_error=True)
            assert [found[f"operation {number}"] for number in range(30)] == [
                (own[number], number) for number in range(30)
            ]
    batches = {trace_id(span) for span in seen.spans()}
    for key in range(3):
        assert found[f"load {key}"] == found[f"save {key}"]
        assert found[f"load {key}"][0] in batches
        assert found[f"load {key}"][1] is None
    assert len(batches) == len(seen.spans()) == 9
    assert not batches & set(own.values())


@pytest.mark.parametrize("block", [faults, check_operations], ids=["faults", "checks"])
def test_callers_spans_are_told_of_their_operations_inside_a_block_of_the_test_tools(
    clock: VirtualTime, seen: Seen, block: Callable[[Processor[None]], AbstractContextManager[object]]
) -> None:
    seen.instrument()
    with make() as processor:
        with block(processor), seen.tracer.start_as_current_span("inside"):
            processor.run("k", nothing)
        with seen.tracer.start_as_current_span("behind"):
            processor.run("k", nothing)
    assert [len(span.events) for span in (*seen.spans("inside"), *seen.spans("behind"))] == [1, 1]


def test_a_replayed_batch_has_one_span_that_says_how_often_it_was_loaded(clock: VirtualTime, seen: Seen) -> None:
    seen.instrument()
    conflicts = [Conflict(), Conflict()]
    inside: list[int] = []

    def save(key: str, resource: None) -> None:
        inside.append(trace_id(trace.get_current_span()))
        if conflicts:
            raise conflicts.pop()

    with make(save_resource=save) as processor, seen.tracer.start_as_current_span("call"):
        processor.run("k", nothing)
    (batch,) = seen.spans()
    assert batch.attributes is not None
    assert (batch.attributes["geventbatch.attempts"], batch.attributes["geventbatch.conflicts"]) == (3, 2)
    assert inside == [trace_id(batch)] * 3
    (caller,) = seen.spans("call")
    assert len(caller.events) == 1


def test_the_span_of_a_batch_whose_code_hangs_ends_once_and_with_its_deadline(clock: VirtualTime, seen: Seen) -> None:
    seen.instrument()

    def hang(*args: object) -> None:
        try:
            gevent.sleep(100)
        finally:
            gevent.sleep(100)

    with make(save_resource=hang) as processor:
        assert isinstance(answer_of(processor.run, "k", nothing), BatchTimeout)
        assert len(seen.spans()) == 1
    (batch,) = seen.spans()
    assert batch.status.status_code is StatusCode.ERROR
    assert batch.attributes is not None
    assert batch.attributes["error.type"] == "BatchTimeout"
    assert batch.attributes["geventbatch.phase"] == "save"
    assert batch.attributes["geventbatch.retry_safe"] is False


def test_an_error_says_nothing_of_the_key_and_the_key_is_there_only_when_asked_for(seen: Seen) -> None:
    seen.instrument()

    def refuse(*args: object) -> None:
        raise ValueError("private")

    processor = make(save_resource=refuse)
    assert isinstance(answer_of(processor.run, "private", nothing), SaveFailed)
    processor.stop()
    assert "private" not in seen.spans()[0].to_json()
    other = make(name="other")
    opentelemetry.uninstrument(other)
    seen.instrument(other, keys=True)
    other.run("public", nothing)
    other.stop()
    assert dict(seen.spans("batch other")[0].attributes or {})["geventbatch.key"] == "public"


@pytest.mark.parametrize("thread", [False, True])
def test_with_batching_off_the_span_is_a_child_of_its_only_caller(seen: Seen, thread: bool) -> None:
    seen.instrument()
    processor = make(batching=False)

    def call() -> int:
        with seen.tracer.start_as_current_span("call") as span:
            processor.run("k", nothing)
            assert trace.get_current_span() is span
            return int(span.get_span_context().span_id)

    own = in_a_thread(call) if thread else call()
    (batch,) = seen.spans()
    assert batch.parent is not None
    assert batch.parent.span_id == own
    assert len(seen.spans("call")[0].events) == 1
    processor.stop()


def test_in_a_bulk_each_batch_has_its_span_and_the_load_is_inside_of_the_first(seen: Seen) -> None:
    seen.instrument()
    inside: list[int] = []

    def load(keys: list[str]) -> dict[str, list[int]]:
        inside.append(trace_id(trace.get_current_span()))
        return {key: [] for key in keys}

    with make(load_resources=load, save_resources=nothing) as processor:
        gevent.joinall([gevent.spawn(processor.run, key, len) for key in "abc"], raise_error=True)
    spans = seen.spans()
    assert len(spans) == 3
    assert set(inside) <= {trace_id(span) for span in spans}


def test_no_more_than_128_callers_are_linked(seen: Seen) -> None:
    seen.instrument()
    with make() as processor:

        def call() -> None:
            with seen.tracer.start_as_current_span("call"):
                processor.run("k", nothing)

        gevent.joinall([gevent.spawn(call) for _ in range(200)], raise_error=True)
    (batch,) = seen.spans()
    assert len(batch.links) == opentelemetry.LINKS


def test_the_span_of_a_caller_who_left_is_not_touched(
    clock: VirtualTime, seen: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    seen.instrument()
    with make(load_resource=sleeping(1)) as processor:

        def call() -> None:
            with seen.tracer.start_as_current_span("call"):
                inside: Any = copy_context()
                other = gevent.spawn(inside.run, processor.run, "k", nothing)
                gevent.sleep(0.5)
            other.get()

        gevent.spawn(call).get()
    assert seen.spans("call")[0].events == ()
    assert caplog.records == []  # the SDK would log a warning


def test_what_was_undone_is_in_the_metrics_and_in_the_span_of_its_batch(clock: VirtualTime, seen: Seen) -> None:
    seen.instrument()

    def add_and_raise(resource: list[int]) -> None:
        resource.append(1)
        raise KeyError

    def copy(resource: list[int]) -> list[int]:
        clock.spend(0.25)
        return list(resource)

    processor = make(load_resource=lambda _: [0], copy_resource=copy)
    gevent.joinall([gevent.spawn(answer_of, processor.run, "k", add_and_raise) for _ in range(2)])
    processor.stop()
    now = seen.metrics()
    assert now["geventbatch_undone_total"] == {("seats",): 3}
    assert now["geventbatch_undo_seconds_total"] == {("seats",): pytest.approx(0.75, abs=0.01)}
    (span,) = seen.spans("batch seats")
    attributes: Any = span.attributes
    assert attributes["geventbatch.undone"] == 3
    assert attributes["geventbatch.undo_seconds"] == pytest.approx(0.75, abs=0.01)


def test_metrics_have_the_names_and_labels_of_the_prometheus_adapter(clock: VirtualTime, seen: Seen) -> None:
    seen.instrument()
    processor = make(load_resource=sleeping(1), save_resource=sleeping(2), max_pending=2)

    def refuse(resource: None) -> None:
        raise ValueError

    callers = [gevent.spawn(answer_of, processor.run, "k", operation) for operation in (nothing, refuse, nothing)]
    gevent.sleep(0.5)
    now = seen.metrics()
    assert now["geventbatch_live_batches"] == {("seats",): 1}
    assert now["geventbatch_waiting_operations"] == {("seats",): 2}
    assert now["geventbatch_workers"] == {("seats",): 1}
    assert isinstance(callers[2].get(), ProcessorOverloaded)
    gevent.joinall(callers)
    processor.stop()
    now = seen.metrics()
    assert now["geventbatch_operations_total"] == {
        ("seats", "returned"): 1,
        ("seats", "raised"): 1,
        ("seats", "failed"): 0,
        ("seats", "unknown"): 0,
        ("seats", "withdrawn"): 0,
        ("seats", "refused"): 1,
    }
    assert now["geventbatch_conflicts_total"] == {("seats",): 0}
    assert now["geventbatch_undone_total"] == {("seats",): 0}
    assert now["geventbatch_undo_seconds_total"] == {("seats",): 0}
    assert now["geventbatch_batch_operations"] == {("seats",): 2}
    assert now["geventbatch_batch_load_seconds"] == {("seats",): 1.0}
    assert now["geventbatch_batch_save_seconds"] == {("seats",): 2.0}
    assert now["geventbatch_batch_seconds"] == {("seats",): 3.0}
    assert now["geventbatch_batch_apply_seconds"] == now["geventbatch_batch_wait_seconds"] == {("seats",): 0.0}


def test_a_batch_whose_code_outlives_its_deadline_is_overdue_until_it_returns(clock: VirtualTime, seen: Seen) -> None:
    seen.instrument()

    def stubborn(key: str) -> None:
        try:
            gevent.sleep(10)
        except gevent.Timeout:
            gevent.sleep(10)

    with make(load_resource=stubborn, max_duration=2) as processor:
        assert isinstance(answer_of(processor.run, "k", nothing), BatchTimeout)
        assert in_a_thread(seen.metrics)["geventbatch_overdue_batches"] == {("seats",): 0}  # they may change meanwhile
        now = seen.metrics()
        assert now["geventbatch_overdue_batches"] == {("seats",): 1}
        assert now["geventbatch_max_duration_seconds"] == {("seats",): 2}
        assert in_a_thread(seen.metrics)["geventbatch_overdue_batches"] == {("seats",): 1}
    now = seen.metrics()
    assert now["geventbatch_overdue_batches"] == now["geventbatch_max_duration_seconds"] == {("seats",): 0}


def test_uninstrumented_processors_are_as_they_were_and_record_nothing(seen: Seen) -> None:
    before = make()
    options = before._options
    seen.instrument()
    seen.instrument()
    after = make()
    for processor in (before, after):
        processor.run("k", nothing)
    assert len(seen.spans()) == 2
    opentelemetry.uninstrument()
    assert before._options == options
    assert before._subscriptions == []
    for processor in (before, after, make()):
        processor.run("k", nothing)
        processor.stop()
    assert len(seen.spans()) == 2


def test_uninstrument_ends_the_spans_of_batches_that_run(clock: VirtualTime, seen: Seen) -> None:
    processor = make(load_resource=sleeping(1))
    seen.instrument(processor)
    caller = gevent.spawn(processor.run, "k", nothing)
    gevent.sleep(0.5)
    opentelemetry.uninstrument(processor)
    assert len(seen.spans()) == 1
    caller.get()
    processor.stop()
    assert len(seen.spans()) == 1


def test_an_exporter_that_waits_delays_nobody(clock: VirtualTime, seen: Seen) -> None:
    class Slow(SimpleSpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            gevent.sleep(100)

    seen.tracers.add_span_processor(Slow(seen.exporter))
    seen.instrument()
    processor = make()
    started = library.monotonic()
    for _ in range(3):
        processor.run("k", nothing)
    processor.stop()
    assert library.monotonic() == started
    gevent.sleep(400)


def test_a_child_of_a_fork_records_its_own_and_nothing_of_its_parent(seen: Seen) -> None:
    processor = make()
    seen.instrument()
    processor.run("k", nothing)
    assert len(seen.spans()) == 1
    seen.exporter.clear()
    child = os.fork()
    if child == 0:
        try:
            warnings.simplefilter("ignore")  # it says that this process has run batches before
            processor.run("k", nothing)
            answered = seen.metrics()["geventbatch_operations_total"][("seats", "returned")]
            os._exit(0 if len(seen.spans()) == 1 and answered == 1 else 1)
        finally:
            os._exit(2)
    status = wait_for(child)
    processor.stop()
    assert os.waitstatus_to_exitcode(status) == 0


def test_an_operation_with_an_idempotency_key_stays_one(seen: Seen) -> None:
    processor = make()
    seen.instrument(processor)
    watcher = opentelemetry._watched[processor]
    watcher._once = Once
    once = Once("a-key", nothing, ())
    admitted: Operation[None] = Operation()
    admitted.callable, admitted.args, admitted.context = once, (), copy_context()
    with seen.tracer.start_as_current_span("call"):
        watcher.see_operation(admitted)
    assert admitted.callable is once
    assert once.operation is not nothing
    assert name_of(once) == name_of(once.operation) == "nothing"
    processor.stop()


WITHOUT = """
import sys
sys.modules["opentelemetry"] = None
try:
    import geventbatch.integrations.opentelemetry
except ImportError as error:
    print(error)
"""

AT_THE_END = """
from gevent import monkey; monkey.patch_all()
import gevent, gevent.event
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, ConsoleSpanExporter
from geventbatch import Processor
from geventbatch.integrations import opentelemetry
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=lambda span: span.name + "\\n")))
opentelemetry.instrument(tracer_provider=provider)
Processor(min_duration=0, name="first").run("k", lambda resource: None)
began = gevent.event.Event()

def load(key):
    began.set()
    gevent.sleep(0.1)

processor = Processor(min_duration=0, name="last", load_resource=load)
gevent.spawn(processor.run, "k", lambda resource: None)
began.wait()
opentelemetry.uninstrument()  # which nothing follows that would let the hub have a turn
"""


def python(source: str) -> str:
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    return ran.stdout


def test_without_the_extra_the_error_names_it() -> None:
    assert "pip install 'geventbatch[opentelemetry]'" in python(WITHOUT)


def test_the_last_batch_of_a_program_is_recorded() -> None:
    assert python(AT_THE_END) == "batch first\nbatch last\n"

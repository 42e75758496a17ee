"""For docs/opentelemetry.md: providers that keep what they get, a store, and an operation."""

from contextlib import contextmanager

import gevent
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))


@contextmanager
def store(key):
    yield []


def book(seats, number):
    seats.append(number)


def check(page):
    gevent.sleep(0)
    call, batch = sorted(exporter.get_finished_spans(), key=lambda span: span.name)
    assert (call.name, batch.name) == ("POST /book", "batch trains")
    assert batch.links[0].context == call.context
    assert call.events[0].attributes["geventbatch.batch.trace_id"] == f"{batch.context.trace_id:032x}"

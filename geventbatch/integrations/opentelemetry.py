"""Traces and metrics of processors for OpenTelemetry, by one call at import time.

    from geventbatch.integrations import opentelemetry

    opentelemetry.instrument()

Each batch has a span, from its first load to its answers. Its load and save run inside that span, so spans of a
database's instrumentation are nested there. The span links to its callers' spans but has none of them as its parent,
for it belongs to no single one. With ``batching=False`` it is a child of its only caller's span. When an operation
starts, its caller's span gets an event with the wait. docs/opentelemetry.md lists all of this.

Exporters may block, but the end of a batch must not switch. So a separate greenlet ends the spans, with the time at
which the batches ended.
"""

from __future__ import annotations

import time
from contextvars import Context
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakKeyDictionary, ref

import gevent

from geventbatch import _seam
from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._watch import log
from geventbatch._watch.call_later import Later

try:
    from opentelemetry import context as _context
    from opentelemetry import trace as _trace

    from geventbatch.integrations._opentelemetry_metrics import Instruments
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "opentelemetry":
        raise
    raise ImportError(
        "geventbatch.integrations.opentelemetry needs opentelemetry-api: pip install 'geventbatch[opentelemetry]'",
        name="opentelemetry",
    ) from missing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

    from geventbatch._core.batch import Batch
    from geventbatch._core.operation import Operation
    from geventbatch._processor import Processor
    from geventbatch._watch.metrics import BatchMetric

__all__ = ["instrument", "uninstrument"]

LINKS: Final = 128
"""The most links of a span: by default the SDK keeps no more. Further callers get none."""


def instrument(
    *processors: Processor[Any],
    keys: bool = False,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Record the batches of *processors*; without any, of all processors, present and future.

    A processor that is instrumented already stays as it is.

    Args:
        *processors: The processors whose batches to record.
        keys: Whether spans have the attribute ``geventbatch.key``, and ``geventbatch.keys`` where operations across
            keys connect several. Off by default, since keys may be personal.
        tracer_provider: The provider of tracers; by default the global one, which may be set later.
        meter_provider: The provider of meters; likewise.
    Switches: no.
    """
    global _for_all  # noqa: PLW0603 - processors to come have to be known somewhere
    recorder = _Recorder(tracer_provider, meter_provider, keys=keys)
    for processor in processors or process.processors():
        recorder.add(processor)
    if not processors and _for_all is None:
        _for_all = recorder.add
        process.watchers.append(_for_all)


def uninstrument(*processors: Processor[Any]) -> None:
    """Stop recording *processors*; without any, all processors. The spans of running batches end here.

    Switches: no.
    """
    global _for_all  # noqa: PLW0603 - see there
    if not processors and _for_all is not None:
        process.watchers.remove(_for_all)
        _for_all = None
    for processor in processors or tuple(_watched):
        watcher = _watched.pop(processor, None)
        if watcher is not None:
            watcher.leave(processor)


class _Recorder:
    """The arguments of one call of `instrument`."""

    def __init__(
        self, tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None, *, keys: bool
    ) -> None:
        self.tracer = _trace.get_tracer("geventbatch", tracer_provider=tracer_provider)
        self.keys = keys
        found = next((one for one in _instruments if one.provider is meter_provider), None)
        if found is None:
            found = Instruments(meter_provider)
            _instruments.append(found)
        self.instruments = found

    def add(self, processor: Processor[Any]) -> None:
        """Record *processor*, unless it is recorded already."""
        if processor not in _watched:
            _watched[processor] = watcher = _Watcher(self, processor)
            _seam.watch(processor, watcher)


class _Watcher:
    """Watches the batches of one processor."""

    def __init__(self, recorder: _Recorder, processor: Processor[Any]) -> None:
        self._recorder = recorder
        self._processor = ref(processor)
        self._measured = recorder.instruments.measure(processor)
        self.name = processor.name
        idempotency = _seam.options_of(processor).idempotency
        self._once = None if idempotency is None else idempotency.Once
        # -- mutable state ---------------------------------------------------------------------------------
        self._spans: dict[Batch, Span] = {}  # of the running batches
        self._off = False
        _seam.add_observer(processor, self.see_operation)

    def __repr__(self) -> str:
        return f"{__name__} of {self._processor()!r}"

    def leave(self, processor: Processor[Any]) -> None:
        """Stop watching."""
        self._off = True
        self._recorder.instruments.leave(processor)
        _seam.remove_observer(processor, self.see_operation)
        while self._spans:
            _, span = self._spans.popitem()
            _record_later(_Ended(self, span, time.time_ns()))

    def forget(self) -> None:
        """Drop the parent's batches after a fork."""
        self._spans.clear()

    # -- operations ---------------------------------------------------------------------------------------

    def see_operation(self, operation: Operation[Any]) -> None:
        """Add an event to the caller's span when *operation* starts. Switches: no."""
        if self._off:
            return
        span = _trace.get_current_span()
        if not span.is_recording():
            return
        once: Any = operation.callable
        if self._once is not None and type(once) is self._once:  # `Once` must stay the outer one
            once.operation = _Waiting(self, span, once.operation)
        else:
            operation.callable = _Waiting(self, span, once)

    def tell_wait(self, span: Span, seconds: float) -> None:
        """Add an event to *span*, a caller's: its operation starts after so many *seconds*."""
        attributes: dict[str, Any] = {"geventbatch.processor": self.name, "geventbatch.wait_seconds": seconds}
        attempt = process.running.get(gevent.getcurrent())
        its = None if attempt is None else self._spans.get(attempt.batch)
        if attempt is not None and len(attempt.batch.keys) > 1:
            attributes["geventbatch.key_count"] = len(attempt.batch.keys)
        if its is not None:
            where = its.get_span_context()
            attributes["geventbatch.batch.trace_id"] = _trace.format_trace_id(where.trace_id)
            attributes["geventbatch.batch.span_id"] = _trace.format_span_id(where.span_id)
        span.add_event("geventbatch.operation_started", attributes)

    # -- batches ------------------------------------------------------------------------------------------

    def begin(self, batches: list[Batch]) -> None:
        """Begin the batches' spans. A load or save of all of them together is inside the first batch's span."""
        if self._off:
            return
        for batch in batches:
            if batch not in self._spans and not batch.ended:
                parent = _span_context(batch.operations[0]) if batch.alone else _NOWHERE
                span = self._recorder.tracer.start_span(
                    f"batch {self.name}", context=parent, attributes={"geventbatch.processor": self.name}
                )
                if batch.ended or self._off:  # a span processor blocked until the batch had ended
                    _record_later(_Ended(self, span, time.time_ns()))
                else:
                    self._spans[batch] = span
        # Not detached: the context is of the load and the save alone, and ends with them.
        its = self._spans.get(batches[0], _trace.INVALID_SPAN)
        _context.attach(_trace.set_span_in_context(its, _NOWHERE))

    def end(self, batch: Batch, metric: BatchMetric) -> None:
        """End the span of *batch* later. Switches: no."""
        if self._off:
            return
        self._measured.end(batch, metric)
        span = self._spans.pop(batch, _trace.INVALID_SPAN)
        _record_later(_Ended(self, span, time.time_ns(), metric, batch.operations))

    def publish(self, metric: BatchMetric) -> None:
        """Do nothing: the processor calls `end` instead."""

    def close(self) -> None:
        """Add the last counts. Switches: no."""
        if not self._off:
            self._measured.close()

    def record(self, ended: _Ended) -> None:
        """Record a batch that has ended. Switches: as exporters may."""
        span, metric = ended.span, ended.metric
        if metric is not None:
            self._recorder.instruments.add_batch(self.name, metric)
            if span.is_recording():
                _describe(span, metric)
                if self._recorder.keys:
                    span.set_attribute("geventbatch.key", str(metric.key))
                    if len(metric.keys) > 1:
                        span.set_attribute("geventbatch.keys", [str(key) for key in metric.keys[:LINKS]])
                for caller in _callers(ended.operations):
                    span.add_link(caller)
        span.end(ended.at)


class _Waiting:
    """An operation whose first start tells its caller's span how long it has waited."""

    __slots__ = ("__wrapped__", "_since", "_span", "_watcher")

    def __init__(self, watcher: _Watcher, span: Span, operation: Callable[..., Any]) -> None:
        self._watcher = watcher
        self._since = _clock.monotonic()
        self.__wrapped__ = operation
        # -- mutable state ---------------------------------------------------------------------------------
        self._span: Span | None = span  # None once it is told

    def __call__(self, resource: Any, *args: Any) -> Any:
        span, self._span = self._span, None
        if span is not None:
            try:
                if span.is_recording():  # the caller may have left, and ended it
                    self._watcher.tell_wait(span, _clock.monotonic() - self._since)
            except Exception as error:
                log.watcher_failed(self._watcher, error)
        return self.__wrapped__(resource, *args)


class _Ended(NamedTuple):
    """A span to end."""

    watcher: _Watcher
    span: Span
    at: int  # nanoseconds since the epoch
    metric: BatchMetric | None = None  # None if the batch is still running
    operations: list[Operation[Any]] = []  # noqa: RUF012 - it is never changed


def _record_later(ended: _Ended) -> None:
    # In a fresh context, even if it runs at once: exporters have no business with a caller's.
    _ender.add(lambda: Context().run(_record, ended))


def _record(ended: _Ended) -> None:
    try:
        ended.watcher.record(ended)
    except Exception as error:
        log.watcher_failed(ended.watcher, error)


def _span_context(operation: Operation[Any]) -> _context.Context:
    """Return the caller's OpenTelemetry context. It is free to enter, since an operation runs in copies of it."""
    return operation.context.run(_context.get_current)


def _callers(operations: list[Operation[Any]]) -> Iterator[_trace.SpanContext]:
    """Yield the span contexts of the operations' callers, each once."""
    seen = set()
    for operation in operations:
        found = _trace.get_current_span(_span_context(operation)).get_span_context()
        if found.is_valid and (found.trace_id, found.span_id) not in seen:
            seen.add((found.trace_id, found.span_id))
            yield found
            if len(seen) == LINKS:
                return


def _describe(span: Span, metric: BatchMetric) -> None:
    # Never an error's message: it names the key.
    attributes: dict[str, Any] = {
        "operation_count": metric.operation_count,
        "key_count": len(metric.keys) if len(metric.keys) > 1 else None,
        "bulk_key_count": metric.bulk_keys or None,
        "attempts": metric.attempts,
        "conflicts": metric.conflicts,
        "raised": metric.raised,
        "undone": metric.undone or None,
        "withdrawn": metric.withdrawn,
        "wait_seconds": metric.queue_wait,
        "load_seconds": metric.load_duration,
        "apply_seconds": metric.apply_duration,
        "save_seconds": metric.save_duration,
        "undo_seconds": metric.undo_duration or None,
    }
    if metric.operation_name is not None:
        attributes["operation"] = metric.operation_name
    error = metric.error
    if error is not None:
        attributes |= {"phase": metric.phase, "retry_safe": error.retry_safe}
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(_trace.StatusCode.ERROR, type(error).__name__)
    span.set_attributes({f"geventbatch.{name}": value for name, value in attributes.items() if value is not None})


# -- mutable state: of the process ------------------------------------------------------------------------------

_watched: Final[WeakKeyDictionary[Processor[Any], _Watcher]] = WeakKeyDictionary()
_instruments: Final[
    list[Instruments]
] = []  # one for each provider: an instrument can be neither made twice nor removed
_for_all: Callable[[Processor[Any]], object] | None = None
_ender: Final = Later("%d spans of batches were dropped, since %d waited to be recorded")
_NOWHERE: Final = _context.Context()


def _forget() -> None:
    for watcher in _watched.values():
        watcher.forget()
    for instruments in _instruments:
        instruments.forget()


process.after_fork(_forget)

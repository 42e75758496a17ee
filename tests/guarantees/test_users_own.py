"""Nobody's repr, error, hook or watcher reaches the others (guarantees 2, 7, 16 and 20)."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from opentelemetry import context, trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from redis import Redis

from geventbatch import (
    COMPILED,
    BatchTimeout,
    LoadFailed,
    NotSaved,
    PartlySaved,
    Processor,
    Rejected,
    SaveFailed,
    current_batch,
)
from geventbatch._options import DEFAULTS
from geventbatch._safe_repr import shown
from geventbatch.integrations import opentelemetry
from geventbatch.stores import RedisStore, SQLAlchemyStore
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType

    from geventbatch.testing import VirtualTime


class Collapse(BaseException):
    pass


class Text(str):
    __slots__ = ()

    def __format__(self, _: str) -> str:
        raise LookupError("format")

    def __str__(self) -> str:
        raise LookupError("str")


class Odd(Exception):
    """Whatever is asked of it raises, but for what logging needs; and it has its own ways."""

    def __init__(self, one: object, other: object) -> None:
        super().__init__(one, other)

    def __repr__(self) -> str:
        raise LookupError("repr")

    def __str__(self) -> str:
        raise LookupError("str")

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        raise LookupError("eq")

    def __hash__(self) -> int:
        raise LookupError("hash")

    def with_traceback(self, tb: TracebackType | None) -> Any:
        return None


class Odder(Odd):
    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


class OddKey(str):
    __slots__ = ()

    def __repr__(self) -> str:
        raise LookupError("repr")


class Scope:
    takes_rows = True

    def __init__(self, kept: list[Any], raises: dict[str, BaseException]) -> None:
        self.kept = kept
        self.raises = raises

    def __enter__(self) -> list[Any]:
        if "load" in self.raises:
            raise self.raises.pop("load")
        self.resource = list(self.kept)
        return self.resource

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        if "save" in self.raises:
            raise self.raises["save"]
        if "refuse" in self.raises and "bad" in self.resource:
            raise Rejected("no") from self.raises["refuse"]
        self.kept[:] = self.resource


def append(resource: list[Any], mark: Any) -> Any:
    resource.append(mark)
    return mark


def fail(resource: list[Any], error: BaseException) -> None:
    resource.append("half")
    raise error


def run_all(clock: VirtualTime, processor: Processor[Any], *calls: tuple[Any, ...], key: Any = "k") -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, *call) for call in calls]
    clock.advance(30)
    return [caller.get(block=False) for caller in callers]


# -- what is shown in messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", [LookupError("repr"), Collapse()])
def test_what_cannot_be_shown_is_shown_as_an_object_of_its_class(raised: BaseException) -> None:
    class Unshowable:
        def __repr__(self) -> str:
            raise raised

    assert "Unshowable object at 0x" in shown(Unshowable())


def test_what_a_repr_gives_is_a_text_and_nothing_of_the_user_s() -> None:
    class Strange:
        def __repr__(self) -> str:
            return Text("strange")

    assert type(shown(Strange())) is str
    assert f"{shown(Strange())}" == "strange"


@pytest.mark.parametrize("raised", [gevent.GreenletExit(), gevent.Timeout(1)])
def test_what_is_thrown_at_the_greenlet_while_a_repr_waits_is_for_the_greenlet(raised: BaseException) -> None:
    class Waits:
        def __repr__(self) -> str:
            raise raised

    with pytest.raises(type(raised)):
        shown(Waits())


# -- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean", [(), (ValueError,), (Exception,)])
@pytest.mark.parametrize("kind", [Odd, Odder])
def test_an_odd_error_of_an_operation_reaches_its_own_caller_alone(
    clock: VirtualTime, clean: tuple[type[Exception], ...], kind: type[Odd]
) -> None:
    kept: list[Any] = []
    error = kind(1, 2)
    with Processor(open_resource=lambda _: Scope(kept, {}), min_duration=0, clean_errors=clean) as processor:
        answers = run_all(clock, processor, (append, 1), (fail, error), (append, 2))
    assert answers[0] == 1
    # What mypyc makes of `raise` takes it for no exception then; that is its caller's alone too.
    own = answers[1] is error or (COMPILED and kind is Odder and type(answers[1]) is TypeError)
    assert own
    assert answers[2] == 2
    assert kept == ([1, "half", 2] if clean == (Exception,) else [1, 2])


def test_an_odd_error_of_the_store_reaches_the_culprit_alone(clock: VirtualTime) -> None:
    kept: list[Any] = []
    error = Odd(1, 2)
    with Processor(open_resource=lambda _: Scope(kept, {"refuse": error}), min_duration=0) as processor:
        answers = run_all(clock, processor, (append, 1), (append, "bad"), (append, 2))
    assert answers[1] is error
    assert kept == [answers[0], answers[2]] == [1, 2]


@pytest.mark.parametrize(("what", "kind"), [("load", LoadFailed), ("save", SaveFailed)])
def test_an_odd_error_of_a_load_or_a_save_is_told_to_everybody(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture, what: str, kind: type[Exception]
) -> None:
    error = Odd(1, 2)
    with Processor(open_resource=lambda _: Scope([], {what: error}), min_duration=0) as processor:
        answers = run_all(clock, processor, (append, 1), (append, 2))
    assert [type(answer) for answer in answers] == [kind, kind]
    assert all(answer.__cause__ is error for answer in answers)
    assert "Odd object at 0x" in str(answers[0])


def test_a_key_that_cannot_be_shown_fails_nobody(clock: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    kept: list[Any] = []
    key = OddKey("odd")
    with Processor(open_resource=lambda _: Scope(kept, {}), min_duration=0) as processor:
        assert run_all(clock, processor, (append, 1), key=key) == [1]
    with Processor(open_resource=lambda _: Scope(kept, {"save": NotSaved("no")}), min_duration=0) as processor:
        (answer,) = run_all(clock, processor, (append, 2), key=key)
    assert isinstance(answer, SaveFailed)
    assert answer.retry_safe
    assert str(PartlySaved({key: NotSaved("no")})).startswith("not saved: <")


class Unprintable(str):
    """A key whose repr ends whoever asks for it."""

    __slots__ = ()

    def __repr__(self) -> str:
        raise gevent.GreenletExit


@pytest.mark.parametrize("phase", ["load", "operations"])
def test_a_scope_is_left_though_telling_a_watcher_of_its_late_batch_raises(clock: VirtualTime, phase: str) -> None:
    log: list[str] = []

    @contextmanager
    def scope(_: object) -> Iterator[None]:
        log.append("entered")
        if phase == "load":
            clock.spend(2)
        try:
            yield
        finally:
            log.append("left")

    processor = Processor(open_resource=scope, min_duration=0, max_duration=1)
    watcher = processor.subscribe_batch_metrics()

    def call() -> None:
        processor.run(Unprintable("k"), lambda _: clock.spend(2))

    caller = gevent.spawn(call)
    clock.advance(5)
    assert caller.dead
    assert log == ["entered", "left"]
    assert processor.stop()
    assert list(watcher) == []


# -- logs ----------------------------------------------------------------------------------------------------------


class Unruly(logging.Handler):
    """Raises, and waits before it does."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())
        gevent.sleep(1)
        raise self.error


@pytest.fixture
def unruly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[BaseException], Unruly]]:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log = logging.getLogger("geventbatch")
    made: list[Unruly] = []

    def make(error: BaseException) -> Unruly:
        made.append(Unruly(error))
        log.addHandler(made[-1])
        return made[-1]

    yield make
    for one in made:
        log.removeHandler(one)


@pytest.mark.parametrize("error", [LookupError("handler"), gevent.GreenletExit()])
def test_a_log_handler_that_waits_and_raises_where_hooks_have_failed_keeps_nobody_waiting(
    clock: VirtualTime, unruly: Callable[[BaseException], Unruly], error: BaseException
) -> None:
    handler = unruly(error)

    class Hooked(Scope):
        def saved(self) -> None:
            raise ValueError("hook")

    class Store:
        def __call__(self, _: Any) -> Hooked:
            return Hooked([], {})

        def stopped(self) -> None:
            raise ValueError("stopped")

    processor = Processor(open_resource=Store(), min_duration=0)
    began = clock.now()
    callers = [gevent.spawn(processor.run, "k", append, number) for number in range(2)]
    gevent.joinall(callers)
    assert clock.now() == began
    assert processor.stop()
    assert clock.now() == began
    clock.advance(30)
    assert "after the batch of key 'k' was saved and answered" in handler.told


# -- watchers -------------------------------------------------------------------------------------------------------


class OnStart(SpanProcessor):
    def __init__(self, do: Callable[[], object]) -> None:
        self.do = do
        self.ended: list[str] = []

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        if span.name.startswith("batch"):
            self.do()

    def on_end(self, span: ReadableSpan) -> None:
        self.ended.append(span.name)


def watched(do: Callable[[], object], processor: Processor[Any]) -> OnStart:
    tracers = TracerProvider(shutdown_on_exit=False)  # or else it lives as long as the process
    on_start = OnStart(do)
    tracers.add_span_processor(on_start)
    opentelemetry.instrument(processor, tracer_provider=tracers)
    return on_start


def current_span(resource: Any) -> bool:
    return bool(trace.get_current_span().is_recording())


@pytest.mark.usefixtures("no_other_processors")
@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_a_watcher_that_waits_where_a_batch_begins_delays_nobody(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture, batching: bool, many: bool
) -> None:
    option: dict[str, Any] = {"load_resource": lambda _: []}
    if many:
        option = {"load_resources": lambda keys: {key: [] for key in keys}, "save_resources": lambda _: None}
    with Processor(min_duration=0, max_duration=1, batching=batching, **option) as processor:
        seen = watched(partial(gevent.sleep, 100), processor)
        began = clock.now()
        assert processor.run("k", append, 1) == 1
        assert processor.run("k", append, 2) == 2
        assert clock.now() - began < 0.001
        clock.advance(200)
        assert seen.ended == ["batch " + processor.name] * 2
        told = [record.getMessage() for record in caplog.records if "waits where a batch begins" in record.getMessage()]
        assert len(told) == 1
        opentelemetry.uninstrument()


@pytest.mark.usefixtures("no_other_processors")
@pytest.mark.parametrize("error", [LookupError("on_start"), Collapse()])
def test_a_watcher_that_raises_where_a_batch_begins_fails_nobody(clock: VirtualTime, error: BaseException) -> None:
    def refuse() -> None:
        raise error

    with Processor(min_duration=0) as processor:
        watched(refuse, processor)
        assert processor.run("k", append_nothing) is None
        opentelemetry.uninstrument()


def append_nothing(_: Any) -> None:
    assert current_batch().key == "k"


@pytest.mark.usefixtures("no_other_processors")
def test_a_caller_s_span_that_raises_fails_no_operation(clock: VirtualTime) -> None:
    class Strange(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            return True

        def add_event(self, *_: Any, **__: Any) -> None:
            raise LookupError("add_event")

    with Processor(min_duration=0) as processor:
        watched(lambda: None, processor)
        with trace.use_span(Strange(trace.INVALID_SPAN_CONTEXT)):
            assert processor.run("k", lambda _: 5) == 5
        opentelemetry.uninstrument()


def test_the_deadline_is_no_watcher_s_to_use_up(clock: VirtualTime) -> None:
    """Who waits in the load itself is still interrupted in time."""
    with Processor(load_resource=lambda _: gevent.sleep(100), min_duration=0, max_duration=1) as processor:
        (answer,) = run_all(clock, processor, (append, 1))
    assert isinstance(answer, BatchTimeout)


# -- stores ------------------------------------------------------------------------------------------------


def test_a_key_that_cannot_be_shown_has_its_own_errors_in_a_store(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'documents.sqlite'}")
    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {})
    store.create_table()
    with Processor(open_resource=store, min_duration=0) as processor:
        calls = [(dict.__setitem__, "bad", object()), (dict.__setitem__, "good", 1)]
        callers = [gevent.spawn(answer_of, processor.run, OddKey("odd"), *call) for call in calls]
        refused, answer = [caller.get() for caller in callers]
        assert isinstance(refused, TypeError)
        assert answer is None
        assert processor.run("odd", dict) == {"good": 1}
    engine.dispose()


def test_an_odd_error_of_what_encodes_reaches_the_culprit_alone(tmp_path: Path) -> None:
    error = Odd(1, 2)

    def encode(document: dict[str, Any]) -> str:
        if "bad" in document:
            raise error
        return json.dumps(document)

    engine = sa.create_engine(f"sqlite:///{tmp_path / 'documents.sqlite'}")
    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {}, encode=encode, decode=json.loads)
    store.create_table()
    with Processor(open_resource=store, min_duration=0) as processor:
        calls = [(dict.__setitem__, name, 1) for name in ("good", "bad", "better")]
        callers = [gevent.spawn(answer_of, processor.run, "k", *call) for call in calls]
        answers = [caller.get() for caller in callers]
        assert answers[1] is error
        assert processor.run("k", dict) == {"good": 1, "better": 1}
    engine.dispose()


# -- at the door ----------------------------------------------------------------------------------------------


class Hidden:
    """It is of no type that anybody wants, and cannot be shown."""

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        raise LookupError("repr")


@pytest.mark.parametrize("option", DEFAULTS)
def test_what_cannot_be_shown_is_refused_at_the_door_as_anything_else(option: str) -> None:
    pair = {"load_resources": dict, "save_resources": print}
    options: dict[str, Any] = pair if option in {"max_bulk", "save_resources"} else {}
    with pytest.raises(TypeError, match=f"{option}.*Hidden object at 0x"):
        Processor(**{**options, option: Hidden()})


@pytest.mark.parametrize("option", ["start_timeout", "identified_by", "read_only"])
def test_what_cannot_be_shown_is_refused_by_run_as_anything_else(clock: VirtualTime, option: str) -> None:
    options: dict[str, Any] = {option: Hidden()}
    with Processor(min_duration=0) as processor, pytest.raises(TypeError, match=f"{option}.*Hidden object at 0x"):
        processor.run("k", print, **options)


def test_neither_a_key_nor_an_operation_has_to_be_shown_to_be_refused(clock: VirtualTime) -> None:
    hidden: Any = Hidden()
    with Processor(min_duration=0) as processor:
        with pytest.raises(TypeError, match=r"operation is .*Hidden object at 0x.* must be callable"):
            processor.run("k", hidden)
        with pytest.raises(TypeError, match=r"key is .*Hidden object at 0x.* must be hashable"):
            processor.run(hidden, print)
        with pytest.raises(TypeError, match=r"idempotency_key .*Hidden object at 0x"):
            processor.run("k", print, idempotency_key=hidden)


@pytest.mark.parametrize(
    "option", ["mode", "missing", "reuse_resource", "idempotency", "idempotency_ttl", "encode", "decode"]
)
def test_what_cannot_be_shown_is_refused_by_a_store_as_anything_else(option: str) -> None:
    engine = sa.create_engine("sqlite://")
    options: dict[str, Any] = {option: Hidden()}
    with pytest.raises((TypeError, ValueError), match=f"{option}.*Hidden object at 0x"):
        SQLAlchemyStore.documents(engine, "documents", **options)
    with pytest.raises((TypeError, ValueError), match=r"prefix is .*Hidden object at 0x"):
        RedisStore(Redis(), prefix=Hidden())  # type: ignore[arg-type]

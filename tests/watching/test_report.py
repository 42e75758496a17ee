"""What is logged, and when: once a batch, never in anybody's way, and quiet by default."""

from __future__ import annotations

import logging
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import BatchAborted, BatchTimeout, Processor, ProcessorOverloaded, ResourceMissing
from geventbatch._watch import call_later, log
from tests.support.callers import answer_of, in_a_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime

    Burn = Callable[[float], Callable[..., None]]


@pytest.fixture(autouse=True)
def _no_place_is_known() -> Iterator[None]:
    known = set(log._logged)
    log._logged.clear()
    yield
    log._logged.update(known)


def nothing(resource: object) -> None:
    """An operation."""


def sleeping(seconds: float) -> Callable[..., None]:
    def sleep(*args: object) -> None:
        gevent.sleep(seconds)

    return sleep


def raising(error: BaseException) -> Callable[..., Any]:
    def raise_it(*args: object) -> None:
        raise error

    return raise_it


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What was logged so far: levels and messages."""
    gevent.sleep(0)
    gevent.sleep(0)
    return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "geventbatch"]


# Failed batches


@pytest.mark.parametrize("batching", [True, False])
def test_a_batch_that_fails_is_logged_once_with_its_cause_and_how_many_were_told(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture, batching: bool
) -> None:
    cause = OSError("disk full")
    with Processor(save_resource=raising(cause), min_duration=0, batching=batching) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "k", nothing) for _ in range(3 if batching else 1)]
        answers = [caller.get() for caller in callers]
    ((level, told),) = logged(caplog)
    assert level == "ERROR"
    assert told == f"{processor.name}: {answers[0]}; callers answered with it: {len(callers)}"
    assert "batch of key 'k': saving raised OSError('disk full'); it is unknown whether" in told
    assert caplog.records[0].exc_info is not None
    assert caplog.records[0].exc_info[1] is cause


def test_the_traceback_of_a_cause_is_shown_once_a_minute_and_each_line_says_what_it_was(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(key: str) -> None:
        raise OSError(f"no connection for {key}")

    with Processor(load_resource=refuse, min_duration=0) as processor:
        for key in ("a", "b"):
            answer_of(processor.run, key, nothing)
        gevent.sleep(60)
        answer_of(processor.run, "c", nothing)
    told = [message for _, message in logged(caplog)]
    assert [f"no connection for {key}" in message for key, message in zip("abc", told, strict=True)] == [True] * 3
    assert [message.endswith(log.SHOWN_BEFORE) for message in told] == [False, True, False]
    assert [record.exc_info is not None for record in caplog.records] == [True, False, True]


@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_a_deadline_that_was_noticed_late_says_that_something_held_the_hub(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    functions = dict.fromkeys(("load", "operations", "save"), nothing) | {phase: sleeping(100)}
    with (
        Processor(
            load_resource=functions["load"],
            save_resource=lambda key, resource: functions["save"](resource),
            min_duration=0,
            max_duration=1,
        ) as innocent,
        Processor(min_duration=0, max_duration=1) as spinning,
    ):
        waiting = gevent.spawn(answer_of, innocent.run, "innocent", functions["operations"])
        gevent.sleep(0.5)
        spinner = answer_of(spinning.run, "spinner", lambda _: clock.spend(2))
        assert isinstance(spinner, BatchTimeout)
        assert "applying its operations (noticed 1.0 s late: something held the hub" in str(spinner)
        assert "(noticed 1.5 s late: something held the hub" in str(waiting.get())
    timeouts = [message for level, message in logged(caplog) if level == "ERROR"]
    assert ["s late: something held the hub" in message for message in timeouts] == [True, True]


def test_a_deadline_that_was_noticed_in_time_says_nothing_of_the_hub(clock: VirtualTime) -> None:
    with Processor(load_resource=sleeping(100), min_duration=0, max_duration=1) as processor:
        assert "late" not in str(answer_of(processor.run, "k", nothing))


def test_another_cause_and_another_processor_show_their_own_traceback(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    for name, error in (("one", OSError()), ("one", ValueError()), ("two", OSError())):
        with Processor(load_resource=raising(error), min_duration=0, name=name) as processor:
            answer_of(processor.run, "k", nothing)
            logged(caplog)
    assert [record.exc_info is not None for record in caplog.records] == [True] * 3


def test_an_overloaded_processor_says_so_once_a_minute(clock: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    with Processor(load_resource=sleeping(70), max_duration=100, max_pending=1, name="trains") as processor:
        waiting = gevent.spawn(processor.run, "k", nothing)
        gevent.sleep(0)
        answers = []
        for seconds in (1, 1, 60):
            answers.append(answer_of(processor.run, "other", nothing))
            gevent.sleep(seconds)
        answers.append(answer_of(processor.run, "other", nothing))
        told = [message for level, message in logged(caplog) if level == "WARNING"]
        waiting.get()
    assert [type(answer) for answer in answers] == [ProcessorOverloaded] * 4
    first, second = told
    assert first.startswith("trains: refuses operations, since max_pending of 1 wait already (ProcessorOverloaded, num")
    assert ["number 1 of" in first, "number 4 of" in second] == [True, True]


@pytest.mark.parametrize("batching", [True, False])
def test_a_missing_resource_is_its_callers_affair_and_is_not_logged(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture, batching: bool
) -> None:
    with Processor(load_resource=raising(ResourceMissing("none")), min_duration=0, batching=batching) as processor:
        assert isinstance(answer_of(processor.run, "k", nothing), ResourceMissing)
    assert logged(caplog) == []


@pytest.mark.parametrize("phase", ["load", "operations", "save"])
def test_after_a_deadline_the_log_and_the_cause_name_the_line_where_the_code_waited(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture, phase: str
) -> None:
    hangs: Any = sleeping(100)
    functions = dict.fromkeys(("load", "operations", "save"), nothing) | {phase: hangs}
    with Processor(
        load_resource=functions["load"],
        save_resource=lambda key, resource: functions["save"](resource),
        min_duration=0,
        max_duration=5,
    ) as processor:
        answer = answer_of(processor.run, "k", functions["operations"])
    assert isinstance(answer, BatchTimeout)
    place = f"{__file__}:{hangs.__code__.co_firstlineno + 1} in sleeping.<locals>.sleep"
    assert answer.__cause__ is not None
    (note,) = answer.__cause__.__notes__
    assert place in note
    assert place in caplog.text


def test_a_batch_that_is_saved_and_an_operation_that_raises_log_nothing(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    with Processor(load_resource=sleeping(0.4), min_duration=0) as processor:
        answer_of(processor.run, "k", raising(KeyError()))
        processor.run("k", nothing)
    assert logged(caplog) == []


def test_a_batch_that_fails_in_another_thread_is_logged_there(caplog: pytest.LogCaptureFixture) -> None:
    processor: Processor[None] = Processor(save_resource=raising(OSError()), batching=False)
    in_a_thread(lambda: answer_of(processor.run, "k", nothing))
    assert [level for level, _ in logged(caplog)] == ["ERROR"]


def test_quiet_by_default() -> None:
    program = """
from gevent import monkey; monkey.patch_all()
import gevent
from geventbatch import Processor
def fail(*args): raise OSError("disk full")
processor = Processor(save_resource=fail, min_duration=0)
try:
    processor.run("k", lambda resource: None)
except Exception as error:
    print(type(error).__name__)
gevent.sleep(0.01)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)
    assert (done.stdout, done.stderr) == ("SaveFailed\n", "")


def test_a_handler_that_waits_delays_no_answer_and_one_that_raises_fails_none(
    clock: VirtualTime, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[float] = []

    class Slow(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            gevent.sleep(5)
            seen.append(clock.now())
            raise OSError("broken handler")

    handler = Slow()
    logger = logging.getLogger("geventbatch")
    logger.addHandler(handler)
    try:
        with Processor(save_resource=raising(OSError()), min_duration=0) as processor:
            for _ in range(3):
                answer_of(processor.run, "k", nothing)
            assert clock.now() == 0
        clock.advance(60)
    finally:
        logger.removeHandler(handler)
    assert seen == [5, 10, 15]
    assert capsys.readouterr().err.count("OSError: broken handler") == 3


def test_more_than_a_thousand_lines_that_wait_are_dropped_and_counted(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    with Processor(load_resource=raising(OSError()), min_duration=0) as processor:
        answer_of(processor.run, "k", nothing)
        logged(caplog)
        for number in range(call_later.MOST + 5):
            log._reporter.tell(logging.WARNING, partial(log._log.warning, "line %d", number))
    told = [line for _, line in logged(caplog)][1:]
    assert told == [f"line {number}" for number in range(1000)] + [
        "5 more lines were dropped, since 1000 waited to be logged"
    ]


def test_a_teller_that_was_killed_is_replaced(clock: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    with Processor(load_resource=raising(OSError()), min_duration=0) as processor:
        answer_of(processor.run, "k", nothing)
        logged(caplog)
        log._reporter.tell(logging.WARNING, partial(log._log.warning, "one"))
        teller = log._reporter._teller
        assert teller is not None
        teller.kill(block=False)
        gevent.sleep(0)
        log._reporter.tell(logging.WARNING, partial(log._log.warning, "two"))
    assert [line for _, line in logged(caplog)][1:] == ["one", "two"]


def test_a_line_that_raises_a_kill_ends_no_other_line(clock: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    with Processor(load_resource=raising(OSError()), min_duration=0) as processor:
        answer_of(processor.run, "k", nothing)
        logged(caplog)
        log._reporter.tell(logging.WARNING, raising(gevent.GreenletExit()))
        log._reporter.tell(logging.WARNING, partial(log._log.warning, "behind it"))
    assert [line for _, line in logged(caplog)][1:] == ["behind it"]


# Slow loads and saves, lost workers


def test_a_load_or_save_that_takes_more_than_half_of_max_duration_is_logged(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    with Processor(load_resource=sleeping(5.5), min_duration=0, max_duration=10, name="one") as processor:
        processor.run("k", nothing)
    with Processor(save_resource=sleeping(6), min_duration=0, max_duration=10, name="two") as processor:
        processor.run("k", nothing)
    with Processor(save_resource=sleeping(4.9), min_duration=0, max_duration=10) as processor:
        processor.run("k", nothing)
    assert logged(caplog) == [
        ("WARNING", "one: batch of key 'k': its load took 5.500 s of the max_duration of 10 s"),
        ("WARNING", "two: batch of key 'k': its save took 6.000 s of the max_duration of 10 s"),
    ]


def test_of_a_slow_load_that_fails_the_failure_is_logged_alone(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    def load(key: str) -> None:
        gevent.sleep(6)
        raise OSError

    with Processor(load_resource=load, min_duration=0, max_duration=10) as processor:
        answer_of(processor.run, "k", nothing)
    assert [level for level, _ in logged(caplog)] == ["ERROR"]


def test_a_worker_that_came_back_after_the_deadline_or_was_killed_is_logged(
    clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    def hang(key: str) -> None:
        try:
            gevent.sleep(100)
        finally:
            gevent.sleep(3)

    with Processor(load_resource=hang, min_duration=0, max_duration=5, name="a") as processor:
        answer_of(processor.run, "k", nothing)
    with Processor(load_resource=raising(gevent.GreenletExit()), min_duration=0, max_duration=5, name="a") as processor:
        answer_of(processor.run, "k", nothing)
    lines = [line for level, line in logged(caplog) if level == "WARNING" and "worker" in line]
    late = "its code has returned 3.000 s after its deadline, and its worker is not used again"
    killed = "its worker was killed by GreenletExit()"
    assert lines == [f"a: batch of key 'k': {what}; another takes its place" for what in (late, killed)]


# The hub


@pytest.fixture
def burn(clock: VirtualTime) -> Burn:
    """Gives what keeps the hub for so many seconds."""

    def burn(seconds: float) -> Callable[..., None]:
        def burn_it(*args: object) -> None:
            clock.spend(seconds)

        return burn_it

    return burn


@pytest.mark.parametrize("wait", [0, 0.002])
@pytest.mark.parametrize("doing", ["load", "operation", "save"])
def test_what_keeps_the_hub_without_a_yield_is_named_once_with_its_place(
    burn: Burn, caplog: pytest.LogCaptureFixture, doing: str, wait: float
) -> None:
    """Also when what went before it has waited, as real loads do."""
    blocks = burn(0.06)
    waits = sleeping(wait) if wait else nothing
    functions = {"load": waits, "operation": nothing, "save": waits, doing: blocks}
    with Processor(
        load_resource=functions["load"],
        save_resource=lambda key, resource: functions["save"](resource),
        min_duration=0,
        max_duration=10,
        max_blocking_time=0.05,
        name="a",
    ) as processor:
        for _ in range(2):
            processor.run("k", functions["operation"])
    ((level, told),) = logged(caplog)
    assert level == "WARNING"
    assert told.startswith(f"a: batch of key 'k': {doing}, ")
    assert "without a yield" in told
    name = "<lambda>" if doing == "save" else "burn_it"
    assert name in told
    assert f"{__file__}:" in told


def test_an_operation_in_a_window_that_blocks_is_named_and_not_those_around_it(
    burn: Burn, caplog: pytest.LogCaptureFixture
) -> None:
    with Processor(min_duration=0.05, max_duration=10, max_blocking_time=0.03) as processor:
        first = gevent.spawn(processor.run, "k", nothing)
        gevent.sleep(0.01)
        processor.run("k", burn(0.06))
        first.get()
    ((_, told),) = logged(caplog)
    assert "burn_it" in told


def test_many_short_operations_and_a_load_that_waits_long_are_not_blocking(
    burn: Burn, caplog: pytest.LogCaptureFixture
) -> None:
    with Processor(load_resource=sleeping(0.08), min_duration=0, max_duration=10, max_blocking_time=0.05) as processor:
        callers = [gevent.spawn(processor.run, "k", burn(0.002)) for _ in range(50)]
        gevent.joinall(callers, raise_error=True)
    assert logged(caplog) == []


def test_nothing_is_said_of_blocking_when_it_is_turned_off(burn: Burn, caplog: pytest.LogCaptureFixture) -> None:
    with Processor(load_resource=burn(0.06), min_duration=0, max_duration=10, max_blocking_time=None) as processor:
        processor.run("k", nothing)
    assert logged(caplog) == []


def test_a_bulk_that_blocks_is_named(burn: Burn, caplog: pytest.LogCaptureFixture) -> None:
    wait = burn(0.06)

    def load(keys: list[str]) -> dict[str, None]:
        wait()
        return dict.fromkeys(keys)

    with Processor(
        load_resources=load, save_resources=nothing, min_duration=0, max_duration=10, max_blocking_time=0.05
    ) as processor:
        processor.run("k", nothing)
    ((_, told),) = logged(caplog)
    assert "load" in told
    assert f"{__file__}:" in told


def test_a_kill_whose_repr_raises_is_told_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Unshown(gevent.GreenletExit):
        def __repr__(self) -> str:
            raise ValueError

    def die(_resource: None) -> None:
        raise Unshown

    with Processor(min_duration=0) as processor, pytest.raises(BatchAborted):
        processor.run("key", die)
    gevent.idle()
    assert any("its worker was killed by" in record.getMessage() for record in caplog.records)


def test_a_key_whose_repr_raises_is_told_of_all_the_same(clock: VirtualTime, caplog: pytest.LogCaptureFixture) -> None:
    class Key:
        def __repr__(self) -> str:
            raise OSError

    key = Key()
    with Processor(
        load_resource=sleeping(6), worker_number_for_key=lambda *_: 0, min_duration=0, max_duration=10
    ) as processor:
        processor.run(key, nothing)
    ((_, told),) = logged(caplog)
    assert "Key object at" in told
    assert "its load took 6.000 s" in told


def test_places_that_have_no_end_are_forgotten(burn: Burn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_MOST_PLACES", 3)
    with Processor(min_duration=0, max_duration=10, max_blocking_time=0.05) as processor:
        for number in range(5):
            operation = burn(0.06)
            operation.__qualname__ = f"operation {number}"
            processor.run("k", operation)
    assert len(log._logged) == 2

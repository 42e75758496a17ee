"""The options of a processor: their defaults, and that bad input is refused at the door (guarantee 15)."""

from __future__ import annotations

import inspect
import math
import os
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent import GreenletExit

from geventbatch import BatchTimeout, Conflict, Processor, SaveFailed
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Hashable
    from contextlib import AbstractContextManager

    from geventbatch.testing import VirtualTime

NAN = math.nan
INF = math.inf


class Store:
    """Notes every load and save; each key has a list that is loaded as a copy."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.saved: dict[Hashable, list[Any]] = {}
        self.calls: list[tuple[str, Hashable]] = []

    def load(self, key: Hashable) -> list[Any]:
        self.calls.append(("load", key))
        gevent.sleep(self.seconds)
        return list(self.saved.get(key, ()))

    def save(self, key: Hashable, resource: list[Any]) -> None:
        self.calls.append(("save", key))
        self.saved[key] = resource


def append(resource: list[Any], value: Any) -> int:
    resource.append(value)
    return len(resource)


def make(**options: Any) -> Processor[Any]:
    return Processor(**options)


# Defaults


def test_every_option_is_a_keyword() -> None:
    positional: Any = Processor
    with pytest.raises(TypeError, match=r"^Processor\(\) was given 7 without a name.*Processor\(open_resource=store\)"):
        positional(7, max_duration=5)


def test_every_option_is_optional_and_an_unknown_one_is_refused_by_name() -> None:
    assert isinstance(Processor(), Processor)
    with pytest.raises(TypeError, match=r"Processor\(\) has no option max_duratoin: did you mean max_duration\?"):
        make(max_duratoin=1)


def test_the_window_is_a_tenth_of_a_second_by_default(clock: VirtualTime) -> None:
    store = Store()
    with Processor(load_resource=store.load, save_resource=store.save) as processor:
        assert processor.run("k", append, 1) == 1
        assert clock.now() == 0.1


@pytest.mark.parametrize(
    ("min_duration", "max_duration"),
    [(None, 0.2), (0.1, 0.2), (0.5, 1.0), (3, 6.0), (0, 1.0), (0.001, 1.0), (0.05, 1.0), (0.09, 1.0)],
)
def test_the_deadline_is_twice_the_window_by_default_but_one_second_for_windows_under_a_tenth(
    clock: VirtualTime, min_duration: float | None, max_duration: float
) -> None:
    store = Store(seconds=100)
    options = {} if min_duration is None else {"min_duration": min_duration}
    with make(load_resource=store.load, **options) as processor:
        answer = answer_of(processor.run, "k", append, 1)
        assert isinstance(answer, BatchTimeout)
        assert clock.now() == max_duration


def test_the_deadline_is_what_max_duration_says(clock: VirtualTime) -> None:
    store = Store(seconds=100)
    with Processor(load_resource=store.load, min_duration=0, max_duration=7) as processor:
        assert isinstance(answer_of(processor.run, "k", append, 1), BatchTimeout)
        assert clock.now() == pytest.approx(7)


def test_there_are_16_shards_for_each_cpu_by_default() -> None:
    asked: list[int] = []

    def number(key: str, workers: int) -> int:
        asked.append(workers)
        return workers - 1

    with Processor(worker_number_for_key=number, min_duration=0) as processor:
        processor.run("k", lambda resource: None)
    assert asked == [16 * (os.cpu_count() or 1)]


def test_a_batch_is_saved_five_times_at_the_most_by_default(clock: VirtualTime) -> None:
    loads: list[str] = []

    def conflict(key: str, resource: object) -> None:
        raise Conflict

    with Processor(load_resource=loads.append, save_resource=conflict, min_duration=0) as processor:
        answer = answer_of(processor.run, "k", lambda resource: None)
    assert isinstance(answer, SaveFailed)
    assert len(loads) == 5


def test_limits_are_none_by_default_so_that_2000_keys_run_at_once_and_2000_operations_are_one_batch(
    clock: VirtualTime,
) -> None:
    store = Store(seconds=0.5)
    with Processor(load_resource=store.load, save_resource=store.save, min_duration=0) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "one", append, number) for number in range(2000)]
        callers += [gevent.spawn(answer_of, processor.run, number, append, 1) for number in range(2000)]
        assert [caller.get() for caller in callers] == [*range(1, 2001), *[1] * 2000]
        assert clock.now() == pytest.approx(0.5)
    assert store.saved["one"] == list(range(2000))
    assert store.calls.count(("load", "one")) == 1


def test_batching_is_on_by_default_and_readable() -> None:
    assert Processor().batching is True
    assert Processor(batching=False).batching is False


def test_the_docstring_explains_every_option() -> None:
    documented = inspect.getdoc(Processor) or ""
    for option in (
        "open_resource",
        "load_resource",
        "save_resource",
        "min_duration",
        "max_duration",
        "workers",
        "worker_number_for_key",
        "max_attempts",
        "clean_errors",
        "recorded_errors",
        "copy_resource",
        "max_batches",
        "max_batch_size",
        "max_pending",
        "batching",
    ):
        assert f"    {option}: " in documented


# Bad options

SECONDS = "must be a number of seconds"
FINITE = "must be a finite number of seconds, 0 or more"
MORE = "must be more than min_duration"
COUNT = "must be an int"
ONE_OR_MORE = "must be 1 or more"
CALLABLE = "must be callable"
CLASSES = "must be a tuple of exception classes"
COUNTS = ("workers", "max_attempts", "max_batches", "max_batch_size", "max_pending")

BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    *[
        ({name: value}, TypeError, SECONDS)
        for name in ("min_duration", "max_duration")
        for value in ("1", True, [1], 1j)
    ],
    ({"min_duration": None}, TypeError, SECONDS),
    ({"min_duration": False}, TypeError, SECONDS),
    ({"max_duration": Decimal(1)}, TypeError, SECONDS),
    *[
        ({name: value}, ValueError, FINITE)
        for name in ("min_duration", "max_duration")
        for value in (NAN, INF, -INF, -1, -0.001)
    ],
    ({"max_duration": 0.1}, ValueError, MORE),
    ({"max_duration": 0}, ValueError, MORE),
    ({"max_duration": 1, "min_duration": 1}, ValueError, MORE),
    ({"max_duration": 0.0, "min_duration": 0}, ValueError, MORE),
    ({"max_duration": 1, "min_duration": 1.5}, ValueError, MORE),
    *[({name: value}, TypeError, COUNT) for name in COUNTS for value in (True, 1.0, "1", NAN)],
    *[({name: value}, ValueError, ONE_OR_MORE) for name in COUNTS for value in (0, -1)],
    ({"max_attempts": None}, TypeError, COUNT),
    *[
        ({name: value}, TypeError, CALLABLE)
        for name in ("open_resource", "load_resource", "save_resource", "worker_number_for_key")
        for value in (1, "load")
    ],
    ({"worker_number_for_key": None}, TypeError, CALLABLE),
    *[
        ({name: value}, TypeError, CLASSES)
        for name in ("clean_errors", "recorded_errors")
        for value in (ValueError, [ValueError], None, (ValueError(),), ("ValueError",), (int,), (ValueError, object))
    ],
    *[
        ({name: (ValueError, value)}, TypeError, "must have subclasses of Exception, or gevent.Timeout")
        for name in ("clean_errors", "recorded_errors")
        for value in (KeyboardInterrupt, SystemExit, GreenletExit)
    ],
    *[({"copy_resource": value}, TypeError, "must be callable, or None") for value in (1, "copy", False)],
    *[({"batching": value}, TypeError, "must be True or False") for value in (1, 0, None, "no")],
]


@pytest.mark.parametrize(("options", "kind", "allowed"), BAD_OPTIONS, ids=str)
def test_a_bad_option_is_refused_with_its_name_its_value_and_what_is_allowed(
    options: dict[str, Any], kind: type[Exception], allowed: str
) -> None:
    with pytest.raises(kind) as raised:
        make(**options)
    message = str(raised.value)
    name, value = next(iter(options.items()))
    assert type(raised.value) is kind
    assert message.startswith(name)
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize("pair", [("load_resource",), ("save_resource",), ("load_resource", "save_resource")])
def test_open_resource_and_the_pair_together_are_refused(pair: tuple[str, ...]) -> None:
    def scope(key: str) -> AbstractContextManager[None]:
        raise NotImplementedError

    with pytest.raises(TypeError, match="open_resource takes the place of load_resource and save_resource"):
        make(open_resource=scope, **dict.fromkeys(pair, print))


def test_a_window_of_which_twice_is_too_great_for_a_float_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="max_duration is inf, but must be a finite number"):
        Processor(min_duration=1e308)


def test_a_deadline_too_great_for_a_float_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^max_duration is 1000.*must be a finite number of seconds"):
        make(max_duration=10**400)


def test_batching_set_to_something_else_than_a_bool_is_refused_and_stays_as_it_was() -> None:
    processor: Any = Processor()
    for value in (0, 1, None, "off"):
        with pytest.raises(TypeError, match=f"batching is {value!r}, but must be True or False"):
            processor.batching = value
        assert processor.batching is True


# Bad arguments of run and stop


class Unequal:
    """Not equal to itself."""

    def __eq__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 1

    def __repr__(self) -> str:
        return "<an Unequal>"


UNHASHABLE = "must be hashable"
UNEQUAL = "not equal to itself"

BAD_RUNS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("key", ([1, 2], append, 1), {}, TypeError, UNHASHABLE),
    ("key", (({},), append, 1), {}, TypeError, UNHASHABLE),
    ("key", (NAN, append, 1), {}, ValueError, UNEQUAL),
    ("key", (Unequal(), append, 1), {}, ValueError, UNEQUAL),
    ("operation", ("k", None), {}, TypeError, CALLABLE),
    ("operation", ("k", "append"), {}, TypeError, CALLABLE),
    ("operation", ("k", 12), {}, TypeError, "pass the function itself, and behind it its arguments"),
    *[
        ("start_timeout", ("k", append, 1), {"start_timeout": value}, TypeError, SECONDS)
        for value in (True, False, "1", [1])
    ],
    *[
        ("start_timeout", ("k", append, 1), {"start_timeout": value}, ValueError, FINITE)
        for value in (NAN, INF, -INF, -1, -0.5)
    ],
]


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("bad", BAD_RUNS, ids=str)
def test_a_bad_argument_of_run_is_refused_with_its_name_its_value_and_what_is_allowed_and_nothing_is_enqueued(
    clock: VirtualTime,
    batching: bool,
    bad: tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str],
) -> None:
    name, args, options, kind, allowed = bad
    store = Store()
    numbers: list[Any] = []

    def number(key: Hashable, workers: int) -> int:
        numbers.append(key)
        return 0

    with make(
        load_resource=store.load,
        save_resource=store.save,
        worker_number_for_key=number,
        batching=batching,
        min_duration=0,
    ) as processor:
        before = repr(processor)
        with pytest.raises(kind) as raised:
            processor.run(*args, **options)
        assert repr(processor) == before
        assert clock.timers == 0
    value = options.get(name, args[0] if name == "key" else args[1])
    assert type(raised.value) is kind
    assert str(raised.value).startswith(f"{name} is {value!r}, ")
    assert allowed in str(raised.value)
    assert store.calls == []
    assert numbers == []


@pytest.mark.parametrize("value", [True, "1", [1], NAN, INF, -1])
def test_a_bad_timeout_of_stop_is_refused_with_its_name_and_value_and_stops_nothing(
    clock: VirtualTime, value: Any
) -> None:
    with Processor(min_duration=0) as processor:
        with pytest.raises((TypeError, ValueError)) as raised:
            processor.stop(timeout=value)
        assert str(raised.value).startswith(f"timeout is {value!r}, but must be a ")
        assert processor.run("k", lambda resource: 5) == 5


def test_key_and_operation_are_positional_and_an_operation_takes_no_keywords() -> None:
    with Processor(min_duration=0) as processor:
        loose: Any = processor.run
        with pytest.raises(TypeError):
            loose(key="k", operation=append)
        with pytest.raises(TypeError):
            loose("k", append, value=1)


# worker_number_for_key of the user's own


@pytest.mark.parametrize(
    ("number", "kind", "allowed"),
    [
        (4, ValueError, "a number from 0 to 3"),
        (-1, ValueError, "a number from 0 to 3"),
        (10**9, ValueError, "a number from 0 to 3"),
        (10**30, ValueError, "a number from 0 to 3"),
        (True, TypeError, "an int"),
        (1.0, TypeError, "an int"),
        (None, TypeError, "an int"),
        ("1", TypeError, "an int"),
    ],
)
def test_a_worker_number_out_of_range_is_refused_with_the_number_the_key_and_what_is_allowed(
    clock: VirtualTime, number: Any, kind: type[Exception], allowed: str
) -> None:
    store = Store()
    with Processor(
        load_resource=store.load, worker_number_for_key=lambda key, workers: number, workers=4, min_duration=0
    ) as processor:
        before = repr(processor)
        with pytest.raises(kind) as raised:
            processor.run("a key", append, 1)
        assert repr(processor) == before
    message = str(raised.value)
    assert message.startswith("worker_number_for_key")
    assert repr(number) in message
    assert "'a key'" in message
    assert allowed in message
    assert store.calls == []


def test_what_a_users_worker_number_for_key_raises_reaches_its_caller_and_nothing_is_enqueued(
    clock: VirtualTime,
) -> None:
    class Unknown(Exception):
        pass

    store = Store()
    errors = [Unknown("one"), Unknown("two")]
    left = list(errors)

    def number(key: str, workers: int) -> int:
        if left:
            raise left.pop(0)
        return 0

    with Processor(
        load_resource=store.load, save_resource=store.save, worker_number_for_key=number, min_duration=0
    ) as processor:
        before = repr(processor)
        assert [answer_of(processor.run, "k", append, 1) for _ in errors] == errors
        assert repr(processor) == before
        assert store.calls == []
        assert processor.run("k", append, 2) == 1
    assert store.saved == {"k": [2]}


def test_nothing_that_was_refused_counts_against_max_pending(clock: VirtualTime) -> None:
    broken = [True]

    def number(key: str, workers: int) -> int:
        if broken:
            raise KeyError(key)
        return 0

    with Processor(worker_number_for_key=number, max_pending=1, min_duration=0) as processor:
        for _ in range(5):
            assert isinstance(answer_of(processor.run, "k", print), KeyError)
        for args in BAD_RUNS:
            assert isinstance(answer_of(processor.run, *args[1], **args[2]), args[3])
        broken.clear()
        assert processor.run("k", lambda resource: 1) == 1


def test_a_key_with_a_hash_that_raises_reaches_its_caller_with_what_it_raised(clock: VirtualTime) -> None:
    class Odd:
        def __hash__(self) -> int:
            raise KeyError("odd")

    with Processor(min_duration=0) as processor:
        assert isinstance(answer_of(processor.run, Odd(), print), KeyError)

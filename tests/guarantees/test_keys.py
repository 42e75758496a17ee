"""Keys, and the default `worker_number_for_key`."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
from collections import Counter
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID, uuid5

import gevent
import pytest

from geventbatch import Processor, worker_number_for_key

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch.testing import VirtualTime

ROOT = Path(__file__).parents[2]

A_UUID = UUID("12345678-1234-5678-1234-567812345678")

# Kept for ever: another version on another machine has to give these too.
KNOWN = [
    ("", 64, 11),
    ("ICE 1", 64, 20),
    ("Zürich", 64, 26),
    ("\udc80", 64, 7),
    (b"ICE 1", 64, 42),
    (0, 64, 61),
    (-7, 64, 29),
    (2**200, 64, 27),
    (A_UUID, 64, 7),
    ((), 64, 40),
    (("ICE 1", 2), 64, 57),
    ((("a", b"b"), (A_UUID, -1)), 64, 35),
]


class Colour(str):
    __slots__ = ()


class Level(enum.IntEnum):
    LOW = 1


class Seat(NamedTuple):
    train: str
    number: int


@pytest.mark.parametrize(("key", "workers", "number"), KNOWN, ids=repr)
def test_a_key_has_the_number_that_it_had_on_every_machine_before(key: Hashable, workers: int, number: int) -> None:
    assert worker_number_for_key(key, workers) == number


def test_a_key_has_the_same_number_in_every_process_whatever_its_hash_seed() -> None:
    program = (
        "import json; from uuid import UUID; from geventbatch import worker_number_for_key as number;"
        f"A = {A_UUID!r};"
        "keys = ['ICE 1', 'Zürich', b'ICE 1', 5, A, ('ICE 1', 2), (A, (b'x', 'y'))];"
        "print(json.dumps([[number(key, workers) for key in keys] for workers in (1, 7, 64, 1000)] + [hash('ICE 1')]))"
    )
    told = []
    for seed in ("0", "1", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"}
        output = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
        )
        told.append(json.loads(output.stdout))
    hashes = {numbers.pop() for numbers in told}
    assert len(hashes) == 3, "the processes were meant to differ in their hashes"
    assert told[0] == told[1] == told[2]
    keys = ["ICE 1", "Zürich", b"ICE 1", 5, A_UUID, ("ICE 1", 2), (A_UUID, (b"x", "y"))]
    assert told[0] == [[worker_number_for_key(key, workers) for key in keys] for workers in (1, 7, 64, 1000)]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (0, False),
        (1, Level.LOW),
        ("red", Colour("red")),
        ("grün", Colour("grün")),
        (("ICE 1", 3), Seat("ICE 1", 3)),
        ((1, 0), (True, False)),
        (A_UUID, UUID(A_UUID.hex)),
        (b"ab", bytes(bytearray(b"ab"))),
    ],
    ids=repr,
)
def test_equal_keys_have_equal_numbers(one: Hashable, other: Hashable) -> None:
    assert one == other
    for workers in (2, 3, 64, 10007, 2**31):
        assert worker_number_for_key(one, workers) == worker_number_for_key(other, workers)


def test_a_number_is_from_0_to_workers_less_1() -> None:
    for workers in (1, 2, 3, 16, 1000):
        numbers = {worker_number_for_key(key, workers) for key in range(20 * workers)}
        assert min(numbers) >= 0
        assert max(numbers) <= workers - 1


@pytest.mark.parametrize(
    "keys",
    [
        [f"train {number}" for number in range(6400)],
        list(range(6400)),
        [b"%d" % number for number in range(6400)],
        [uuid5(A_UUID, str(number)) for number in range(6400)],
        [("train", number) for number in range(6400)],
    ],
    ids=["str", "int", "bytes", "UUID", "tuple"],
)
def test_keys_spread_evenly_over_the_workers(keys: list[Hashable]) -> None:
    counts = Counter(worker_number_for_key(key, 64) for key in keys)
    assert len(counts) == 64
    assert min(counts.values()) > 50
    assert max(counts.values()) < 150


def test_parts_of_a_tuple_do_not_run_into_one_another() -> None:
    """As they would if only their texts were joined: then a composite key would share its shard for nothing."""
    for one, other in [
        (("ab", "c"), ("a", "bc")),
        (("a", ("b",)), (("a",), "b")),
        ((1, 23), (12, 3)),
        (("1",), (1,)),
        (("a",), "a"),
        ("a", b"a"),
        ((), ((),)),
    ]:
        assert worker_number_for_key(one, 2**31) != worker_number_for_key(other, 2**31)


@pytest.mark.parametrize(
    "key", [1.5, None, frozenset({1}), 1j, object, ("a", 1.5), ("a", ("b", None)), range(3), ...], ids=repr
)
def test_a_key_of_another_type_is_refused_with_what_to_pass(key: Any) -> None:
    with pytest.raises(TypeError) as raised:
        worker_number_for_key(key, 16)
    message = str(raised.value)
    part = key
    while isinstance(part, tuple):
        part = part[-1]
    assert f"key {part!r} is of the type {type(part).__name__}" in message
    assert (
        "make keys of str, bytes, int, UUID and tuples of them, or pass a worker_number_for_key of your own" in message
    )


def test_run_refuses_a_key_of_another_type_and_takes_it_with_a_worker_number_for_key_of_ones_own(
    clock: VirtualTime,
) -> None:
    with Processor(min_duration=0) as processor:
        for key in (1.5, None, ("a", 2.5)):
            with pytest.raises(TypeError, match="pass a worker_number_for_key of your own"):
                processor.run(key, lambda resource: None)
    with Processor(min_duration=0, worker_number_for_key=lambda key, workers: 0) as processor:
        for key in (1.5, None, ("a", 2.5)):
            assert processor.run(key, lambda resource: "taken") == "taken"


def test_keys_are_one_when_they_are_equal(clock: VirtualTime) -> None:
    loads: list[Hashable] = []
    with Processor(load_resource=loads.append, min_duration=0.5, max_duration=1) as processor:
        for same in [(1, True, Level.LOW), ("red", Colour("red")), (("ICE 1", 3), Seat("ICE 1", 3))]:
            callers = [gevent.spawn(processor.run, key, lambda resource: None) for key in same]
            gevent.joinall(callers, raise_error=True)
            assert len(loads) == 1
            loads.clear()


@pytest.mark.parametrize(
    ("key", "equal"),
    [
        (Decimal("1.50"), Decimal("1.5")),
        (Decimal("3.0"), 3),
        (date(2026, 11, 24), date(2026, 11, 24)),
        (datetime(2026, 11, 24, 12, tzinfo=UTC), datetime(2026, 11, 24, 13, tzinfo=timezone(timedelta(hours=1)))),
        ((1, Decimal(2)), (1, 2)),
    ],
)
def test_keys_of_columns_have_the_number_of_what_they_are_equal_to(key: Hashable, equal: Hashable) -> None:
    assert key == equal
    assert worker_number_for_key(key, 10**6) == worker_number_for_key(equal, 10**6)

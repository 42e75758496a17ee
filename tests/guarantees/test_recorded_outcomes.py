"""What is recorded under an idempotency key comes back as it was, or is refused when it is recorded (guarantee 20)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta, timezone, tzinfo
from enum import Flag, StrEnum
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from django.core.exceptions import ValidationError
from django.utils.functional import lazystr
from django.utils.safestring import SafeString

from geventbatch._idempotency.error_text import decode_error, encode_error
from geventbatch._idempotency.value_text import decode, describe, encode
from tests.support.plain import OPERATIONS, VALUES, Class, Taken, Ticket, Train
from tests.support.recording_store import add

ROOT = Path(__file__).parents[2]
BERLIN = ZoneInfo("Europe/Berlin")


class Slotted(Exception):
    __slots__ = ("code", "never")

    def __init__(self, code: int) -> None:
        super().__init__("it has slots")
        self.code = code


class ByKeyword(Exception):
    def __init__(self, *, code: int) -> None:
        self.code = code


class Choosy(Exception):
    def __new__(cls, one: int, /, *, other: int) -> Any:
        return super().__new__(cls, one)

    def __init__(self, one: int, /, *, other: int) -> None:
        super().__init__(one)


class Marked(str):  # noqa: SLOT000 - it has an attribute
    def __new__(cls, text: str, code: str) -> Any:
        made = super().__new__(cls, text)
        made.code = code
        return made

    code: str


class Secret(str):
    __slots__ = ("_secret",)


class Whole(int):
    pass


class OwnZone(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        return timedelta(hours=1)

    def dst(self, _: datetime | None) -> timedelta:
        return timedelta(0)

    def tzname(self, _: datetime | None) -> str:
        return "own"


class Named(StrEnum):
    A = "a"


class Rights(Flag):
    READ = 1
    WRITE = 2


class Strict(ValidationError):
    pass


Pair = namedtuple("Pair", "a b")  # noqa: PYI024 - what is refused


@dataclass
class Loose:
    number: int


def loose() -> Loose:
    made = Loose(1)
    made.other = 2  # type: ignore[attr-defined] # as an application may do
    return made


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    assert one == other
    assert repr(one) == repr(other)
    assert getattr(one, "__dict__", {}) == getattr(other, "__dict__", {})


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 7, 1, 12, tzinfo=BERLIN),
        datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN),
        datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
        datetime(2026, 10, 25, 2, 30, fold=1),  # noqa: DTZ001 - such as it is
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1), "CET")),
        datetime(2026, 1, 1, tzinfo=timezone(-timedelta(hours=1, microseconds=1))),
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(0), "Zulu")),
        datetime(2026, 1, 1, tzinfo=UTC, fold=1),
        time(2, 30, tzinfo=BERLIN, fold=1),
        time(2, 30, tzinfo=UTC),
        SafeString("<b>"),
        Marked("required", "required"),
        {"a": [Marked("x", "y")], SafeString("b"): (time(1, fold=1),)},
        Named.A,
        Ticket(1, SafeString("Ann")),
        (Rights.READ | Rights.WRITE, Rights(0)),
        *VALUES,
    ],
    ids=repr,
)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    text = encode(value)
    assert text.isascii()
    assert "\n" not in text
    found = decode(text)
    same(found, value)
    if isinstance(value, (datetime, time)):
        assert found.fold == value.fold
        assert repr(found.tzinfo) == repr(value.tzinfo)


@pytest.mark.parametrize(
    "value",
    [
        Whole(1),
        Pair(1, 2),
        OrderedDict(a=1),
        Secret("s"),
        datetime(2026, 1, 1, tzinfo=OwnZone()),
        time(1, tzinfo=OwnZone()),
        loose(),
        [loose()],
        Taken(1),
        type("Class", (str,), {})("local"),
    ],
    ids=str,
)
def test_a_value_that_would_not_come_back_as_it_is_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, AttributeError)):
        encode(value)


def test_what_is_no_plain_value_is_refused() -> None:
    @dataclass
    class Local:
        number: int

    for value in (object(), {1}, [object()], Local(1), add, Train, range(3)):
        with pytest.raises(TypeError, match="is none of None, bool"):
            encode(value)


@pytest.mark.parametrize(
    "error",
    [
        Taken(5),
        Slotted(7),
        ByKeyword(code=3),
        KeyError("a"),
        OSError(2, "no such file", "/nowhere"),
        ImportError("no", name="numpy", path="/nowhere"),
        StopIteration(5),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
        AttributeError("no", name="a", obj=5),
    ],
    ids=repr,
)
def test_an_error_comes_back_as_it_was(error: Exception) -> None:
    found: Any = decode_error(encode_error(error, (Exception,)), (Exception,))
    assert type(found) is type(error)
    assert found.args == error.args
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    for name in ("code", "filename", "name", "path", "value", "object", "obj"):
        assert getattr(found, name, None) == getattr(error, name, None)


@pytest.mark.parametrize(
    "error",
    [
        ValidationError("too many"),
        ValidationError("%(n)d are too many", code="many", params={"n": 5}),
        ValidationError(lazystr("translated later"), code="lazy"),
        ValidationError(["one", ValidationError("two", code="second")]),
        ValidationError(
            {"seat": ["taken", ValidationError("unknown %(seat)s", "unknown", {"seat": 1})], "name": "empty"}
        ),
        Strict("own", code="x"),
    ],
    ids=repr,
)
def test_a_validation_error_of_django_s_comes_back_with_all_that_it_holds(error: ValidationError) -> None:
    vars(error)["status"] = 400  # as an application may add
    found: Any = decode_error(encode_error(error, (ValidationError,)), (ValidationError,))
    assert type(found) is type(error)
    assert found == error
    assert found.messages == error.messages
    assert (
        [one.code for one in found.error_list] == [one.code for one in error.error_list]
        if hasattr(error, "error_list")
        else found.message_dict == error.message_dict
    )
    assert vars(found)["status"] == 400


@pytest.mark.parametrize(
    "error",
    [
        Choosy(1, other=2),
        ValueError(object()),
        Slotted(object()),  # type: ignore[arg-type] # what is no number
        ValidationError("params", params={"a": object()}),
        type("Local", (Exception,), {})("local"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_would_not_come_back_as_it_is_is_refused(error: Exception) -> None:
    with pytest.raises((TypeError, AttributeError)):
        encode_error(error, (Exception,))


# -- what was recorded by an earlier release ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "value"),
    [
        ("null", None),
        ('{"~datetime":"2026-01-02T03:04:05.000006"}', datetime(2026, 1, 2, 3, 4, 5, 6)),  # noqa: DTZ001 - likewise
        ('{"~datetime":"2026-07-01T12:00:00+02:00"}', datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=2)))),
        ('{"~time":"01:02:03"}', time(1, 2, 3)),
        ('{"~time":"01:02:03+00:00"}', time(1, 2, 3, tzinfo=UTC)),
        ('{"~tuple":[{"~decimal":"1.10"},{"~enum":["tests.support.plain:Class","FIRST"]}]}', None),
        ('{"~dataclass":["tests.support.plain:Ticket",{"seat":12,"passenger":"Ann"}]}', Ticket(12, "Ann")),
        ('"<b>"', "<b>"),
    ],
)
def test_a_value_that_was_recorded_by_an_earlier_release_is_read(told: str, value: Any) -> None:
    found = decode(told)
    if told.startswith('{"~tuple'):
        assert found == (decode('{"~decimal":"1.10"}'), Class.FIRST)
    else:
        same(found, value)


def test_an_error_that_was_recorded_by_an_earlier_release_is_made_again() -> None:
    told = '["tests.support.plain:Taken",{"~tuple":["seat 5 is taken"]},{"seat":5}]'
    assert encode_error(Taken(5), (Taken,)) == told
    found = decode_error(told, (Taken,))
    assert (type(found), found.args, vars(found)) == (Taken, ("seat 5 is taken",), {"seat": 5})
    with pytest.raises(TypeError, match="not among recorded_errors"):
        decode_error(told, (KeyError,))


def test_what_tells_arguments_from_others_is_what_it_was() -> None:
    argued: list[Any] = [
        datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
        SafeString("a"),
        time(1, tzinfo=OwnZone()),
    ]
    assert describe(len, argued) == (
        'builtins:len({"~datetime":"2026-10-25T02:30:00+01:00"},"a",{"~time":"01:00:00+01:00"})'
    )


def test_each_operation_is_told_from_all_others_in_the_same_way_in_every_process() -> None:
    told = [describe(operation, args) for operation, args in OPERATIONS]
    assert len(set(told)) == len(OPERATIONS)
    for seed in ("1", "2"):
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.programs.describe"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        shown = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
        assert json.loads(shown.stdout) == told


def test_the_order_of_a_dictionary_is_no_other_argument() -> None:
    assert describe(add, ({"a": 1, "b": {1: 2, 3: 4}},)) == describe(add, ({"b": {3: 4, 1: 2}, "a": 1},))

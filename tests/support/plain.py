"""Values and operations for tests of what is recorded; here, so that every process has them by the same names."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tests.support.recording_store import add

if TYPE_CHECKING:
    from collections.abc import Callable


anything: Any = add


class Class(Enum):
    FIRST = 1


class Number(IntEnum):
    ONE = 1


@dataclass(frozen=True)
class Ticket:
    seat: int
    passenger: str


class Taken(Exception):
    def __init__(self, seat: int) -> None:
        super().__init__(f"seat {seat} is taken")
        self.seat = seat


class Odd(Exception):
    pass


def refuse_seat(resource: Any) -> None:
    raise Taken(5)


class Train:
    def book(self, seat: int, passenger: str = "") -> None: ...

    @classmethod
    def open(cls) -> None: ...


def nested(resource: Any) -> Callable[[], None]:
    def inner() -> None: ...

    return inner


def closing_over(value: Any) -> Callable[..., Any]:
    def operation(resource: Any) -> Any:
        return value

    return operation


def with_default(value: Any) -> Callable[..., Any]:
    def operation(resource: Any, own: Any = value) -> Any:
        return own

    return operation


VALUES: list[Any] = [
    None,
    True,
    0,
    -(10**30),
    1.5,
    float("inf"),
    "",
    'Grüße "you" \n \ud800',
    b"\x00\xff",
    Decimal("1.10"),
    date(2026, 1, 2),
    datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001 - such as it is
    datetime(2026, 1, 2, tzinfo=UTC),
    time(1, 2, 3),
    timedelta(days=-1, microseconds=3),
    UUID(int=5),
    Class.FIRST,
    Number.ONE,
    Ticket(12, "Ann"),
    [],
    (),
    [1, (2, [Decimal(3)]), {"a": (1,)}],
    {"~tuple": [1]},
    {1: "a", (1, 2): "b", None: "c"},
    {"b": 1, "a": 2},
]

OPERATIONS: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (add, (1,)),
    (add, ("1",)),
    (add, (1, 2)),
    (add, ((1, 2),)),
    (add, ([1, 2],)),
    (add, (True,)),
    (add, (None,)),
    (add, ({"a": 1, "b": 2},)),
    (add, ({1: 2, "1": 2},)),
    (add, (Ticket(1, "Ann"),)),
    (add, (Ticket(2, "Ann"),)),
    (add, (add,)),
    (add, (Train,)),
    (Train.book, (1, "Ann")),
    (Train().book, (1, "Ann")),
    (Train.open, ()),
    (list.append, (1,)),
    (partial(anything, 1), ()),
    (partial(anything, mark=1), ()),
    (partial(partial(anything, 1), 2), ()),
    (closing_over(1), ()),
    (closing_over(2), ()),
    (closing_over(add), ()),
    (with_default(1), ()),
    (with_default(2), ()),
    (nested(None), ()),
]

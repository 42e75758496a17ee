"""What an operation is given is what its caller has passed, however often it is applied and whatever others do."""

from __future__ import annotations

import datetime as dt
import gc
import re
from abc import ABC
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from logging import getLogger
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import gevent
import pytest

from geventbatch import Conflict, Processor
from geventbatch._core.operation import name_of
from geventbatch._values.arguments import repeatable
from tests.support.recording_store import FORMS, Form, Store

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime


@pytest.fixture(params=FORMS)
def store(clock: VirtualTime, request: pytest.FixtureRequest) -> Store:
    form: Form = request.param
    return Store(clock, form, load_time=1.0, save_time=1.0)


def put(resource: list[Any], given: Any) -> None:
    resource.append(given)


def change(resource: list[Any]) -> None:
    resource[-1]["names"].append("more")


def test_an_argument_that_another_operation_has_changed_is_as_it_was_in_the_replay(
    clock: VirtualTime, store: Store
) -> None:
    def save(_: object) -> None:
        if len(store.times("save")) == 1:
            raise Conflict

    store.on_save = save
    with store.processor(min_duration=1, max_duration=60) as processor:
        first = store.call(processor, "k", put, {"names": ["Ann"]})
        second = store.call(processor, "k", change)
        gevent.sleep(30)
        assert first.error is second.error is None
        assert store.kept["k"] == [{"names": ["Ann", "more"]}]
        assert len(store.times("load")) == 2


def test_arguments_that_nothing_changes_are_passed_as_they_are() -> None:
    thing = object()
    for args in ((), (1, "Ann"), (thing,), ((1, (2, "3")), None)):
        assert repeatable(put, args) is put


class Color(Enum):
    RED = 1


class Meta(type):
    pass


class Odd(metaclass=Meta):
    names: ClassVar[list[str]] = []


class Closed:
    @property
    def __dict__(self) -> Any:  # type: ignore[override]
        raise OSError("closed")


THINGS = (
    *(int, Odd, Meta, Closed, Closed(), ABC, Enum, Color, Color.RED, NamedTuple, Sequence[int]),
    *(gc, gc.collect, put, partial, partial(put, [1]), Lock(), dt.UTC, getLogger("a"), re.compile("a")),
    *(
        object(),
        iter([1]),
        range(3),
        Exception("x"),
        memoryview(b"x"),
        frozenset({1}),
        MappingProxyType({"a": [1]}),
    ),
)


@pytest.mark.parametrize("thing", THINGS, ids=[f"{number} {type(one).__name__}" for number, one in enumerate(THINGS)])
def test_whatever_is_passed_reaches_the_operation(thing: object) -> None:
    with Processor(open_resource=nullcontext, min_duration=0) as processor:
        assert processor.run("k", lambda _, given: id(given), thing) == id(thing)
        assert processor.run("k", lambda _, given: id(given[0]), [thing]) == id(thing)


def test_the_first_application_gets_what_its_caller_has_passed_and_each_other_a_copy() -> None:
    given: list[Any] = [{"a": 1}]
    resource: list[Any] = []
    operation = repeatable(put, (given,))
    for _ in range(3):
        operation(resource, given)
        resource[-1][0]["a"] += 1
    assert resource == [[{"a": 2}]] * 3
    assert resource[0] is given
    assert resource[1] is not resource[2]


@dataclass
class Seen:
    """Whose own functions are not called when it is copied."""

    seats: list[int]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AssertionError(name)

    @property
    def seen(self) -> int:
        raise AssertionError


@dataclass(slots=True)
class Slotted:
    seats: list[int]
    missing: int = field(init=False)


@dataclass
class Below(Slotted):
    more: dict[str, int] = field(default_factory=dict)


@dataclass
class Names(dict[str, int]):
    first: str


def test_a_dataclass_is_copied_with_all_that_it_has_and_without_its_own_functions() -> None:
    seen = object.__new__(Seen)
    vars(seen)["seats"] = [1]
    applied: list[Any] = []
    names = Names("Ann")
    operation = repeatable(lambda _, *args: applied.append(args), (seen, Slotted([1]), Below([1], {"a": 1}), names))
    for _ in range(3):
        operation(None, seen, Slotted([1]), Below([1], {"a": 1}), names)
        first, second, third, same = applied[-1]
        assert first.seats == [1]
        assert (second.seats, third.seats, third.more) == ([1], [1], {"a": 1})
        assert type(third) is Below
        assert same is names
        assert not hasattr(second, "missing")
        for one in (first, second, third):
            one.seats.append(2)
        third.more.clear()
        vars(seen)["seats"] = [1]


def test_an_operation_with_such_arguments_keeps_its_name() -> None:
    assert name_of(repeatable(put, ([],))) == "put"
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert repeatable(put, (deep,)) is put


class Seat:
    """Of a class that is nothing special."""

    __slots__ = ("__dict__", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.taken_by: list[str] = []


class Guarded:
    """Has something in it that nobody can copy."""

    def __init__(self) -> None:
        self.seats = [1]
        self.seat = Seat(1)
        self.lock = Lock()


class Named(NamedTuple):
    seats: list[int]


def take(resource: list[Any], passenger: str, *, refused: bool = False) -> list[str]:
    seat: Seat = resource[-1]
    seat.number += 1
    seat.taken_by.append(passenger)
    if refused:
        raise ValueError(passenger)
    return seat.taken_by


def test_an_object_that_operations_have_put_into_the_resource_has_nothing_of_those_that_raise(
    clock: VirtualTime, store: Store
) -> None:
    with store.processor(min_duration=1, max_duration=60) as processor:
        running = [store.call(processor, "k", put, Seat(7))]
        running += [store.call(processor, "k", partial(take, refused=refused), name) for name, refused in GUESTS]
        gevent.sleep(30)
        assert [type(one.error) for one in running] == [type(None), ValueError, type(None), ValueError, type(None)]
        assert running[-1].answer == ["Bo", "Di"]
        seat = store.kept["k"][0]
        assert (seat.number, seat.taken_by) == (9, ["Bo", "Di"])


GUESTS = [("Ann", True), ("Bo", False), ("Cy", True), ("Di", False)]


def containers() -> list[Any]:
    more = [bytearray(b"a"), Named([1])]
    return [deque([[1]]), Counter("a"), OrderedDict(a=[1]), defaultdict(list, a=[1]), *more]


def test_what_holds_nothing_but_values_is_copied_whole_and_all_else_is_passed_as_it_is() -> None:
    applied: list[Any] = []
    guarded, nothing, cyclic = Guarded(), Unlike(), Seat(1)
    vars(cyclic)["self"] = cyclic
    operation = repeatable(lambda _, *args: applied.append(args), (*containers(), guarded, nothing, cyclic))
    for _ in range(3):
        operation(None, *containers(), guarded, nothing, cyclic)
        *copied, same, unlike, itself = applied[-1]
        assert copied == containers()
        assert [*map(type, copied)] == [*map(type, containers())]
        assert same is guarded
        assert same.seat is guarded.seat
        assert unlike is nothing
        assert itself.self is itself
        assert itself.number == 1
        copied[0][0].append(2)
        copied[1]["b"] += 1
        copied[2]["a"].append(2)
        copied[3]["a"].append(2)
        copied[4].append(0)
        copied[5].seats.append(2)
        itself.number = 2
        cyclic.number = 1
    assert applied[0][-1] is cyclic is not applied[1][-1]


class Unlike:
    """Of which one is told from another by nothing but its identity."""


def test_what_an_operation_closes_over_is_the_same_object_when_it_is_applied_again(
    clock: VirtualTime, store: Store
) -> None:
    seat = Seat(7)
    with store.processor(min_duration=1, max_duration=60) as processor:
        running = [store.call(processor, "k", lambda resource: resource.append(seat))]
        running += [store.call(processor, "k", partial(take, refused=refused), name) for name, refused in GUESTS[:2]]
        gevent.sleep(30)
        assert {"Ann", "Bo"} == {*running[-1].answer}
        assert store.kept["k"] == [seat]

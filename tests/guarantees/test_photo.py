"""How the resource of a scope that was written by hand is brought back in place: by a photo of all that it holds."""

from __future__ import annotations

import random
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geventbatch._values.photo import Photo, bring_over, check_changeable
from geventbatch.errors import CannotUndo
from geventbatch.testing._values import state_of


class Plain:
    def __init__(self) -> None:
        self.seats = [1]
        self.names: dict[str, list[int]] = {"a": [1]}

    @cached_property
    def number(self) -> int:
        return len(self.seats)

    def look(self) -> list[int]:
        return self.seats


class Slots:
    __slots__ = ("__own", "held", "missing")
    missing: int

    def __init__(self) -> None:
        self.held = {1}
        self.__own = [2]

    def own(self) -> list[int]:
        return self.__own


class MoreSlots(Slots):
    __slots__ = ("more",)

    def __init__(self) -> None:
        super().__init__()
        self.more = Plain()


@dataclass(frozen=True, slots=True)
class Frozen:
    seats: list[int] = field(default_factory=lambda: [1])


class Watching:
    """Whoever sets or reads an attribute in the ordinary way is noted."""

    def __init__(self) -> None:
        object.__setattr__(self, "value", [1])

    def __setattr__(self, name: str, value: object) -> None:
        raise AssertionError

    def __eq__(self, other: object) -> bool:
        raise AssertionError

    __hash__ = object.__hash__


class Names(list[str]):
    def clear(self) -> None:
        raise AssertionError


class Registry(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise AssertionError


class Sorted(OrderedDict[str, int]):
    pass


class Colour(Enum):
    RED = 1


Pair = namedtuple("Pair", "left right")  # noqa: PYI024 - such as users have


def loop() -> list[Any]:
    one: list[Any] = [1]
    one.append({"itself": one})
    return one


MADE: list[Any] = [
    lambda: [1, [2, {"a": {3}}]],
    lambda: {"a": [1], (1, 2): {"b": None}},
    lambda: {Plain(): 1},
    Plain,
    Slots,
    MoreSlots,
    Frozen,
    Watching,
    lambda: Names(["a"]),
    Registry,
    lambda: Sorted(a=1, b=2),
    lambda: Counter("aab"),
    lambda: defaultdict(list, {1: [2]}),
    lambda: deque([1, [2]], maxlen=3),
    lambda: bytearray(b"abc"),
    lambda: Pair([1], {"a": 1}),
    lambda: ([1], frozenset({Plain()})),
    lambda: Plain().look,
    loop,
    lambda: [Colour.RED, Decimal(1), datetime(2026, 1, 1, tzinfo=UTC), int, len, random],
]


def state(one: Any) -> Any:
    """What is in it, by value."""
    return fixed(state_of(one))


def fixed(found: Any) -> Any:
    """Give *found* so that nothing changes it any more."""
    if isinstance(found, (set, frozenset)):
        return frozenset(found)
    if isinstance(found, (list, tuple)):
        return tuple(map(fixed, found))
    return {name: fixed(value) for name, value in found.items()} if isinstance(found, dict) else found


def spoil(one: Any, seen: set[int]) -> None:  # noqa: C901 - a case for each kind
    """Change all that can be changed in *one*, and in what it holds."""
    if id(one) in seen:
        return
    seen.add(id(one))
    if isinstance(one, dict):
        for value in list(one.values()):
            spoil(value, seen)
        first = next(iter(one), None)
        dict.pop(one, first, None)
        dict.update(one, {"spoiled": 1, first: 2})
    elif isinstance(one, (list, deque, bytearray)):
        for value in list(one):
            spoil(value, seen)
        list.insert(one, 0, 7) if isinstance(one, list) else one.insert(0, 7) if len(one) < 3 else one.append(7)
    elif isinstance(one, set):
        one.add("spoiled")
    elif isinstance(one, (tuple, frozenset)):
        for value in one:
            spoil(value, seen)
    for name, value in list(getattr(one, "__dict__", {}).items()) if not isinstance(one, (type, Enum)) else []:
        if type(one) in {Plain, Watching}:
            spoil(value, seen)
            object.__setattr__(one, name, "spoiled")
            object.__setattr__(one, "new", 1)
    if isinstance(one, Slots):
        spoil(one.held, seen)
        spoil(one.own(), seen)
        one.held, one.missing = {5}, 1
        del one._Slots__own  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", MADE, ids=range(len(MADE)))
def test_whatever_was_changed_is_as_it_was_and_the_very_same_objects(make: Any) -> None:
    one = make()
    before = state(one)
    photo = Photo(one)
    for _ in range(3):
        spoil(one, set())
        photo.put_back()
        assert state(one) == before


def test_what_is_held_is_the_same_object_and_what_somebody_else_holds_of_it_is_as_it_was() -> None:
    plain = Plain()
    seats, names = plain.seats, plain.names["a"]
    photo = Photo(plain)
    seats.append(2)
    names.clear()
    plain.seats, plain.names = [], {}
    assert plain.number == 0
    photo.put_back()
    assert plain.seats is seats
    assert plain.names["a"] is names
    assert (seats, names) == ([1], [1])
    assert "number" not in vars(plain)


HIDDEN: Any = vars(Slots)["held"]


class Hides(Slots):
    __slots__ = ("held",)

    def __init__(self) -> None:
        super().__init__()
        HIDDEN.__set__(self, [3])


class Span(timedelta):
    __slots__ = ("seats",)
    seats: list[int]


def test_slots_are_as_they_were_whatever_hides_them_or_stands_beside_them() -> None:
    hides, span, names = Hides(), Span(days=1), defaultdict(list, {"a": [2]})
    span.seats = [1]
    photo = Photo([hides, span, names])
    hides.held.add(2)
    HIDDEN.__get__(hides).append(4)
    span.seats.append(2)
    del span.seats
    names.default_factory = None
    photo.put_back()
    assert (hides.held, HIDDEN.__get__(hides)) == ({1}, [3])
    assert (span, span.seats) == (timedelta(days=1), [1])
    assert names["new"] == []


def test_the_order_of_names_is_as_it_was() -> None:
    ordered = Sorted(a=1, b=2, c=3)
    plain = {"a": 1, "b": 2, "c": 3}
    photos = Photo(ordered), Photo(plain)
    ordered.move_to_end("a")
    del plain["a"]
    plain["a"] = 1
    for photo in photos:
        photo.put_back()
    assert list(ordered) == list(plain) == ["a", "b", "c"]


class Seat:
    def __init__(self, number: int) -> None:
        self.names = [str(number)]

    def __hash__(self) -> int:
        return hash(tuple(self.names))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Seat) and self.names == other.names


def test_what_is_in_sets_and_dicts_is_found_again_though_its_hash_was_another_one() -> None:
    seats = {Seat(1), Seat(2)}
    numbers: list[dict[Seat, int]] = [{Seat(3): 3}, OrderedDict({Seat(4): 4, Seat(5): 5})]
    photo = Photo([seats, *numbers])
    for _ in range(2):
        for seat in (*seats, *numbers[0], *numbers[1]):
            seat.names[0] = "nobody"
        photo.put_back()
        assert Seat(1) in seats
        assert Seat(2) in seats
        assert (numbers[0][Seat(3)], numbers[1][Seat(4)], numbers[1][Seat(5)]) == (3, 4, 5)


class Copied:
    def __deepcopy__(self, memo: object) -> Copied:
        return self


class Reduced:
    def __reduce__(self) -> Any:
        return Reduced, ()


UNSEEN: list[Any] = [
    threading.Lock,
    lambda: weakref.ref(Plain),
    lambda: iter([1]),
    random.Random,
    ValueError,
    threading.local,
    lambda: memoryview(b""),
    lambda: SimpleNamespace(a=1),
    Copied,
    Reduced,
]


@pytest.mark.parametrize("make", UNSEEN, ids=range(len(UNSEEN)))
def test_there_is_no_photo_of_what_keeps_a_state_that_nobody_sees_or_says_itself_how_it_is_copied(make: Any) -> None:
    for held in (make(), [make()], {"a": make()}, (make(),)):
        with pytest.raises(CannotUndo, match="cannot be restored"):
            Photo(held)


@pytest.mark.parametrize(
    "make", [Plain, Slots, lambda: [1, [2]], lambda: {"a": [1]}, lambda: {1}, lambda: Sorted(a=1)], ids=range(6)
)
def test_what_a_copy_holds_is_brought_over(make: Any) -> None:
    one, copy = make(), deepcopy(make())
    before = state(one)
    check_changeable(one)
    spoil(one, set())
    bring_over(one, copy)
    assert state(one) == before


def test_nothing_is_brought_over_from_another_class_or_into_what_cannot_change() -> None:
    with pytest.raises(CannotUndo, match="of another class"):
        bring_over([1], (1,))
    with pytest.raises(CannotUndo, match="in place"):
        check_changeable((1,))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_any_document_is_as_it_was(document: Any) -> None:
    held = [document]
    before = deepcopy(held)
    photo = Photo(held)
    spoil(held, set())
    photo.put_back()
    assert held == before
    assert str(held) == str(before)

"""What is copied, or brought back in place, to undo: nothing that an operation has changed is in the copy too."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from math import inf
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import pytest

from geventbatch import Processor
from geventbatch._values.photo import Photo
from tests.guarantees.test_undo import NotEnough, answers_of, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime


class Part:
    def __init__(self, whole: Whole) -> None:
        self.whole = weakref.ref(whole)

    def count(self) -> int:
        whole = self.whole()
        assert whole is not None
        whole.total += 1
        return whole.total


class Whole:
    def __init__(self) -> None:
        self.total = 0
        self.part = Part(self)

    def count(self) -> int:
        return self.part.count()


class Proxied(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.me: Any = weakref.proxy(self)

    def count(self) -> int:
        self.me.total += 1
        return self.total


class Found:
    """It finds what it holds by a number."""

    def __init__(self) -> None:
        self.held = Whole()
        self.by_number: Any = weakref.WeakValueDictionary({1: self.held})
        self.by_held: Any = weakref.WeakKeyDictionary({self.held: [0]})

    def count(self) -> int:
        self.by_number[1].total += 1
        self.by_held[self.held][0] += 1
        assert self.by_held[self.held][0] == self.held.total
        return self.held.total


class Listening:
    def __init__(self) -> None:
        self.heard: list[int] = []
        self.say: Callable[[], None] = lambda: self.heard.append(1)

    def count(self) -> int:
        self.say()
        return len(self.heard)


class Closing:
    def __init__(self) -> None:
        total = 0

        def count() -> int:
            nonlocal total
            total += 1
            return total

        self.count = count


class Incomplete:
    def __init__(self) -> None:
        self.numbers = [0]
        self.lock = threading.Lock()

    def __getstate__(self) -> object:
        return {"numbers": self.numbers}

    def count(self) -> int:
        with self.lock:
            self.numbers[0] += 1
        return self.numbers[0]


class Same:
    def __init__(self) -> None:
        self.total = 0

    def __deepcopy__(self, memo: object) -> Same:
        return self

    def count(self) -> int:
        self.total += 1
        return self.total


def count(resource: Any) -> int:
    return int(resource.count())


def spoil(resource: Any) -> None:
    resource.count()
    resource.count()
    raise NotEnough


FORMS = ("pair", "scope", "pairs", "scopes")


def opened(form: str, load: Callable[[], Any], saved: list[Any]) -> dict[str, Any]:
    """Options that open what *load* gives in a *form*; what is saved comes into *saved*."""

    @contextmanager
    def scope(key: str) -> Iterator[Any]:
        resource = load()
        yield resource
        saved.append(resource)

    @contextmanager
    def scopes(keys: list[str]) -> Iterator[dict[str, Any]]:
        held = {key: load() for key in keys}
        given = dict(held)
        yield given
        saved.extend(held[key] for key in given)

    forms: dict[str, dict[str, Any]] = {
        "pair": {"load_resource": lambda _: load(), "save_resource": lambda _, resource: saved.append(resource)},
        "scope": {"open_resource": scope},
        "pairs": {
            "load_resources": lambda keys: {key: load() for key in keys},
            "save_resources": lambda resources: saved.extend(resources.values()),
        },
        "scopes": {"open_resources": scopes},
    }
    return {"min_duration": 0, **forms[form]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind", [Whole, Proxied, Found, Listening, Closing, Incomplete, Same], ids=lambda kind: kind.__name__
)
def test_nothing_of_a_copy_leads_back_to_what_it_was_copied_from(clock: VirtualTime, kind: Any, form: str) -> None:
    saved: list[Any] = []
    with Processor(**opened(form, kind, saved)) as processor:
        answers = answers_of(processor, *((one,) for one in [count, spoil, count, spoil, spoil, count]))
    assert told(answers) == [1, NotEnough, 2, NotEnough, NotEnough, 3]
    assert [count(one) for one in saved] == [4]


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_that_is_the_very_object_is_none(clock: VirtualTime, form: str) -> None:
    saved: list[Any] = []

    def add(resource: list[int]) -> int:
        resource.append(1)
        return len(resource)

    def add_and_raise(resource: list[int]) -> None:
        resource.append(2)
        raise NotEnough

    with Processor(**opened(form, list, saved), copy_resource=lambda resource: resource) as processor:
        answers = answers_of(processor, *((one,) for one in [add, add_and_raise, add, add_and_raise, add]))
    assert told(answers) == [1, NotEnough, 2, NotEnough, 3]
    assert saved == [[1, 1, 1]]


def test_a_scope_of_many_keys_written_by_hand_may_save_the_objects_that_it_holds_itself(clock: VirtualTime) -> None:
    rows = {"k": {"seats": [1]}, "other": {"seats": [2]}}

    @contextmanager
    def scope(keys: list[str]) -> Iterator[dict[str, Any]]:
        held = deepcopy({key: rows[key] for key in keys})
        given = dict(held)
        yield given
        rows.update({key: held[key] for key in given})

    def book(row: dict[str, list[int]], seat: int) -> int:
        row["seats"].append(seat)
        if seat < 0:
            raise NotEnough
        return len(row["seats"])

    with Processor(open_resources=scope, min_duration=0) as processor:
        answers = answers_of(processor, *((book, seat) for seat in [5, -1, 6, -2, 7]))
    assert told(answers) == [2, NotEnough, 3, NotEnough, 4]
    assert rows == {"k": {"seats": [1, 5, 6, 7]}, "other": {"seats": [2]}}


def test_a_scope_that_has_a_replace_of_its_own_is_not_asked_for_it(clock: VirtualTime) -> None:
    saved: list[Any] = []

    class Scope:
        def __enter__(self) -> list[int]:
            self.resource: list[int] = []
            return self.resource

        def replace(self, resource: object) -> None:
            raise AssertionError(resource)

        def __exit__(self, kind: object, error: object, traceback: object) -> None:
            if kind is None:
                saved.append(self.resource)

    def add(resource: list[int], number: int) -> None:
        resource.append(number)
        if number < 0:
            raise NotEnough

    with Processor(open_resource=lambda _: Scope(), min_duration=0) as processor:
        assert told(answers_of(processor, *((add, number) for number in [1, -1, 2]))) == [None, NotEnough, None]
    assert saved == [[1, 2]]


class Ledger:
    """It has written, in the transaction, and what is taken back when that is left with an exception."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.saved: list[tuple[int, list[int]]] = []

    @contextmanager
    def open(self, key: str) -> Iterator[list[int]]:
        self.rows = []
        resource: list[int] = []
        yield resource
        self.saved.append((len(resource), self.rows))

    def add(self, resource: list[int], number: int) -> None:
        resource.append(number)
        self.rows.append(number)
        if number < 0:
            raise NotEnough


def test_what_operations_write_beside_the_resource_of_a_scope_by_hand_is_undone_where_nothing_is_copied(
    clock: VirtualTime,
) -> None:
    ledger = Ledger()
    with Processor(open_resource=ledger.open, copy_resource=None, min_duration=0) as processor:
        answers = answers_of(processor, *((ledger.add, number) for number in [1, -1, 2, -2, 3]))
    assert told(answers) == [None, NotEnough, None, NotEnough, None]
    assert ledger.saved == [(3, [1, 2, 3])]


# In place


class Opened:
    seats: int


class Closed:
    pass


def test_an_object_that_was_given_another_class_has_its_own_again() -> None:
    one = Opened()
    one.seats = 1
    photo = Photo([one])
    one.__class__ = Closed  # type: ignore[assignment]
    one.seats = 2
    photo.put_back()
    assert type(one) is Opened
    assert one.seats == 1


def test_what_a_function_closes_over_is_as_it_was() -> None:
    held = [1]
    total = 0

    def change(default: list[int] = held) -> tuple[list[int], list[int], int, bool]:
        nonlocal total
        total += 1
        held.append(2)
        return held, default, total, hasattr(change, "new")

    photo = Photo({"change": change})
    for _ in range(2):
        assert change() == ([1, 2], [1, 2], 1, False)
        change.new = 1  # type: ignore[attr-defined]
        photo.put_back()


def test_what_a_function_closes_over_may_have_no_value_yet() -> None:
    cell = CellType()
    photo = Photo([FunctionType((lambda: cell).__code__, {}, closure=(cell,))])
    for _ in range(2):
        photo.put_back()
        with pytest.raises(ValueError, match="empty"):
            _ = cell.cell_contents
        cell.cell_contents = 1


# Arguments


@dataclass
class Ticket:
    seats: list[int] = field(default_factory=list)
    paid: int = 0


@dataclass(frozen=True, slots=True)
class Order:
    ticket: Ticket
    names: dict[str, int]


def put(resource: list[Any], ticket: Ticket) -> None:
    resource.append(ticket)


def put_named(resource: list[Any], *, ticket: Any) -> None:
    resource.append(ticket)


def put_first(ticket: Any, resource: list[Any], again: Any) -> None:
    assert ticket is again
    resource.append(ticket)


def put_order(resource: list[Any], order: Order) -> None:
    resource.append(order.ticket)
    order.ticket.paid += order.names["Ann"]
    order.names["Ann"] += 10


def pay(resource: list[Any]) -> int:
    resource[-1].seats.append(1)
    resource[-1].paid += 1
    return int(resource[-1].paid)


def pay_and_raise(resource: list[Any]) -> None:
    resource[-1].seats.append(2)
    resource[-1].paid += 100
    raise NotEnough


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["argument", "named", "first", "order"])
def test_what_was_changed_of_an_argument_before_it_raised_is_undone_too(
    clock: VirtualTime, form: str, how: str
) -> None:
    saved: list[Any] = []
    ticket = Ticket()
    given: dict[str, tuple[Any, ...]] = {
        "argument": (put, ticket),
        "named": (partial(put_named, ticket=ticket),),
        "first": (partial(put_first, ticket), ticket),
        "order": (put_order, Order(ticket, {"Ann": 0})),
    }
    with Processor(**opened(form, list, saved)) as processor:
        operations = [given[how], *((one,) for one in [pay, pay_and_raise, pay, pay_and_raise])]
        assert told(answers_of(processor, *operations)) == [None, 1, NotEnough, 2, NotEnough]
    assert saved == [[Ticket([1, 1], 2)]]


# What it costs


class Copying:
    """Copies lists; it counts, and may refuse."""

    def __init__(self, most: float = inf) -> None:
        self.most = most
        self.count = 0

    def __call__(self, resource: list[int]) -> list[int]:
        self.count += 1
        if self.count > self.most:
            raise RuntimeError("no more")
        return list(resource)


def add(resource: list[int], number: int) -> int:
    resource.append(number)
    if number < 0:
        raise NotEnough
    return len(resource)


def expected_of(numbers: list[int]) -> list[Any]:
    lengths = accumulate(number > 0 for number in numbers)
    return [length if number > 0 else NotEnough for number, length in zip(numbers, lengths, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", [[1, -1], [-1, 1], [1, 1, 1, -1], [1, -1, -1, -1], [1] * 20 + [-1]], ids=str)
def test_each_that_raises_costs_one_copy(clock: VirtualTime, form: str, pattern: list[int]) -> None:
    saved: list[Any] = []
    copying = Copying()
    numbers = (pattern * 100)[:100]
    with Processor(**opened(form, list, saved), copy_resource=copying, max_duration=50) as processor:
        assert told(answers_of(processor, *((add, number) for number in numbers))) == expected_of(numbers)
    assert saved == [[1] * numbers.count(1)]
    assert copying.count <= numbers.count(-1) + 2  # of what was loaded, and of the first one's place


@pytest.mark.parametrize("form", FORMS)
def test_who_raises_when_applied_again_to_a_copy_that_was_the_last_one_is_undone_like_others(
    clock: VirtualTime, form: str
) -> None:
    for turn in range(2, 6):
        saved: list[Any] = []
        turns = 0

        def fail_once(resource: list[int], turn: int = turn) -> int:
            nonlocal turns
            turns += 1
            resource.append(5)
            if turns == turn:
                raise NotEnough
            return len(resource)

        runs = [(add, 1), (add, -1), (add, 1), (fail_once,), (add, -1), (add, 1), (add, -1), (add, -1), (add, 1)]
        with Processor(**opened(form, list, saved), copy_resource=Copying()) as processor:
            answers = told(answers_of(processor, *runs))
        left = 0 if answers[3] is NotEnough else 1
        assert answers == [
            1,
            NotEnough,
            2,
            3 if left else NotEnough,
            NotEnough,
            3 + left,
            NotEnough,
            NotEnough,
            4 + left,
        ]
        assert saved == [[1, 1, *[5] * left, 1, 1]]
        assert left == (turns < turn)


@pytest.mark.parametrize("form", FORMS)
def test_what_can_be_copied_no_more_is_undone_from_what_was_loaded(clock: VirtualTime, form: str) -> None:
    numbers = [1, -1] * 20 + [1]
    for most in range(2, 9):
        saved: list[Any] = []

        def load(saved: list[Any] = saved) -> list[int]:
            return [] if not saved else list(saved[-1])

        copying = Copying(most)
        with Processor(**opened(form, load, saved), copy_resource=copying, max_duration=50) as processor:
            assert told(answers_of(processor, *((add, number) for number in numbers))) == expected_of(numbers)
        assert saved[-1] == [1] * numbers.count(1)
        assert copying.count > most

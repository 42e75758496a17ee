"""What identifies a request under an idempotency key may be named apart from the arguments: ``identified_by``."""

from __future__ import annotations

from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import gevent
import pytest
from flask import Flask

from geventbatch import IdempotencyKeyReused, Processor
from geventbatch._idempotency.value_text import describe
from geventbatch.integrations.flask import GeventBatch
from tests.support.callers import answer_of
from tests.support.keeping_store import Keeping
from tests.support.recording_store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime


@pytest.fixture
def keeping(clock: VirtualTime) -> Keeping:
    return Keeping(Store(clock, "scope"))


@pytest.fixture(params=["batching", "alone", "flask"])
def run(request: pytest.FixtureRequest, keeping: Keeping) -> Iterator[Callable[..., Any]]:
    options: dict[str, Any] = {
        "open_resource": keeping,
        "min_duration": 0,
        "max_duration": 5,
        "batching": request.param != "alone",
    }
    if request.param != "flask":
        with Processor(**options) as processor:
            yield processor.run
        return
    app = Flask("trains")
    declared = GeventBatch(app).processor(**options)
    with app.app_context():
        yield declared.run
        declared.for_app().stop()


def book(seats: list[Any], seat: int, at: object, booking: object) -> object:
    seats.append((seat, at, booking))
    return booking


def test_who_sends_again_gets_the_outcome_though_the_time_and_the_new_id_are_others(
    run: Callable[..., Any], keeping: Keeping
) -> None:
    first, second = (
        run("k", book, 12, at, str(uuid4()), idempotency_key="a", identified_by=(12, "Ann")) for at in (1.5, 2.5)
    )
    assert first == second
    assert [booking for _, _, booking in keeping.store.kept["k"]] == [first]


def test_who_sends_something_else_is_refused_though_the_arguments_are_the_same(
    run: Callable[..., Any], keeping: Keeping
) -> None:
    run("k", book, 12, 1, "x", idempotency_key="a", identified_by=(12, "Ann"))
    for other in ((12, "Bob"), (12,), (), ("12", "Ann"), None):
        refused = answer_of(run, "k", book, 12, 1, "x", idempotency_key="a", identified_by=other)
        assert type(refused) is IdempotencyKeyReused
        assert "identified_by" in str(refused)
    other_operation = answer_of(run, "k", list.append, 12, idempotency_key="a", identified_by=(12, "Ann"))
    assert type(other_operation) is IdempotencyKeyReused
    assert len(keeping.store.kept["k"]) == 1


def test_in_one_batch_one_of_two_is_applied(run: Callable[..., Any], keeping: Keeping) -> None:
    again = partial(run, idempotency_key="a", identified_by=(12,))
    callers = [gevent.spawn(copy_context().run, again, "k", book, 12, object(), number) for number in range(2)]
    assert [caller.get() for caller in callers] == [0, 0]
    assert len(keeping.store.kept["k"]) == 1


def test_what_was_recorded_by_its_arguments_is_found_by_the_same_ones(
    run: Callable[..., Any], keeping: Keeping
) -> None:
    run("k", list.append, 12, idempotency_key="a")  # before a release that gives the operation a time
    assert run("k", list.append, 13, idempotency_key="a", identified_by=(12,)) is None
    assert keeping.store.kept["k"] == [12]


def make(at: object) -> Callable[..., object]:
    def operation(seats: list[Any], by: object = at) -> object:
        return (at, by)

    return operation


def make_other(at: object) -> Callable[..., object]:
    def operation(seats: list[Any]) -> object:
        return at

    return operation


@dataclass
class Booking:
    at: object

    def __call__(self, seats: list[Any]) -> None: ...

    def method(self, seats: list[Any]) -> None: ...


ALIKE: list[Callable[[Any], Any]] = [
    lambda at: partial(book, seat=12, at=at),
    lambda at: partial(partial(book, at=at), booking=at),
    make,
    lambda at: partial(make(at), by=at),
    Booking,
    lambda at: Booking(at).method,
]


@pytest.mark.parametrize("alike", ALIKE, ids=range(len(ALIKE)))
def test_nothing_that_an_operation_brings_along_counts(alike: Callable[[Any], Any]) -> None:
    described = {describe(alike(at), (12,), alone=True) for at in (1, 2.5, object())}
    assert len(described) == 1
    assert described != {describe(alike(1), (13,), alone=True)}
    assert len({describe(operation(1), (12,), alone=True) for operation in (make, make_other, Booking)}) == 3


def test_what_has_no_name_is_refused_all_the_same(run: Callable[..., Any]) -> None:
    for nameless in (lambda _: None, partial(lambda _: None), methodcaller("clear")):
        refused = answer_of(run, "k", nameless, idempotency_key="a", identified_by=(1,))
        assert type(refused) is TypeError
        assert "cannot tell" in str(refused)
    refused = answer_of(run, "k", book, 1, 2, 3, idempotency_key="a", identified_by=(object(),))
    assert "with its identified_by from others" in str(refused)
    refused = answer_of(run, "k", book, 1, object(), 3, idempotency_key="a")
    assert "or, in identified_by=(…), what its client sends again" in str(refused)


@pytest.mark.parametrize("key", [None, "a"])
@pytest.mark.parametrize("value", ["Ann", [12], 0, {}])
def test_it_is_a_tuple_with_a_key_or_without_one(run: Callable[..., Any], key: str | None, value: object) -> None:
    refused = answer_of(run, "k", book, 1, 2, 3, idempotency_key=key, identified_by=value)
    assert type(refused) is TypeError
    assert str(refused).startswith(f"identified_by is {value!r}, but must be a tuple of what the client sends again")


def test_without_a_key_it_means_nothing(run: Callable[..., Any], keeping: Keeping) -> None:
    for number in range(2):
        assert run("k", book, 12, 1, number, identified_by=(12,)) == number
    assert keeping.recorded == {}

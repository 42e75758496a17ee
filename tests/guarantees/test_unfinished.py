"""An operation that returns what is still to run: a coroutine, a generator, whatever is to be awaited, a greenlet."""

from __future__ import annotations

import gc
import warnings
from concurrent.futures import Future
from types import coroutine
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Processor
from tests.support.callers import answer_of
from tests.support.keeping_store import Keeping
from tests.support.recording_store import Store, add

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

    from geventbatch.testing import VirtualTime


class Awaitable:
    def __await__(self) -> Iterator[None]:
        yield


async def change_later(numbers: list[int]) -> None:
    numbers.append(1)


def change_and_await(numbers: list[int]) -> Any:
    numbers.append(1)
    return change_later(numbers)


def yield_numbers(numbers: list[int]) -> Iterator[int]:
    numbers.append(1)
    yield 1


async def yield_later(numbers: list[int]) -> AsyncIterator[int]:
    numbers.append(1)
    yield 1


@coroutine
def old_style(numbers: list[int]) -> Generator[None, None, None]:
    numbers.append(1)
    yield


def read_lazily(numbers: list[int]) -> Iterator[int]:
    numbers.append(1)
    return (number for number in numbers)


def map_lazily(numbers: list[int]) -> Iterator[None]:
    return map(numbers.append, [1])


def give_awaitable(numbers: list[int]) -> Awaitable:
    numbers.append(1)
    return Awaitable()


def give_greenlet(numbers: list[int]) -> gevent.Greenlet[..., None]:
    numbers.append(1)
    return gevent.Greenlet(numbers.append, 1)  # it need not run to be refused


def give_future(numbers: list[int]) -> Future[None]:
    numbers.append(1)
    return Future()


def hide(numbers: list[int]) -> dict[str, Any]:
    numbers.append(1)
    return {"each": [(change_later(numbers), change_later(numbers))]}


AWAIT = "write def without async"
LIST = "Return a list of it"
BEHIND = "start all else when run() has returned"
UNFINISHED: list[tuple[Callable[[list[int]], Any], str, str]] = [
    (change_later, "a coroutine", AWAIT),
    (change_and_await, "a coroutine", AWAIT),
    (yield_later, "an async generator", AWAIT),
    (give_awaitable, "an Awaitable", AWAIT),
    (hide, "a coroutine", AWAIT),
    (yield_numbers, "a generator", LIST),
    (old_style, "a generator", LIST),
    (read_lazily, "a generator", LIST),
    (map_lazily, "a map", LIST),
    (give_greenlet, "a Greenlet", BEHIND),
    (give_future, "a Future", BEHIND),
]


@pytest.mark.parametrize("idempotency_key", [None, "a"])
@pytest.mark.parametrize("options", [{}, {"clean_errors": ()}, {"clean_errors": (TypeError,)}, {"batching": False}])
@pytest.mark.parametrize("unfinished", UNFINISHED, ids=[one[0].__name__ for one in UNFINISHED])
def test_who_returns_what_is_still_to_run_is_told_what_to_do_and_changes_nothing(
    clock: VirtualTime, unfinished: tuple[Any, ...], options: dict[str, Any], idempotency_key: str | None
) -> None:
    operation, called, instead = unfinished
    keeping = Keeping(Store(clock, "scope"))
    with (
        warnings.catch_warnings(record=True) as caught,
        Processor(open_resource=keeping, min_duration=0, **options) as processor,
    ):
        warnings.simplefilter("always")
        before: gevent.Greenlet[..., Any] = gevent.spawn(processor.run, "k", add, 5)
        bad: gevent.Greenlet[..., Any] = gevent.spawn(
            answer_of, processor.run, "k", operation, idempotency_key=idempotency_key
        )
        behind: gevent.Greenlet[..., Any] = gevent.spawn(processor.run, "k", add, 6)
        gevent.joinall([before, bad, behind])
        gc.collect()
    error = bad.get()
    assert isinstance(error, TypeError)
    assert f"the operation {operation.__name__} on key 'k' returned {called}, and so nothing of it was saved" in str(
        error
    )
    assert instead in str(error)
    assert keeping.store.kept["k"] == [5, 6]
    assert keeping.recorded == {}
    assert caught == []


def test_a_greenlet_that_has_ended_or_applies_the_operation_itself_is_an_answer(clock: VirtualTime) -> None:
    ended = gevent.spawn(int)
    ended.join()
    with Processor(open_resource=Keeping(Store(clock, "scope")), min_duration=0) as processor:
        assert processor.run("k", lambda numbers: ended) is ended
        assert isinstance(processor.run("k", lambda numbers: gevent.getcurrent()), gevent.Greenlet)


def test_what_cannot_be_copied_is_never_clean(clock: VirtualTime) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    def give_deep(numbers: list[int]) -> list[Any]:
        numbers.append(1)
        return deep

    store = Store(clock)
    with store.processor(min_duration=0, clean_errors=(Exception,)) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "k", *call) for call in ((add, 5), (give_deep,), (add, 6))]
        error = callers[1].get()
        gevent.joinall(callers)
    assert isinstance(error, RecursionError)
    assert store.kept["k"] == [5, 6]
    while deep:
        deep = deep[0]

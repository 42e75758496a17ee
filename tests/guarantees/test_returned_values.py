"""What an operation returns is its caller's: the operations behind it change nothing of it (guarantee 20)."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import gevent
import pytest

from geventbatch import Processor
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime


class Train:
    """A resource that is an object."""

    def __init__(self) -> None:
        self.seats: dict[int, list[str]] = {1: ["Ann"]}
        self.log: list[Any] = []
        self.tags: set[Any] = {"new"}
        self.waiting: deque[list[str]] = deque([["Cy"]])
        self.counts = Counter(["Ann"])
        self.order: OrderedDict[str, list[str]] = OrderedDict(first=["Ann"])
        self.found: defaultdict[str, list[str]] = defaultdict(list, first=["Ann"])
        self.raw = bytearray(b"a")


class Report(NamedTuple):
    number: int
    log: list[Any]


class Scope:
    """Of a train, whose parts are its own too, if one asks."""

    def __init__(self, train: Train) -> None:
        self.train = train

    def __enter__(self) -> Train:
        return self.train

    def __exit__(self, *_: object) -> None:
        pass

    def owns(self, value: object) -> bool:
        if value is UNASKABLE:
            raise LookupError("do not ask")
        return isinstance(value, Part)


class Part:
    pass


UNASKABLE = object()


def change_all(train: Train) -> None:
    train.seats[1].append("Bob")
    train.seats[2] = []
    train.log.append("changed")
    train.tags.add("changed")
    train.waiting[0].append("Di")
    train.waiting.append([])
    train.counts["Bob"] += 1
    for found in (train.order, train.found):
        found["first"].append("Bob")
        found["second"] = []
    train.raw.append(0)


RETURNED: list[tuple[Callable[[Train], Any], Any]] = [
    (lambda train: train.seats, {1: ["Ann"]}),
    (lambda train: train.seats[1], ["Ann"]),
    (lambda train: train.log, []),
    (lambda train: train.tags, {"new"}),
    (lambda train: (1, train.seats[1], "x"), (1, ["Ann"], "x")),
    (lambda train: [[train.log], {"deep": (train.tags,)}], [[[]], {"deep": ({"new"},)}]),
    (lambda train: train.waiting, deque([["Cy"]])),
    (lambda train: train.counts, Counter(["Ann"])),
    (lambda train: train.order, OrderedDict(first=["Ann"])),
    (lambda train: train.found, defaultdict(list, first=["Ann"])),
    (lambda train: train.raw, bytearray(b"a")),
    (lambda train: Report(1, train.log), Report(1, [])),
]


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize(("operation", "expected"), RETURNED, ids=map(str, range(len(RETURNED))))
def test_a_container_of_the_resource_is_answered_as_it_was_then(
    operation: Callable[[Train], Any], expected: Any, batching: bool
) -> None:
    train = Train()
    with Processor(open_resource=lambda _: Scope(train), min_duration=0, batching=batching) as processor:
        callers = [gevent.spawn(processor.run, "k", call) for call in (operation, change_all)]
        first = callers[0].get()
        callers[1].get()
        change_all(train)
    assert first == expected
    assert type(first) is type(expected)
    assert "changed" in train.tags


@pytest.mark.parametrize("batching", [True, False])
def test_a_resource_that_is_a_container_is_answered_as_it_was_then_in_a_bulk_too(batching: bool) -> None:
    kept: dict[str, list[int]] = {"k": []}

    def append(resource: list[int], number: int) -> list[int]:
        resource.append(number)
        return resource

    options: list[dict[str, Any]] = [
        {"load_resource": kept.__getitem__, "save_resource": kept.__setitem__},
        {"load_resources": lambda keys: {key: kept[key] for key in keys}, "save_resources": kept.update},
    ]
    for option in options:
        kept["k"] = []
        with Processor(min_duration=0, batching=batching, **option) as processor:
            callers = [gevent.spawn(processor.run, "k", append, number) for number in range(3)]
            assert [caller.get() for caller in callers] == [[0], [0, 1], [0, 1, 2]]


def test_what_holds_itself_or_one_thing_twice_is_copied_as_it_is(clock: VirtualTime) -> None:
    shared: list[Any] = ["shared"]
    loop: list[Any] = [shared, shared]
    loop.append((loop, {"loop": loop}))
    with Processor(min_duration=0) as processor:
        answer = processor.run("k", lambda _: loop)
    assert answer is not loop
    assert answer[0] is answer[1] is not shared
    assert answer[0] == ["shared"]
    assert answer[2][0] is answer
    assert answer[2][1]["loop"] is answer


def test_what_is_no_container_is_answered_as_it_is(clock: VirtualTime) -> None:
    class Names(list[str]):
        pass

    whole = (1, "a", (None, 2.5))
    values: list[Any] = [Names("a"), object(), whole, frozenset({1}), 5, None, Train()]
    with Processor(min_duration=0) as processor:
        assert all(processor.run("k", partial(_give, value)) is value for value in values)
        assert processor.run("k", partial(_give, [values[1], whole])) == [values[1], whole]


def test_what_lies_too_deep_is_refused_to_its_caller_alone(clock: VirtualTime) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    saved: list[Any] = []
    options: dict[str, Any] = {"load_resource": lambda _: saved, "save_resource": lambda *_: None}
    with Processor(min_duration=0, **options) as processor:
        calls: list[Callable[..., Any]] = [lambda one: one.append(1), lambda _: deep, lambda one: one.append(2)]
        callers = [gevent.spawn(answer_of, processor.run, "k", call) for call in calls]
        clock.advance(5)
        first, error, last = [caller.get(block=False) for caller in callers]
    assert first is last is None
    assert isinstance(error, RecursionError)
    assert "too deep in one another" in str(error)
    while deep:
        deep = deep[0]


class Copying(Scope):
    """Copies parts, but for the one that cannot be."""

    def copied(self, value: object) -> object:
        if value is UNASKABLE:
            raise LookupError("do not copy")
        return Part() if isinstance(value, Part) else value


def test_what_a_scope_copies_is_answered_as_its_copy_and_once_where_it_is_twice() -> None:
    part: Any = Part()
    with Processor(open_resource=lambda _: Copying(Train()), min_duration=0) as processor:
        answer: Any = processor.run("k", lambda _: [part, {"same": part}, UNASKABLE])
    assert answer[0] is answer[1]["same"] is not part
    assert answer[2] is UNASKABLE


# -- what is the batch's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize(
    "returned",
    [lambda train: train, lambda train: [1, {"all": (train,)}], lambda _: Part(), lambda _: {"part": Part()}],
    ids=["the resource", "in containers", "a part", "a part in a dict"],
)
def test_an_instance_of_the_batch_s_own_that_is_returned_is_told_once(
    caplog: pytest.LogCaptureFixture, returned: Callable[[Train], Any], batching: bool
) -> None:
    train = Train()
    with Processor(open_resource=lambda _: Scope(train), min_duration=0, batching=batching, name="trains") as processor:
        for _ in range(3):
            processor.run("k", returned)
        gevent.sleep(0)
    told = [record for record in caplog.records if "the batch's own" in record.getMessage()]
    assert len(told) == 1
    assert told[0].levelname == "WARNING"
    assert "trains: batch of key 'k': " in told[0].getMessage()
    assert "Return values of it" in told[0].getMessage()
    assert "<lambda> returned its " in told[0].getMessage()


def test_what_only_looks_like_it_is_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with Processor(open_resource=lambda _: Scope(Train()), min_duration=0) as processor:
        for value in (Train(), object(), UNASKABLE, {"a": frozenset({1})}, 5):
            processor.run("k", partial(_give, value))
        gevent.sleep(0)
    assert not caplog.records


def _give(value: Any, _: Any) -> Any:
    return value

"""``geventbatch.testing.check_operations``: what it complains of, and what it leaves alone."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import gevent
import pytest

from geventbatch import BatchTimeout, Conflict, LoadFailed, Processor, current_batch
from geventbatch.testing import ImpureOperation, check_operations, faults
from tests.support.callers import answer_of
from tests.support.recording_store import FORMS, Store, add

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import VirtualTime


class Seat:
    """A plain object, equal to itself only."""

    def __init__(self, holder: str | None = None) -> None:
        self.holder = holder


@dataclass
class Train:
    name: str = "ICE 1"
    seats: list[Seat] = field(default_factory=lambda: [Seat(), Seat()])
    identity: UUID = field(default_factory=uuid4)

    @cached_property
    def number(self) -> int:
        return int(self.name[-1])

    def book(self, seat: int, holder: str) -> str:
        if self.seats[seat].holder is not None:
            raise ValueError("taken")
        self.seats[seat].holder = holder
        return holder


class Trains:
    """Keeps one train, as it was last saved."""

    def __init__(self) -> None:
        self.kept = Train()

    @contextmanager
    def scope(self, _: object) -> Iterator[Train]:
        train = deepcopy(self.kept)
        yield train
        self.kept = train


@pytest.fixture
def trains(clock: VirtualTime) -> Trains:
    return Trains()


@pytest.fixture(params=[True, False], ids=["batching", "alone"])
def processor(request: pytest.FixtureRequest, trains: Trains) -> Iterator[Processor[Train]]:
    options: dict[str, Any] = {"min_duration": 0, "batching": request.param, "clean_errors": (ValueError,)}
    with Processor(open_resource=trains.scope, **options) as processor:
        yield processor


numbers = itertools.count()


@pytest.fixture(autouse=True)
def _count_from_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "numbers", itertools.count())


def differ_by_result(train: Train) -> int:
    return next(numbers)


def differ_by_state(train: Train) -> None:
    train.seats[0].holder = str(next(numbers))


def differ_by_error(train: Train) -> None:
    raise ValueError(next(numbers))


def differ_by_raising(train: Train) -> None:
    if next(numbers) % 2:
        raise ValueError("odd")


def empty_the_names(train: Train, names: list[str]) -> None:
    while names:
        train.seats.append(Seat(names.pop()))


def change_and_raise(train: Train) -> None:
    train.seats[1].holder = "Ann"
    raise ValueError("too late")


def give_another(train: Train) -> Train:
    return Train("ICE 2", [], train.identity)


def give_a_seat(train: Train) -> Seat:
    return train.seats[0]


def give_a_seat_inside(train: Train) -> dict[str, tuple[Seat, ...]]:
    return {"seats": (train.seats[1],)}


def give_itself(train: Train) -> Train:
    return train


BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str, str]] = [
    (differ_by_result, (), "differs", "returned 0, and in a second run on the same resource returned 1"),
    (
        differ_by_state,
        (),
        "differs",
        "left resource.seats[0].holder as '0', and in a second run on the same resource as '1'",
    ),
    (differ_by_error, (), "differs", "raised ValueError(0), and in a second run on the same resource raised"),
    (differ_by_raising, (), "differs", "returned None, and in a second run on the same resource raised ValueError"),
    (
        empty_the_names,
        (["Ann"],),
        "arguments",
        "changed its arguments: its caller sees what the first run makes of",
    ),
    (
        change_and_raise,
        (),
        "raised",
        "raised ValueError('too late'), and had changed resource.seats[1].holder by then, from None to 'Ann'",
    ),
    (give_another, (), "replaces", "in place of the resource, and left that as it was: change it in place"),
    (give_a_seat, (), "shares", "part of the resource and can change: result is resource.seats[0]"),
    (give_a_seat_inside, (), "shares", "result['seats'][0] is resource.seats[1]"),
    (give_itself, (), "shares", "result is resource"),
]


@pytest.mark.parametrize("bad", BAD, ids=[one[0].__name__ for one in BAD])
def test_an_operation_is_refused_that(trains: Trains, processor: Processor[Train], bad: tuple[Any, ...]) -> None:
    operation, args, check, told = bad
    before = deepcopy(trains.kept)
    with pytest.raises(ImpureOperation) as raised, check_operations(processor):
        processor.run("k", operation, *deepcopy(args))
    called = ", ".join(["resource", *map(repr, args)])
    assert str(raised.value).startswith(f"the operation {operation.__name__}({called}) on key 'k' ")
    assert str(raised.value).endswith(f" ({check}); nothing of it was saved")
    assert told in str(raised.value)
    assert [seat.holder for seat in trains.kept.seats] == [seat.holder for seat in before.seats]
    skip = [check, "differs"] if check == "arguments" else [check]
    with check_operations(processor, skip=skip):  # the other checks have nothing to say
        assert not isinstance(answer_of(processor.run, "k", operation, *deepcopy(args)), ImpureOperation)


def read_the_number(train: Train) -> int:
    return train.number


def give_values(train: Train) -> dict[str, Any]:
    return {"name": train.name, "identity": train.identity, "holders": [seat.holder for seat in train.seats]}


def give_a_copy(train: Train) -> Train:
    return deepcopy(train)


def give_an_iterator(train: Train) -> Iterator[int]:
    return iter(())


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("operation", [read_the_number, give_values, give_a_copy, give_an_iterator])
def test_one_that_reads_is_left_alone(processor: Processor[Train], operation: Any, read_only: bool) -> None:
    with check_operations(processor):
        processor.run("k", operation, read_only=read_only)


def test_one_that_changes_or_refuses_is_applied_once(trains: Trains, processor: Processor[Train]) -> None:
    with check_operations(processor):
        assert processor.run("k", Train.book, 0, "Ann") == "Ann"
        refused = answer_of(processor.run, "k", Train.book, 0, "Bob")
    assert repr(refused) == "ValueError('taken')"
    assert [seat.holder for seat in trains.kept.seats] == ["Ann", None]


def test_one_that_is_said_to_read_and_changes_is_refused(trains: Trains, processor: Processor[Train]) -> None:
    with pytest.raises(ImpureOperation) as raised, check_operations(processor):
        processor.run("k", Train.book, 0, "Ann", read_only=True)
    assert str(raised.value) == (
        "the operation Train.book(resource, 0, 'Ann') on key 'k' is read_only=True, and has changed "
        "resource.seats[0].holder, from None to 'Ann' (read_only); nothing of it was saved"
    )
    assert trains.kept.seats[0].holder is None


def test_what_is_raised_that_promises_nothing_may_have_changed_the_resource(trains: Trains) -> None:
    with (
        Processor(open_resource=trains.scope, min_duration=0) as processor,
        check_operations(processor),
        pytest.raises(ValueError, match="too late"),
    ):
        processor.run("k", change_and_raise)


def test_a_complaint_that_somebody_swallows_is_raised_when_the_block_ends(processor: Processor[Train]) -> None:
    with pytest.raises(ImpureOperation, match="give_itself"), check_operations(processor):
        assert isinstance(answer_of(processor.run, "k", give_itself), ImpureOperation)
    with pytest.raises(KeyError), check_operations(processor):
        answer_of(processor.run, "k", give_itself)
        raise KeyError


def test_after_the_block_nothing_is_checked(processor: Processor[Train]) -> None:
    with check_operations(processor):
        pass
    assert isinstance(processor.run("k", give_itself), Train)


def test_every_processor_is_checked_when_none_is_named(trains: Trains, processor: Processor[Train]) -> None:
    with (
        pytest.raises(ImpureOperation),
        check_operations(),
        Processor(open_resource=trains.scope, min_duration=0) as made_inside,
    ):
        assert isinstance(answer_of(processor.run, "k", give_itself), ImpureOperation)
        assert isinstance(answer_of(made_inside.run, "k", give_itself), ImpureOperation)


@pytest.mark.parametrize(
    ("resource", "operation"),
    [
        ([1], lambda numbers: [*numbers, 2]),
        ({"a": 1}, lambda numbers: {**numbers, "b": 2}),
        ({1}, lambda numbers: numbers | {2}),
    ],
    ids=["list", "dict", "set"],
)
def test_a_builtin_in_place_of_the_resource_is_refused_when_it_has_all_of_it(
    clock: VirtualTime, resource: Any, operation: Any
) -> None:
    with Processor(load_resource=lambda _: deepcopy(resource), min_duration=0) as processor:
        with pytest.raises(ImpureOperation, match="replaces"), check_operations(processor):
            processor.run("k", operation)
        with check_operations(processor):  # it tells of something else
            processor.run("k", lambda numbers: type(numbers)())


# With everything else


@pytest.fixture(params=FORMS)
def store(request: pytest.FixtureRequest, clock: VirtualTime) -> Store:
    return Store(clock, request.param)


def test_a_batch_is_loaded_and_saved_as_without_it(store: Store) -> None:
    with store.processor(min_duration=0.1) as processor, check_operations(processor):
        callers = [store.call(processor, "k", add, number) for number in range(20)]
        gevent.joinall([one.greenlet for one in callers])
    assert store.kept["k"] == list(range(20))
    assert (len(store.times("load")), len(store.times("save"))) == (1, 1)


def test_only_the_caller_of_a_bad_one_is_told(store: Store) -> None:
    with (
        store.processor(min_duration=0.1) as processor,
        pytest.raises(ImpureOperation),
        check_operations(processor),
    ):
        good = [store.call(processor, "k", add, number) for number in range(3)]
        bad = store.call(processor, "k", lambda resource: resource)
        gevent.joinall([one.greenlet for one in (*good, bad)])
    assert [one.answer for one in good] == [0, 1, 2]
    assert isinstance(bad.answer, ImpureOperation)
    assert store.kept["k"] == [0, 1, 2]


def test_it_goes_with_faults_in_either_order(store: Store) -> None:
    with store.processor(min_duration=0) as processor:
        with check_operations(processor), faults(processor) as plan:
            plan.conflict()
            assert processor.run("k", add, 1) == 1
        with faults(processor) as plan, check_operations(processor):
            plan.fail_load(Conflict)
            assert processor.run("k", add, 2) == 2
            assert isinstance(answer_of(plan.fail_load, int), TypeError)
            plan.fail_load(OSError)
            assert isinstance(answer_of(processor.run, "k", add, 3), LoadFailed)
        for inner, outer in (("shares", "differs"), ("differs", "shares")):
            with (
                pytest.raises(ImpureOperation, match="shares"),
                check_operations(processor, skip=[inner]),  # type: ignore[list-item]
                check_operations(processor, skip=[outer]),  # type: ignore[list-item]
            ):
                processor.run("k", lambda resource: resource)


class WithRows:
    """A store whose scopes take rows and delete; it notes what they saved."""

    takes_rows = deletes = True

    def __init__(self) -> None:
        self.noted: list[tuple[list[object], bool]] = []

    def __call__(self, _: object) -> WithRows:
        return self

    def __enter__(self) -> list[int]:
        return []

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.noted.append((current_batch().rows, current_batch().deleted))


def add_a_row(numbers: list[int], row: object) -> None:
    numbers.append(1)
    current_batch().add_row(row)


def add_another_row(_: list[int]) -> None:
    current_batch().add_row({"number": next(numbers)})


def delete(_: list[int]) -> None:
    current_batch().delete()


def test_rows_and_deletions_of_the_runs_on_copies_are_taken_back(clock: VirtualTime) -> None:
    store = WithRows()
    with Processor(open_resource=store, min_duration=0) as processor, check_operations(processor):
        processor.run("k", add_a_row, "one")
        processor.run("k", delete)
    assert store.noted == [(["one"], False), ([], True)]


def test_other_rows_in_a_second_run_and_rows_of_one_that_reads_are_complained_of(clock: VirtualTime) -> None:
    with Processor(open_resource=WithRows(), min_duration=0) as processor:
        with pytest.raises(ImpureOperation, match="added other rows"), check_operations(processor):
            processor.run("k", add_another_row)
        for operation in (partial(add_a_row, row=1), delete):
            with pytest.raises(ImpureOperation, match="read_only"), check_operations(processor):
                processor.run("k", operation, read_only=True)


def test_a_timeout_of_the_batch_goes_through(clock: VirtualTime) -> None:
    with (
        Processor(load_resource=lambda _: [0], min_duration=0, max_duration=1) as processor,
        check_operations(processor),
    ):
        failed = answer_of(processor.run, "k", lambda _: gevent.sleep(5))
        assert type(failed) is BatchTimeout
        assert processor.run("k", add, 1) == 1


def test_copies_states_and_what_is_around_are_the_callers_own(trains: Trains, processor: Processor[Train]) -> None:
    noted: list[str] = []

    def copy(train: Train) -> Train:
        noted.append("copied")
        return deepcopy(train)

    @contextmanager
    def around() -> Iterator[None]:
        noted.append("entered")
        yield
        noted.append("left")

    def state(value: Any) -> Any:
        return [seat.holder for seat in value.seats] if isinstance(value, Train) else value

    with check_operations(processor, copy=copy, around=around, state=state):
        processor.run("k", rename, read_only=True)
    assert noted == ["copied", "entered", "left"] * 2


def rename(train: Train) -> None:
    train.name = "ICE 2"


def test_a_resource_that_cannot_be_copied_is_told_with_the_way_out(clock: VirtualTime) -> None:
    resource: list[Any] = [(number for number in range(3))]
    with (
        Processor(load_resource=lambda _: resource, min_duration=0) as processor,
        check_operations(processor),
        pytest.raises(TypeError, match=r"check_operations cannot copy the resource .*: pass copy=…"),
    ):
        processor.run("k", len)


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ({"copy": 5}, TypeError, "copy is 5, but must be callable"),
        ({"state": 5}, TypeError, "state is 5, but must be callable"),
        ({"around": 5}, TypeError, "around is 5, but must be callable"),
        (
            {"skip": ["sharing"]},
            ValueError,
            "skip has 'sharing', but must have names of checks: aliases, arguments, computed",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict[str, Any], kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told), check_operations(**given):
        pass

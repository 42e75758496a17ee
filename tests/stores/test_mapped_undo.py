"""What an operation that raised has changed of mapped instances is undone in memory, where it has sent nothing.

Each kind of change is tried for itself: what is answered, what is found, and what is written afterwards, is the same as
without that operation.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import object_session

from geventbatch import Processor, current_batch
from geventbatch.errors import CannotUndo, SaveFailed
from tests.support.callers import answer_of
from tests.support.mapped import EVERYWHERE, Bed, opening
from tests.support.mapped_undo import (
    ANYWHERE,
    LOADED,
    LOADING,
    UNLOADED,
    Base,
    Line,
    Place,
    Refused,
    Stop,
    Told,
    Train,
    Wagon,
    Weight,
    append_one,
    expire,
    fill,
    look,
    named,
    raised,
    refresh,
    rows,
    seat_in_wagon,
    shown,
    take,
    take_seat,
)

if TYPE_CHECKING:
    from tests.support.mapped_undo import Operation

SOME: Final = [EVERYWHERE[0], EVERYWHERE[1], EVERYWHERE[5]]


opened_bed = opening(Base, SOME)


@pytest.fixture
def bed(opened_bed: Bed) -> Bed:
    fill(opened_bed)
    return opened_bed


def found(train: Train) -> list[Any]:
    """All that is to be seen of it, without loading what is not loaded."""
    values = {name: value for name, value in vars(train).items() if name != "_sa_instance_state"}
    state: Any = sa.inspect(train)
    session: Any = object_session(train)
    kept = {name: value for name, value in values.items() if name not in state.mapper.relationships}
    children = {name: shown(values[name]) for name in sorted(values) if name in state.mapper.relationships}
    return [
        {name: shown(value) for name, value in sorted(kept.items()) if name != "place" and "Proxy" not in name},
        children,
        sorted(str(sa.inspect(one).identity) + type(one).__name__ for one in session.identity_map.values()),
        len(session.new),
        sorted(state.unloaded - {"place"}),  # a composite is made of its columns again
        sorted(state.expired_attributes),
    ]


def applied(bed: Bed, operations: list[Operation], *, copies: bool, entity: type[Base] = Train) -> list[Any]:
    """What *operations* answer, one by one in one batch, and what is written: those that raise are undone.

    A copy is made behind each of the others, or never.
    """
    fill(bed)
    answers: list[Any] = []
    verdicts: list[Any] = []

    def apply(resource: Any) -> None:
        batch: Any = current_batch()
        scope, mark, done = batch.scope, None, 0
        since: list[Operation] = []
        for operation in operations:
            try:
                answer = operation(resource)
            except Refused as error:
                verdict = scope.operation_raised(error)
                resource = scope.restore(mark)
                verdicts.append(verdict)
                batch.attempt.completed = done
                for again in since:
                    again(resource)
                    assert scope.operation_returned() is None
                    batch.attempt.completed += 1
            else:
                assert scope.operation_returned() is None
                batch.attempt.completed += 1
                answers.append(answer)
                since.append(operation)
                if copies:
                    mark, done, since = scope.checkpoint(), batch.completed, []
        answers.append(found(resource))

    with Processor(open_resource=bed.store(entity), clean_errors=(), min_duration=0, max_duration=10) as processor:
        processor.run(1, apply)
    assert not any(verdicts)
    written = [one for one in bed.statements if any(word in one for word in ("INSERT ", "UPDATE ", "DELETE "))]
    return [answers, [one for one in written if "FOR " not in one], rows(bed)]


def both(bed: Bed, change: Operation, first: list[Operation], others: list[Operation], *, copies: bool) -> list[Any]:
    """What comes of *others* with an operation that makes *change* and raises among them, and without it."""
    refused = raised(change)
    operations = [*first, refused, *others, refused, refused, *others, refused, *others, refused]
    without = [*first, *others, *others, *others]
    return [applied(bed, operations, copies=copies), applied(bed, without, copies=copies)]


COPIES: Final = pytest.mark.parametrize("copies", [False, True], ids=["loaded", "copied"])


@COPIES
@pytest.mark.parametrize("change", ANYWHERE, ids=named)
def test_what_an_operation_has_changed_is_as_if_it_had_not_been(bed: Bed, change: Operation, copies: bool) -> None:
    found, without = both(bed, change, [], UNLOADED, copies=copies)
    assert found == without


@COPIES
@pytest.mark.parametrize("change", [*ANYWHERE, *LOADING[:-2]], ids=named)
def test_what_it_has_changed_of_what_was_loaded_meanwhile_too(bed: Bed, change: Operation, copies: bool) -> None:
    found, without = both(bed, change, [look], LOADED, copies=copies)
    assert found == without


@COPIES
@pytest.mark.parametrize("change", LOADING, ids=named)
def test_what_it_has_loaded_is_as_if_it_had_not_been(bed: Bed, change: Operation, copies: bool) -> None:
    def load_and_change(train: Train) -> None:
        look(train)
        change(train)

    found, without = both(bed, load_and_change, [], [], copies=copies)
    assert found == without


# -- what cannot be undone in memory -------------------------------------------------------------------------------


def flush(train: Train) -> None:
    train.taken += 1
    session: Any = object_session(train)
    session.flush()


def query(train: Train) -> None:
    train.taken += 1
    session: Any = object_session(train)
    session.scalar(sa.select(sa.func.count()).select_from(Line))


def write(train: Train) -> None:
    session: Any = object_session(train)
    session.execute(sa.insert(Line).values(id=70, name="raised"))


def begin_savepoint(train: Train) -> None:
    session: Any = object_session(train)
    with session.begin_nested():
        train.taken += 1


def delete_child(train: Train) -> None:
    session: Any = object_session(train)
    session.delete(session.get(Wagon, 1))


def restored(bed: Bed, *changes: Operation, entity: type[Base] = Train) -> list[Any]:
    """What the scope says to undoing each of *changes* in a batch: None, or why it cannot."""
    told: list[Any] = []

    def apply(resource: Any) -> None:
        batch: Any = current_batch()
        for change in changes:
            change(resource)
            assert batch.scope.operation_raised(Refused()) is None
            try:
                resource = batch.scope.restore(None)
            except CannotUndo as error:
                told.append(str(error))
                raise Refused from error
            told.append(None)

    options: dict[str, Any] = {"open_resource": bed.store(entity), "min_duration": 0, "max_duration": 10}
    with Processor(**options, clean_errors=()) as processor, suppress(Refused):
        processor.run(1, apply)
    return told


@pytest.mark.parametrize("change", [flush, query, write, begin_savepoint, delete_child], ids=named)
def test_what_was_sent_or_is_to_be_deleted_is_not_undone_in_memory(bed: Bed, change: Operation) -> None:
    if bed.server == "sqlite" and change is query:  # which flushes nothing there
        assert restored(bed, change) == [None]
        return
    if bed.server == "sqlite" and change is not delete_child:
        with pytest.raises(RuntimeError, match="to SQLite"):
            restored(bed, change)
        return
    (why,) = restored(bed, change)
    assert "on 1 have done cannot be undone in memory: something was" in why


def test_a_query_that_only_reads_is_undone_in_memory(bed: Bed) -> None:
    def read(train: Train) -> None:
        session: Any = object_session(train)
        assert session.scalar(sa.select(sa.func.count()).select_from(Line)) == 2
        train.taken += 1

    assert restored(bed, read, read) == [None, None]


def test_what_a_class_has_in_memory_from_its_load_on_is_copied_from_the_first_that_raised_on(bed: Bed) -> None:
    def tell(told: Told) -> None:
        told.events.append("raised")

    def see(told: Told) -> list[str]:
        told.events.append(f"seen {len(told.events)}")
        return list(told.events)

    store = bed.store(Told)
    told: list[Any] = []

    def apply(resource: Told) -> None:
        scope: Any = current_batch()
        scope = scope.scope
        told.append(see(resource))
        tell(resource)
        assert scope.operation_raised(Refused()) is None
        resource = scope.restore(None)
        told.append(see(resource))

    with Processor(open_resource=store, clean_errors=(), min_duration=0, max_duration=10) as processor:
        with pytest.raises(SaveFailed, match="events of Told was not copied"):
            processor.run(1, apply)
        processor.run(1, apply)
    assert told == [["seen 0"], ["seen 0"], ["seen 0"]]


def test_many_that_were_loaded_at_once_are_copied_from_the_first_that_raised_on(bed: Bed) -> None:
    bed.add(*[Stop(id=n, train_id=1, name="more", position=n) for n in range(10, 20)])

    def rename(train: Train) -> None:
        for stop in train.stops:
            stop.name = "raised"

    store = bed.store(Train)

    def apply(train: Train) -> list[str]:
        scope: Any = current_batch()
        scope = scope.scope
        rename(train)
        assert scope.operation_raised(Refused()) is None
        return [stop.name for stop in scope.restore(None).stops]

    with Processor(open_resource=store, clean_errors=(), min_duration=0, max_duration=10) as processor:
        with pytest.raises(SaveFailed, match="nothing was copied"):
            processor.run(1, apply)
        assert processor.run(1, apply) == ["A", "B", *["more"] * 10]


def test_a_new_resource_is_as_it_was_made(bed: Bed) -> None:
    def make(key: int) -> Train:
        return Train(
            id=key, amount=1, seats={"1": ["Ann"]}, tags={"a": 1}, log=[], blob=[1], weight=Weight(1), place=Place(1, 2)
        )

    def change(train: Train) -> None:
        change_in_place_of(train)
        train.wagons.append(Wagon(name="raised"))
        train.taken = 5

    def change_in_place_of(train: Train) -> None:
        train.seats["1"].append("Ben")
        train.tags["b"] = 2
        train.log.append(1)
        train.blob.append(2)
        train.weight.tons = 2

    def apply(train: Train) -> list[Any]:
        scope: Any = current_batch()
        scope = scope.scope
        for _ in range(2):
            change(train)
            assert scope.operation_raised(Refused()) is None
            train = scope.restore(None)
        return [shown(one) for one in (train.seats, train.tags, train.log, train.blob, train.weight, train.wagons)]

    store = bed.store(Train, missing=make)
    with Processor(open_resource=store, clean_errors=(), min_duration=0, max_duration=10) as processor:
        answer = processor.run(7, apply)
    assert answer == [{"1": ["'Ann'"]}, {"a": "1"}, [], ["1"], "{'tons': 1}", []]
    assert rows(bed)[2][1][4:6] == [{"1": ["'Ann'"]}, {"a": "1"}]
    assert len(rows(bed)[-1]) == 4


# -- with callers --------------------------------------------------------------------------------------------------


def told(bed: Bed, *operations: Operation) -> tuple[list[Any], list[int]]:
    """What the callers of *operations* in one batch are answered, and the attempts that it took."""
    with Processor(open_resource=bed.store(Train), min_duration=0.05, max_duration=30) as processor:
        metrics = processor.subscribe_batch_metrics()
        callers = [gevent.spawn(answer_of, processor.run, 1, operation) for operation in operations]
        answers = [caller.get() for caller in callers]
    return answers, [metric.attempts for metric in metrics]


@pytest.mark.parametrize("change", [*ANYWHERE, *LOADING], ids=named)
def test_who_raises_after_a_change_is_refused_alone_and_nobody_is_loaded_again(bed: Bed, change: Operation) -> None:
    refused = raised(change)
    others: list[Operation] = [take, append_one, take_seat, seat_in_wagon]
    fill(bed)
    expected, _ = told(bed, look, *others, *others)
    saved = rows(bed)
    fill(bed)
    operations = [look, refused, *others, refused, refused, *others, refused]
    answers, attempts = told(bed, *operations)
    assert [answer for answer in answers if not isinstance(answer, Refused)] == expected
    assert [isinstance(answer, Refused) for answer in answers] == [operation is refused for operation in operations]
    assert rows(bed) == saved
    if change not in {expire, refresh}:  # for which those before are written first
        assert attempts == [1]


@pytest.mark.parametrize("change", [flush, query, write, begin_savepoint, delete_child], ids=named)
def test_who_raises_after_a_statement_that_writes_is_refused_alone(bed: Bed, change: Operation) -> None:
    fill(bed)
    refused = raised(change)
    answers, attempts = told(bed, look, take, refused, take_seat, append_one, refused, refused, take, refused, take)
    kinds = (RuntimeError,) if bed.server == "sqlite" and change in {flush, write, begin_savepoint} else (Refused,)
    assert [index for index, answer in enumerate(answers) if isinstance(answer, kinds)] == [2, 5, 6, 8]
    assert [answers[index] for index in (1, 4, 7, 9)] == [1, 5, 2, 3]
    assert [len(table) for table in rows(bed)] == [2, 1, 1, 3, 3, 5]
    assert rows(bed)[2][0][1] == "3"
    if bed.server != "sqlite":
        assert attempts == [2]  # and step by step in the second one

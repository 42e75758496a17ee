"""Batches on mapped classes in which the database refuses what some operations have made: all others are saved."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.orm import sessionmaker

from geventbatch import Processor, current_batch
from tests.support.callers import answer_of
from tests.support.mapped_trains import SERVERS, SQLITE, Booking, Form, Place, Train, places, session_of, take

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Form], Place]]:
    with places(tmp_path_factory.mktemp("mapped")) as place:
        yield place


@pytest.fixture(params=SERVERS)
def server(opened: Callable[[Form], Place], request: pytest.FixtureRequest) -> Place:
    return opened(request.param)


@pytest.fixture(params=[*SERVERS, *SQLITE])
def place(opened: Callable[[Form], Place], request: pytest.FixtureRequest) -> Place:
    return opened(request.param)


def overdraw(train: Train) -> None:
    train.taken -= 1000


def book(train: Train, text: str | None) -> int:
    train.bookings.append(Booking(text=text))
    return take(train)


def refused_and_saved(answers: list[Any]) -> tuple[int, list[Any]]:
    """How many were refused by the database, and what the others were told."""
    refused = [answer for answer in answers if isinstance(answer, DBAPIError)]
    return len(refused), [answer for answer in answers if not isinstance(answer, DBAPIError)]


@pytest.mark.parametrize("pipeline", [True, pytest.param(False, marks=pytest.mark.variants)])
def test_500_of_1000_operations_are_refused_and_all_others_are_saved(
    opened: Callable[[Form], Place], pipeline: bool
) -> None:
    server = opened(Form("postgresql", "lock", pipeline=pipeline))
    runs = [(overdraw,) if n % 2 else (take,) for n in range(1_000)]
    refused, saved = refused_and_saved(server.run(*runs, max_duration=30, min_duration=0.1))
    assert refused == 500
    assert saved == [*range(1, 501)]
    assert server.taken == 500


def test_six_that_leave_a_column_empty_among_200_are_refused_alone(place: Place) -> None:
    runs = [(book, None if n % 33 == 7 else str(n)) for n in range(200)]
    refused, saved = refused_and_saved(place.run(*runs, min_duration=0.1))
    assert refused == 6
    assert saved == [*range(1, 195)]
    assert place.taken == 194
    assert len(place.texts) == 194


def mixed(*more: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Operations of which so many are refused that the batch goes step by step, with *more* behind each."""
    runs: list[tuple[Any, ...]] = []
    for _ in range(4):
        runs += [(take,), (overdraw,), *more]
    return runs


def test_the_version_is_counted_once_for_a_batch_that_goes_step_by_step(opened: Callable[[Form], Place]) -> None:
    server = opened(Form("postgresql", "version", "version"))
    refused, saved = refused_and_saved(server.run((take,), (overdraw,), (ask,), *mixed()))
    assert (refused, saved) == (5, [1, 0, 2, 3, 4, 5])
    assert server.scalar(sa.select(Train.version)) == 2


def test_what_is_refused_leaves_nothing_in_memory(server: Place) -> None:
    seen: list[Any] = []

    def see(train: Train) -> None:
        seen.append((train.taken, dict(train.seats), [b.text for b in train.bookings], vars(train).get("plain")))

    def change_all(train: Train) -> None:
        train.taken -= 1000
        train.seats["no"] = "no"
        train.note = "no"
        train.bookings[0].text = "no"
        train.bookings.append(Booking(text="no"))
        train.plain = "no"  # type: ignore[attr-defined]

    def seat(train: Train) -> int:
        train.seats[str(train.taken)] = "taken"
        train.plain = "yes"  # type: ignore[attr-defined]
        return take(train)

    server.book("a", "b")
    refused, saved = refused_and_saved(server.run(*[run for _ in range(4) for run in [(seat,), (change_all,), (see,)]]))
    assert refused == 4
    assert saved == [1, None, 2, None, 3, None, 4, None]
    places = {str(n): "taken" for n in range(4)}
    assert seen[-4:] == [(n + 1, dict([*places.items()][: n + 1]), ["a", "b"], "yes") for n in range(4)]
    assert server.texts == ["a", "b"]
    assert server.scalar(sa.select(Train.seats)) == places


def test_rows_beside_the_resource_are_inserted_with_the_operation_that_added_them(server: Place) -> None:
    def add(train: Train, text: str) -> int:
        current_batch().add_row((Booking, {"text": text}))
        current_batch().add_row(Booking(text=f"{text}!"))
        return take(train)

    def add_twice(train: Train) -> int:
        current_batch().add_row((Booking, {"text": "twice"}))
        current_batch().add_row((Booking, {"text": "twice"}))
        return take(train, 100)

    answers = server.run((add, "a"), (add_twice,), (overdraw,), (add, "b"), (overdraw,), (add_twice,), (add, "c"))
    refused, saved = refused_and_saved(answers)
    assert refused == 4
    assert saved == [1, 2, 3]
    assert sorted(server.texts) == ["a", "a!", "b", "b!", "c", "c!"]


def test_a_new_resource_is_judged_step_by_step_too(server: Place) -> None:
    def make(name: str) -> Train:
        return Train(name=name, taken=0, seats={})

    with server.direct.begin() as connection:
        connection.execute(sa.delete(Train))
    refused, saved = refused_and_saved(server.run((overdraw,), (overdraw,), *mixed(), missing=make))
    assert refused == 6
    assert saved == [1, 2, 3, 4]
    assert server.taken == 4


def test_a_new_resource_that_somebody_else_inserts_meanwhile_is_a_replay(server: Place) -> None:
    inserted: list[int] = []

    def insert_elsewhere(train: Train) -> int:
        if not inserted and train.taken == 0 and current_batch().completed:
            inserted.append(1)
            with server.direct.begin() as connection:
                connection.execute(sa.insert(Train).values(name="ICE 1", taken=7, seats={}, version=1))
        return take(train)

    with server.direct.begin() as connection:
        connection.execute(sa.delete(Train))
    runs = [(overdraw,), (overdraw,), (overdraw,), (insert_elsewhere,), (insert_elsewhere,), (overdraw,)]
    made = server.run(*runs, missing=lambda name: Train(name=name, taken=0, seats={}))
    refused, saved = refused_and_saved(made)
    assert refused == 4
    assert server.taken == saved[-1]
    assert saved[1] == saved[0] + 1


def test_operations_behind_a_deletion_are_judged_step_by_step_too(server: Place) -> None:
    def delete(train: Train) -> None:
        session_of(train).delete(train)

    runs = [*mixed(), (delete,), *mixed()]
    refused, saved = refused_and_saved(server.run(*runs, missing=lambda name: Train(name=name, taken=40, seats={})))
    assert refused == 8
    assert saved == [1, 2, 3, 4, None, 41, 42, 43, 44]
    assert server.taken == 44


# -- who is to blame for what a flush says -----------------------------------------------------------------------------


def ask(train: Train) -> int:
    return session_of(train).scalar(sa.select(sa.func.count()).select_from(Booking)) or 0


def ask_and_swallow(train: Train) -> int | None:
    with suppress(DBAPIError):
        return ask(train)
    return None


def ask_within_a_savepoint(train: Train) -> int:
    with session_of(train).begin_nested():
        return ask(train)


def ask_the_connection(train: Train) -> int:
    with session_of(train).no_autoflush:
        found: int = session_of(train).connection().scalar(sa.select(sa.func.count()).select_from(Booking)) or 0
        return found


@pytest.mark.parametrize("asking", [ask, ask_and_swallow, ask_within_a_savepoint, ask_the_connection])
def test_who_flushes_what_another_has_made_is_not_to_blame_for_it(
    server: Place, asking: Callable[[Train], Any]
) -> None:
    answers = server.run((take,), (overdraw,), (asking,), (take,))
    refused, saved = refused_and_saved(answers)
    assert refused == 1
    assert saved == [1, 0, 2]
    assert isinstance(answers[1], DBAPIError)
    assert server.taken == 2


def test_who_flushes_what_it_has_made_itself_is_to_blame(server: Place) -> None:
    def overdraw_and_ask(train: Train) -> None:
        ask(train)
        overdraw(train)
        ask(train)

    answers = server.run((take,), (overdraw_and_ask,), (take,))
    assert refused_and_saved(answers) == (1, [1, 2])
    assert server.taken == 2


def test_an_operation_finds_what_those_before_have_changed_whatever_way_it_asks(server: Place) -> None:
    def add(train: Train, text: str) -> None:
        session_of(train).add(Booking(text=text))

    maker = sessionmaker(server.engine, autoflush=False)
    assert server.run((add, "a"), (ask,), (add, "b"), (ask_the_connection,), bind=maker) == [None, 1, None, 2]


@pytest.mark.parametrize("asking", [ask, ask_the_connection])
def test_without_autoflush_an_operation_does_not_find_what_it_has_changed_itself(
    server: Place, asking: Callable[[Train], Any]
) -> None:
    def add_and_ask(train: Train, text: str) -> tuple[Any, Any]:
        take(train)
        session_of(train).add(Booking(text=text))
        return asking(train), session_of(train).scalar(sa.select(Train.taken))

    maker = sessionmaker(server.engine, autoflush=False)
    answers = server.run((add_and_ask, "a"), (take,), (add_and_ask, "b"), (add_and_ask, "c"), bind=maker)
    assert answers == [(0, 0), 2, (1, 2), (2, 3)]
    assert server.taken == 4
    assert server.texts == ["a", "b", "c"]


# -- values that nothing takes -----------------------------------------------------------------------------------------


VALUES: dict[str, tuple[str, object]] = {
    "a dict for a text": ("note", {"a": 1}),
    "a list for a number": ("taken", [1]),
    "a text for a number": ("taken", "many"),
    "too large a number": ("taken", 2**70),
    "NUL": ("note", "a\x00b"),
    "half a surrogate": ("note", "\ud800"),
    "an object": ("note", object()),
    "NaN in JSON": ("seats", {"a": float("nan")}),
    "what JSON cannot encode": ("seats", {"a": object()}),
    "nothing": ("seats", None),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("way", ["save", "flush", "row"])
def test_a_value_that_the_database_does_not_take_is_the_error_of_who_brought_it(
    opened: Callable[[Form], Place], value: str, way: str
) -> None:
    server = opened(Form("postgresql", "lock"))
    name, given = VALUES[value]

    def assign(train: Train) -> None:
        if way == "row":
            values = {"id": 9, "name": "other", "taken": 1, "version": 1, "seats": {}, name: given}
            current_batch().add_row((Train, values))
            return
        setattr(train, name, given)
        if way == "flush":
            session_of(train).flush()

    answers = server.run((take,), (assign,), (take,))
    if value == "nothing":  # which is JSON's null
        assert answers == [1, None, 2]
    else:
        assert answers[::2] == [1, 2]
        assert isinstance(answers[1], Exception)
    assert server.taken == 2


def test_rows_that_are_none_are_refused_to_who_added_them(place: Place) -> None:
    def add(train: Train, row: object) -> int:
        current_batch().add_row(row)
        return take(train)

    answers = place.run((take,), (add, 5), (add, (Booking, {"txt": "a"})), (add, (Booking, {"text": "a"})), (take,))
    assert [answers[0], answers[3], answers[4]] == [1, 2, 3]
    assert isinstance(answers[1], TypeError)
    assert isinstance(answers[2], (StatementError, sa.exc.SQLAlchemyError))
    assert place.texts == ["a"]


# -- listeners ---------------------------------------------------------------------------------------------------------


def test_listeners_hear_of_one_commit_however_many_steps_it_took(server: Place) -> None:
    heard: list[str] = []
    maker = sessionmaker(server.engine)
    for name in ("before_commit", "after_commit"):
        sa.event.listen(maker, name, lambda _, name=name: heard.append(name))
    refused, _ = refused_and_saved(server.run((take,), (overdraw,), (ask,), *mixed(), bind=maker))
    assert refused == 5
    assert heard == ["before_commit", "after_commit"]


def test_a_listener_that_raises_before_commit_has_nothing_saved_and_names_the_culprit(place: Place) -> None:
    def refuse(session: Any) -> None:
        if any(isinstance(one, Train) and one.taken > 100 for one in session.identity_map.values()):
            raise LookupError("too many")

    maker = sessionmaker(place.engine)
    sa.event.listen(maker, "before_commit", refuse)
    answers = place.run((take,), (take, 100), (take,), bind=maker)
    assert isinstance(answers[1], LookupError)
    assert answers[::2] == [1, 2]
    assert place.taken == 2


def test_a_listener_that_raises_after_commit_leaves_what_was_saved(server: Place) -> None:
    def refuse(_: object) -> None:
        raise LookupError("the search engine is down")

    maker = sessionmaker(server.engine)
    sa.event.listen(maker, "after_commit", refuse)
    assert server.run((take,), (take,), bind=maker) == [1, 2]
    assert server.taken == 2


def test_nobody_is_hurt_where_many_keys_are_refused_at_once(server: Place) -> None:
    names = [str(n) for n in range(4)]
    with server.direct.begin() as connection:
        connection.execute(sa.insert(Train), [{"name": n, "taken": 0, "version": 1, "seats": {}} for n in names])
    with Processor(open_resource=server.store(), min_duration=0.02, max_duration=30, max_batches=2) as opened:
        callers = [[gevent.spawn(answer_of, opened.run, name, *run) for run in mixed()] for name in names]
        answers = [[caller.get() for caller in some] for some in callers]
    assert [refused_and_saved(some) for some in answers] == [(4, [1, 2, 3, 4])] * 4

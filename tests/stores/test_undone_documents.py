"""An operation on a document, or on a resource in Redis, that raises changes nothing (guarantee 18)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.exc import StatementError

from geventbatch import ResourceMissing, current_batch
from geventbatch._batch import batch_at_hand
from tests.support.callers import answer_of
from tests.support.document_places import (
    EVENTS,
    PARAMETERS,
    Kind,
    NotEnough,
    Place,
    Train,
    book,
    look,
    opened_place,
    over,
    put,
    shown,
    spoil,
    take,
    together,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from geventbatch import Processor


@pytest.fixture(params=PARAMETERS, ids=str)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from opened_place(request.param, tmp_path)


# -- in one batch -----------------------------------------------------------------------------------------------


def test_what_an_operation_has_changed_before_it_raised_is_undone_however_deep(place: Place) -> None:
    with place.opened() as opened:
        assert together(opened, (put, 100), (book, "1", "Ann")) == [100, ["Ann"]]
    with place.opened() as opened:
        answers = together(
            opened,
            (spoil, "1"),
            (look,),
            (book, "1", "Bob"),
            (spoil, "1"),
            (look,),
            (put, 5),
            (book, "2", "Cy"),
            (spoil, "2"),
            (spoil, "1"),
            (look,),
        )
    assert shown(answers) == [
        "NotEnough('1')",
        {"total": 100, "seats": {"1": ["Ann"]}},
        ["Ann", "Bob"],
        "NotEnough('1')",
        {"total": 100, "seats": {"1": ["Ann", "Bob"]}},
        105,
        ["Cy"],
        "NotEnough('2')",
        "NotEnough('1')",
        {"total": 105, "seats": {"1": ["Ann", "Bob"], "2": ["Cy"]}},
    ]
    assert place.batches == place.attempts == 1
    with place.opened() as opened:
        assert opened.run("k", look) == answers[-1]


def test_who_is_refused_after_a_change_takes_nothing_from_a_new_one_either(place: Place) -> None:
    with place.opened() as opened:
        answers = together(opened, (take, 1), (put, 100), (take, 30), (take, 1000), (take, 30), (look,))
    assert shown(answers) == ["NotEnough(1)", 100, 70, "NotEnough(1000)", 40, {"total": 40, "seats": {}}]
    assert place.batches == place.attempts == 1
    with place.opened() as opened:
        assert opened.run("k", look) == {"total": 40, "seats": {}}


def test_nothing_is_saved_where_all_have_raised(place: Place) -> None:
    with place.opened(place.store(missing="raise")) as opened:
        assert isinstance(answer_of(opened.run, "k", look), ResourceMissing)
    with place.opened() as opened:
        assert shown(together(opened, *[(take, 1)] * 9)) == ["NotEnough(1)"] * 9
    assert place.batches == place.attempts == 1
    with place.opened(place.store(missing="raise")) as opened:
        assert isinstance(answer_of(opened.run, "k", look), ResourceMissing)


def test_of_a_thousand_of_whom_half_raise_everybody_finds_what_the_others_have_left(place: Place) -> None:
    runs: list[tuple[Any, ...]] = []
    expected: list[Any] = []
    total, wanted = 100, 0
    for number in range(1000):
        amount = number % 7 * 9
        if number % 3 == 0:
            total += amount
            runs.append((put, amount))
            expected.append(total)
        elif amount > total or number % 3 == 1:
            amount = total + 1 + number % 5
            runs.append((take, amount))
            expected.append(f"NotEnough({amount})")
            wanted += 1
        else:
            total -= amount
            runs.append((take, amount))
            expected.append(total)
    assert 300 < wanted < 700
    with place.opened() as opened:
        opened.run("k", put, 100)
    with place.opened(min_duration=10, max_batch_size=1000) as opened:
        assert shown(together(opened, *runs)) == expected
    assert place.batches == place.attempts == 1
    with place.opened() as opened:
        assert opened.run("k", look)["total"] == total


def test_an_answer_is_not_the_resource_that_is_undone(place: Place) -> None:
    def seats(resource: Any) -> Any:
        return resource["seats"]

    with place.opened() as opened:
        answers = together(opened, (book, "1", "Ann"), (seats,), (spoil, "1"), (book, "1", "Bob"), (seats,))
    assert shown(answers)[1:] == [{"1": ["Ann"]}, "NotEnough('1')", ["Ann", "Bob"], {"1": ["Ann", "Bob"]}]


def test_what_an_operation_has_put_there_of_its_arguments_is_not_what_the_next_one_has_made_of_it(place: Place) -> None:
    def place_in(resource: Any, seat: str, names: dict[str, Any]) -> None:
        resource["seats"][seat] = names

    def rename(resource: Any, seat: str) -> None:
        resource["seats"][seat]["names"].append("nobody")
        raise NotEnough(seat)

    runs: list[Any] = [
        (place_in, "1", {"names": ["Ann"]}),
        (rename, "1"),
        (place_in, "2", {"names": []}),
        (rename, "1"),
        (look,),
    ]
    with place.opened() as opened:
        assert together(opened, *runs)[-1]["seats"] == {"1": {"names": ["Ann"]}, "2": {"names": []}}
        assert opened.run("k", look)["seats"] == {"1": {"names": ["Ann"]}, "2": {"names": []}}


def test_what_only_an_operation_that_raised_wanted_to_delete_is_there(place: Place) -> None:
    def delete(resource: Any) -> None:
        current_batch().delete()
        take(resource, 1000)

    def end(_: Any) -> str:
        current_batch().delete()
        return "deleted"

    with place.opened() as opened:
        answers = together(opened, (put, 10), (delete,), (put, 1), (end,), (take, 1), (put, 7), (delete,), (look,))
    assert shown(answers) == [
        10,
        "NotEnough(1000)",
        11,
        "deleted",
        "NotEnough(1)",
        7,
        "NotEnough(1000)",
        {"total": 7, "seats": {}},
    ]
    with place.opened() as opened:
        assert opened.run("k", look)["total"] == 7


def test_what_cannot_be_encoded_is_the_error_of_who_has_made_it_and_of_no_one_who_raised(place: Place) -> None:
    thing: Any = (one for one in "ab")

    def hold(resource: Any) -> None:
        resource["seats"]["1"] = thing

    refused = StatementError if place.kind.state in {"JSON in text", "pickled"} else TypeError  # as SQLAlchemy says it
    kinds = [int, NotEnough, refused, NotEnough, int, NotEnough, KeyError, list]
    with place.opened() as opened:
        answers = together(
            opened,
            (put, 1),
            (take, 9),
            (hold,),
            (take, 9),
            (put, 1),
            (take, 8),
            (spoil, "2"),
            (book, "2", "Bob"),
            (look,),
        )
        assert [type(answer) for answer in answers[:-1]] == kinds
        assert (answers[0], answers[4]) == (1, 2)
        assert opened.run("k", look) == answers[-1] == {"total": 2, "seats": {"2": ["Bob"]}}


@over(
    Kind("sqlite"),
    Kind("sqlite", bulk=True),
    Kind("postgresql", "JSON"),
    Kind("postgresql", mode="version", reuse=True),
    Kind("redis"),
)
@pytest.mark.parametrize("where", [3, 100])
def test_what_cannot_be_encoded_is_found_without_applying_all_of_it_again_for_each_who_raises(
    place: Place, where: int
) -> None:
    applied = 0

    def hold(resource: Any) -> None:
        resource["seats"]["1"] = object()

    def pay(resource: Any, amount: int) -> int:
        nonlocal applied
        applied += 1
        return take(resource, amount)

    runs: list[Any] = [(pay, 1 if number % 2 else 1000) for number in range(200)]
    runs[where] = (hold,)
    with place.opened(max_batch_size=200) as opened:
        opened.run("k", put, 200)
        answers = together(opened, *runs)
        paid = runs.count((pay, 1))
        assert opened.run("k", look) == {"total": 200 - paid, "seats": {}}
    assert [answer for answer in answers if isinstance(answer, int)] == [199 - before for before in range(paid)]
    assert [number for number, answer in enumerate(answers) if not isinstance(answer, (int, NotEnough))] == [where]
    assert applied < 2 * 8 * 200  # two passes, of each of the halves in which it may be


@over(Kind("sqlite", bulk=True), Kind("postgresql", "JSONB", bulk=True), Kind("redis", bulk=True))
def test_in_a_bulk_each_key_is_undone_by_itself(place: Place) -> None:
    keys = [f"k{number}" for number in range(20)]
    runs = [(put, 10), (take, 11), (take, 3), (take, 8), (look,)]

    def all_of(opened: Processor[Any]) -> list[list[Any]]:
        callers = [[gevent.spawn(answer_of, opened.run, key, *run) for key in keys] for run in runs]
        gevent.joinall([caller for some in callers for caller in some])
        return [[some[number].value for some in callers] for number in range(len(keys))]

    with place.opened() as opened:
        expected = [10, "NotEnough(11)", 7, "NotEnough(8)", {"total": 7, "seats": {}}]
        assert [shown(answers) for answers in all_of(opened)] == [expected] * len(keys)
    assert place.attempts == len(keys)
    with place.opened() as opened:
        assert [opened.run(key, look)["total"] for key in keys] == [7] * len(keys)


SQL = [
    Kind("sqlite"),
    Kind("postgresql"),
    Kind("postgresql", mode="version", reuse=True),
    Kind("postgresql", bulk=True),
]


@over(*SQL)
def test_rows_are_those_of_operations_that_returned_each_once(place: Any) -> None:
    def noted(resource: Any, amount: int, text: str) -> int:
        current_batch().add_row((EVENTS, {"text": text}))
        return take(resource, amount)

    with place.opened() as opened:
        opened.run("k", put, 10)
        runs = [(noted, 30 if number % 2 else 0, f"{number:02}") for number in range(40)]
        assert sum(isinstance(answer, NotEnough) for answer in together(opened, *runs)) == 20
    with place.engine.connect() as connection:
        found = list(connection.scalars(sa.select(EVENTS.c.text).order_by(EVENTS.c.text)))
    assert found == [f"{number:02}" for number in range(0, 40, 2)]


@over(*SQL)
def test_a_row_is_what_its_operation_has_left_of_it_though_it_is_a_part_of_the_document_too(place: Any) -> None:
    def noted(resource: Any, text: str) -> None:
        entry: dict[str, str] = {}
        resource["seats"][text] = entry
        current_batch().add_row((EVENTS, entry))
        entry["text"] = text

    def rename(resource: Any, text: str, *, raises: bool = False) -> None:
        resource["seats"][text]["text"] = f"{text}, renamed"
        if raises:
            raise NotEnough(text)

    def fail(resource: Any, text: str) -> None:
        rename(resource, text, raises=True)

    runs = [(noted, "a"), (fail, "a"), (fail, "a"), (noted, "b"), (rename, "b"), (fail, "b"), (fail, "a"), (look,)]
    with place.opened() as opened:
        left = together(opened, *runs)[-1]
    assert left["seats"] == {"a": {"text": "a"}, "b": {"text": "b, renamed"}}
    with place.engine.connect() as connection:
        assert sorted(connection.scalars(sa.select(EVENTS.c.text))) == ["a", "b"]


@over(Kind("sqlite"), Kind("postgresql"), Kind("postgresql", mode="version", reuse=True), Kind("redis"))
def test_outcomes_are_recorded_of_who_raised_and_who_returned(place: Place) -> None:
    runs = [(put, 10), (take, 30), (take, 4), (take, 7), (put, 1)]

    def keyed(opened: Processor[Any]) -> list[Any]:
        callers = [
            gevent.spawn(answer_of, opened.run, "k", *run, idempotency_key=f"i{number}")
            for number, run in enumerate(runs)
        ]
        gevent.joinall(callers)
        return shown([caller.value for caller in callers])

    with place.opened() as opened:
        assert keyed(opened) == keyed(opened) == [10, "NotEnough(30)", 6, "NotEnough(7)", 7]
        assert opened.run("k", look)["total"] == 7


@over(Kind("sqlite", reuse=True), Kind("postgresql", mode="version", reuse=True), Kind("redis", reuse=True))
@pytest.mark.parametrize("batching", [True, False], ids=["batching", "alone"])
def test_a_key_of_who_raised_what_is_not_recorded_is_looked_for_where_nothing_was_loaded_too(
    place: Place, batching: bool
) -> None:
    with place.opened(recorded_errors=(KeyError,), batching=batching) as opened:
        assert answer_of(opened.run, "k", put, 10, idempotency_key="a") == 10  # from here on the resource is kept

        def keyed(*run: Any, key: str | None = None) -> gevent.Greenlet[..., Any]:
            return gevent.spawn(answer_of, opened.run, "k", *run, idempotency_key=key)

        for total in (9, 8):
            callers = [keyed(take, 30, key="b"), keyed(take, 1), keyed(put, 10, key="a")]
            assert shown([caller.get() for caller in callers]) == ["NotEnough(30)", total, 10]
        assert shown([keyed(take, 30, key="b").get()]) == ["NotEnough(30)"]  # with nothing to save
        assert opened.run("k", look)["total"] == 8


@over(Kind("sqlite"), Kind("postgresql"), Kind("postgresql", mode="version", reuse=True), Kind("redis"))
@pytest.mark.parametrize("batching", [True, False], ids=["batching", "alone"])
def test_who_comes_again_gets_what_was_saved_though_it_could_not_be_encoded_now(place: Place, batching: bool) -> None:
    def count(document: dict[str, Any]) -> int:
        document["total"] += 1
        if document["total"] > 1:
            document["seats"]["1"] = object()
        return int(document["total"])

    with place.opened(batching=batching) as opened:
        assert answer_of(opened.run, "k", count, idempotency_key="i") == 1
        callers = [gevent.spawn(answer_of, opened.run, "k", count, idempotency_key=key) for key in ["i", "j", "i"]]
        callers.append(gevent.spawn(answer_of, opened.run, "k", put, 5))
        first, refused, second, other = [caller.get() for caller in callers]
        assert (first, second, other) == (1, 1, 6)
        assert isinstance(refused, TypeError)
        assert opened.run("k", look)["total"] == 6


@over(
    Kind("sqlite", "object"), Kind("postgresql", "object"), Kind("redis", "object"), Kind("redis", "object", bulk=True)
)
def test_the_state_that_is_not_saved_is_undone_with_the_rest(place: Place) -> None:
    def note(train: Train, text: str, *, raises: bool = False) -> list[str]:
        train.noted.append(text)
        put(train, 1)
        if raises:
            raise NotEnough(text)
        return train.noted

    def fail(train: Train, text: str) -> list[str]:
        return note(train, text, raises=True)

    with place.opened() as opened:
        answers = together(opened, (note, "a"), (fail, "b"), (note, "c"))
    assert "b" not in answers[2]


@over(Kind("sqlite"), Kind("postgresql"), Kind("redis"), Kind("redis", bulk=True))
def test_where_a_resource_cannot_be_made_once_more_each_that_raised_costs_a_load(place: Place) -> None:
    decoded: set[int] = set()

    def decode(text: Any) -> Any:
        attempt = batch_at_hand().attempts
        if attempt in decoded:
            raise LookupError("only once in an attempt")
        decoded.add(attempt)
        return json.loads(text)

    with place.opened() as opened:
        opened.run("k", put, 10)
    with place.opened(place.store(encode=json.dumps, decode=decode)) as opened:
        answers = together(opened, (take, 11), (take, 3), (take, 8), (take, 7), (take, 1), (look,))
    assert shown(answers) == ["NotEnough(11)", 7, "NotEnough(8)", 0, "NotEnough(1)", {"total": 0, "seats": {}}]

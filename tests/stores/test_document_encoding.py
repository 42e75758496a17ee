"""A document comes back as operations have left it: what its encoding would lose is refused, for that operation."""

from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from datetime import date
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import redis
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects.postgresql import JSONB

from geventbatch import Processor
from geventbatch.stores import RedisStore, SQLAlchemyStore
from geventbatch.stores._json import check_lossless, encode, encode_compact
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.redis_server import redis_url

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVERS = [
    "sqlite",
    "postgresql",
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.fixture(params=SERVERS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    with fresh(request.param, tmp_path) as address:
        engine = PLACES[request.param](address).beside()
        yield engine
        engine.dispose()


def same(value: Any) -> Any:
    return value


def documents(engine: sa.Engine, **options: Any) -> SQLAlchemyStore[Any]:
    store = SQLAlchemyStore.documents(engine, "encoded", missing=lambda _: {"seats": {}}, **options)
    store.create_table()
    return store


def book(document: dict[str, Any], seat: Any, passenger: Any) -> int:
    document["seats"][seat] = passenger
    return len(document["seats"])


def together(processor: Processor[Any], *bookings: tuple[Any, Any], key: str = "k") -> list[Any]:
    """What the callers of a batch are told."""
    callers = [gevent.spawn(answer_of, processor.run, key, book, *booking) for booking in bookings]
    gevent.joinall(callers)
    return [caller.value for caller in callers]


def assert_only_the_culprits_are_told(opened: Processor[Any]) -> None:
    bookings = [("a", "Ann"), (12, "Bob"), ("b", "Bea"), ("c", ("Cy", 1)), ("d", "Dan"), (None, 1)]
    told = together(opened, *bookings)
    for (seat, passenger), answer in zip(bookings, told, strict=True):
        if isinstance(seat, str) and isinstance(passenger, str):
            assert isinstance(answer, int)
        else:
            assert type(answer) is TypeError
            assert "['seats']" in str(answer)
            assert repr(seat if isinstance(passenger, (str, int)) else passenger) in str(answer)
    assert opened.run("k", lambda document: document) == {"seats": {"a": "Ann", "b": "Bea", "d": "Dan"}}


@pytest.mark.parametrize("form", ["one", "bulk"])
@pytest.mark.parametrize("kind", ["text", "other text", "JSON", "JSONB"])
def test_what_json_loses_is_refused_for_the_operation_that_made_it(engine: sa.Engine, kind: str, form: str) -> None:
    options: dict[str, Any] = {}
    if kind == "other text":
        options = {"encode": lambda value: json.dumps(value, indent=1), "decode": json.loads}
    elif kind != "text":
        column = JSONB() if kind == "JSONB" and engine.dialect.name == "postgresql" else sa.JSON()
        options = {"state_type": column, "encode": same, "decode": same}
    store = documents(engine, **options)
    opens: Any = {"open_resources": store.open_resources} if form == "bulk" else {"open_resource": store}
    with Processor(**opens, min_duration=0.05, max_duration=30) as opened:
        assert_only_the_culprits_are_told(opened)


@pytest.mark.parametrize("form", ["one", "bulk"])
def test_in_redis_too_only_those_are_told_who_brought_what_cannot_be_encoded(form: str) -> None:
    client = redis.Redis.from_url(redis_url())
    store: RedisStore[Any] = RedisStore(client, prefix="encoded:", missing=lambda _: {"seats": {}})
    opens: Any = {"open_resources": store.open_resources} if form == "bulk" else {"open_resource": store}
    with Processor(**opens, min_duration=0.05, max_duration=30) as opened:
        assert_only_the_culprits_are_told(opened)
    client.delete("encoded:k")
    client.close()


def test_what_the_encoding_of_a_user_keeps_is_kept(engine: sa.Engine) -> None:
    store = documents(engine, encode=repr, decode=eval)
    with Processor(open_resource=store, min_duration=0.05, max_duration=30) as opened:
        assert together(opened, (12, "Bob"), ((1, 2), ("Cy", 1))) == [1, 2]
        assert opened.run("k", lambda document: document) == {"seats": {12: "Bob", (1, 2): ("Cy", 1)}}


def test_texts_that_the_database_does_not_take_are_the_error_of_one_operation(engine: sa.Engine) -> None:
    options: dict[str, Any] = {}
    if engine.dialect.name == "postgresql":
        options = {"state_type": JSONB(), "encode": same, "decode": same}
    with Processor(open_resource=documents(engine, **options), min_duration=0.05, max_duration=30) as opened:
        told = together(opened, ("a", "Ann"), ("b", "\0"), ("c", "\ud800"), ("d", "Dan"))
        there = opened.run("k", lambda document: document["seats"])
    assert {"a": "Ann", "d": "Dan"}.items() <= there.items()
    for answer, seat in zip(told, "abcd", strict=True):
        assert isinstance(answer, int) == (seat in there)
    if engine.dialect.name == "postgresql":
        assert [isinstance(answer, int) for answer in told] == [True, False, False, True]


# -- what is looked for -----------------------------------------------------------------------------------------


class Line(str, enum.Enum):  # noqa: UP042 - a StrEnum has the text of its value
    NORTH = "north"


class Level(enum.IntEnum):
    LOW = 1


ODD = st.one_of(st.tuples(st.integers()), st.tuples(), st.sampled_from([Line.NORTH, Level.LOW]))
NAMES = st.one_of(
    st.text(), st.text(), st.text(), st.integers(), st.booleans(), st.none(), st.sampled_from([Line.NORTH])
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text())


def _documents(names: st.SearchStrategy[Any], leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def inside(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        dicts = st.dictionaries(names, inner, max_size=4)
        return st.one_of(dicts, st.lists(inner, max_size=4), dicts.map(OrderedDict))

    return st.recursive(leaves, inside, max_leaves=20)


@settings(max_examples=60, deadline=None)
@given(st.one_of(_documents(NAMES, st.one_of(LEAVES, ODD)), _documents(st.text(), LEAVES)))
def test_what_would_come_back_otherwise_is_refused_and_nothing_else(document: Any) -> None:
    text = json.dumps(document)
    assert encode(document) == text
    assert json.loads(encode_compact(document)) == json.loads(text)
    lost = answer_of(check_lossless, document)
    assert (lost is None) == (json.loads(text) == document)
    assert lost is None or type(lost) is TypeError


def test_what_is_equal_to_nothing_comes_back() -> None:
    check_lossless({"a": [math.nan, math.inf]})


def test_the_message_says_where_it_is_and_what_to_do() -> None:
    told = str(answer_of(check_lossless, {"cars": [{}, {"seats": {12: "Ann"}}]}))
    assert "the name 12 of the document at ['cars'][1]['seats'] is no text, and JSON would give back '12'" in told
    assert "encode=" in told
    told = str(answer_of(check_lossless, {"cars": [("a", 1)]}))
    assert "the tuple ('a', 1) of the document at ['cars'][0]" in told


@pytest.mark.parametrize("encoder", [encode, encode_compact])
@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({12: ({}, {"at": date(2026, 8, 1)})}, "the date datetime.date(2026, 8, 1) of the document at [12][1]['at']"),
        ({"seats": {("car 1", 12): "Ann"}}, "the name ('car 1', 12) of the document at ['seats'] is no text"),
    ],
)
def test_what_json_has_nothing_for_is_told_with_its_place_and_what_to_do(
    encoder: Any, document: Any, told: str
) -> None:
    refused = answer_of(encoder, document)
    assert type(refused) is TypeError
    assert told in str(refused)
    assert "Nothing of this operation was saved" in str(refused)
    assert "encode=" in str(refused)


@pytest.mark.parametrize("encoder", [encode, encode_compact])
def test_a_circle_is_told_as_one(encoder: Any) -> None:
    document: dict[str, Any] = {}
    document["itself"] = document
    with pytest.raises(ValueError, match="Circular"):
        encoder(document)

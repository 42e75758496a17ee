"""What comes of a batch is what would come of its operations one by one, but for what docs/as-if-alone.md names."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import gevent
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session

from geventbatch import Processor, current_batch
from geventbatch.errors import Rejected
from geventbatch.stores import SQLAlchemyStore
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from pathlib import Path


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stocks"
    id: Mapped[int] = mapped_column(primary_key=True)
    left: Mapped[int] = mapped_column(sa.CheckConstraint('"left" >= 0'))
    saves: Mapped[int] = mapped_column(default=1)


class Written(Base):
    __tablename__ = "written"
    id: Mapped[int] = mapped_column(primary_key=True)
    left: Mapped[int]


_TRIGGER = """
CREATE TRIGGER remember AFTER UPDATE ON stocks BEGIN INSERT INTO written ("left") VALUES (new."left"); END
"""


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'stocks.sqlite'}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(_TRIGGER)
        connection.execute(sa.insert(Stock).values(id=1, left=5, saves=1))
    return engine


def take(stock: Stock, pieces: int) -> int:
    stock.left -= pieces
    return stock.left


def in_one_batch(engine: sa.Engine, *operations: tuple[Any, ...]) -> list[Any]:
    store = SQLAlchemyStore.mapped(engine, Stock, version="saves")
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        callers = [gevent.spawn(answer_of, processor.run, 1, *operation) for operation in operations]
        return [caller.get() for caller in callers]


def rows(engine: sa.Engine, statement: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def test_what_is_done_at_each_write_is_done_once_for_a_batch(engine: sa.Engine) -> None:
    assert in_one_batch(engine, (take, 1), (take, 1), (take, 1)) == [4, 3, 2]
    assert rows(engine, 'SELECT "left", saves FROM stocks') == [(2, 2)]
    assert rows(engine, 'SELECT "left" FROM written') == [(2,)]  # one by one: 4, 3, 2


def test_a_constraint_judges_the_state_that_is_saved_and_not_the_ones_between(engine: sa.Engine) -> None:
    assert in_one_batch(engine, (take, 7), (take, -3)) == [-2, 1]
    assert rows(engine, 'SELECT "left" FROM stocks') == [(1,)]


def test_rows_given_to_add_row_are_not_found_by_queries_before_the_save(engine: sa.Engine) -> None:
    def remember(stock: Stock) -> None:
        current_batch().add_row(Written(left=stock.left + 100))

    def count(stock: Stock) -> int | None:
        session = object_session(stock)
        assert session is not None
        return session.scalar(sa.select(sa.func.count()).select_from(Written))

    assert in_one_batch(engine, (remember,), (count,)) == [None, 0]  # one by one: 1
    assert rows(engine, 'SELECT "left" FROM written WHERE "left" > 100') == [(105,)]


def test_one_list_in_two_places_of_a_document_is_one_until_the_save(engine: sa.Engine) -> None:
    def share(document: dict[str, list[int]]) -> None:
        document["copy"] = document["first"]

    def append(document: dict[str, list[int]]) -> list[int]:
        document["first"].append(2)
        return document["copy"]

    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {"first": [1]})
    store.create_table()
    with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "a", one) for one in (share, append)]
        assert [caller.get() for caller in callers] == [None, [1, 2]]  # one by one: [1]
        assert processor.run("a", append) == [1, 2]  # as it is loaded, "copy" is a list of its own


def test_one_list_in_two_documents_that_an_operation_has_put_there_is_one_until_the_save(engine: sa.Engine) -> None:
    def share(documents: tuple[dict[str, list[int]], ...]) -> None:
        documents[1]["copy"] = documents[0]["first"]

    def append(document: dict[str, list[int]]) -> None:
        document["first"].append(2)

    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {"first": [1]})
    store.create_table()
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=10) as processor:
        callers = [
            gevent.spawn(answer_of, processor.run_across, ["a", "b"], share),
            gevent.spawn(answer_of, processor.run, "a", append),
        ]
        assert [caller.get() for caller in callers] == [None, None]
        assert processor.run("b", lambda document: document["copy"]) == [1, 2]  # one by one: [1]


def test_an_operation_that_raised_has_changed_nothing_of_a_list_that_another_document_has_too(
    engine: sa.Engine,
) -> None:
    def work() -> None:
        """Take longer than a copy, so that the state is copied behind it."""
        end = time.process_time() + 0.005
        while time.process_time() < end:
            pass

    def share(documents: tuple[dict[str, Any], ...]) -> None:
        work()
        documents[1]["copy"] = documents[0]["first"]

    def count(document: dict[str, Any]) -> None:
        work()
        document["count"] = document.get("count", 0) + 1

    def append(document: dict[str, Any]) -> None:
        document["first"].append(2)
        raise LookupError

    store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: {"first": [1]})
    store.create_table()
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=10) as processor:
        callers = [gevent.spawn(answer_of, processor.run_across, ["a", "b"], share)]
        callers += [gevent.spawn(answer_of, processor.run, "a", one) for one in (count, append) * 6]
        answers = [caller.get() for caller in callers]
        assert [type(answer) for answer in answers] == [type(None), *[type(None), LookupError] * 6]
        assert processor.run("a", lambda document: document) == {"first": [1], "count": 6}
        assert processor.run("b", lambda document: document) == {"first": [1], "copy": [1]}


def test_what_an_operation_across_keys_has_changed_before_it_raised_is_in_no_document_of_a_json_column(
    engine: sa.Engine,
) -> None:
    def change(documents: tuple[dict[str, Any], ...]) -> None:
        documents[1]["n"] += 1
        raise LookupError

    def set_text(document: dict[str, Any]) -> None:
        document["text"] = "x"

    options: dict[str, Any] = {"state_type": sa.JSON(), "encode": lambda found: found, "decode": lambda state: state}
    store = SQLAlchemyStore.documents(engine, "documents", mode="version", missing=lambda _: {"n": 5}, **options)
    store.create_table()
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=10) as processor:
        processor.run_across(["a", "b"], lambda documents: [document.update(made=True) for document in documents])
        callers = [
            gevent.spawn(answer_of, processor.run_across, ["a", "b"], change),
            gevent.spawn(answer_of, processor.run, "a", set_text),
        ]
        assert [type(caller.get()) for caller in callers] == [LookupError, type(None)]
        assert processor.run("a", lambda document: document) == {"n": 5, "made": True, "text": "x"}
        assert processor.run("b", lambda document: document) == {"n": 5, "made": True}


class Judging:
    """Refuses what operations have marked as bad. Where it is left without a save, somebody else writes."""

    kept: ClassVar[dict[str, int]] = {}

    def __init__(self, _: object) -> None:
        self.resource = dict(self.kept)

    def __enter__(self) -> dict[str, int]:
        return self.resource

    def operation_returned(self) -> Rejected | None:
        return Rejected("it is bad") if "bad" in self.resource else None

    def __exit__(self, kind: object, *_: object) -> None:
        self.kept["n"] = 10 if kind is not None else self.resource["n"]


class Enough(Exception):
    pass


def test_who_was_refused_stays_so_though_somebody_else_changes_the_row_before_the_others_are_applied_again() -> None:
    def add(resource: dict[str, int], *, bad: bool) -> int:
        if resource["n"] > 6:
            raise Enough
        resource["n"] += 1
        if bad:
            resource["bad"] = 1
            current_batch().ask_scope()
        return resource["n"]

    Judging.kept = {"n": 5}
    with Processor(open_resource=Judging, min_duration=0, max_duration=10, clean_errors=(Enough,)) as processor:
        callers = [gevent.spawn(answer_of, processor.run, "k", partial(add, bad=bad)) for bad in (False, True)]
        first, second = (caller.get() for caller in callers)
    assert isinstance(first, Enough)  # of what somebody else has written
    assert isinstance(second, Rejected)  # of what was there before

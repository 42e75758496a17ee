"""What a trigger leaves out of the save of documents is the error of the operation that it is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from sqlalchemy.pool import NullPool

from geventbatch import Processor, SaveFailed, current_batch
from geventbatch.stores import SQLAlchemyStore
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.policies import hidden_for_writing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import sqlalchemy as sa

    from tests.support.adapters.sqlalchemy import Server

FUNCTION = """
    CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF NEW.state LIKE '%%bad%%' THEN RETURN NULL; END IF; RETURN NEW; END $$
"""
TRIGGER = "CREATE TRIGGER leave_out BEFORE INSERT OR UPDATE ON left_out FOR EACH ROW EXECUTE FUNCTION leave_out()"
KEEP = """
    CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
    CREATE TRIGGER keep BEFORE DELETE ON left_out FOR EACH ROW EXECUTE FUNCTION keep()
"""
ON_SQLITE = """
    CREATE TRIGGER leave_out BEFORE UPDATE ON left_out FOR EACH ROW WHEN NEW.state LIKE '%bad%'
    BEGIN SELECT RAISE(IGNORE); END
"""
WAYS = [
    pytest.param("postgresql", {"mode": mode, "pipeline": pipeline}, id=f"{mode}-{'joined' if pipeline else 'plain'}")
    for mode in ("lock", "version")
    for pipeline in (True, False)
]
WITH_SQLITE = [*WAYS, pytest.param("sqlite", {}, id="sqlite")]


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    server: Server = getattr(request, "param", "postgresql")
    with fresh(server, tmp_path) as address:
        engine = PLACES[server](address).beside()
        yield engine
        engine.dispose()


def store_of(engine: sa.Engine, **options: Any) -> SQLAlchemyStore[Any]:
    options = {"missing": lambda _: {"all": []}, **options}
    store = SQLAlchemyStore.documents(engine, "left_out", **options)
    store.create_table()
    with engine.begin() as connection:
        for statement in (ON_SQLITE,) if engine.dialect.name == "sqlite" else (FUNCTION, TRIGGER, KEEP):
            connection.exec_driver_sql(statement)
    return store


def put(document: dict[str, Any], what: str) -> int:
    document["all"].append(what)
    return len(document["all"])


def put_all(processor: Processor[Any], *runs: tuple[str, str]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, put, what) for key, what in runs]
    return [caller.get() for caller in callers]


@pytest.mark.parametrize(("engine", "options"), WITH_SQLITE, indirect=["engine"])
@pytest.mark.parametrize("bulk", [True, False])
def test_a_change_that_a_trigger_leaves_out_fails_its_own_operation_only(
    engine: sa.Engine, bulk: bool, options: dict[str, Any]
) -> None:
    store = store_of(engine, **options)
    how: Any = {"open_resources": store.open_resources} if bulk else {"open_resource": store}
    with Processor[Any](**how, min_duration=0.05, max_duration=20) as processor:
        assert put_all(processor, ("a", "1"), ("b", "1"), ("c", "1")) == [1, 1, 1]
        answers = put_all(processor, ("a", "2"), ("b", "bad"), ("b", "2"), ("c", "2"))
        assert (answers[0], answers[2], answers[3]) == (2, 2, 2)
        assert isinstance(answers[1], RuntimeError)
        assert "the database has left it out" in str(answers[1])
        assert [processor.run(key, lambda document: document["all"]) for key in "abc"] == [["1", "2"]] * 3


@pytest.mark.parametrize(("engine", "options"), WITH_SQLITE, indirect=["engine"])
@pytest.mark.parametrize("batching", [True, False])
def test_who_is_alone_is_told_what_was_left_out_in_the_first_attempt_that_may_be_the_last(
    engine: sa.Engine, options: dict[str, Any], batching: bool
) -> None:
    store = store_of(engine, **options)
    with Processor(open_resource=store, min_duration=0, batching=batching, max_attempts=1) as processor:
        assert processor.run("a", put, "1") == 1
        assert "the database has left it out" in str(answer_of(processor.run, "a", put, "bad"))
        assert processor.run("a", put, "2") == 2


@pytest.mark.parametrize(("engine", "options"), WAYS, indirect=["engine"])
@pytest.mark.parametrize("bulk", [True, False])
def test_a_new_document_that_a_trigger_leaves_out_is_the_error_of_who_made_it(
    engine: sa.Engine, bulk: bool, options: dict[str, Any]
) -> None:
    store = store_of(engine, **options)
    how: Any = {"open_resources": store.open_resources} if bulk else {"open_resource": store}
    with Processor[Any](**how, min_duration=0.05, max_duration=20) as processor:
        answers = put_all(processor, ("a", "1"), ("b", "bad"), ("c", "1"), ("b", "1"))
        assert (answers[0], answers[2], answers[3]) == (1, 1, 1)
        assert "the database has left it out" in str(answers[1])


@pytest.mark.parametrize(("engine", "options"), WAYS, indirect=["engine"])
@pytest.mark.parametrize("bulk", [True, False])
def test_a_deletion_that_a_trigger_leaves_out_is_the_error_of_its_own_operation(
    engine: sa.Engine, bulk: bool, options: dict[str, Any]
) -> None:
    store = store_of(engine, **options)
    how: Any = {"open_resources": store.open_resources} if bulk else {"open_resource": store}
    with Processor[Any](**how, min_duration=0.05, max_duration=20) as processor:
        assert put_all(processor, ("a", "1"), ("b", "1")) == [1, 1]
        callers = [
            gevent.spawn(answer_of, processor.run, "a", put, "2"),
            gevent.spawn(answer_of, processor.run, "a", lambda _: current_batch().delete()),
            gevent.spawn(answer_of, processor.run, "a", put, "3"),
            gevent.spawn(answer_of, processor.run, "b", put, "2"),
        ]
        answers = [caller.get() for caller in callers]
        assert (answers[0], answers[2], answers[3]) == (2, 3, 2)
        assert "the database has left it out" in str(answers[1])


@pytest.mark.parametrize(("engine", "options"), WAYS[2:], indirect=["engine"])
def test_a_change_that_a_policy_hides_fails_its_own_operation_only(engine: sa.Engine, options: dict[str, Any]) -> None:
    store_of(engine, **options)
    with engine.begin() as connection:
        connection.exec_driver_sql("""INSERT INTO left_out VALUES ('a', '{"all": []}', 1), ('b', '{"all": []}', 1)""")
    with hidden_for_writing(engine, "left_out", "key <> 'b'", poolclass=NullPool) as clerk:
        store = SQLAlchemyStore.documents(clerk, "left_out", **options)
        with Processor(open_resource=store, min_duration=0.02, max_duration=20) as processor:
            answers = put_all(processor, ("a", "1"), ("b", "1"), ("b", "2"))
            assert answers[0] == 1
            assert all("a policy that hides it" in str(answer) for answer in answers[1:])


def test_a_true_conflict_is_told_as_one(engine: sa.Engine) -> None:
    store = store_of(engine, mode="version")

    def raced(document: dict[str, Any]) -> None:
        document["all"].append("mine")
        with engine.begin() as connection:
            connection.exec_driver_sql("UPDATE left_out SET version = version + 1")

    with Processor(open_resource=store, min_duration=0, max_duration=20, max_attempts=3) as processor:
        assert processor.run("a", put, "1") == 1
        failed = answer_of(processor.run, "a", raced)
        assert isinstance(failed, SaveFailed)
        assert failed.retry_safe
        assert "somebody else changed it" in str(failed)


# -- across keys ------------------------------------------------------------------------------------------------


def put_each(documents: tuple[dict[str, Any], ...], *whats: str) -> list[int]:
    return [put(document, what) for document, what in zip(documents, whats, strict=True)]


@pytest.mark.parametrize(
    ("engine", "options", "new"),
    [
        *(pytest.param(*way.values, new, id=f"{way.id}-{new}") for way in WAYS for new in (True, False)),
        pytest.param("sqlite", {}, False, id="sqlite"),
    ],
    indirect=["engine"],
)
def test_what_is_left_out_at_one_key_is_the_error_of_its_operation_across_keys_and_nothing_of_that_is_saved(
    engine: sa.Engine, options: dict[str, Any], new: bool
) -> None:
    store = store_of(engine, **options)
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=20, workers=1) as processor:
        if not new:
            assert put_all(processor, *[(key, "0") for key in "abcde"]) == [1] * 5
        before = [] if new else ["0"]
        runs = [("ab", "1", "1"), ("bc", "2", "bad"), ("bc", "3", "3"), ("de", "bad", "1"), ("fg", "1", "1")]
        callers = [gevent.spawn(answer_of, processor.run_across, list(keys), put_each, *whats) for keys, *whats in runs]
        first, left_out, third, other, last = [caller.get() for caller in callers]
        for refused in (left_out, other):
            assert isinstance(refused, RuntimeError)
            assert "the database has left it out" in str(refused)
        count = len(before)
        assert (first, third, last) == ([count + 1] * 2, [count + 2, count + 1], [1, 1])
        found = {key: processor.run(key, lambda document: document["all"], read_only=True) for key in "abcdefg"}
    saved = {"a": ["1"], "b": ["1", "3"], "c": ["3"], "d": [], "e": [], "f": ["1"], "g": ["1"]}
    assert found == {key: (before if key in "abcde" else []) + some for key, some in saved.items()}

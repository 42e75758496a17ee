"""What became of a save whose COMMIT raised: one table for all SQL stores (geventbatch/stores/_sql/commit.py)."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import gevent
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from geventbatch import Conflict, NotSaved, Processor, Rejected, SaveFailed
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores._sql import commit as _commit
from tests.support.adapters.base import case_named
from tests.support.adapters.sqlalchemy import PLACES, fresh
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from geventbatch.testing import VirtualTime
    from tests.support.adapters.base import Adapter


def server_error(state: str | None, parent: type[psycopg.Error] = psycopg.OperationalError) -> psycopg.Error:
    error = parent(f"it failed with {state}")
    error.sqlstate = state
    return error


LOST = server_error(None)

# -- the table itself ------------------------------------------------------------------------------------------


TABLE: list[tuple[bool | None, Exception, bool | Literal["not asked"] | None, type[NotSaved] | str]] = [
    # what this side knows of COMMIT, what was raised, what the server answers, what became of it
    (True, LOST, "not asked", "saved"),
    (True, server_error("23505"), "not asked", "saved"),  # of what a hook has sent, to another database perhaps
    (True, Conflict("of a hook"), "not asked", "saved"),
    (True, LookupError("of a hook"), "not asked", "saved"),
    (False, LOST, "not asked", NotSaved),
    (False, server_error("23505"), "not asked", Rejected),
    (False, server_error("40001"), "not asked", Conflict),
    (False, server_error(None, psycopg.DataError), "not asked", Rejected),
    (False, Rejected("of a scope"), "not asked", Rejected),
    (None, server_error("23503"), "not asked", Rejected),
    (None, server_error("P0001"), "not asked", Rejected),
    (None, server_error("40001"), "not asked", Conflict),
    (None, server_error("53100"), "not asked", NotSaved),
    (None, server_error(None, psycopg.DataError), "not asked", Rejected),
    (None, Conflict("of a scope"), "not asked", Conflict),
    (None, LOST, True, "saved"),
    (None, LOST, False, Conflict),
    (None, LOST, None, "unknown"),
    (None, server_error("57P01"), None, "unknown"),
    (None, LookupError("of a hook"), True, "saved"),
    (None, LookupError("of a hook"), False, Conflict),
    (None, LookupError("of a hook"), None, "unknown"),
]


@pytest.mark.parametrize(
    ("told", "error", "answer", "becomes"),
    [pytest.param(*one, id="-".join([str(one[0]), repr(one[1]), str(one[2])])) for one in TABLE],
)
def test_what_became_of_a_commit_is_what_the_server_said(
    told: bool | None, error: Exception, answer: Any, becomes: Any
) -> None:
    asked: list[object] = []

    def ask() -> bool | None:
        asked.append(answer)
        return bool(answer) if answer is not None else None

    resolve = partial(_commit.resolve, error, "ICE 1", told=told, ask=ask)
    if becomes == "saved":
        resolve()
    elif becomes == "unknown":
        with pytest.raises(type(error)) as unknown:
            resolve()
        assert unknown.value is error
    else:
        with pytest.raises(NotSaved) as raised:
            resolve()
        assert type(raised.value) is becomes
        assert error in {raised.value, raised.value.__cause__}
    assert asked == ([] if answer == "not asked" else [answer])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["committed"], True),
        (["aborted"], False),
        ([None], None),
        (["in progress", _commit.NO_ANSWER, "committed"], True),
        (["in progress"] * 1000, None),
        ([_commit.NO_ANSWER] * 1000, None),
    ],
    ids=["committed", "aborted", "too long ago", "in progress first", "in progress", "cannot be asked"],
)
def test_postgresql_is_asked_until_it_knows_or_the_time_is_over(
    clock: VirtualTime, answers: list[str | None], expected: bool | None
) -> None:
    left = iter(answers)
    assert _commit.postgres_fate("1 0", lambda _: next(left), 0.02) is expected
    assert (clock.now() == pytest.approx(0.02)) is (len(answers) == 1000)


# -- the same over both ORMs, on a real server -----------------------------------------------------------------

Fate = Literal["committed", "rolled back", "untouched"]


class Spoiled:
    """The ORM's own way to send COMMIT, which goes wrong once."""

    def __init__(self, error: Exception, fate: Fate) -> None:
        self.error = error
        self.fate = fate
        self.happened = 0

    def commit(self, raw: Any) -> None:
        """In place of ``raw.commit()``."""
        if self.happened:
            raw.commit()
            return
        self.happened += 1
        if self.fate != "untouched":
            raw.commit() if self.fate == "committed" else raw.rollback()
        raise self.error


@contextmanager
def spoiled(name: str, directory: Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoiled) -> Iterator[Adapter]:
    case = case_named(name)
    with case.fresh(directory) as address, case.opens(address) as opened:
        adapter: Any = opened
        if name.startswith("sqlalchemy"):
            adapter.engine.connect().close()  # else SQLAlchemy commits when it looks at the server
            monkeypatch.setattr(adapter.engine.dialect, "do_commit", spoil.commit)
            adapter.processor()  # so that the store has seen to it
        else:
            from django.db import connections
            from django.db.backends.postgresql.base import DatabaseWrapper

            original = DatabaseWrapper._commit  # type: ignore[attr-defined] # it has no types

            def commit(self: Any) -> None:
                if self.alias != adapter._alias:
                    original(self)
                    return
                with self.wrap_database_errors:
                    spoil.commit(self.connection)

            monkeypatch.setattr(DatabaseWrapper, "_commit", commit)
            connections[adapter._alias].close()
        opened.put("k", 1)
        yield opened


@pytest.mark.parametrize(
    ("error", "fate", "becomes"),
    [
        (server_error("23503", psycopg.IntegrityError), "rolled back", "rejected"),
        (server_error("P0001", psycopg.DatabaseError), "rolled back", "rejected"),
        (server_error("40001"), "rolled back", "replayed"),
        (server_error("53100"), "rolled back", "not saved"),
        (server_error(None, psycopg.DataError), "untouched", "rejected"),
        (LookupError("of a hook before"), "untouched", "rejected"),
        (LookupError("of a hook behind"), "committed", "saved"),
        (LOST, "committed", "saved"),
        (LOST, "rolled back", "replayed"),
    ],
    ids=lambda value: str(value).replace(" ", "-"),
)
@pytest.mark.parametrize("name", ["sqlalchemy-document-lock-postgresql-plain", "django-version-postgresql-plain"])
def test_both_orms_find_out_what_became_of_a_commit_that_raised(  # noqa: PLR0917 - of pytest
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, fate: Fate, becomes: str
) -> None:
    spoil = Spoiled(error, fate)
    with spoiled(name, tmp_path, monkeypatch, spoil) as adapter:
        runs: list[int] = []

        def operation(resource: Any) -> int:
            runs.append(adapter.add(resource, 1))
            return runs[-1]

        with adapter.processor(max_duration=20) as processor:
            answer = answer_of(processor.run, "k", operation)
        assert spoil.happened == 1
        if becomes in {"saved", "replayed"}:
            assert answer == 2
            assert runs == [2] * (1 if becomes == "saved" else 2)
        elif becomes == "rejected":
            assert isinstance(answer, Exception)
            assert not isinstance(answer, SaveFailed)
            assert str(error) in str(answer)
        else:
            assert isinstance(answer, SaveFailed)
            assert answer.retry_safe
        assert adapter.get("k") == (2 if becomes in {"saved", "replayed"} else 1)


# -- what listeners and hooks do -------------------------------------------------------------------------------


class Base(DeclarativeBase):
    pass


class Seat(Base):
    __tablename__ = "hooked_seats"
    name: Mapped[str] = mapped_column(sa.String(20), primary_key=True)
    n: Mapped[int] = mapped_column(default=0)


def count(seat: Seat) -> int:
    seat.n += 1
    return seat.n


@pytest.mark.parametrize(
    ("server", "pipeline"),
    [
        ("postgresql", True),
        ("postgresql", False),
        ("sqlite", True),
        pytest.param("mariadb", True, marks=pytest.mark.mariadb),
    ],
)
def test_a_hook_that_raises_after_commit_is_logged_with_the_key_and_the_batch_is_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, server: Any, pipeline: bool
) -> None:
    with fresh(server, tmp_path) as address:
        engine = PLACES[server](address).engine(None)
        Base.metadata.create_all(engine)
        with Session(engine) as session, session.begin():
            session.add(Seat(name="a"))
        maker: sessionmaker[Session] = sessionmaker(engine, class_=type("Hooked", (Session,), {}))
        called: list[str] = []

        def search_engine_is_down(session: Session, *_: object) -> None:
            if session.bind is not engine:  # that of a batch is on its connection
                called.append("called")
                raise OSError("the search engine is down")

        event.listen(maker.class_, "after_commit", search_engine_is_down)
        store = SQLAlchemyStore.mapped(maker, Seat, pipeline=pipeline)
        with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
            together = [gevent.spawn(processor.run, "a", count) for _ in range(3)]
            assert [one.get() for one in together] == [1, 2, 3]
        assert called
        wait_until(lambda: bool(caplog.records))
        assert any("batch of key 'a', which was saved: OSError" in record.message for record in caplog.records)
        with Session(engine) as session:
            assert session.get_one(Seat, "a").n == 3
        engine.dispose()


@pytest.mark.parametrize(
    ("server", "pipeline"),
    [("postgresql", False), ("sqlite", True), pytest.param("mariadb", True, marks=pytest.mark.mariadb)],
)
def test_a_listener_that_raises_before_commit_has_nothing_saved_by_that_batch_nor_by_the_next(
    tmp_path: Path, server: Any, pipeline: bool
) -> None:
    with fresh(server, tmp_path) as address:
        engine = PLACES[server](address).engine(None, pool_size=1, max_overflow=0)
        Base.metadata.create_all(engine)
        with Session(engine) as session, session.begin():
            session.add_all([Seat(name="a"), Seat(name="b")])

        def full(_: object) -> None:
            raise OSError("the log of the application is full")

        store = SQLAlchemyStore.mapped(engine, Seat, pipeline=pipeline)
        with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
            event.listen(engine, "commit", full)
            answer = answer_of(processor.run, "a", count)
            event.remove(engine, "commit", full)
            assert isinstance(answer, OSError)
            assert processor.run("b", count) == 1
        with Session(engine) as session:
            assert [session.get_one(Seat, name).n for name in "ab"] == [0, 1]
        engine.dispose()


# -- what others write around a statement ----------------------------------------------------------------------


def comment_behind(*call: Any) -> tuple[str, Any]:
    return f"{call[2]} -- by the seats' controller", call[3]


def comment_before(*call: Any) -> tuple[str, Any]:
    return f"/* controller='seats' */ {call[2]}", call[3]


@pytest.mark.parametrize("comment", [comment_before, comment_behind])
@pytest.mark.parametrize("form", ["document", "mapped"])
@pytest.mark.parametrize(
    ("server", "pipeline"),
    [
        ("postgresql", True),
        ("postgresql", False),
        ("sqlite", True),
        pytest.param("mariadb", True, marks=pytest.mark.mariadb),
    ],
)
def test_a_listener_that_adds_comments_to_sql_breaks_nothing(
    tmp_path: Path, server: Any, form: str, pipeline: bool, comment: Callable[..., Any]
) -> None:
    with fresh(server, tmp_path) as address:
        engine = PLACES[server](address).engine(None)
        event.listen(engine, "before_cursor_execute", comment, retval=True)
        Base.metadata.create_all(engine)
        for first, mode in ((1, "version"), (4, "version" if server == "sqlite" else "lock")):
            options: Any = {"pipeline": pipeline, "mode": mode}
            if form == "mapped":
                store: Any = SQLAlchemyStore.mapped(engine, Seat, missing=lambda key: Seat(name=key, n=0), **options)
                operation: Any = count
            else:
                store = SQLAlchemyStore.documents(engine, "documents", missing=lambda _: [0], **options)
                operation = count_document
            with Processor(open_resource=store, min_duration=0, max_duration=10) as processor:
                assert processor.run("a", operation) == first
                together = [gevent.spawn(processor.run, "a", operation) for _ in range(2)]
                assert [one.get() for one in together] == [first + 1, first + 2]
        engine.dispose()


def count_document(document: list[int]) -> int:
    document[0] += 1
    return document[0]


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("behind", [True, False])
def test_a_wrapper_of_djangos_that_adds_comments_to_sql_breaks_nothing(
    tmp_path: Path, pipeline: bool, behind: bool
) -> None:
    from django.db.backends.signals import connection_created

    def comment(execute: Callable[..., Any], sql: Any, *args: Any) -> Any:
        return execute(f"{sql} -- by the seats' controller" if behind else f"/* controller='seats' */ {sql}", *args)

    def wrap(connection: Any, **_: object) -> None:
        connection.execute_wrappers.append(comment)

    case = case_named(f"django-version-postgresql{'' if pipeline else '-plain'}")
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 1)
        connection_created.connect(wrap)
        try:
            with adapter.processor(missing="make", max_duration=20) as processor:
                assert processor.run("k", adapter.add, 1) == 2
                together = [gevent.spawn(processor.run, "k", adapter.add, 1) for _ in range(2)]
                assert [one.get() for one in together] == [3, 4]
                assert processor.run("new", adapter.add, 1) == 1
        finally:
            connection_created.disconnect(wrap)
        assert adapter.get("k") == 4
        assert adapter.get("new") == 1


@pytest.mark.parametrize("text", ["rows were changed in place of another", "geventbatch: the row has changed"])
@pytest.mark.parametrize("name", ["sqlalchemy-document-lock-postgresql", "django-version-postgresql"])
def test_a_users_text_in_an_error_is_never_taken_for_a_conflict(tmp_path: Path, name: str, text: str) -> None:
    case = case_named(name)
    with case.fresh(tmp_path) as address, case.opens(address) as adapter:
        adapter.put("k", 1)
        runs: list[int] = []

        def refused(resource: Any) -> int:
            runs.append(1)
            return adapter.add_with_row(resource, 1, text)

        with adapter.processor(max_duration=20) as processor:
            processor.run("k", adapter.add_with_row, 1, text)
            answer = answer_of(processor.run, "k", refused)
        assert "IntegrityError" in type(answer).__name__
        assert runs == [1]

"""What an operation may do in the session of its batch, and what becomes of the others when it does something else."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, make_transient, sessionmaker

from geventbatch import ResourceMissing, current_batch
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


@pytest.fixture
def sqlite(opened: Callable[[Form], Place]) -> Place:
    return opened(Form("sqlite", "version"))


# -- the transaction is the batch's ------------------------------------------------------------------------------


def do(what: Callable[[Any, Train], object]) -> Callable[[Train], None]:
    """An operation that changes the resource, does *what* with the session, and goes on as if all were well."""

    def operation(train: Train) -> None:
        take(train, 100)
        what(session_of(train), train)

    return operation


ENDING: dict[str, Callable[[Any, Train], object]] = {
    "commit": lambda session, _: session.commit(),
    "rollback": lambda session, _: session.rollback(),
    "close": lambda session, _: session.close(),
    "reset": lambda session, _: session.reset(),
    "invalidate": lambda session, _: session.invalidate(),
    "with session": lambda session, _: session.__exit__(None, None, None),
    "expunge_all": lambda session, _: session.expunge_all(),
    "rollback of the transaction": lambda session, _: session.get_transaction().rollback(),
    "commit of the transaction": lambda session, _: session.get_transaction().commit(),
    "rollback of the connection": lambda session, _: session.connection().rollback(),
    "commit of the connection": lambda session, _: session.connection().commit(),
    "close of the connection": lambda session, _: session.connection().close(),
    "execution options": lambda session, _: session.connection(execution_options={"stream_results": False}),
    "execution options of the connection": lambda session, _: session.connection().execution_options(
        stream_results=False
    ),
    "a listener": lambda session, _: sa.event.listen(session, "after_commit", lambda _: None),
    "expunge": lambda session, train: session.expunge(train),
    "make_transient": lambda _, train: make_transient(train),
}

STATEMENTS = ["ROLLBACK", "  /* so */ COMMIT", "SAVEPOINT mine", "BEGIN"]
SETTINGS = ["SET application_name = 'x'", "SELECT set_config('application_name', 'x', false)", "SET ROLE postgres"]
SETTINGS += ["CREATE TEMPORARY TABLE mine (id int)", "SELECT pg_advisory_lock(1)"]


@pytest.mark.parametrize("ending", ENDING.values(), ids=ENDING)
def test_who_would_end_the_transaction_or_take_something_out_of_it_is_refused_alone(
    place: Place, ending: Callable[[Any, Train], object]
) -> None:
    answers = place.run((take,), (take,), (do(ending),), (take,))
    assert answers[:2] == [1, 2]
    assert answers[3] == 3
    assert isinstance(answers[2], RuntimeError)
    assert "an operation on 'ICE 1'" in str(answers[2])
    assert place.taken == 3


@pytest.mark.parametrize("ending", ENDING.values(), ids=ENDING)
def test_nobody_else_is_hurt_when_such_an_operation_swallows_the_refusal(
    place: Place, ending: Callable[[Any, Train], object]
) -> None:
    def swallow(train: Train) -> None:
        with suppress(Exception):
            do(ending)(train)

    answers = place.run((take,), (swallow,), (take,))
    added = 100 if answers[1] is None else 0
    assert answers[::2] == [1, 2 + added]
    assert place.taken == 2 + added


@pytest.mark.parametrize("statement", [*STATEMENTS, *SETTINGS])
@pytest.mark.parametrize("way", ["text", "driver", "connection"])
def test_a_statement_that_would_reach_others_is_refused_to_who_sends_it(opened: Any, statement: str, way: str) -> None:
    server = opened(Form("postgresql", "lock"))

    def send(train: Train) -> None:
        take(train, 100)
        session = session_of(train)
        if way == "text":
            session.execute(sa.text(statement))
        elif way == "driver":
            session.connection().exec_driver_sql(statement)
        else:
            session.connection().execute(sa.text(statement))

    answers = server.run((take,), (send,), (take,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], RuntimeError)
    assert server.taken == 2


def test_a_savepoint_that_an_operation_leaves_open_is_saved_as_it_would_be_alone(server: Place) -> None:
    def leave_open(train: Train) -> int:
        session_of(train).begin_nested()
        return take(train)

    assert server.run((take,), (leave_open,), (take,), (leave_open,), (take,)) == [1, 2, 3, 4, 5]
    assert server.taken == 5
    assert server.attempts() == [1]


def test_who_goes_on_after_an_error_outside_of_a_savepoint_is_out_and_nobody_else(opened: Any) -> None:
    server = opened(Form("postgresql", "lock"))

    def swallow(train: Train) -> int:
        with suppress(sa.exc.DBAPIError):
            session_of(train).execute(sa.text("SELECT * FROM nowhere"))
        return take(train, 100)

    answers = server.run((take,), (swallow,), (take,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], RuntimeError)
    assert "went on after a statement of it had failed" in str(answers[1])
    assert server.taken == 2
    assert server.attempts() == [2]


# -- what an operation sets is its own ---------------------------------------------------------------------------


def test_what_an_operation_sets_in_the_session_is_gone_behind_it(place: Place) -> None:
    seen: list[Any] = []

    def settings(session: Any) -> tuple[Any, ...]:
        bind = session.bind
        return session.autoflush, session.expire_on_commit, bind, dict(session.info), session.execution_options

    def look(train: Train) -> None:
        seen.append(settings(session_of(train)))

    def set_all(train: Train) -> tuple[Any, ...]:
        session: Any = session_of(train)
        session.autoflush = not session.autoflush
        session.expire_on_commit = True
        session.bind = place.direct
        session.info["tenant"] = "mine"
        session.info.update(of="me")
        session.info.pop("kept")
        session.execution_options = {"x": 1}
        return settings(session)

    def set_and_raise(train: Train) -> None:
        set_all(train)
        raise LookupError

    maker = sessionmaker(place.engine, info={"kept": "the application's"})
    runs = (look,), (set_all,), (look,), (set_and_raise,), (look,), (take,)
    answers = place.run(*runs, bind=maker, clean_errors=(LookupError,))
    assert answers[1][3] == {"tenant": "mine", "of": "me"}
    assert isinstance(answers[3], LookupError)
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][3] == {"kept": "the application's"}
    assert place.taken == 1


def test_what_the_applications_own_listeners_keep_in_the_session_stays(server: Place) -> None:
    published: list[str] = []
    maker = sessionmaker(server.engine)
    sa.event.listen(
        maker, "after_flush", lambda session, _: session.info.setdefault("new", []).extend(o.text for o in session.new)
    )
    sa.event.listen(maker, "after_commit", lambda session: published.extend(session.info.pop("new")))

    def book(train: Train, text: str) -> None:
        session = session_of(train)
        session.add(Booking(text=text))
        session.flush()

    assert server.run((book, "a"), (book, "b"), bind=maker) == [None, None]
    assert published == ["a", "b"]


def test_a_listener_that_an_operation_added_and_then_raised_is_never_called(place: Place) -> None:
    called: list[object] = []

    def listen_and_raise(train: Train) -> None:
        sa.event.listen(session_of(train), "after_commit", called.append)
        raise LookupError

    answers = place.run((take,), (listen_and_raise,), (take,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], LookupError)
    assert called == []
    assert place.taken == 2


def test_a_listener_is_refused_too_where_each_session_has_one_of_its_own_for_that(place: Place) -> None:
    called: list[str] = []

    class Listening(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            sa.event.listen(self, "after_commit", lambda _: called.append("the application's"))

    def listen(train: Train) -> None:
        take(train, 100)
        sa.event.listen(session_of(train), "after_commit", lambda _: called.append("an operation's"))

    answers = place.run((take,), (listen,), (take,), bind=sessionmaker(place.engine, class_=Listening))
    assert answers[::2] == [1, 2]
    assert "added a listener" in str(answers[1])
    assert place.taken == 2
    assert set(called) == {"the application's"}


def test_who_swallows_a_refusal_does_not_have_the_next_one_take_its_blame(place: Place) -> None:
    def commit(train: Train) -> None:
        with suppress(RuntimeError):
            session_of(train).commit()

    def look_and_raise(train: Train) -> None:
        raise KeyError(train.name)

    answers = place.run((take,), (commit,), (look_and_raise,), (take,), clean_errors=(KeyError,))
    assert answers[:2] == [1, None]
    assert isinstance(answers[2], KeyError)
    assert answers[3] == 2
    assert place.attempts() == [1]


def test_what_the_application_sets_when_a_transaction_begins_is_set_for_savepoints_too(opened: Any) -> None:
    server = opened(Form("postgresql", "lock"))
    maker = sessionmaker(server.engine)
    sa.event.listen(
        maker, "after_begin", lambda _, __, connection: connection.exec_driver_sql("SET LOCAL app.tenant = 'north'")
    )

    def tenant(train: Train) -> Any:
        with session_of(train).begin_nested():
            return session_of(train).scalar(sa.text("SELECT current_setting('app.tenant')"))

    assert server.run((take,), (tenant,), bind=maker) == [1, "north"]


# -- everything that operations changed is saved -------------------------------------------------------------------


ANEW: dict[str, Callable[[Any, Train], object]] = {
    "refresh": lambda session, train: session.refresh(train),
    "refresh with a lock": lambda session, train: session.refresh(train, with_for_update=True),
    "refresh of an attribute": lambda session, train: session.refresh(train, ["taken"]),
    "expire": lambda session, train: session.expire(train),
    "expire_all": lambda session, _: session.expire_all(),
    "get": lambda session, train: session.get(Train, train.id, populate_existing=True),
    "select": lambda session, _: session.scalars(sa.select(Train).execution_options(populate_existing=True)).all(),
    "execute": lambda session, _: session.execute(
        sa.select(Train), execution_options={"populate_existing": True}
    ).all(),
    "query": lambda session, _: session.query(Train).populate_existing().all(),
    "merge": lambda session, _: session.merge(Train(id=1, name="ICE 1", taken=0, version=1, seats={}), load=False),
}


@pytest.mark.parametrize("autoflush", [True, False])
@pytest.mark.parametrize("anew", [one for name, one in ANEW.items() if name != "merge"], ids=[*ANEW][:-1])
def test_what_is_loaded_anew_has_the_changes_of_the_operations_before(
    server: Place, anew: Callable[[Any, Train], object], autoflush: bool
) -> None:
    def change(train: Train) -> None:
        take(train)
        train.seats[str(train.taken)] = "taken"

    def load_anew(train: Train) -> int:
        anew(session_of(train), train)
        return train.taken

    maker = sessionmaker(server.engine, autoflush=autoflush)
    assert server.run((change,), (change,), (load_anew,), (change,), bind=maker) == [None, None, 2, None]
    assert server.taken == 3
    assert server.scalar(sa.select(Train.seats)) == {"1": "taken", "2": "taken", "3": "taken"}


@pytest.mark.parametrize("anew", [one for name, one in ANEW.items() if name != "merge"], ids=[*ANEW][:-1])
def test_on_sqlite_what_others_have_changed_is_saved_before_it_is_loaded_anew(
    sqlite: Place, anew: Callable[[Any, Train], object]
) -> None:
    def load_anew(train: Train) -> int:
        anew(session_of(train), train)
        return take(train)

    assert sqlite.run((take,), (take,), (load_anew,), (take,)) == [1, 2, 3, 4]
    assert sqlite.taken == 4


def test_what_an_operation_has_changed_itself_is_forgotten_when_it_loads_it_anew_as_it_would_be_alone(
    place: Place,
) -> None:
    def change_and_refresh(train: Train) -> int:
        take(train, 100)
        session_of(train).refresh(train)
        return take(train)

    assert place.run((change_and_refresh,), (take,), (change_and_refresh,), (take,)) == [1, 2, 3, 4]
    assert place.taken == 4


def test_a_query_finds_what_those_before_have_changed(place: Place) -> None:
    def book(train: Train, text: str) -> None:
        session_of(train).add(Booking(text=text))

    def count(train: Train) -> int:
        with session_of(train).no_autoflush:
            session_of(train).add(Booking(text=f"not yet {current_batch().completed} {train.taken}"))
            found = session_of(train).scalar(sa.select(sa.func.count()).select_from(Booking))
        return found or 0

    assert place.run((book, "a"), (count,), (take,), (count,), (book, "b"), (take,)) == [None, 1, 1, 2, None, 2]
    assert place.taken == 2


def test_on_sqlite_what_nobody_has_changed_may_be_loaded_anew(sqlite: Place) -> None:
    sqlite.book("a")

    def load_anew(train: Train) -> str:
        (booking,) = train.bookings
        session_of(train).refresh(booking)
        return booking.text

    assert sqlite.run((load_anew,), (take,), (load_anew,)) == ["a", 1, "a"]
    assert sqlite.taken == 1


def test_a_child_that_was_changed_before_is_not_lost_when_it_is_loaded_anew_or_let_go(server: Place) -> None:
    server.book("a", "b")

    def rename(train: Train) -> None:
        for booking in train.bookings:
            booking.text += "+"

    def refresh(train: Train) -> list[str]:
        session_of(train).refresh(train.bookings[0])
        return [booking.text for booking in train.bookings]

    def expunge(train: Train) -> None:
        train.bookings[1].text += "!"
        session_of(train).expunge(train.bookings[1])

    answers = server.run((rename,), (refresh,), (expunge,), (take,))
    assert answers[:2] == [None, ["a+", "b+"]]
    assert isinstance(answers[2], RuntimeError)
    assert server.texts == ["a+", "b+"]


def test_what_an_operation_has_added_itself_it_may_take_out_again(place: Place) -> None:
    def change_mind(train: Train) -> None:
        booking = Booking(text="no")
        session_of(train).add(booking)
        session_of(train).expunge(booking)

    assert place.run((take,), (change_mind,), (take,)) == [1, None, 2]
    assert place.texts == []
    assert place.attempts() == [1]


# -- deletions -----------------------------------------------------------------------------------------------------


def delete(train: Train) -> None:
    session_of(train).delete(train)


DELETIONS: dict[str, Callable[[Any, Train], object]] = {
    "delete": lambda session, train: session.delete(train),
    "delete_all": lambda session, train: session.delete_all([train]),
    "delete and flush": lambda session, train: (session.delete(train), session.flush()),
    "delete()": lambda session, train: session.execute(sa.delete(Train).where(Train.name == train.name)),
    "query": lambda session, _: session.query(Train).filter_by(name="ICE 1").delete(),
    "text": lambda session, _: session.execute(sa.text("DELETE FROM mapped_trains WHERE name = 'ICE 1'")),
    "a CTE": lambda session, _: session.execute(
        sa.text("WITH gone AS (DELETE FROM mapped_trains WHERE name = 'ICE 1' RETURNING 1) SELECT count(*) FROM gone")
    ),
    "the driver": lambda session, _: session.connection().exec_driver_sql("DELETE FROM mapped_trains"),
    "current_batch": lambda *_: current_batch().delete(),
}
ON_SQLITE = ("delete", "delete_all", "current_batch")


@pytest.mark.parametrize("deletion", DELETIONS)
def test_operations_behind_a_deletion_find_what_the_next_load_gives(place: Place, deletion: str) -> None:
    sqlite, mariadb = place.form.server == "sqlite", place.form.server == "mariadb"
    if (sqlite and deletion not in ON_SQLITE) or (mariadb and deletion == "a CTE"):
        return
    answers = place.run(
        (take,), (lambda train: DELETIONS[deletion](session_of(train), train) and None,), (take,), (take,)
    )
    assert answers[:2] == [1, None]
    assert [type(answer) for answer in answers[2:]] == [ResourceMissing, ResourceMissing]
    assert place.taken is None


def test_operations_behind_a_deletion_work_on_what_is_made_anew(place: Place) -> None:
    answers = place.run((take,), (delete,), (take,), (take,), missing=lambda name: Train(name=name, taken=40, seats={}))
    assert answers == [1, None, 41, 42]
    assert place.taken == 42


@pytest.mark.parametrize("way", ["orm", "text", "driver", "session off"])
def test_an_update_by_a_statement_counts_on_what_those_before_have_changed(server: Place, way: str) -> None:
    def add_ten(train: Train) -> None:
        session = session_of(train)
        update = "UPDATE mapped_trains SET taken = taken + 10"
        if way == "orm":
            session.execute(sa.update(Train).values(taken=Train.taken + 10))
        elif way == "driver":
            session.connection().exec_driver_sql(update)
        else:
            session.execute(sa.text(update))

    maker = sessionmaker(server.engine, autoflush=way != "session off")
    assert server.run((take,), (add_ten,), (take,), (take,), bind=maker) == [1, None, 12, 13]
    assert server.taken == 13


def test_children_that_a_statement_has_changed_are_seen_by_the_operations_behind(server: Place) -> None:
    server.book("a", "b")

    def texts(train: Train) -> list[str]:
        return [booking.text for booking in train.bookings]

    def cancel(train: Train) -> None:
        session_of(train).execute(sa.text("DELETE FROM mapped_bookings WHERE text = 'a'"))

    def book(train: Train) -> None:
        session_of(train).execute(sa.insert(Booking).values(text="c", train_id=train.id))

    answers = server.run((texts,), (cancel,), (texts,), (book,), (texts,))
    assert answers == [["a", "b"], None, ["b"], None, ["b", "c"]]


def test_rows_that_statements_insert_beside_what_is_held_do_not_divide_the_batch(server: Place) -> None:
    def book(train: Train, text: str) -> int:
        session_of(train).execute(sa.insert(Booking).values(text=text))
        return take(train)

    assert server.run(*[(book, str(n)) for n in range(5)]) == [1, 2, 3, 4, 5]
    assert server.attempts() == [1]
    assert server.texts == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("bulk", ["objects", "inserts", "updates"])
def test_the_bulk_methods_of_the_session_come_behind_what_those_before_have_changed(server: Place, bulk: str) -> None:
    def write(train: Train) -> None:
        session = session_of(train)
        if bulk == "objects":
            session.bulk_save_objects([Booking(text="bulk")])
        elif bulk == "inserts":
            session.bulk_insert_mappings(sa.inspect(Booking), [{"text": "bulk"}])
        else:
            session.bulk_update_mappings(sa.inspect(Train), [{"id": 1, "note": "bulk"}])

    assert server.run((take,), (write,), (take,), bind=sessionmaker(server.engine, autoflush=False)) == [1, None, 2]
    assert server.taken == 2
    assert server.texts == ([] if bulk == "updates" else ["bulk"])
    assert server.scalar(sa.select(Train.note)) == ("bulk" if bulk == "updates" else None)


# -- what spoils, and what does not ----------------------------------------------------------------------------------


class Refused(Exception):
    pass


READING: dict[str, Callable[[Any, Train], object]] = {
    "nothing": lambda *_: None,
    "a query": lambda session, _: session.scalars(sa.select(Booking)).all(),
    "a CTE": lambda session, _: session.execute(sa.text("WITH x AS (SELECT 1 AS one) SELECT one FROM x")).all(),
    "a CTE that updates by name only": lambda session, _: session.execute(
        sa.text("WITH x AS (SELECT 'UPDATE' AS \"delete\" FROM mapped_trains FOR UPDATE) SELECT count(*) FROM x")
    ),
    "a comment": lambda session, _: session.execute(sa.text("/* so */ SELECT 1")).all(),
    "brackets": lambda session, _: session.execute(sa.text("(SELECT 1)")).all(),
    "a CTE of SQLAlchemy's": lambda session, _: session.execute(sa.select(sa.select(Train.id).cte("x"))).all(),
    "a savepoint": lambda session, _: session.begin_nested().rollback(),
}


@pytest.mark.parametrize("reading", READING.values(), ids=READING)
def test_clean_errors_cost_nothing_though_others_have_deleted_and_they_have_read(
    opened: Any, reading: Callable[[Any, Train], object]
) -> None:
    server = opened(Form("postgresql", "lock"))
    server.book("a", "b")

    def cancel(train: Train) -> None:
        session = session_of(train)  # by itself: one of a collection that is loaded would cut the batch
        session.delete(session.scalars(sa.select(Booking).where(Booking.text == "a")).one())

    def refuse(train: Train) -> None:
        reading(session_of(train), train)
        raise Refused

    answers = server.run((cancel,), *[(refuse,)] * 40, (take,), clean_errors=(Refused,))
    assert answers[0] is None
    assert answers[-1] == 1
    assert {type(answer) for answer in answers[1:-1]} == {Refused}
    assert server.texts == ["b"]
    assert server.attempts() == [1]


@pytest.mark.parametrize(
    "statement",
    [
        "WITH x AS (INSERT INTO mapped_bookings (text) VALUES ('x') RETURNING 1) SELECT 1 FROM x",
        "/* so */ INSERT INTO mapped_bookings (text) VALUES ('x')",
        "EXPLAIN ANALYZE INSERT INTO mapped_bookings (text) VALUES ('x')",
    ],
)
def test_what_writes_in_whatever_form_is_undone_when_its_operation_raises(opened: Any, statement: str) -> None:
    server = opened(Form("postgresql", "lock"))

    def write(train: Train) -> None:
        session_of(train).execute(sa.text(statement))
        raise Refused

    answers = server.run((take,), (write,), (take,), clean_errors=(Refused,))
    assert answers[::2] == [1, 2]
    assert isinstance(answers[1], Refused)
    assert server.texts == []
    assert server.taken == 2


# -- relationships -----------------------------------------------------------------------------------------------------


def texts_of(train: Train) -> list[str]:
    return [booking.text for booking in train.bookings]


def test_a_child_that_an_operation_appended_before_it_raised_is_in_no_collection(place: Place) -> None:
    def append(train: Train) -> None:
        train.bookings.append(Booking(text="no"))
        raise Refused

    def refer(train: Train) -> None:
        session_of(train).add(Booking(text="no", train=train))
        raise Refused

    def append_and_remove(train: Train) -> None:
        booking = Booking(text="no")
        train.bookings.append(booking)
        train.bookings.remove(booking)
        raise Refused

    def book(train: Train, text: str) -> list[str]:
        train.bookings.append(Booking(text=text))
        return texts_of(train)

    runs = [(book, "a"), (append,), (texts_of,), (append_and_remove,), (texts_of,), (refer,), (book, "b")]
    answers = place.run(*runs, clean_errors=(Refused,))
    assert [answers[0], answers[2], answers[4], answers[6]] == [["a"], ["a"], ["a"], ["a", "b"]]
    assert place.texts == ["a", "b"]


def test_children_go_and_come_through_collections(place: Place) -> None:
    place.book("a", "b", "c")

    def remove(train: Train, text: str) -> list[str]:
        train.bookings.remove(next(booking for booking in train.bookings if booking.text == text))
        return texts_of(train)

    def book(train: Train, text: str) -> list[str]:
        train.bookings.append(Booking(text=text))
        return texts_of(train)

    def cancel(train: Train, text: str) -> None:
        session_of(train).delete(next(booking for booking in train.bookings if booking.text == text))

    def add_again(train: Train) -> None:
        session_of(train).add(next(booking for booking in train.bookings if booking.text == "d"))

    answers = place.run((remove, "a"), (book, "d"), (add_again,), (remove, "d"), (book, "e"), (cancel, "b"))
    assert answers == [["b", "c"], ["b", "c", "d"], None, ["b", "c"], ["b", "c", "e"], None]
    assert place.texts == ["c", "e"]


def test_who_adds_again_what_another_has_added_takes_nothing_out_when_it_raises(place: Place) -> None:
    held: list[Booking] = []

    def book(train: Train) -> None:
        held.append(Booking(text="a"))
        session_of(train).add(held[-1])

    def add_again(train: Train) -> None:
        session_of(train).add(held[-1])
        raise Refused

    answers = place.run((book,), (add_again,), (take,), clean_errors=(Refused,))
    assert isinstance(answers[1], Refused)
    assert place.texts == ["a"]

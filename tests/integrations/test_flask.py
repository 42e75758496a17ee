"""The Flask integration: contexts, Flask-SQLAlchemy's session, configuration, error answers."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from flask import Flask, current_app, g, has_request_context, request, session
from flask.globals import app_ctx
from flask_sqlalchemy import SQLAlchemy
from gevent.event import Event
from sqlalchemy.orm import Mapped, mapped_column, object_session

import geventbatch
from geventbatch import (
    BatchAborted,
    BatchError,
    BatchTimeout,
    IdempotencyKeyReused,
    ProcessorOverloaded,
    ProcessorStopped,
    ResourceMissing,
    current_batch,
)
from geventbatch.integrations.flask import AppProcessor, GeventBatch
from geventbatch.stores import SQLAlchemyStore
from geventbatch.stores.sqlalchemy import idempotency_table
from geventbatch.testing import ImpureOperation, check_operations, faults
from tests.support.answers import Make, Told, check, each_accept, each_error, form_of
from tests.support.callers import answer_of
from tests.support.servers import database, wait_until

if TYPE_CHECKING:
    from geventbatch.errors import Phase


def flask_app(**config: Any) -> Flask:
    app = Flask(__name__)
    app.secret_key = "for tests"  # noqa: S105
    app.config.update(TESTING=False, **config)
    return app


@pytest.fixture(autouse=True)
def _all_are_stopped() -> Iterator[None]:
    yield
    assert geventbatch.stop_all(timeout=10)


# Contexts.


class Words(list[str]):
    """A resource that operations put words into."""

    def put(self, *words: str) -> int:
        self.extend(words)
        return len(self)


def put_what_is_seen(words: Words) -> None:
    words.put(f"{request.args['name']} {session['name']} {g.name} {current_app.name}")


@contextmanager
def serving(app: Flask, batches: GeventBatch, operate: Callable[[], Any]) -> Iterator[Any]:
    """Give a client of *app*, whose one view calls *operate*."""

    @app.post("/")
    def view() -> dict[str, Any]:
        session["name"] = g.name = request.args["name"]
        return {"answer": operate()}

    batches.init_app(app)
    yield app.test_client()


@pytest.fixture(params=[True, False], ids=["batching", "batching=False"])
def batching(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_an_operation_sees_the_request_the_session_and_the_g_of_its_own_caller(batching: bool) -> None:
    saved: list[str] = []
    batches = GeventBatch()
    words = batches.processor(
        load_resource=lambda key: Words(), save_resource=lambda key, words: saved.extend(words), min_duration=0
    )
    app = flask_app(GEVENTBATCH_BATCHING=batching)
    with serving(app, batches, lambda: words.run("k", put_what_is_seen)) as client:
        asked = [gevent.spawn(client.post, f"/?name={name}") for name in ("Ann", "Bob", "Cid")]
        assert [one.get().status_code for one in asked] == [200] * 3

    assert sorted(saved) == [f"{name} {name} {name} {app.name}" for name in ("Ann", "Bob", "Cid")]


def test_a_bulk_has_an_application_context_of_its_own(batching: bool) -> None:
    saved: dict[str, Words] = {}
    loads: list[list[str]] = []
    batches = GeventBatch()

    def load(keys: list[str]) -> dict[str, Words]:
        loads.append(keys)
        g.name = "the bulk's"
        return {key: Words() for key in keys}

    def save(words: dict[str, Words]) -> None:
        assert g.name == "the bulk's"
        saved.update(words)

    words = batches.processor(load_resources=load, save_resources=save, min_duration=0)
    app = flask_app(GEVENTBATCH_BATCHING=batching)
    with serving(app, batches, lambda: words.run(request.args["name"], put_what_is_seen)) as client:
        asked = [gevent.spawn(client.post, f"/?name={name}") for name in ("Ann", "Bob", "Cid")]
        assert [one.get().status_code for one in asked] == [200] * 3

    assert saved == {name: [f"{name} {name} {name} {app.name}"] for name in ("Ann", "Bob", "Cid")}
    assert loads == ([["Ann", "Bob", "Cid"]] if batching else [["Ann"], ["Bob"], ["Cid"]])


def test_an_operation_that_waits_keeps_its_callers_g_and_the_save_has_the_batchs_own(batching: bool) -> None:
    seen: list[object] = []
    batches = GeventBatch()

    def load(key: str) -> Words:
        g.name = "the batch's"
        return Words()

    def wait(words: Words) -> None:
        gevent.sleep(0)
        seen.append(g.name)

    words = batches.processor(load_resource=load, save_resource=lambda key, words: seen.append(g.name), min_duration=0)
    with serving(flask_app(GEVENTBATCH_BATCHING=batching), batches, lambda: words.run("k", wait)) as client:
        assert client.post("/?name=Ann").status_code == 200

    assert seen == ["Ann", "the batch's"]


def test_load_and_save_share_an_application_context_that_is_torn_down_after_the_save(batching: bool) -> None:
    log: list[object] = []
    contexts: list[object] = []
    batches = GeventBatch()
    app = flask_app(GEVENTBATCH_BATCHING=batching)

    def note(what: str) -> None:
        contexts.append(app_ctx._get_current_object())  # type: ignore[attr-defined]
        log.append((what, current_app.name == app.name, has_request_context()))

    def load(key: str) -> Words:
        note("load")
        return Words()

    words = batches.processor(load_resource=load, save_resource=lambda key, words: note("save"), min_duration=0)
    app.teardown_appcontext(lambda error: note("teardown"))
    batches.init_app(app)
    with app.app_context():
        words.run("k", Words.put, "a")
        assert log == [("load", True, False), ("save", True, False), ("teardown", True, False)]
        words.run("k", Words.put, "a")
        first, second = contexts[:3], contexts[3:]
        assert len(set(first)) == len(set(second)) == 1
        assert len({first[0], second[0], app_ctx._get_current_object()}) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("failing", ["open", "load", "save"])
def test_the_context_is_torn_down_with_what_failed(failing: str, batching: bool) -> None:
    torn_down: list[BaseException | None] = []

    class Scope:
        def __init__(self, key: str) -> None:
            self._check("open")

        def __enter__(self) -> Words:
            self._check("load")
            return Words()

        def __exit__(self, *raised: object) -> None:
            self._check("save")

        def _check(self, step: str) -> None:
            if step == failing:
                raise ConnectionResetError(step)

    batches = GeventBatch()
    words = batches.processor(open_resource=Scope, min_duration=0)
    app = flask_app(GEVENTBATCH_BATCHING=batching)
    app.teardown_appcontext(torn_down.append)
    batches.init_app(app)
    with app.app_context():
        with pytest.raises(BatchError) as failed:
            words.run("k", Words.put, "a")
        assert torn_down == [failed.value.__cause__]


def test_a_teardown_function_that_fails_makes_no_save_fail(batching: bool, caplog: pytest.LogCaptureFixture) -> None:
    batches = GeventBatch()
    words = batches.processor(load_resource=lambda key: Words(), min_duration=0)
    app = flask_app(GEVENTBATCH_BATCHING=batching)
    batches.init_app(app)

    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        if not has_request_context() and getattr(g, "is_test", None) is None:
            raise ConnectionResetError

    with app.app_context():
        g.is_test = True
        assert words.run("k", Words.put, "a") == 1

    assert "a teardown function failed after a batch" in caplog.text


def test_a_kill_in_a_teardown_function_ends_the_worker_although_another_error_takes_its_place() -> None:
    batches = GeventBatch()
    words = batches.processor(load_resource=lambda key: Words(), min_duration=0)
    app = flask_app()
    batches.init_app(app)
    workers: list[Any] = []

    @app.teardown_appcontext
    def wait(error: BaseException | None) -> None:
        if not workers and getattr(g, "is_test", None) is None:
            workers.append(gevent.getcurrent())
            try:
                Event().wait()
            finally:
                raise ConnectionResetError

    with app.app_context():
        g.is_test = True
        caller = gevent.spawn(answer_of, copy_context().run, words.run, "k", Words.put, "a")
        wait_until(lambda: workers)
        workers[0].kill(block=False)
        assert type(caller.get()) is BatchAborted
        wait_until(lambda: workers[0].dead)
        assert words.run("k", Words.put, "a") == 1


def test_what_a_store_has_besides_is_still_there_and_is_called_in_a_context() -> None:
    told: list[object] = []

    class Scope:
        takes_rows = True

        def __enter__(self) -> Words:
            return Words()

        def __exit__(self, *raised: object) -> None:
            told.append(("rows", list(current_batch().rows)))

        def operation_raised(self, error: BaseException) -> None:
            told.append((type(error), current_app.name))

        def saved(self) -> None:
            told.append(("saved", current_app.name))

    class Store:
        def __call__(self, key: str) -> Scope:
            return Scope()

        def normalize_key(self, key: object) -> str:
            return str(key)

    def add_row(words: Words) -> str:
        current_batch().add_row("row")
        return str(current_batch().key)

    def fail(words: Words) -> None:
        raise LookupError

    batches = GeventBatch()
    words = batches.processor(open_resource=Store(), min_duration=0.01, max_duration=5, clean_errors=(LookupError,))
    app = flask_app()
    batches.init_app(app)
    with app.app_context():
        failing = gevent.spawn(words.for_app(app).run, 42, fail)
        assert words.run("42", add_row) == "42"
        with pytest.raises(LookupError):
            failing.get()
    assert words.for_app(app).stop()

    assert told == [(LookupError, app.name), ("rows", ["row"]), ("saved", app.name)]


# Flask-SQLAlchemy.

db = SQLAlchemy()


class Account(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Entry(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


@contextmanager
def open_account(number: int) -> Iterator[Account]:
    """As anybody would write it in an application with Flask-SQLAlchemy."""
    account = db.session.get(Account, number)
    if account is None:
        raise ResourceMissing(f"there is no account {number}", key=number)
    yield account
    db.session.commit()


@pytest.fixture
def accounts(tmp_path: Path, batching: bool) -> Iterator[tuple[Flask, AppProcessor[Account]]]:
    batches = GeventBatch()
    accounts = batches.processor(open_resource=open_account, min_duration=0, max_duration=5)
    app = flask_app(SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'accounts.sqlite'}", GEVENTBATCH_BATCHING=batching)
    db.init_app(app)
    batches.init_app(app)
    with app.app_context():
        db.create_all()
        db.session.add(Account(id=1, balance=0))
        db.session.commit()
        db.session.remove()
    yield app, accounts
    assert geventbatch.stop_all(timeout=10)
    with app.app_context():
        db.engine.dispose()


def test_in_an_operation_the_session_is_that_of_the_batch_and_not_that_of_the_request(
    accounts: tuple[Flask, AppProcessor[Account]],
) -> None:
    app, processor = accounts
    sessions: list[object] = []

    def deposit(account: Account, amount: int) -> int:
        sessions.append(db.session())
        assert object_session(account) is db.session()
        account.balance += amount
        db.session.add(Entry(amount=amount))
        return account.balance

    with app.test_request_context("/"):
        own = db.session()
        own.add(Entry(amount=-1))  # not flushed: the request has yet to decide
        assert processor.run(1, deposit, 7) == 7
        assert processor.run(1, deposit, 3) == 10
        assert db.session() is own
        assert len(own.new) == 1
        assert own not in sessions
        own.rollback()

    with app.app_context():
        assert db.session.scalars(sa.select(Entry.amount)).all() == [7, 3]
        assert db.session.scalar(sa.select(Account.balance)) == 10


def test_what_an_operation_did_in_the_session_is_rolled_back_with_its_batch(
    accounts: tuple[Flask, AppProcessor[Account]],
) -> None:
    app, processor = accounts

    def half_deposit(account: Account) -> None:
        account.balance += 5
        db.session.add(Entry(amount=5))
        db.session.flush()
        raise LookupError

    with app.test_request_context("/"):
        with pytest.raises(LookupError):
            processor.run(1, half_deposit)
        db.session.commit()  # the request's own
        assert db.session.scalars(sa.select(Entry.amount)).all() == []
        assert db.session.scalar(sa.select(Account.balance)) == 0


def test_no_batch_keeps_its_session_or_its_connection(accounts: tuple[Flask, AppProcessor[Account]]) -> None:
    app, processor = accounts

    def deposit(account: Account) -> None:
        account.balance += 1

    def fail(account: Account) -> None:
        raise LookupError

    with app.app_context():
        for _ in range(10):
            processor.run(1, deposit)
            with pytest.raises(LookupError):
                processor.run(1, fail)
            with pytest.raises(ResourceMissing):
                processor.run(2, deposit)
        pool = db.engine.pool
        assert isinstance(pool, sa.QueuePool)
        assert pool.checkedout() == 0
        assert not db.session.registry.has()
        assert len(db.session.registry.registry) == 0


def test_each_attempt_has_a_session_of_its_own(accounts: tuple[Flask, AppProcessor[Account]]) -> None:
    app, _ = accounts
    sessions: list[object] = []
    batches = GeventBatch()

    @contextmanager
    def open_and_fail_once(number: int) -> Iterator[Account]:
        with open_account(number) as account:
            yield account
            sessions.append(db.session())
            if len(sessions) == 1:
                raise geventbatch.Conflict

    processor = batches.processor(open_resource=open_and_fail_once, min_duration=0)
    del app.extensions["geventbatch"]
    batches.init_app(app)

    def deposit(account: Account) -> int:
        account.balance += 1
        return account.balance

    with app.app_context():
        assert processor.run(1, deposit) == 1
        assert len({*sessions}) == 2
        assert db.session.scalar(sa.select(Account.balance)) == 1


def deposit_once(account: Account, amount: int) -> int:
    account.balance += amount
    return account.balance


def withdraw_once(account: Account, amount: int) -> int:
    return deposit_once(account, -amount)


@pytest.fixture
def stored(tmp_path: Path, batching: bool) -> Iterator[tuple[Flask, GeventBatch]]:
    """An application for stores that have sessions of their own."""
    batches = GeventBatch()
    app = flask_app(
        SQLALCHEMY_DATABASE_URI=f"sqlite:///{tmp_path / 'accounts.sqlite'}",
        GEVENTBATCH_BATCHING=batching,
        GEVENTBATCH_MIN_DURATION=0,
        GEVENTBATCH_MAX_DURATION=5,
    )
    db.init_app(app)
    batches.init_app(app)
    with app.app_context():
        db.create_all()
        db.session.add(Account(id=1, balance=0))
        db.session.commit()
        db.session.remove()
    with app.test_request_context("/"):
        yield app, batches
    assert geventbatch.stop_all(timeout=10)
    with app.app_context():
        db.engine.dispose()


def test_an_idempotency_key_stands_for_the_operation_in_the_context_of_its_batch(
    stored: tuple[Flask, GeventBatch],
) -> None:
    _, batches = stored
    outcomes = idempotency_table("outcomes")
    accounts = batches.processor(make_store=lambda: SQLAlchemyStore.mapped(db.session, Account, idempotency=outcomes))
    accounts.store.create_table()
    answers = [
        accounts.run(1, deposit_once, amount, idempotency_key=key) for key, amount in (("a", 7), ("b", 1), ("a", 7))
    ]
    assert answers == [7, 8, 7]
    assert accounts.store.purge_outcomes() == 0
    store = SQLAlchemyStore.mapped(db.session, Account, idempotency=outcomes)
    with geventbatch.Processor(open_resource=store) as plain:
        assert plain.run(1, deposit_once, 7, idempotency_key="a") == 7  # what is recorded is the same without Flask
    with pytest.raises(IdempotencyKeyReused):
        accounts.run(1, deposit_once, 8, idempotency_key="a")
    with pytest.raises(IdempotencyKeyReused):
        accounts.run(1, withdraw_once, 7, idempotency_key="a")
    with pytest.raises(TypeError, match="cannot tell <function deposit_once at"):
        accounts.run(1, deposit_once, object(), idempotency_key="c")  # type: ignore[arg-type]


def test_with_a_store_of_mapped_instances_the_session_is_that_of_the_store(stored: tuple[Flask, GeventBatch]) -> None:
    _, batches = stored
    accounts = batches.processor(make_store=lambda: SQLAlchemyStore.mapped(db.session, Account))

    def deposit(account: Account, amount: int) -> int:
        assert object_session(account) is db.session()
        account.balance += amount
        db.session.add(Entry(amount=amount))
        return account.balance

    def fail(account: Account) -> None:
        db.session.add(Entry(amount=100))
        raise LookupError

    own = db.session()
    assert accounts.run("1", deposit, 7) == 7
    with pytest.raises(LookupError):
        accounts.run(1, fail)
    assert accounts.run(1, deposit, 3) == 10

    assert db.session() is own
    assert db.session.scalars(sa.select(Entry.amount)).all() == [7, 3]
    assert len(db.session.registry.registry) == 1  # that of this request


def test_across_keys_the_session_is_that_of_the_operations_resources(stored: tuple[Flask, GeventBatch]) -> None:
    _, batches = stored
    accounts = batches.processor(make_store=lambda: SQLAlchemyStore.mapped(db.session, Account))
    db.session.add_all([Account(id=2, balance=0), Account(id=3, balance=0), Account(id=4, balance=0)])
    db.session.commit()

    def transfer(resources: tuple[Account, ...], amount: int) -> int:
        source, target = resources
        assert object_session(source) is object_session(target) is db.session()
        source.balance -= amount
        target.balance += amount
        db.session.add(Entry(amount=amount))
        return target.balance

    def deposit(account: Account, amount: int) -> int:
        assert object_session(account) is db.session()
        account.balance += amount
        db.session.add(Entry(amount=amount))
        return account.balance

    own = db.session()
    runs: list[Any] = [
        (accounts.run_across, [1, 2], transfer, 5),
        (accounts.run_across, [3, 4], transfer, 7),
        (accounts.run, 1, deposit, 10),
        (accounts.run_across, [2, 1], transfer, 1),
    ]
    callers = [gevent.spawn(partial(copy_context().run, *run)) for run in runs]
    assert [caller.get() for caller in callers] == [5, 7, 5, 6] or not accounts.for_app().batching
    assert db.session() is own
    db.session.rollback()
    assert sorted(db.session.scalars(sa.select(Entry.amount))) == [1, 5, 7, 10]
    assert {one.id: one.balance for one in db.session.scalars(sa.select(Account))} == {1: 6, 2: 4, 3: -7, 4: 7}
    assert len(db.session.registry.registry) == 1


def test_a_key_that_is_no_key_of_the_table_is_not_found(stored: tuple[Flask, GeventBatch]) -> None:
    app, batches = stored
    accounts = batches.processor(make_store=lambda: SQLAlchemyStore.mapped(db.session, Account))

    @app.post("/accounts/<number>")
    def deposit(number: str) -> dict[str, int]:
        keys = request.args.getlist("key")
        if keys:
            accounts.run_across([number, *keys], lambda accounts: None)
        return {"balance": accounts.run(number, deposit_once, 1)}

    client = app.test_client()
    asked = ["1", "2", "abc", "99999999999999999999", "1?key=abc"]
    answers = [client.post(f"/accounts/{one}", headers={"Accept": "application/json"}) for one in asked]
    assert [one.status_code for one in answers] == [200, 404, 404, 404, 404]
    assert {(one.json or {})["error"] for one in answers[1:]} == {"ResourceMissing"}
    assert db.session.scalar(sa.select(Account.balance)) == 1


def test_what_no_store_would_save_is_told_to_the_operator(
    stored: tuple[Flask, GeventBatch], caplog: pytest.LogCaptureFixture
) -> None:
    _, batches = stored
    words = batches.processor(load_resource=lambda key: Words())

    def add_entry(words: Words) -> None:
        db.session.add(Entry(amount=7))

    def change(words: Words, by: int) -> None:
        account = db.session.get(Account, 1)
        assert account is not None
        account.balance += by

    words.run("k", change, 0)
    assert not caplog.records
    for operation, args in (add_entry, ()), (change, (1,)):
        words.run("k", operation, *args)
        assert "The batch of key 'k' is saved, but not what an operation changed in db.session" in caplog.text
        caplog.clear()
    assert db.session.scalars(sa.select(Entry.amount)).all() == []


def test_after_a_deadline_in_the_middle_of_a_statement_the_pool_is_as_good_as_new(tmp_path: Path) -> None:
    batches = GeventBatch()
    seconds = [5, 0]

    @contextmanager
    def open_slowly(number: int) -> Iterator[list[int]]:
        db.session.execute(sa.text("SELECT pg_sleep(:seconds)"), {"seconds": seconds.pop(0)})
        yield []

    processor = batches.processor(open_resource=open_slowly, min_duration=0, max_duration=0.5)
    with database("postgresql", tmp_path) as url:
        app = flask_app(SQLALCHEMY_DATABASE_URI=url.replace("postgresql:", "postgresql+psycopg:"))
        db.init_app(app)
        batches.init_app(app)
        with app.app_context():
            db.session.execute(sa.text("SELECT 1"))  # connecting takes its time
            db.session.remove()
            with pytest.raises(BatchTimeout):
                processor.run(1, list)
            assert processor.run(1, list) == []
            pool = db.engine.pool
            assert isinstance(pool, sa.QueuePool)
            assert pool.checkedout() == 0
            db.engine.dispose()


# Configuration.


def options_of(processor: Any) -> dict[str, Any]:
    options = processor._options
    return {name: getattr(options, name) for name in ("min_duration", "max_duration", "max_pending")}


def test_the_configuration_gives_the_options_that_a_processor_was_not_given_itself() -> None:
    batches = GeventBatch()
    first = batches.processor()
    second = batches.processor(max_pending=7)
    app = flask_app(
        GEVENTBATCH_MIN_DURATION=0,
        GEVENTBATCH_MAX_DURATION=3,
        GEVENTBATCH_MAX_PENDING=100,
        GEVENTBATCH_MAX_BLOCKING_TIME=7,
        GEVENTBATCH_BATCHING=False,
    )
    batches.init_app(app)

    assert options_of(first.for_app(app)) == {"min_duration": 0, "max_duration": 3, "max_pending": 100}
    assert options_of(second.for_app(app)) == {"min_duration": 0, "max_duration": 3, "max_pending": 7}
    assert not first.for_app(app).batching


@pytest.mark.parametrize(
    ("config", "kind", "told"),
    [
        (
            {"GEVENTBATCH_MAX_DURATON": 3},
            TypeError,
            "app.config has GEVENTBATCH_MAX_DURATON, which means nothing: did you mean GEVENTBATCH_MAX_DURATION?",
        ),
        (
            {"GEVENTBATCH_XYZ": 3},
            TypeError,
            "app.config has GEVENTBATCH_XYZ, which means nothing: there are BATCHING, ERROR_ANSWERS, MAX_ATTEMPTS, MAX",
        ),
        ({"GEVENTBATCH_RETRY_AFTER": "1"}, TypeError, "GEVENTBATCH_RETRY_AFTER is '1', but must be a whole number"),
        ({"GEVENTBATCH_RETRY_AFTER": True}, TypeError, "GEVENTBATCH_RETRY_AFTER is True, but must be a whole number"),
        ({"GEVENTBATCH_RETRY_AFTER": -1}, ValueError, "GEVENTBATCH_RETRY_AFTER is -1, but must be 0 or more"),
        ({"GEVENTBATCH_ERROR_ANSWERS": 1}, TypeError, "GEVENTBATCH_ERROR_ANSWERS is 1, but must be True or False"),
        (
            {"GEVENTBATCH_MAX_PENDING": "many"},
            TypeError,
            "max_pending is 'many', but must be an int\napp.config has GEVENTBATCH_MAX_PENDING = 'many'",
        ),
    ],
    ids=["misspelt", "unknown", "retry_after str", "retry_after bool", "retry_after < 0", "error_answers", "option"],
)
def test_a_wrong_configuration_is_refused_by_init_app_with_a_message_that_names_it(
    config: dict[str, Any], kind: type[Exception], told: str
) -> None:
    batches = GeventBatch()
    batches.processor()
    app = flask_app(**config)

    with pytest.raises(kind) as refused:
        batches.init_app(app)

    assert "\n".join([str(refused.value), *getattr(refused.value, "__notes__", ())]).startswith(told)
    assert "geventbatch" not in app.extensions


def test_a_wrong_option_is_refused_where_it_is_given_when_the_application_is_there() -> None:
    app = flask_app()
    batches = GeventBatch(app)

    with pytest.raises(TypeError, match="has no option max_duraton: did you mean max_duration"):
        batches.processor(max_duraton=3)  # type: ignore[call-overload]


# Applications.


def test_each_application_of_a_factory_has_processors_of_its_own() -> None:
    batches = GeventBatch()
    before = batches.processor(load_resource=lambda key: Words([current_app.name]), min_duration=0)
    apps = [Flask("one"), Flask("two")]
    for app in apps:
        batches.init_app(app)
    after = batches.processor(load_resource=lambda key: Words([current_app.name]), min_duration=0)

    for app in apps:
        with app.app_context():
            assert before.run("k", list) == after.run("k", list) == [app.name]
            assert before.for_app() is before.for_app(app)
    assert len({id(one.for_app(app)) for one in (before, after) for app in apps}) == 4


def test_what_is_declared_is_seen_and_switched_off_as_the_processor_that_it_stands_for() -> None:
    app = Flask("one")
    words = GeventBatch(app).processor(load_resource=lambda key: Words(), min_duration=0, name="words")
    meant = words.for_app(app)
    with app.app_context():
        metrics = words.subscribe_batch_metrics()
        words.run("k", Words.put, "a")
        assert next(metrics).key == "k"
        assert words.name == "words"
        assert words.stats().operations_total == meant.stats().operations_total == 1
        assert words.live_batches() == []
        words.batching = False
        assert not meant.batching
        words.batching = True
        assert meant.batching
        assert words.batching
    uses: list[Callable[[], object]] = [
        lambda: setattr(words, "batching", False),
        lambda: words.run("k", len),
        words.stats,
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"outside of application context.* Nothing was run: .* for_app\(app\)"):
            use()


def load_words(key: str) -> Words:
    return Words()


def open_words(key: str) -> Any:
    return nullcontext(Words())


def test_metrics_name_what_the_application_gave_and_not_what_stands_around_it() -> None:
    app = Flask("one")
    batches = GeventBatch(app)
    words = batches.processor(load_resource=load_words, min_duration=0)
    others = batches.processor(open_resource=open_words, min_duration=0)
    with app.app_context():
        assert (words.name, others.name) == ("load_words", "open_words")
        metrics = words.subscribe_batch_metrics()
        words.run("k", Words.put, "a")
        with app.test_request_context("/?name=Ann"), pytest.raises(KeyError):
            words.run("k", put_what_is_seen)
        assert [next(metrics).operation_name for _ in range(2)] == ["Words.put", "put_what_is_seen"]


def test_a_store_that_needs_to_know_the_application_is_made_in_its_context() -> None:
    batches = GeventBatch()

    def make_store() -> Callable[[str], Any]:
        name = current_app.name
        made.append(lambda key: nullcontext([name]))
        return made[-1]

    def open_word(key: str) -> Any:
        return nullcontext([key])

    made: list[Callable[[str], Any]] = []
    words = batches.processor(make_store=make_store, min_duration=0)
    given, pair = batches.processor(open_resource=open_word), batches.processor(load_resource=lambda key: Words())
    for app in Flask("one"), Flask("two"):
        batches.init_app(app)
        assert words.for_app(app).run("k", list) == [app.name]
        with app.app_context():
            assert (words.store, given.store, pair.store) == (made[-1], open_word, None)
    with pytest.raises(RuntimeError, match="outside of application context"):
        words.store  # noqa: B018 - it raises
    with pytest.raises(TypeError, match="make_store is None, but must be callable"):
        batches.processor(make_store=None)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="pass one of them, not both"):
        batches.processor(make_store=make_store, open_resource=nullcontext)  # type: ignore[call-overload]


def test_outside_of_an_application_it_runs_on_the_one_that_is_named() -> None:
    app = Flask("one")
    words = GeventBatch(app).processor(load_resource=lambda key: Words([current_app.name]), min_duration=0)

    assert words.for_app(app).run("k", list) == ["one"]
    assert words.for_app(app).run("k", lambda words: current_app.name) == "one"
    with pytest.raises(RuntimeError, match="outside of application context"):
        words.run("k", list)


def test_the_g_of_another_application_stays_there() -> None:
    app = Flask("one")
    words = GeventBatch(app).processor(load_resource=lambda key: Words(), min_duration=0)

    with Flask("two").app_context():
        g.name = "two's"
        assert words.for_app(app).run("k", lambda words: g.get("name")) is None


def test_whoever_forgot_something_is_told_what() -> None:
    app = Flask("one")
    words = GeventBatch().processor()
    with app.app_context(), pytest.raises(RuntimeError, match=r"init_app\(\) was not called for <Flask 'one'>"):
        words.run("k", print)
    batches = GeventBatch(app)
    with app.app_context(), pytest.raises(RuntimeError, match="was declared on another GeventBatch than the one"):
        words.run("k", print)
    with pytest.raises(RuntimeError, match=r"init_app\(\) was called for this application before"):
        batches.init_app(app)
    with app.app_context(), pytest.raises(TypeError, match="operation is 3, but must be callable"):
        batches.processor().run("k", 3)  # type: ignore[arg-type]


# Error answers.


def failing_app(make: Make, **config: Any) -> Flask:
    app = flask_app(**config)

    @app.route("/", methods=["GET", "POST"])
    def view() -> str:
        raise make()

    return app


@each_error
def test_each_error_has_its_answer(make: Make, told: Told) -> None:
    app = failing_app(make)
    GeventBatch(app)

    answer = app.test_client().get("/")

    check(told, answer.status_code, dict(answer.headers), answer.data)


@each_accept
def test_a_client_is_answered_in_the_form_that_it_accepts(accept: str, form: str) -> None:
    app = failing_app(lambda: ProcessorOverloaded("secret"))
    GeventBatch(app)

    answer = app.test_client().get("/", headers={"Accept": accept} if accept else {})

    assert form_of(answer.headers["Content-Type"], answer.data) == form


def test_the_seconds_to_wait_can_be_chosen() -> None:
    app = failing_app(lambda: ProcessorOverloaded("secret"), GEVENTBATCH_RETRY_AFTER=30)
    GeventBatch(app)

    assert app.test_client().get("/").headers["Retry-After"] == "30"


@pytest.mark.parametrize("first", [True, False], ids=["before init_app", "after init_app"])
def test_an_error_handler_of_the_application_goes_before(first: bool) -> None:
    app = failing_app(lambda: ProcessorOverloaded("secret"))
    handle = app.errorhandler(BatchError)
    if first:
        handle(lambda error: ("mine", 418))
    GeventBatch(app)
    if not first:
        handle(lambda error: ("mine", 418))

    assert app.test_client().get("/").status_code == 418


def test_an_error_handler_for_one_of_the_errors_leaves_the_others_as_they_are() -> None:
    raised: list[BatchError] = [ProcessorOverloaded("secret"), ProcessorStopped("secret")]
    app = failing_app(raised.pop)
    app.register_error_handler(ProcessorStopped, lambda error: ("mine", 418))
    GeventBatch(app)
    client = app.test_client()

    assert [client.get("/").status_code for _ in range(2)] == [418, 503]


def test_answers_can_be_left_to_the_application() -> None:
    app = failing_app(lambda: ProcessorOverloaded("secret"), GEVENTBATCH_ERROR_ANSWERS=False)
    GeventBatch(app)
    app.testing = True

    with pytest.raises(ProcessorOverloaded):
        app.test_client().get("/")


def test_an_application_that_is_overloaded_says_so_by_itself() -> None:
    go_on = Event()
    batches = GeventBatch()
    words = batches.processor(min_duration=0, max_pending=1)
    app = flask_app()
    with serving(app, batches, lambda: words.run("k", lambda _: go_on.wait())) as client:
        waiting = gevent.spawn(client.post, "/?name=Ann")
        gevent.idle()
        refused = client.post("/?name=Bob")
        go_on.set()
        assert waiting.get().status_code == 200

    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")


def test_the_log_shows_a_cause_once_however_many_callers_share_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    batches = GeventBatch()

    def load(key: str) -> None:
        gevent.sleep(0)
        raise ConnectionResetError("the database has gone")

    words = batches.processor(load_resource=load, min_duration=0)
    with serving(flask_app(), batches, lambda: words.run("k", print)) as client:
        asked = [gevent.spawn(client.post, "/?name=Ann") for _ in range(5)]
        assert [one.get().status_code for one in asked] == [503] * 5

    records = [record for record in caplog.records if record.name == "test_flask"]  # "geventbatch" tells of the batch
    assert len(records) == 5
    assert all(record.getMessage().startswith("POST '/': LoadFailed: batch of key 'k'") for record in records)
    assert [record.levelname for record in records] == ["ERROR", *["INFO"] * 4]
    assert [record.exc_info is not None for record in records] == [True, *[False] * 4]
    assert caplog.text.count("Traceback") == 3  # its own, that of its cause, and the batch's


def test_the_log_shows_the_traceback_of_a_database_that_is_down_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = GeventBatch()

    def load(key: str) -> None:
        raise ConnectionResetError("the database has gone")

    words = batches.processor(load_resource=load, min_duration=0)
    with serving(flask_app(), batches, lambda: words.run("k", print)) as client:
        assert [client.post("/?name=Ann").status_code for _ in range(3)] == [503] * 3

    records = [record for record in caplog.records if record.name == "test_flask"]
    assert [record.levelname for record in records] == ["ERROR"] * 3
    assert [record.exc_info is not None for record in records] == [True, False, False]
    assert records[1].getMessage().endswith("its traceback was logged with the same failure, less than a minute ago")


def test_a_line_says_that_its_traceback_was_logged_only_if_one_of_its_phase_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their causes have no place: each batch's code ran, or another led its bulk, at the deadline."""
    phases: list[Phase] = ["operations", "load", "load"]

    def timed_out() -> BatchTimeout:
        error = BatchTimeout("too long", retry_safe=True, phase=phases.pop(0))
        error.__cause__ = TimeoutError("too long")
        return error

    app = failing_app(timed_out)
    GeventBatch(app)
    assert [app.test_client().get("/").status_code for _ in range(3)] == [504] * 3

    records = [record for record in caplog.records if record.name == "test_flask"]
    assert [record.exc_info is not None for record in records] == [True, True, False]
    assert not any("its traceback was logged" in record.getMessage() for record in records)


def test_what_was_refused_or_missing_is_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    raised: list[BatchError] = [ProcessorOverloaded("too many"), ResourceMissing("nothing")]
    app = failing_app(raised.pop)
    GeventBatch(app)
    caplog.set_level("INFO")
    client = app.test_client()
    assert [client.get("/").status_code for _ in range(2)] == [404, 503]

    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("INFO", "GET '/': ProcessorOverloaded: too many")
    ]


# What `geventbatch.testing` does to them.


@pytest.mark.parametrize("batching", [True, False])
def test_a_processor_that_is_declared_is_tested_as_that_of_the_application_at_hand(batching: bool) -> None:
    kept: list[str] = []
    batches = GeventBatch()

    def load(_: object) -> Words:
        assert not has_request_context()
        return Words(kept)

    words = batches.processor(
        load_resource=load, save_resource=lambda _, saved: kept.extend(saved[len(kept) :]), min_duration=0
    )

    def put_name(resource: Words) -> Words | int:
        assert g.name == request.args["name"]
        return resource if g.name == "itself" else resource.put(g.name)

    app = flask_app(GEVENTBATCH_BATCHING=batching)
    with serving(app, batches, lambda: words.run("k", put_name)) as client:
        with pytest.raises(RuntimeError, match="outside of application context"), faults(words):
            pass
        with app.app_context(), faults(words) as plan, check_operations(words):
            plan.lose_answer()
            assert client.post("/?name=Ann").status_code == 500
            assert client.post("/?name=Bob").json == {"answer": 2}
        app.testing = True
        with (
            app.app_context(),
            pytest.raises(
                ImpureOperation, match=r"the operation .*put_name\(resource\) on key 'k' returned what is part"
            ),
            check_operations(words),
        ):
            client.post("/?name=itself")
    assert kept == ["Ann", "Bob"]

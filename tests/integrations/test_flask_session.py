"""The ``db.session`` of a Flask request that calls `run`: it holds nothing meanwhile, or `run` is refused."""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from flask import Flask, g
from flask import request as flask_request
from flask_sqlalchemy import SQLAlchemy
from gevent.event import Event
from psycogreen.gevent import patch_psycopg  # type: ignore[import-untyped]  # it has no types
from sqlalchemy.orm import DeclarativeBase, Mapped, joinedload, mapped_column, relationship, selectinload

import geventbatch
from geventbatch.integrations.flask import AppProcessor, GeventBatch
from geventbatch.stores import SQLAlchemyStore
from tests.support.callers import answer_of
from tests.support.servers import administer, database, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

patch_psycopg()

db = SQLAlchemy()


class User(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    accounts: Mapped[list[Account]] = relationship(order_by=lambda: Account.id)


class Account(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[int | None] = mapped_column(sa.ForeignKey(User.id))
    balance: Mapped[int]

    def __repr__(self) -> str:
        """As many are: it flushes, since it loads."""
        return f"<Account {self.id} of {User.query.first()}>"


class Entry(db.Model):  # type: ignore[name-defined, misc]
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def deposit(account: Account, amount: int) -> int:
    account.balance += amount
    return account.balance


def transfer(accounts: tuple[Account, ...], amount: int) -> int:
    source, target = accounts
    source.balance -= amount
    return deposit(target, amount)


@sa.event.listens_for(db.metadata, "after_create")
def _create_function(_: object, connection: sa.Connection, **__: object) -> None:
    if connection.dialect.name == "postgresql":
        create = "CREATE OR REPLACE FUNCTION random_id(integer) RETURNS integer LANGUAGE sql AS 'SELECT $1'"
        connection.exec_driver_sql(create)


def _note_backend(raw: Any, record: Any, _: object) -> None:
    record.info["backend"] = raw.info.backend_pid


class Bank:
    """An application with accounts 1 and 2 of the user 1, and what a request of it does."""

    def __init__(self, url: str, **config: Any) -> None:
        self.app = Flask("bank")
        self.app.config.update(SQLALCHEMY_DATABASE_URI=url, GEVENTBATCH_MIN_DURATION=0, GEVENTBATCH_MAX_DURATION=20)
        self.app.config.update(config)
        self.batches = GeventBatch()
        self.accounts = self.processor()
        db.init_app(self.app)
        self.batches.init_app(self.app)
        with self.app.app_context():
            db.create_all()
            for table in reversed(db.metadata.sorted_tables):
                db.session.execute(table.delete())
            db.session.add(User(id=1, name="Ann", accounts=[Account(id=1, balance=0), Account(id=2, balance=0)]))
            db.session.commit()
            if db.engine.dialect.name == "postgresql":
                sa.event.listen(db.engine, "checkout", _note_backend)
            else:
                sa.event.listen(db.engine, "connect", lambda raw, _: raw.create_function("random_id", 1, int))
                db.engine.dispose()
            self.pool: Any = db.engine.pool

    def processor(self, **options: Any) -> AppProcessor[Account]:
        return self.batches.processor(make_store=lambda: SQLAlchemyStore.mapped(db.session, Account), **options)

    def deposit(self) -> int:
        return self.accounts.run(1, self.deposited)

    def deposited(self, account: Account) -> int:
        """As an operation: only the batch has a connection."""
        assert self.pool.checkedout() == 1
        return deposit(account, 1)

    def transfer(self) -> int:
        return self.accounts.run_across([2, 1], transfer, 1)

    def balance(self) -> int:
        with self.app.app_context():
            return int(db.session.scalars(sa.select(Account.balance).filter_by(id=1)).one())

    def end(self) -> None:
        assert geventbatch.stop_all(timeout=10)
        with self.app.app_context():
            db.engine.dispose()


DRIVERS = {"sqlite": "sqlite", "psycopg": "postgresql+psycopg", "psycopg2": "postgresql+psycopg2"}


@pytest.fixture(scope="module", params=DRIVERS)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A database for each driver, which all tests share."""
    name = DRIVERS[request.param]
    with database(name.partition("+")[0], tmp_path_factory.mktemp("bank")) as found:
        yield sa.make_url(found).set(drivername=name).render_as_string(hide_password=False)


@pytest.fixture
def open_bank(place: str) -> Iterator[Callable[..., Bank]]:
    with ExitStack() as ends:

        def open_bank(**config: Any) -> Bank:
            bank = Bank(place, **config)
            ends.callback(bank.end)
            return bank

        yield open_bank


@pytest.fixture
def bank(open_bank: Callable[..., Bank]) -> Bank:
    return open_bank()


# -- a login in front of the view ----------------------------------------------------------------------------------


class Login:
    """As flask-login's: each request loads its user through `db.session`."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._pool_is_empty = Event()
        bank.app.before_request(self._load_user)
        bank.app.post("/<int:number>")(self._deposit)

    def _load_user(self) -> None:
        g.user = db.session.get(User, 1)

    def _deposit(self, number: int) -> dict[str, Any]:
        pool = self._bank.pool
        if pool.checkedout() == pool.size() + pool._max_overflow:
            self._pool_is_empty.set()
        assert self._pool_is_empty.wait(20)
        balance = self._bank.accounts.run(number, deposit, 1)
        return {"balance": balance, "name": g.user.name}


def test_sixty_requests_with_a_login_are_answered_over_the_default_pool_though_logins_had_taken_all_of_it(
    bank: Bank,
) -> None:
    Login(bank)
    asked = [gevent.spawn(bank.app.test_client().post, "/1") for _ in range(60)]
    answers = [one.get() for one in asked]
    assert [one.status_code for one in answers] == [200] * 60
    assert sorted((one.json or {})["balance"] for one in answers) == list(range(1, 61))
    assert {(one.json or {})["name"] for one in answers} == {"Ann"}
    assert (bank.balance(), bank.pool.checkedout()) == (60, 0)


def test_one_connection_is_enough_for_requests_and_their_batches(open_bank: Callable[..., Bank]) -> None:
    bank = open_bank(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0})
    Login(bank)
    answers = [gevent.spawn(bank.app.test_client().post, "/1") for _ in range(10)]
    assert [one.get().status_code for one in answers] == [200] * 10


@pytest.mark.parametrize("batching", [True, False])
def test_that_is_told_once_and_the_settings_silence_or_refuse_it(
    open_bank: Callable[..., Bank], batching: bool, caplog: pytest.LogCaptureFixture
) -> None:
    told = {}
    for release in (None, True, False):
        caplog.clear()
        config = {} if release is None else {"GEVENTBATCH_RELEASE_SESSION": release}
        bank = open_bank(GEVENTBATCH_BATCHING=batching, **config)
        for answer in (1, 2):
            with bank.app.test_request_context():
                db.session.get(User, 1)
                if release is False:
                    with pytest.raises(RuntimeError, match=r"a connection \(release_session=False\).*commit\(\)"):
                        bank.deposit()
                else:
                    assert bank.deposit() == answer
                db.session.commit()
        told[release] = caplog.text.count("run() was called in a request that had read through db.session")
    assert told == {None: 1, True: 0, False: 0}


def test_the_option_of_a_processor_goes_before_the_setting(bank: Bank) -> None:
    strict = bank.processor(release_session=False)
    with bank.app.test_request_context():
        db.session.get(User, 1)
        with pytest.raises(RuntimeError, match="release_session=False"):
            strict.run(1, deposit, 1)
        assert bank.deposit() == 1
    with pytest.raises(TypeError, match="release_session is 1, but must be True or False"):
        bank.processor(release_session=1)
    wrong = Flask("wrong")
    wrong.config["GEVENTBATCH_RELEASE_SESSION"] = "no"
    with pytest.raises(TypeError, match="release_session is 'no', but must be True or False"):
        bank.batches.init_app(wrong)


def load_parts(user: User) -> object:
    return [account.balance for account in user.accounts]


def set_to_what_it_is(*, begun: bool = True) -> None:
    """As a login does that notes where its user comes from. SQLAlchemy has the user in `dirty`, and sends nothing."""
    user = db.session.get(User, 1)
    assert user is not None
    if not begun:
        db.session().expire_on_commit = False
        db.session.commit()
    user.name = "Ann"
    if begun:
        user.accounts = list(user.accounts)
    assert user in db.session.dirty


PLAIN: dict[str, Callable[[], object]] = {
    "get": lambda: db.session.get(User, 1),
    "lazy load": lambda: load_parts(db.session.get(User, 1)),  # type: ignore[arg-type]
    "joined load": lambda: db.session.scalars(sa.select(User).options(joinedload(User.accounts))).unique().all(),
    "selectin load": lambda: db.session.scalars(sa.select(User).options(selectinload(User.accounts))).all(),
    "query": lambda: User.query.filter(User.name.in_(["Ann", "Bob"]), User.id > 0).order_by(User.name).first(),
    "count": lambda: db.session.query(Account).filter(Account.balance.between(0, 9)).count(),
    "columns": lambda: db.session.execute(sa.select(User.id, sa.func.lower(User.name)).limit(3)).all(),
    "aggregate": lambda: db.session.scalar(sa.select(sa.func.coalesce(sa.func.sum(Account.balance), 0))),
    "exists": lambda: db.session.scalar(
        sa.select(sa.exists().where(User.name == "SELECT FOR UPDATE")).select_from(User)
    ),
    "cte": lambda: db.session.scalars(sa.select(sa.select(User.id).cte("ids").c.id).join(User, User.id > 0)).all(),
    "cast": lambda: db.session.scalars(sa.select(sa.cast(User.id, sa.String(9))).group_by(User.id)).all(),
    "refresh": lambda: db.session.refresh(db.session.get(User, 1)),
    "a savepoint that is released": lambda: db.session.begin_nested().commit() or db.session.get(User, 1),
    "begin()": lambda: (db.session.begin(), db.session.get(User, 1)),
    "nothing": db.session,
    "something that is only added": lambda: db.session.add(Entry(name="later")),
    "an attribute set to what it is": set_to_what_it_is,
    "such an attribute, in no transaction": lambda: set_to_what_it_is(begun=False),
}


@pytest.mark.parametrize("used", PLAIN)
def test_after_plain_reads_the_connection_is_given_back_and_what_was_added_stays(bank: Bank, used: str) -> None:
    with bank.app.test_request_context():
        PLAIN[used]()
        added = list(db.session.new)
        assert bank.deposit() == 1
        assert list(db.session.new) == added
        PLAIN[used]()
        assert bank.transfer() == 2
    assert bank.pool.checkedout() == 0


# -- what was changed or locked -------------------------------------------------------------------------------------


def change(*, flush: bool) -> None:
    account = db.session.get(Account, 1)
    assert account is not None
    account.balance = 5
    if flush:
        db.session.flush()


def set_what_is_not_loaded() -> None:
    """SQLAlchemy sends an UPDATE: it does not know that the value is the same."""
    account = db.session.get(Account, 1)
    db.session.expire(account)
    assert account is not None
    account.balance = 0


def change_beside() -> None:
    """Have a listener change something, where an attribute is set to what it is."""
    account = db.session.get(Account, 1)
    assert account is not None
    account.balance = account.balance
    sa.event.listen(db.session(), "before_flush", lambda *_: setattr(account, "user_id", None), once=True)


def delete(*, flush: bool) -> None:
    db.session.delete(db.session.get(Account, 2))
    if flush:
        db.session.flush()


def add(*, flush: bool) -> None:
    db.session.get(Account, 1)
    db.session.add(Entry(name="x"))
    if flush:
        db.session.flush()


def nested() -> None:
    db.session.begin_nested()
    db.session.get(Account, 1)


def begun() -> None:
    block = db.session.begin()
    block.__enter__()
    flask_request.environ["left"] = partial(block.__exit__, None, None, None)
    db.session.get(Account, 1)


def streamed() -> None:
    rows = db.session.scalars(sa.select(Account).execution_options(yield_per=1))
    flask_request.environ["left"] = rows.close
    next(rows)


def written_beside() -> None:
    written = sa.insert(Entry).values(name="x").returning(Entry.id).cte()
    db.session.scalars(sa.select(Account).join(written, sa.true())).all()


LOCKED: dict[str, tuple[Callable[[], object], str]] = {
    "an attribute": (partial(change, flush=False), "has changed or added <Account 1>"),
    "an attribute, flushed": (partial(change, flush=True), "has sent 'UPDATE account SET balance="),
    "an attribute that is not loaded": (set_what_is_not_loaded, "has changed or added <Account 1>"),
    "an attribute, by a listener": (change_beside, "has sent 'UPDATE account SET user_id="),
    "a deletion": (partial(delete, flush=False), "has changed or added <Account 2>"),
    "a deletion, flushed": (partial(delete, flush=True), "has sent 'DELETE FROM account WHERE"),
    "a new instance": (partial(add, flush=False), "has changed or added <Entry (new)>"),
    "a new instance, flushed": (partial(add, flush=True), "has sent 'INSERT INTO entry"),
    "an UPDATE": (lambda: db.session.execute(sa.update(Account).values(balance=5)), "has sent 'UPDATE account SET"),
    "a legacy UPDATE": (lambda: Account.query.update({"balance": 5}), "has sent 'UPDATE account SET"),
    "a text": (lambda: db.session.execute(sa.text("UPDATE account SET balance = 5")), "has sent 'UPDATE account SET"),
    "a SELECT as a text": (lambda: db.session.execute(sa.text("SELECT 1")), "has sent 'SELECT 1', which is no SELECT"),
    "the driver": (lambda: db.session.connection().exec_driver_sql("SELECT 2"), "has sent 'SELECT 2', which is no"),
    "a SELECT of the table": (
        lambda: db.session.execute(sa.select(Account.__table__)),
        "which is no SELECT of the ORM",
    ),
    "rows that are not fetched": (streamed, "rows that may not be fetched yet"),
    "a function": (
        lambda: db.session.scalar(sa.select(sa.func.random_id(Account.id))),
        "which calls random_id(), and may",
    ),
    "begin()": (begun, "is inside `with db.session.begin()`"),
    "begin_nested()": (nested, "is inside begin_nested()"),
}

LOCKED_ON_SERVERS: dict[str, tuple[Callable[[], object], str]] = {
    "FOR UPDATE": (lambda: db.session.get(Account, 1, with_for_update=True), "which locks what it selects"),
    "FOR SHARE": (
        lambda: db.session.scalars(sa.select(Account).with_for_update(read=True)).all(),
        "which locks what it selects",
    ),
    "refresh FOR UPDATE": (
        lambda: db.session.refresh(db.session.get(Account, 1), with_for_update={"key_share": True}),
        "which locks what it selects",
    ),
    "a lock by a function": (
        lambda: db.session.scalar(sa.select(sa.func.pg_advisory_xact_lock(Account.id))),
        "which calls pg_advisory_xact_lock(), and may",
    ),
    "a function of a schema, of a harmless name": (
        lambda: db.session.scalar(sa.select(sa.func.pg_catalog.lower(sa.cast(Account.id, sa.Text)))),
        "which calls pg_catalog.lower(), and may",
    ),
    "an INSERT beside a SELECT": (written_beside, "which writes"),
}


@pytest.mark.parametrize("used", [*LOCKED, *LOCKED_ON_SERVERS])
def test_after_anything_else_run_is_refused_at_the_door_and_says_what_to_do(
    place: str, open_bank: Callable[..., Bank], used: str
) -> None:
    on_server = not place.startswith("sqlite")
    if place.startswith(DRIVERS["psycopg2"]) or (used in LOCKED_ON_SERVERS and not on_server):
        return  # no other statements; SQLite has none of these
    bank = open_bank()
    use, why = {**LOCKED, **LOCKED_ON_SERVERS}[used]
    with bank.app.test_request_context():
        use()
        for run, keys in (bank.deposit, "key 1"), (bank.transfer, "keys 2, 1"):
            with pytest.raises(RuntimeError) as refused:
                run()
            told, method = str(refused.value), "run" if run == bank.deposit else "run_across"
            assert told.startswith(f"{method}() was called on {keys} in a request whose db.session")
            assert why in told
            assert f"Nothing was run. Call db.session.commit() (or rollback()) before {method}()" in told
            assert bool([*db.session.dirty, *db.session.new, *db.session.deleted]) is ("has changed" in why)
        assert bank.accounts.stats().operations_total == 0
        flask_request.environ.get("left", db.session)()
        db.session.rollback()
        assert (bank.deposit(), bank.transfer()) == (1, 2)
    assert bank.balance() == 2


def test_the_greenlets_of_one_request_may_all_run_at_once(bank: Bank) -> None:
    with bank.app.test_request_context():
        db.session.get(User, 1)
        callers = [gevent.spawn(partial(copy_context().run, bank.deposit)) for _ in range(5)]
        assert sorted(one.get() for one in callers) == [1, 2, 3, 4, 5]


def test_the_sessions_around_an_application_context_are_looked_at_too(open_bank: Callable[..., Bank]) -> None:
    bank = open_bank(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0})
    with bank.app.test_request_context():
        account = db.session.get(Account, 1)
        assert account is not None
        with bank.app.app_context(), bank.app.app_context():
            assert bank.deposit() == 1
        assert account.balance == 1
        db.session.rollback()
        with bank.app.app_context():
            db.session.get(User, 1)
            assert bank.transfer() == 2
        change(flush=True)
        with bank.app.app_context():
            with pytest.raises(RuntimeError, match=r"db\.session outside of this application context has sent 'UPDATE"):
                bank.deposit()
            db.session.commit()
        db.session.rollback()
        assert bank.deposit() == 3


def test_a_session_that_begins_nothing_by_itself_is_in_a_transaction_after_run_as_before(place: str) -> None:
    class Base(DeclarativeBase):
        """Its tables are this test's."""

    database = SQLAlchemy(model_class=Base, session_options={"autobegin": False})

    class Counter(database.Model):  # type: ignore[name-defined, misc]
        id: Mapped[int] = mapped_column(primary_key=True)
        balance: Mapped[int]

    app = Flask("explicit")
    app.config.update(SQLALCHEMY_DATABASE_URI=place, GEVENTBATCH_MIN_DURATION=0)
    database.init_app(app)
    counters = GeventBatch(app).processor(make_store=lambda: SQLAlchemyStore.mapped(database.session, Counter))
    with app.app_context():
        database.create_all()
        with database.session.begin():
            database.session.add(Counter(id=1, balance=0))
        database.session.begin()
        counter = database.session.get(Counter, 1)
        assert counter is not None
        assert counters.run(1, deposit, 1) == 1
        assert database.engine.pool.checkedout() == 0  # type: ignore[attr-defined]  # it is a queue
        assert counter.balance == 1
        database.session.rollback()
        assert counters.run(1, deposit, 1) == 2
        assert not database.session().in_transaction()
        database.drop_all()
        database.engine.dispose()
    assert geventbatch.stop_all(timeout=10)


def test_what_a_session_does_before_it_is_seen_counts_as_a_change(place: str) -> None:
    app = Flask("late")
    app.config.update(SQLALCHEMY_DATABASE_URI=place, GEVENTBATCH_MIN_DURATION=0)
    unseen = SQLAlchemy()
    unseen.init_app(app)
    with app.app_context():
        unseen.session.scalar(sa.select(1))
        batches = GeventBatch(app)
        numbers = batches.processor(load_resource=lambda key: [key], save_resource=lambda key, numbers: None)
        with pytest.raises(RuntimeError, match=r"began before GeventBatch\.init_app\(\) was called"):
            numbers.run(1, sum)
        unseen.session.rollback()
        assert numbers.run(1, sum) == 1
        unseen.engine.dispose()
    assert geventbatch.stop_all(timeout=10)


def test_the_session_is_seen_when_flask_sqlalchemy_is_initialised_last(place: str) -> None:
    app = Flask("late")
    app.config.update(SQLALCHEMY_DATABASE_URI=place, GEVENTBATCH_MIN_DURATION=0)
    numbers = GeventBatch(app).processor(load_resource=lambda key: [key], save_resource=lambda key, numbers: None)
    late = SQLAlchemy()
    late.init_app(app)
    with app.app_context():
        late.session.execute(sa.text("SELECT 1"))
        with pytest.raises(RuntimeError, match="has sent 'SELECT 1', which is no SELECT of the ORM"):
            numbers.run(1, sum)
        late.session.rollback()
        late.engine.dispose()
    assert geventbatch.stop_all(timeout=10)


def test_a_session_on_a_connection_of_the_callers_own_is_left_as_it_is(bank: Bank) -> None:
    """As in a test, which rolls back at its end what `db.session` has committed."""
    with bank.app.test_request_context(), db.engine.connect() as connection, connection.begin():
        db.session(bind=connection)
        db.session.get(User, 1)
        assert bank.accounts.run(1, deposit, 1) == 1
        assert connection.in_transaction()
        assert db.session().in_transaction()
        db.session.remove()


# -- the request's instances --------------------------------------------------------------------------------------


@pytest.mark.parametrize("expiring", [True, False])
@pytest.mark.parametrize("begun", [True, False])
def test_after_run_the_requests_instances_are_what_the_batch_has_saved(bank: Bank, expiring: bool, begun: bool) -> None:
    def refuse(account: Account) -> None:
        raise LookupError

    with bank.app.test_request_context():
        db.session().expire_on_commit = expiring
        account = db.session.get(Account, 1)
        assert account is not None
        user = db.session.get(User, 1)
        if not begun:
            db.session.commit()
        later = gevent.spawn(bank.accounts.for_app(bank.app).run, 1, deposit, 5)
        assert bank.accounts.run(1, deposit, 2) in {2, 7}
        later.get()
        with pytest.raises(LookupError):
            bank.accounts.run(1, refuse)
        assert account.balance == 7
        assert user is not None
        assert [one.balance for one in user.accounts] == [7, 0]
        assert db.session().expire_on_commit is expiring


def test_an_operation_reads_what_its_caller_has_loaded_without_a_statement(bank: Bank) -> None:
    def deposit_for(account: Account, user: User) -> str:
        assert bank.pool.checkedout() == 1
        name = user.name
        assert bank.pool.checkedout() == 1
        deposit(account, 1)
        return name

    with bank.app.test_request_context():
        user = db.session.get(User, 1)
        assert user is not None
        assert bank.accounts.run(1, deposit_for, user) == "Ann"


@pytest.mark.parametrize("raising", [False, True])
def test_a_connection_that_an_operation_takes_for_its_callers_instance_is_given_back_with_it(
    bank: Bank, raising: bool
) -> None:
    started, go_on = Event(), Event()

    def wait(account: Account) -> None:
        started.set()
        go_on.wait()

    def deposit_for(account: Account, user: User) -> int:
        deposit(account, len(user.accounts))
        assert bank.pool.checkedout() == 2
        if raising:
            raise LookupError
        return account.balance

    def run(*given: Any) -> Any:
        return gevent.spawn(partial(copy_context().run, answer_of, bank.accounts.run, 1, *given))

    with bank.app.test_request_context():
        user = db.session.get(User, 1)
        first = run(wait)
        started.wait()
        answers = [run(deposit_for, user), run(lambda account: bank.pool.checkedout())]
        gevent.idle()
        go_on.set()
        gevent.joinall([first, *answers])
        answer = answers[0].get()
        assert isinstance(answer, LookupError) if raising else answer == 2
        assert answers[1].get() == 1


def test_a_caller_that_goes_on_before_its_operation_ends_keeps_its_transaction(bank: Bank) -> None:
    started, go_on = Event(), Event()

    def wait(account: Account) -> None:
        started.set()
        go_on.wait()

    with bank.app.test_request_context():
        db.session.get(User, 1)
        caller = gevent.spawn(partial(copy_context().run, bank.accounts.run, 1, wait))
        started.wait()
        caller.kill()
        db.session.get(User, 1, populate_existing=True)
        transaction = db.session().get_transaction()
        go_on.set()
        wait_until(lambda: not bank.accounts.live_batches())
        assert transaction is not None
        assert db.session().get_transaction() is transaction


def test_another_greenlet_of_the_request_goes_on_in_its_transaction_while_an_operation_ends(bank: Bank) -> None:
    started, go_on = Event(), Event()

    def wait(account: Account) -> int:
        started.set()
        go_on.wait()
        return deposit(account, 1)

    with bank.app.test_request_context():
        db.session()
        caller = gevent.spawn(partial(copy_context().run, bank.accounts.run, 1, wait))
        started.wait()
        db.session.get(User, 1)
        transaction = db.session().get_transaction()
        go_on.set()
        assert caller.get() == 1
        assert transaction is not None
        assert db.session().get_transaction() is transaction


# -- where there is nothing to give back ----------------------------------------------------------------------------


def test_inside_a_batch_the_session_is_the_batchs_and_another_processor_is_run_as_ever(bank: Bank) -> None:
    entries = bank.batches.processor(
        load_resource=lambda key: [key], save_resource=lambda key, numbers: None, name="entries"
    )

    def deposit_and_note(account: Account) -> int:
        deposit(account, 1)
        db.session.flush()
        return entries.run(4, sum)

    with bank.app.test_request_context():
        if bank.app.config["SQLALCHEMY_DATABASE_URI"].startswith("sqlite"):
            return  # which writes nothing before the save
        db.session.get(User, 1)
        assert bank.accounts.run(1, deposit_and_note) == 4
        assert bank.accounts.run(1, deposit, 1) == 2


def test_a_connection_that_the_server_has_ended_is_given_back_all_the_same(place: str, bank: Bank) -> None:
    if place.startswith("sqlite"):
        return  # it has no server
    with bank.app.test_request_context():
        user = db.session.get(User, 1)
        backend = db.session.connection().connection.info["backend"]
        administer(f"SELECT pg_terminate_backend({backend})")
        assert bank.deposit() == 1
        assert user is not None
        assert user.name == "Ann"

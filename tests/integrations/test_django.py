"""The app for Django: processors that it finds, requests, test cases, checks."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gevent
import psycopg
import pytest
from django.apps import apps
from django.conf import settings as django_settings
from django.core.checks import run_checks
from django.core.handlers.wsgi import WSGIHandler
from django.core.management import call_command
from django.core.signals import request_started
from django.db import connections, transaction
from django.db.models import F
from django.test import Client, TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from gevent import monkey

from geventbatch import LoadFailed, Processor, current_batch
from geventbatch._watch import setup_problems
from geventbatch.integrations.django import checks, processors, stop_all
from geventbatch.stores import DjangoStore
from geventbatch.stores.django._connections import close_idle
from geventbatch.testing import ImpureOperation, check_operations
from tests.support import answers
from tests.support.callers import answer_of
from tests.support.django_accounts import open_connections
from tests.support.django_project import start
from tests.support.servers import wait_until

from tests.support.django_project import urls  # isort: skip - after Django is set up
from tests.support.django_project.bank import processors as bank  # isort: skip
from tests.support.django_project.bank.models import MODELS, Account  # isort: skip
from tests.support.django_project.bank.views import add  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module", autouse=True)
def _default_database() -> Iterator[None]:
    start.create_tables("default")
    yield
    with connections["default"].schema_editor() as editor:
        for model in reversed(MODELS):
            editor.delete_model(model)
    connections["default"].close()


@pytest.fixture(autouse=True)
def _own_processor(no_other_processors: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one that the app has found may have been stopped by a test that stops them all."""
    with Processor(open_resource=DjangoStore(Account, by="name"), min_duration=0, max_batches=4) as processor:
        monkeypatch.setattr(bank, "accounts", processor)
        yield
    close_idle()
    if not connections["default"].in_atomic_block:
        connections["default"].close()


@pytest.fixture
def ann() -> Iterator[Account]:
    account = Account.objects.create(name="ann")
    yield account
    Account.objects.all().delete()


@pytest.fixture
def atomic_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)


# -- processors --------------------------------------------------------------------------------------------------


def test_the_processors_of_all_apps_are_found_by_name() -> None:
    assert processors() == {"tests.support.django_project.bank.processors.accounts": bank.accounts}


def test_they_are_stopped_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("geventbatch._core.process.processors", lambda: list(processors().values()))
    assert stop_all(timeout=5)
    assert "stopped" in repr(bank.accounts)


# -- requests ----------------------------------------------------------------------------------------------------


def test_requests_are_batched_on_a_connection_that_is_not_theirs(ann: Account) -> None:
    def ask() -> str:
        return Client().get("/ann/").content.decode()

    answers = [one.get() for one in [gevent.spawn(ask) for _ in range(5)]]
    assert sorted(answers) == ["1", "2", "3", "4", "5"]


@pytest.mark.usefixtures("atomic_requests", "ann")
def test_inside_the_transaction_of_a_request_run_is_refused_and_says_how_to_leave_it() -> None:
    with pytest.raises(RuntimeError, match="non_atomic_requests") as raised:
        Client().get("/ann/")
    assert "'ann'" in str(raised.value)
    assert Client().get("/exempt/ann/").content == b"1"


@pytest.mark.usefixtures("ann")
def test_inside_any_transaction_of_its_database_run_is_refused() -> None:
    with transaction.atomic(), pytest.raises(RuntimeError, match="atomic"):
        bank.accounts.run("ann", add, 1)
    transaction.set_autocommit(False)
    try:
        with pytest.raises(RuntimeError, match="atomic"):
            bank.accounts.run("ann", add, 1)
    finally:
        transaction.set_autocommit(True)
    assert bank.accounts.run("ann", add, 1) == 1


def test_inside_a_batch_of_another_processor_run_is_refused_and_says_what_to_do(ann: Account) -> None:
    def both(account: Account) -> None:
        other.run("Bob", add, 1)

    with (
        Processor(open_resource=DjangoStore(Account, by="name"), min_duration=0, max_duration=10) as outer,
        Processor(open_resource=DjangoStore(Account, by="name"), min_duration=0, max_duration=10) as other,
        pytest.raises(RuntimeError, match=r"'Bob' was called inside the batch of key 'ann'.* by run_across\(\)"),
    ):
        outer.run("ann", both)


@pytest.mark.usefixtures("ann")
def test_inside_a_transaction_run_is_permitted_by_the_store() -> None:
    store = DjangoStore(Account, by="name", allow_atomic=True)
    with Processor(open_resource=store, min_duration=0) as processor, transaction.atomic():
        assert processor.run("ann", add, 1) == 1
        transaction.set_rollback(True)
    assert Account.objects.get().balance == 1


@pytest.mark.usefixtures("ann")
def test_in_a_process_without_gevent_each_operation_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bank.accounts.run("ann", lambda _: current_batch().alone) is False
    monkeypatch.setattr(monkey, "is_module_patched", lambda name: False)
    assert bank.accounts.run("ann", lambda _: current_batch().alone) is True
    with transaction.atomic(), pytest.raises(RuntimeError, match="atomic"):
        bank.accounts.run("ann", add, 1)


# -- test cases --------------------------------------------------------------------------------------------------


class InTestCase(TestCase):
    """Nothing is set up here, as in a user's own."""

    @classmethod
    def setUpTestData(cls) -> None:
        Account.objects.create(name="bob", balance=10)

    def test_a_view_runs_in_the_transaction_of_the_test(self) -> None:
        assert self.client.get("/bob/").content == b"11"
        assert Account.objects.get().balance == 11

    def test_and_the_next_test_finds_nothing_of_it(self) -> None:
        assert self.client.get("/bob/").content == b"11"

    def test_it_runs_alone_on_the_connection_of_the_test(self) -> None:
        assert bank.accounts.run("bob", lambda _: (current_batch().alone, connections["default"])) == (
            True,
            connections["default"],
        )

    def test_an_operation_that_raises_leaves_the_test_going(self) -> None:
        def fail(account: Account) -> None:
            account.balance = 0
            Account.objects.create(name="bob")

        with pytest.raises(Exception, match="UNIQUE"):
            bank.accounts.run("bob", fail)
        assert Account.objects.get().balance == 10

    def test_callbacks_are_captured(self) -> None:
        seen: list[str] = []

        def change(account: Account) -> None:
            transaction.on_commit(lambda: seen.append(account.name))

        with self.captureOnCommitCallbacks(execute=True) as callbacks:
            bank.accounts.run("bob", change)
            assert seen == []
        assert len(callbacks) == 1
        assert seen == ["bob"]

    def test_its_operations_can_be_checked(self) -> None:
        def note(account: Account) -> None:
            account.balance += 1
            account.save()  # which is for the store to do

        def write(account: Account) -> None:
            Account.objects.create(name=f"{account.name} {Account.objects.count()}")

        @contextmanager
        def undone() -> Iterator[None]:
            with transaction.atomic():
                yield
                transaction.set_rollback(True)

        def give(account: Account) -> Account:
            return account

        with CaptureQueriesContext(connections["default"]) as asked, check_operations(bank.accounts):
            bank.accounts.run("bob", note)
        assert [one["sql"][:6] for one in asked].count("UPDATE") == 1
        with check_operations(bank.accounts, around=undone):
            bank.accounts.run("bob", write)
        assert Account.objects.filter(name__startswith="bob ").count() == 1
        with pytest.raises(ImpureOperation, match="result is resource"), check_operations(bank.accounts):
            bank.accounts.run("bob", give)
        for read in (lambda account: account.changed_at.year, lambda account: str(account.changed_at)):
            told = r"read resource.changed_at, which the database or the ORM computes at a save"
            with pytest.raises(ImpureOperation, match=told), check_operations(bank.accounts):
                bank.accounts.run("bob", read, read_only=True)
        assert Account.objects.get(name="bob").balance == 11

    def test_the_store_refuses_an_assigned_expression_under_the_checker_too(self) -> None:
        def double(account: Any) -> None:
            account.balance = F("balance") * 2

        with check_operations(bank.accounts), pytest.raises(TypeError, match="assigned an expression to balance"):
            bank.accounts.run("bob", double)

    def test_a_transaction_of_the_users_own_is_refused_here_too(self) -> None:
        with transaction.atomic(), pytest.raises(RuntimeError, match="non_atomic_requests"):
            bank.accounts.run("bob", add, 1)


def test_emptying_a_test_database_closes_the_idle_connections_that_would_keep_it(tmp_path: Path) -> None:
    with start.place("postgresql", tmp_path) as address:
        options = start.options_of(address)
        with start.database(address, create=False, options=options) as alias:
            options["application_name"] = alias
            Account.objects.using(alias).create(name="ann")
            store = DjangoStore(Account, by="name", using=alias)
            with Processor(open_resource=store, min_duration=0) as processor:
                processor.run("ann", add, 1)
                assert open_connections(alias) == 1
                call_command("flush", database=alias, interactive=False, verbosity=0)
                wait_until(lambda: open_connections(alias) == 0)


# -- error answers -----------------------------------------------------------------------------------------------


@pytest.fixture
def middleware() -> Iterator[None]:
    with override_settings(MIDDLEWARE=["geventbatch.integrations.django.middleware.ErrorAnswers"]):
        yield


@answers.each_error
@pytest.mark.usefixtures("middleware")
def test_each_error_is_answered_with_what_the_client_may_do(
    make: answers.Make, told: answers.Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise make()

    monkeypatch.setattr(bank, "accounts", SimpleNamespace(run=fail))
    response = Client().get("/ann/")
    answers.check(told, response.status_code, dict(response.headers), response.content)


@pytest.mark.usefixtures("middleware")
def test_the_line_of_a_caller_names_what_it_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    bank.accounts.stop()
    with caplog.at_level(logging.INFO, "geventbatch.django"):
        Client().get("/ann/?secret=1")
    (told,) = [record.getMessage() for record in caplog.records if record.name == "geventbatch.django"]
    assert told.startswith("GET '/ann/': ProcessorStopped: ")


@answers.each_accept
@pytest.mark.usefixtures("middleware")
def test_the_form_of_an_answer_is_the_one_that_the_client_prefers(accept: str, form: str) -> None:
    bank.accounts.stop()
    response = Client().get("/ann/", headers={"Accept": accept} if accept else None)
    assert answers.form_of(response.headers["Content-Type"], response.content) == form


@pytest.mark.usefixtures("middleware")
def test_any_other_error_of_a_view_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank, "accounts", SimpleNamespace())
    with pytest.raises(AttributeError):
        Client().get("/ann/")


@pytest.mark.usefixtures("middleware")
def test_a_project_says_when_clients_are_to_come_again(settings: Any) -> None:
    settings.GEVENTBATCH_RETRY_AFTER = 7
    bank.accounts.stop()
    assert Client().get("/ann/").headers["Retry-After"] == "7"


# -- checks ------------------------------------------------------------------------------------------------------


@contextmanager
def declaring(
    database: dict[str, Any] | None = None, *, allow_atomic: bool = False, **options: Any
) -> Iterator[Processor[Account]]:
    """A processor of an app, over a database of PostgreSQL that nobody connects to."""
    with start.database("postgresql://nowhere/bank", create=False) as alias:
        connections.settings[alias].update(database or {})
        store = DjangoStore(Account, by="name", using=alias, allow_atomic=allow_atomic)
        with Processor(
            open_resource=store, **{"min_duration": 0, "max_duration": 5, "max_batches": 4, **options}
        ) as processor:
            vars(bank)["declared"] = processor
            try:
                yield processor
            finally:
                del vars(bank)["declared"]


def found() -> dict[str, str]:
    return {message.id: message.msg for message in run_checks(tags=["geventbatch"]) if message.id is not None}


def test_a_right_set_up_has_nothing_to_be_told_of() -> None:
    with declaring():
        assert found() == {}


def test_a_processor_that_was_stopped_is_not_told_of() -> None:
    with declaring(max_batches=None):
        assert found().keys() == {"geventbatch.W009"}
        vars(bank)["declared"].stop()
        assert found() == {}


@pytest.mark.parametrize(
    ("number", "database", "options", "told"),
    [
        (6, {}, {"max_duration": 30}, "graceful_timeout of 30 s"),
        (7, {"OPTIONS": {"options": "-c idle_in_transaction_session_timeout=5s"}}, {}, "idle_in_transaction"),
        (7, {"OPTIONS": {"options": "-c search_path=x -c transaction_timeout=5000"}}, {}, "transaction_timeout"),
        (7, {"OPTIONS": {"read_timeout": 3}}, {}, "read_timeout"),
        (8, {"CONN_MAX_AGE": 60}, {}, "CONN_MAX_AGE"),
        (8, {"CONN_MAX_AGE": None}, {}, "CONN_MAX_AGE"),
        (9, {}, {"max_batches": None}, "max_batches"),
        (10, {"OPTIONS": {"pool": True}}, {"max_batches": 5}, "has 4 connections"),
        (10, {"OPTIONS": {"pool": {"max_size": 8}}}, {"max_batches": 9}, "has 8 connections"),
        (11, {}, {"max_duration": 0.5}, "has a max_duration of 0.5 s over a database server"),
    ],
)
def test_a_wrong_set_up_is_told_of(number: int, database: dict[str, Any], options: dict[str, Any], told: str) -> None:
    with declaring(database, **options):
        (message,) = run_checks(tags=["geventbatch"])
    assert message.id == f"geventbatch.W{number:03}"
    assert told in message.msg
    assert message.hint
    assert "bank.processors.declared" in message.msg or number == 8


@pytest.mark.parametrize(
    ("database", "options"),
    [
        ({"OPTIONS": {"options": "-c idle_in_transaction_session_timeout=6s -c transaction_timeout=0"}}, {}),
        ({"OPTIONS": {"options": "-c statement_timeout=1"}}, {}),
        ({"OPTIONS": {"read_timeout": 6}}, {}),
        ({"OPTIONS": {"pool": {"max_size": 4}}}, {}),
        ({"ENGINE": "django.db.backends.sqlite3"}, {"max_batches": None}),
        ({"ENGINE": "django.db.backends.sqlite3"}, {"max_duration": 0.5}),
    ],
)
def test_what_is_near_it_but_right_is_not_told_of(database: dict[str, Any], options: dict[str, Any]) -> None:
    with declaring(database, **options):
        assert found() == {}


def test_a_pair_is_told_of_that_saves_nothing_or_that_the_first_request_finds_beside_other_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup_problems, "_workers", type(setup_problems._workers)())
    apps.get_app_config("geventbatch").ready()
    with Processor(load_resource=print, min_duration=0) as pair:
        monkeypatch.setattr(bank, "pair", pair, raising=False)
        assert "bank.processors.pair has a load_resource without" in found()["geventbatch.W012"]
    with Processor(load_resource=print, save_resource=print, min_duration=0) as pair:
        monkeypatch.setattr(bank, "pair", pair)
        assert found() == {}
        several = {"wsgi.multiprocess": True}  # as the client of tests says too, which is no server
        Client().get("/nowhere")
        assert found() == {}
        with pytest.warns(RuntimeWarning, match="print loads and saves by a pair of functions, which compares nothing"):
            request_started.send(sender=WSGIHandler, environ=several)
        request_started.send(sender=WSGIHandler, environ=several)
        assert "bank.processors.pair loads and saves by a pair" in found()["geventbatch.W013"]


def test_atomic_requests_are_told_of_unless_a_view_is_exempt_or_the_store_permits_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with declaring({"ATOMIC_REQUESTS": True}):
        assert "bank.processors.declared" in found()["geventbatch.W005"]
    with declaring({"ATOMIC_REQUESTS": True}, allow_atomic=True):
        assert found() == {}
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    assert found() == {}
    monkeypatch.setattr(urls.urlpatterns[0], "url_patterns", urls.ATOMIC)
    assert found().keys() == {"geventbatch.W005"}


def test_a_gracious_timeout_of_the_projects_own_is_taken(settings: Any) -> None:
    settings.GEVENTBATCH_GRACEFUL_TIMEOUT = 100
    with declaring(max_duration=99):
        assert found() == {}
    with declaring(max_duration=100):
        assert found().keys() == {"geventbatch.W006"}


@pytest.fixture
def settings() -> Iterator[Any]:
    with override_settings():
        yield django_settings


@pytest.fixture
def _gevent_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gunicorn.workers.ggevent", SimpleNamespace())


@pytest.fixture
def _unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monkey, "is_module_patched", lambda name: False)


@pytest.mark.usefixtures("_unpatched")
def test_a_process_without_gevent_that_is_no_gevent_worker_is_right() -> None:
    assert found() == {}


@pytest.mark.usefixtures("_unpatched", "_gevent_worker")
def test_a_gevent_worker_without_gevents_patch_is_told_of_and_logged_at_its_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert found().keys() == {"geventbatch.W001"}
    with caplog.at_level(logging.WARNING, "geventbatch"):
        apps.get_app_config("geventbatch").ready()
    (record,) = caplog.records
    assert "geventbatch.W001" in record.getMessage()


@pytest.mark.usefixtures("_gevent_worker")
def test_a_gevent_worker_that_is_right_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    apps.get_app_config("geventbatch").ready()
    assert caplog.records == []


@contextmanager
def shared_connections() -> Iterator[None]:
    """As when Django was imported before gevent patched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "_connections", monkey.get_original("_thread", "_local")())
        yield


def test_connections_that_all_greenlets_share_are_told_of() -> None:
    with shared_connections():
        assert found().keys() == {"geventbatch.W002"}


def test_connections_that_all_greenlets_share_are_not_used(tmp_path: Path) -> None:
    with start.place("sqlite", tmp_path) as address, start.database(address, create=False) as alias:
        store = DjangoStore(Account, by="name", using=alias)
        with Processor(open_resource=store, min_duration=0) as processor, shared_connections():
            error = answer_of(processor.run, "ann", add, 1)
    assert isinstance(error, LoadFailed)
    assert "imported before gevent patched" in str(error.__cause__)


def test_psycopg_that_waits_in_c_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: Any = psycopg.waiting
    monkeypatch.setattr(waiting, "wait", waiting.wait_c)
    backend = "django.db.backends.postgresql.base"
    monkeypatch.setitem(sys.modules, backend, SimpleNamespace(Database=psycopg))
    assert found().keys() == {"geventbatch.W003"}


def test_psycopg2_that_waits_in_c_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    extensions = SimpleNamespace(get_wait_callback=lambda: None)
    monkeypatch.setitem(sys.modules, "psycopg2.extensions", extensions)
    monkeypatch.delitem(sys.modules, "geventbatch.stores.sqlalchemy._engines", raising=False)  # other tests' stores
    assert found() == {}  # since psycopg 3 is used beside it
    monkeypatch.delitem(sys.modules, "psycopg")
    assert found().keys() == {"geventbatch.W004"}
    extensions.get_wait_callback = lambda: print
    assert found() == {}


def test_every_check_has_a_test_here() -> None:
    assert len(checks._OF_PROCESS) + len(checks._OF_SETTINGS) == 11

"""What a backend of the application's own raises as a batch gives its connection back changes no outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import IntegrityError
from django.db.backends.base.base import BaseDatabaseWrapper
from gevent.event import Event

from geventbatch import Processor, ResourceMissing, current_batch
from geventbatch._core import process
from geventbatch.stores import DjangoStore
from tests.support.callers import answer_of
from tests.support.django_accounts import account, account_in, deposit, together
from tests.support.servers import wait_until

from tests.support.django_project.bank.models import Account, Entry  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LOST = "its connection or a listener raised"


class Broken(LookupError):
    pass


class Backend:
    """Its connections raise, or wait and raise, when a batch closes them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called = 0
        self.waiting = False
        close = BaseDatabaseWrapper.close

        def closing(connection: Any) -> None:
            close(connection)
            if gevent.getcurrent() in process.running:
                self.called += 1
                try:
                    if self.waiting:
                        Event().wait()
                finally:
                    self.waiting = False
                    raise Broken

        monkeypatch.setattr(BaseDatabaseWrapper, "close", closing)


@pytest.fixture(params=["sqlite", "postgresql"])
def alias(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with account_in(request.param, tmp_path) as alias:
        Entry.objects.using(alias).create(text="taken")
        yield alias


@pytest.fixture
def backend(alias: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    return Backend(monkeypatch)


@pytest.fixture
def processor(alias: str) -> Iterator[Processor[Account]]:
    store = DjangoStore(Account, by="name", using=alias, conn_max_age=0)
    with Processor(open_resource=store, min_duration=0, max_duration=10) as made:
        yield made


def add_taken(resource: Account) -> None:
    current_batch().add_row(Entry(text="taken"))
    deposit(resource, 1)


def test_what_was_saved_is_answered(
    alias: str, backend: Backend, processor: Processor[Account], caplog: pytest.LogCaptureFixture
) -> None:
    assert together(processor, lambda a: deposit(a, 1), lambda a: deposit(a, 1)) == [1, 2]
    assert account(alias).balance == 2
    assert backend.called
    wait_until(lambda: LOST in caplog.text)
    assert "after the batch of key 'a' was saved" in caplog.text


def test_what_was_refused_is_the_error_of_who_brought_it(
    alias: str, backend: Backend, processor: Processor[Account], caplog: pytest.LogCaptureFixture
) -> None:
    answers = together(processor, lambda a: deposit(a, 1), add_taken, lambda a: deposit(a, 1))
    assert isinstance(answers.pop(1), IntegrityError)
    assert answers == [1, 2]
    assert account(alias).balance == 2
    wait_until(lambda: "after the batch of key 'a' was given up" in caplog.text)


def test_a_resource_that_is_missing_is_told(backend: Backend, processor: Processor[Account]) -> None:
    assert isinstance(answer_of(processor.run, "nobody", deposit, 1), ResourceMissing)
    assert backend.called


def test_a_kill_that_comes_then_ends_the_worker_and_changes_no_answer_although_the_backend_raises_in_its_place(
    backend: Backend, processor: Processor[Account]
) -> None:
    backend.waiting = True
    caller = gevent.spawn(answer_of, processor.run, "a", deposit, 1)
    wait_until(lambda: backend.called)
    worker: Any = next(iter(process.running))
    worker.kill(block=False)
    assert caller.get() == 1
    wait_until(lambda: worker.dead)
    assert processor.run("a", deposit, 1) == 2


def test_a_deadline_that_comes_then_answers_what_was_saved(
    alias: str, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.waiting = True
    store = DjangoStore(Account, by="name", using=alias, conn_max_age=0)
    with Processor(open_resource=store, min_duration=0, max_duration=1) as processor:
        assert processor.run("a", deposit, 1) == 1
        assert account(alias).balance == 1
        assert processor.run("a", deposit, 1) == 2
    wait_until(lambda: "after the batch of key 'a' was saved" in caplog.text)

"""What is raised as a connection is given back changes nothing of what became of the batch: it is logged, with the key.

Mostly that is a listener of the application's. (For mapped classes, more of it is in test_mapped_ends.py.)
"""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import sqlalchemy as sa
from gevent.event import Event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from geventbatch import LoadFailed, ResourceMissing
from geventbatch._core import process
from tests.support.adapters.sqlalchemy import PLACES, DocumentAdapter, MappedAdapter, fresh
from tests.support.callers import answer_of
from tests.support.proxy import Proxy
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from geventbatch import Processor
    from geventbatch.testing import VirtualTime

SQLITE = pytest.param(("sqlite", "version", True), id="sqlite")
PIPELINED = pytest.param(("postgresql", "lock", True), id="postgresql-lock")
PLAIN = pytest.param(("postgresql", "version", False), id="postgresql-version-no-pipeline")
MARIADB = pytest.param(("mariadb", "version", True), id="mariadb", marks=pytest.mark.mariadb)
FENCED = pytest.param(("postgresql", "reuse", True), id="postgresql-reuse")
REUSED = pytest.param(("sqlite", "reuse", True), id="sqlite-reuse")
LOST = "its connection or a listener raised"


class Broken(LookupError):
    """What a listener raises."""


class Listeners:
    """Of an application, on an engine: they raise, or wait and raise, wherever a connection is given back."""

    def __init__(self, engine: sa.Engine, *more: str) -> None:
        self.called: list[str] = []
        self.waits = Event()
        self.waiting = False
        self.replaces = True  # what ends the wait
        for event in ("checkin", "close", "invalidate"):
            sa.event.listen(engine.pool, event, lambda driver, *_, event=event: self.hear(event, driver))
        for event in more:
            sa.event.listen(engine, event, lambda *_, event=event: self.hear(event))

    def hear(self, event: str, driver: Any = None) -> None:
        self.called.append(event)
        if driver is not None:
            with suppress(Exception):
                driver.close()  # else SQLAlchemy leaves it open, when a listener raises
        if self.waiting:
            self.waiting = False
            try:
                self.waits.wait()
            except BaseException as ending:
                if not self.replaces:
                    raise
                raise Broken(event) from ending
        raise Broken(event)


@pytest.fixture(params=[SQLITE, PIPELINED, PLAIN, MARIADB])
def setting(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["document", "bulk", "mapped"])
def adapter(request: pytest.FixtureRequest, setting: Any, tmp_path: Path) -> Iterator[Any]:
    server, kind, pipeline = setting
    with fresh(server, tmp_path) as address:
        place = PLACES[server](address)
        made = (MappedAdapter if request.param == "mapped" else DocumentAdapter)(place, kind, None, pipeline=pipeline)
        made.engine = place.engine(None, poolclass=NullPool)
        made.bulk = request.param == "bulk"
        made.put("k", 0)
        yield made
        made.direct.dispose()


@pytest.fixture
def listeners(adapter: Any) -> Listeners:
    return Listeners(adapter.engine)


def together(processor: Processor[Any], *runs: tuple[Any, ...]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, "k", *run) for run in runs]
    return [caller.get() for caller in callers]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged of it."""
    wait_until(lambda: LOST in caplog.text)
    return [record.getMessage() for record in caplog.records if LOST in record.getMessage()]


def test_what_was_saved_is_answered(adapter: Any, listeners: Listeners, caplog: pytest.LogCaptureFixture) -> None:
    with adapter.processor() as processor:
        assert together(processor, (adapter.add, 1), (adapter.add, 1)) == [1, 2]
        assert adapter.get("k") == 2
        assert together(processor, (adapter.add, 1)) == [3]
    assert listeners.called
    assert all("was saved" in line for line in told(caplog))


def test_what_was_refused_is_the_error_of_who_brought_it(
    adapter: Any, listeners: Listeners, caplog: pytest.LogCaptureFixture
) -> None:
    with adapter.processor() as processor:
        assert together(processor, (adapter.add_with_row, 1, "taken")) == [1]
        answers = together(processor, (adapter.add, 1), (adapter.add_with_row, 1, "taken"), (adapter.add, 1))
    assert isinstance(answers.pop(1), DBAPIError)
    assert answers == [2, 3]
    assert (adapter.get("k"), adapter.rows()) == (3, ["taken"])
    assert any("was given up" in line for line in told(caplog))


def test_what_an_operation_raised_is_its_caller_s(adapter: Any) -> None:
    listeners = Listeners(adapter.engine, "rollback")
    with adapter.processor() as processor:
        (answer,) = together(processor, (adapter.take, 1))
        assert str(answer) == "only 0 left"
        assert together(processor, (adapter.add, 1)) == [1]
    assert listeners.called


def test_a_resource_that_is_missing_is_told(adapter: Any) -> None:
    listeners = Listeners(adapter.engine, "rollback")
    adapter.remove("k")
    with adapter.processor() as processor:
        (answer,) = together(processor, (adapter.add, 1))
    assert isinstance(answer, ResourceMissing)
    assert listeners.called


def test_what_cannot_be_decoded_is_told(adapter: Any, listeners: Listeners) -> None:
    adapter.corrupt("k")
    with adapter.processor() as processor:
        (answer,) = together(processor, (adapter.add, 1))
    assert isinstance(answer, LoadFailed)
    assert "decoded" in str(answer.__cause__)
    assert listeners.called


@pytest.mark.parametrize("setting", [SQLITE, REUSED, PIPELINED], indirect=True)
@pytest.mark.parametrize("adapter", ["document", "mapped"], indirect=True)
def test_an_idempotency_key_is_found_again(adapter: Any, listeners: Listeners) -> None:
    with adapter.processor() as processor:
        for _ in range(2):
            assert processor.run("k", adapter.add, 1, idempotency_key="once") == 1
            assert isinstance(answer_of(processor.run, "k", adapter.take, 9, idempotency_key="never"), LookupError)
    assert adapter.get("k") == 1
    assert listeners.called


@pytest.mark.parametrize("setting", [SQLITE, PLAIN], indirect=True)
def test_a_conflict_is_replayed(adapter: Any, listeners: Listeners) -> None:
    runs: list[int] = []

    def add_late(resource: Any) -> int:
        runs.append(1)
        if len(runs) == 1:
            adapter.put("k", 5)
        total: int = adapter.add(resource, 1)
        return total

    with adapter.processor() as processor:
        assert together(processor, (add_late,)) == [6]
    assert listeners.called


@pytest.mark.parametrize("setting", [SQLITE, PIPELINED, PLAIN], indirect=True)
def test_what_somebody_else_has_inserted_meanwhile_is_loaded(adapter: Any, listeners: Listeners) -> None:
    runs: list[int] = []

    def add_late(resource: Any) -> int:
        runs.append(1)
        if len(runs) == 1:
            adapter.put("k", 5)
        total: int = adapter.add(resource, 1)
        return total

    adapter.remove("k")
    with adapter.processor(missing="make") as processor:
        assert together(processor, (add_late,)) == [6]
    assert listeners.called


@pytest.mark.parametrize("setting", [PIPELINED, PLAIN, FENCED], indirect=True)
@pytest.mark.parametrize("adapter", ["document", "mapped"], indirect=True)
def test_what_became_of_a_commit_whose_answer_is_lost_is_found_out(adapter: Any) -> None:
    with Proxy(adapter.place.endpoint()) as proxy:
        adapter.engine = adapter.place.engine(proxy, poolclass=NullPool)
        listeners = Listeners(adapter.engine)
        with adapter.processor() as processor:
            proxy.cut_after(adapter.commit_marker, adapter.commit_answer)
            assert together(processor, (adapter.add, 1)) == [1]
    assert adapter.get("k") == 1
    assert listeners.called


@pytest.mark.parametrize("setting", [SQLITE, PIPELINED, PLAIN], indirect=True)
@pytest.mark.parametrize("replaces", [True, False])
def test_a_kill_that_comes_then_ends_the_worker_and_changes_no_answer_although_a_listener_raises_in_its_place(
    adapter: Any, listeners: Listeners, replaces: bool, caplog: pytest.LogCaptureFixture
) -> None:
    listeners.replaces = replaces
    with adapter.processor() as processor:
        listeners.waiting = True
        caller = gevent.spawn(answer_of, processor.run, "k", adapter.add, 1)
        wait_until(lambda: listeners.called)
        worker: Any = next(iter(process.running))
        worker.kill(block=False)
        answer = caller.get()
        assert answer == 1
        wait_until(lambda: worker.dead)
        assert "was saved" in told(caplog)[0]
        assert together(processor, (adapter.add, 1)) == [2]


@pytest.mark.parametrize("setting", [PIPELINED, PLAIN], indirect=True)
def test_a_connection_that_the_server_has_ended_at_rest_is_no_error(
    adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    adapter.engine = adapter.place.engine(None, pool_size=1, max_overflow=0)
    with adapter.processor() as processor:
        assert together(processor, (adapter.add, 1)) == [1]
        with adapter.engine.connect() as connection:
            (process_id,) = connection.exec_driver_sql("SELECT pg_backend_pid()").one()
        with adapter.direct.connect() as connection:
            connection.exec_driver_sql(f"SELECT pg_terminate_backend({process_id})")
        assert together(processor, (adapter.add, 1)) == [2]
    adapter.engine.dispose()
    gevent.idle()
    assert caplog.records == []


@pytest.mark.parametrize("setting", [SQLITE], indirect=True)
@pytest.mark.parametrize("replaces", [True, False])
def test_a_deadline_that_comes_then_answers_what_was_saved_and_the_log_says_where_it_waited(
    adapter: Any, listeners: Listeners, replaces: bool, clock: VirtualTime, caplog: pytest.LogCaptureFixture
) -> None:
    listeners.replaces = replaces
    with adapter.processor(max_duration=5) as processor:
        listeners.waiting = True
        caller = gevent.spawn(answer_of, processor.run, "k", adapter.add, 1)
        clock.advance(1)
        assert listeners.called
        assert not caller.ready()
        clock.advance(5)
        assert caller.get() == 1
        assert adapter.get("k") == 1
        clock.advance(1)
        lines = [record.getMessage() for record in caplog.records if "was saved" in record.getMessage()]
        assert len(lines) == 1
        assert f" was saved, its {'connection' if replaces else 'max_duration'}" in lines[0]
        assert together(processor, (adapter.add, 1)) == [2]


@pytest.mark.parametrize("setting", [SQLITE], indirect=True)
@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("handled", ["timeout", "exit"])
def test_what_a_listener_has_handled_itself_changes_no_answer(adapter: Any, batching: bool, handled: str) -> None:
    def hear(*_: object) -> None:
        try:
            if handled == "exit":
                sys.exit(2)
            with gevent.Timeout(0):
                gevent.sleep(1)
        except (gevent.Timeout, SystemExit):
            raise Broken  # noqa: B904 - the one that was handled is its context

    sa.event.listen(adapter.engine.pool, "checkin", hear)
    with adapter.processor(batching=batching) as processor:
        assert together(processor, (adapter.add, 1)) == [1]
    assert adapter.get("k") == 1


@pytest.mark.parametrize("setting", [SQLITE], indirect=True)
@pytest.mark.parametrize("adapter", ["document", "mapped"], indirect=True)
@pytest.mark.parametrize("error", [gevent.GreenletExit(), gevent.Timeout(9)], ids=["kill", "timeout"])
def test_what_ends_a_caller_then_is_its_own_with_batching_off(
    adapter: Any, listeners: Listeners, error: BaseException
) -> None:
    with adapter.processor(batching=False) as processor:
        listeners.waiting = True
        caller = gevent.spawn(answer_of, processor.run, "k", adapter.add, 1)
        wait_until(lambda: listeners.called)
        caller.kill(error, block=False)
        assert caller.get() is error
        assert together(processor, (adapter.add, 1)) == [2]

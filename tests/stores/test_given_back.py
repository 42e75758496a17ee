"""COMMIT was answered, and the pool keeps the batch's greenlet waiting: what was saved is answered as saved."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from gevent.event import Event
from psycopg_pool import ConnectionPool

from geventbatch import BatchTimeout, Processor, current_batch
from geventbatch._core import process
from geventbatch.stores import SQLStore
from tests.stores.test_sql_store import LOAD, MANY, SAVE, asked, database, sell
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["database"]


class SlowPool(ConnectionPool):
    """It waits, once, before it takes a connection back."""

    def __init__(self, database: str) -> None:
        super().__init__(database, min_size=1, max_size=1, open=True)
        self.waits: Any = Event()
        self.waiting: Any = None
        self.slow = True
        self.raises: BaseException | None = None

    def putconn(self, conn: Any) -> None:
        if self.slow:
            self.slow = False
            self.waiting = gevent.getcurrent()
            if self.raises is not None:
                raise self.raises
            self.waits.wait()
        super().putconn(conn)


@pytest.fixture
def pool(database: str) -> Iterator[SlowPool]:
    with SlowPool(database) as pool:
        pool.wait()
        yield pool


def opener(pool: Any, **options: Any) -> Any:
    made: Any = SQLStore
    return made(pool, load=LOAD, save=SAVE, **options)


@contextmanager
def processor(pool: Any, max_duration: float = 10, **options: Any) -> Iterator[Processor[Any]]:
    store = opener(pool, load_many=MANY)
    given: Any = {"open_resource": store, "min_duration": 0, "max_duration": max_duration, "workers": 2, **options}
    with Processor(**given) as made:
        yield made


@pytest.mark.parametrize("batching", [True, False])
def test_the_deadline_strikes_there_and_the_pool_has_its_connection_again(
    pool: SlowPool, database: str, batching: bool
) -> None:
    with processor(pool, max_duration=1, batching=batching) as shows:
        assert shows.run(1, sell) == 9
        assert asked(database) == [(9,)]
        assert not pool.waits.is_set()
        assert shows.run(1, sell) == 8  # on the only one that the pool lends


def test_a_kill_strikes_there(pool: SlowPool, database: str) -> None:
    with processor(pool) as shows:
        caller = gevent.spawn(answer_of, shows.run, 1, sell)
        wait_until(lambda: pool.waiting)
        assert pool.waiting in process.running
        pool.waiting.kill(block=False)
        assert caller.get() == 9
        wait_until(lambda: pool.waiting.dead)
        assert shows.run(1, sell) == 8
    assert asked(database) == [(8,)]


def test_a_timeout_of_the_pools_own_strikes_there(pool: SlowPool, database: str) -> None:
    pool.raises = gevent.Timeout(3)
    with processor(pool) as shows:
        assert shows.run(1, sell) == 9
        assert shows.run(1, sell) == 8
    assert asked(database) == [(8,)]


def test_what_a_bulk_has_saved_is_answered_and_what_it_has_not_is_told(pool: SlowPool, database: str) -> None:
    def lose(show: Any) -> None:
        show.title = "Tosca"  # which save does not write

    store = opener(pool, load_many=MANY)
    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=1, workers=1) as shows:
        calls = [(1, sell), (2, lose)]
        saved, lost = (one.get() for one in [gevent.spawn(answer_of, shows.run, *call) for call in calls])
    assert saved == 9
    assert isinstance(lost, BatchTimeout)
    assert asked(database, "SELECT stock, title FROM shows ORDER BY id") == [(9, "Faust"), (10, "Aida")]


def test_the_parts_of_a_batch_that_are_behind_are_told_that_nothing_was_saved(pool: SlowPool, database: str) -> None:
    def delete(show: Any) -> None:
        current_batch().delete()

    store = opener(pool, delete="DELETE FROM shows WHERE id = %(key)s")
    with Processor(open_resource=store, min_duration=0, max_duration=1) as shows:
        first, behind = (one.get() for one in [gevent.spawn(answer_of, shows.run, 1, call) for call in (delete, sell)])
    assert first is None
    assert isinstance(behind, BatchTimeout)
    assert behind.retry_safe
    assert asked(database) == []


@pytest.mark.parametrize("raises", [False, True], ids=["it waits", "it raises at the deadline"])
@pytest.mark.parametrize("form", ["one key", "bulk", "across"])
def test_the_parts_behind_are_told_that_and_the_next_batch_of_the_key_runs(
    pool: SlowPool, database: str, form: str, raises: bool
) -> None:
    applied: list[int] = []
    behind: list[Any] = []

    def sell_some(found: Any, count: int) -> int:
        applied.append(count)
        pool.slow = len(applied) == 4  # the three together were refused, and the first part is saved next
        return sell(found[0] if form == "across" else found, count)

    def wait() -> None:
        behind.extend(gevent.spawn(answer_of, run, sell_some, 1) for _ in range(2))
        gevent.sleep(0)
        if not raises:
            Event().wait()
        process.running[gevent.getcurrent()].deadline = 0.0
        raise gevent.Timeout(3)  # of its own

    pool.waits = SimpleNamespace(wait=wait)
    store = opener(pool, load_many=MANY)
    opens: Any = {"open_resources": store.open_resources} if form == "bulk" else {"open_resource": store}
    with Processor(**opens, min_duration=0, max_duration=1, workers=1) as shows:
        run: Any = partial(shows.run_across, [1, 2]) if form == "across" else partial(shows.run, 1)
        calls = [gevent.spawn(answer_of, run, sell_some, count) for count in (1, 100, 1)]
        saved, *others = [one.get() for one in calls]
        assert saved == 9
        assert [(type(one), one.phase, one.retry_safe) for one in others] == [(BatchTimeout, "operations", True)] * 2
        assert [one.get() for one in behind] == [8, 7]
    assert asked(database) == [(7,)]


def test_a_scope_of_the_users_around_the_store_has_not_ended_with_its_commit(pool: SlowPool) -> None:
    store = opener(pool)

    @contextmanager
    def around(key: int) -> Iterator[Any]:
        with store(key) as show:
            yield show

    with Processor(open_resource=around, min_duration=0, max_duration=1) as shows:
        error = answer_of(shows.run, 1, sell)
    assert isinstance(error, BatchTimeout)
    assert (error.phase, error.retry_safe) == ("save", False)

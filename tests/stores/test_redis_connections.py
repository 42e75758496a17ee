"""Whatever a client of redis-py was told to do with its connections, a RedisStore's loads and saves do too."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import redis
from gevent.socket import wait_read
from redis.backoff import NoBackoff
from redis.event import AfterConnectionReleasedEvent, EventDispatcher, EventListenerInterface
from redis.observability.providers import get_observability_instance
from redis.retry import Retry

from geventbatch import BatchAborted, LoadFailed, Processor
from geventbatch.stores import RedisStore
from geventbatch.stores.redis._server import take_connection
from tests.stores.test_stores import Pause, spawned
from tests.support.adapters.redis import CASES, LOAD, SAVE, RedisAdapter
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

OPTIONS: dict[str, dict[str, Any]] = {
    "RESP2": {"protocol": 2},
    "RESP3": {"protocol": 3},
    "decoding": {"decode_responses": True},
    "one connection": {"single_connection_client": True},
    "health checks": {"health_check_interval": 1e-9},
    "named": {"client_name": "mine", "db": 1},
}


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[RedisAdapter]:
    with CASES[0].fresh(tmp_path) as address, CASES[0].opens(address) as opened:
        assert isinstance(opened, RedisAdapter)
        yield opened


@contextmanager
def processor(adapter: RedisAdapter, client: redis.Redis, **options: Any) -> Iterator[Processor[dict[str, int]]]:
    store = RedisStore[dict[str, int]](client, prefix=adapter.name(""), missing=lambda _: {"total": 0})
    settings: dict[str, Any] = {"min_duration": 0, "max_duration": 20, **options}
    with Processor(open_resource=store, **settings) as opened:
        yield opened


def client_of(adapter: RedisAdapter, kind: type[redis.Redis] = redis.Redis, **options: Any) -> redis.Redis:
    """Whose pool has one connection, so that each command meets what the last one has left."""
    return kind(host=adapter.proxy.host, port=adapter.proxy.port, max_connections=1, **options)


def add(resource: dict[str, int]) -> int:
    resource["total"] += 1
    return resource["total"]


@pytest.mark.parametrize("name", OPTIONS)
def test_batches_work_with_whatever_a_client_is_set_to(adapter: RedisAdapter, name: str) -> None:
    with (
        redis.Redis(host=adapter.proxy.host, port=adapter.proxy.port, **OPTIONS[name]) as client,
        processor(adapter, client) as opened,
    ):
        assert [opened.run("k", add) for _ in range(3)] == [1, 2, 3]
        adapter.direct.script_flush()
        assert opened.run("k", add, idempotency_key="a") == 4
        lost = adapter.proxy.cut_after(SAVE)
        assert opened.run("k", add) == 5
        assert opened.run("k", add, idempotency_key="a") == 4
        assert lost.met == 1
        for name_in_redis in client.scan_iter(f"*{adapter.name('')}*"):
            client.delete(name_in_redis)


def test_the_health_of_a_connection_is_checked_before_a_load_and_a_save(adapter: RedisAdapter) -> None:
    def pings() -> int:
        return int(adapter.direct.info("commandstats")["cmdstat_ping"]["calls"])

    adapter.direct.ping()
    with client_of(adapter, health_check_interval=1e-9) as client, processor(adapter, client) as opened:
        opened.run("k", add)
        before = pings()
        opened.run("k", add)
        assert pings() == before + 2


@pytest.mark.parametrize("retries", [0, 2])
def test_a_load_is_sent_as_often_as_the_client_is_told_to_try(adapter: RedisAdapter, retries: int) -> None:
    retry = Retry(NoBackoff(), retries)
    # redis-py 5 repeats only the errors that it is told.
    options: dict[str, Any] = {"retry": retry, "retry_on_error": [redis.ConnectionError] if retries else []}
    with client_of(adapter, **options) as client, processor(adapter, client) as opened:
        lost = adapter.proxy.cut_before(LOAD, times=retries)
        assert opened.run("k", add) == 1
        assert lost.met == retries
        lost = adapter.proxy.cut_before(LOAD, times=100)
        error = answer_of(opened.run, "k", add)
        adapter.proxy.forget_rules()
        assert isinstance(error, LoadFailed)
        assert isinstance(error.__cause__, redis.ConnectionError)
        assert lost.met == retries + 1
        assert opened.run("k", add) == 2


class Traced(redis.Redis):
    """A client of the application's own."""

    seen: tuple[Any, ...] = ()

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.seen = (*self.seen, args[0])
        traced: Any = super()
        return traced.execute_command(*args, **options)


@pytest.mark.parametrize("where", ["subclass", "instance", "class"])
def test_what_traces_the_commands_of_a_client_sees_the_load(
    adapter: RedisAdapter, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    seen: list[Any] = []
    client = client_of(adapter, Traced if where == "subclass" else redis.Redis)
    if where != "subclass":
        traced: Any = client if where == "instance" else redis.Redis
        own = traced.execute_command

        def execute(*args: Any, **options: Any) -> Any:
            seen.append(args[0] if where == "instance" else args[1])
            return own(*args, **options)

        monkeypatch.setattr(traced, "execute_command", execute)
    with client, processor(adapter, client) as opened:
        assert opened.run("k", add) == 1
    assert [*seen, *getattr(client, "seen", ())] == ["EVAL"]


def test_what_watches_the_commands_of_all_clients_is_told_of_the_load(
    adapter: RedisAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(redis.client, "record_operation_duration", lambda **of: told.append(of["command_name"]))
    with client_of(adapter) as client, processor(adapter, client) as opened:
        assert opened.run("k", add) == 1
        assert told == []
        watched = get_observability_instance()
        monkeypatch.setattr(watched, "_provider_manager", object())
        assert opened.run("k", add) == 2
    assert told == ["EVAL"]


class Listener(EventListenerInterface):
    """Who is told that a connection is in the pool again, as what authenticates connections again is."""

    def __init__(self) -> None:
        self.released: list[object] = []

    def listen(self, event: object) -> None:
        self.released.append(event)


def test_a_listener_of_the_pools_is_told_of_each_connection_that_is_returned(adapter: RedisAdapter) -> None:
    listener = Listener()
    listening: Any = EventDispatcher({AfterConnectionReleasedEvent: [listener]})
    pool: Any = redis.ConnectionPool(
        host=adapter.proxy.host, port=adapter.proxy.port, max_connections=1, event_dispatcher=listening
    )
    with processor(adapter, redis.Redis(connection_pool=pool)) as opened:
        assert [opened.run("k", add) for _ in range(3)] == [1, 2, 3]
    pool.disconnect()
    assert len(listener.released) == 6


def test_a_connection_that_has_the_answer_to_somebody_else_in_it_is_not_used(adapter: RedisAdapter) -> None:
    with client_of(adapter, protocol=2) as client, processor(adapter, client, max_attempts=1) as opened:
        opened.run("k", add)
        operation = Pause(add)
        caller = spawned(opened.run, "k", operation)
        operation.reached.wait()
        leave_an_answer(adapter, client)
        operation.ended.set()
        assert caller.get() == 2
        leave_an_answer(adapter, client)
        assert opened.run("k", add) == 3
        assert adapter.proxy.accepted == 3


def leave_an_answer(adapter: RedisAdapter, client: Any) -> None:
    connection = take_connection(client.connection_pool)
    connection.send_command("EVAL", "return 1", 0)
    wait_read(connection._sock.fileno())
    client.connection_pool.release(connection)


def test_a_pool_has_as_many_connections_as_batches_at_once_and_all_of_them_back(adapter: RedisAdapter) -> None:
    with (
        redis.Redis(host=adapter.proxy.host, port=adapter.proxy.port) as client,
        processor(adapter, client, workers=8) as opened,
    ):
        for _ in range(5):
            callers = [spawned(opened.run, number, add) for number in range(8)]
            gevent.joinall(callers, raise_error=True)
        pool: Any = client.connection_pool
        assert pool._in_use_connections == set()
        assert len(pool._available_connections) == len(set(pool._available_connections)) == adapter.proxy.accepted
        assert adapter.proxy.accepted <= 8


@pytest.mark.parametrize("when", ["before the load", "before the save"])
def test_a_connection_that_the_server_has_closed_is_replaced_before_anything_is_sent(
    adapter: RedisAdapter, when: str
) -> None:
    with (
        client_of(adapter, client_name=adapter.name(""), retry=Retry(NoBackoff(), 0)) as client,
        processor(adapter, client, max_attempts=1) as opened,
    ):
        opened.run("k", add)
        operation = Pause(add)
        if when == "before the load":
            close_at_the_server(adapter)
            operation.ended.set()
        caller = spawned(opened.run, "k", operation)
        operation.reached.wait()
        if when == "before the save":
            close_at_the_server(adapter)
            operation.ended.set()
        assert caller.get() == 2
    assert adapter.direct.hget(adapter.name("k"), "version") == b"2"


def close_at_the_server(adapter: RedisAdapter) -> None:
    """Close the connections of the client, and wait until that has come through the proxy."""
    for line in adapter.direct.client_list():
        if line["name"] == adapter.name(""):
            adapter.direct.client_kill_filter(_id=line["id"])
    wait_until(lambda: adapter.proxy.open_connections() == 0)


@pytest.mark.parametrize("marker", [LOAD, SAVE], ids=["load", "save"])
@pytest.mark.parametrize("how", ["a deadline", "a kill", "a timeout of the caller's"])
def test_a_connection_that_was_left_before_its_answer_came_is_not_used_again(
    adapter: RedisAdapter, how: str, marker: bytes
) -> None:
    # Unbatched, the caller itself loads and saves.
    options: dict[str, Any] = {"max_duration": 0.3} if how == "a deadline" else {"batching": False}
    with client_of(adapter) as client:
        client.set(adapter.name("text"), "a text")
        with processor(adapter, client) as opened:
            opened.run("other", add)
        before = adapter.proxy.accepted
        with processor(adapter, client, **options) as opened, adapter.proxy.hold_answer(marker) as rule:
            caller = spawned(interrupted if "caller" in how else answer_of, opened.run, "k", add)
            wait_until(rule.reached)
            rule.times = 0
            if how == "a kill":
                caller.kill()
            else:
                answer = caller.get()
                found_out = marker == SAVE and answer == 1  # on another connection, in what was left of the time
                assert found_out or isinstance(answer, BatchAborted if how == "a deadline" else gevent.Timeout)
            assert client.get(adapter.name("text")) == b"a text"
        assert adapter.proxy.accepted > before
        assert adapter.get("k") == (1 if marker == SAVE else None)


def interrupted(call: Callable[..., object], *args: Any) -> object:
    silent: Any = False  # the stubs lack it
    with gevent.Timeout(0.3, silent) as timeout:
        return call(*args)
    return timeout


@pytest.mark.parametrize("protocol", [2, 3])
def test_an_operation_may_use_the_only_connection_of_its_clients_pool(adapter: RedisAdapter, protocol: int) -> None:
    def operation(client: Any, resource: dict[str, int]) -> bytes:
        add(resource)
        found: bytes = client.echo("at hand")
        return found

    with client_of(adapter, protocol=protocol) as client, processor(adapter, client) as opened:
        assert [opened.run("k", partial(operation, client)) for _ in range(3)] == [b"at hand"] * 3
        assert adapter.proxy.accepted == 1


def test_what_a_server_pushes_into_a_connection_is_no_answer(adapter: RedisAdapter) -> None:
    with client_of(adapter, protocol=3) as client, processor(adapter, client) as opened:
        opened.run("k", add)
        client.execute_command("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", adapter.name(""))
        answers = []
        for number in range(20):
            adapter.direct.set(adapter.name(f"beside {number}"), "x")  # pushes
            answers.append(opened.run("k", add))  # its save pushes, too
        assert answers == list(range(2, 22))

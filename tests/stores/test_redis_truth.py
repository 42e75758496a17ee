"""What a RedisStore says of a save is what became of it, whatever the server refuses, in the middle of a script too."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit
from uuid import uuid4

import gevent
import pytest
import redis
from gevent.server import StreamServer
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from geventbatch import BatchError, Conflict, LoadFailed, NotSaved, Processor, SaveFailed, current_batch
from geventbatch.stores import RedisStore
from geventbatch.stores.redis._names import has_tag, outcome_name
from geventbatch.stores.redis._scripts import SAVE
from tests.support.callers import answer_of
from tests.support.redis_server import cluster_url, connected, redis_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMANDS = ["hmget", "hexists", "mget", "exists", "set", "hset", "hdel", "persist", "pexpire"]
"""What the script of a save calls."""


class Place:
    """A prefix on a server, an administrator, and stores of users with fewer rights."""

    def __init__(self, url: str, stack: ExitStack, *, is_cluster: bool) -> None:
        server = urlsplit(url)
        self.host, self.port = server.hostname or "", server.port or 6379
        self.admin = stack.enter_context(connected(url))
        self.prefix = f"{uuid4().hex}:"
        self._is_cluster = is_cluster
        self._stack = stack
        self._users: list[str] = []
        stack.callback(self._clear)

    def client(self, *, port: int | None = None, without: str | None = None) -> Any:
        options: dict[str, Any] = {"host": self.host, "port": port or self.port}
        if without is not None:
            name = f"user-{uuid4().hex}"
            self.admin.execute_command("ACL", "SETUSER", name, "on", ">secret", "~*", "+@all", f"-{without}")
            self._users.append(name)
            options |= {"username": name, "password": "secret"}
        if self._is_cluster:
            found: Any = redis.RedisCluster(**options)
        else:
            found = redis.Redis(**options, retry=Retry(NoBackoff(), 0))
        self._stack.callback(found.close)
        return found

    def store(self, client: Any = None, **options: Any) -> RedisStore[dict[str, int]]:
        return RedisStore(client or self.client(), prefix=self.prefix, missing=lambda _: {"total": 0}, **options)

    def saved(self, key: str = "k") -> tuple[bytes | None, set[bytes]]:
        """The value at *key*, and the outcomes."""
        outcomes = {name for name in self.admin.scan_iter(f"*{self.prefix}*idempotency*") if self.admin.get(name)}
        return self.admin.hget(self.prefix + key, "value"), outcomes

    def _clear(self) -> None:
        for name in self.admin.scan_iter(f"*{self.prefix}*", count=1000):
            self.admin.delete(name)
        for user in self._users:
            self.admin.execute_command("ACL", "DELUSER", user)


@pytest.fixture(params=["server", pytest.param("cluster", marks=pytest.mark.variants)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    is_cluster = request.param == "cluster"
    with ExitStack() as stack:
        yield Place(cluster_url() if is_cluster else redis_url(), stack, is_cluster=is_cluster)


@pytest.fixture
def alone() -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(redis_url(), stack, is_cluster=False)


def add(resource: dict[str, int]) -> int:
    resource["total"] += 1
    return resource["total"]


def delete(_: dict[str, int]) -> str:
    current_batch().delete()
    return "deleted"


def processor(store: RedisStore[Any], form: str = "one", **options: Any) -> Processor[Any]:
    opens: Any = {"open_resources": store.open_resources} if form == "bulk" else {"open_resource": store}
    return Processor(**opens, min_duration=0, max_duration=30, **options)


SITUATIONS: dict[str, tuple[list[Callable[..., Any]], Callable[..., Any]]] = {
    "new": ([], add),
    "there": ([add], add),
    "deleted": ([add], delete),
    "made anew": ([add, delete], add),
}
"""What was done before, and what is done by a user who lacks a right."""


@pytest.mark.parametrize("ttl", [None, 1000])
@pytest.mark.parametrize("form", ["idempotent", "bulk"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_without_the_right_to_one_command_all_is_written_or_nothing(
    place: Place, situation: str, form: str, ttl: float | None
) -> None:
    before, operation = SITUATIONS[situation]
    refused = set()
    options: dict[str, Any] = {"idempotency_key": "a"} if form == "idempotent" else {}
    for command in COMMANDS:
        with processor(place.store(ttl=ttl), form) as able:
            for one in before:
                able.run(command, one)
        there = place.saved(command)
        with processor(place.store(place.client(without=command), ttl=ttl), form) as unable:
            answer = answer_of(unable.run, command, operation, **options)
        value, outcomes = place.saved(command)
        if isinstance(answer, BatchError):
            refused.add(command)
            assert answer.retry_safe
            assert (value, outcomes) == there
            if there[0] is not None and ttl is None:
                assert place.admin.ttl(place.prefix + command) == -1
        else:
            assert value == (None if operation is delete else b'{"total":%d}' % answer)
            assert len(outcomes) == len(there[1]) + len(options)
    assert {"hmget", "hexists", "hset"} <= refused


@pytest.mark.parametrize("seconds", [1e16, 1e308, 2**63, 1e-9])
def test_any_time_to_live_is_one_that_redis_has(alone: Place, seconds: float) -> None:
    with processor(alone.store(ttl=seconds, idempotency_ttl=max(seconds, 10))) as opened:
        assert opened.run("k", add, idempotency_key="a") == 1
    if seconds > 1:
        assert alone.saved()[0] == b'{"total":1}'


@contextmanager
def refusing(place: Place, how: str) -> Iterator[None]:
    """Have the server write nothing."""
    if how == "no memory":
        place.admin.config_set("maxmemory", "1")
    else:
        place.admin.execute_command("REPLICAOF", place.host, 1)
    try:
        yield
    finally:
        place.admin.config_set("maxmemory", "0")
        place.admin.execute_command("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("form", ["one", "idempotent", "bulk"])
@pytest.mark.parametrize("how", ["no memory", "a replica"])
def test_a_server_that_writes_nothing_is_told_as_one(alone: Place, how: str, form: str) -> None:
    options: dict[str, Any] = {"idempotency_key": "a"} if form == "idempotent" else {}
    with processor(alone.store(), form) as opened:
        opened.run("k", add)
        with refusing(alone, how):
            there = alone.saved()
            for key in ("k", "new"):
                error = answer_of(opened.run, key, add, **options)
                assert isinstance(error, SaveFailed)
                assert error.retry_safe
                assert isinstance(error.__cause__, NotSaved)
                assert not isinstance(error.__cause__, Conflict)
            assert alone.saved() == there
            assert alone.saved("new")[0] is None
        assert opened.run("k", add, **options) == 2


def test_something_else_in_the_place_of_a_resource_is_not_written_over(alone: Place) -> None:
    def takes_the_place(resource: dict[str, int]) -> None:
        add(resource)
        alone.admin.delete(alone.prefix + "k")
        alone.admin.set(alone.prefix + "k", "a text")

    with processor(alone.store()) as opened:
        error = answer_of(opened.run, "k", takes_the_place)
        assert isinstance(error, SaveFailed)
        assert error.retry_safe
        assert isinstance(answer_of(opened.run, "k", add), LoadFailed)
    assert alone.admin.get(alone.prefix + "k") == b"a text"


def test_something_else_in_the_place_of_an_outcome_is_not_written_over(alone: Place) -> None:
    name = outcome_name(f"{alone.prefix}k".encode(), b"a")
    alone.admin.hset(name, "value", "of somebody else")
    with processor(alone.store()) as opened:
        error = answer_of(opened.run, "k", add, idempotency_key="a")
        assert isinstance(error, SaveFailed)
        assert error.retry_safe
        assert opened.run("k", add, idempotency_key="b") == 1
    assert alone.admin.hgetall(name) == {b"value": b"of somebody else"}


# -- what stands before the server ------------------------------------------------------------------------------


class Relay:
    """Leads to a server, and answers one save by an error of its own, as proxies do that have lost theirs."""

    def __init__(self, place: Place, *, forwards: bool) -> None:
        self._place = place
        self._forwards = forwards
        self.armed = True
        self._server = StreamServer(("127.0.0.1", 0), self._serve)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @property
    def port(self) -> int:
        return int(self._server.server_port or 0)

    def _serve(self, client: Any, _: object) -> None:
        server = gevent.socket.create_connection((self._place.host, self._place.port))
        try:
            while asked := client.recv(1 << 16):
                if self.armed and SAVE[:300].encode() in asked:
                    self.armed = False
                    if self._forwards:
                        server.sendall(asked)
                        server.recv(1 << 16)
                    client.sendall(b"-ERR upstream failure\r\n")
                    continue
                server.sendall(asked)
                client.sendall(server.recv(1 << 16))
        except OSError:
            pass
        finally:
            server.close()
            client.close()


@pytest.mark.parametrize("form", ["one", "idempotent", "bulk"])
@pytest.mark.parametrize("forwards", [True, False])
def test_after_an_error_of_a_proxy_the_save_is_looked_for(alone: Place, form: str, *, forwards: bool) -> None:
    options: dict[str, Any] = {"idempotency_key": "a"} if form == "idempotent" else {}
    with Relay(alone, forwards=forwards) as relay:
        client = alone.client(port=relay.port)
        with processor(alone.store(client), form) as opened:
            answer = answer_of(opened.run, "k", add, **options)
        client.close()
    assert not relay.armed
    if forwards:
        assert answer == 1
        assert alone.saved()[0] == b'{"total":1}'
    else:
        assert isinstance(answer, SaveFailed)
        assert answer.retry_safe
        assert alone.saved() == (None, set())


# -- the names of outcomes --------------------------------------------------------------------------------------

NAMES = st.lists(
    st.sampled_from(["{", "}", "a", ":", " ", "idempotency", ":idempotency:", "-of:", " idempotency:"]), max_size=8
).map("".join)
KEYS = st.lists(st.sampled_from(["a", ":", "idempotency", ":idempotency:", "{", "}", "-of:"]), min_size=1).map("".join)


@settings(deadline=None)
@given(st.tuples(NAMES, KEYS), st.tuples(NAMES, KEYS))
def test_no_two_outcomes_have_one_name(one: tuple[str, str], other: tuple[str, str]) -> None:
    names = [outcome_name(resource.encode(), key.encode()) for resource, key in (one, other)]
    assert (names[0] == names[1]) == (one == other)


@settings(deadline=None)
@given(NAMES, KEYS)
def test_an_outcome_is_in_the_slot_of_its_resource(resource: str, key: str) -> None:
    name = resource.encode()
    if not has_tag(name) and ("}" in resource or not resource):
        return  # a cluster is told so at the door
    assert key_slot(outcome_name(name, key.encode())) == key_slot(name)


@pytest.mark.parametrize(
    ("resource", "key", "name"),
    [
        ("ICE 1", "a", "{ICE 1}:idempotency:a"),
        ("trains:ICE 1", "a:b", "{trains:ICE 1}:idempotency:a:b"),
        ("{tenant}:ICE 1", "a", "{tenant}:ICE 1:idempotency:a"),
        ("trains:{ICE 1}", "a", "trains:{ICE 1}:idempotency:a"),
    ],
)
def test_outcomes_have_the_names_that_they_always_had(resource: str, key: str, name: str) -> None:
    assert outcome_name(resource.encode(), key.encode()) == name.encode()


@pytest.mark.parametrize(("one", "other"), [("x", "{x}"), ("a}b{c", "{a}b{c}"), ("a{b", "{a{b}")])
def test_the_outcome_of_one_resource_is_not_given_for_another(alone: Place, one: str, other: str) -> None:
    store: RedisStore[dict[str, int]] = RedisStore(alone.client(), missing=lambda _: {"total": 0})
    mark = alone.prefix.replace(":", "")
    first, second = (key.replace("x", mark).replace("a", mark) for key in (one, other))
    with processor(store) as opened:
        for key in (first, second):
            assert [opened.run(key, add, idempotency_key="k") for _ in range(2)] == [1, 1]
            assert alone.admin.hget(key, "value") == b'{"total":1}'
    for name in alone.admin.scan_iter(f"*{mark}*"):
        alone.admin.delete(name)

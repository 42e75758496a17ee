"""RedisStore beside the contract suite: its options, its tokens and fences, and the habits of the driver."""

from __future__ import annotations

import pickle
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from geventbatch import BatchError, Conflict, LoadFailed, NotSaved, Processor, ResourceMissing, SaveFailed
from geventbatch.stores import RedisStore
from geventbatch.stores.redis._server import take_connection
from tests.stores.test_stores import Pause, assert_as_good_as_new, delete, paused, spawned
from tests.support.adapters.redis import CASES, RedisAdapter
from tests.support.callers import answer_of, in_a_thread
from tests.support.redis_server import RedisServer, connected, own_server
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.proxy import Rule


@pytest.fixture
def adapter(tmp_path: Path) -> Iterator[RedisAdapter]:
    with CASES[0].fresh(tmp_path) as address, CASES[0].opens(address) as opened:
        assert isinstance(opened, RedisAdapter)
        yield opened


@pytest.fixture
def processor(adapter: RedisAdapter) -> Iterator[Processor[Any]]:
    adapter.put("k", 10)
    with adapter.processor(max_attempts=20) as opened:
        yield opened


def hash_of(adapter: RedisAdapter, key: str = "k") -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = adapter.direct.hgetall(adapter.name(key))
    return found


def cut_after_the_next_save(adapter: RedisAdapter) -> Rule:
    return adapter.proxy.cut_after(adapter.commit_marker)


@contextmanager
def answer_lost(adapter: RedisAdapter) -> Iterator[None]:
    """While in the block, nobody can be asked what became of a save; there is one connection to load and save by."""
    adapter.client.ping()
    adapter.proxy.refusing = True
    try:
        yield
    finally:
        adapter.proxy.refusing = False


# -- what is in Redis -------------------------------------------------------------------------------------------


def test_a_hash_has_the_value_the_version_and_the_last_eight_saves(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    for _ in range(20):
        processor.run("k", adapter.add, 1)
    found = hash_of(adapter)
    assert found.keys() == {b"value", b"version", b"saves"}
    assert found[b"value"] == b'{"total":30}'
    assert found[b"version"] == b"21"
    versions, tokens = zip(*(save.split(b":") for save in found[b"saves"].split()), strict=True)
    assert versions == tuple(str(version).encode() for version in range(14, 22))
    assert len(set(tokens)) == 8


def test_a_batch_takes_two_round_trips_and_one_when_it_changes_nothing(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    processor.run("k", adapter.add, 1)
    before = adapter.proxy.round_trips
    processor.run("k", adapter.add, 1)
    assert adapter.proxy.round_trips == before + 2
    written = hash_of(adapter)
    processor.run("k", adapter.total)
    assert adapter.proxy.round_trips == before + 3
    assert hash_of(adapter) == written


def test_a_value_without_a_version_is_the_first(adapter: RedisAdapter, processor: Processor[Any]) -> None:
    adapter.direct.hset(adapter.name("plain"), "value", '{"total": 5}')
    assert processor.run("plain", adapter.add, 1) == 6
    assert hash_of(adapter, "plain")[b"version"] == b"1"


def test_a_value_that_comes_without_a_version_is_not_overwritten(adapter: RedisAdapter) -> None:
    with adapter.processor(missing="make") as processor:
        with paused(adapter, processor) as caller:
            adapter.direct.hset(adapter.name("k"), "value", '{"total": 5}')
        assert caller.get() == 6


@pytest.mark.parametrize("version", [b"x", b"-1", b"", b"1.5"])
def test_a_version_that_is_no_number_fails_the_load_by_name(
    adapter: RedisAdapter, processor: Processor[Any], version: bytes
) -> None:
    adapter.direct.hset(adapter.name("k"), "version", version)
    error = answer_of(processor.run, "k", adapter.add, 1)
    assert isinstance(error, LoadFailed)
    assert "'k'" in str(error.__cause__)
    assert repr(version) in str(error.__cause__)


def test_something_else_than_a_hash_fails_the_load_and_is_not_overwritten_by_a_save(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    adapter.direct.set(adapter.name("text"), "mine")
    error = answer_of(processor.run, "text", adapter.add, 1)
    assert isinstance(error, LoadFailed)
    assert "'text'" in str(error)
    with paused(adapter, processor) as caller:
        adapter.direct.set(adapter.name("k"), "mine")
    refused = caller.get()
    assert isinstance(refused, SaveFailed)
    assert refused.retry_safe
    assert isinstance(refused.__cause__, NotSaved)
    assert isinstance(refused.__cause__.__cause__, redis.ResponseError)
    assert adapter.direct.get(adapter.name("k")) == b"mine"
    adapter.direct.delete(adapter.name("k"))


# -- options ----------------------------------------------------------------------------------------------------


def test_values_are_whatever_encode_and_decode_make_of_them(adapter: RedisAdapter) -> None:
    store = RedisStore[set[int]](
        adapter.client,
        prefix=adapter.name("pickled:"),
        encode=pickle.dumps,
        decode=pickle.loads,
        missing=lambda key: {len(key)},
    )
    with Processor(open_resource=store, min_duration=0) as processor:
        processor.run("abc", set.add, 7)
        assert processor.run("abc", sorted) == [3, 7]


@pytest.mark.parametrize("options", [{"decode_responses": True}, {"protocol": 3}, {"encoding": "latin-1"}], ids=repr)
def test_a_client_that_decodes_answers_is_as_good(adapter: RedisAdapter, options: dict[str, Any]) -> None:
    with redis.Redis(host=adapter.proxy.host, port=adapter.proxy.port, **options) as client:
        store = RedisStore[bytearray](
            client, prefix=adapter.name("é:"), encode=bytes, decode=bytearray, missing=lambda _: bytearray()
        )
        with Processor(open_resource=store, min_duration=0) as processor:
            processor.run("ü", bytearray.extend, b"\xff\x00\xfe")
            assert processor.run("ü", bytes) == b"\xff\x00\xfe"
            cut_after_the_next_save(adapter)
            processor.run("ü", bytearray.extend, b"\xfd")
    assert hash_of(adapter, "é:ü")[b"value"] == b"\xff\x00\xfe\xfd"


def test_what_cannot_be_encoded_fails_its_own_operation_only(adapter: RedisAdapter) -> None:
    def spoil(resource: Any) -> None:
        resource["when"] = object()

    adapter.put("k", 10)
    with adapter.processor(min_duration=0.05) as processor:
        callers = [spawned(processor.run, "k", *run) for run in ((adapter.add, 1), (spoil,), (adapter.add, 1))]
        first, culprit, last = [caller.get() for caller in callers]
    assert (first, last) == (11, 12)
    assert isinstance(culprit, TypeError)
    assert adapter.get("k") == 12


def test_a_change_that_is_equal_but_encoded_otherwise_is_not_lost(adapter: RedisAdapter) -> None:
    def as_a_float(resource: dict[str, float]) -> None:
        resource["total"] = float(resource["total"])

    adapter.put("k", 10)
    with adapter.processor() as processor:
        processor.run("k", as_a_float)
    assert hash_of(adapter)[b"value"] == b'{"total":10.0}'


def test_a_resource_lives_for_its_ttl_after_the_last_change(adapter: RedisAdapter) -> None:
    store = RedisStore[dict[str, int]](adapter.client, prefix=adapter.name(""), missing=lambda _: {"total": 0}, ttl=60)
    with Processor(open_resource=store, min_duration=0) as processor:
        processor.run("k", adapter.add, 1)
        assert 59_000 < adapter.direct.pttl(adapter.name("k")) <= 60_000
        adapter.direct.pexpire(adapter.name("k"), 5_000)
        processor.run("k", adapter.add, 1)
        assert 59_000 < adapter.direct.pttl(adapter.name("k")) <= 60_000


def test_without_a_ttl_the_time_to_live_that_somebody_has_set_is_left_alone(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    processor.run("k", adapter.add, 1)
    assert adapter.direct.pttl(adapter.name("k")) == -1
    adapter.direct.pexpire(adapter.name("k"), 5_000)
    processor.run("k", adapter.add, 1)
    assert 0 < adapter.direct.pttl(adapter.name("k")) <= 5_000


def test_what_a_deletion_leaves_expires_and_what_is_made_anew_does_not(adapter: RedisAdapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(missing="make") as processor:
        processor.run("k", delete)
        assert hash_of(adapter).keys() == {b"version", b"saves"}
        assert 0 < adapter.direct.pttl(adapter.name("k")) <= 600_000
        processor.run("k", adapter.add, 1)
    assert adapter.direct.pttl(adapter.name("k")) == -1
    assert hash_of(adapter)[b"version"] == b"3"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"client": "redis://"}, TypeError),
        ({"client": redis.asyncio.Redis()}, TypeError),
        ({"prefix": b"p"}, TypeError),
        ({"encode": "json"}, TypeError),
        ({"decode": 1}, TypeError),
        ({"missing": "make"}, TypeError),
        ({"missing": None}, TypeError),
        ({"ttl": "60"}, TypeError),
        ({"ttl": True}, TypeError),
        ({"ttl": 0}, ValueError),
        ({"ttl": -1}, ValueError),
        ({"ttl": float("inf")}, ValueError),
        ({"ttl": float("nan")}, ValueError),
    ],
    ids=repr,
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], error: type[Exception]) -> None:
    name, value = next(iter(options.items()))
    arguments = {"client": redis.Redis(), **options}
    with pytest.raises(error) as raised:
        RedisStore(**arguments)
    assert str(raised.value).startswith(f"{name} is {value!r}, but must be ")


def test_it_says_where_it_keeps_what() -> None:
    store = RedisStore[Any](redis.Redis(port=1), prefix="train:")
    assert repr(store).startswith("<RedisStore 'train:' on <redis.client.Redis")


def test_keys_are_told_apart_by_their_text() -> None:
    normalize = RedisStore(redis.Redis()).normalize_key
    assert normalize(42) == normalize("42") == normalize(b"42") == "42"
    number = UUID("12345678-1234-5678-1234-567812345678")
    assert normalize(number) == normalize(str(number))
    assert normalize(b"\xff") == normalize("\udcff")
    assert normalize("\u00e9") != normalize("e\u0301")
    with pytest.raises(ResourceMissing, match="ud800") as refused:
        normalize("\ud800")
    assert isinstance(refused.value, ValueError)


def test_a_key_of_bytes_that_are_no_text_is_the_key_in_redis(adapter: RedisAdapter) -> None:
    with adapter.processor(missing="make") as processor:
        processor.run(b"\xff\x00", adapter.add, 1)
    assert adapter.direct.hexists(adapter.name("").encode() + b"\xff\x00", "value")


# -- the driver -------------------------------------------------------------------------------------------------


def test_a_save_is_sent_once_however_often_the_client_retries(adapter: RedisAdapter) -> None:
    retry = Retry(ConstantBackoff(0.001), 10, supported_errors=(redis.ConnectionError, redis.TimeoutError))
    options: Any = {"retry": retry, "retry_on_error": [redis.ConnectionError]}  # the latter for redis-py 5
    with redis.Redis(host=adapter.proxy.host, port=adapter.proxy.port, **options) as client:
        adapter.put("k", 10)
        store = RedisStore[dict[str, int]](client, prefix=adapter.name(""))
        with Processor(open_resource=store, min_duration=0, max_duration=5) as processor:
            saves = adapter.proxy.cut_after(adapter.commit_marker)
            saves.times = 3
            assert processor.run("k", adapter.add, 1) == 11
        assert saves.met == 1
        # And for anything else it retries as it did.
        others = adapter.proxy.cut_before(b"BITCOUNT", times=3)
        client.set(adapter.name("bits"), "a")
        assert client.bitcount(adapter.name("bits")) == 3
        assert others.met == 3


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_a_connection_is_given_back_with_the_timeout_that_its_client_has(
    adapter: RedisAdapter, timeout: float | None
) -> None:
    client: Any = redis.Redis(host=adapter.proxy.host, port=adapter.proxy.port, socket_timeout=timeout)
    with client:
        adapter.put("k", 10)
        with Processor(
            open_resource=RedisStore[dict[str, int]](client, prefix=adapter.name("")), min_duration=0
        ) as processor:
            processor.run("k", adapter.add, 1)
        (connection,) = client.connection_pool._available_connections
        assert connection._sock.gettimeout() == timeout


def test_a_save_waits_for_its_answer_no_longer_than_its_client_says(adapter: RedisAdapter) -> None:
    with redis.Redis(host=adapter.proxy.host, port=adapter.proxy.port, socket_timeout=0.1) as client:
        adapter.put("k", 10)
        store = RedisStore[dict[str, int]](client, prefix=adapter.name(""))
        with (
            Processor(open_resource=store, min_duration=0, max_duration=1000) as processor,
            adapter.proxy.hold_answer(adapter.commit_marker),
        ):
            assert processor.run("k", adapter.add, 1) == 11


def test_no_connection_for_the_save_is_known_to_have_saved_nothing(adapter: RedisAdapter) -> None:
    adapter.put("k", 10)
    with adapter.processor(max_duration=0.5) as processor, answer_lost(adapter):
        with paused(adapter, processor) as caller:
            adapter.proxy.cut_all()
        error = caller.get()
    assert isinstance(error, SaveFailed)
    assert error.retry_safe
    assert "not saved" in str(error.__cause__)
    assert adapter.get("k") == 10
    assert_as_good_as_new(adapter)


def test_a_pool_that_has_no_connection_left_saves_nothing_and_says_so(adapter: RedisAdapter) -> None:
    pool = redis.ConnectionPool(host=adapter.proxy.host, port=adapter.proxy.port, max_connections=1)
    with redis.Redis(connection_pool=pool) as client:
        adapter.put("k", 10)
        with Processor(
            open_resource=RedisStore[dict[str, int]](client, prefix=adapter.name("")), min_duration=0
        ) as processor:
            with paused(adapter, processor) as caller:
                taken = take_connection(pool)
            error = caller.get()
            pool.release(taken)
            assert isinstance(error, SaveFailed)
            assert error.retry_safe
            assert adapter.get("k") == 10
            assert processor.run("k", adapter.add, 1) == 11
    pool.disconnect()


def test_batches_wait_for_each_other_at_a_pool_that_blocks(adapter: RedisAdapter) -> None:
    blocking: Any = redis.BlockingConnectionPool
    pool = blocking(host=adapter.proxy.host, port=adapter.proxy.port, max_connections=2, timeout=20)
    with redis.Redis(connection_pool=pool) as client:
        store = RedisStore[dict[str, int]](client, prefix=adapter.name(""), missing=lambda _: {"total": 0})
        with Processor(open_resource=store, min_duration=0, max_duration=20, workers=4) as processor:
            callers = [spawned(processor.run, n, adapter.add, n) for n in range(40)]
            assert [caller.get() for caller in callers] == list(range(40))
        assert adapter.proxy.open_connections() == 2
    pool.disconnect()


def test_with_batching_off_it_works_in_any_thread(adapter: RedisAdapter) -> None:
    def run() -> int:
        # While the thread runs, the proxy does not; and a connection belongs to the hub of its thread.
        with connected(adapter.address.partition("#")[0]) as client:
            store = RedisStore[dict[str, int]](client, prefix=adapter.name(""))
            return Processor(open_resource=store, batching=False).run("k", adapter.add, 1)

    adapter.put("k", 10)
    assert in_a_thread(run) == 11


# -- a cluster whose slots move ---------------------------------------------------------------------------------


class Nodes:
    """A cluster of two nodes, each with one half of the slots."""

    def __init__(self, stack: ExitStack) -> None:
        self.servers = [RedisServer("--cluster-enabled", "yes") for _ in range(2)]
        self.clients = [stack.enter_context(connected(server.url)) for server in self.servers]
        for number, client in enumerate(self.clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(8192 * number, 8192 * (number + 1)))
        self.clients[0].execute_command("CLUSTER", "MEET", self.servers[1].host, self.servers[1].port)
        self.ids = [client.execute_command("CLUSTER", "MYID").decode() for client in self.clients]
        for client in self.clients:
            wait_until(partial(is_complete, client))

    def begin_to_move(self, name: str) -> None:
        """Move it from the first node to the second; the rest of its slot is still to come, so ASK is the answer."""
        slot = self.clients[0].execute_command("CLUSTER", "KEYSLOT", name)
        self.clients[1].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.ids[0])
        self.clients[0].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.ids[1])
        there = self.servers[1]
        self.clients[0].execute_command("MIGRATE", there.host, there.port, name, 0, 5000)

    def end_the_move(self, name: str) -> None:
        """From now on MOVED is the answer."""
        slot = self.clients[0].execute_command("CLUSTER", "KEYSLOT", name)
        for client in reversed(self.clients):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", self.ids[1])


def is_complete(node: Any) -> bool:
    info = node.execute_command("CLUSTER", "INFO", NEVER_DECODE=True)
    return b"cluster_state:ok" in info and b"cluster_known_nodes:2" in info


def test_a_save_follows_its_key_to_another_node_of_the_cluster() -> None:
    def add(resource: dict[str, int]) -> int:
        resource["total"] += 1
        return resource["total"]

    with ExitStack() as stack:
        nodes = Nodes(stack)
        client = stack.enter_context(redis.RedisCluster.from_url(nodes.servers[0].url))
        store = RedisStore[dict[str, int]](client, missing=lambda _: {"total": 0})
        processor = stack.enter_context(Processor(open_resource=store, min_duration=0, max_duration=20))
        metrics = processor.subscribe_batch_metrics()
        key = "b"  # its slot is 3300, of the first node
        assert processor.run(key, add) == 1
        for move in (nodes.begin_to_move, nodes.end_the_move):
            moving = Pause(add)
            caller = spawned(processor.run, key, moving)
            moving.reached.wait()
            move(key)
            moving.ended.set()
            assert caller.get() == processor.run(key, add) - 1
        assert processor.run(key, dict) == {"total": 5}
        assert nodes.clients[1].hget(key, "value") == b'{"total":5}'
        processor.stop()
        assert {metric.attempts for metric in metrics} == {1}


# -- the answer to a save is lost -------------------------------------------------------------------------------


def test_its_token_tells_a_save_that_it_was_written_though_others_have_saved_since(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    cut_after_the_next_save(adapter)
    with answer_lost(adapter):
        caller = spawned(processor.run, "k", adapter.add, 1)
        wait_until(lambda: adapter.get("k") == 11)
        save_beside(adapter, times=7)
        assert not caller.ready()
    assert caller.get() == 11
    assert adapter.get("k") == 18


def test_a_save_that_others_have_overtaken_before_it_arrived_is_replayed(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    processor.run("k", adapter.add, 0)
    processor.run("k", adapter.add, 1)
    metrics = processor.subscribe_batch_metrics()
    adapter.proxy.cut_before(adapter.commit_marker)
    with answer_lost(adapter):
        lost = adapter.proxy.accepted
        caller = spawned(processor.run, "k", adapter.add, 1)
        wait_until(lambda: adapter.proxy.accepted > lost)  # it asks in vain
        save_beside(adapter, times=7)
    assert caller.get() == 19
    assert adapter.get("k") == 19
    processor.stop()
    assert [metric.attempts for metric in metrics] == [2]


@pytest.mark.parametrize("arrived", [True, False])
def test_a_save_that_nothing_tells_of_any_more_is_said_to_be_unknown(
    adapter: RedisAdapter, processor: Processor[Any], arrived: bool
) -> None:
    processor.run("k", adapter.add, 1)
    cut = adapter.proxy.cut_after if arrived else adapter.proxy.cut_before
    cut(adapter.commit_marker)
    with answer_lost(adapter):
        lost = adapter.proxy.accepted
        caller = spawned(processor.run, "k", adapter.add, 1)
        wait_until(lambda: adapter.proxy.accepted > lost)
        save_beside(adapter, times=8)
    error = caller.get()
    assert isinstance(error, SaveFailed)
    assert not error.retry_safe
    assert isinstance(error.__cause__, redis.ConnectionError)
    assert "unknown" in error.__cause__.__notes__[0]
    assert adapter.get("k") == 19 + arrived


@pytest.mark.parametrize("arrived", [True, False])
def test_a_save_whose_hash_somebody_deletes_meanwhile_is_said_to_be_unknown(
    adapter: RedisAdapter, processor: Processor[Any], arrived: bool
) -> None:
    cut = adapter.proxy.cut_after if arrived else adapter.proxy.cut_before
    cut(adapter.commit_marker)
    with answer_lost(adapter):
        lost = adapter.proxy.accepted
        caller = spawned(processor.run, "k", adapter.add, 1)
        wait_until(lambda: adapter.proxy.accepted > lost)
        adapter.remove("k")
        adapter.put("k", 10)
        adapter.put("k", 100)
    error = caller.get()
    assert isinstance(error, SaveFailed)
    assert not error.retry_safe
    assert adapter.get("k") == 100


def test_a_deletion_whose_answer_is_lost_is_known_to_have_been_done(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    cut_after_the_next_save(adapter)
    assert processor.run("k", delete) is None
    assert adapter.get("k") is None


def test_a_save_whose_answer_was_lost_with_the_server_is_known_when_that_is_there_again(
    adapter: RedisAdapter, processor: Processor[Any]
) -> None:
    cut_after_the_next_save(adapter)
    with answer_lost(adapter):
        caller = spawned(processor.run, "k", adapter.add, 1)
        wait_until(lambda: adapter.get("k") == 11)
        own_server().restart()
        assert not caller.ready()
    assert caller.get() == 11
    assert adapter.get("k") == 11


def test_what_nobody_answers_until_the_deadline_is_said_to_be_unknown(adapter: RedisAdapter) -> None:
    adapter.put("k", 10)
    cut_after_the_next_save(adapter)
    with adapter.processor(max_duration=0.5) as processor, answer_lost(adapter):
        error = answer_of(processor.run, "k", adapter.add, 1)
    assert isinstance(error, BatchError)
    assert not error.retry_safe
    assert adapter.get("k") == 11
    assert_as_good_as_new(adapter)


@pytest.mark.parametrize("kind", ["an update", "a first insert", "a deletion"])
def test_a_save_that_arrives_after_its_batch_was_replayed_changes_nothing(adapter: RedisAdapter, kind: str) -> None:
    if kind != "a first insert":
        adapter.put("k", 10)
    operation = Pause(delete if kind == "a deletion" else lambda resource: adapter.add(resource, 1))
    operation.ended.set()
    with adapter.processor(missing="make", max_duration=1) as processor:
        with adapter.proxy.hold(adapter.commit_marker) as rule:
            caller = spawned(processor.run, "k", operation)
            wait_until(rule.reached)
            rule.times = 1  # the save of the replay gets through
            answer = caller.get()
            held = hash_of(adapter)
        wait_until(lambda: not rule.reached() and adapter.busy_connections() == 0)
        adapter.direct.ping()
        assert answer == {"an update": 11, "a first insert": 1, "a deletion": None}[kind]
        assert hash_of(adapter) == held
        assert adapter.get("k") == answer
        assert operation.runs == 2


def test_a_fence_where_there_was_nothing_expires(adapter: RedisAdapter) -> None:
    with adapter.processor(missing="make", max_attempts=1, max_duration=5) as processor:
        adapter.proxy.cut_before(adapter.commit_marker)
        error = answer_of(processor.run, "k", adapter.add, 1)
        assert isinstance(error, SaveFailed)
        assert error.retry_safe
        assert isinstance(error.__cause__, Conflict)
        assert 0 < adapter.direct.pttl(adapter.name("k")) <= 600_000
        with adapter.processor() as raising:
            assert isinstance(answer_of(raising.run, "k", adapter.add, 1), ResourceMissing)
        assert processor.run("k", adapter.add, 1) == 1


def test_a_fence_whose_own_answer_is_lost_is_found_again(adapter: RedisAdapter, processor: Processor[Any]) -> None:
    adapter.proxy.cut_before(adapter.commit_marker)
    resolving = adapter.proxy.cut_after(b"return 'unknown'")
    assert processor.run("k", adapter.add, 1) == 11
    assert resolving.met == 1
    assert adapter.get("k") == 11
    assert hash_of(adapter)[b"version"] == b"3"  # the fence and the save
    assert adapter.direct.pttl(adapter.name("k")) == -1


def test_a_save_of_a_life_before_a_deletion_does_not_fit_the_next_life(adapter: RedisAdapter) -> None:
    """The version counts on. And where somebody has deleted the hash himself, the tokens differ."""
    with adapter.processor(missing="make") as processor:
        processor.run("k", adapter.add, 1)
        with paused(adapter, processor) as caller:
            adapter.remove("k")
            save_beside(adapter, times=1, amount=100)
            assert hash_of(adapter)[b"version"] == b"1"
        assert caller.get() == 101
    assert adapter.get("k") == 101


def save_beside(adapter: RedisAdapter, *, times: int, amount: int = 1) -> None:
    """Another process of ours saves, on connections of its own."""
    store = RedisStore[dict[str, int]](adapter.direct, prefix=adapter.name(""), missing=lambda _: {"total": 0})
    with Processor(open_resource=store, min_duration=0) as processor:
        for _ in range(times):
            processor.run("k", adapter.add, amount)

"""Operations across keys over a RedisStore: what they connect is saved by one script, or not at all."""

from __future__ import annotations

import json
from functools import partial
from socket import SHUT_RD
from typing import TYPE_CHECKING, Any

import pytest
import redis

from geventbatch import BatchError, Conflict, LoadFailed, Processor, ResourceMissing, SaveFailed, current_batch
from geventbatch.stores import RedisStore
from geventbatch.stores.redis._scripts import KEPT_SAVES
from tests.stores.test_stores import all_of, assert_as_good_as_new, spawned
from tests.support.adapters.redis import CASES, RedisAdapter
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Accounts = tuple[dict[str, int], ...]

KEYS = [f"{{bank}}{number}" for number in range(6)]
"""In one slot of a cluster."""

BULK_CASES = [case for case in CASES if "bulk" in case.name]


@pytest.fixture(params=BULK_CASES, ids=lambda case: case.name)
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisAdapter]:
    with request.param.fresh(tmp_path) as address, request.param.opens(address) as opened:
        assert isinstance(opened, RedisAdapter)
        for key in KEYS:
            put(opened, key, 10)
        yield opened


def put(adapter: RedisAdapter, key: str, total: int) -> None:
    """Write as another program does, in the encoding of the store."""
    adapter.put(key, total)
    adapter.direct.hset(adapter.name(key), "value", f'{{"total":{total}}}')


def bulk(adapter: RedisAdapter, **options: Any) -> Processor[Any]:
    """A processor that runs all that comes together as one bulk."""
    return adapter.processor(**{"workers": 1, "max_batches": 1, "max_attempts": 20, **options})


def totals(adapter: RedisAdapter, keys: list[str] = KEYS) -> list[int | None]:
    """Read them all at one moment: one by one, a save that comes between two of them would look like half a save."""
    with adapter.direct.pipeline() as transaction:
        for key in keys:
            transaction.hget(adapter.name(key), "value")
        return [None if value is None else int(json.loads(value)["total"]) for value in transaction.execute()]


def hash_of(adapter: RedisAdapter, key: str) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = adapter.direct.hgetall(adapter.name(key))
    return found


def last_token(adapter: RedisAdapter, key: str) -> bytes:
    return hash_of(adapter, key)[b"saves"].rpartition(b":")[2]


def transfer(accounts: Accounts, amount: int) -> tuple[int, ...]:
    """Move *amount* from the first to each of the others."""
    source, *targets = accounts
    source["total"] -= amount * len(targets)
    for target in targets:
        target["total"] += amount
    return tuple(account["total"] for account in accounts)


def touch(accounts: Accounts) -> None:
    """Leave a mark of a save in each."""
    for account in accounts:
        account["touched"] = 1


class Between:
    """An operation that lets something happen between the load and the save, once."""

    def __init__(self, happens: Callable[[], object], then: Callable[..., Any]) -> None:
        self._happens: Callable[[], object] | None = happens
        self._then = then

    def __call__(self, resources: Any, *args: Any) -> Any:
        happens, self._happens = self._happens, None
        if happens is not None:
            happens()
        return self._then(resources, *args)


def together(processor: Processor[Any], *runs: tuple[Any, ...]) -> list[Any]:
    """What the callers of these operations were told, in one bulk: one of a list of keys is across them."""
    callers = [
        spawned(processor.run_across if isinstance(keys, list) else processor.run, keys, *run) for keys, *run in runs
    ]
    return all_of(callers)


# -- one script for what is connected -----------------------------------------------------------------------------


def test_it_is_saved_with_one_token_in_each_hash_and_two_round_trips(adapter: RedisAdapter) -> None:
    with bulk(adapter) as processor:
        processor.run_across(KEYS[:2], transfer, 1)
        before = adapter.proxy.round_trips
        assert processor.run_across(KEYS[:3], transfer, 1) == (7, 12, 11)
        assert adapter.proxy.round_trips == before + 2
    assert totals(adapter) == [7, 12, 11, 10, 10, 10]
    assert len({last_token(adapter, key) for key in KEYS[:3]}) == 1


def test_components_are_saved_apart_each_with_a_token_of_its_own(adapter: RedisAdapter) -> None:
    with bulk(adapter) as processor:
        processor.run(KEYS[0], adapter.total)
        before = adapter.proxy.round_trips
        answers = together(
            processor,
            (KEYS[:2], transfer, 1),
            (KEYS[1:3], transfer, 2),
            (KEYS[3:5], transfer, 3),
            (KEYS[5], adapter.add, 4),
        )
        assert adapter.proxy.round_trips == before + 2
    assert answers == [(9, 11), (9, 12), (7, 13), 14]
    tokens = [last_token(adapter, key) for key in KEYS]
    assert [tokens.index(token) for token in tokens] == [0, 0, 0, 3, 3, 5]


def test_a_component_that_has_lost_one_key_writes_nothing_and_the_others_are_saved(adapter: RedisAdapter) -> None:
    seen = []

    def overtake() -> None:
        adapter.put(KEYS[1], 100)

    def look(accounts: Accounts, amount: int) -> tuple[int, ...]:
        seen.append(totals(adapter))
        return transfer(accounts, amount)

    with bulk(adapter) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = together(
            processor,
            (KEYS[:2], Between(overtake, look), 1),
            ([KEYS[0], KEYS[2]], transfer, 1),
            (KEYS[3:5], transfer, 3),
            (KEYS[5], adapter.add, 4),
        )
    assert answers == [(9, 101), (8, 11), (7, 13), 14]
    assert totals(adapter) == [8, 101, 11, 7, 13, 14]
    first, again = seen
    assert first == [10, 100, 10, 10, 10, 10]
    assert again == [10, 100, 10, 7, 13, 14]  # nothing of the component, all of the others
    assert sorted(metric.attempts for metric in metrics) == [1, 1, 2]


def test_a_key_that_was_only_read_is_compared_and_not_written(adapter: RedisAdapter) -> None:
    def copy(accounts: Accounts) -> int:
        source, target = accounts
        target["total"] = source["total"]
        return target["total"]

    before = hash_of(adapter, KEYS[0])
    with bulk(adapter) as processor:
        put(adapter, KEYS[0], 20)
        assert processor.run_across(KEYS[:2], copy) == 20
        written = hash_of(adapter, KEYS[0])
        assert written.keys() == before.keys()  # with no token: it was not written
        put(adapter, KEYS[0], 25)
        overtaken = Between(partial(put, adapter, KEYS[0], 30), copy)
        assert processor.run_across(KEYS[:2], overtaken) == 30
    assert totals(adapter)[:2] == [30, 30]


def test_what_operations_have_only_looked_at_or_refused_is_compared_and_not_made(adapter: RedisAdapter) -> None:
    def look(accounts: Accounts) -> list[int]:
        return [account["total"] for account in accounts]

    def refuse(accounts: Accounts) -> None:
        raise ValueError([account["total"] for account in accounts])

    looking = partial(read_only_of, [KEYS[1], KEYS[2], "{bank}new"], look)
    refusing = partial(refused_of, [KEYS[1], KEYS[3], "{bank}newer"], refuse)
    with bulk(adapter, missing="make") as processor:
        for overtaken in (KEYS[2], KEYS[3]):
            put(adapter, KEYS[0], 10)
            put(adapter, KEYS[1], 10)
            put(adapter, overtaken, 10)
            first = Between(partial(put, adapter, overtaken, 50), transfer)
            callers = [
                spawned(processor.run_across, KEYS[:2], first, 1),
                spawned(looking, processor),
                spawned(refusing, processor, overtaken),
            ]
            transferred, looked, refused = all_of(callers)
            assert transferred == (9, 11)
            assert looked == [11, 50, 0]
            assert refused == [11, 50 if overtaken == KEYS[3] else 10, 0]
    assert totals(adapter, ["{bank}new", "{bank}newer"]) == [None, None]


def read_only_of(keys: list[str], operation: Callable[..., Any], processor: Processor[Any]) -> Any:
    return processor.run_across(keys, operation, read_only=True)


def refused_of(keys: list[str], operation: Callable[..., Any], processor: Processor[Any], once: str) -> Any:
    with pytest.raises(ValueError) as raised:
        processor.run_across(keys, operation, idempotency_key=once)
    return raised.value.args[0]


def test_an_operation_that_changes_nothing_writes_nothing(adapter: RedisAdapter) -> None:
    rule = adapter.proxy.cut_before(adapter.commit_marker)
    with bulk(adapter) as processor:
        assert processor.run_across(KEYS, lambda accounts: sum(one["total"] for one in accounts)) == 60
    assert rule.met == 0


def test_what_one_operation_reads_is_of_one_moment(adapter: RedisAdapter) -> None:
    """A writer that moves money between two keys is never seen half-way, also by an operation that saves nothing."""
    moved = """
    for round = 1, 50 do
      local from, to = KEYS[round % 2 + 1], KEYS[(round + 1) % 2 + 1]
      redis.call('HSET', from, 'value', '{"total":' .. 20 - round % 2 * 20 .. '}')
      redis.call('HSET', to, 'value', '{"total":' .. round % 2 * 20 .. '}')
    end
    redis.call('HINCRBY', KEYS[1], 'version', 1)
    redis.call('HINCRBY', KEYS[2], 'version', 1)
    """
    names = [adapter.name(key) for key in KEYS[:2]]
    with bulk(adapter) as processor, adapter.proxy.hold(b"redis.pcall('HMGET'") as rule:
        caller = spawned(processor.run_across, KEYS[:2], lambda accounts: [one["total"] for one in accounts])
        wait_until(rule.reached)
        adapter.direct.eval(moved, 2, *names)
        rule.released.set()
        assert sum(caller.get()) == 20


def test_keys_are_made_and_changed_in_one(adapter: RedisAdapter) -> None:
    new = ["{bank}new", "{bank}newer"]
    with bulk(adapter, missing="make") as processor:
        assert processor.run_across([KEYS[0], *new], transfer, 1) == (8, 1, 1)
        overtaken = Between(partial(adapter.put, "{bank}newest", 100), transfer)
        assert processor.run_across([KEYS[0], "{bank}newest"], overtaken, 1) == (7, 101)
    assert totals(adapter, [KEYS[0], *new, "{bank}newest"]) == [7, 1, 1, 101]


def test_a_missing_key_is_named_to_those_that_need_it_and_the_others_are_saved(adapter: RedisAdapter) -> None:
    adapter.remove(KEYS[1])
    adapter.corrupt(KEYS[5])
    with bulk(adapter) as processor:
        missing, corrupt, saved = together(
            processor, (KEYS[:2], transfer, 1), ([KEYS[2], KEYS[5]], transfer, 1), ([KEYS[2], KEYS[0]], transfer, 1)
        )
    assert isinstance(missing, ResourceMissing)
    assert missing.key == KEYS[1]
    assert KEYS[5] in str(corrupt.__cause__)
    assert saved == (9, 11)
    assert totals(adapter, [KEYS[0], *KEYS[2:5]]) == [11, 9, 10, 10]


def test_something_else_than_a_hash_fails_what_needs_it_and_no_others(adapter: RedisAdapter) -> None:
    adapter.direct.set(adapter.name("{bank}text"), "mine")
    with bulk(adapter) as processor:
        error, saved = together(processor, ([KEYS[0], "{bank}text"], transfer, 1), ([KEYS[0], KEYS[1]], transfer, 1))
    assert "WRONGTYPE" in str(error.__cause__)
    assert saved == (9, 11)
    assert adapter.direct.get(adapter.name("{bank}text")) == b"mine"
    adapter.direct.delete(adapter.name("{bank}text"))


def test_what_cannot_be_encoded_fails_its_own_operation_and_changes_no_key(adapter: RedisAdapter) -> None:
    def spoil(accounts: Any) -> None:
        for account in accounts[:-1]:
            account["total"] = 1000
        accounts[-1]["when"] = object()

    with bulk(adapter) as processor:
        first, culprit, last, apart = together(
            processor,
            (KEYS[:2], transfer, 1),
            (KEYS[:3], spoil),
            (KEYS[1:3], transfer, 1),
            (KEYS[3:5], transfer, 1),
        )
    assert isinstance(culprit, TypeError)
    assert (first, last, apart) == ((9, 11), (10, 11), (9, 11))
    assert totals(adapter) == [9, 10, 11, 9, 11, 10]


def test_one_of_its_keys_is_deleted_and_leaves_a_trace_that_expires(adapter: RedisAdapter) -> None:
    def close(accounts: Accounts) -> None:
        source, target = accounts
        target["total"] += source["total"]
        current_batch().delete(KEYS[0])

    with bulk(adapter, missing="make") as processor:
        closed, behind, apart = together(
            processor, (KEYS[:2], close), (KEYS[:2], transfer, 1), (KEYS[2:4], transfer, 1)
        )
    assert (closed, behind, apart) == (None, (-1, 21), (9, 11))
    assert totals(adapter)[:4] == [-1, 21, 9, 11]
    assert adapter.direct.pttl(adapter.name(KEYS[0])) == -1  # made anew
    with bulk(adapter) as processor:
        processor.run_across(KEYS[1::-1], lambda accounts: current_batch().delete(KEYS[1]))
        metrics = processor.subscribe_batch_metrics()
        cut = adapter.proxy.cut_after(adapter.commit_marker)
        processor.run_across(KEYS[2:4], lambda accounts: [current_batch().delete(key) for key in KEYS[2:4]] and None)
        assert cut.met == 1
    assert next(iter(metrics)).attempts == 1
    assert totals(adapter)[:4] == [-1, None, None, None]
    assert all(0 < adapter.direct.pttl(adapter.name(key)) <= 600_000 for key in KEYS[1:4])


def test_each_hash_lives_for_its_ttl_and_no_other_does(adapter: RedisAdapter) -> None:
    store = RedisStore[dict[str, int]](adapter.client, prefix=adapter.name(""), missing=lambda _: {"total": 0}, ttl=60)
    adapter.direct.pexpire(adapter.name(KEYS[0]), 5_000)
    adapter.direct.pexpire(adapter.name(KEYS[2]), 5_000)

    def read_the_last(accounts: Accounts) -> None:
        accounts[0]["total"] += 1
        accounts[1]["total"] += 1

    with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as processor:
        processor.run_across([KEYS[0], "{bank}new", KEYS[2]], read_the_last)
    alive = [adapter.direct.pttl(adapter.name(key)) for key in (KEYS[0], "{bank}new", KEYS[2])]
    assert 59_000 < alive[0] <= 60_000
    assert 59_000 < alive[1] <= 60_000
    assert 0 < alive[2] <= 5_000


# -- an answer that is lost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["saved before", "never saved"])
@pytest.mark.parametrize("carried_out", [True, False])
def test_a_lost_answer_is_decided_for_all_keys_at_once(adapter: RedisAdapter, carried_out: bool, known: bool) -> None:
    with bulk(adapter) as processor:
        if known:
            processor.run_across(KEYS, touch)
        metrics = processor.subscribe_batch_metrics()
        cut = adapter.proxy.cut_after if carried_out else adapter.proxy.cut_before
        rule = cut(adapter.commit_marker)
        assert processor.run_across(KEYS[:3], transfer, 1) == (8, 11, 11)
        assert rule.met == 1
    assert next(iter(metrics)).attempts == (1 if carried_out else 2)
    assert totals(adapter) == [8, 11, 11, 10, 10, 10]
    assert_as_good_as_new(adapter)


@pytest.mark.parametrize("overtaken", range(3))
@pytest.mark.parametrize("carried_out", [True, False])
def test_others_that_have_saved_a_key_since_do_not_hide_what_became_of_it(
    adapter: RedisAdapter, carried_out: bool, overtaken: int
) -> None:
    """Any key that others have not saved too often tells of all."""
    with bulk(adapter) as processor, adapter.processor(workers=1) as others:
        processor.run_across(KEYS[:3], touch)
        adapter.client.ping()
        cut = adapter.proxy.cut_after if carried_out else adapter.proxy.cut_before
        with adapter.proxy.hold(b"then return 'saved' end") as asking:
            cut(adapter.commit_marker)
            caller = spawned(processor.run_across, KEYS[:3], transfer, 1)
            wait_until(asking.reached)
            for _ in range(KEPT_SAVES + 1 if overtaken else 1):
                others.run(KEYS[overtaken], adapter.add, 100)
        assert not isinstance(caller.get(), Exception), caller.get()
        rest = 100 * (KEPT_SAVES + 1 if overtaken else 1)
    expected = [8, 11, 11]
    expected[overtaken] += rest
    assert totals(adapter)[:3] == expected


def test_a_save_that_arrives_after_it_was_given_up_writes_nothing(adapter: RedisAdapter) -> None:
    with adapter.processor(max_attempts=20, max_duration=30) as processor:
        processor.run_across(KEYS[:3], touch)
        with adapter.proxy.hold(adapter.commit_marker) as late:
            late.times = 1  # the next save goes through
            caller = spawned(processor.run_across, KEYS[:3], transfer, 1)
            wait_until(late.reached)
            for pool in adapter.pools():
                for connection in pool._in_use_connections:
                    connection._sock.shutdown(SHUT_RD)
            assert caller.get() == (8, 11, 11)
            held = totals(adapter)
        assert_as_good_as_new(adapter)
    assert totals(adapter) == held == [8, 11, 11, 10, 10, 10]


# -- a right to some keys only ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lacking", "kind"), [("hset", SaveFailed), ("pexpire", SaveFailed), ("hmget", LoadFailed)])
def test_who_lacks_a_right_to_one_of_the_keys_writes_none(
    adapter: RedisAdapter, lacking: str, kind: type[BatchError]
) -> None:
    name = f"user-{adapter.name('')}".rstrip(":")
    rules = ["+@all", f"-{lacking}", "~*", f"(+{lacking} ~{adapter.name(KEYS[0])})"]
    if int(adapter.direct.info("server")["redis_version"].partition(".")[0]) < 7:  # a user has a right to all keys
        with pytest.raises(redis.ResponseError, match="ACL SETUSER"):
            adapter.direct.execute_command("ACL", "SETUSER", name, *rules)
        return
    adapter.direct.execute_command("ACL", "SETUSER", name, "on", ">secret", *rules)
    before = [hash_of(adapter, key) for key in KEYS]
    with adapter.connected_as(name, "secret") as client:
        store = RedisStore[dict[str, int]](client, prefix=adapter.name(""), ttl=60)
        with Processor(open_resources=store.open_resources, min_duration=0, max_duration=30) as processor:
            error = answer_of(processor.run_across, KEYS[:2], transfer, 1)
    assert type(error) is kind
    assert error.retry_safe
    assert [hash_of(adapter, key) for key in KEYS] == before
    adapter.direct.execute_command("ACL", "DELUSER", name)


# -- the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", [True, False])
def test_in_a_cluster_keys_of_several_slots_are_refused_by_name(adapter: RedisAdapter, batching: bool) -> None:
    with bulk(adapter, batching=batching, missing="make") as processor:
        assert processor.run_across([b"{bank}0", "{bank}1"], transfer, 1) == (9, 11)
        if isinstance(adapter.client, redis.RedisCluster):
            with pytest.raises(ValueError, match=r"'\{bank\}2' and 'shop' .* slot \d+ .* slot \d+.* nothing was run"):
                processor.run_across(["{bank}2", "{bank}3", "shop"], transfer, 1)
            assert processor.stats().keys == 0
        else:
            assert processor.run_across(["{bank}2", "shop"], transfer, 1) == (9, 1)


def test_with_batching_off_it_is_all_or_nothing_too(adapter: RedisAdapter) -> None:
    with bulk(adapter, batching=False) as processor:
        assert processor.run_across(KEYS[:2], transfer, 1) == (9, 11)
        overtaken = Between(partial(adapter.put, KEYS[1], 100), transfer)
        assert processor.run_across(KEYS[:2], overtaken, 1) == (8, 101)
        adapter.proxy.cut_after(adapter.commit_marker)
        assert processor.run_across(KEYS[:2], transfer, 1) == (7, 102)
    assert totals(adapter)[:2] == [7, 102]


def test_out_of_attempts_nothing_was_written(adapter: RedisAdapter) -> None:
    def overtaken(accounts: Accounts) -> None:
        transfer(accounts, 1)
        adapter.put(KEYS[1], 100)

    with bulk(adapter, max_attempts=2) as processor:
        error = answer_of(processor.run_across, KEYS[:2], overtaken)
    assert isinstance(error, SaveFailed)
    assert error.retry_safe
    assert isinstance(error.__cause__, Conflict)
    assert totals(adapter)[:2] == [10, 100]


@pytest.mark.parametrize("batching", [True, False])
def test_a_processor_of_the_store_takes_it_as_it_is(adapter: RedisAdapter, batching: bool) -> None:
    with Processor(open_resource=adapter.store(), min_duration=0, max_duration=30, batching=batching) as processor:
        assert together(processor, (KEYS[:2], transfer, 1), (KEYS[3], adapter.add, 1)) == [(9, 11), 11]
        if isinstance(adapter.client, redis.RedisCluster):
            with pytest.raises(ValueError, match=r"'\{bank\}2' and 'shop' .* slot \d+ .* slot \d+.* nothing was run"):
                processor.run_across(["{bank}2", "shop"], transfer, 1)
    assert totals(adapter) == [9, 11, 10, 11, 10, 10]

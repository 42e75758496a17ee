"""Idempotency keys of operations across keys over a RedisStore: one record, in the slot of their keys."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot

from geventbatch import IdempotencyKeyReused, Processor, SaveFailed
from geventbatch.stores import RedisStore
from geventbatch.stores.redis._names import has_tag, outcome_name, outcome_name_across
from tests.stores.test_redis_across import (
    KEYS,
    Accounts,
    Between,
    adapter,  # noqa: F401 - a fixture
    bulk,
    hash_of,
    last_token,
    totals,
    transfer,
)
from tests.stores.test_redis_truth import KEYS as IDEMPOTENCY_KEYS
from tests.stores.test_redis_truth import NAMES
from tests.stores.test_stores import all_of, spawned
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.adapters.redis import RedisAdapter


class Refused(Exception):
    """What an operation raises half-way."""


def refuse(accounts: Accounts) -> None:
    accounts[0]["total"] = 1000
    raise Refused("no")


def test_it_is_recorded_once_with_all_its_keys(adapter: RedisAdapter) -> None:  # noqa: F811
    with bulk(adapter) as processor:
        run = partial(processor.run_across, idempotency_key="a")
        assert [run(KEYS[:3], transfer, 1) for _ in range(3)] == [(8, 11, 11)] * 3
        assert isinstance(answer_of(run, KEYS[2::-1], transfer, 1), IdempotencyKeyReused)
        assert run(KEYS[:2], transfer, 1) == (7, 12)  # of other keys: another record
    assert totals(adapter)[:3] == [7, 12, 11]
    assert adapter.outcomes() == 2
    (name, *_) = adapter._outcomes()
    assert name.startswith(adapter.name("{bank}0").encode())
    assert 86_000_000 < adapter.direct.pttl(name) <= 86_400_000


def test_one_key_shares_its_outcomes_with_the_store_and_not_with_what_is_across_keys(
    adapter: RedisAdapter,  # noqa: F811
) -> None:
    one = Processor[Any](open_resource=adapter.store(), min_duration=0, max_duration=30)
    with bulk(adapter) as processor, one:
        assert processor.run(KEYS[0], adapter.add, 1, idempotency_key="a") == 11
        assert one.run(KEYS[0], adapter.add, 1, idempotency_key="a") == 11
        assert one.run(KEYS[1], adapter.add, 1, idempotency_key="a") == 11
        assert processor.run(KEYS[1], adapter.add, 1, idempotency_key="a") == 11
        assert processor.run_across(KEYS[:1], touch_one, idempotency_key="a") == 12
        assert one.run_across(KEYS[:1], touch_one, idempotency_key="a") == 12
    assert totals(adapter)[:2] == [12, 11]


def touch_one(accounts: Accounts) -> int:
    accounts[0]["total"] += 1
    return accounts[0]["total"]


def test_an_error_that_is_recorded_is_raised_again_and_no_value_is_written(adapter: RedisAdapter) -> None:  # noqa: F811
    before = [hash_of(adapter, key)[b"value"] for key in KEYS]
    with bulk(adapter) as processor:
        for _ in range(2):
            error = answer_of(processor.run_across, KEYS[:2], refuse, idempotency_key="a")
            assert isinstance(error, Refused)
    assert [hash_of(adapter, key)[b"value"] for key in KEYS] == before
    assert adapter.outcomes() == 1


@pytest.mark.parametrize("carried_out", [True, False])
@pytest.mark.parametrize("operation", [partial(transfer, amount=1), refuse])
def test_a_lost_answer_is_decided_with_its_record(
    adapter: RedisAdapter,  # noqa: F811
    operation: Any,
    carried_out: bool,
) -> None:
    with bulk(adapter) as processor:
        metrics = processor.subscribe_batch_metrics()
        cut = adapter.proxy.cut_after if carried_out else adapter.proxy.cut_before
        rule = cut(adapter.commit_marker)
        run = partial(processor.run_across, KEYS[:2], operation, idempotency_key="a", identified_by=())
        answers = [answer_of(run) for _ in range(2)]
        assert rule.met == 1
    first, second = map(repr, answers)
    assert first == second
    assert next(iter(metrics)).attempts == (1 if carried_out else 2)
    assert totals(adapter)[:2] == ([10, 10] if operation is refuse else [9, 11])
    assert adapter.outcomes() == 1


def test_one_that_is_sent_again_holds_up_its_component_once_and_no_others(adapter: RedisAdapter) -> None:  # noqa: F811
    with bulk(adapter) as processor:
        processor.run_across(KEYS[:2], transfer, 1, idempotency_key="a")
        metrics = processor.subscribe_batch_metrics()
        before = adapter.proxy.round_trips
        runs: list[Callable[[], Any]] = [
            partial(processor.run_across, KEYS[:2], transfer, 1, idempotency_key="a"),
            partial(processor.run_across, KEYS[1:3], transfer, 1, idempotency_key="b"),
            partial(processor.run_across, KEYS[3:5], transfer, 1, idempotency_key="a"),
            partial(processor.run, KEYS[5], adapter.add, 1),
        ]
        assert all_of([spawned(run) for run in runs]) == [(9, 11), (10, 11), (9, 11), 11]
        assert adapter.proxy.round_trips == before + 4
    assert totals(adapter) == [9, 10, 11, 9, 11, 11]
    assert sorted(metric.attempts for metric in metrics) == [1, 1, 2]
    assert last_token(adapter, KEYS[1]) == last_token(adapter, KEYS[2]) != last_token(adapter, KEYS[3])


def test_one_that_would_be_refused_now_is_answered_as_it_was(adapter: RedisAdapter) -> None:  # noqa: F811
    """Also where its keys lie in other slots of a cluster than those of the others that are asked for with it."""

    def take(accounts: Accounts) -> int:
        for account in accounts:
            if not account["total"]:
                raise Refused("nothing left")
            account["total"] = 0
        return len(accounts)

    pairs = [[f"{{{tag}}}1", f"{{{tag}}}2"] for tag in "abcd"]
    store = adapter.store(missing="make")
    with Processor(
        open_resources=store.open_resources, min_duration=0, max_duration=30, max_batches=1, recorded_errors=()
    ) as processor:
        for pair in pairs:
            processor.run_across(pair, lambda accounts: [one.update(total=1) for one in accounts] and None)
            assert processor.run_across(pair, take, idempotency_key="x") == 2
        again = [spawned(partial(processor.run_across, pair, take, idempotency_key="x")) for pair in pairs]
        assert all_of(again) == [2, 2, 2, 2]


def test_a_component_that_has_lost_a_key_records_nothing(adapter: RedisAdapter) -> None:  # noqa: F811
    seen = []

    def look(accounts: Accounts) -> tuple[int, ...]:
        seen.append(adapter.outcomes())
        return transfer(accounts, 1)

    with bulk(adapter) as processor:
        overtaken = Between(partial(adapter.put, KEYS[1], 100), look)
        assert processor.run_across(KEYS[:2], overtaken, idempotency_key="a", identified_by=()) == (9, 101)
    assert seen == [0, 0]
    assert adapter.outcomes() == 1


def test_without_an_idempotency_ttl_it_is_refused_at_the_door(adapter: RedisAdapter) -> None:  # noqa: F811
    store = RedisStore[dict[str, int]](adapter.client, prefix=adapter.name(""), idempotency_ttl=None)
    for form in ({"open_resource": store}, {"open_resources": store.open_resources}):
        with Processor[Any](**form, min_duration=0) as processor:
            with pytest.raises(TypeError, match="idempotency_ttl"):
                processor.run_across(KEYS[:2], transfer, 1, idempotency_key="a")
            assert processor.run_across(KEYS[:2], lambda accounts: 1) == 1


def test_something_else_in_the_place_of_its_record_has_nothing_saved(adapter: RedisAdapter) -> None:  # noqa: F811
    names = [adapter.name(key).encode() for key in KEYS[:2]]
    taken = outcome_name_across(names, b"a")
    adapter.direct.hset(taken, "value", "of somebody else")
    with bulk(adapter) as processor:
        error = answer_of(processor.run_across, KEYS[:2], transfer, 1, idempotency_key="a")
        assert isinstance(error, SaveFailed)
        assert error.retry_safe
        assert processor.run_across(KEYS[:2], transfer, 1, idempotency_key="b") == (9, 11)
    assert adapter.direct.hgetall(taken) == {b"value": b"of somebody else"}


# -- its name -----------------------------------------------------------------------------------------------------

Asked = tuple[list[str], str, bool]
ASKED = st.tuples(st.lists(NAMES, min_size=1, max_size=3), IDEMPOTENCY_KEYS, st.booleans())


def name_of(asked: Asked) -> bytes:
    resources, key, across = asked
    names = [resource.encode() for resource in resources]
    return outcome_name_across(names, key.encode()) if across else outcome_name(names[0], key.encode())


@settings(deadline=None)
@given(ASKED, ASKED)
def test_no_two_outcomes_have_one_name(one: Asked, other: Asked) -> None:
    told = [(resources if across else resources[:1], key, across) for resources, key, across in (one, other)]
    assert (name_of(one) == name_of(other)) == (told[0] == told[1])


@settings(deadline=None)
@given(NAMES, IDEMPOTENCY_KEYS)
def test_its_name_lies_in_the_slot_of_its_keys(resource: str, key: str) -> None:
    names = [resource.encode(), b"{x}"]
    if has_tag(names[0]) or ("}" not in resource and resource):
        assert key_slot(outcome_name_across(names, key.encode())) == key_slot(names[0])

"""Operations across keys over a RedisStore beside others: killed workers, other processes and programs, cut answers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gevent
import pytest
import redis

from geventbatch import BatchAborted
from geventbatch._core import process
from tests.stores.test_redis_across import (
    KEYS,
    Accounts,
    adapter,  # noqa: F401 - a fixture
    bulk,
    hash_of,
    totals,
    transfer,
)
from tests.stores.test_stores import all_of, spawned
from tests.support.callers import answer_of
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from tests.support.adapters.redis import RedisAdapter

PROGRAM = """
import sys
from gevent import monkey
monkey.patch_all()
import random, gevent, redis
from geventbatch import Processor
from geventbatch.stores import RedisStore

url, prefix, seed, callers, runs = sys.argv[1:]
keys = ["{bank}%d" % number for number in range(6)]
dice = random.Random(int(seed))
store = RedisStore(redis.Redis.from_url(url), prefix=prefix)

def move(accounts):
    accounts[0]["total"] -= 1
    accounts[1]["total"] += 1
    for account in accounts:
        account["moves"] = account.get("moves", 0) + 1

def call():
    for _ in range(int(runs)):
        processor.run_across(dice.sample(keys, 2), move)

with Processor(open_resource=store, min_duration=0, max_duration=60, max_attempts=1000, max_bulk=4) as processor:
    gevent.joinall([gevent.spawn(call) for _ in range(int(callers))], raise_error=True)
print("done")
"""


def move(accounts: Accounts) -> None:
    """Move one, and count that in both."""
    accounts[0]["total"] -= 1
    accounts[1]["total"] += 1
    for account in accounts:
        account["moves"] = account.get("moves", 0) + 1


def moves(adapter: RedisAdapter) -> int:  # noqa: F811
    return sum(json.loads(hash_of(adapter, key)[b"value"]).get("moves", 0) for key in KEYS)


def move_as_another_program(adapter: RedisAdapter, source: str, target: str) -> bool:  # noqa: F811
    """Do the same in a transaction of one's own, as the class says that other programs have to; or lose a race."""
    names = [adapter.name(key) for key in (source, target)]
    with adapter.direct.pipeline() as transaction:
        transaction.watch(*names)
        accounts = [json.loads(transaction.hget(name, "value")) for name in names]
        move(tuple(accounts))
        transaction.multi()
        for name, account in zip(names, accounts, strict=True):
            transaction.hset(name, "value", json.dumps(account))
            transaction.hincrby(name, "version", 1)
        try:
            transaction.execute()
        except redis.WatchError:
            return False
        return True


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_worker_that_is_killed_in_the_save_leaves_all_keys_saved_or_none(
    adapter: RedisAdapter,  # noqa: F811
    carried_out: bool,
) -> None:
    with bulk(adapter) as processor:
        hold = adapter.proxy.hold_answer if carried_out else adapter.proxy.hold
        with hold(adapter.commit_marker) as rule:
            callers = [spawned(processor.run_across, KEYS[:2], transfer, 1) for _ in range(2)]
            callers.append(spawned(processor.run_across, KEYS[1:3], transfer, 1))
            wait_until(rule.reached)
            worker: Any = next(iter(process.running))
            worker.kill(block=False)
            answers = all_of(callers)
            wait_until(lambda: worker.dead)
        assert {type(answer) for answer in answers} == {BatchAborted}
        assert not any(answer.retry_safe for answer in answers)
        wait_until(lambda: adapter.open_connections() == 0 or not adapter.busy_connections())
        after = totals(adapter)[:3]
        assert after in ([8, 11, 11], [10, 10, 10])
        assert processor.run_across(KEYS[:2], transfer, 1) in ((7, 12), (9, 11))
        if carried_out:
            assert after == [8, 11, 11]


def test_two_processes_and_another_program_lose_nothing_and_leave_nothing_half_done(
    adapter: RedisAdapter,  # noqa: F811
) -> None:
    if isinstance(adapter.client, redis.RedisCluster):  # the same scripts, on the same server
        runs, callers, others = 2, 2, 5
    else:
        runs, callers, others = 10, 5, 40
    url, _, prefix = adapter.address.partition("#")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, url, prefix, str(seed), str(callers), str(runs)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for seed in range(2)
    ]
    dice = random.Random(3)
    done = 0
    while done < others or any(child.poll() is None for child in children):
        done += move_as_another_program(adapter, *dice.sample(KEYS, 2))
        gevent.sleep(0.002)
    assert [child.communicate()[0] for child in children] == ["done\n"] * 2
    found = totals(adapter)
    assert sum(total or 0 for total in found) == 60
    assert moves(adapter) == 2 * (2 * callers * runs + done)


def test_answers_that_are_lost_beside_other_writers_are_all_decided(adapter: RedisAdapter) -> None:  # noqa: F811
    dice = random.Random(5)
    ended = False

    def meddle() -> int:
        count = 0
        while not ended:
            count += move_as_another_program(adapter, *dice.sample(KEYS, 2))
            gevent.sleep(0.005)
        return count

    def call(processor: Any) -> None:
        for _ in range(5):
            processor.run_across(dice.sample(KEYS, 2), move)

    with bulk(adapter, max_attempts=1000, max_duration=60, max_batches=3, max_bulk=4) as processor:
        for first in (0, 2, 4):  # a hash that no store has saved yet does not tell a writer from one that made it anew
            processor.run_across(KEYS[first : first + 2], move)
        others = gevent.spawn(meddle)
        cuts = [
            (adapter.proxy.cut_after, adapter.proxy.cut_before)[number % 2](adapter.commit_marker)
            for number in range(10)
        ]
        answers = all_of([spawned(partial(answer_of, call, processor)) for _ in range(6)])
        ended = True
        done = others.get()
    assert [rule.met for rule in cuts] == [1] * 10
    assert answers == [None] * 6
    assert sum(total or 0 for total in totals(adapter)) == 60
    assert moves(adapter) == 2 * (3 + 30 + done)

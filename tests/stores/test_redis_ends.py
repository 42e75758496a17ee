"""What a pool of the application's own raises as a batch gives its connection back changes no outcome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import gevent
import pytest
import redis

from geventbatch import NotSaved, Processor
from geventbatch.stores import RedisStore
from tests.support.callers import answer_of
from tests.support.redis_server import connected, redis_url
from tests.support.servers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


class Broken(LookupError):
    pass


class Pool(redis.ConnectionPool):
    """An application's own."""

    raises = False

    def release(self, connection: Any) -> None:
        super().release(connection)
        if self.raises:
            raise Broken


@pytest.fixture
def pool() -> Iterator[Pool]:
    made: Any = Pool.from_url(redis_url())
    yield made
    made.disconnect()


@pytest.fixture
def prefix() -> Iterator[str]:
    made = f"{uuid4().hex}:"
    yield made
    with connected(redis_url()) as client:
        for name in client.scan_iter(f"*{made}*", count=1000):
            client.delete(name)


@pytest.fixture(params=["one key", "bulk"])
def processor(request: pytest.FixtureRequest, pool: Pool, prefix: str) -> Iterator[Processor[Any]]:
    store = RedisStore(redis.Redis(connection_pool=pool), prefix=prefix, missing=lambda _: {"total": 0})
    opens: Any = {"open_resource": store} if request.param == "one key" else {"open_resources": store.open_resources}
    with Processor(**opens, min_duration=0, max_duration=10) as made:
        yield made


def test_what_was_saved_is_answered(
    pool: Pool, prefix: str, processor: Processor[Any], caplog: pytest.LogCaptureFixture
) -> None:
    def add(resource: dict[str, int]) -> int:
        pool.raises = True  # behind the load, which is the client's own
        resource["total"] += 1
        return resource["total"]

    callers = [gevent.spawn(answer_of, processor.run, "k", add) for _ in range(2)]
    assert [caller.get() for caller in callers] == [1, 2]
    with connected(redis_url()) as client:
        assert client.hget(f"{prefix}k", "value") == b'{"total":2}'
    wait_until(lambda: "batch of key 'k'" in caplog.text)
    assert "its connection or a listener raised: Broken()" in caplog.text


def test_what_was_refused_is_told(pool: Pool, prefix: str, processor: Processor[Any]) -> None:
    def spoil(resource: dict[str, int]) -> None:
        resource["total"] += 1
        with connected(redis_url()) as client:
            client.delete(f"{prefix}k")
            client.set(f"{prefix}k", "no hash")
        pool.raises = True

    answer = answer_of(processor.run, "k", spoil)
    assert isinstance(answer.__cause__, NotSaved)
    assert answer.retry_safe

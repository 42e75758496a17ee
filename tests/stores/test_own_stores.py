"""The stores of docs/own-stores.md, each on its real server, pass the contract of stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psycopg2.extensions  # type: ignore[import-untyped] # it has no types
import pytest

from examples.stores.bench_with_psycopg import AccountsBench
from geventbatch.testing import store_contract
from tests.support.hand_benches import (
    AddsWithoutAskingBench,
    DynamoDBBench,
    MemcachedBench,
    PeeweeBench,
    PonyBench,
    PooledClientBench,
    SendsAgainBench,
    dynamodb,
    memcached,
)
from tests.support.psycopg_bench import of_schema, schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing import StoreBench, StoreCheck


@pytest.fixture(scope="module")
def accounts() -> Iterator[str]:
    with schema() as name:
        yield name


@pytest.fixture
def _psycopg2_as_it_was() -> Iterator[None]:
    before: Any = psycopg2.extensions.get_wait_callback()
    yield
    psycopg2.extensions.set_wait_callback(before)


@pytest.fixture(scope="module")
def memcached_port() -> Iterator[int]:
    with memcached() as port:
        yield port


@pytest.fixture(scope="module")
def dynamodb_port() -> Iterator[int]:
    with dynamodb() as port:
        yield port


@pytest.mark.parametrize("check", store_contract(AccountsBench), ids=str)
def test_the_store_with_psycopg(check: StoreCheck, accounts: str) -> None:
    check(AccountsBench(*of_schema(accounts)))


@pytest.mark.parametrize("check", store_contract(PeeweeBench), ids=str)
def test_the_store_with_peewee(check: StoreCheck, accounts: str) -> None:
    check(PeeweeBench(accounts))


@pytest.mark.usefixtures("_psycopg2_as_it_was")
@pytest.mark.parametrize("check", store_contract(PonyBench), ids=str)
def test_the_store_with_pony(check: StoreCheck, accounts: str) -> None:
    check(PonyBench(accounts))


@pytest.mark.memcached
@pytest.mark.parametrize("check", store_contract(MemcachedBench), ids=str)
def test_the_store_in_memcached(check: StoreCheck, memcached_port: int) -> None:
    check(MemcachedBench(memcached_port))


@pytest.mark.parametrize("check", store_contract(DynamoDBBench), ids=str)
def test_the_store_in_dynamodb(check: StoreCheck, dynamodb_port: int) -> None:
    check(DynamoDBBench(dynamodb_port))


# -- what the page warns of ---------------------------------------------------------------------------------------


def test_a_conditional_write_that_boto3_sends_again_is_applied_twice_and_that_is_caught(dynamodb_port: int) -> None:
    with pytest.raises(AssertionError, match=r"was to add 1 to 10 at .* was answered 12, and 12 is saved"):
        of(SendsAgainBench, "a_save_whose_answer_is_lost_is_applied_once")(SendsAgainBench(dynamodb_port))


@pytest.mark.memcached
def test_an_add_that_asks_nobody_loses_a_first_insert_and_that_is_caught(memcached_port: int) -> None:
    with pytest.raises(AssertionError, match=r"added 1 to 0, and were answered \[1, 1\]"):
        of(AddsWithoutAskingBench, "two_stores_lose_nothing")(AddsWithoutAskingBench(memcached_port))


@pytest.mark.memcached
def test_a_pooled_client_loses_its_places_by_deadlines_and_that_is_caught(memcached_port: int) -> None:
    with pytest.raises(AssertionError, match="0 of 4 batches could run at once afterwards"):
        of(PooledClientBench, "deadlines_in_the_load_lose_no_connection")(PooledClientBench(memcached_port))


def of(bench: type[StoreBench], name: str) -> StoreCheck:
    (found,) = [check for check in store_contract(bench) if check.name == name]
    return found

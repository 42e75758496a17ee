"""The benchmarks work, and notice when something is lost. They need wrk and other libraries; here is what does not."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from benchmarks import batch_cost, growth, hot_row, parts, peers, refusals, transfer_ways, transfers, web
from benchmarks.hot_row import Line, Place, Turn
from benchmarks.transfers_in_redis import hold
from benchmarks.ways import begin_at_zero, check, create_tables
from examples.server import Server
from examples.tickets.settings import CONFIGURATION
from tests.support.servers import ask, database, side_by_side

pytestmark = pytest.mark.variants


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with database("postgresql", tmp_path) as url:
        create_tables(url)
        yield url


def test_every_way_of_the_hot_row_adds_what_it_answers(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Place(url, url, 0).measure(callers=1, turns=1, seconds=0.02)
    hot_row.show(lines)
    shown = capsys.readouterr().out
    assert all(line.way in shown for line in lines)
    assert {line.way for line in lines if line.turns[0].beyond is not None} == set(hot_row.BATCHED)


def test_operations_that_were_answered_and_are_not_there_are_noticed(url: str) -> None:
    begin_at_zero(url, ["hot"])
    with pytest.raises(AssertionError, match="1 were answered, 0 were not, but 0 are in the database"):
        check(url, "documents", 1)


def test_the_crossing_is_found_between_two_numbers_of_callers() -> None:
    def line(way: str, callers: int, rate: float) -> Line:
        return Line(0, callers, way, None, [Turn(rate, 1, 1, 0, None)])

    batches, updates = hot_row.AHEAD
    lines = [line(updates, callers, 1000) for callers in (1, 5, 20)]
    lines += [line(batches, callers, callers * 100) for callers in (1, 5, 20)]
    assert hot_row.crossing(lines) == "10 callers (the UPDATEs a second × the seconds of a batch: 10)"


def test_every_way_of_the_tickets_saves_a_change_once(tmp_path: Path) -> None:
    def sells(url: str, way: str, train: str) -> None:
        arguments = ("--workers", "1", "benchmarks.web_app:app")
        with Server(CONFIGURATION, {"DATABASE_URL": url, "WAY": way, "POOL": "2"}, arguments) as server:
            path = f"/trains/{train}/seats/7"
            assert ask(server, "GET", "/measured")[1]["operations"] == 0
            asked = [ask(server, method, path, {"passenger": "Ann"})[0] for method in ("POST", "POST", "DELETE")]
            assert asked == [201, 409, 200]
            measured = ask(server, "GET", "/measured")[1]
            counted = (1, True) if way == "batched" else (0, False)
            assert (measured["operations"], measured["load_and_save"] > 0) == counted
        assert web.changes(url, way, train) == 2

    with database("postgresql", tmp_path) as url:
        web.create_trains(url)
        for train in web.TRAINS:
            web.begin_empty(url, train)
        sold = (("batched", "Train200"), ("row lock", "Train200"), ("atomic UPDATE", "Train1000"))
        side_by_side(sells, *((url, *one) for one in sold))


def test_nothing_of_ours_is_left_after_a_load() -> None:
    grown = growth.in_a_process(growth.Case(50, 5, "freeze, 10,000"), operations=200)
    assert grown.left == 0
    assert grown.nanoseconds > 0


def test_peers_are_measured_in_processes_of_their_own() -> None:
    side_by_side(
        lambda peer: peers.show(64, {peers.OURS: [peers.turn(peer, keys=64, seconds=0.02)]}),
        ("geventbatch",),
        ("lock per key, gevent",),
    )


def test_what_operation_and_batch_cost_is_told_apart() -> None:
    costs = {size: 2000 + 7000 / size for size in parts.SIZES}
    assert parts.fitted(costs) == pytest.approx((2000, 7000))


def test_callers_who_come_by_themselves_are_all_saved(url: str) -> None:
    assert parts.by_themselves(url, window=0.01, seconds=0.1).batches > 0


def test_a_batch_through_every_store_is_measured_beside_what_it_replaces(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = batch_cost.of_all(url, (), rounds=1, batches=2, sizes=(1, 3))
    batch_cost.show(lines)
    assert [(line.name, line.size) for line in lines if line.against] == [
        (store, size)
        for store in ("documents", "mapped", "SQL, psycopg", "SQL, psycopg2", "Django", "Redis")
        for size in (1, 3)
    ]
    shown = capsys.readouterr().out
    assert all(f"\n{line.name}" in shown for line in lines)
    batch_cost.show_lone(lines)
    rows = capsys.readouterr().out.splitlines()[3:]
    assert [row[:24].strip() for row in rows] == [line.name for line in lines if line.against and line.size == 1]


def test_refusals_are_undone_over_every_store(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [case for case in refusals.CASES if case.size in {"16 B", "columns"}]
    for case in cases:
        refusals.measure(case, turns=1, batches=1)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [case.store for case in cases]


@pytest.fixture
def url_of_accounts(tmp_path: Path) -> Iterator[str]:
    with database("postgresql", tmp_path) as url:
        transfer_ways.create_tables(url)
        yield url


@pytest.mark.parametrize("shape", [transfers.HOT, transfers.SPREAD, transfers.SINGLE], ids=lambda shape: shape.title)
def test_every_way_of_a_transfer_moves_what_it_answers(
    url_of_accounts: str, shape: transfers.Shape, capsys: pytest.CaptureFixture[str]
) -> None:
    place = transfers.Place(url_of_accounts, url_of_accounts, 0)
    lines = place.measure(replace(shape, accounts=5), callers=3, turns=1, seconds=0.02)
    list(transfers.show(shape, lines))
    shown = capsys.readouterr().out
    assert [line.way for line in lines] == list(shape.ways)
    assert all(f"\n  {line.way}" in shown for line in lines)


def test_a_transfer_that_is_half_there_is_noticed(url_of_accounts: str) -> None:
    transfer_ways.begin_rich(url_of_accounts, 3)
    with transfer_ways.Transaction(url_of_accounts, 1) as way:
        way.transfer(0, 1, 5)
        transfer_ways.check(url_of_accounts, way, 3, 1, keys=2, audit=False)
        with psycopg.connect(url_of_accounts) as connection:
            connection.execute("UPDATE accounts SET balance = balance - 5 WHERE id = 1")
        with pytest.raises(AssertionError, match="money, transfers and rows"):
            transfer_ways.check(url_of_accounts, way, 3, 1, keys=2, audit=False)


def test_what_a_target_asks_for_is_said_to_be_reached_or_not() -> None:
    target = transfers.Target(25, transfers.PLAIN, 100)
    assert target.reached(25.04) == "  target 25 × transaction: 25.0, reached"
    assert target.reached(24.96) == "  target 25 × transaction: 25.0, MISSED"


def test_redis_is_held_by_a_batch_that_connects_hashes() -> None:
    held = hold(keys=200, size=16)
    assert 0 < held.longest <= held.everything

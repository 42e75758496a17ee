"""`benchmarks.durable` notices what is lost or done twice, and leaves out what is not here. This needs no npm."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from gevent.pool import Pool
from gevent.pywsgi import WSGIServer

from benchmarks import durable, durable_peers
from benchmarks.durable import FLOOR, AfterKill, Course, Place, Turn
from benchmarks.durable_peers import HOST, PEERS, LeftOut, Running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Accounts:
    """A peer in this process, whose answers can be lost."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()
        self.done: dict[str, int] = {}
        self.loses = 0
        """So many answers are lost from now on; what they answer is done."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., object]) -> list[bytes]:
        _, action, *keys = environ["PATH_INFO"].split("/")
        name = environ.get("HTTP_IDEMPOTENCY_KEY")
        if name not in self.done and action != "read":
            self.values.update({keys[-1]: 1, **({keys[0]: -1} if action == "transfer" else {})})
            if name is not None:
                self.done[name] = self.values[keys[-1]]
        is_lost = self.loses > 0 and action != "read"
        self.loses -= is_lost
        content = b"" if is_lost else json.dumps(self.values[keys[-1]]).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        start_response("503 Service Unavailable" if is_lost else "200 OK", headers)
        return [content]


@contextmanager
def place(*, is_keyed: bool, loses: int = 0) -> Iterator[tuple[Accounts, Place]]:
    accounts = Accounts()
    server = WSGIServer((HOST, 0), accounts, log=None, spawn=Pool())
    server.start()

    def kill() -> None:
        accounts.loses = loses

    running = Running(int(server.address[1]), [], {"answers": kill}, durable_peers._plainly, is_keyed=is_keyed)
    try:
        yield accounts, Place("it", running)
    finally:
        server.stop(timeout=30)  # its callers have closed their connections


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "WARM_UP", 0.05)
    monkeypatch.setattr(durable, "PAUSE", 0.001)
    monkeypatch.setattr(durable, "CUSTOMERS", 5)


def test_what_is_answered_is_counted_and_compared_with_what_is_there() -> None:
    with place(is_keyed=False) as (accounts, it):
        it.measure_hot(3, 0.1)
        it.measure_transfers(3, 0.1)
    assert (len(it.hot[3]), len(it.transfers[3])) == (1, 1)
    assert accounts.values[durable.HOT] > 0
    assert accounts.values[durable.MERCHANT] == -sum(accounts.values[durable.customer(one)] for one in range(5)) > 0


def test_an_answer_that_is_lost_where_nothing_was_killed_ends_the_measurement() -> None:
    with place(is_keyed=True) as (accounts, it):
        accounts.loses = 1
        with pytest.raises(AssertionError, match="/add/hot was answered with 0"):
            it.measure_hot(1, 0.1)


def test_what_is_there_and_was_not_answered_is_noticed() -> None:
    with (
        place(is_keyed=True) as (_, it),
        pytest.raises(AssertionError, match="it: 5 were answered, hot has changed by 6"),
    ):
        it._compare("hot", 6, 5)


def test_operations_with_keys_are_sent_again_after_a_kill_and_none_is_unknown_or_done_twice() -> None:
    with place(is_keyed=True, loses=7) as (_, it):
        it.measure_kill("answers", 0.1)
    left = it.kills["answers"]
    assert (left.unknown, left.failed, left.beyond) == (0, 7, 0)
    assert left.silence > 0


def test_operations_without_keys_are_unknown_after_a_kill_and_those_that_were_done_are_counted() -> None:
    with place(is_keyed=False, loses=7) as (_, it):
        it.measure_kill("answers", 0.1)
    assert it.kills["answers"][:3] == AfterKill(7, 7, 7, 0)[:3]


def test_the_tables_have_a_line_for_each_peer_with_its_ratio_to_the_row_lock() -> None:
    turns = {FLOOR: {20: [Turn(100, 1, 2, 3), Turn(300, 1, 2, 3)]}, "geventbatch": {20: [Turn(1000, 1, 2, 0.5)]}}
    title, _, floor, ours, _ = durable.shown("one hot record", turns)
    assert title == "one hot record, 20 callers"
    assert floor.split() == [*FLOOR.split(), "200", "(100", "to", "300)", "1.00", "1.0", "2.0", "3.00"]
    assert ours.split() == ["geventbatch", "1,000", "5.00", "1.0", "2.0", "0.50"]
    with place(is_keyed=True) as (_, it):
        it.kills["worker"] = AfterKill(0, 20, 0, 0.54)
    *_, killed = durable.shown_kills([it])
    assert killed.split() == ["it,", "its", "worker", "20", "0", "0", "0.5"]


@pytest.mark.parametrize(("peer", "missing"), [("DBOS", "dbos"), ("Restate", "restate")])
def test_what_is_not_installed_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: str, missing: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LeftOut, match=rf"{missing} is not installed: pip install -e '\.\[durable\]'"):
        PEERS[peer](tmp_path, "postgresql://nowhere")


@pytest.mark.parametrize("peer", ["Restate", "Durable Objects"])
def test_servers_from_npm_are_left_out_where_there_is_no_npm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: str
) -> None:
    monkeypatch.setattr(durable_peers, "_need", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LeftOut, match="npm is not here"):
        PEERS[peer](tmp_path, "postgresql://nowhere")


def test_the_cpu_time_of_a_peer_is_that_of_its_programs_and_of_its_database(tmp_path: Path) -> None:
    child = durable_peers.Child(["sleep", "60"], tmp_path)
    child.start()
    with Running(0, [child], {}, durable_peers._plainly, is_keyed=False) as running:
        alone = running.cpu_time()
        running.database = psutil.Process()
        assert running.cpu_time() - alone >= sum(psutil.Process().cpu_times()[:2]) / 2 > 0
    assert child.process is None


@pytest.mark.timeout(180)
@pytest.mark.variants
def test_what_needs_postgresql_only_is_measured_and_killed(tmp_path: Path) -> None:
    left_out, places = durable.measured(tmp_path, [FLOOR, "geventbatch"], Course(0.1, 1, (2,), (2,)))
    assert left_out == {}
    assert [(one.name, [*one.kills]) for one in places] == [(FLOOR, ["worker"]), ("geventbatch", ["worker"])]
    assert all(len(one.hot[2]) == len(one.transfers[2]) == 1 for one in places)

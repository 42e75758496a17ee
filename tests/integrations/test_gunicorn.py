"""gunicorn's hooks, on real servers: whatever ends a worker, who was answered is saved, and who was admitted is both.

What gunicorn does not allow for is listed in test_tickets_signals.
"""

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import gevent
import pytest
from gunicorn.config import Config
from gunicorn.workers.ggevent import GeventWorker

from examples.client import Connection
from geventbatch.integrations.gunicorn import nworkers_changed
from tests.support.gated_server import (
    ROOT,
    Crowd,
    GatedServer,
    crowd_of,
    is_ending,
    is_other,
    wait_until_pending,
)
from tests.support.servers import side_by_side, wait_until

CONFIGURATION = ROOT / "tests/support/programs" / "gunicorn.conf.py"
ADMITTED = 20


def gunicorn(directory: Path, *arguments: str, **environment: str) -> GatedServer:
    command = [sys.executable, "-m", "gunicorn", "--config", str(CONFIGURATION), *arguments]
    return GatedServer(directory, command, **environment)


class Case(NamedTuple):
    name: str
    send: Callable[[GatedServer], None]
    arguments: tuple[str, ...] = ()
    interrupts: bool = False  # gunicorn drops everything, unless a hook keeps it from that
    goes_on: bool = False  # the server does, with another worker


def to_parent(number: signal.Signals) -> Callable[[GatedServer], None]:
    return lambda server: server.process.send_signal(number)


def to_worker(number: signal.Signals) -> Callable[[GatedServer], None]:
    return lambda server: os.kill(server.health()["pid"], number)


def to_all(number: signal.Signals) -> Callable[[GatedServer], None]:
    return lambda server: os.killpg(server.process.pid, number)


PYWSGI = ("--worker-class", "gevent_pywsgi")
CASES = [
    Case("TERM", to_parent(signal.SIGTERM)),
    Case("INT", to_parent(signal.SIGINT), interrupts=True),
    Case("QUIT", to_parent(signal.SIGQUIT), interrupts=True),
    Case("HUP", to_parent(signal.SIGHUP), goes_on=True),
    Case("TERM preloaded", to_parent(signal.SIGTERM), ("--preload",)),
    Case("QUIT preloaded", to_parent(signal.SIGQUIT), ("--preload", "--worker-class", "gevent"), interrupts=True),
    Case("HUP preloaded", to_parent(signal.SIGHUP), ("--preload",), goes_on=True),
    Case("Ctrl-C in a terminal", to_all(signal.SIGINT), ("--preload",), interrupts=True),
    Case("HUP to all", to_all(signal.SIGHUP), goes_on=True),
    Case("TERM to the worker", to_worker(signal.SIGTERM), goes_on=True),
    Case("QUIT to the worker", to_worker(signal.SIGQUIT), interrupts=True, goes_on=True),
    Case("TERM pywsgi", to_parent(signal.SIGTERM), PYWSGI),
    Case("INT pywsgi", to_parent(signal.SIGINT), PYWSGI, interrupts=True),
    Case("HUP pywsgi", to_parent(signal.SIGHUP), PYWSGI, goes_on=True),
]


def test_whoever_was_admitted_when_the_signal_comes_is_saved_and_answered_and_the_users_hooks_are_called(
    tmp_path: Path,
) -> None:
    def run(case: Case) -> None:
        with gunicorn(tmp_path / case.name, *case.arguments) as server:
            words = [f"{'slow' if n % 5 == 0 else 'word'}{n}" for n in range(ADMITTED)]
            callers = [gevent.spawn(server.ask, word) for word in words]
            first = wait_until_pending(server, ADMITTED)
            case.send(server)
            wait_until(lambda: is_ending(server, first["pid"]))
            assert server.saved() == []

            server.open_gate()

            assert [caller.get()[0] for caller in callers] == [200] * ADMITTED
            assert sorted(server.saved()) == sorted(words)
            if case.goes_on:
                wait_until(lambda: is_other(server, first["pid"]))
                server.process.terminate()
            assert server.wait() == 0
            check_hooks(case, Counter(server.hooks()))
            assert "Traceback" not in server.log()

    side_by_side(run, *((case,) for case in CASES))


def check_hooks(case: Case, called: Counter[str]) -> None:
    workers = 2 if case.goes_on else 1
    once_each = ("post_fork", "post_worker_init", "worker_exit")
    assert [called[name] for name in once_each] == [workers] * 3, called
    assert called["worker_int"] == case.interrupts
    assert called["pre_request"] == called["post_request"]
    assert (called["pre_request"] > 0) == (case.arguments != PYWSGI)  # that worker calls neither


def test_whoever_comes_while_a_worker_ends_is_answered_or_nothing_of_his_is_saved(tmp_path: Path) -> None:
    def end(sent: signal.Signals) -> None:
        with crowded(tmp_path / sent.name) as (server, crowd):
            wait_until(lambda: len(crowd.saved) > 50)
            server.process.send_signal(sent)
            assert server.wait() == 0
        assert crowd.statuses.keys() <= {200, 503, 0}

    def restart() -> None:
        with crowded(tmp_path / "restart", "--max-requests", "20", "--preload") as (server, crowd):
            wait_until(lambda: len(crowd.workers) > 1)
            crowd.go_home()
            server.process.terminate()
            assert server.wait() == 0
        assert crowd.statuses.keys() == {200}

    side_by_side(lambda run, *case: run(*case), (end, signal.SIGTERM), (end, signal.SIGQUIT), (restart,))


@contextmanager
def crowded(directory: Path, *arguments: str) -> Iterator[tuple[GatedServer, Crowd]]:
    with gunicorn(directory, *arguments) as server, crowd_of(server) as crowd:
        yield server, crowd


def test_what_nobody_waits_for_is_saved_too_before_the_worker_ends(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "later") as server:
        assert server.ask("later")[0] == 200
        wait_until_pending(server, 1)
        server.process.terminate()
        wait_until(lambda: "Worker exiting" in server.log())
        server.open_gate()

        assert server.wait() == 0
        assert server.saved() == ["later"]


def test_a_signal_ends_a_worker_that_is_still_starting(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "starting", POST_FORK_WAITS="yes") as server:
        wait_until(lambda: "post_fork" in server.hooks())
        server.process.terminate()

        # Well before graceful_timeout, after which the parent kills it.
        assert server.process.wait(10) == 0


def test_an_error_answer_takes_the_place_of_what_the_application_had_begun(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "overloaded") as server:
        connection = HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/overloaded")
        answer = connection.getresponse()
        body = answer.read()
        connection.close()

    assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
    assert answer.headers.get_all("Content-Length") == [str(len(body))]


def test_kept_connections_to_pywsgi_end_with_their_worker(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "kept", *PYWSGI, "--graceful-timeout", "60") as server:
        idle, busy = (Connection("127.0.0.1", server.port) for _ in range(2))
        for one in (idle, busy):
            assert one.ask("GET", "/")[0] == 200
        asking = gevent.spawn(busy.ask, "GET", "/word")
        first = wait_until_pending(server, 1)
        server.process.terminate()
        wait_until(lambda: is_ending(server, first["pid"]))
        server.open_gate()

        assert asking.get()[0] == 200
        assert busy.headers["connection"] == "close"
        assert server.process.wait(30) == 0  # well before graceful_timeout
        with pytest.raises(OSError, match=r"closed|reset|Broken pipe"):
            idle.ask("GET", "/")


@pytest.mark.parametrize(("protocols", "count"), [("h2,h1", 1), ("h1", 0)])
def test_http2_is_warned_of_at_the_start_and_once(protocols: str, count: int) -> None:
    cfg = Config()
    cfg.set("http_protocols", protocols)
    logged: list[str] = []
    server = SimpleNamespace(cfg=cfg, worker_class=GeventWorker, log=SimpleNamespace(warning=logged.append))
    for _ in range(2):
        nworkers_changed(server, 1, None)
    assert len(logged) == count
    assert all(line.startswith("http_protocols has h2: gunicorn serves the streams of an HTTP/2") for line in logged)


def test_a_preloaded_application_is_imported_in_a_patched_process(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "preloaded", "--preload") as server:
        assert server.health()["patched"] is True
        assert "patched-late" not in server.health()["problems"]


def test_the_collector_leaves_out_what_a_worker_has_loaded_unless_that_is_refused(tmp_path: Path) -> None:
    def freezes() -> None:
        with gunicorn(tmp_path / "freezes", DEBUG="1") as server:
            health = server.health()
            wait_until(lambda: f"objects that are loaded in process {health['pid']}, and begins a pass" in server.log())
        assert health["frozen"] > 10_000  # the application with what it imports
        assert health["threshold"] == [10_000, 50, 10]

    def refuses() -> None:
        with gunicorn(tmp_path / "refuses", GEVENTBATCH_FREEZE="0") as server:
            health = server.health()
        assert health["frozen"] == 0
        assert tuple(health["threshold"]) == gc.get_threshold()

    side_by_side(lambda run: run(), (freezes,), (refuses,))


def test_what_a_parent_has_loaded_is_left_out_before_it_forks_so_that_its_workers_share_the_memory(
    tmp_path: Path,
) -> None:
    with gunicorn(tmp_path / "preloaded", "--preload") as server:
        health = server.health()
        assert health["frozen_at_fork"] == [pytest.approx(health["frozen"], rel=0.1)]
        assert health["frozen_at_fork"] < [health["frozen"]]  # the worker has loaded some more


def test_a_refusal_that_says_neither_yes_nor_no_is_named_at_the_start(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "neither", GEVENTBATCH_FREEZE="perhaps") as server:
        assert server.wait() == 255  # of gunicorn, when its parent raises
        assert "GEVENTBATCH_FREEZE is 'perhaps' in the environment, but must be 0" in server.log()


def test_each_worker_warns_of_a_max_duration_that_graceful_timeout_has_no_room_for(tmp_path: Path) -> None:
    with gunicorn(tmp_path / "long", MAX_DURATION="16") as server:
        server.process.send_signal(signal.SIGTTIN)  # one worker more
        wait_until(lambda: server.hooks().count("post_worker_init") == 2)
        warning = (
            "A batch may take max_duration = 16 s, but a worker that is told to end waits 15 s for it, since "
            "graceful_timeout is 20 s: what runs longer is killed"
        )
        assert server.log().count(warning) == server.log().count("A batch may take") == 2
        # The first one was alone when it was forked.
        assert server.log().count("compares nothing, and more than one worker process serves") == 1


@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_other_workers_are_refused_with_a_message(tmp_path: Path, worker_class: str) -> None:
    with gunicorn(tmp_path / "refused", "--worker-class", worker_class) as server:
        assert server.wait() == 1
        assert (
            f"geventbatch needs gunicorn's gevent worker, but worker_class is '{worker_class}', from gunicorn.conf.py "
            "or from the command line"
        ) in server.log()

"""`serve` on gevent's own server: whatever signal ends it, who was admitted is saved and answered."""

import re
import signal
import sys
from pathlib import Path

import gevent
import pytest
from gevent.pywsgi import WSGIServer

from examples.client import Connection
from geventbatch.integrations.pywsgi import serve
from tests.support.gated_server import GatedServer, crowd_of, health_of, wait_until_pending
from tests.support.servers import wait_until

ADMITTED = 40


def pywsgi(directory: Path, timeout: float = 40, **environment: str) -> GatedServer:
    command = [sys.executable, "-m", "tests.support.programs.pywsgi_app"]
    return GatedServer(directory, command, TIMEOUT=str(timeout), **environment)


SIGNALS = [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGQUIT,), (signal.SIGHUP,), (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("signals", SIGNALS, ids=lambda sent: " ".join(one.name for one in sent))
def test_whoever_was_admitted_when_the_signal_comes_is_saved_and_answered(
    tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    with pywsgi(tmp_path / "server") as server:
        words = [f"{'slow' if n % 5 == 0 else 'word'}{n}" for n in range(ADMITTED)]
        callers = [gevent.spawn(server.ask, word) for word in words]
        wait_until_pending(server, ADMITTED)
        assert server.health()["problems"] == []
        for sent in signals:
            server.process.send_signal(sent)
            wait_until(lambda: health_of(server) is None)
        assert server.saved() == []

        server.open_gate()

        assert [caller.get()[0] for caller in callers] == [200] * ADMITTED
        assert sorted(server.saved()) == sorted(words)
        assert server.wait() == 0
        assert server.log() == ""


def test_whoever_comes_while_it_ends_is_answered_or_nothing_of_his_is_saved(tmp_path: Path) -> None:
    with pywsgi(tmp_path / "server") as server, crowd_of(server) as crowd:
        wait_until(lambda: len(crowd.saved) > 50)
        server.process.terminate()
        assert server.wait() == 0
        crowd.go_home()
        assert crowd.statuses.keys() <= {200, 0}  # 0: not accepted any more


def test_what_nobody_waits_for_is_saved_too_before_it_ends(tmp_path: Path) -> None:
    with pywsgi(tmp_path / "server") as server:
        assert server.ask("later")[0] == 200
        wait_until_pending(server, 1)
        server.process.terminate()
        wait_until(lambda: health_of(server) is None)
        server.open_gate()

        assert server.wait() == 0
        assert server.saved() == ["later"]


def test_connections_are_closed_behind_their_response_and_idle_ones_soon(tmp_path: Path) -> None:
    with pywsgi(tmp_path / "server") as server:
        idle, busy = (Connection("127.0.0.1", server.port) for _ in range(2))
        for one in (idle, busy):
            assert one.ask("GET", "/")[0] == 200
            assert "connection" not in one.headers
        asking = gevent.spawn(busy.ask, "GET", "/word")
        wait_until_pending(server, 1)
        server.process.terminate()
        wait_until(lambda: health_of(server) is None)
        server.open_gate()

        assert asking.get()[0] == 200
        assert busy.headers["connection"] == "close"
        assert server.process.wait(20) == 0  # well before the 30 s that requests have
        with pytest.raises(OSError, match=r"closed|reset|Broken pipe"):
            idle.ask("GET", "/")


def test_what_takes_longer_than_the_timeout_is_cut_off_and_named(tmp_path: Path) -> None:
    with pywsgi(tmp_path / "server", timeout=2, MAX_DURATION="1000") as server:
        warning = "A batch may take max_duration = 1000 s, but requests that are told to end have 1.5 s"
        wait_until(lambda: warning in server.log())
        caller = gevent.spawn(server.ask, "word")
        wait_until_pending(server, 1)
        server.process.terminate()

        assert server.wait() == 3
        assert "Some batches did not end within 2 s after the signal" in server.log()
        assert server.saved() == []
        with pytest.raises(ValueError, match="Expecting value"):  # a plain "Internal Server Error"
            caller.get()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    with pywsgi(tmp_path / "server", IGNORE_HUP="yes") as server:
        server.open_gate()
        server.process.send_signal(signal.SIGHUP)
        assert server.ask("word")[0] == 200
        server.process.terminate()
        assert server.wait() == 0


def application(*_: object) -> list[bytes]:
    return []


def test_a_server_without_a_pool_is_refused() -> None:
    server = WSGIServer(("127.0.0.1", 0), application)
    with pytest.raises(
        ValueError, match=re.escape("has no pool, and so waits for no request when it stops: pass spawn=1000")
    ):
        serve(server)
    assert not server.started


@pytest.mark.parametrize(
    ("timeout", "error"), [(0, ValueError), (-1, ValueError), (float("inf"), ValueError), ("1", TypeError)]
)
def test_a_timeout_that_is_none_is_refused(timeout: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout is"):
        serve(WSGIServer(("127.0.0.1", 0), application, spawn=10), timeout)

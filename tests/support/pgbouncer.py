"""PgBouncer for tests, in transaction mode, in front of the tests' PostgreSQL; it ends with this process."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import gevent
import sqlalchemy as sa
from gevent import socket

if TYPE_CHECKING:
    from collections.abc import Iterator

SESSIONS = 4

COMMAND = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"


@contextmanager
def pooled(address: str) -> Iterator[str]:
    """The *address* of a schema with the port of a pooler in front of it, with a session for each batch."""
    url, schema = address.split("#")
    pooler = PgBouncer(sa.make_url(url), schema, SESSIONS)
    try:
        yield f"{address}#{pooler.port}"
    finally:
        pooler.close()


class PgBouncer:
    """A pooler that lends *sessions* of a database to all of its clients, each for a transaction.

    A client names no schema: `options` is refused there. Each session has *schema* as its search path.
    """

    def __init__(self, url: sa.URL, schema: str, sessions: int) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
        self._log = self._directory / "log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        host = str(url.host or url.query["host"])
        password = f"password={url.password} " if url.password else ""
        (self._directory / "ini").write_text(
            f"""[databases]
{url.database} = host={host} port={url.port or 5432} dbname={url.database} \
user={url.username} {password}connect_query='SET search_path = {schema}; SET synchronous_commit = off'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = {sessions}
max_client_conn = 1000
server_login_retry = 1
"""
        )
        own = []
        if os.getuid() == 0:  # it refuses to run as root, as PostgreSQL does
            user = Path(host).owner() if host.startswith("/") else "nobody"
            own = ["-u", user]
            for path in (self._directory, self._directory / "ini"):
                shutil.chown(path, user)
        # Not a pipe: it logs each connection, and stands still with all of them once a pipe that nobody reads is full.
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [COMMAND, *own, str(self._directory / "ini")], stdout=log, stderr=subprocess.STDOUT
            )
        atexit.register(self.close)
        give_up_at = time.monotonic() + 45
        while b"process up" not in self._log.read_bytes():  # whatever else may have the port by now would answer, too
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < give_up_at, self._log.read_text()
            gevent.sleep(0.01)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)
        atexit.unregister(self.close)

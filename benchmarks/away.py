"""A database that is further away: a proxy that delays, in a process of its own, so that it takes no time of callers.

``python -m benchmarks.away URL SECONDS`` is that process. It prints its port, and ends with its standard input. It is
made of threads: they sleep for fractions of a millisecond, where an event loop's timers begin at a whole one.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def away(url: str, seconds: float) -> Iterator[str]:
    """Give the URL at which a round trip to the PostgreSQL at *url* takes *seconds* more; 0 is the database itself."""
    if not seconds:
        yield url
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.away", url, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        yield sa.make_url(url).set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
    finally:
        process.communicate()


def round_trip(url: str) -> float:
    """Seconds of the shortest statement, the median of many."""
    import psycopg  # once the benchmark has patched

    with psycopg.connect(url, autocommit=True) as connection:
        taken = []
        for _ in range(101):
            begun = time.perf_counter()
            connection.execute("SELECT 1")
            taken.append(time.perf_counter() - begun)
    return sorted(taken)[50]


def _connected(url: str) -> socket.socket:
    server = sa.make_url(url)
    directory = server.query.get("host")  # of a Unix socket
    port = server.port or 5432
    if not directory:
        return socket.create_connection((str(server.host), port))
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.connect(f"{directory}/.s.PGSQL.{port}")
    return unix


def _lead(one: socket.socket, other: socket.socket, seconds: float) -> None:
    """Send on what comes from *one*, later; what a client or the server says is one piece."""
    with suppress(OSError):  # one of them has gone
        while piece := one.recv(1 << 20):
            time.sleep(seconds)
            other.sendall(piece)
    for side in (one, other):  # who waits at the other end for more is not left there
        with suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Lead to the database until nobody needs it any more."""
    url, seconds = sys.argv[1], float(sys.argv[2])
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            client, _ = listener.accept()
            server = _connected(url)
            for side in (client, server):
                if side.family == socket.AF_INET:
                    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((client, server), (server, client)):
                threading.Thread(target=_lead, args=(*ends, seconds / 2), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()

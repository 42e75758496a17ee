"""Stands between an application and PostgreSQL: counts round trips, and puts the server further away."""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit, urlunsplit

import gevent
from gevent import socket
from gevent.queue import Queue
from gevent.server import StreamServer


class Relay:
    """Listens on a free port of this machine, in this process, as long as its `with` lasts.

    Args:
        url: Of the server.
        delay: Seconds that whatever is sent takes on its way, in each direction.
    """

    def __init__(self, url: str, delay: float = 0.0) -> None:
        self._server_at = urlsplit(url)
        self._delay = delay
        self._listening = StreamServer(("127.0.0.1", 0), self._serve)
        self.round_trips = 0

    def __enter__(self) -> Self:
        self._listening.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listening.stop()

    @property
    def url(self) -> str:
        """What an application has to connect to."""
        user = self._server_at.netloc.rpartition("@")[0]
        address = f"{user}@127.0.0.1:{self._listening.server_port}"
        return urlunsplit(self._server_at._replace(netloc=address, query=""))

    def _serve(self, client: socket.socket, _: object) -> None:
        server = self._connect()
        passing = _Passing(self, self._delay)
        back = gevent.spawn(passing.back, server, client)
        passing.on(client, server)
        back.join()
        client.close()
        server.close()

    def _connect(self) -> socket.socket:
        host = parse_qs(self._server_at.query).get("host", [self._server_at.hostname or "127.0.0.1"])[0]
        port = self._server_at.port or 5432
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server


class _Passing:
    """What passes on one connection."""

    def __init__(self, relay: Relay, delay: float) -> None:
        self._relay = relay
        self._delay = delay
        self._is_answered = True

    def on(self, client: socket.socket, server: socket.socket) -> None:
        """Pass on what is asked: the first that comes after an answer begins a round trip."""
        for chunk in self._passed(client, server):
            self._relay.round_trips += bool(chunk) and self._is_answered
            self._is_answered = False

    def back(self, server: socket.socket, client: socket.socket) -> None:
        """Pass on the answers."""
        for _ in self._passed(server, client):
            self._is_answered = True

    def _passed(self, source: socket.socket, target: socket.socket) -> Iterator[bytes]:
        sending: Queue[tuple[float, bytes]] = Queue()
        sender = gevent.spawn(_send, sending, target)
        while chunk := _receive(source):
            yield chunk
            sending.put((time.monotonic() + self._delay, chunk))
        sending.put((0.0, b""))
        sender.join()


def _receive(source: socket.socket) -> bytes:
    try:
        received: bytes = source.recv(65536)
    except OSError:
        return b""
    return received


def _send(sending: "Queue[tuple[float, bytes]]", target: socket.socket) -> None:
    while True:
        due, chunk = sending.get()
        gevent.sleep(max(0.0, due - time.monotonic()))
        try:
            if not chunk:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(chunk)
        except OSError:
            return

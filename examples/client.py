"""A small HTTP client for measuring: it speaks no more of the protocol than these servers do, and costs little."""

import json
from typing import Any

from gevent import socket

TIMEOUT = 30.0


class Connection:
    """One kept HTTP connection; for one to a Unix socket, the host is its path and the port 0.

    Attributes:
        headers: Those of the last answer, in small letters.
    """

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket: socket.socket | None = None
        self.headers: dict[str, str] = {}

    def ask(self, method: str, path: str, body: object = None, *, key: str | None = None) -> tuple[int, Any]:
        """The status and the JSON of the answer; `OSError` when there is none. The *key* is an idempotency key."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._address[0]}:{self._address[1]}\r\n"
        head += f"Idempotency-Key: {key}\r\n" if key else ""
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        try:
            self._open().sendall(head.encode() + content)
            return self._answer()
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """The next `ask` connects again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _open(self) -> socket.socket:
        if self._socket is None:
            self._socket = _connected(*self._address)
        return self._socket

    def _answer(self) -> tuple[int, Any]:
        read = self._receive()
        while b"\r\n\r\n" not in read:
            read += self._receive()
        head, _, content = read.partition(b"\r\n\r\n")
        status, self.headers = _parsed(head)
        while len(content) < int(self.headers["content-length"]):
            content += self._receive()
        if self.headers.get("connection") == "close":
            self.close()
        return status, json.loads(content)

    def _receive(self) -> bytes:
        assert self._socket is not None
        read: bytes = self._socket.recv(65536)
        if not read:
            raise ConnectionResetError("closed before the answer")
        return read


def _connected(host: str, port: int) -> socket.socket:
    if port:
        return socket.create_connection((host, port), timeout=TIMEOUT)
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(TIMEOUT)
        connected.connect(host)
    except OSError:
        connected.close()
        raise
    return connected


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip().lower() for name, value in pairs}

"""A small HTTP client for measuring: it speaks no more of the protocol than these servers do, and costs little."""

import json
from typing import Any

from gevent import socket

TIMEOUT = 30.0


class Connection:
    """One kept HTTP connection."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket: socket.socket | None = None

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """The status and the JSON of the answer; `OSError` when there is none."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._address[0]}:{self._address[1]}\r\n"
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
            self._socket = socket.create_connection(self._address, timeout=TIMEOUT)
        return self._socket

    def _answer(self) -> tuple[int, Any]:
        read = self._receive()
        while b"\r\n\r\n" not in read:
            read += self._receive()
        head, _, content = read.partition(b"\r\n\r\n")
        status, headers = _parsed(head)
        while len(content) < int(headers["content-length"]):
            content += self._receive()
        if headers.get("connection") == "close":
            self.close()
        return status, json.loads(content)

    def _receive(self) -> bytes:
        assert self._socket is not None
        read: bytes = self._socket.recv(65536)
        if not read:
            raise ConnectionResetError("closed before the answer")
        return read


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip().lower() for name, value in pairs}

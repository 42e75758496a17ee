"""gunicorn with one of these applications, as a child process, on a free port if it is not told where."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[1]
# Long enough for a machine that is busy with something else.
STOP_TIMEOUT = 60.0


def command(configuration: Path, *arguments: str) -> list[str]:
    """The command that starts gunicorn with the application of this configuration."""
    return [sys.executable, "-m", "gunicorn", "--config", str(configuration), *arguments]


class Server:
    """A running gunicorn, which prints where it listens; leaving its `with` ends it.

    On a Unix socket, its host is the path and its port 0.
    """

    def __init__(
        self,
        configuration: Path,
        environment: Mapping[str, str],
        arguments: Sequence[str] = (),
        log: Path | None = None,
        bind: str = "127.0.0.1:0",
    ) -> None:
        self._log = log.open("ab") if log else None
        level = "info" if log else "warning"
        self.process = subprocess.Popen(
            command(configuration, "--bind", bind, "--log-level", level, *arguments),
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=self._log,
            # Ctrl-C in a terminal is then the parent's alone, who ends the child in order.
            start_new_session=True,
        )
        self.host, self.port = self._address()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """End it in order, with all that it has accepted saved and answered; give its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it, its workers and whatever it has started, at once."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Wait until it has ended; one that does not end is killed."""
        try:
            return self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self._close()

    def _close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
        if self._log is not None:
            self._log.close()

    def _address(self) -> tuple[str, int]:
        """Where it listens; connections wait from then on until a worker accepts them."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        found = re.search(r"http://([\d.]+):(\d+)|unix:(\S+)/", line)
        if found is None:
            self.process.kill()
            raise RuntimeError(f"gunicorn did not start; it ended with {self.wait()}")
        return found[1] or found[3], int(found[2] or 0)

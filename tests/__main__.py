"""Runs the suite in nine processes side by side: most of it waits for servers, and a machine has two cores or more.

    python -m tests [--part NAME]... [arguments of pytest]

``--part`` runs some of the nine only, or a file of tests. What each process prints comes when it has ended, and a line
that says when that was; on a terminal, a line at the bottom says meanwhile how far all are. ``python -m pytest`` runs
the same tests one after the other.

Ctrl-C or SIGTERM ends the processes and the servers that they have started. What is kept in files is in one directory,
which is gone at the end.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from tests.support.shared import SHARED, environment

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE: Final = Path(__file__).parent

# They keep a core busy for about the same time: the contract of the stores on SQLAlchemy, and the pages; on the others,
# with what else is about those and about documents; what waits for servers to come and go; what asks databases, and
# what starts small programs; the simulation, and stores by hand; the oracle, with the last quarter of what is about
# mapped classes; what is about Django models, or forks; about mapped classes, with the simulation across keys; and what
# is in none of them.
PARTS: Final = {
    "sqlalchemy": (["docs", "forked_connections", "stores"], "sqlalchemy or not test_stores"),
    "stores": (
        ["*document*", "bulk_refusals", "commit", "django", "redis_*", "reuse", "row_keys", "stores"],
        "not (test_stores and sqlalchemy)",
    ),
    "servers": (
        [
            "benchmarks",
            "celery",
            "cluster",
            "dramatiq",
            "gunicorn",
            "huey",
            "measured_servers",
            "pywsgi",
            "uwsgi",
            "the_suite",
            "tickets_signals",
        ],
        "",
    ),
    "databases": (
        [
            "bulk_stores",
            "flask",
            "flask_session",
            "import",
            "pytest_plugin",
            "sql",
            "sqlalchemy_store",
            "stores_across",
            "tickets",
            "wallet",
        ],
        "",
    ),
    "simulation": (["simulation", "own_stores", "store_contract"], ""),
    "oracle": (["mapped_[t-z]*", "oracle", "snapshot_isolation"], ""),
    "django": (["django_*", "drivers", "ended_transactions", "fork", "signals", "testing"], ""),
    "mapped": (["anew", "isolation", "mapped_[a-s]*", "simulation_across"], ""),
}
REST: Final = "rest"

NOTHING_CHOSEN: Final = 5
"""The status of a pytest that was asked for tests which it has not."""

PATIENCE: Final = 20.0
"""Seconds that a process has to end its servers in its own way, before all are killed."""

TICK: Final = 0.1
"""Seconds between two looks at the processes."""

ON_A_TERMINAL: Final = sys.stdout.isatty()


def parts() -> dict[str, list[str]]:
    """What each process is told."""
    apart = {name: [*_paths(files), *(["-k", chosen] if chosen else [])] for name, (files, chosen) in PARTS.items()}
    taken = {path for files, _ in PARTS.values() for path in _paths(files)}
    return apart | {REST: sorted(str(path) for path in HERE.rglob("test_*.py") if str(path) not in taken)}


def _paths(names: list[str]) -> list[str]:
    return [str(path) for name in names for path in sorted(HERE.rglob(f"test_{name}.py"))]


@dataclass
class Part:
    """A process that runs some of the tests."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path
    summary: str = ""

    @classmethod
    def begun(cls, name: str, told: list[str], directory: Path) -> Part:
        output = directory / f"{name.replace('/', '-')}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *told],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # All that it makes is in there, and is known by it.
                env={SHARED: str(directory), **environment(), "TMPDIR": str(directory)},
                start_new_session=True,  # or else Ctrl-C is everybody's at once, and nobody ends in order
            )
        return cls(name, process, output)

    def percent(self) -> int:
        """How much it has done, as pytest says."""
        said = re.findall(r"\[ *(\d+)%\]", self.output.read_text(errors="replace"))
        return 100 if self.process.returncode is not None else int(said[-1]) if said else 0


class Run:
    """The parts of one call."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.begun = time.monotonic()
        self.parts: list[Part] = []
        self.stopped_by: signal.Signals | None = None

    def begin(self, name: str, told: list[str]) -> None:
        self.parts.append(Part.begun(name, told, self.directory))

    def stop(self, number: int, _: object) -> None:
        """Have `wait` end; what signals call."""
        self.stopped_by = signal.Signals(number)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def wait(self) -> None:
        """Tell of each part when it has ended, until all have, or until a signal comes."""
        running = list(self.parts)
        while running and self.stopped_by is None:
            time.sleep(TICK)
            for part in [part for part in running if part.process.poll() is not None]:
                running.remove(part)
                self._tell(part, len(self.parts) - len(running))
            if ON_A_TERMINAL:
                done = sum(part.percent() for part in self.parts) // len(self.parts)
                names = ", ".join(part.name for part in running)
                print(f"\r\033[K{self.seconds:.0f} s, {done} %; running: {names}"[:120], end="", flush=True)

    def _tell(self, part: Part, ended: int) -> None:
        output = part.output.read_text(errors="replace").strip()
        part.summary = output.rpartition("\n")[2].strip("= ")
        erase = "\r\033[K" if ON_A_TERMINAL else ""
        print(
            f"{erase}{output}\n\n{ended} of {len(self.parts)} parts after {self.seconds:.0f} s: {part.name}\n",
            flush=True,
        )

    def end(self, patience: float) -> None:
        """Leave nothing of it behind: every process ends its servers, and what is still there then is killed."""
        running = [part.process for part in self.parts if part.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGINT)
        give_up_at = time.monotonic() + patience
        while any(process.poll() is None for process in running) and time.monotonic() < give_up_at:
            time.sleep(TICK)
        while left := list(self._left()):
            for one in left:
                one.kill()
            psutil.wait_procs(left, timeout=1)  # who has lost its parent may be known for long after its end
        for process in running:
            process.wait()

    def _left(self) -> Iterator[psutil.Process]:
        """What this run has started, and what that has started."""
        for one in psutil.process_iter():
            try:
                # A server may have other words where its environment was, and works in its own directory.
                places = (one.environ().get("TMPDIR", ""), one.cwd())
            except psutil.Error:
                continue
            if any(Path(place).is_relative_to(self.directory) for place in places):
                yield one

    def status(self) -> int:
        """Say how it went, and give the worst status of all."""
        if self.stopped_by is not None:
            for part in self.parts:
                if not part.summary:
                    print(part.output.read_text(errors="replace"))
            print(f"Stopped by {self.stopped_by.name} after {self.seconds:.0f} s; all that was started has been ended")
            return 128 + self.stopped_by
        statuses = [part.process.returncode for part in self.parts]
        failed = [status for status in statuses if status not in {0, NOTHING_CHOSEN}]
        all_chose_nothing = statuses == [NOTHING_CHOSEN] * len(statuses)
        print(f"{'FAILED' if failed or all_chose_nothing else 'All passed'} in {self.seconds:.0f} s:")
        for part in self.parts:
            print(f"  {part.name}: {part.summary}")
        return max(map(abs, failed), default=NOTHING_CHOSEN if all_chose_nothing else 0)


def main(arguments: list[str], patience: float = PATIENCE) -> int:
    """Run the parts; *patience* is for those that are ended."""
    parser = argparse.ArgumentParser(prog="python -m tests", allow_abbrev=False, description="Run the tests.")
    known = parts()
    parser.add_argument("--part", action="append", help=f"a file, or one of: {', '.join(known)}; else all of them")
    chosen, others = parser.parse_known_args(arguments)
    told = {name: [*known.get(name, [name]), *others] for name in chosen.part or known}
    directory = Path(tempfile.mkdtemp(prefix="tests-"))
    directory.chmod(0o755)  # PostgreSQL runs as another user when root starts it
    try:
        run = Run(directory)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.stop)
        try:
            for name, words in told.items():
                run.begin(name, words)
            run.wait()
        finally:
            run.end(patience)
        return run.status()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

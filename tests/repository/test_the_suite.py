"""`python -m tests` says how far it is, and whatever ends it, nothing that it has started is left."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from gevent.os import make_nonblocking, nb_read

from tests.__main__ import parts
from tests.support.servers import side_by_side, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
WAITS = "tests/support/programs/waits_beside_servers.py"
PASSES = "tests/repository/test_changelog.py"


class Suite:
    """A run of the suite on a terminal."""

    def __init__(self, tells: Path, parts: list[str], *, is_deaf: bool, patience: float) -> None:
        self.shown = ""
        self._terminal, ours = pty.openpty()
        arguments = [word for part in parts for word in ("--part", part)]
        code = f"import sys; from tests.__main__ import main; sys.exit(main({arguments}, {patience}))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "TELLS": str(tells), "DEAF": "yes" if is_deaf else "no"},
            stdout=ours,
            stderr=ours,
        )
        os.close(ours)
        make_nonblocking(self._terminal)

    def watch_until(self, is_true: Callable[[], object]) -> None:
        while not is_true():
            assert self._read(), f"it has ended:\n{self.shown}"

    def stop(self, number: signal.Signals) -> int:
        """Give the status with which it ends."""
        self._process.send_signal(number)
        while self._read():
            pass
        os.close(self._terminal)
        return self._process.wait()

    def _read(self) -> bool:
        try:
            more = nb_read(self._terminal, 4096)
        except OSError:  # what Linux says of a terminal that nobody writes to any more
            return False
        self.shown += more.decode()
        return bool(more)


def is_there(pid: int) -> bool:
    """Whether it runs. Who has lost its parent may be known for a while after its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_every_file_of_tests_is_in_one_part_and_that_of_the_stores_in_two_that_choose_what_the_other_leaves() -> None:
    told = parts()
    found = Counter(word for words in told.values() for word in words if word.endswith(".py"))
    stores = str(ROOT / "tests/stores/test_stores.py")
    assert found == Counter(map(str, (ROOT / "tests").rglob("test_*.py"))) + Counter([stores])
    assert {name: words[-1] for name, words in told.items() if stores in words} == {
        "sqlalchemy": "sqlalchemy or not test_stores",
        "stores": "not (test_stores and sqlalchemy)",
    }


def test_a_run_says_how_far_it_is_and_a_signal_ends_it_with_all_that_it_has_started_obedient_or_not(
    tmp_path: Path,
) -> None:
    side_by_side(ends_all, (tmp_path / "obeys", signal.SIGINT, False), (tmp_path / "deaf", signal.SIGTERM, True))


def ends_all(tells: Path, number: signal.Signals, is_deaf: bool) -> None:
    run = Suite(tells, [WAITS] if is_deaf else [PASSES, WAITS], is_deaf=is_deaf, patience=0.2 if is_deaf else 30)
    run.watch_until(lambda: tells.exists() and f"running: {WAITS}" in run.shown)
    assert is_deaf or re.search(rf"=+ \d+ passed in .*\s+1 of 2 parts after \d+ s: {PASSES}", run.shown)
    assert re.search(r"\d+ s, (?!0 )\d+ %; running: ", run.shown) or is_deaf
    directory, started = json.loads(tells.read_text())
    assert all(map(is_there, started))
    assert run.stop(number) == 128 + number
    assert f"Stopped by {number.name} after " in run.shown
    assert ("KeyboardInterrupt" in run.shown) is not is_deaf
    wait_until(lambda: not any(map(is_there, started)))
    assert not Path(directory).exists()

"""The README's first example, in two workers at once: whatever was answered is saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.programs.page import python_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

WORKER = """
import sys, json, time
import gevent
from geventbatch import SaveFailed

def book_slowly(train, seat, passenger):  # so that the other worker comes in between
    gevent.sleep(0.002)
    return book(train, seat, passenger)

def call(number):
    seats = []
    for turn in range(20):
        wanted = f"{worker} {number} {turn}"
        try:
            seats.append(trains.run("ICE 1", book_slowly, wanted, worker))
        except SaveFailed as error:
            assert error.retry_safe
    return seats

worker = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
begun = time.time()
callers = [gevent.spawn(call, number) for number in range(10)]
answered = sum((caller.get() for caller in callers), [])
trains.stop()
print(json.dumps([begun, time.time(), answered]))
"""


def first_example() -> str:
    """The part of it that a worker runs as it starts."""
    source = python_blocks(ROOT / "README.md")[0].source
    before, call, _ = source.partition('seat = trains.run("ICE 1", book, ')
    assert call
    return before


def answers(folder: Path) -> Iterator[Any]:
    program = first_example() + WORKER
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, str(number)],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    for worker in workers:
        told, _ = worker.communicate(timeout=50)
        yield json.loads(told)


def test_the_first_example_loses_nothing_with_two_workers(tmp_path: Path) -> None:
    (begun, ended, first), (begun_too, ended_too, second) = answers(tmp_path)
    assert begun < ended_too, "they ran one after the other"
    assert begun_too < ended, "they ran one after the other"
    assert first
    assert second
    ask = "import json, sqlite3; print(*sqlite3.connect('trains.db').execute('SELECT state FROM trains').fetchone())"
    told = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(json.loads(told.stdout)) == sorted([*first, *second])

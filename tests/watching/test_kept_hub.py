"""Code that keeps the hub is told from a machine that is busy, on the real clock: by the CPU time that it had."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import gevent
import pytest

from geventbatch import Processor
from geventbatch._core.cpu import OFTEN, BySwitches, of_the_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


def ran(*way: str) -> tuple[list[str], float]:
    """What was logged of an operation that keeps the hub in this *way*, and how many seconds it took."""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.programs.keeps_hub", *way],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    *lines, last = ended.stdout.splitlines()
    return lines, float(last.removeprefix("took "))


def seconds(line: str) -> tuple[float, float]:
    """For how long it is said to have kept the hub, and its CPU time."""
    found = re.search(r"kept the hub for ([\d.]+) s without a yield: .* It had ([\d.]+) s of CPU time\. ", line)
    assert found is not None, line
    return float(found[1]), float(found[2])


def test_a_call_that_waits_in_c_is_named_with_how_little_it_has_computed() -> None:
    (line,), _ = ran("waits")
    kept, used = seconds(line)
    assert kept >= 0.3
    assert used < 0.1
    assert "it waited for what gevent has not patched" in line


def test_computing_is_named_with_its_cpu_time() -> None:
    (line,), _ = ran("computes")
    kept, used = seconds(line)
    assert kept >= used >= 0.3


def test_of_a_child_of_a_fork_the_cpu_time_is_that_of_its_own() -> None:
    (_, line), _ = ran("computes", "in a child")
    kept, used = seconds(line)
    assert kept >= used >= 0.3


def test_of_an_operation_that_took_long_only_since_it_had_no_cpu_nothing_is_said() -> None:
    lines, took = ran("has_no_cpu")
    assert took > 0.3
    assert lines == []


def test_a_process_that_was_stopped_is_said_to_have_had_no_cpu_time() -> None:
    """Nothing tells it from a wait in C but what its parent has done: the line says both."""
    (line,), took = ran("is_stopped")
    kept, used = seconds(line)
    assert kept == pytest.approx(took, abs=0.1)
    assert used < 0.1
    assert "or the process was stopped meanwhile" in line


def test_where_the_kernel_does_not_say_it_a_thread_that_has_never_given_up_its_cpu_was_ready_all_the_time() -> None:
    by_switches = BySwitches()
    found = [by_switches.add(*reading) for reading in [(0, 0, 7), (1, 0.25, 7), (3, 0.5, 8), (4, 0.5, 8)]]
    assert found == [0, 0.75, 0.75, 1.75]
    assert BySwitches().read() == 0


@contextmanager
def no_more_files() -> Iterator[None]:
    """Nothing can be opened any more."""
    gevent.sleep(0.001)  # the hub has its own files by then
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_can_open_no_more_files_answers_all_the_same() -> None:
    def operation(_: object) -> int:
        gevent.sleep(2 * OFTEN)  # so that each turn reads anew
        return 1

    with Processor(min_duration=0, max_duration=10) as processor, no_more_files():
        with pytest.raises(OSError, match=r"open files|file descriptor"):
            of_the_kernel()
        callers = [gevent.spawn(processor.run, number, operation) for number in range(3)]
        gevent.joinall(callers, timeout=10)
        assert [caller.value for caller in callers] == [1, 1, 1]

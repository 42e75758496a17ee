"""Real signals: `stop(timeout=0)` may be called wherever a signal is taken, in whichever greenlet (guarantee 8)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STOPPED = ["late is answered ProcessorStopped", "stop gives True"]


def run(*arguments: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.programs.signals", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_a_signal_in_the_hub_begins_the_stop_and_the_save_that_was_under_way_is_answered() -> None:
    assert run("in_the_hub") == [
        *["SIGTERM in the hub", "stop gives False"],
        *["saves saving a", "a is answered a"],
        *STOPPED,
    ]


def test_a_signal_in_the_hub_closes_the_windows_that_are_open_and_they_are_saved_and_answered() -> None:
    assert run("in_the_hub_with_open_windows") == [
        *["SIGTERM in the hub", "stop gives False"],
        *["saves a a1 a2", "saves b b1"],
        *["a1 is answered a1", "a2 is answered a2", "b1 is answered b1"],
        *STOPPED,
    ]


@pytest.mark.parametrize("place", ["load", "save"])
def test_a_signal_in_a_worker_inside_a_load_or_a_save_begins_the_stop_and_the_batch_ends_as_ever(place: str) -> None:
    assert run(f"in_a_{place}") == [
        *["SIGTERM in a worker", "stop gives False"],
        *["saves k a b", "a is answered a", "b is answered b"],
        *STOPPED,
    ]


def test_a_signal_in_a_worker_inside_an_operation_begins_the_stop_and_all_that_was_admitted_is_answered() -> None:
    lines = run("in_an_operation")
    assert lines[:2] == ["SIGTERM in a worker", "stop gives False"]
    assert sorted(lines[2:-2]) == [
        *["a is answered a", "b is answered b", "c is answered c"],
        *["saves k a b", "saves other c"],
    ]
    assert lines[-2:] == STOPPED


def test_a_signal_in_a_caller_begins_the_stop_and_what_was_admitted_before_is_answered() -> None:
    assert run("in_a_caller") == [
        *["SIGTERM in a caller", "stop gives False"],
        *["saves k a", "a is answered a"],
        *STOPPED,
    ]


def test_a_signal_that_stops_in_the_middle_of_run_has_that_operation_refused() -> None:
    lines = run("while_an_operation_is_being_admitted")
    assert lines[:2] == ["SIGTERM in a caller", "stop gives False"]
    assert sorted(lines[2:-2]) == ["a is answered a", "b is answered ProcessorStopped", "saves other a"]
    assert lines[-2:] == STOPPED


@pytest.mark.parametrize("seconds", ["0.01", "0.02", "0.03", "0.05"])
def test_a_signal_at_any_instruction_of_a_busy_processor_leaves_nobody_unanswered(seconds: str) -> None:
    assert run("at_any_instruction", seconds) == ["stop gives True", "all that was answered was saved"]

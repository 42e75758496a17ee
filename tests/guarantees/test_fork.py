"""A processor made before a fork works in every child, and the parent's batches stay the parent's (guarantee 12)."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import gevent
import pytest

from geventbatch import Processor

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch.testing import VirtualTime

ROOT = Path(__file__).parents[2]
Run: TypeAlias = "Callable[[str], tuple[list[str], list[str]]]"
PROGRAM = "tests.support.programs.fork"


def batch(key: str, *values: str) -> list[str]:
    """What is noted of a batch that is saved."""
    return [f"loads {key}", *(f"applies {value}" for value in values), " ".join(["saves", key, *values])]


def answers(*values: str) -> list[str]:
    return [f"answers {value} with {value}" for value in values]


LIVE = [*batch("k", "own1"), *answers("own1"), *batch("k", "own2"), *answers("own2"), "stops True", "ends"]
"""What a child does: two batches of its own, on the key that the parent's operations are on, and a stop."""

LAST = [*batch("k", "last"), *answers("last"), "stops True"]
"""What the parent does when the child has ended and everything else is answered."""


def ran(program: str, way: str = "by Python") -> tuple[list[str], list[str]]:
    """What the parent and the child did in one of the functions of the program."""
    ended = subprocess.run(
        [sys.executable, "-m", PROGRAM, program, way],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = [line.strip().split(" ", 1) for line in ended.stdout.splitlines()]
    parent, child = ([words for who, words in lines if who == one] for one in ("parent", "child"))
    parent = [line for line in parent if line != "goes on"]
    return parent, child


@pytest.fixture(params=["by Python", "in C"])
def run(request: pytest.FixtureRequest) -> Run:
    """`ran`, with both ways to fork: servers that are written in C call none of Python's callbacks."""
    return partial(ran, way=request.param)


def test_a_processor_made_before_a_fork_works_in_the_child_and_in_a_child_of_that_and_in_the_parent(run: Run) -> None:
    parent, child = run("before_any_run")
    assert child == [*LIVE[:-1], "is a grandchild", "ends", "ends"]
    assert parent == LAST


def test_a_processor_that_has_run_works_in_children_of_children_too_and_a_stop_there_stops_only_those(run: Run) -> None:
    parent, child = run("in_children_of_children")
    assert child == [
        *[*batch("k", "own0"), *answers("own0")],
        *LIVE,
        *[*batch("k", "own3"), *answers("own3"), "ends"],
    ]
    assert parent == [*batch("k", "first"), *answers("first"), *LAST]


def test_a_fork_while_a_save_waits_runs_no_batch_behind_it_in_the_child_and_answers_nobody_there(run: Run) -> None:
    parent, child = run("while_a_save_waits")
    child = [line for line in child if not line.startswith("begins to save")]
    assert child == ["saves k u v", *LIVE]  # user code that was waiting itself is all that goes on
    parent = [line for line in parent if not line.startswith("begins to save")]
    before, last = parent[: -len(LAST)], parent[-len(LAST) :]
    assert last == LAST
    # Callers are woken beside the next batch: nothing says which of them is quicker.
    answered = [line for line in before if line.startswith("answers")]
    assert answered == answers("u", "v", "c", "d")
    assert [line for line in before if line not in answered] == [*batch("k", "u", "v"), *batch("k", "c", "d")]


def test_a_fork_while_a_load_waits_begins_no_operation_in_the_child(run: Run) -> None:
    parent, child = run("while_a_load_waits")
    assert child == ["loads k", *LIVE]
    assert parent == [*batch("k", "a", "b"), *answers("a", "b"), *LAST]


def test_a_fork_while_a_load_waits_with_batching_off_begins_no_operation_in_the_child(run: Run) -> None:
    parent, child = run("while_a_load_waits_with_batching_off")
    assert child == ["loads k", "loads k", *LIVE]
    assert parent == [*batch("k", "a"), *answers("a"), *batch("k", "b"), *answers("b"), *LAST]


def test_a_fork_inside_an_operation_begins_none_after_it_in_the_child_and_saves_nothing_there() -> None:
    parent, child = ran("inside_an_operation")
    assert child == LIVE
    assert sorted(parent) == sorted(
        [
            *batch("k", "a", "b", "c"),
            *answers("a", "b", "c"),
            "answers fork",
            *LAST,
        ]
    )


@pytest.mark.parametrize("program", ["before_any_run", "with_a_batch_in_the_queue"])
def test_where_the_kernel_wipes_no_memory_in_a_child_a_fork_in_c_is_noticed_by_the_process_number(program: str) -> None:
    _, child = ran(program, "in C, without wiped memory")
    assert [line for line in child if not line.endswith("grandchild")][: len(LIVE)] == LIVE


def test_a_fork_in_c_inside_an_operation_saves_nothing_in_the_child() -> None:
    parent, child = ran("inside_an_operation", "in C")
    applied = {"applies b", "applies c"}  # in memory
    assert [line for line in child if line not in applied] == LIVE
    assert parent[-len(LAST) :] == LAST


def test_a_child_may_run_operations_of_its_own_inside_the_operation_that_forked(run: Run) -> None:
    parent, child = run("inside_an_operation_that_the_child_does_not_leave")
    assert child == LIVE
    assert parent == [*batch("k", "a"), *answers("a"), *LAST]


def test_a_fork_while_callers_are_being_answered_answers_none_of_the_others_in_the_child() -> None:
    parent, child = ran("while_callers_are_being_answered")
    own = [*answers("own1"), *answers("own2")]
    assert [line for line in child if line.startswith("answers")] == ["answers 0", *own]
    assert [line for line in parent if line.startswith("answers")] == [
        *(f"answers {number}" for number in range(100)),
        *answers("last"),
    ]


def test_a_batch_that_was_in_the_queue_at_the_fork_is_run_by_the_parent_only(run: Run) -> None:
    parent, child = run("with_a_batch_in_the_queue")
    assert child == LIVE
    assert parent == [*batch("k", "a"), *answers("a"), *LAST]


def test_a_batch_that_an_idle_worker_was_woken_for_at_the_fork_is_run_by_the_parent_only(run: Run) -> None:
    parent, child = run("with_a_batch_in_the_queue_of_an_idle_worker")
    assert child == LIVE
    assert sorted(parent) == sorted(
        [
            *[*batch("k", "first"), *answers("first")],
            *[*batch("k", "a"), *batch("other", "b"), *answers("a", "b")],
            *LAST,
        ]
    )


def test_a_batch_that_waited_for_its_turn_at_the_fork_is_run_by_the_parent_only(run: Run) -> None:
    parent, child = run("with_a_batch_that_waits_for_its_turn")
    assert child == ["saves first first", *LIVE]
    keys = ("first", "second", "third")
    assert sorted(parent) == sorted([line for key in keys for line in batch(key, key) + answers(key)] + LAST)


def test_a_batch_whose_turn_had_come_at_the_fork_is_run_by_the_parent_only() -> None:
    parent, child = ran("with_a_batch_whose_turn_has_come")
    assert child == ["answers first", *LIVE]
    keys = ("second", "third")
    assert sorted(parent) == sorted(
        [*batch("first", "first"), "answers first"]
        + [line for key in keys for line in batch(key, key) + answers(key)]
        + LAST
    )


def test_a_window_that_was_open_at_the_fork_ends_in_the_parent_only(run: Run) -> None:
    parent, child = run("with_an_open_window")
    assert child == LIVE
    assert parent == [*batch("k", "a", "b"), *answers("a", "b"), *LAST]


def test_a_replay_that_was_due_at_the_fork_is_done_in_the_parent_only(run: Run) -> None:
    parent, child = run("during_a_backoff")
    assert child == LIVE
    attempt = ["loads k", "applies a"]
    assert parent == [*attempt, "conflicts", *attempt, "conflicts", *attempt, "saves k a", *answers("a"), *LAST]


def test_a_deadline_and_a_start_timeout_that_were_running_at_the_fork_are_the_parents_only(run: Run) -> None:
    parent, child = run("before_timeouts")
    assert child == LIVE  # nothing was interrupted there
    assert sorted(parent[:3]) == ["answers a with BatchTimeout", "answers b with OperationCancelled", "cleans up"]
    assert parent[3:] == LAST


def test_a_subscription_made_before_a_fork_gives_each_process_its_own_metrics(run: Run) -> None:
    parent, child = run("with_a_subscription")
    reads = ["reads k", "reads k", "has read all"]
    assert [line for line in child if "read" in line] == reads
    assert [line for line in child if "read" not in line] == LIVE
    assert [line for line in parent if "read" in line.split()[0] or line.startswith("has")] == [
        "reads unread",
        "reads k",
        "has read all",
    ]


def test_a_greenlet_that_was_waiting_for_metrics_at_the_fork_gets_none_of_the_childs(run: Run) -> None:
    parent, child = run("with_a_subscription_that_a_greenlet_waits_for")
    assert child == LIVE
    assert [line for line in parent if line.startswith(("reads", "has"))] == ["reads k", "has read all"]


def test_a_processor_that_was_stopped_before_the_fork_is_stopped_in_the_child(run: Run) -> None:
    parent, child = run("after_a_stop")
    assert child == ["answers own with ProcessorStopped", "stops True", "ends"]
    assert parent == [*batch("k", "a"), *answers("a"), "stops True"]


def test_stop_in_a_child_waits_for_the_childs_own_and_for_nothing_of_the_parents(run: Run) -> None:
    parent, child = run("stop_waits_for_the_childs_own")
    assert child == [
        *["loads k", "applies own", "stops False", "stops False"],
        *["saves k own", "answers own with own", "stops True", "answered: True", "ends"],
    ]
    assert parent == [*batch("k", "a"), *answers("a"), *LAST]


def test_making_a_processor_starts_no_greenlet_and_no_timer(clock: VirtualTime) -> None:
    events: list[str] = []
    gevent.get_hub().loop.run_callback(events.append, "a turn of the hub")
    Processor()
    Processor(open_resource=open, min_duration=1, max_duration=2, max_batches=1, max_batch_size=1, max_pending=1)
    Processor(batching=False)
    assert events == []
    assert clock.timers == 0
    clock.settle()


def test_making_a_processor_does_not_even_make_the_hub() -> None:
    program = (
        "from gevent._hub_local import get_hub_if_exists as hub; from geventbatch import Processor;"
        "one = Processor(max_batches=3, max_pending=3, min_duration=0.1); other = Processor(batching=False);"
        "print(hub(), repr(one), repr(other), hub())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert output.startswith("None ")
    assert output.endswith(" None\n")


def test_where_others_switch_within_the_fork_the_parents_batches_are_not_run_in_the_child() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.programs.fork_that_switches"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ended.stdout, ended.stderr) == ("parent\n", "")


@pytest.mark.parametrize("form", ["many", "one key too"])
def test_a_fork_while_operations_across_keys_wait_runs_and_answers_none_of_them_in_the_child(form: str) -> None:
    program = [sys.executable, "-W", "ignore", "-m", "tests.support.programs.fork_across", form]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = [line.split(" ", 1) for line in ended.stdout.splitlines()]
    parent, child = ([words for who, words in lines if who == one] for one in ("parent", "child"))
    assert child == ["saves a b c", "answers 4", "stops True 0", "ends"]
    assert [line for line in parent if line.startswith("answers")] == ["answers 1", "answers 2", "answers 3"]
    assert [line for line in parent if not line.startswith("answers")] == [
        *["saves a b", "saves a b c"],
        "stops True {'a': [1, 3], 'b': [1, 2], 'c': [2, 3]}",
    ]


WITH_THE_SAME_NUMBER = """
import os
parent = os.getpid()
os.getpid = lambda: parent  # as the child has it too if both are the first process of a namespace
import gevent
from geventbatch import Processor
def save(key, resource): print("the child" if child == 0 else "the parent", "saves", key, flush=True)
processor = Processor(load_resource=lambda _: [], save_resource=save, min_duration=0)
child = None
callers = [gevent.spawn(processor.run, "k", list.append, 1)]
gevent.sleep(0)  # its batch is there, and no worker yet
child = os.fork()
if child == 0:
    processor.run("own", list.append, 1)
    os._exit(0)
os.waitpid(child, 0)
gevent.joinall(callers)
"""


def test_a_child_that_has_the_number_of_its_parent_runs_nothing_of_the_parents() -> None:
    program = [sys.executable, "-W", "ignore", "-c", WITH_THE_SAME_NUMBER]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert (ended.stdout, ended.stderr) == ("the child saves own\nthe parent saves k\n", "")

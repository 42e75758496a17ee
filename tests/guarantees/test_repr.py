"""`repr` of a processor and of a batch: the state, on one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gevent
import pytest

from geventbatch import Batch, Conflict, Processor, current_batch
from tests.support.callers import answer_of

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime


def test_a_processor_says_on_one_line_whether_it_runs_and_what_it_has(clock: VirtualTime) -> None:
    processor = Processor(load_resource=lambda key: gevent.sleep(1), min_duration=0, max_duration=5)
    assert repr(processor) == "<Processor: running, 0 keys, 0 batches, 0 operations pending, 0 workers>"
    callers = [gevent.spawn(processor.run, key, lambda resource: None) for key in "aab"]
    clock.advance(0.5)
    assert repr(processor) == "<Processor: running, 2 keys, 2 batches, 3 operations pending, 2 workers>"
    processor.stop(timeout=0)
    assert repr(processor) == "<Processor: stopping, 2 keys, 2 batches, 3 operations pending, 2 workers>"
    gevent.joinall(callers)
    processor.stop()
    assert repr(processor) == "<Processor: stopped, 0 keys, 0 batches, 0 operations pending, 0 workers>"


def test_a_processor_says_that_batching_is_off_and_counts_what_runs_alone(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(batching=False, max_duration=5)
    callers = [gevent.spawn(processor.run, "k", lambda resource: gevent.sleep(1)) for _ in range(2)]
    clock.settle()
    assert repr(processor) == ("<Processor: running, 0 keys, 2 batches, 2 operations pending, 0 workers, batching off>")
    gevent.joinall(callers)
    assert "0 batches, 0 operations pending" in repr(processor)


def test_a_batch_says_on_one_line_its_key_where_it_is_and_what_it_has(clock: VirtualTime) -> None:
    seen: list[str] = []
    conflicts = [Conflict()]

    def note(*args: object) -> None:
        seen.append(repr(current_batch()))

    def save(key: str, resource: None) -> None:
        note()
        if conflicts:
            raise conflicts.pop()
        batches.append(current_batch())

    batches: list[Batch] = []
    with Processor(load_resource=note, save_resource=save, min_duration=1, max_duration=5) as processor:
        callers = [gevent.spawn(processor.run, "ICE 1", note) for _ in range(2)]
        gevent.joinall(callers)
    assert seen[:4] == [
        "<Batch 'ICE 1': load, open, 2 operations, 2 waiting, attempt 1, 5.000 s left>",
        "<Batch 'ICE 1': operations, open, 2 operations, 2 waiting, attempt 1, 5.000 s left>",
        "<Batch 'ICE 1': operations, open, 2 operations, 2 waiting, attempt 1, 5.000 s left>",
        "<Batch 'ICE 1': save, 2 operations, 2 waiting, attempt 1, 4.000 s left>",
    ]
    assert seen[4].startswith("<Batch 'ICE 1': load, 2 operations, 2 waiting, attempt 2, ")
    assert repr(batches[0]) == "<Batch 'ICE 1': ended, 2 operations, 0 waiting, attempt 2>"


@pytest.mark.parametrize("key", ["two\nlines", ("a\n", b"\n"), "\r\x0b\u2028"])
def test_a_key_with_a_line_break_breaks_no_line(clock: VirtualTime, key: str) -> None:
    seen: list[str] = []
    with Processor(min_duration=0) as processor:
        processor.run(key, lambda resource: seen.append(repr(current_batch())))
        error = answer_of(processor.run, key, lambda resource: gevent.sleep(100))
    assert len(seen[0].splitlines()) == 1
    assert len(str(error).splitlines()) == 1


def test_a_repr_changes_nothing(clock: VirtualTime) -> None:
    processor: Processor[None] = Processor(min_duration=1, max_duration=2)
    caller = gevent.spawn(processor.run, "k", lambda resource: 1)
    clock.settle()
    first, second = repr(processor), repr(processor)
    assert first == second
    assert caller.get() == 1
    assert clock.now() == 1
    processor.stop()

"""The parts of a batch that are saved one after the other, where one save for all is not to be had.

Most batches have one part, and know nothing of this. Two things make more of them. A save that is refused (`Rejected`)
because of what some operation made: the batch is halved until the culprits stand alone, and everybody else is saved.
And an operation that deletes the resource: those behind it need what the next load gives. The order of the operations
stays as it was. A part that was saved is settled: nothing that befalls the rest changes its answers (guarantee 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch._failure import rejected, save_failed
from geventbatch._operation import BROKEN, SETTLED, STARTED

if TYPE_CHECKING:
    from geventbatch._batch import Batch
    from geventbatch._operation import Operation
    from geventbatch.errors import Rejected


def current_part(batch: Batch) -> list[Operation[Any]]:
    """Give the operations that the attempt at hand is for."""
    return batch.parts[-1] if batch.parts else batch.operations


def is_left(batch: Batch) -> bool:
    """Whether something of the part at hand may still be applied."""
    return any(operation.state <= STARTED for operation in current_part(batch))


def settle(batch: Batch) -> bool:
    """Go on behind the part at hand, which has its outcome: True for another attempt, else the batch has ended."""
    if not batch.parts:
        batch.end()
        return False
    for operation in batch.parts.pop():
        if operation.state in {STARTED, BROKEN}:
            operation.state = SETTLED
    while batch.parts:
        if is_left(batch):
            batch.phase = "load"
            return True
        batch.parts.pop()  # all have left
    batch.end()
    return False


def cut_after(batch: Batch, last: Operation[Any]) -> None:
    """Leave the operations behind *last* to a part of their own."""
    batch.close()
    part = current_part(batch)
    behind = part.index(last) + 1
    if behind < len(part):
        batch.parts = [*batch.parts[:-1], part[behind:], part[:behind]]


def cut_before(batch: Batch, first: Operation[Any]) -> bool:
    """Leave *first*, and what is behind it, to a part of their own. False when nobody before it has returned."""
    part = current_part(batch)
    behind = part.index(first)
    if not any(operation.state == STARTED and operation.error is None for operation in part[:behind]):
        return False
    batch.close()
    batch.parts = [*batch.parts[:-1], part[behind:], part[:behind]]
    return True


def split(batch: Batch, error: Rejected) -> bool:
    """Halve the part at hand, which the store refused with *error*; True for another attempt, else the batch has ended.

    An operation that is refused alone is the culprit. It is out, with what the store said. One culprit among a thousand
    takes ten refused saves; after the second one the attempts go step by step, where the scope can (see `_steps`).
    """
    batch.rejections += 1
    batch.stepwise = batch.stepwise or batch.rejections > 1
    part = current_part(batch)
    started = [operation for operation in part if operation.state == STARTED]
    # Where all have raised, what is refused is the record of an outcome.
    suspects = [operation for operation in started if operation.error is None] or started
    if not suspects:
        batch.end(save_failed(batch.key, error))
        return False
    if len(suspects) == 1:
        suspects[0].error = rejected(error)
        suspects[0].state = SETTLED
        apply_again(batch, suspects[0])
        if not is_left(batch):
            return settle(batch)
    else:
        half = part.index(suspects[len(suspects) // 2])
        batch.parts = [*batch.parts[:-1], part[half:], part[:half]]
    batch.phase = "load"
    return True


def apply_again(batch: Batch, culprit: Operation[Any] | None = None) -> None:
    """Have those behind *culprit* (or all) that were thrown out applied once more.

    What they raised may have come of what it had changed, and that is not saved.
    """
    behind = 0 if culprit is None else batch.operations.index(culprit) + 1
    for operation in batch.operations[behind:]:
        if operation.state == BROKEN:
            operation.state = STARTED

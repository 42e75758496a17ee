"""The parts of a batch that are saved one after the other, where one save for all is not to be had.

Most batches have one part, and know nothing of this. Two things make more of them. A save that is refused (`Rejected`)
because of what some operation made: the batch is halved until the culprits stand alone, and everybody else is saved.
And an operation that deletes the resource: those behind it need what the next load gives. The order of the operations
stays as it was. A part that was saved is settled: nothing that befalls the rest changes its answers (guarantee 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch._core.operation import BROKEN, SETTLED, STARTED
from geventbatch._failure import rejected, save_failed

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation
    from geventbatch.errors import Rejected


def current_part(attempt: Attempt) -> list[Operation[Any]]:
    """Give the operations that the attempt at hand is for."""
    return attempt.parts[-1] if attempt.parts else attempt.batch.operations


def is_left(attempt: Attempt) -> bool:
    """Whether something of the part at hand may still be applied."""
    return any(operation.state <= STARTED for operation in current_part(attempt))


def settle(attempt: Attempt) -> bool:
    """Go on behind the part at hand, which has its outcome: True for another attempt, else the batch has ended."""
    if not attempt.parts:
        attempt.batch.end()
        return False
    for operation in attempt.parts.pop():
        if operation.state in {STARTED, BROKEN}:
            operation.state = SETTLED
    while attempt.parts:
        if is_left(attempt):
            attempt.phase = "load"
            return True
        attempt.parts.pop()  # all have left
    attempt.batch.end()
    return False


def cut_after(attempt: Attempt, last: Operation[Any]) -> None:
    """Leave the operations behind *last* to a part of their own."""
    attempt.batch.close()
    part = current_part(attempt)
    behind = part.index(last) + 1
    if behind < len(part):
        attempt.parts[-1:] = [part[behind:], part[:behind]]


def cut_before(attempt: Attempt, first: Operation[Any]) -> bool:
    """Leave *first*, and what is behind it, to a part of their own. False when nobody before it has returned."""
    part = current_part(attempt)
    behind = part.index(first)
    if not any(operation.state == STARTED and operation.error is None for operation in part[:behind]):
        return False
    attempt.batch.close()
    attempt.parts[-1:] = [part[behind:], part[:behind]]
    return True


def split(attempt: Attempt, error: Rejected) -> bool:
    """Halve the part at hand, which the store refused with *error*; True for another attempt, else the batch has ended.

    An operation that is refused alone is the culprit. It is out, with what the store said. One culprit among a thousand
    takes ten refused saves; after the second one the attempts go step by step, where the scope can (see `steps`).
    """
    attempt.rejections += 1
    attempt.stepwise = attempt.stepwise or attempt.rejections > 1
    part = current_part(attempt)
    started = [operation for operation in part if operation.state == STARTED]
    # Where all have raised, what is refused is the record of an outcome.
    suspects = [operation for operation in started if operation.error is None] or started
    if not suspects:
        attempt.batch.end(save_failed(attempt.batch.key, error))
        return False
    if len(suspects) == 1:
        suspects[0].error = rejected(error)
        suspects[0].state = SETTLED
        readmit(attempt, suspects[0])
        if not is_left(attempt):
            return settle(attempt)
    else:
        half = part.index(suspects[len(suspects) // 2])
        attempt.parts[-1:] = [part[half:], part[:half]]
    attempt.phase = "load"
    return True


def readmit(attempt: Attempt, culprit: Operation[Any] | None = None) -> None:
    """Have those behind *culprit* (or all) that were thrown out applied once more.

    What they raised may have come of what it had changed, and that is not saved.
    """
    behind = 0 if culprit is None else attempt.batch.operations.index(culprit) + 1
    for operation in attempt.batch.operations[behind:]:
        if operation.state == BROKEN:
            operation.state = STARTED

"""The parts of a batch, which are saved one after the other where one save for all is impossible.

Most batches have one part. Two events make more. If a save is refused (`Rejected`) because of some operation, the batch
is halved until the culprits stand alone, and all others are saved. If an operation deletes the resource, the operations
behind it need another load. The order of the operations stays the same. A part that was saved is settled: whatever
happens to the rest, its answers stay (guarantee 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from geventbatch._core.operation import BROKEN, SETTLED, STARTED
from geventbatch._failure import rejected, save_failed
from geventbatch._watch import log

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation
    from geventbatch.errors import Rejected


def current_part(attempt: Attempt) -> list[Operation[Any]]:
    """Return the operations that the attempt at hand is for."""
    return attempt.parts[-1] if attempt.parts else attempt.batch.operations


def is_left(attempt: Attempt) -> bool:
    """Return whether an operation of the part at hand may still be applied, or its error is still to be recorded."""
    if any(operation.state <= STARTED for operation in current_part(attempt)):
        return True
    return attempt.undo is not None and attempt.undo.owes(attempt)


def settle(attempt: Attempt) -> bool:
    """Settle the part at hand, which has its outcome. Return True for another attempt, else the batch has ended."""
    attempt.committed = False  # the next part is not
    if not attempt.parts:
        attempt.batch.end()
        return False
    for operation in attempt.parts.pop():
        if operation.state in {STARTED, BROKEN}:
            operation.state = SETTLED
    while attempt.parts:
        if is_left(attempt):
            attempt.phase = "operations"  # no load has begun: the batches behind are not to fail with this one
            return True
        attempt.parts.pop()  # all its callers have left
    attempt.batch.end()
    return False


def cut_after(attempt: Attempt, last: Operation[Any]) -> None:
    """Split off the operations behind *last* into a part of their own."""
    attempt.batch.close()
    part = current_part(attempt)
    behind = part.index(last) + 1
    if behind < len(part):
        _divide(attempt, part, behind)


def cut_before(attempt: Attempt, first: Operation[Any]) -> bool:
    """Split off *first* and the operations behind it into a part of their own. Return False if none before returned."""
    part = current_part(attempt)
    behind = part.index(first)
    if not any(operation.state == STARTED and operation.error is None for operation in part[:behind]):
        return False
    attempt.batch.close()
    _divide(attempt, part, behind)
    return True


def _divide(attempt: Attempt, part: list[Operation[Any]], place: int) -> None:
    """Divide *part*, the one at hand, at *place*: its beginning is the part at hand from now on."""
    attempt.parts = [*(attempt.parts or ())[:-1], part[place:], part[:place]]


def split(attempt: Attempt, error: Rejected) -> bool:
    """Halve the part at hand, which the store refused with *error*. Return True for another attempt, else it has ended.

    An operation that is refused alone is the culprit. It gets the store's error, and is out. To find one culprit among
    a thousand takes ten refused saves. After the second refusal, the attempts go step by step, where the scope can (see
    `steps`).
    """
    attempt.rejections += 1
    attempt.stepwise = attempt.stepwise or attempt.rejections > 1
    part = current_part(attempt)
    started = [operation for operation in part if operation.state == STARTED]
    # If all have raised, the store has refused the record of an outcome.
    suspects = [operation for operation in started if operation.error is None] or started
    if not suspects:
        attempt.batch.end(save_failed(attempt.batch.key, error))
        return False
    if len(suspects) == 1:
        suspects[0].error = culprit = rejected(error)
        log.refused(attempt.batch, error, culprit)
        suspects[0].state = SETTLED
        readmit(attempt, suspects[0])
        if not is_left(attempt):
            return settle(attempt)
    else:
        half = part.index(suspects[len(suspects) // 2])
        _divide(attempt, part, half)
    attempt.phase = "operations"  # as above
    return True


def readmit(attempt: Attempt, culprit: Operation[Any] | None = None) -> None:
    """Let the broken operations behind *culprit* (by default, all) be applied once more.

    Their errors may have come from changes of *culprit*, which are not saved.
    """
    behind = 0 if culprit is None else attempt.batch.operations.index(culprit) + 1
    for operation in attempt.batch.operations[behind:]:
        if operation.state == BROKEN:
            operation.state = STARTED

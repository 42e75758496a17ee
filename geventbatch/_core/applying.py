"""Applies the operations of an attempt in the order they came, and those that arrive while the window is open."""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING, Any, Final

from geventbatch._core.batch_turns import see_to_window, take_turns
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import current_part, readmit
from geventbatch._core.operation import BROKEN, STARTED
from geventbatch._core.process import here
from geventbatch._core.steps import begin_steps
from geventbatch._core.undo import raised
from geventbatch._core.verdict import can_begin_steps, look
from geventbatch._values.answers import PLAIN, own_answer

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation

_PLAIN: Final = PLAIN

_APPLIED: Final = frozenset({STARTED, BROKEN})

_run_in: Final = Context.run  # without a bound method for each operation


def has_news(attempt: Attempt) -> bool:
    """Return whether there is something to save."""
    reads = attempt.batch.reads
    if reads and attempt.completed and not (attempt.deleted or attempt.rows_added or attempt.outcomes):
        returned = (one for one in current_part(attempt) if one.state in _APPLIED and one.error is None)
        return not all(one.read_only for one in returned)
    return bool(attempt.completed or attempt.outcomes)


def apply(attempt: Attempt, resource: Any, slice_end: float) -> None:
    """Apply the operations in order, and those that arrive while the window is open."""
    if attempt.batch.attempts > 1 and not _prepare(attempt, resource):
        return
    if attempt.parts:
        _apply_all(attempt, attempt.parts[-1], resource, slice_end)
        return
    batch = attempt.batch
    applied = 0
    arrived = batch.operations  # while they are applied, this list grows
    due = slice_end
    if attempt.now >= batch.window_end:
        if batch.open:
            batch.shut(attempt.now)
    else:
        due = see_to_window(attempt, slice_end)
    while _apply_all(attempt, arrived, resource, due):
        applied += len(arrived)
        if applied == len(batch.operations):
            if not batch.open:
                return
            batch.wait_for_operations()
            if attempt.over():
                return
            attempt.now = _clock.monotonic()
            attempt.turn = here.hub.loop.iteration
            due = see_to_window(attempt, slice_end)
        arrived = batch.operations[applied:]


def _prepare(attempt: Attempt, resource: Any) -> bool:
    """Prepare another attempt by the experience of the earlier ones. Return False if the attempt ends here."""
    if attempt.undo is not None:
        attempt.undo.begin(attempt, resource)
    if attempt.stepwise and can_begin_steps(attempt):
        readmit(attempt)  # from now on each operation is judged by itself
    if attempt.asked:
        attempt.dispatcher.options.idempotency.ask(attempt)
    if attempt.over() or attempt.verdict is not None:
        return False
    if attempt.undo is not None and attempt.undo.out:
        attempt.undo.record_out(attempt)
    return not attempt.stepwise or begin_steps(attempt, resource)


def _apply_all(  # noqa: C901, PLR0912 - the hot path stays in one piece
    attempt: Attempt, operations: list[Operation[Any]], resource: Any, due: float
) -> bool:
    """Apply each of *operations* once; from *due* on read the clock. Return False if the attempt ends here."""
    monotonic, plain, epoch = _clock.monotonic, _PLAIN, attempt.dispatcher.epoch
    if attempt.steps is not None:
        if not attempt.steps.look_for(attempt, operations):
            return False
        resource = attempt.steps.resource
    elif attempt.undo is not None:
        resource = attempt.undo.resource
    for operation in operations:
        if operation.state > STARTED:
            continue
        operation.state = STARTED
        try:
            value = _run_in(operation.context.copy(), operation.callable, resource, *operation.args)
            operation.value = value if type(value) in plain else own_answer(attempt, operation, resource, value)
        except BaseException as error:
            if raised(attempt, operation, error, resource, due):
                return False
            if attempt.undo is not None:
                resource = attempt.undo.resource
        else:
            operation.error = None
            attempt.completed += 1
        if attempt.must_look or epoch != here.epoch:
            if look(attempt, operation):
                attempt.now = _clock.monotonic()
                return False
            if attempt.steps is not None:
                resource = attempt.steps.resource
        now = monotonic()
        if now < due:
            attempt.now = now
        else:
            due = take_turns(attempt, operation, now)
            if attempt.over():
                return False
    return True

"""An attempt that is judged step by step: the changes of each operation are written before the next one is applied.

Each step costs a round trip, so steps are for a batch with several operations that the store refuses. Such an operation
costs no load and no other save: the scope goes back to the state before it, in the database and in memory. Nothing is
committed before the end of the attempt. So if it ends early, nothing was saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent

from geventbatch._core.batch_turns import took
from geventbatch._core.clock import clock as _clock
from geventbatch._core.operation import SETTLED
from geventbatch._core.process import here
from geventbatch._core.verdict import can_begin_steps, ends_greenlet, is_a, without_our_frame
from geventbatch._failure import not_saved, rejected, save_failed
from geventbatch._watch import log
from geventbatch.errors import Conflict, Rejected

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation


def begin_steps(attempt: Attempt, resource: Any) -> bool:
    """Go step by step in the attempt at hand, if its scope can. Return False if the attempt ends here."""
    if not can_begin_steps(attempt):
        return True
    attempt.steps = Steps(attempt.scope, resource)
    attempt.must_look = True
    return attempt.steps.begin(attempt)


class Steps:
    """Judges the operations of one attempt."""

    def __init__(self, scope: Any, resource: Any) -> None:
        """Judge by *scope*, which has loaded *resource*."""
        self._scope = scope
        # -- mutable state ---------------------------------------------------------------------------------
        self.resource: Any = resource
        self._recorded = 0  # outcomes of idempotency keys after the last step

    def begin(self, attempt: Attempt) -> bool:
        """Prepare the scope to go back to the loaded state. Return False if the attempt ends here."""
        return self._do(attempt, self._scope.begin_steps) is None and not attempt.over()

    def look_for(self, attempt: Attempt, operations: list[Operation[Any]]) -> bool:
        """Ask the store for the idempotency keys of *operations*, since a refused one is in no save.

        Return False if the attempt ends here.
        """
        idempotency = attempt.dispatcher.options.idempotency
        return idempotency is None or bool(idempotency.look_for(attempt, operations))

    def keep(self, attempt: Attempt, operation: Operation[Any]) -> bool:
        """Write the changes of *operation*, or refuse it. Return False if the attempt ends here. Switches: yes."""
        begun = _clock.monotonic()
        took(attempt, "operation", begun - attempt.now, operation)
        refused = self._do(attempt, self._scope.keep)
        if refused is not None:
            return isinstance(refused, Rejected) and self.refuse(attempt, operation, refused)
        self._recorded = len(attempt.outcomes or ())
        return not attempt.over()

    def refuse(self, attempt: Attempt, operation: Operation[Any], refused: Rejected) -> bool:
        """Undo *operation*, which the store *refused* after it returned. Return False if the attempt ends here."""
        attempt.completed -= 1
        attempt.forget_operation()
        while attempt.outcomes and len(attempt.outcomes) > self._recorded:
            attempt.outcomes.popitem()
        operation.value = None
        operation.error = error = rejected(refused)
        log.refused(attempt.batch, refused, error)
        return self.undo(attempt, operation)

    def undo(self, attempt: Attempt, operation: Operation[Any]) -> bool:
        """Go back to the state before *operation*, which has its error. Switches: yes.

        Return False if the attempt ends here.

        If the scope cannot (the operation has ended the transaction, say), the rest of the batch is replayed without
        the operation.
        """
        attempt.doubted = False
        failed = self._do(attempt, self._undo, ends=False)
        if failed is None:
            self._recorded = len(attempt.outcomes or ())
            return not attempt.over()
        if not isinstance(failed, Conflict):
            operation.state = SETTLED
            attempt.broken = failed
        return False

    def _undo(self) -> None:
        self.resource = self._scope.undo()

    def _do(self, attempt: Attempt, function: Any, *, ends: bool = True) -> BaseException | None:
        """Call *function* of the scope, and return its error, if it raised.

        A `Conflict` becomes the verdict on the attempt. Any other error, but a `Rejected`, ends the batch, if *ends*.
        """
        begun = _clock.monotonic()
        raised: BaseException | None = None
        try:
            attempt.context.run(function)
        except BaseException as error:
            if attempt.over() or ends_greenlet(attempt, error) or not is_a(error, (Exception, gevent.Timeout)):
                raise
            raised = without_our_frame(error)
        attempt.now = _clock.monotonic()
        attempt.save_duration += attempt.now - begun
        if not attempt.alone:
            attempt.turn = here.hub.loop.iteration
        if isinstance(raised, Conflict):
            attempt.verdict = raised
        elif raised is not None and ends and not isinstance(raised, Rejected):
            attempt.spent = not isinstance(raised, Exception)
            attempt.broken = raised
            certain = not_saved(raised, "nothing was committed yet when a step failed")
            attempt.batch.end(save_failed(attempt.batch.key, certain))
        return raised

"""An attempt that is judged step by step: what each operation has changed is written before the next one is applied.

That costs a round trip for each, and so it is for a batch with several operations that the store refuses. None of them
costs a load or another save then: the scope goes back to what was before it, in the database and in memory. Nothing is
committed before the end, and so whatever happens in between, nothing was saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent

from geventbatch._core.batch_turns import took
from geventbatch._core.clock import clock as _clock
from geventbatch._core.operation import SETTLED
from geventbatch._core.process import here
from geventbatch._core.verdict import ends_greenlet, has_steps, is_a, without_our_frame
from geventbatch._failure import rejected, save_failed
from geventbatch._safe_repr import shown
from geventbatch.errors import Conflict, NotSaved, Rejected

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation


def begin_steps(attempt: Attempt, resource: Any) -> bool:
    """Go step by step in the attempt at hand, if its scope can. False when the attempt ends here."""
    if not has_steps(attempt):
        return True
    attempt.steps = Steps(attempt.scope, resource)
    attempt.must_look = True
    return attempt.steps.begin(attempt)


class Steps:
    """Judges the operations of one attempt."""

    def __init__(self, scope: Any, resource: Any) -> None:
        """Of *scope*, which has loaded *resource*."""
        self._scope = scope
        # -- mutable state ---------------------------------------------------------------------------------
        self.resource: Any = resource
        self._recorded = 0  # outcomes of idempotency keys behind the last step

    def begin(self, attempt: Attempt) -> bool:
        """Have the scope be ready to go back to what was loaded. False when the attempt ends here."""
        return self._do(attempt, self._scope.begin_steps) is None and not attempt.over()

    def look_for(self, attempt: Attempt, operations: list[Operation[Any]]) -> bool:
        """Look in the store for their idempotency keys, since who is refused is in no save. False as above."""
        idempotency = attempt.dispatcher.options.idempotency
        return idempotency is None or bool(idempotency.look_for(attempt, operations))

    def keep(self, attempt: Attempt, operation: Operation[Any]) -> bool:
        """Write what *operation* has changed, or refuse it. False when the attempt ends here. Switches: yes."""
        begun = _clock.monotonic()
        took(attempt, "operation", begun - attempt.now, operation)
        refused = self._do(attempt, self._scope.keep)
        if refused is not None:
            return isinstance(refused, Rejected) and self.refuse(attempt, operation, refused)
        self._recorded = len(attempt.outcomes)
        return not attempt.over()

    def refuse(self, attempt: Attempt, operation: Operation[Any], refused: Rejected) -> bool:
        """What *operation* has made is undone, though it returned. False as above."""
        attempt.completed -= 1
        attempt.forget_operation()
        while len(attempt.outcomes) > self._recorded:
            attempt.outcomes.popitem()
        operation.value = None
        operation.error = rejected(refused)
        return self.undo(attempt, operation)

    def undo(self, attempt: Attempt, operation: Operation[Any]) -> bool:
        """Go back to what was before *operation*, which has its error. False as above. Switches: yes.

        Where that cannot be done, because it has ended the transaction or made its scope unfit, the rest of the batch
        is replayed without it.
        """
        attempt.doubted = False
        failed = self._do(attempt, self._undo, ends=False)
        if failed is None:
            self._recorded = len(attempt.outcomes)
            return not attempt.over()
        if not isinstance(failed, Conflict):
            operation.state = SETTLED
            attempt.broken = failed
        return False

    def _undo(self) -> None:
        self.resource = self._scope.undo()

    def _do(self, attempt: Attempt, function: Any, *, ends: bool = True) -> BaseException | None:
        """Call a function of the scope; give what it raised. Unless it is told by that, the batch has its outcome then.

        What is told is a `Rejected`, if *ends*, else whatever it is; a `Conflict` is the batch's verdict besides.
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
            attempt.batch.end(save_failed(attempt.batch.key, _not_saved(raised)))
        return raised


def _not_saved(error: BaseException) -> BaseException:
    if isinstance(error, NotSaved):
        return error
    told = NotSaved(f"nothing was committed yet when a step failed: {shown(error)}")
    told.__cause__ = error
    return told

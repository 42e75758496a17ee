"""Undoing an operation that raised: its changes are taken back, and all others go on without it.

It is exact (guarantee 18). The resource is brought back to its last copy, or to the loaded state, and the operations
that have returned since are applied to that again. So no operation is judged by the leftovers of another one. An
operation that raised is answered with its error. If the batch is replayed, after a `Conflict` say, it is applied again
with all the others.

A copy is made when applying again has become dearer than a copy, or would exceed one more pass over all operations so
far. If no copy is possible, the operations that have returned are saved, and the rest goes on from another load. (A
state that cannot be encoded, say, is found by that save.) If each of the last few undos had to apply one operation
again, which was dearer than a copy, the copy is made ahead: right after the next operation that returns.

As long as nothing raises, nothing is copied. So a scope without a ``restore`` of its own has its batch loaded again
once, and copied from then on. A resource that cannot be copied costs a load for each operation that raises.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Final, Literal

import gevent

from geventbatch._core.batch_turns import take_turns
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import current_part, cut_after, readmit
from geventbatch._core.operation import BROKEN, STARTED, name_of
from geventbatch._core.process import here
from geventbatch._core.verdict import (
    ENDS,
    GOES_ON,
    TO_UNDO,
    can_begin_steps,
    ends_greenlet,
    is_a,
    is_reused,
    judge,
    look,
    put_out,
    without_our_frame,
)
from geventbatch._values.answers import PLAIN, own_answer
from geventbatch._values.copies import Copies, copies_of, in_place_of, is_again, needs_no_copy, restored_by
from geventbatch._watch import log
from geventbatch.errors import CannotUndo

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation

_ROW: Final = 4
"""After so many undos in a row that applied one operation again, copies are made ahead."""

_SHARE: Final = 0.2
"""A share of a batch's time: undoing that took more is logged, if it also took more than `_LONG`."""

_LONG: Final = 0.01
"""Seconds."""


def raised(attempt: Attempt, operation: Operation[Any], error: BaseException, resource: Any, due: float) -> bool:
    """Judge *operation*, which raised *error* on *resource*; undo it if need be. Return True if the attempt ends here.

    From *due* on read the clock.
    """
    found = judge(attempt, operation, error)
    if found != TO_UNDO:
        return found == ENDS
    undo = attempt.undo
    if undo is None:
        undo = attempt.undo = Undo(attempt, resource)
    return undo.undo(attempt, operation, error, due)


class Undo:
    """Undoes operations of one batch, and knows what that has cost."""

    def __init__(self, attempt: Attempt, resource: Any) -> None:
        """Undo operations of *attempt*, which has loaded *resource*."""
        # -- mutable state: the batch ----------------------------------------------------------------------
        self.count = 0  # operations that were undone
        self.seconds = 0.0  # spent on that
        self._costs: dict[tuple[str, type[BaseException]], float] = {}  # seconds, by operation and class of its error
        self._copying = False  # the resources of later attempts are copied when they are loaded
        self._uncopied = False  # they cannot be copied
        self._noted = 0.0  # the part of `seconds` that is in `_costs`
        self._last: tuple[Any, Any] = (None, None)  # the operation that raised last, and the class of its error
        self._lost_at = inf  # monotonic seconds when an attempt was given up; inf once the next one has loaded
        self._done = 0  # operations that had returned at `_lost_at`
        self.out: list[Operation[Any]] = []  # operations that could not be undone
        # -- mutable state: the attempt at hand ------------------------------------------------------------
        self._begin(resource, attempt.started + attempt.load_duration)

    def _begin(self, resource: Any, now: float) -> None:
        self.resource: Any = resource  # the one that later operations are applied to
        self._began = now  # monotonic seconds
        self._memory: Any = None  # restores the resource: the scope or a `Copies`; None until it is needed
        self._copy: object | None = None  # the last copy; None stands for the loaded state
        self._given = False  # the batch uses the last copy as its resource, so that it is no copy any more
        self._completed = self._recorded = 0  # operations and outcomes of the batch at the last copy
        self._since: list[Operation[Any]] = []  # operations that have returned since the last copy, up to `_place`
        self._place = 0  # operations of the part at hand that were looked at
        self._applied = 0  # operations among them that were applied
        self._repeated = 0  # times that one of them was applied again
        self._repeating = 0.0  # seconds spent on that since the last copy
        self._copy_takes = 0.0  # seconds; inf if no copy is possible
        self._row = 0  # undos in a row that applied one operation again, at the cost of a copy or more
        self.ahead = False  # a copy is to be made after the next operation that returns

    def begin(self, attempt: Attempt, resource: Any) -> None:
        """Begin with *resource*, which another attempt has loaded: copy it, if it is restored by copies."""
        begun = _clock.monotonic()
        lives, place = False, self._place
        if self._lost_at < inf:
            self._add(attempt, begun - self._lost_at)
            self._lost_at = inf
            lives = is_again(resource, self.resource)
        self._begin(resource, begun)
        if lives:
            self._go_on(attempt, place)
        if not self._copying:
            return
        try:
            self._memory = attempt.context.run(in_place_of if lives else copies_of, attempt, resource)
        except BaseException as error:
            self._see(attempt, error)
            self._copying, self._uncopied = False, True
            log.cannot_undo(attempt, error, *self._last)
        else:
            if not lives:
                readmit(attempt)  # operations that were out, since they could not be undone, come back
        self._copy_takes = _clock.monotonic() - begun
        self._add(attempt, self._copy_takes)

    def _go_on(self, attempt: Attempt, place: int) -> None:
        """Go on behind the operation at *place*: the load returned the very object again that was given up.

        The changes of the earlier operations are in it, so to apply these again would apply them twice. The changes of
        the operation that raised stay in it.
        """
        for operation in current_part(attempt)[:place]:
            if operation.state == STARTED:
                operation.state = BROKEN
        self._place = place
        self._completed = attempt.completed = self._done
        log.same_again(attempt.batch, *self._last)

    # -- an operation has raised --------------------------------------------------------------------------

    def undo(self, attempt: Attempt, operation: Operation[Any], error: BaseException, due: float) -> bool:
        """Take back the changes of *operation*, which raised *error*. Return True if the attempt ends here.

        From *due* on read the clock.
        """
        if operation.callable is not self._last[0] or type(error) is not self._last[1]:
            self._note_costs()
            self._last = operation.callable, type(error)
        if self._memory is None and needs_no_copy(attempt, self.resource):
            return False
        self._count(attempt)
        begun = _clock.monotonic()
        if begun < due:
            attempt.now = begun
        else:
            due = take_turns(attempt, operation, begun)
            begun = attempt.now
            if attempt.over():
                return True
        self._catch_up(attempt, operation)
        found = TO_UNDO
        while found == TO_UNDO:
            why = self._restore(attempt)
            if attempt.batch.ended or attempt.dispatcher.epoch != here.epoch:
                return attempt.over()
            if why is not None:
                return not self._is_last_and_only(attempt) and self._load_again(attempt, operation, error, why)
            found = self._apply_again(attempt, due)
        seconds = attempt.now - begun
        self.seconds += seconds
        attempt.dispatcher.counts.undo_seconds += seconds
        return found == ENDS

    def _count(self, attempt: Attempt) -> None:
        self.count += 1
        attempt.dispatcher.counts.undone += 1

    def _note_costs(self) -> None:
        """Add the seconds since the last note to the costs of the operation that raised last, and its error."""
        if self.seconds > self._noted:
            function, kind = self._last
            costs = name_of(function), kind
            self._costs[costs] = self._costs.get(costs, 0.0) + self.seconds - self._noted
            self._noted = self.seconds

    def _add(self, attempt: Attempt, seconds: float) -> None:
        self.seconds += seconds
        attempt.dispatcher.counts.undo_seconds += seconds

    def _catch_up(self, attempt: Attempt, operation: Operation[Any]) -> None:
        """Find the operations that have returned since the last look, up to *operation*."""
        part = attempt.parts[-1] if attempt.parts else attempt.batch.operations
        place = self._place
        while (one := part[place]) is not operation:
            place += 1
            if one.state == STARTED:
                self._applied += 1
                if one.error is None:
                    self._since.append(one)
        self._applied += 1
        self._place = place + 1

    def _restore(self, attempt: Attempt) -> BaseException | None:
        """Bring the resource back to the last copy. If that is impossible, return the reason."""
        memory = self._memory
        if memory is None:
            if not hasattr(attempt.scope, "restore"):
                return CannotUndo("nothing was copied")
            memory = self._memory = restored_by(attempt.scope, self.resource)
        if self._given:
            self._forget_copy(attempt)
        restore = memory.restore
        if type(memory) is Copies and self._copy is not None and self._since:
            restore, self._given = memory.give, True  # the copy itself is used; another is made after applying again
        try:
            self.resource = attempt.context.run(restore, self._copy)
        except BaseException as error:
            return self._see(attempt, error)
        now = _clock.monotonic()
        if self._copy is None and not self._copy_takes:
            self._copy_takes = now - attempt.now  # an estimate, until a copy was made
        attempt.now = now
        attempt.completed = self._completed
        while attempt.rows_added and attempt.rows_added[-1][0] >= self._completed:
            attempt.rows_added.pop()
        if attempt.outcomes:
            attempt.dispatcher.options.idempotency.forget(attempt, self._recorded)
        return None

    def _forget_copy(self, attempt: Attempt) -> None:
        """Go back to the loaded state: the last copy was used up, and no other one was made."""
        self._copy, self._given = None, False
        self._completed = self._recorded = 0
        part = current_part(attempt)[: self._place]
        self._since = [one for one in part if one.state == STARTED and one.error is None]

    @staticmethod
    def _see(attempt: Attempt, error: BaseException) -> BaseException:
        """Return *error*, of the scope or of a copy, without our frame. Raise it if it ends the batch."""
        if attempt.over() or ends_greenlet(attempt, error) or not is_a(error, (Exception, gevent.Timeout)):
            raise error
        return without_our_frame(error)

    def _is_last_and_only(self, attempt: Attempt) -> bool:
        """Return whether no operation has returned and none is to be applied any more: then nothing is saved."""
        if self._since or self._copy is not None or attempt.batch.open or attempt.outcomes:
            return False
        return not any(one.state <= STARTED for one in current_part(attempt)[self._place :])

    def _load_again(
        self, attempt: Attempt, operation: Operation[Any], error: BaseException, why: BaseException
    ) -> Literal[True]:
        """End the attempt, since *operation* cannot be undone."""
        reused = is_reused(attempt)
        if can_begin_steps(attempt):
            attempt.stepwise = True
        elif self._memory is None and not self._uncopied:
            self._copying = True
        elif not (reused or self._uncopied or (isinstance(why, CannotUndo) and why.once)):
            log.cannot_undo(attempt, why, *self._last)
            # A `Composite` finds only now that it has no copy. The next attempt would find the same: it makes none.
            self._uncopied, self._copying = self._copying, False
        if reused:  # it may have raised because of an outdated cache: it is judged by what the next attempt loads
            attempt.broken = error
        else:
            put_out(attempt, operation, error)
            self.out.append(operation)
        self._lost_at, self._done = _clock.monotonic(), attempt.completed
        self._add(attempt, self._lost_at - self._began)
        return True

    def record_out(self, attempt: Attempt) -> None:
        """Record the errors of the operations that are out with the attempt at hand, if they have idempotency keys.

        Those of other parts are recorded with these: an outcome is recorded once, and only when it is final.
        """
        idempotency = attempt.dispatcher.options.idempotency
        if idempotency is not None:
            part = set(current_part(attempt)) if attempt.parts else None
            idempotency.record_broken(attempt, [one for one in self.out if part is None or one in part])

    def owes(self, attempt: Attempt) -> bool:
        """Return whether the part at hand has an operation that is out, whose error is to be recorded with it."""
        idempotency = attempt.dispatcher.options.idempotency
        if idempotency is None or not self.out:
            return False
        part = set(current_part(attempt))
        return any(one in part and idempotency.is_owed(attempt, one) for one in self.out)

    # -- the operations that had returned -----------------------------------------------------------------

    def _apply_again(self, attempt: Attempt, due: float) -> int:
        """Apply again the operations since the last copy; from *due* on read the clock.

        Return `TO_UNDO` if one raised this time (its new error counts): all is to be restored and applied once more.
        """
        begun = attempt.now
        monotonic, resource, since = _clock.monotonic, self.resource, self._since
        postponed, self.ahead = self.ahead, False
        for place, one in enumerate(since):
            try:
                value = one.context.copy().run(one.callable, resource, *one.args)
                one.value = value if type(value) in PLAIN else own_answer(attempt, one, resource, value)
            except BaseException as error:
                self._repeated += place + 1
                return self._raised_again(attempt, place, error)
            attempt.completed += 1
            if (attempt.must_look or attempt.dispatcher.epoch != here.epoch) and look(attempt, one):
                return ENDS
            now = monotonic()
            if now < due:
                attempt.now = now
            else:
                due = take_turns(attempt, one, now)
                if attempt.over():
                    return ENDS
        self._repeated += len(since)
        self._repeating += attempt.now - begun
        return self._copy_if_due(attempt, postponed=postponed)

    def _copy_if_due(self, attempt: Attempt, *, postponed: bool) -> int:
        """Copy the resource after applying again, if due; a copy that was *postponed* is not postponed again."""
        since = self._since
        dear = self._given or self._repeating >= self._copy_takes
        if self._is_made_ahead(dear=dear, postponed=postponed):
            attempt.must_look = True
            return GOES_ON
        if not since:
            return GOES_ON
        too_often = self._repeated + len(since) > self._applied + 1
        if (too_often or dear) and not self._copy_now(attempt) and too_often:
            return self._save_so_far(attempt)
        return GOES_ON

    def _is_made_ahead(self, *, dear: bool, postponed: bool) -> bool:
        """Return whether the copy is postponed until after the next operation that returns.

        It is not if it was *postponed* already and no operation has returned since: so each undo makes one copy at the
        most. And it is not if the last copy was given away.
        """
        since = len(self._since)
        if since:
            self._row = self._row + 1 if dear and since == 1 and not (postponed or self._given) else 0
        self.ahead = self._row >= _ROW
        return self.ahead

    def copy_ahead(self, attempt: Attempt, operation: Operation[Any]) -> None:
        """Copy the resource after *operation*, if that has returned: the next one is likely to raise."""
        if operation.error is not None:
            return
        self.ahead = False
        attempt.must_look = attempt.batch.ended
        before, attempt.now = attempt.now, _clock.monotonic()
        begun = attempt.now
        self._catch_up(attempt, operation)
        self._since.append(operation)
        self._copy_now(attempt)
        self._add(attempt, attempt.now - begun)
        attempt.now = before  # the time that the operation took is still to be checked

    def _raised_again(self, attempt: Attempt, place: int, error: BaseException) -> int:
        """Judge the operation at *place*, which raised *error* this time."""
        found = judge(attempt, self._since[place], error)
        if found == ENDS:
            return ENDS
        if found == TO_UNDO:
            self._count(attempt)
        del self._since[place]
        attempt.now = _clock.monotonic()
        return TO_UNDO

    def _copy_now(self, attempt: Attempt) -> bool:
        """Copy the resource as it is. Return False if that is impossible."""
        if self._copy_takes == inf:
            return False
        begun, before = attempt.now, self._copy
        try:
            self._copy = attempt.context.run(self._memory.checkpoint)
        except BaseException as error:
            self._see(attempt, error)
            self._copy_takes = inf
            attempt.now = _clock.monotonic()
            return False
        self._completed, self._recorded = attempt.completed, len(attempt.outcomes or ())
        self._given = False
        self._since = []
        self._repeating = 0.0
        attempt.now = _clock.monotonic()
        takes = attempt.now - begun
        if before is not None:  # limits the effect of another process that took the CPU meanwhile
            takes = min(takes, 2 * self._copy_takes)
        self._copy_takes = takes
        return True

    def _save_so_far(self, attempt: Attempt) -> int:
        """Save the operations that have returned, since no copy is possible: the others go on from another load.

        If the save is refused too, this part is halved until the culprit stands alone.
        """
        part = current_part(attempt)
        if self._place == len(part):
            return GOES_ON
        cut_after(attempt, part[self._place - 1])
        return ENDS

    # -- the log ------------------------------------------------------------------------------------------

    def tell(self, attempt: Attempt) -> None:
        """Log it if undoing has cost *attempt*, which ends, a good part of its time. Switches: no."""
        self._note_costs()
        if self._costs and self.seconds > max(_LONG, _SHARE * (_clock.monotonic() - attempt.started)):
            costs = self._costs
            log.undoing(attempt, self, *max(costs, key=lambda one: costs[one]))

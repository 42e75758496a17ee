"""Undoing an operation that raised: what it has changed is taken back, and everybody else goes on without it.

It is exact (guarantee 18): the resource is brought back to the last copy of it, or to what was loaded, and what has
returned since is applied to that again. So nobody is judged by what another one left behind. Whoever raised is answered
with that, and is applied again with all the others when the batch is replayed, after a `Conflict` say.

A copy is made where applying again has become dearer than that; and where it would come to more than one pass over all
that was applied so far. Where none can be had, what has returned is saved then, and the rest goes on from another load:
so what cannot be encoded, say, is found by the save, as ever. Where each of the last ones that raised has had one
applied again for it, which was dearer than a copy, the copy is made ahead: behind the next one that returns, instead of
then.

As long as nothing raises, nothing is copied: so a scope without a ``restore`` of its own has the batch loaded again
once, and copies from then on. What cannot be copied costs a load for each that raises.
"""

from __future__ import annotations

from functools import partial
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
    UNDONE,
    ends_greenlet,
    has_steps,
    is_a,
    is_reused,
    judge,
    look,
    put_out,
    without_our_frame,
)
from geventbatch._values.answers import PLAIN, own_answer
from geventbatch._values.copies import Copies, InPlace, copies_of, is_fixed, needs_no_copy
from geventbatch._watch import log
from geventbatch.errors import CannotUndo

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation

_ROW: Final = 4
"""So often in a row one alone was applied again, until copies are made ahead."""

_SHARE: Final = 0.2
"""Of the time of a batch: more than that for undoing is worth a word, ..."""

_LONG: Final = 0.01
"""... if it is more than so many seconds."""


def raised(attempt: Attempt, operation: Operation[Any], error: BaseException, resource: Any, due: float) -> bool:
    """*operation*, applied to *resource*, has raised *error*. True when the attempt ends here.

    From *due* on look at the time.
    """
    found = judge(attempt, operation, error)
    if found != UNDONE:
        return found == ENDS
    undo = attempt.undo
    if undo is None:
        undo = attempt.undo = Undo(attempt, resource)
    return undo.undo(attempt, operation, error, due)


class Undo:
    """What a batch has undone, and how."""

    def __init__(self, attempt: Attempt, resource: Any) -> None:
        """Of *attempt*, which has loaded *resource*."""
        # -- mutable state: the batch ----------------------------------------------------------------------
        self.count = 0  # operations that were undone
        self.seconds = 0.0  # spent on that
        self._costs: dict[tuple[str, type[BaseException]], float] = {}  # seconds, by operation and class of its error
        self._copying = False  # the attempts to come are copied when they are loaded
        self._uncopied = False  # that cannot be done
        self._noted = 0.0  # of the seconds
        self._last: tuple[Any, Any] = (None, None)  # the operation that raised last, and the class of its error
        self._lost_at = inf  # when an attempt was given up, until the next one has loaded;
        self._done = 0  # and operations that had returned then
        self.out: list[Operation[Any]] = []  # those that could not be undone
        # -- mutable state: the attempt at hand ------------------------------------------------------------
        self._begin(resource, attempt.started + attempt.load_duration)

    def _begin(self, resource: Any, now: float) -> None:
        self.resource: Any = resource  # to go on with
        self._began = now
        self._memory: Any = None  # what restores it; not known before it has to
        self._copy: object | None = None  # the last one;
        self._given = False  # the batch goes on with that itself, so that there is none
        self._completed = self._recorded = 0  # operations and outcomes that the batch had then
        self._since: list[Operation[Any]] = []  # what has returned since then, as far as it was looked at
        self._place = 0  # so much of the part at hand was
        self._applied = 0  # operations among that,
        self._repeated = 0  # and how often one of them was applied again
        self._repeating = 0.0  # seconds for that, since the last copy
        self._copy_takes = 0.0  # seconds; infinite where there is none to be had
        self._row = 0  # so often in a row one alone was applied again, and that has cost as much as a copy
        self.ahead = False  # one is to be made behind the next operation that returns

    def begin(self, attempt: Attempt, resource: Any) -> None:
        """Another attempt of *attempt* has loaded *resource*: copy it, if that is how it is restored."""
        begun = _clock.monotonic()
        lives, place = False, self._place
        if self._lost_at < inf:
            self._add(attempt, begun - self._lost_at)
            self._lost_at = inf
            lives = resource is self.resource and not is_fixed(resource)
        self._begin(resource, begun)
        if lives:
            self._go_on(attempt, place)
        if not self._copying:
            return
        try:
            self._memory = attempt.context.run(InPlace if lives else partial(copies_of, attempt), resource)
        except BaseException as error:
            self._see(attempt, error)
            self._copying, self._uncopied = False, True
            log.cannot_undo(attempt.batch, error, *self._last)
        else:
            if not lives:
                readmit(attempt)  # those too that are out since they could not be undone
        self._copy_takes = _clock.monotonic() - begun
        self._add(attempt, self._copy_takes)

    def _go_on(self, attempt: Attempt, place: int) -> None:
        """The load gave the very object again that was given up: go on behind the first so many operations.

        What they have done to it is there, and what the one that raised has done stays there. To apply them again would
        be to apply them twice.
        """
        for operation in current_part(attempt)[:place]:
            if operation.state == STARTED:
                operation.state = BROKEN
        self._place = place
        self._completed = attempt.completed = self._done
        log.same_again(attempt.batch, *self._last)

    # -- an operation has raised --------------------------------------------------------------------------

    def undo(self, attempt: Attempt, operation: Operation[Any], error: BaseException, due: float) -> bool:
        """Take back what *operation* has changed, which raised *error*. True when the attempt ends here.

        From *due* on look at the time.
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
        found = UNDONE
        while found == UNDONE:
            why = self._restore(attempt)
            if attempt.batch.ended or attempt.batch.epoch != here.epoch:
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
        """Note what undoing has taken since that was noted last: for the operation, and the error, of that time."""
        if self.seconds > self._noted:
            function, kind = self._last
            costs = name_of(function), kind
            self._costs[costs] = self._costs.get(costs, 0.0) + self.seconds - self._noted
            self._noted = self.seconds

    def _add(self, attempt: Attempt, seconds: float) -> None:
        self.seconds += seconds
        attempt.dispatcher.counts.undo_seconds += seconds

    def _catch_up(self, attempt: Attempt, operation: Operation[Any]) -> None:
        """Find what has returned since it was last looked, up to *operation*."""
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
        """Bring the resource back to the last copy. Give why that cannot be done."""
        memory = self._memory
        if memory is None:
            if not hasattr(attempt.scope, "restore"):
                return CannotUndo("nothing was copied")
            memory = self._memory = attempt.scope
        if self._given:
            self._forget_copy(attempt)
        restore = memory.restore
        if type(memory) is Copies and self._copy is not None and self._since:
            restore, self._given = memory.give, True  # it is copied when they are applied again
        try:
            self.resource = attempt.context.run(restore, self._copy)
        except BaseException as error:
            return self._see(attempt, error)
        now = _clock.monotonic()
        if self._copy is None and not self._copy_takes:
            self._copy_takes = now - attempt.now  # about so much, as long as there was none
        attempt.now = now
        attempt.completed = self._completed
        while attempt.rows_added and attempt.rows_added[-1][0] >= self._completed:
            attempt.rows_added.pop()
        if attempt.outcomes:
            attempt.dispatcher.options.idempotency.forget(attempt, self._recorded)
        return None

    def _forget_copy(self, attempt: Attempt) -> None:
        """Go back to what was loaded: one has raised that was applied again to the last copy, or no other was made."""
        self._copy, self._given = None, False
        self._completed = self._recorded = 0
        part = current_part(attempt)[: self._place]
        self._since = [one for one in part if one.state == STARTED and one.error is None]

    @staticmethod
    def _see(attempt: Attempt, error: BaseException) -> BaseException:
        """Look at what the scope, or what copies, has raised. Raises what ends the batch."""
        if attempt.over() or ends_greenlet(attempt, error) or not is_a(error, (Exception, gevent.Timeout)):
            raise error
        return without_our_frame(error)

    def _is_last_and_only(self, attempt: Attempt) -> bool:
        """Whether nobody has returned, and nobody is to be applied behind it: then nothing is saved."""
        if self._since or self._copy is not None or attempt.batch.open or attempt.outcomes:
            return False
        return not any(one.state <= STARTED for one in current_part(attempt)[self._place :])

    def _load_again(
        self, attempt: Attempt, operation: Operation[Any], error: BaseException, why: BaseException
    ) -> Literal[True]:
        """Give up the attempt, since *operation* cannot be undone."""
        reused = is_reused(attempt)
        if has_steps(attempt):
            attempt.stepwise = True
        elif self._memory is None and not self._uncopied:
            self._copying = True
        elif not (reused or self._uncopied):
            log.cannot_undo(attempt.batch, why, *self._last)
        if reused:  # perhaps it raised for what is no more: it is judged by what the next attempt loads
            attempt.broken = error
        else:
            put_out(attempt, operation, error)
            self.out.append(operation)
        self._lost_at, self._done = _clock.monotonic(), attempt.completed
        self._add(attempt, self._lost_at - self._began)
        return True

    def record_out(self, attempt: Attempt) -> None:
        """Have what those that are out have raised recorded with the attempt at hand, if they have idempotency keys."""
        idempotency = attempt.dispatcher.options.idempotency
        if idempotency is not None:
            idempotency.record_broken(attempt, self.out)

    # -- those that had returned --------------------------------------------------------------------------

    def _apply_again(self, attempt: Attempt, due: float) -> int:
        """Apply them again; from *due* on look at the time. `UNDONE` when all is to be restored and applied once more.

        That is so when one raises this time: its new error is its own then.
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
            if (attempt.must_look or attempt.batch.epoch != here.epoch) and look(attempt, one):
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
        """See to the copy behind those that were applied again; what was *postponed* is not postponed again."""
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
        """Whether the next copy is made behind the next operation that returns, and none now.

        Not where that was *postponed* already, and nobody has returned since: so there is one for each that raised, at
        the most. And not where the last copy was given away.
        """
        since = len(self._since)
        if since:
            self._row = self._row + 1 if dear and since == 1 and not (postponed or self._given) else 0
        self.ahead = self._row >= _ROW
        return self.ahead

    def copy_ahead(self, attempt: Attempt, operation: Operation[Any]) -> None:
        """Copy the resource behind *operation*, if that has returned: the next one is likely to raise."""
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
        attempt.now = before  # what the operation has taken is still to be looked at

    def _raised_again(self, attempt: Attempt, place: int, error: BaseException) -> int:
        """One of them has raised this time."""
        found = judge(attempt, self._since[place], error)
        if found == ENDS:
            return ENDS
        if found == UNDONE:
            self._count(attempt)
        del self._since[place]
        attempt.now = _clock.monotonic()
        return UNDONE

    def _copy_now(self, attempt: Attempt) -> bool:
        """Copy the resource as it is: to apply again has become dearer, or would come to more than one pass."""
        if self._copy_takes == inf:
            return False
        begun, before = attempt.now, self._copy
        try:
            self._copy = attempt.context.run(self._memory.checkpoint)
        except BaseException as error:
            self._see(attempt, error)
            self._copy_takes = inf
            return False
        self._completed, self._recorded = attempt.completed, len(attempt.outcomes)
        self._given = False
        self._since = []
        self._repeating = 0.0
        attempt.now = _clock.monotonic()
        takes = attempt.now - begun
        if before is not None:  # what another process has taken of the time meanwhile is not taken each time
            takes = min(takes, 2 * self._copy_takes)
        self._copy_takes = takes
        return True

    def _save_so_far(self, attempt: Attempt) -> int:
        """Have what has returned saved, which cannot be copied: what is behind it goes on from a load.

        If it cannot be saved either, that is halved until the culprit stands alone.
        """
        part = current_part(attempt)
        if self._place == len(part):
            return GOES_ON
        cut_after(attempt, part[self._place - 1])
        return ENDS

    # -- what is told -------------------------------------------------------------------------------------

    def tell(self, attempt: Attempt) -> None:
        """Say so when undoing has cost *attempt*, which ends, a good part of its time. Switches: no."""
        self._note_costs()
        if self._costs and self.seconds > max(_LONG, _SHARE * (_clock.monotonic() - attempt.started)):
            costs = self._costs
            log.undoing(attempt, self, *max(costs, key=lambda one: costs[one]))

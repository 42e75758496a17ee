"""Bulks: the batches of many keys that one worker loads together and saves together, in one resource scope.

Each batch keeps its own operations, answers, attempts and conflicts. What the batches of a bulk share is the greenlet,
the scope and the deadline. An attempt is a round: load what takes part in it, apply the operations of one batch after
the other, save. A batch that has its outcome leaves the bulk after the round, and its key is free; those that are
replayed take part in a later round.

One batch leads: the one that the alarm watches, and that `current_batch` gives. The deadline goes from one to the next,
since a pause (guarantee 10) moves it.
"""

from __future__ import annotations

import sys
from contextvars import Context
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gevent import get_hub

from geventbatch._bulk.scopes import errors_of, fault_of, loaded
from geventbatch._callables import NOT_OPENED, told
from geventbatch._core import process
from geventbatch._core.applying import apply, has_news
from geventbatch._core.attempt import Attempt
from geventbatch._core.batch_turns import take_breath, took
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import is_left, settle
from geventbatch._core.hub_turns import pace
from geventbatch._core.replay import back_off, delay, save_raised
from geventbatch._core.verdict import ends_greenlet, kill_behind, traceback_of, without_our_frame
from geventbatch._failure import load_failed, save_failed
from geventbatch.errors import Conflict, LoadFailed, NothingToSave, PartlySaved, Rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, MutableMapping

    from geventbatch._core.batch import Batch
    from geventbatch._core.deadline import Alarm
    from geventbatch.errors import Phase


class Bulk:
    """The batches that a worker runs together."""

    def __init__(self, batches: dict[Batch, None], alarm: Alarm, now: float) -> None:
        """Begin to run *batches* in the greenlet of *alarm*; those that have ended are taken out, and freed."""
        self._alarm = alarm
        # -- mutable state ---------------------------------------------------------------------------------
        self._batches = batches
        self._attempts: dict[Attempt, None] = {}  # of those
        for batch in batches:
            attempt = Attempt(batch, alarm, now)
            attempt.mates = self._attempts
            self._attempts[attempt] = None
        self._lead = next(iter(self._attempts))
        self._rounds = [(now, list(self._attempts))]  # to come, the next one last: not before when, and of whom
        self._unfit: Attempt | None = None  # one that has left the greenlet so

    def run(self) -> Attempt | None:
        """Run them, until the code of all has returned. Raises what ends the greenlet.

        Give one of them, if the greenlet is not to be used again.
        """
        try:
            while self._rounds:
                earliest, attempts = self._rounds.pop()
                first, before = attempts[0], attempts[0].now
                self.follow(first)
                if first.attempts:
                    first.aside += first.now - before
                if not self._lead.attempts or self._wait_until(earliest):
                    _Round(self, attempts).run()
                self._free_ended()
        except BaseException as error:  # in a wait of our own: a kill, or a Timeout that is not the bulk's
            self._lead.over()
            self._unfit = self._lead
            for attempt in self._attempts:
                attempt.batch.abort(error)
            if ends_greenlet(self._lead, error):
                raise
        finally:
            self._alarm.attempt = None
            process.running.pop(self._alarm.greenlet, None)
        return self._unfit

    def _wait_until(self, earliest: float) -> bool:
        seconds = max(0.0, earliest - _clock.monotonic())
        return back_off(self._lead, seconds) and take_breath(self._lead, 0.0)

    def follow(self, attempt: Attempt) -> None:
        """Have *attempt* lead from now on."""
        attempt.now = _clock.monotonic()
        attempt.deadline = self._lead.deadline
        self._lead = attempt
        process.running[self._alarm.greenlet] = attempt
        self._alarm.attempt = attempt
        if not self._alarm.armed:
            self._alarm.arm()

    def again(self, attempts: list[Attempt], seconds: float = 0.0) -> None:
        """Have another round of *attempts*, not before so many *seconds* from now."""
        if attempts:
            self._rounds.append((_clock.monotonic() + seconds, attempts))

    def _free_ended(self) -> None:
        """Let those go whose outcomes are fixed. Switches: yes, in pauses; who is killed there has them freed too."""
        if self._rounds:  # for the alarm asks nobody who was let go
            self.follow(self._rounds[-1][1][0])
        ended = [attempt for attempt in self._attempts if attempt.batch.ended]
        for attempt in ended:
            now = _clock.monotonic()
            if attempt is not ended[0] and now >= pace.slice_end(now):  # not behind the last: a stop may end with it
                self._lead.pause()
            if attempt.spent:
                self._unfit = attempt
            self._alarm.forget(attempt)
            del self._attempts[attempt], self._batches[attempt.batch]
            free(attempt.batch)


def free(batch: Batch) -> None:
    """The code of *batch*, which has ended, has returned: the next one of its key may run."""
    batch.let_go()
    if batch.key_queue is not None:
        batch.key_queue.finish()


def drop_left(batches: dict[Batch, None]) -> None:
    """Forget those of *batches* that everybody has left."""
    for batch in [batch for batch in batches if not batch.waiting]:
        batch.end()
        del batches[batch]
        free(batch)


class _Round:
    """From load to save once, in one scope, for some attempts."""

    def __init__(self, bulk: Bulk, attempts: list[Attempt]) -> None:
        self._bulk = bulk
        self._attempts = attempts
        self._context = Context()  # of its load and its save (guarantee 11)
        self._leave: Callable[..., object]
        # -- mutable state ---------------------------------------------------------------------------------
        self._at_hand: dict[Hashable, Attempt] = {one.batch.key: one for one in attempts}  # loaded, or to be saved
        self._shown: dict[Hashable, Batch] = {one.batch.key: one.batch for one in attempts}  # as scopes see it
        self._resources: MutableMapping[Any, Any] = {}
        self._reason: BaseException = NothingToSave()  # why the scope is left, if nothing is saved
        self._spoiled = False  # the transaction is, by an operation: all of it is replayed
        self._again: list[Attempt] = []
        self._seconds = 0.0  # before the round of those

    def run(self) -> None:
        """Load, apply, save; and have another round of those that are to be replayed."""
        if self._load():
            try:
                self._look_at_resources()
                self._apply()
                self._settle()
            except BaseException as error:
                for attempt in self._attempts:
                    attempt.batch.abort(error)
                self._leave_for(error)
                raise
            self._save()
        self._reason = NothingToSave()  # no cycle through an error that a broken operation raised
        self._bulk.again([one for one in self._again if not one.batch.ended], self._seconds)

    @staticmethod
    def _begin(phase: Phase, attempts: list[Attempt]) -> float:
        """Have *attempts* be in *phase* from now on, with what the first one knows: it leads. Give the time."""
        first = attempts[0]
        first.turn = get_hub().loop.iteration
        now, deadline = first.now, first.deadline
        for attempt in attempts:
            attempt.phase = phase
            attempt.now = now
            attempt.deadline = deadline
        return now

    # -- load ---------------------------------------------------------------------------------------------

    def _load(self) -> bool:
        """Enter the scope. False when nobody's resource was loaded, and the scope is left."""
        first = self._attempts[0]
        for attempt in self._attempts:
            if attempt.attempts:
                attempt.aside += first.now - attempt.now
        begun = self._begin("load", self._attempts)
        for attempt in self._attempts:
            if attempt.attempts:
                attempt.begin_again()
            attempt.attempts += 1
            attempt.bulk = self._shown
            attempt.context = self._context
        open_resources: Any = first.dispatcher.options.open_resources
        scope: Any = NOT_OPENED
        try:
            self._announce()
            scope = self._context.run(open_resources, list(self._at_hand))
            for attempt in self._attempts:
                attempt.scope = scope
            self._leave, self._resources = scope.__exit__, self._context.run(scope.__enter__)
        except BaseException as error:
            first.over()
            if ends_greenlet(first, error):
                raise
            error = without_our_frame(told(error, "open_resources", scope))
            for attempt in self._attempts:
                self._load_raised(attempt, error, of_many=len(self._attempts) > 1)
            return False
        finally:
            now = _clock.monotonic()
            for attempt in self._attempts:
                attempt.now = now
                attempt.load_duration += now - begun
            took(first, "load", now - begun)
        first.over()
        return True

    def _announce(self) -> None:
        dispatcher = self._attempts[0].dispatcher
        if dispatcher.subscriptions:
            self._context = dispatcher.announce([*self._shown.values()], self._context)
            for attempt in self._attempts:
                attempt.context = self._context

    def _look_at_resources(self) -> None:
        fault = fault_of(self._resources, self._at_hand)
        if fault is not None:
            self._resources = {}  # and nothing is taken out of what may not be meant for that
        for attempt in self._attempts:
            attempt.phase = "operations"
            try:
                found = fault or loaded(self._resources, attempt.batch.key)
            except Exception as error:
                found = without_our_frame(error)
            if isinstance(found, Exception):
                self._load_raised(attempt, found)

    def _load_raised(self, attempt: Attempt, error: BaseException, *, of_many: bool = False) -> None:
        if attempt.over():
            pass
        elif isinstance(error, Conflict):
            self._replay(attempt, delay(attempt, error, loading=True))
        else:
            attempt.spent = not isinstance(error, Exception)
            failure = load_failed(attempt.batch.key, error)
            if of_many:  # who knows which one is missing
                failure = replace(failure, kind=LoadFailed)
            attempt.batch.fail_load(failure)
        self._leave_out(attempt)

    def _leave_out(self, attempt: Attempt) -> None:
        """Nothing of *attempt* is saved in this round."""
        for mapping in (self._at_hand, self._shown, self._resources):
            mapping.pop(attempt.batch.key, None)

    def _replay(self, attempt: Attempt, seconds: float | None) -> None:
        if seconds is not None:
            if attempt.phase != "replay":
                attempt.phase = "operations"  # nothing was written; and while it waits it is not loading
            self._again.append(attempt)
            self._seconds = max(self._seconds, seconds)

    # -- operations ---------------------------------------------------------------------------------------

    def _apply(self) -> None:
        for attempt in list(self._at_hand.values()):
            if attempt.over():
                continue
            self._bulk.follow(attempt)
            attempt.turn = get_hub().loop.iteration
            attempt.batch.loaded = True
            if attempt.now >= attempt.deadline:  # the hub was kept from ringing the alarm
                attempt.expire()
                continue
            try:
                apply(attempt, self._resources[attempt.batch.key], 0.0)
                if attempt.undo is not None:
                    self._resources[attempt.batch.key] = attempt.undo.resource
            except BaseException as error:
                if ends_greenlet(attempt, error):
                    raise
                if not attempt.over():
                    attempt.batch.abort(without_our_frame(error))
            if attempt.verdict is not None:  # of the transaction, which is everybody's
                self._spoiled = True
                return

    def _settle(self) -> None:
        """Leave out those of which nothing is to be saved."""
        for attempt in list(self._at_hand.values()):
            verdict = attempt.verdict
            if attempt.over():
                self._leave_out(attempt)
            elif isinstance(verdict, Conflict):
                self._replay(attempt, delay(attempt, verdict))
                self._leave_out(attempt)
            elif verdict is not None and not isinstance(verdict, Rejected):
                attempt.batch.end(save_failed(attempt.batch.key, verdict, doing="an operation"))
                self._leave_out(attempt)
            elif self._spoiled or attempt.broken is not None or not has_news(attempt):
                replay = (self._spoiled or attempt.broken is not None) and (attempt.batch.open or is_left(attempt))
                self._reason = self._reason if attempt.broken is None else attempt.broken
                attempt.broken = None  # whose traceback leads back here
                self._replay(attempt, 0.0 if replay or settle(attempt) else None)
                self._leave_out(attempt)

    # -- save ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        attempts = list(self._at_hand.values())
        if attempts:
            self._bulk.follow(attempts[0])
            if attempts[0].now >= attempts[0].deadline:  # after work that never yielded
                attempts[0].expire()
        if not attempts or attempts[0].over():
            self._leave_for(TimeoutError("the deadline of the bulk has passed") if attempts else self._reason)
            return
        begun = self._begin("save", attempts)
        raised: BaseException | None = None
        try:
            self._context.run(self._leave, None, None, None)
        except BaseException as error:
            raised = without_our_frame(error)
        now = _clock.monotonic()
        for attempt in attempts:
            attempt.now = now
            attempt.save_duration += now - begun
        took(attempts[0], "save", now - begun)
        attempts[0].over()
        if raised is not None:
            raised = kill_behind(attempts[0], raised, sys.exc_info()[1])
        try:
            if raised is not None and ends_greenlet(attempts[0], raised):
                raise raised
            self._end(attempts, raised)
        finally:
            del raised  # no cycle through the error

    def _end(self, attempts: list[Attempt], raised: BaseException | None) -> None:
        """Give the batches of *attempts* their outcomes, after a save that *raised* something or not."""
        if isinstance(raised, PartlySaved):
            try:
                lost = errors_of(raised, self._at_hand)
            except TypeError as error:
                raised = error.with_traceback(None)  # our frames hold the operations of all
            else:
                for attempt in attempts:
                    self._end_one(attempt, lost.get(attempt.batch.key))
                return
        if isinstance(raised, Rejected) and len(attempts) > 1 and not attempts[0].over():
            self._halve(attempts)
            return
        for attempt in attempts:
            self._end_one(attempt, raised)

    def _end_one(self, attempt: Attempt, raised: BaseException | None) -> None:
        if raised is not None:
            self._replay(attempt, save_raised(attempt, raised))
        elif not attempt.parts:
            attempt.batch.end()
        elif not attempt.batch.ended and settle(attempt):
            self._replay(attempt, 0.0)

    def _halve(self, attempts: list[Attempt]) -> None:
        """Find the key for which the store refused all of them: by a round of each half."""
        for attempt in attempts:
            attempt.phase = "operations"
            attempt.rejections += 1
        middle = len(attempts) // 2
        self._bulk.again(attempts[middle:])
        self._bulk.again(attempts[:middle])

    def _leave_for(self, reason: BaseException) -> None:
        """Leave the scope without saving. What it makes of that is ignored, unless it was killed."""
        first = self._attempts[0]
        try:
            self._context.run(self._leave, type(reason), reason, traceback_of(reason))
        except BaseException as error:
            first.over()
            if error is not reason and ends_greenlet(first, error):
                raise
        else:
            first.over()

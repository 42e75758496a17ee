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

from geventbatch import _attempts, _process
from geventbatch._bulk_scope import errors_of, fault_of, loaded
from geventbatch._callables import NOT_OPENED, told
from geventbatch._clock import clock as _clock
from geventbatch._failure import load_failed, save_failed
from geventbatch._pace import pace
from geventbatch._parts import is_left, settle
from geventbatch._turns import take_breath, took
from geventbatch._verdict import ends_greenlet, kill_behind, traceback_of, without_our_frame
from geventbatch.errors import Conflict, LoadFailed, NothingToSave, PartlySaved, Rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, MutableMapping

    from geventbatch._alarm import Alarm
    from geventbatch._batch import Batch
    from geventbatch.errors import Phase


class Bulk:
    """The batches that a worker runs together."""

    def __init__(self, batches: dict[Batch, None], alarm: Alarm) -> None:
        """Be about to run *batches* in the greenlet of *alarm*; those that have ended are taken out, and freed."""
        self._alarm = alarm
        # -- mutable state ---------------------------------------------------------------------------------
        self._batches = batches
        self._lead = next(iter(batches))
        self._rounds: list[tuple[float, list[Batch]]] = []  # to come, the next one last: not before when, and of whom

    def run(self, now: float) -> None:
        """Run them, from *now* until the code of all has returned. Raises what ends the greenlet."""
        deadline = now + self._lead.state.options.max_duration
        for batch in self._batches:
            batch.mates = self._batches
            batch.alarm = self._alarm
            batch.now = batch.started = now
            batch.deadline = deadline
            batch.turn = -1
        self._rounds.append((now, list(self._batches)))
        try:
            while self._rounds:
                earliest, batches = self._rounds.pop()
                first, before = batches[0], batches[0].now
                self.follow(first)
                if first.attempts:
                    first.aside += first.now - before
                if not self._lead.attempts or self._wait_until(earliest):
                    _Round(self, batches).run()
                self._free_ended()
        except BaseException as error:  # in a wait of our own: a kill, or a Timeout that is not the bulk's
            self._lead.over()
            for batch in self._batches:
                batch.abort(error)
            if ends_greenlet(self._lead, error):
                raise
        finally:
            _process.running.pop(self._alarm.greenlet, None)

    def _wait_until(self, earliest: float) -> bool:
        seconds = max(0.0, earliest - _clock.monotonic())
        return _attempts.back_off(self._lead, seconds) and take_breath(self._lead, 0.0)

    def follow(self, batch: Batch) -> None:
        """Have *batch* lead from now on."""
        batch.deadline = self._lead.deadline
        batch.now = _clock.monotonic()
        self._lead = batch
        _process.running[self._alarm.greenlet] = batch
        self._alarm.batch = batch
        if not self._alarm.armed:
            self._alarm.arm()

    def again(self, batches: list[Batch], seconds: float = 0.0) -> None:
        """Have another round of *batches*, not before so many *seconds* from now."""
        if batches:
            self._rounds.append((_clock.monotonic() + seconds, batches))

    def _free_ended(self) -> None:
        """Let those go whose outcomes are fixed. Switches: yes, in pauses; who is killed there has them freed too."""
        if self._rounds:  # for the alarm asks nobody who was let go
            self.follow(self._rounds[-1][1][0])
        ended = [batch for batch in self._batches if batch.ended]
        for batch in ended:
            now = _clock.monotonic()
            if batch is not ended[0] and now >= pace.slice_end(now):  # not behind the last one: a stop may end with it
                self._lead.pause()
            del self._batches[batch]
            free(batch)


def free(batch: Batch) -> None:
    """The code of *batch*, which has ended, has returned: the next one of its key may run."""
    batch.returned = True
    batch.mates = batch.scope = batch.undo = None
    batch.bulk = {}
    if batch.lane is not None:
        batch.lane.finish()


def drop_left(batches: dict[Batch, None]) -> None:
    """Forget those of *batches* that everybody has left."""
    for batch in [batch for batch in batches if not batch.waiting]:
        batch.end()
        del batches[batch]
        free(batch)


class _Round:
    """One attempt of some batches: from load to save, in one scope."""

    def __init__(self, bulk: Bulk, batches: list[Batch]) -> None:
        self._bulk = bulk
        self._batches = batches
        self._context = Context()  # of its load and its save (guarantee 11)
        self._leave: Callable[..., object]
        # -- mutable state ---------------------------------------------------------------------------------
        self._at_hand: dict[Hashable, Batch] = {batch.key: batch for batch in batches}  # loaded, or to be saved
        self._resources: MutableMapping[Any, Any] = {}
        self._reason: BaseException = NothingToSave()  # why the scope is left, if nothing is saved
        self._spoiled = False  # the transaction is, by an operation: all of it is replayed
        self._again: list[Batch] = []
        self._seconds = 0.0  # before the round of those

    def run(self) -> None:
        """Load, apply, save; and have another round of those that are to be replayed."""
        if self._load():
            try:
                self._look_at_resources()
                self._apply()
                self._settle()
            except BaseException as error:
                for batch in self._batches:
                    batch.abort(error)
                self._leave_for(error)
                raise
            self._save()
        self._reason = NothingToSave()  # no cycle through an error that a broken operation raised
        self._bulk.again([batch for batch in self._again if not batch.ended], self._seconds)

    @staticmethod
    def _begin(phase: Phase, batches: list[Batch]) -> float:
        """Have *batches* be in *phase* from now on, with what the first one knows: it leads. Give the time."""
        batches[0].turn = get_hub().loop.iteration
        for batch in batches:
            batch.phase = phase
            batch.now = batches[0].now
            batch.deadline = batches[0].deadline
        return batches[0].now

    # -- load ---------------------------------------------------------------------------------------------

    def _load(self) -> bool:
        """Enter the scope. False when nobody's resource was loaded, and the scope is left."""
        first = self._batches[0]
        for batch in self._batches:
            if batch.attempts:
                batch.aside += first.now - batch.now
        begun = self._begin("load", self._batches)
        for batch in self._batches:
            batch.conflict = None
            if batch.attempts:
                batch.begin_attempt()
            batch.attempts += 1
            batch.bulk = self._at_hand
            batch.context = self._context
        open_resources: Any = first.state.options.open_resources
        scope: Any = NOT_OPENED
        try:
            self._announce()
            scope = self._context.run(open_resources, list(self._at_hand))
            for batch in self._batches:
                batch.scope = scope
            self._leave, self._resources = scope.__exit__, self._context.run(scope.__enter__)
        except BaseException as error:
            first.over()
            if ends_greenlet(first, error):
                raise
            error = without_our_frame(told(error, "open_resources", scope))
            for batch in self._batches:
                self._load_raised(batch, error, of_many=len(self._batches) > 1)
            return False
        finally:
            now = _clock.monotonic()
            for batch in self._batches:
                batch.now = now
                batch.load_duration += now - begun
            took(first, "load", now - begun)
        first.over()
        return True

    def _announce(self) -> None:
        self._context = self._batches[0].state.announce(self._batches, self._context)
        for batch in self._batches:
            batch.context = self._context

    def _look_at_resources(self) -> None:
        fault = fault_of(self._resources, self._at_hand)
        if fault is not None:
            self._resources = {}  # and nothing is taken out of what may not be meant for that
        for batch in self._batches:
            batch.phase = "operations"
            try:
                found = fault or loaded(self._resources, batch.key)
            except Exception as error:
                found = without_our_frame(error)
            if isinstance(found, Exception):
                self._load_raised(batch, found)

    def _load_raised(self, batch: Batch, error: BaseException, *, of_many: bool = False) -> None:
        if batch.over():
            pass
        elif isinstance(error, Conflict):
            self._replay(batch, _attempts.delay(batch, error, loading=True))
        else:
            batch.spent = not isinstance(error, Exception)
            failure = load_failed(batch.key, error)
            batch.fail_load(replace(failure, kind=LoadFailed) if of_many else failure)  # who knows which one is missing
        self._leave_out(batch)

    def _leave_out(self, batch: Batch) -> None:
        """Nothing of *batch* is saved in this round."""
        self._at_hand.pop(batch.key, None)
        self._resources.pop(batch.key, None)

    def _replay(self, batch: Batch, seconds: float | None) -> None:
        if seconds is not None:
            batch.phase = "operations"  # nothing was written; and while it waits it is not loading
            self._again.append(batch)
            self._seconds = max(self._seconds, seconds)

    # -- operations ---------------------------------------------------------------------------------------

    def _apply(self) -> None:
        for batch in list(self._at_hand.values()):
            if batch.over():
                continue
            self._bulk.follow(batch)
            batch.turn = get_hub().loop.iteration
            batch.loaded = True
            if batch.now >= batch.deadline:  # the hub was kept from ringing the alarm
                batch.expire()
                continue
            try:
                _attempts.apply(batch, self._resources[batch.key], 0.0)
                if batch.undo is not None:
                    self._resources[batch.key] = batch.undo.resource
            except BaseException as error:
                if ends_greenlet(batch, error):
                    raise
                if not batch.over():
                    batch.abort(without_our_frame(error))
            if batch.verdict is not None:  # of the transaction, which is everybody's
                self._spoiled = True
                return

    def _settle(self) -> None:
        """Leave out the batches of which nothing is to be saved."""
        for batch in list(self._at_hand.values()):
            verdict = batch.verdict
            if batch.over():
                self._leave_out(batch)
            elif isinstance(verdict, Conflict):
                self._replay(batch, _attempts.delay(batch, verdict))
                self._leave_out(batch)
            elif verdict is not None and not isinstance(verdict, Rejected):
                batch.end(save_failed(batch.key, verdict, doing="an operation"))
                self._leave_out(batch)
            elif self._spoiled or batch.broken is not None or not _attempts.has_news(batch):
                replay = (self._spoiled or batch.broken is not None) and (batch.open or is_left(batch))
                self._reason = self._reason if batch.broken is None else batch.broken
                batch.broken = None  # whose traceback leads back here
                self._replay(batch, 0.0 if replay or settle(batch) else None)
                self._leave_out(batch)

    # -- save ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        batches = list(self._at_hand.values())
        if batches:
            self._bulk.follow(batches[0])
            if batches[0].now >= batches[0].deadline:  # after work that never yielded
                batches[0].expire()
        if not batches or batches[0].over():
            self._leave_for(TimeoutError("the deadline of the bulk has passed") if batches else self._reason)
            return
        begun = self._begin("save", batches)
        raised: BaseException | None = None
        try:
            self._context.run(self._leave, None, None, None)
        except BaseException as error:
            raised = without_our_frame(error)
        now = _clock.monotonic()
        for batch in batches:
            batch.now = now
            batch.save_duration += now - begun
        took(batches[0], "save", now - begun)
        batches[0].over()
        if raised is not None:
            raised = kill_behind(batches[0], raised, sys.exc_info()[1])
        try:
            if raised is not None and ends_greenlet(batches[0], raised):
                raise raised
            self._end(batches, raised)
        finally:
            del raised  # no cycle through the error

    def _end(self, batches: list[Batch], raised: BaseException | None) -> None:
        """Give *batches* their outcomes, after a save that *raised* something or not."""
        if isinstance(raised, PartlySaved):
            try:
                lost = errors_of(raised, self._at_hand)
            except TypeError as error:
                raised = error.with_traceback(None)  # our frames hold the operations of all
            else:
                for batch in batches:
                    self._end_one(batch, lost.get(batch.key))
                return
        if isinstance(raised, Rejected) and len(batches) > 1 and not batches[0].over():
            self._halve(batches)
            return
        for batch in batches:
            self._end_one(batch, raised)

    def _end_one(self, batch: Batch, raised: BaseException | None) -> None:
        if raised is not None:
            self._replay(batch, _attempts.save_raised(batch, raised))
        elif not batch.parts:
            batch.end()
        elif not batch.ended and settle(batch):
            self._replay(batch, 0.0)

    def _halve(self, batches: list[Batch]) -> None:
        """Find the key for which the store refused all of them: by a round of each half."""
        for batch in batches:
            batch.phase = "operations"
            batch.rejections += 1
        middle = len(batches) // 2
        self._bulk.again(batches[middle:])
        self._bulk.again(batches[:middle])

    def _leave_for(self, reason: BaseException) -> None:
        """Leave the scope without saving. What it makes of that is ignored, unless it was killed."""
        first = self._batches[0]
        try:
            self._context.run(self._leave, type(reason), reason, traceback_of(reason))
        except BaseException as error:
            first.over()
            if error is not reason and ends_greenlet(first, error):
                raise
        else:
            first.over()

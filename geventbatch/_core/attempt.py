"""An attempt: the way of one batch from load to save, on one greenlet, and again after a conflict.

A user's function runs in each phase, and while it runs the deadline may pass, the greenlet may be killed, the process
may be forked. So after each the first question is `Attempt.over`: whether the outcome was fixed meanwhile. (On the way
that every batch goes, its two conditions are asked without the call.) Whatever happens, the scope that was entered is
left, and `Batch.end` has been called before `run` returns.

The batches of a bulk have an attempt each: `bulk` loads and saves for all of them, and has each do the rest.
"""

from __future__ import annotations

import sys
from contextvars import Context
from math import inf
from typing import TYPE_CHECKING, Any, Literal, final

import gevent

from geventbatch._check_callables import NOT_OPENED, blame_opener
from geventbatch._core import process
from geventbatch._core.applying import apply, has_news
from geventbatch._core.batch_turns import BRIEF, take_breath, took
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import is_left, settle
from geventbatch._core.hub_turns import pace
from geventbatch._core.pair import PairScope
from geventbatch._core.process import here, running
from geventbatch._core.replay import back_off, delay, save_raised
from geventbatch._core.verdict import ends_greenlet, is_reused, kill_behind, traceback_of, without_our_frame
from geventbatch._failure import load_failed, save_failed, timed_out
from geventbatch._watch import log
from geventbatch._watch.stats import stack_of
from geventbatch.errors import Conflict, NothingToSave, Rejected

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from geventbatch._core.batch import Batch
    from geventbatch._core.deadline import Alarm
    from geventbatch._core.operation import Operation
    from geventbatch._core.steps import Steps
    from geventbatch._core.undo import Undo
    from geventbatch.errors import NotSaved, Phase

    _Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], object]


@final
class Attempt:
    """One batch's way from load to save."""

    __slots__ = (
        "after",
        "alarm",
        "alone",
        "aside",
        "asked",
        "attempts",
        "batch",
        "broken",
        "bulk",
        "completed",
        "conflict",
        "conflict_of_load",
        "conflicts",
        "context",
        "cut_off",
        "deadline",
        "deleted",
        "dispatcher",
        "doubted",
        "fatal",
        "load_duration",
        "mates",
        "must_look",
        "now",
        "outcomes",
        "outer",
        "parts",
        "paused_at",
        "phase",
        "rejections",
        "rows_added",
        "save_duration",
        "saved",
        "scope",
        "spent",
        "started",
        "steps",
        "stepwise",
        "turn",
        "undo",
        "verdict",
    )

    # -- mutable state: the attempt at hand ----------------------------------------------------------------
    scope: Any  # what `open_resource` gave
    saved: Any  # what that has still to do when it is saved; not there for a load and save pair
    completed: int  # operations that returned
    rows_added: list[tuple[int, object]]  # how many operations had returned by then (-1 in the load), and what
    outcomes: dict[str, str]  # by idempotency key, for the store to record with the save (see `once`)
    deleted: bool  # the last operation that returned deletes the resource
    cut_off: bool  # what is behind it is applied to what the next load gives, as also behind such a deletion
    must_look: bool  # no operation is to be applied any more; or there is something to see to behind each, or this one
    doubted: bool  # the scope has to look at what the operation at hand has done
    steps: Steps | None  # what judges the attempt step by step
    broken: BaseException | None  # what the first broken operation raised
    verdict: NotSaved | None  # of the scope, on what an operation did: it cannot be saved any more
    # -- mutable state: over all attempts of the batch -----------------------------------------------------
    phase: Phase | Literal["replay"]  # "replay" is the wait before one
    context: Context  # of its loads and saves (guarantee 11)
    attempts: int
    conflicts: int
    conflict: Conflict | None  # that it waits to replay for,
    conflict_of_load: bool  # or, if not, of its save; not there before the first one
    rejections: int  # operations or saves that the store refused
    parts: list[list[Operation[Any]]]  # those that are not settled, the last one first (see `halving`)
    stepwise: bool  # its attempts are judged step by step, where the scope can
    asked: list[Operation[Any]] | None  # that raised, whose idempotency keys are still to be looked for in the store
    undo: Undo | None  # there once an operation that raised had to be undone
    after: list[Any] | None  # what the scopes that saved it have still to do, if any
    bulk: dict[Any, Batch] | None  # by key: those that are loaded with it, or to be saved with it; None: no bulk
    # -- mutable state: the stopwatch ----------------------------------------------------------------------
    now: float  # the time, as it was last read
    turn: int  # of the hub, as it was last seen; -1 if unknown
    load_duration: float
    save_duration: float
    aside: float  # seconds in which it waited to replay, or left its scope without saving
    deadline: float
    paused_at: float | None  # there while it pauses: the deadline is to be moved by as long
    # -- mutable state: the greenlet that runs it ----------------------------------------------------------
    spent: bool  # runs no other batch
    fatal: BaseException | None  # and ends of this
    outer: Attempt | None  # it runs inside of that one (of another processor)
    mates: dict[Attempt, None] | None  # share its deadline, itself too (see `bulk`)

    def __init__(self, batch: Batch, alarm: Alarm | None, now: float) -> None:
        """Begin to run *batch* at *now*, watched by *alarm*: there is none where no hub could ring it."""
        dispatcher = batch.dispatcher
        self.batch = batch
        self.dispatcher = dispatcher
        self.alone = batch.key_queue is None
        self.alarm = alarm
        self.context = Context()
        self.started = self.now = now
        self.deadline = now + dispatcher.options.max_duration
        # One is made for each batch: values that many share are stored in a row, which is quick.
        self.broken = self.conflict = self.fatal = self.outer = self.paused_at = None
        self.scope = self.verdict = self.mates = self.steps = self.undo = self.after = self.bulk = self.asked = None
        self.spent = self.deleted = self.doubted = self.stepwise = self.cut_off = self.must_look = False
        self.completed = self.attempts = self.conflicts = self.rejections = 0
        self.rows_added = []
        self.outcomes = {}
        self.parts = []
        self.phase = "load"
        self.turn = -1
        self.load_duration = self.save_duration = self.aside = 0.0
        batch.attempt = self

    # -- what operations and scopes ask for ---------------------------------------------------------------

    def remaining(self) -> float:
        """Seconds until the deadline. Switches: no."""
        return self.deadline - (_clock.monotonic() if self.paused_at is None else self.paused_at)

    def add_row(self, row: object) -> None:
        """Have *row* inserted with the save."""
        self.rows_added.append((-1 if self.phase == "load" else self.completed, row))
        if self.phase == "operations":
            self.must_look = True  # so that it is looked at when the operation has returned

    def delete(self) -> None:
        """Have the resource deleted with the save."""
        self.deleted = self.must_look = True

    def doubt(self) -> None:
        """Have the scope look at what the operation at hand has done, or the first one, when that has returned."""
        self.doubted = self.must_look = True

    def cut(self) -> None:
        """Have the operations behind the one at hand applied to what the next load gives."""
        self.cut_off = self.must_look = True

    def begin_again(self) -> None:
        """Begin another attempt: forget what the one before has left."""
        self.phase = "load"
        self.completed = 0
        self.broken = self.verdict = self.steps = self.conflict = None
        self.deleted = self.doubted = self.cut_off = False
        self.must_look = self.batch.ended
        self.rows_added = []
        self.outcomes = {}

    def forget_operation(self) -> None:
        """The operation at hand has raised: what it wanted of the store is void."""
        while self.rows_added and self.rows_added[-1][0] == self.completed:
            self.rows_added.pop()
        self.deleted = self.doubted = self.cut_off = False
        self.must_look = self.batch.ended or self.steps is not None

    # -- the deadline, and other ends ---------------------------------------------------------------------

    def over(self) -> bool:
        """Whether the outcome was fixed while a user's function ran. In a child of a fork, never return."""
        if self.batch.epoch != here.epoch:
            process.park()
        return self.batch.ended

    def pause(self) -> None:
        """Let the hub have a turn, at no cost to the deadline (guarantee 10). Switches: yes."""
        begun = self.paused_at = _clock.monotonic()
        try:
            pace.wait()
        finally:
            self.deadline += _clock.monotonic() - begun
            self.paused_at = None

    def expire(self) -> None:
        """The deadline has passed; its greenlet is not used again (guarantee 11)."""
        for one in (self,) if self.mates is None else tuple(self.mates):
            one.time_out()

    def time_out(self) -> None:
        """Answer the callers of the batch, after the deadline has passed."""
        self.spent = True
        phase = self.phase
        if phase == "replay":
            if self.conflict is not None:  # nothing was written
                self.give_up_replay(self.conflict, ", and max_duration passed before the replay")
            return
        failure = timed_out(self.batch.key, phase, self.dispatcher.options.max_duration, stack_of(self))
        if phase == "load":
            self.batch.fail_load(failure)
        else:
            self.batch.end(failure)

    def give_up_replay(self, conflict: Conflict, why: str) -> None:
        """There is no replay after *conflict*."""
        if self.conflict_of_load:
            self.batch.fail_load(load_failed(self.batch.key, conflict, why))
        else:
            self.batch.end(save_failed(self.batch.key, conflict, why))

    # -- from its start to its end ------------------------------------------------------------------------

    def run(self, slice_end: float = inf) -> None:
        """Run the batch in the current greenlet, until its code has returned. Raises what ends the greenlet."""
        alarm = self.alarm
        current = gevent.getcurrent() if alarm is None else alarm.greenlet
        if self.alone:  # else this greenlet is a worker's, and inside of nothing
            self.outer = running.get(current)
        else:
            self.turn = here.hub.loop.iteration
        running[current] = self
        if alarm is not None:
            alarm.attempt = self
            if not alarm.armed:
                alarm.arm()
        try:
            if self.batch.epoch != here.epoch:
                self.over()
            while self._try(slice_end) and take_breath(self, slice_end):
                pass
        except BaseException as error:  # in a wait of our own: a kill, or a Timeout that is not the batch's
            self.abort(error)
        finally:
            if alarm is not None:
                alarm.attempt = None
            if self.outer is None:
                running.pop(current, None)
            else:
                running[current] = self.outer
        if self.fatal is not None:
            raise self.fatal

    def run_after(self) -> None:
        """Call what the scopes have still to do when their save is answered: in no batch, and without a deadline."""
        current = gevent.getcurrent()
        self.outer = process.after.get(current)
        process.after[current] = self
        hooks, self.after = self.after or (), None
        try:
            for hook in hooks:
                try:
                    self.context.run(hook)
                except (Exception, gevent.Timeout) as error:
                    if self.alone and isinstance(error, gevent.Timeout):
                        raise  # taken for the caller's own
                    log.error("after the batch of key %s was saved and answered", self.batch.key, error=error)
                if self.batch.epoch != here.epoch:
                    process.park()
        finally:
            if self.outer is None:
                process.after.pop(current, None)
            else:
                process.after[current] = self.outer

    def _try(self, slice_end: float) -> bool:  # noqa: C901 - every batch passes it: a call more costs each
        """Load, apply, save. True when the batch is to be replayed."""
        batch = self.batch
        leave, resource = self._load()
        if leave is None:
            return resource is not None and back_off(self, delay(self, resource, loading=True))
        killed = None
        try:
            if self.now >= self.deadline:  # the load kept the hub from ringing the alarm
                self.expire()
            batch.loaded = True
            self.phase = "operations"
            if batch.ended or batch.epoch != here.epoch:
                self.over()
            else:
                apply(self, resource, slice_end)
                if self.asked and not batch.ended and self.broken is self.verdict is None:
                    self.dispatcher.options.idempotency.ask(self)
                if self.now >= self.deadline and has_news(self) and self.broken is self.verdict is None:
                    self.expire()  # after work that never yielded
        except BaseException as error:
            killed = error
            self.over()
            self.abort(error)
        if batch.ended:  # and `over` was asked since the last function of the user's
            reason = self.broken if killed is None else killed
            self._leave(leave, TimeoutError("the deadline of the batch has passed") if reason is None else reason)
            self.broken = None  # whose traceback leads back here
            return False
        if self.verdict is not None and not isinstance(self.verdict, Rejected):
            return self._give_up(leave, self.verdict)
        if self.broken is not None:  # the resource must not be saved: replay without what broke it
            replay = batch.open or self.asked or is_left(self)
            return self._give_up(leave, self.broken, replay=bool(replay) or settle(self))
        if not has_news(self) and not self._compares():  # there is nothing to save
            # What is behind it is settled first, since it does not depend on how the scope is left.
            return self._give_up(leave, NothingToSave(), replay=settle(self))
        return self._save(leave)

    def _compares(self) -> bool:
        """Whether the scope has to compare, though there is nothing to save; then see to it that it saves nothing."""
        if is_reused(self) or getattr(self.scope, "must_compare", False):
            self.completed = 0
            return True
        return False

    def _give_up(self, leave: _Exit, reason: BaseException, *, replay: bool = False) -> bool:
        """Leave the scope for *reason*, without saving. True when the batch is to be replayed."""
        verdict = self.verdict
        if verdict is not None and not isinstance(verdict, (Conflict, Rejected)):
            self.batch.end(save_failed(self.batch.key, verdict, doing="an operation"))
        self._leave(leave, reason)
        self.broken = None  # whose traceback leads back here
        if self.over():
            return False
        return back_off(self, delay(self, self.verdict)) if isinstance(self.verdict, Conflict) else replay

    def _leave(self, leave: _Exit, reason: BaseException) -> None:
        """Leave the scope without saving. What it makes of that is ignored, unless it was killed."""
        begun = _clock.monotonic()
        try:
            self.context.run(leave, type(reason), reason, traceback_of(reason))
        except BaseException as error:
            self.over()
            if error is not reason and ends_greenlet(self, error):
                self.abort(error)
        else:
            self.over()
        self.now = _clock.monotonic()
        self.aside += self.now - begun

    def abort(self, error: BaseException) -> None:
        """End it, if it has no outcome yet, because it was killed by *error*."""
        if ends_greenlet(self, error):
            self.fatal = error
        self.batch.abort(error)

    # -- load ---------------------------------------------------------------------------------------------

    def _load(self) -> tuple[_Exit | None, Any]:
        """Enter the scope; give what leaves it, and the resource. If that fails: None, and the `Conflict`, if any."""
        if self.attempts:
            self.begin_again()
        self.attempts += 1
        begun, dispatcher = self.now, self.dispatcher
        scope: Any = NOT_OPENED
        try:
            if dispatcher.subscriptions:
                self.context = dispatcher.announce([self.batch], self.context)
            enter = self.context.run
            pair = dispatcher.pair
            if pair is not None:
                self.scope = scope = PairScope(pair, self.batch.key)
            else:
                self.scope = scope = enter(dispatcher.options.open_resource, self.batch.key)
                self.saved = getattr(scope, "saved", None)
            return scope.__exit__, enter(scope.__enter__)
        except BaseException as error:
            return None, self._load_raised(blame_opener(error, "open_resource", scope))
        finally:
            self.now = _clock.monotonic()
            seconds = self.now - begun
            self.load_duration += seconds
            if seconds > BRIEF:
                took(self, "load", seconds)

    def _load_raised(self, error: BaseException) -> Conflict | None:
        if self.over() or ends_greenlet(self, error):
            self.abort(error)
        elif isinstance(error, Conflict):
            return without_our_frame(error)
        else:
            self.spent = not isinstance(error, Exception)
            self.batch.fail_load(load_failed(self.batch.key, without_our_frame(error)))
        return None

    # -- save ---------------------------------------------------------------------------------------------

    def _save(self, leave: _Exit) -> bool:
        begun = self.now
        self.phase = "save"
        raised: BaseException | None = None
        try:
            self.context.run(leave, None, None, None)
        except BaseException as error:
            raised = without_our_frame(error)
        self.now = _clock.monotonic()
        seconds = self.now - begun
        self.save_duration += seconds
        if seconds > BRIEF:
            took(self, "save", seconds)
        if raised is not None:
            try:
                return back_off(self, save_raised(self, kill_behind(self, raised, sys.exc_info()[1])))
            finally:
                del raised  # no cycle through the error
        batch = self.batch
        if batch.epoch != here.epoch:
            self.over()
        if self.dispatcher.pair is None and callable(self.saved):
            self.after = [*(self.after or ()), self.saved]
        if self.parts:
            return not batch.ended and settle(self)
        batch.end()
        return False

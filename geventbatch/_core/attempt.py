"""An attempt: the way of one batch from load to save, on one greenlet, and again after a conflict.

Each phase runs functions of the user. Meanwhile the deadline may pass, the greenlet may be killed, the process may be
forked. So after each function, `Attempt.over` comes first (the hot path tests its conditions itself). Every path exits
the scope that was entered, and calls `Batch.end` before `run` returns. In a bulk, each batch has an attempt.
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
from geventbatch._core.batch_turns import BRIEF, let_callers_come_back, take_breath, took
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import is_left, settle
from geventbatch._core.hub_turns import pace
from geventbatch._core.pair import PairScope
from geventbatch._core.process import here, running, unforked
from geventbatch._core.replay import back_off, delay, save_raised
from geventbatch._core.verdict import ends_greenlet, is_reused, kill_behind, traceback_of, without_our_frame
from geventbatch._failure import load_failed, save_failed, timed_out
from geventbatch._watch import log
from geventbatch._watch.stats import stack_of
from geventbatch.errors import Conflict, NothingToSave, Rejected

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
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
    """One batch's way from load to save. It serves all attempts; `begin_again` resets what belongs to one."""

    __slots__ = (
        "after",
        "alarm",
        "apart",
        "aside",
        "asked",
        "batch",
        "broken",
        "bulk",
        "committed",
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
        "loaded_with",
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
    scope: Any  # the resource scope that `open_resource` returned
    saved: Any  # its hook to call after the save; unset for a load and save pair
    completed: int  # operations that returned
    rows_added: list[tuple[int, object]] | None  # operations that had returned by then (-1 in the load), and the row
    outcomes: dict[str, str] | None  # by idempotency key, for the store to record with the save (see `once`)
    committed: bool  # COMMIT was answered, and the store gives its connection back: whatever ends that, it is saved
    deleted: tuple[Hashable, ...]  # the keys that the last operation that returned deletes
    cut_off: bool  # later operations are applied to the next load's resource, as also after such a deletion
    must_look: bool  # after the operation at hand `look` is called: the batch has ended, or there is something to do
    doubted: bool  # the scope has to look at the effects of the operation at hand
    steps: Steps | None  # judges the attempt step by step
    broken: BaseException | None  # the error of the first broken operation
    verdict: NotSaved | None  # of the scope, on an operation: the attempt cannot be saved any more
    # -- mutable state: over all attempts of the batch -----------------------------------------------------
    phase: Phase | Literal["replay"]  # "replay" is the wait before one
    context: Context  # of its loads and saves (guarantee 11)
    conflicts: int
    conflict: Conflict | None  # the reason of the replay that it waits for
    conflict_of_load: bool  # the last conflict came from a load, not a save; unset before the first conflict
    rejections: int  # operations or saves that the store refused
    loaded_with: int  # keys of the bulk that it was loaded with; 0 without one
    parts: list[list[Operation[Any]]] | None  # the parts that are not settled, the last one first (see `halving`)
    stepwise: bool  # attempts are judged step by step, where the scope can
    asked: list[Operation[Any]] | None  # operations that raised, whose idempotency keys the store must be asked for
    undo: Undo | None  # set once an operation that raised had to be undone
    after: list[Any] | None  # hooks of the scopes that saved it, to call after the answers
    apart: bool  # it needs a scope without the others of its bulk
    bulk: dict[Any, Batch] | None  # by key: the batches loaded with it, or to be saved with it; None without a bulk
    # -- mutable state: the stopwatch ----------------------------------------------------------------------
    now: float  # monotonic seconds when the clock was last read
    turn: int  # the hub's iteration when it was last read; -1 if unknown
    load_duration: float  # seconds, as also the next two
    save_duration: float
    aside: float  # spent waiting for a replay, or exiting the scope without a save
    deadline: float  # monotonic seconds
    paused_at: float | None  # monotonic seconds; set during a pause, whose length is added to the deadline
    # -- mutable state: the greenlet that runs it ----------------------------------------------------------
    spent: bool  # the greenlet runs no other batch
    fatal: BaseException | None  # the greenlet ends with this
    outer: Attempt | None  # the attempt (of another processor) that this one runs inside
    mates: dict[Attempt, None] | None  # the attempts of its bulk, itself included: they share its deadline

    def __init__(self, batch: Batch, alarm: Alarm | None, now: float, context: Context | None = None) -> None:
        """Begin to run *batch* at *now*, watched by *alarm*; *alarm* is None in a thread without a hub."""
        dispatcher = batch.dispatcher
        self.batch = batch
        self.dispatcher = dispatcher
        self.alarm = alarm
        self.context = Context() if context is None else context
        self.started = self.now = now
        self.deadline = now + dispatcher.options.max_duration
        # Every batch pays for this: an assignment to many attributes is the quickest way to fill them.
        self.broken = self.conflict = self.fatal = self.outer = self.paused_at = self.saved = None
        self.scope = self.verdict = self.mates = self.steps = self.undo = self.after = self.bulk = self.asked = None
        self.deleted = ()
        self.spent = self.doubted = self.stepwise = self.cut_off = self.must_look = self.apart = self.committed = False
        self.completed = self.conflicts = self.rejections = self.loaded_with = 0
        self.rows_added = self.outcomes = self.parts = None
        self.phase, self.turn = "load", -1
        self.load_duration = self.save_duration = self.aside = 0.0
        batch.attempt = self

    # -- called by operations and scopes ------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        """Return whether its caller runs it, in a greenlet or thread of its own."""
        return self.batch.key_queue is None

    def remaining(self) -> float:
        """Return the seconds until the deadline. Switches: no."""
        return self.deadline - (_clock.monotonic() if self.paused_at is None else self.paused_at)

    def add_row(self, row: object) -> None:
        """Keep *row* for the save to insert."""
        if self.rows_added is None:
            self.rows_added = []
        self.rows_added.append((-1 if self.phase == "load" else self.completed, row))
        if self.phase == "operations":
            self.must_look = True  # so that it is copied when the operation has returned

    def record(self, idempotency_key: str, outcome: str) -> None:
        """Keep *outcome* for the save to record."""
        if self.outcomes is None:
            self.outcomes = {}
        self.outcomes[idempotency_key] = outcome

    def delete(self, key: Hashable) -> None:
        """Mark the resource at *key* to be deleted with the save."""
        if key not in self.deleted:
            self.deleted = (*self.deleted, key)
        self.must_look = True

    def doubt(self) -> None:
        """Let the scope look at the operation at hand (in a load: the first operation) when it has returned."""
        self.doubted = self.must_look = True

    def cut(self) -> None:
        """Apply the operations behind the one at hand to the resource of another load."""
        self.cut_off = self.must_look = True

    def begin_again(self) -> None:
        """Begin another attempt: reset the state of the one before."""
        self.phase = "load"
        self.completed = 0
        self.broken = self.verdict = self.steps = self.conflict = None
        self.deleted, self.doubted, self.cut_off = (), False, False
        self.must_look = self.batch.ended
        self.rows_added = self.outcomes = None

    def forget_operation(self) -> None:
        """Drop the rows, the deletion and the marks of the operation at hand, which has raised."""
        while self.rows_added and self.rows_added[-1][0] == self.completed:
            self.rows_added.pop()
        self.deleted = ()
        self.doubted = self.cut_off = False
        self.must_look = self.batch.ended or self.steps is not None

    # -- the deadline, and other ends ---------------------------------------------------------------------

    def over(self) -> bool:
        """Return whether the outcome was fixed while a user's function ran. In a child of a fork, never return."""
        if self.dispatcher.epoch != here.epoch:
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
        """End the batch (or its whole bulk) at the deadline; the greenlet is not used again (guarantee 11)."""
        for one in (self,) if self.mates is None else tuple(self.mates):
            one.time_out()

    def time_out(self) -> None:
        """Answer the callers of the batch, after the deadline has passed."""
        self.spent = True
        if self.committed and not settle(self):
            return
        phase = self.phase
        if phase == "replay":
            if self.conflict is not None:  # nothing was written
                self.give_up_replay(self.conflict, ", and max_duration passed before the replay")
            return
        late = 0.0 if self.alarm is None else -self.remaining()
        failure = timed_out(self.batch.key, phase, self.dispatcher.options.max_duration, stack_of(self), late)
        (self.batch.fail_load if phase == "load" else self.batch.end)(failure)

    def give_up_replay(self, conflict: Conflict, why: str) -> None:
        """End the batch with *conflict*, without another replay, for the reason *why*."""
        if self.conflict_of_load:
            self.batch.fail_load(load_failed(self.batch.key, conflict, why))
        else:
            self.batch.end(save_failed(self.batch.key, conflict, why))

    # -- from its start to its end ------------------------------------------------------------------------

    def run(self, slice_end: float = inf) -> None:
        """Run the batch in the current greenlet, until its code has returned. Raise what ends the greenlet."""
        alarm = self.alarm
        current = gevent.getcurrent() if alarm is None else alarm.greenlet
        if self.batch.key_queue is None:  # a worker's greenlet is never inside another attempt
            self.outer = running.get(current)
        else:
            self.turn = here.hub.loop.iteration
        running[current] = self
        if alarm is not None:
            alarm.attempt = self
            if not alarm.armed:
                alarm.arm()
        try:
            if not unforked or self.dispatcher.epoch != here.epoch:
                process.leave_to_parent(self.dispatcher)
            while self._try(slice_end) and take_breath(self, slice_end):
                pass
        except BaseException as error:  # thrown into a wait of our own: a kill, or a Timeout that is not the batch's
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
        """Call the scopes' hooks for the time after the answers: outside any batch, without a deadline."""
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
                        raise  # it counts as the caller's own
                    log.error("after the batch of key %s was saved and answered", self.batch.key, error=error)
                self.over()
        finally:
            if self.outer is None:
                process.after.pop(current, None)
            else:
                process.after[current] = self.outer

    def _try(self, slice_end: float) -> bool:  # noqa: C901 - every batch passes it: a call more costs each
        """Load, apply, save. Return True if the batch is to be replayed."""
        batch = self.batch
        leave, found = self._load()
        if leave is None:
            return found is not None and back_off(self, delay(self, found, loading=True))
        killed = None
        try:
            if not pace.idle() and not self.alone and is_reused(self):
                let_callers_come_back(self)
            if self.now >= self.deadline:  # the load never yielded, so the alarm could not ring
                self.expire()
            batch.loaded = True
            self.phase = "operations"
            if batch.ended or self.dispatcher.epoch != here.epoch:
                self.over()
            else:
                apply(self, found, slice_end)
                if self.asked and not batch.ended and self.broken is self.verdict is None:
                    self.dispatcher.options.idempotency.ask(self)
                    self.now = _clock.monotonic()
                if self.now >= self.deadline and has_news(self) and self.broken is self.verdict is None:
                    self.expire()  # the operations never yielded, so the alarm could not ring
        except BaseException as error:
            killed = error
            self.over()
            self.abort(error)
        if batch.ended:  # no need for `over`: no function of the user's ran since it was called
            reason = self.broken if killed is None else killed
            self._leave(leave, TimeoutError("the deadline of the batch has passed") if reason is None else reason)
            self.broken = None  # its traceback refers to this frame: no cycle
            return False
        if self.verdict is not None and not isinstance(self.verdict, Rejected):
            return self._give_up(leave, self.verdict)
        if self.broken is not None:  # the resource must not be saved: replay without the broken operation
            replay = batch.open or self.asked or is_left(self)
            return self._give_up(leave, self.broken, replay=bool(replay) or settle(self))
        if not has_news(self) and not self._compares():  # there is nothing to save
            # The part is settled before the scope is exited: its outcome does not depend on that exit.
            return self._give_up(leave, NothingToSave(), replay=settle(self))
        return self._save(leave)

    def _compares(self) -> bool:
        """Return whether the scope must compare though there is nothing to save. If so, make it save nothing."""
        if is_reused(self) or getattr(self.scope, "must_compare", False):
            self.completed = 0
            return True
        return False

    def _give_up(self, leave: _Exit, reason: BaseException, *, replay: bool = False) -> bool:
        """Exit the scope with *reason*, without a save. Return True if the batch is to be replayed."""
        verdict = self.verdict
        if verdict is not None and not isinstance(verdict, (Conflict, Rejected)):
            self.batch.end(save_failed(self.batch.key, verdict, doing="an operation"))
        self._leave(leave, reason)
        self.broken = None  # its traceback refers to this frame: no cycle
        if self.over():
            return False
        return back_off(self, delay(self, self.verdict)) if isinstance(self.verdict, Conflict) else replay

    def _leave(self, leave: _Exit, reason: BaseException) -> None:
        """Exit the scope without a save. Ignore what its exit raises, unless that is a kill."""
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
        """End the batch, if it has no outcome yet, because *error* killed it."""
        if ends_greenlet(self, error):
            self.fatal = error
        self.batch.abort(error)

    # -- load ---------------------------------------------------------------------------------------------

    def _load(self) -> tuple[_Exit | None, Any]:
        """Enter the scope. Return its exit and the resource; or None and the `Conflict`, if loading raised one."""
        if self.batch.attempts:
            self.begin_again()
        self.batch.attempts += 1
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
                self.scope = scope = enter(self.batch.opener(dispatcher.options), self.batch.key)
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
        if not unforked:
            process.leave_to_parent(self.dispatcher)
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
                del raised  # its traceback refers to this frame: no cycle
        batch = self.batch
        if self.dispatcher.epoch != here.epoch:
            self.over()
        if callable(self.saved):
            self.after = [*(self.after or ()), self.saved]
        if self.parts:
            return not batch.ended and settle(self)
        batch.end()
        return False

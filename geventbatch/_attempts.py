"""The way of a batch from load to save, on one greenlet: the attempts that it takes, and each one's phases.

A user's function runs in each phase, and while it runs the deadline may pass, the greenlet may be killed, the process
may be forked. So after each the first question is `Batch.over`: whether the outcome was fixed meanwhile. (On the way
that every batch goes, its two conditions are asked without the call.) Whatever happens, the scope that was entered is
left, and `Batch.end` has been called before `run` returns.
"""

from __future__ import annotations

import sys
from contextvars import Context
from math import inf
from random import random
from typing import TYPE_CHECKING, Any, Final

import gevent

from geventbatch import _process, _report
from geventbatch._answer import PLAIN, own_answer
from geventbatch._callables import NOT_OPENED, told
from geventbatch._clock import clock as _clock
from geventbatch._failure import load_failed, save_failed
from geventbatch._operation import BROKEN, STARTED
from geventbatch._parts import apply_again, current_part, is_left, settle, split
from geventbatch._process import here, running
from geventbatch._scope import PairScope
from geventbatch._steps import begin_steps
from geventbatch._turns import BRIEF, see_to_window, shut, take_breath, take_turns, took
from geventbatch._undo import raised
from geventbatch._verdict import (
    ends_greenlet,
    has_steps,
    is_reused,
    kill_behind,
    look,
    traceback_of,
    without_our_frame,
)
from geventbatch.errors import Conflict, NothingToSave, Rejected, Repeated

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from geventbatch._alarm import Alarm
    from geventbatch._batch import Batch
    from geventbatch._operation import Operation

    _Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], object]

_FIRST_BACKOFF: Final = 0.005
_LONGEST_BACKOFF: Final = 0.1


_PLAIN: Final = PLAIN

_APPLIED: Final = frozenset({STARTED, BROKEN})

_run_in: Final = Context.run  # without a bound method for each operation


def run(batch: Batch, alarm: Alarm | None, now: float, slice_end: float = inf) -> None:
    """Run *batch* in the current greenlet, from *now* until its code has returned. Raises what ends the greenlet."""
    current = gevent.getcurrent() if alarm is None else alarm.greenlet
    batch.outer = running.get(current)
    running[current] = batch
    batch.now = batch.started = now
    batch.deadline = now + batch.state.options.max_duration
    if alarm is not None:
        batch.alarm = alarm
        alarm.batch = batch
        if not alarm.armed:
            alarm.arm()
    batch.turn = -1 if batch.lane is None else here.hub.loop.iteration
    try:
        if batch.epoch != here.epoch:
            batch.over()
        while _attempt(batch, slice_end) and take_breath(batch, slice_end):
            pass
    except BaseException as error:  # in a wait of our own: a kill, or a Timeout that is not the batch's
        _abort(batch, error)
    finally:
        batch.returned = True
        batch.scope = batch.saved = batch.steps = batch.undo = None
        if batch.outer is None:
            running.pop(current, None)
        else:
            running[current] = batch.outer
    if batch.fatal is not None:
        raise batch.fatal


def run_after(batch: Batch) -> None:
    """Call what the scopes have still to do when their save is answered. It belongs to no batch and has no deadline."""
    current = gevent.getcurrent()
    batch.outer = _process.after.get(current)
    _process.after[current] = batch
    hooks, batch.after = batch.after, []
    try:
        for hook in hooks:
            try:
                batch.context.run(hook)
            except (Exception, gevent.Timeout) as error:
                if batch.lane is None and isinstance(error, gevent.Timeout):
                    raise  # taken for the caller's own
                _report.error("after the batch of key %s was saved and answered", batch.key, error=error)
            if batch.epoch != here.epoch:
                _process.park()
    finally:
        if batch.outer is None:
            _process.after.pop(current, None)
        else:
            _process.after[current] = batch.outer


def _attempt(batch: Batch, slice_end: float) -> bool:  # noqa: C901 - every batch passes it: a call more costs each
    """Load, apply, save. True when the batch is to be replayed."""
    leave, resource = _load(batch)
    if leave is None:
        return resource is not None and back_off(batch, delay(batch, resource, loading=True))
    killed = None
    try:
        if batch.now >= batch.deadline:  # the load kept the hub from ringing the alarm
            batch.expire()
        batch.loaded = True
        batch.phase = "operations"
        if batch.ended or batch.epoch != here.epoch:
            batch.over()
        else:
            apply(batch, resource, slice_end)
            if batch.asked and not batch.ended and batch.broken is batch.verdict is None:
                batch.state.options.idempotency.ask(batch)
            if batch.now >= batch.deadline and has_news(batch) and batch.broken is batch.verdict is None:
                batch.expire()  # after work that never yielded
    except BaseException as error:
        killed = error
        batch.over()
        _abort(batch, error)
    if batch.ended:  # and `over` was asked since the last function of the user's
        reason = batch.broken if killed is None else killed
        _leave(batch, leave, TimeoutError("the deadline of the batch has passed") if reason is None else reason)
        batch.broken = None  # whose traceback leads back here
        return False
    if batch.verdict is not None and not isinstance(batch.verdict, Rejected):
        return _give_up(batch, leave, batch.verdict)
    if batch.broken is not None:  # the resource must not be saved: replay without what broke it
        replay = batch.open or batch.asked or is_left(batch)
        return _give_up(batch, leave, batch.broken, replay=bool(replay) or settle(batch))
    if not has_news(batch) and not _compares(batch):  # there is nothing to save
        # What is behind it is settled first, since it does not depend on how the scope is left.
        return _give_up(batch, leave, NothingToSave(), replay=settle(batch))
    return _save(batch, leave)


def has_news(batch: Batch) -> bool:
    """Whether there is something to save."""
    if batch.reads and batch.completed and not batch.deleted and not batch.rows_added and not batch.outcomes:
        returned = (one for one in current_part(batch) if one.state in _APPLIED and one.error is None)
        return not all(one.read_only for one in returned)
    return bool(batch.completed or batch.outcomes)


def _compares(batch: Batch) -> bool:
    """Whether the scope has to compare, though there is nothing to save; then see to it that it saves nothing."""
    if is_reused(batch) or (len(batch.operations) > 1 and getattr(batch.scope, "must_compare", False)):
        batch.completed = 0
        return True
    return False


def _give_up(batch: Batch, leave: _Exit, reason: BaseException, *, replay: bool = False) -> bool:
    """Leave the scope for *reason*, without saving. True when the batch is to be replayed."""
    verdict = batch.verdict
    if verdict is not None and not isinstance(verdict, (Conflict, Rejected)):
        batch.end(save_failed(batch.key, verdict, doing="an operation"))
    _leave(batch, leave, reason)
    batch.broken = None  # whose traceback leads back here
    if batch.over():
        return False
    return back_off(batch, delay(batch, batch.verdict)) if isinstance(batch.verdict, Conflict) else replay


def _leave(batch: Batch, leave: _Exit, reason: BaseException) -> None:
    """Leave the scope without saving. What it makes of that is ignored, unless it was killed."""
    begun = _clock.monotonic()
    try:
        batch.context.run(leave, type(reason), reason, traceback_of(reason))
    except BaseException as error:
        batch.over()
        if error is not reason and ends_greenlet(batch, error):
            _abort(batch, error)
    else:
        batch.over()
    batch.now = _clock.monotonic()
    batch.aside += batch.now - begun


def _abort(batch: Batch, error: BaseException) -> None:
    """End *batch*, if it has no outcome yet, because it was killed by *error*."""
    if ends_greenlet(batch, error):
        batch.fatal = error
    batch.abort(error)


# -- load ---------------------------------------------------------------------------------------------------


def _load(batch: Batch) -> tuple[_Exit | None, Any]:
    """Enter the scope; give what leaves it, and the resource. When that fails: None, and a `Conflict` if it is one."""
    batch.phase = "load"
    batch.conflict = None
    if batch.attempts:
        batch.begin_attempt()
    batch.attempts += 1
    begun = batch.now
    scope: Any = NOT_OPENED
    try:
        if batch.state.subscriptions:
            batch.context = batch.state.announce([batch], batch.context)
        enter = batch.context.run
        pair = batch.state.pair
        if pair is not None:
            batch.scope = scope = PairScope(pair, batch.key)
        else:
            batch.scope = scope = enter(batch.state.options.open_resource, batch.key)
            batch.saved = getattr(scope, "saved", None)
        return scope.__exit__, enter(scope.__enter__)
    except BaseException as error:
        return None, _load_raised(batch, told(error, "open_resource", scope))
    finally:
        batch.now = _clock.monotonic()
        seconds = batch.now - begun
        batch.load_duration += seconds
        if seconds > BRIEF:
            took(batch, "load", seconds)


def _load_raised(batch: Batch, error: BaseException) -> Conflict | None:
    if batch.over() or ends_greenlet(batch, error):
        _abort(batch, error)
    elif isinstance(error, Conflict):
        return without_our_frame(error)
    else:
        batch.spent = not isinstance(error, Exception)
        batch.fail_load(load_failed(batch.key, without_our_frame(error)))
    return None


# -- operations ---------------------------------------------------------------------------------------------


def apply(batch: Batch, resource: Any, slice_end: float) -> None:
    """Apply the operations in order, those too that arrive while the window is open."""
    if batch.attempts > 1 and not _prepare(batch, resource):
        return
    if batch.parts:
        _apply_all(batch, batch.parts[-1], resource, slice_end)
        return
    applied = 0
    arrived = batch.operations  # while they are applied, this list grows
    due = slice_end
    if batch.now >= batch.window_end:
        shut(batch)
    else:
        due = see_to_window(batch, slice_end)
    while _apply_all(batch, arrived, resource, due):
        applied += len(arrived)
        if applied == len(batch.operations):
            if not batch.open:
                return
            batch.wait_for_operations(batch.window_end - batch.now)
            if batch.over():
                return
            batch.now = _clock.monotonic()
            batch.turn = here.hub.loop.iteration
            due = see_to_window(batch, slice_end)
        arrived = batch.operations[applied:]


def _prepare(batch: Batch, resource: Any) -> bool:
    """Be ready for another attempt, by what the ones before have shown. False when it ends here."""
    if batch.undo is not None:
        batch.undo.begin(batch, resource)
    if batch.stepwise and has_steps(batch):
        apply_again(batch)  # each is judged by itself from now on
    if batch.asked:
        batch.state.options.idempotency.ask(batch)
    if batch.over() or batch.verdict is not None:
        return False
    if batch.undo is not None and batch.undo.out:
        batch.undo.record_out(batch)
    return not batch.stepwise or begin_steps(batch, resource)


def _apply_all(  # noqa: C901, PLR0912 - the hot path stays in one piece
    batch: Batch, operations: list[Operation[Any]], resource: Any, due: float
) -> bool:
    """Apply *operations*, each once; from *due* on look at the time. False when the attempt ends here."""
    monotonic, plain = _clock.monotonic, _PLAIN
    if batch.steps is not None:
        if not batch.steps.look_for(batch, operations):
            return False
        resource = batch.steps.resource
    elif batch.undo is not None:
        resource = batch.undo.resource
    for operation in operations:
        if operation.state > STARTED:
            continue
        operation.state = STARTED
        try:
            value = _run_in(operation.context.copy(), operation.callable, resource, *operation.args)
            operation.value = value if type(value) in plain else own_answer(batch, operation, resource, value)
        except BaseException as error:
            if raised(batch, operation, error, resource, due):
                return False
            if batch.undo is not None:
                resource = batch.undo.resource
        else:
            operation.error = None
            batch.completed += 1
        if batch.halted or batch.epoch != here.epoch:
            if look(batch, operation):
                batch.now = _clock.monotonic()
                return False
            if batch.steps is not None:
                resource = batch.steps.resource
        now = monotonic()
        if now < due:
            batch.now = now
        else:
            due = take_turns(batch, operation, now)
            if batch.over():
                return False
    return True


# -- save ---------------------------------------------------------------------------------------------------


def _save(batch: Batch, leave: _Exit) -> bool:
    begun = batch.now
    batch.phase = "save"
    raised: BaseException | None = None
    try:
        batch.context.run(leave, None, None, None)
    except BaseException as error:
        raised = without_our_frame(error)
    batch.now = _clock.monotonic()
    seconds = batch.now - begun
    batch.save_duration += seconds
    if seconds > BRIEF:
        took(batch, "save", seconds)
    if raised is not None:
        try:
            return back_off(batch, save_raised(batch, kill_behind(batch, raised, sys.exc_info()[1])))
        finally:
            del raised  # no cycle through the error
    if batch.epoch != here.epoch:
        batch.over()
    if batch.state.pair is None and callable(batch.saved):
        batch.after = [*batch.after, batch.saved]
    if batch.parts:
        return not batch.ended and settle(batch)
    batch.end()
    return False


def save_raised(batch: Batch, error: BaseException) -> float | None:
    """Say what becomes of the batch, whose save raised *error*: seconds to wait before another attempt, or None."""
    replay = False
    if batch.over() or ends_greenlet(batch, error):
        _abort(batch, error)
    elif isinstance(error, Conflict):
        return delay(batch, error)
    elif isinstance(error, Rejected):
        replay = split(batch, error)
    elif isinstance(error, Repeated) and _settle_repeated(batch, error):
        replay = not batch.ended and _goes_on(batch)
    else:
        batch.spent = not isinstance(error, Exception)
        batch.end(save_failed(batch.key, error))
    return 0.0 if replay else None


def _settle_repeated(batch: Batch, error: Repeated) -> bool:
    """Give the outcomes that are recorded already to those who have the keys. False when nobody has."""
    batch.phase = "operations"  # nothing was written
    idempotency = batch.state.options.idempotency
    return idempotency is not None and idempotency.settle_repeated(batch, current_part(batch), error.outcomes)


def _goes_on(batch: Batch) -> bool:
    """Whether the part at hand, or one behind it, is to be tried again without those that are settled."""
    batch.phase = "load"
    return is_left(batch) or settle(batch)


def delay(batch: Batch, conflict: Conflict, *, loading: bool = False) -> float | None:
    """Give the seconds to wait before a replay; None when there is none to wait for, and the callers have been told."""
    apply_again(batch)  # somebody else has written since: those too that are out may come to something else now
    batch.conflicts += 1
    batch.state.counts.conflicts += 1
    batch.load_conflict = loading
    most = batch.state.options.max_attempts
    if batch.conflicts >= most:
        batch.fail_conflict(conflict, f" in attempt {batch.conflicts} of {most}")
        return None
    longest = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** min(batch.conflicts - 1, 10))
    seconds: float = random() * longest
    if _clock.monotonic() + seconds >= batch.deadline:
        batch.fail_conflict(conflict, ", and max_duration leaves no time for another attempt")
        return None
    batch.conflict = conflict
    batch.phase = "load"
    return seconds


def back_off(batch: Batch, seconds: float | None) -> bool:
    """Wait for *seconds* before a replay. False when there is none, or none any more. Switches: yes, unless it is 0."""
    if seconds is None:
        return False
    if seconds:
        begun = batch.now
        _process.sleep(seconds)
        batch.now = _clock.monotonic()
        batch.aside += batch.now - begun
        if batch.now >= batch.deadline:  # the hub was kept from ringing the alarm
            batch.expire()
    return not batch.over()

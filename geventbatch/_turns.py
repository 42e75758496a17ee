"""The hub's turns while a batch runs, and what kept it from having one (guarantee 10); and the end of the window."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Final

from geventbatch import _report
from geventbatch._clock import clock as _clock
from geventbatch._pace import pace
from geventbatch._process import here

if TYPE_CHECKING:
    from geventbatch._batch import Batch
    from geventbatch._operation import Operation

BRIEF: Final = 0.00005
"""Seconds: what is quicker is not asked whether it let the hub have a turn, since to ask would cost a share of it."""


def take_breath(batch: Batch, slice_end: float) -> bool:
    """Let the hub have a turn between two attempts, if it has gone long without. False when it is all over."""
    batch.now = _clock.monotonic()
    if slice_end < inf and batch.now >= pace.slice_end(batch.now):
        batch.pause()
        batch.now = _clock.monotonic()
    if batch.now >= batch.deadline and not batch.over():  # no load is begun that those behind would have to answer for
        batch.phase = "operations"
        batch.expire()
    return not batch.over()


def take_turns(batch: Batch, operation: Operation[Any], now: float) -> float:
    """Let the hub have a turn if it has gone long without; give when something is due again."""
    seconds = now - batch.now  # that *operation* took
    batch.now = now
    if seconds > BRIEF:
        took(batch, "operation", seconds, operation)
    if now >= batch.deadline:
        batch.expire()
        return now
    slice_end = pace.slice_end(now)
    if now >= slice_end:
        batch.pause()
        batch.now = _clock.monotonic()
        if batch.lane is not None:
            batch.turn = here.hub.loop.iteration
        slice_end = pace.slice_end(batch.now)
    return see_to_window(batch, slice_end)


def see_to_window(batch: Batch, slice_end: float) -> float:
    """Take no more operations when the window is over; give when something is due."""
    if batch.now >= batch.window_end:
        shut(batch)
        return slice_end
    return min(slice_end, batch.window_end)


def shut(batch: Batch) -> None:
    """Take no more operations: `Batch.close`, in the batch's own greenlet and for one that is open."""
    if batch.open:
        batch.open = False
        batch.closed = batch.now
        batch.waiting_at_close = batch.waiting


def took(batch: Batch, doing: str, seconds: float, operation: Operation[Any] | None = None) -> None:
    """Tell the operator of what took long, and of what kept the hub from having a turn. Switches: no.

    `Batch.turn` is the hub's turn as it was seen before.
    """
    if batch.lane is None:
        return
    turn = here.hub.loop.iteration
    state = batch.state
    if seconds > state.long and batch.epoch == here.epoch:
        if turn == batch.turn >= 0 and seconds > state.blocking:  # gevent's libuv loop does not count its turns
            _report.blocked(batch, doing, state.doing(doing) if operation is None else operation.callable, seconds)
        elif operation is None and seconds > state.slow and not batch.ended:  # else its failure is told
            _report.slow(batch, doing, seconds)
    batch.turn = turn

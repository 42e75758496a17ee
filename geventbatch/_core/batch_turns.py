"""Between two operations: a turn for the hub, a report of code that kept it (guarantee 10), the end of the window."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Final

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.cpu import OFTEN, cpu
from geventbatch._core.hub_turns import pace
from geventbatch._core.process import here, unforked
from geventbatch._watch import log

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.operation import Operation

BRIEF: Final = 0.00005
"""Seconds. Shorter calls are not checked for a yield, since the check would cost a good part of their time; nor for a
fork, which takes longer."""


def take_breath(attempt: Attempt, slice_end: float) -> bool:
    """Let the hub have a turn between two attempts, if it is due. Return False if the batch has ended."""
    attempt.now = _clock.monotonic()
    if slice_end < inf and attempt.now >= pace.slice_end(attempt.now):
        attempt.pause()
        attempt.now = _clock.monotonic()
    if attempt.now >= attempt.deadline and not attempt.over():
        attempt.expire()
    return not attempt.over()


def let_callers_come_back(attempt: Attempt) -> None:
    """Let the callers that are being answered go on, before a batch that loaded nothing takes its operations.

    A load would have given them the time. Else the first 32 that want the key again are a batch of their own, and the
    others wait for its save. It waits for nobody else: gates that are added meanwhile open behind it.
    """
    attempt.pause()
    attempt.now = _clock.monotonic()
    attempt.turn = here.hub.loop.iteration


def take_turns(attempt: Attempt, operation: Operation[Any], now: float) -> float:
    """Let the hub have a turn after *operation*, if it is due. Return the time at which something is due again."""
    seconds = now - attempt.now
    attempt.now = now
    if seconds > BRIEF:
        took(attempt, "operation", seconds, operation)
    if now >= attempt.deadline:
        attempt.expire()
        return now
    slice_end = pace.slice_end(now)
    if now >= slice_end:
        attempt.pause()
        attempt.now = _clock.monotonic()
        if not attempt.alone:
            attempt.turn = here.hub.loop.iteration
        slice_end = pace.slice_end(attempt.now)
    return see_to_window(attempt, slice_end)


def see_to_window(attempt: Attempt, slice_end: float) -> float:
    """Close the batch if its window is over. Return the time at which something is due."""
    if attempt.now >= attempt.batch.window_end:
        if attempt.batch.open:
            attempt.batch.shut(attempt.now)
        return slice_end
    return min(slice_end, attempt.batch.window_end)


def took(attempt: Attempt, doing: str, seconds: float, operation: Operation[Any] | None = None) -> None:
    """Log a load, an operation or a save that was slow, or that kept the hub without a yield. Switches: no.

    `Attempt.turn` is the hub's iteration before the call. It also notices a fork meanwhile, at which callers look next.
    """
    if not unforked:
        process.notice_fork()
    if attempt.alone:
        return
    turn = here.hub.loop.iteration
    dispatcher = attempt.dispatcher
    if seconds > dispatcher.long and attempt.dispatcher.epoch == here.epoch:
        used, in_vain = cpu.since()
        if turn == attempt.turn >= 0 and seconds - in_vain > dispatcher.blocking:  # libuv's loop does not count turns
            doer = dispatcher.doing(doing) if operation is None else operation.callable
            log.blocked(attempt.batch, doing, doer, seconds, used)
        elif operation is None and seconds > dispatcher.slow and not attempt.batch.ended:  # else its failure is logged
            log.slow(attempt.batch, doing, seconds)
    attempt.turn = turn
    if not 0 <= attempt.now - cpu.at < OFTEN:
        cpu.look(attempt.now)

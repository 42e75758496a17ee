"""Replay: decides what follows an attempt whose save has raised, and waits before another attempt after a conflict."""

from __future__ import annotations

from dataclasses import replace
from random import random
from typing import TYPE_CHECKING, Final

from geventbatch._core import process
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import current_part, is_left, readmit, settle, split
from geventbatch._core.verdict import ends_greenlet
from geventbatch._failure import save_failed
from geventbatch.errors import Conflict, Rejected, Repeated

if TYPE_CHECKING:
    from geventbatch._core.attempt import Attempt

_FIRST_BACKOFF: Final = 0.005
_LONGEST_BACKOFF: Final = 0.1


def save_raised(attempt: Attempt, error: BaseException) -> float | None:
    """Decide after a save that raised *error*. Return the seconds until another attempt, or None if none follows."""
    replay = False
    if attempt.over() or ends_greenlet(attempt, error):
        attempt.abort(error)
    elif attempt.committed:
        attempt.spent = True  # something like a Timeout of the pool's own
        replay = settle(attempt)
    elif isinstance(error, Conflict):
        return delay(attempt, error)
    elif isinstance(error, Rejected):
        replay = split(attempt, error)
    elif isinstance(error, Repeated) and _settle_repeated(attempt, error):
        replay = not attempt.batch.ended and (is_left(attempt) or settle(attempt))
    else:
        attempt.spent = not isinstance(error, Exception)
        failure = save_failed(attempt.batch.key, error)
        if isinstance(error, Repeated) and any(name in error.outcomes for name in attempt.outcomes or ()):
            failure = replace(failure, retry_safe=False)  # an earlier save has recorded it: something was saved
        attempt.batch.end(failure)
    return 0.0 if replay else None


def _settle_repeated(attempt: Attempt, error: Repeated) -> bool:
    """Answer the operations whose outcomes are recorded already. Return False if none waits for such an outcome."""
    attempt.phase = "operations"  # nothing was written
    if error.outcomes == {}:  # expired ones were in the way
        return True
    idempotency = attempt.dispatcher.options.idempotency
    if idempotency is None:
        return False
    found = error.outcomes
    if idempotency.settle_repeated(attempt, current_part(attempt), found):
        return True
    return not attempt.over() and bool(idempotency.settle_repeated(attempt, attempt.batch.operations, found))


def delay(attempt: Attempt, conflict: Conflict, *, loading: bool = False) -> float | None:
    """Return the seconds to wait before a replay; None if none follows, and the callers were answered."""
    readmit(attempt)  # another process has written since: operations that are out may end differently now
    attempt.conflicts += 1
    attempt.dispatcher.counts.conflicts += 1
    attempt.conflict_of_load = loading
    most = attempt.dispatcher.options.max_attempts
    if attempt.conflicts >= most:
        attempt.give_up_replay(conflict, f" in attempt {attempt.conflicts} of {most}")
        return None
    longest = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2 ** min(attempt.conflicts - 1, 10))
    seconds: float = random() * longest
    if _clock.monotonic() + seconds >= attempt.deadline:
        attempt.give_up_replay(conflict, ", and max_duration leaves no time for another attempt")
        return None
    attempt.conflict = conflict
    attempt.phase = "replay"
    return seconds


def back_off(attempt: Attempt, seconds: float | None) -> bool:
    """Wait for *seconds* before a replay. Return False if none follows. Switches: yes, unless *seconds* is 0."""
    if seconds is None:
        return False
    if seconds:
        begun = attempt.now
        process.sleep(seconds)
        process.notice_fork()
        attempt.now = _clock.monotonic()
        attempt.aside += attempt.now - begun
        if attempt.now >= attempt.deadline:  # the hub was blocked, so the alarm could not ring
            attempt.expire()
    return not attempt.over()

"""Counters of a processor, and its recent rate."""

from __future__ import annotations

from collections import deque
from typing import Final

from geventbatch._core.clock import clock as _clock

_SOONEST: Final = 0.05
_LATEST: Final = 10.5
"""Seconds: a sample of an age between these two tells the present rate."""


class Counts:
    """The counters of one process. They only grow. With ``batching=False``, threads share them and may lose a count."""

    __slots__ = (
        "_samples",
        "answered",
        "batches",
        "conflicts",
        "failed_batches",
        "next_sample",
        "overloaded",
        "undo_seconds",
        "undone",
        "withdrawn",
    )

    def __init__(self) -> None:
        # -- mutable state ---------------------------------------------------------------------------------
        self.answered = 0  # operations whose callers had their answers
        self.batches = 0  # batches that began to run and have ended
        self.failed_batches = 0  # batches that failed as a whole
        self.conflicts = 0
        self.withdrawn = 0  # operations whose callers left
        self.overloaded = 0  # operations that were refused
        self.undone = 0  # times that an operation that raised was undone
        self.undo_seconds = 0.0  # seconds that this took
        self.next_sample = 0.0  # monotonic seconds
        self._samples: deque[tuple[float, int]] = deque(maxlen=10)  # one a second: the time, and `answered` then

    def sample(self, now: float) -> None:
        """Keep the number of answered operations at *now*. Call it not before `next_sample`. Switches: no."""
        self._samples.append((now, self.answered))
        self.next_sample = now + 1.0

    def rate(self) -> float:
        """Return the operations answered per second, over the last ten seconds or less; 0.0 if there were none."""
        now = _clock.monotonic()
        for then, answered in tuple(self._samples):
            if _LATEST >= now - then >= _SOONEST:
                return (self.answered - answered) / (now - then)
        return 0.0

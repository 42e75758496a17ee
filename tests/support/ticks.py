"""Whether the hub has its turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import gevent

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime

LONGEST = 0.01
"""Seconds that the hub may be kept from its timers when each operation and each woken caller takes 0.1 ms."""


class Ticks:
    """A 1 ms timer of the hub that notes when it fires."""

    def __init__(self, clock: VirtualTime) -> None:
        self.clock = clock
        self.at: list[float] = []

    def __enter__(self) -> Self:
        self._timer: Any = gevent.get_hub().loop.timer(0.001, 0.001)
        self._timer.start(self._note)
        self.at.append(self.clock.now())
        return self

    def __exit__(self, *error: object) -> None:
        self.at.append(self.clock.now())
        self._timer.close()

    def _note(self) -> None:
        self.at.append(self.clock.now())

    def longest_gap(self) -> float:
        return max(after - before for before, after in zip(self.at, self.at[1:], strict=False))

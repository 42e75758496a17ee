"""The two clocks that everything here reads, and nothing else reads the time: virtual time replaces them.

Read them as ``clock.monotonic()``, never bind them at import.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Callable


@final
class Clock:
    """An object, and not names of this module, which compiled code would look up each time."""

    def __init__(self) -> None:
        """Tell the real time."""
        self.monotonic: Callable[[], float] = time.monotonic
        """Seconds, for windows, deadlines and durations."""
        self.wall: Callable[[], float] = time.time
        """Seconds since the epoch, for a reader's eyes only."""


clock: Final = Clock()

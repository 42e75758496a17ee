"""The two clocks of the library, which virtual time can replace.

Read them as ``clock.monotonic()``. Never bind them at import. Three modules read the real time instead, since servers
or other processes go by it: `stores._sql.outcomes`, `stores.django._connections` and `integrations.gunicorn`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, final

if TYPE_CHECKING:
    from collections.abc import Callable


@final
class Clock:
    """Both clocks. It is an object since compiled code would look up names of this module each time."""

    def __init__(self) -> None:
        """Read the real time."""
        self.monotonic: Callable[[], float] = time.monotonic
        """Seconds, for windows, deadlines and durations."""
        self.wall: Callable[[], float] = time.time
        """Seconds since the epoch, for people to read; never to compute with."""


clock: Final = Clock()

"""The two clocks that everything here reads, and nothing else reads the time: virtual time replaces them.

Read them as ``_clock.monotonic()``, never bind them at import.
"""

import time

monotonic = time.monotonic
"""Seconds, for windows, deadlines and durations."""

wall = time.time
"""Seconds since the epoch, for a reader's eyes only."""

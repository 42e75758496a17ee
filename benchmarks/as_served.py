"""A benchmark's process as a server's worker: the integrations set the garbage collector when one starts."""

from __future__ import annotations

import gc

from geventbatch.integrations._collector import freeze_loaded


def as_served() -> str:
    """Set it, for every way alike, once all is loaded; return a line that says so."""
    freeze_loaded()
    return (
        f"garbage collector as in a server's worker, for every way: {gc.get_freeze_count():,} objects frozen, "
        f"thresholds {gc.get_threshold()}"
    )

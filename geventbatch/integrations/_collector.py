"""The garbage collector in the workers of servers: it leaves out what the application has loaded.

Callers that wait are no garbage, but with thousands of them the collector passes through their objects and the
application's again and again, and each pass keeps the hub.
"""

from __future__ import annotations

import gc
import logging
import os
from typing import Final

_log: Final = logging.getLogger("geventbatch")

VARIABLE: Final = "GEVENTBATCH_FREEZE"
"""The environment variable that refuses."""

_REFUSALS: Final = ("0", "no", "off", "false")
_CONSENTS: Final = ("", "1", "yes", "on", "true")

_DEFAULTS: Final = (700, 2000)
"""CPython's own threshold: until 3.12, and since."""
_THRESHOLDS: Final = (10_000, 50)
"""Objects that are made and not freed before a pass begins; passes before one goes through what they have left, too.
All that 10,000 busy callers hold is young, some 250,000 objects: a pass through them keeps the hub for 30 to 50 ms."""

_frozen_in: int | None = None
"""The process in which it was done. A child of a fork freezes what it has loaded itself."""


def freeze_loaded() -> None:
    """Collect once; then leave out what there is of all later collections, and begin them less often.

    For a server's worker that has loaded its application, and for a parent just before it forks: a child that is the
    first to collect writes to each page of memory that it shares with its parent. Once in a process; later calls do
    nothing. Nothing is done if ``GEVENTBATCH_FREEZE=0`` is in the environment or the collector is disabled. Thresholds
    that are not Python's own stay as they are.

    Raises:
        ValueError: The variable has a value that says neither yes nor no.
    Switches: no.
    """
    global _frozen_in  # noqa: PLW0603 - the collector is the process's
    if is_refused() or not gc.isenabled() or _frozen_in == os.getpid():
        return
    _frozen_in = os.getpid()
    gc.collect()
    gc.freeze()
    if gc.get_threshold()[0] in _DEFAULTS:
        gc.set_threshold(*_THRESHOLDS)
    _log.debug(
        "The garbage collector leaves out the %d objects that are loaded in process %d, and begins a pass after %d "
        "more; %s=0 in the environment refuses that",
        gc.get_freeze_count(),
        _frozen_in,
        gc.get_threshold()[0],
        VARIABLE,
    )


def is_refused() -> bool:
    """Return whether the environment refuses.

    Raises:
        ValueError: The variable has a value that says neither yes nor no.
    """
    value = os.environ.get(VARIABLE, "")
    if value.lower() in _REFUSALS:
        return True
    if value.lower() in _CONSENTS:
        return False
    raise ValueError(
        f"{VARIABLE} is {value!r} in the environment, but must be 0 (the garbage collector is left as it is) or 1 (it "
        "leaves out what a worker has loaded, as it does without the variable)"
    )

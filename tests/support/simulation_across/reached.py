"""What examples have reached, counted, so that no rule and no check is there in vain."""

from __future__ import annotations

from collections import Counter
from typing import Final

REACHED: Final[Counter[str]] = Counter()
"""By name: how often it has happened, in all examples of this process."""

ALL: Final = (
    "run of one key",
    "run_across of 1 key",
    "run_across of 2 keys",
    "run_across of 3 keys",
    "run_across of 5 keys",
    "keys of several shards, as far as their numbers say",
    "read one key",
    "read, at several keys",
    "by hand",
    "by a pair",
    "by a store",
    "a worker_number_for_key that switches",
    "cancelled by start_timeout",
    "cancelled at a key that others hold",
    "left before it started, by its own Timeout",
    "left before it started, by a kill",
    "left after it had started",
    "a worker was killed in a load",
    "a worker was killed in an operation",
    "a worker was killed in a save",
    "deadline in a load",
    "deadline in an operation",
    "deadline in a save",
    "an operation ran alone, across keys",
    "refused after stop",
    "saved after stop",
    "refused by max_pending",
    "as many operations as max_batch_size",
    "as many keys as max_bulk, and others wait",
    "as many bulks as max_batches",
    "a window ended early",
    "waited for an operation across keys",
    "joined while it loaded",
    "joined behind the load, before the operations of its batch",
    "a bulk of several components",
    "a component of several operations across keys",
    "operations of one key in a component",
    "an operation raised half-way",
    "an operation raised, and others of its component were saved",
    "a refused save was halved",
    "a culprit was found in a component",
    "one component was replayed, and another saved",
    "a component was replayed",
    "one key was replayed",
    "the load of one key failed, and a component went on",
    "a key was missing",
    "a conflict of one key in the load",
    "a whole load failed",
    "a save failed, outcome unknown",
)
"""All that has to be reached."""


def reach(what: str) -> None:
    """Count that *what* was reached once more."""
    assert what in ALL, what
    REACHED[what] += 1


def missing() -> list[str]:
    """Return what no example has reached."""
    return [what for what in ALL if not REACHED[what]]

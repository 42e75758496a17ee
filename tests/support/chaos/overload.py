"""Ten times the capacity on workers with `max_pending`, and what becomes of memory, of the rest and of the refused.

    python -m tests.support.chaos.overload [--seconds 60]

The database is made slow, so that it is what limits the workers, and not the processor cores, from which the load has
to come too. Exits with 1 when something is not as it has to be.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import argparse
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from tests.support.chaos.traffic import SERVED, Answer, Traffic, percentile, running
from tests.support.chaos.watch import looks

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_PENDING: Final = 20
MAX_BATCH_SIZE: Final = 4
WORKERS: Final = 2
SLOW_SAVE: Final = 0.05
"""Seconds."""
TIMES: Final = 10.0

AFTERWARDS: Final = 3.0
"""Seconds under half the capacity."""

LEAST_SHARE: Final = 0.9
SLOWEST_REFUSAL: Final = 0.25
"""Seconds, in the 99th percentile."""
LONGEST_RECOVERY: Final = 1.0
SLOW: Final = 0.5
"""Seconds for an answer, after which a worker has not yet recovered."""
MOST_MEMORY: Final = 32.0
"""MiB that a worker may have in the overload above what it had at its capacity."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.chaos.overload", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds: float = parser.parse_args().seconds
    wrong = list(measure(seconds))
    for line in wrong:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


def measure(seconds: float) -> Iterator[str]:
    """Print what is measured; give what is wrong with it."""
    options = {"max_pending": MAX_PENDING, "max_batch_size": MAX_BATCH_SIZE, "workers": WORKERS, "watched": 0.25}
    with running("postgres-lock", slow=SLOW_SAVE, **options) as (server, watched):
        traffic = Traffic(server, lambda: {"keys": ["hot"], "name": "one"})
        capacity = traffic.capacity(WORKERS * MAX_PENDING, max(2.0, seconds / 10))
        before = time.time()
        all_answers = traffic.open_loop((TIMES * capacity, seconds), (capacity / 2, AFTERWARDS))
        memory = _memory(watched, before, before + seconds)
    ended = all_answers[0].made + seconds
    answers = [answer for answer in all_answers if answer.made < ended]
    later = [answer for answer in all_answers if answer.made >= ended]
    served = [answer for answer in answers if answer.status == SERVED]
    refused = [answer for answer in answers if answer.is_typed_refusal()]
    others = Counter((answer.status, answer.error) for answer in answers) - Counter(
        (answer.status, answer.error) for answer in (*served, *refused)
    )
    share = sum(answer.answered < ended for answer in served) / seconds / capacity
    slowest = percentile([answer.seconds for answer in refused], 0.99)
    recovery = _recovery(later, ended)
    offered = len(answers) / seconds
    for name, number, remark in [
        ("capacity", f"{capacity:,.0f}", "a second"),
        ("offered", f"{offered:,.0f}", f"a second for {seconds:.0f} s: {offered / capacity:.1f} times as many"),
        ("served", f"{len(served):,}", f"{share:.0%} of the capacity; median {_median(served):.3f} s"),
        ("refused", f"{len(refused):,}", "503, ProcessorOverloaded, Retry-After"),
        ("", "", f"median {_median(refused):.3f} s, 99 % within {slowest:.3f} s"),
        ("answered otherwise", f"{sum(others.values()):,}", ""),
        *(
            ("memory", f"{most:.1f}", f"MiB at the most, {calm:.1f} MiB at the capacity (worker {pid})")
            for pid, (calm, most) in memory.items()
        ),
        ("recovered", f"{recovery:.2f}", "s after the end, under half the capacity"),
    ]:
        print(f"{name:18} {number:>9}  {remark}")
    if offered < 0.8 * TIMES * capacity:
        yield "this machine could not make so many calls"
    if share < LEAST_SHARE:
        yield f"less than {LEAST_SHARE:.0%} of the capacity was served"
    if slowest > SLOWEST_REFUSAL:
        yield f"a refusal may take {SLOWEST_REFUSAL} s"
    if others:
        yield f"some calls were answered otherwise: {others}"
    if recovery > LONGEST_RECOVERY:
        yield f"the recovery may take {LONGEST_RECOVERY} s"
    if any(most - calm > MOST_MEMORY for calm, most in memory.values()):
        yield f"the memory of a worker may grow by {MOST_MEMORY} MiB"


def _memory(watched: Path, before: float, after: float) -> dict[int, tuple[float, float]]:
    """For each worker, what it had just before *before*, and the most until *after*."""
    found: dict[int, tuple[float, float]] = {}
    for look in looks(watched):
        usual, most = found.get(look.pid, (0.0, 0.0))
        if look.at <= before:
            found[look.pid] = (look.memory, look.memory)
        elif look.at <= after:
            found[look.pid] = (usual, max(most, look.memory))
    return found


def _recovery(later: list[Answer], ended: float) -> float:
    """Seconds until the last call that was not served, or not soon."""
    bad = [answer.made - ended for answer in later if answer.status != SERVED or answer.seconds > SLOW]
    return max(bad, default=0.0)


def _median(answers: list[Answer]) -> float:
    return percentile([answer.seconds for answer in answers], 0.5)


if __name__ == "__main__":
    sys.exit(main())

"""Runs the suite in five processes side by side: most of it waits for servers, and a machine has two cores or more.

    python -m tests [arguments of pytest]

What each process prints comes when it has ended. ``python -m pytest`` runs the same tests one after the other.
"""

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

# Of about the same length: the contract of the stores in two halves, those that wait for servers to come and go, those
# that ask databases, and what is in none of them, which keeps a core busy.
HALVES = ("sqlalchemy", "not sqlalchemy")
APART = (
    ["benchmarks", "celery", "cluster", "docs", "fork", "gunicorn", "reuse", "tickets_signals"],
    ["bulk_stores", "django", "django_store", "flask", "redis_store", "sql", "sqlalchemy_store", "tickets", "wallet"],
)

NOTHING_CHOSEN = 5
"""The status of a pytest that was asked for tests which it has not."""


def groups() -> list[list[str]]:
    """What each process is told."""
    stores = _path("stores")
    apart = [[_path(name) for name in names] for names in APART]
    taken = {stores, *(path for paths in apart for path in paths)}
    rest = sorted(str(path) for path in HERE.glob("test_*.py") if str(path) not in taken)
    return [*([stores, "-k", half] for half in HALVES), *apart, rest]


def _path(name: str) -> str:
    return str(HERE / f"test_{name}.py")


def main() -> int:
    """Give the worst status of all."""
    begun = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", *paths, *sys.argv[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for paths in groups()
    ]
    summaries = []
    for one in running:
        output, _ = one.communicate()
        print(output, flush=True)
        summaries.append(output.strip().rpartition("\n")[2].strip("= "))
    statuses = [one.returncode for one in running]
    failed = [status for status in statuses if status not in {0, NOTHING_CHOSEN}]
    all_chose_nothing = statuses == [NOTHING_CHOSEN] * len(statuses)
    print(f"{'FAILED' if failed or all_chose_nothing else 'All passed'} in {time.monotonic() - begun:.0f} s:")
    for summary in summaries:
        print(f"  {summary}")
    return max(failed, default=NOTHING_CHOSEN if all_chose_nothing else 0)


if __name__ == "__main__":
    sys.exit(main())

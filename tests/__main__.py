"""Runs the suite in nine processes side by side: most of it waits for servers, and a machine has two cores or more.

    python -m tests [arguments of pytest]

What each process prints comes when it has ended. ``python -m pytest`` runs the same tests one after the other.
"""

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent

# Of about the same length: the contract of the stores on SQLAlchemy; on the others, with what else is about those; what
# waits for servers to come and go; what asks databases; what keeps a core busy; the oracle; what is about Django
# models; about mapped classes and documents; and what is in none of them.
GROUPS = (
    (["stores"], "sqlalchemy"),
    (["django", "redis_store", "reuse", "stores"], "not (test_stores and sqlalchemy)"),
    (["benchmarks", "celery", "cluster", "docs", "fork", "gunicorn", "tickets_signals"], ""),
    (["bulk_stores", "flask", "sql", "sqlalchemy_store", "tickets", "wallet"], ""),
    (["signals", "simulation", "testing"], ""),
    (["oracle"], ""),
    (["django_*", "drivers", "ended_transactions"], ""),
    (["anew", "bulk_refusals", "commit", "document_*", "isolation", "mapped_*", "row_keys"], ""),
)

NOTHING_CHOSEN = 5
"""The status of a pytest that was asked for tests which it has not."""


def groups() -> list[list[str]]:
    """What each process is told."""
    apart = [[*_paths(names), *(["-k", chosen] if chosen else [])] for names, chosen in GROUPS]
    taken = {path for names, _ in GROUPS for path in _paths(names)}
    rest = sorted(str(path) for path in HERE.glob("test_*.py") if str(path) not in taken)
    return [*apart, rest]


def _paths(names: list[str]) -> list[str]:
    return [str(path) for name in names for path in sorted(HERE.glob(f"test_{name}.py"))]


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

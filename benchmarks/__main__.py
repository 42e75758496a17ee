"""Run the benchmarks one after the other, keep what they print and measure in one folder, and plot it.

    python -m benchmarks [--short] [--into FOLDER] [NAME …]

Without names: all that docs/performance.md shows. `transfers`, `stores`, `processes`, `idempotency`, `watching` and
`page` have pages of their own, and run when they are named. Each lets what it compares take turns; nothing else may run
on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import plots

WITH_JSON = ("hot_row", "many_keys", "peers", "web", "growth", "parts", "batch_cost")
PRINTING = ("overhead", "refusals")
BY_NAME = ("transfers", "stores", "processes", "idempotency", "watching", "page")


def run(name: str, into: Path, *, short: bool) -> int:
    """Run one, show what it prints and keep that; give its status."""
    command = [sys.executable, "-u", "-m", f"benchmarks.{name}"]
    command += ["--short"] if short else []
    command += ["--json", str(into / f"{name}.json")] if name in WITH_JSON else []
    with (
        (into / f"{name}.txt").open("w") as kept,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            kept.write(line)
    return process.returncode


def main() -> int:
    """Give 1 when one of them failed; the others run all the same."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WITH_JSON + PRINTING + BY_NAME))
    parser.add_argument("--short", action="store_true", help="to see that they work")
    parser.add_argument("--into", type=Path, default=Path("build/benchmarks"), metavar="FOLDER")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - {*WITH_JSON, *PRINTING, *BY_NAME}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    chosen.into.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in chosen.names or WITH_JSON + PRINTING:
        print(f"\n=== {name}\n", flush=True)
        begun = time.monotonic()
        status = run(name, chosen.into, short=chosen.short)
        print(f"\n=== {name} took {time.monotonic() - begun:.0f} s", flush=True)
        if status:
            failed.append(name)
    plots.draw(chosen.into, chosen.into if chosen.short else plots.DOCS)
    print(f"failed: {', '.join(failed)}" if failed else f"what they printed and measured is in {chosen.into}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the benchmarks one after the other, keep what they print and measure in one folder, and plot it.

    python -m benchmarks [--short] [--into FOLDER] [NAME …]
    python -m benchmarks --docs [--short] [--into FOLDER]

Without names: all that docs/performance.md shows. `transfers`, `stores`, `processes`, `idempotency`, `watching`, `page`
and `durable` have pages of their own, and run when they are named. Each lets what it compares take turns; nothing else
may run on the machine meanwhile.

With ``--docs``: all that the pages quote (`benchmarks.figures`). What was printed goes whole into docs/figures, and
from there into the pages, with the machine and the versions; so all figures are of one run. With ``--short`` they go
into a copy of the pages, under FOLDER.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import figures, plots

WITH_JSON = ("hot_row", "many_keys", "peers", "web", "growth", "parts", "batch_cost")
PRINTING = ("overhead", "refusals")
BY_NAME = ("transfers", "stores", "processes", "idempotency", "watching", "page", "durable")
SHORT = {
    "examples.tutorial": ["--seconds", "0.4", "--clients", "5"],
}
"""The arguments of what has no ``--short``."""


def run(name: str, into: Path, *, short: bool) -> int:
    """Run one, show what it prints and keep that; give its status."""
    command = [sys.executable, "-u", "-m", name if "." in name else f"benchmarks.{name}"]
    command += SHORT.get(name, ["--short"]) if short else []
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


def copied(into: Path) -> Path:
    """Copy the pages there, and return where; for what a short run prints is not for readers."""
    root = into / "pages"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(figures.ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("figures"))
    shutil.copy(figures.ROOT / "README.md", root)
    (root / "docs/figures").mkdir()
    return root


def fill_pages(names: list[str], printed: Path, root: Path, *, short: bool) -> bool:
    """Write into the pages under *root* what was *printed* by these; return whether all that pages ask for is there."""
    for name in names:
        if (text := (printed / f"{name}.txt").read_text()).strip():
            (root / f"docs/figures/{name}.txt").write_text(text)
    (root / f"docs/figures/{figures.MACHINE}.txt").write_text(f"{figures.machine()}\n")
    missing = figures.fill(root, may_miss=True)
    print(*(f"stays as it is: {one}" for one in missing), f"the pages under {root} have the figures", sep="\n")
    return short or not missing


def main() -> int:
    """Run them, and return 1 if one of them failed; the others run all the same."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WITH_JSON + PRINTING + BY_NAME))
    parser.add_argument("--short", action="store_true", help="to see that they work")
    parser.add_argument("--docs", action="store_true", help="run all that pages quote, and write it into them")
    parser.add_argument("--into", type=Path, default=Path("build/benchmarks"), metavar="FOLDER")
    chosen = parser.parse_args()
    if unknown := set(chosen.names) - {*WITH_JSON, *PRINTING, *BY_NAME}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if chosen.docs and chosen.names:
        parser.error("--docs runs what the pages quote, all of it: name none")
    if chosen.docs and not chosen.short and shutil.which("wrk") is None:
        parser.error("web needs wrk, which is not here: apt-get install wrk")
    chosen.into.mkdir(parents=True, exist_ok=True)
    names = figures.names(figures.ROOT) if chosen.docs else chosen.names or [*WITH_JSON, *PRINTING]
    failed = []
    for name in names:
        print(f"\n=== {name}\n", flush=True)
        begun = time.monotonic()
        status = run(name, chosen.into, short=chosen.short)
        print(f"\n=== {name} took {time.monotonic() - begun:.0f} s", flush=True)
        if status:
            failed.append(name)
    plots.draw(chosen.into, chosen.into if chosen.short else plots.DOCS)
    print(f"failed: {', '.join(failed)}" if failed else f"what they printed and measured is in {chosen.into}")
    if chosen.docs and failed and not chosen.short:
        print("the pages are as they were: their figures are to be of one run")
    elif chosen.docs:
        root = copied(chosen.into) if chosen.short else figures.ROOT
        complete = fill_pages(names, chosen.into, root, short=chosen.short)
        return 0 if complete and not failed else 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

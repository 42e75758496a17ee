"""What a release is refused for: `.ci/changelog.py`."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = run_path(str(ROOT / ".ci/changelog.py"))
notes, sections, Wrong = SCRIPT["notes"], SCRIPT["sections"], SCRIPT["Wrong"]

GOOD = """# Changelog

## [Unreleased]

## [0.2.0] - 2026-11-30

### Added

- A thing.

## [0.1.0] - 2026-10-01

- The first.
"""


def test_the_notes_are_those_of_the_version_and_of_no_other() -> None:
    assert notes("v0.2.0", "0.2.0", GOOD) == "### Added\n\n- A thing."


@pytest.mark.parametrize(
    ("tag", "version", "changelog", "says"),
    [
        ("v0.2.1", "0.2.0", GOOD, "the tag is v0.2.1"),
        ("0.2.0", "0.2.0", GOOD, "the tag is 0.2.0"),
        ("v0.3.0", "0.3.0", GOOD, "the newest version there is not 0.3.0"),
        ("v0.2.0", "0.2.0", GOOD.replace("## [Unreleased]\n", "## [Unreleased]\n\n- New.\n"), "left under Unreleased"),
        ("v0.2.0", "0.2.0", GOOD.replace(" - 2026-11-30", ""), "0.2.0 has no date"),
        ("v0.2.0", "0.2.0", GOOD.replace("### Added\n\n- A thing.\n", ""), "nothing is said of 0.2.0"),
        ("v0.2.0", "0.2.0", GOOD.replace("## [Unreleased]", ""), "the first section is"),
        ("v0.2.0", "0.2.0", GOOD.replace("[0.1.0]", "[0.2.0]"), "each once"),
        ("v0.2.0", "0.2.0", GOOD.replace("[0.1.0]", "[0.10.0]"), "versions go down"),
        ("v0.2.0", "0.2.0", GOOD.replace("- 2026-10-01", "(October)"), "a heading is"),
    ],
)
def test_a_release_is_refused_when_something_disagrees(tag: str, version: str, changelog: str, says: str) -> None:
    with pytest.raises(Wrong, match=says.replace("(", r"\(")):
        notes(tag, version, changelog)


def test_the_changelog_of_this_project_is_in_order() -> None:
    assert sections((ROOT / "CHANGELOG.md").read_text())[0].name == "Unreleased"


def test_the_version_is_read_as_it_is() -> None:
    import geventbatch

    assert SCRIPT["current_version"](Path(geventbatch.__file__).read_text()) == geventbatch.__version__

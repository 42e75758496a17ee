"""The documentation: its Python runs, its tests are there, and the site is built without a warning."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from geventbatch.testing import _store_breaks, _store_checks
from tests.support.programs.page import python_blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# docs/testing.md is one test module, and parts of the wallet's: tests/tools/test_pytest_plugin.py runs those.
# docs/own-stores.md shows files of examples/stores: tests/stores/test_own_stores.py runs those.
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if python_blocks(page) and page.stem not in {"testing", "own-stores"}],
    ids=lambda page: page.stem,
)
def test_the_python_of_a_page_runs(page: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.support.programs.page", page],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_each_guarantee_names_tests_that_exist() -> None:
    page = (ROOT / "docs/guarantees.md").read_text()
    parts = re.findall(r"^## (\d+)\. .*?\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert [int(number) for number, _ in parts] == list(range(1, 22))
    for number, body in parts:
        found = re.findall(r"\]\(\.\./(tests/\w+/test_\w+\.py)\):\n\n((?:- `test_\w+`\n)+)", body)
        assert found, f"guarantee {number} names no tests"
        assert sum(names.count("\n") for _, names in found) == body.count("test_") - len(found) * 2, "one of no file"
        for file, names in found:
            source = (ROOT / file).read_text()
            missing = [name for name in re.findall(r"`(\w+)`", names) if f"def {name}(" not in source]
            assert not missing, f"guarantee {number}: {file} has no {missing}"


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("architecture", "| there | here |"),
        ("go", "| there | here | the test that shows it |"),
    ],
)
def test_each_row_of_a_table_of_tests_names_one_that_exists(page: str, heading: str) -> None:
    _, *tables = (ROOT / f"docs/{page}.md").read_text().split(f"\n{heading}\n")
    rows = [row for table in tables for row in takewhile(lambda row: row.startswith("|"), table.splitlines()[1:])]
    assert rows
    for row in rows:
        names_a_test(row)


def test_each_difference_from_an_operation_alone_names_a_test_that_exists() -> None:
    _, *parts = (ROOT / "docs/as-if-alone.md").read_text().split("\n## ")
    for part in parts:
        rows = [line for line in part.splitlines()[1:] if line]
        assert rows
        for row in rows:
            assert row.startswith("- "), row
            names_a_test(row)


def names_a_test(row: str) -> None:
    """Check that *row* of a page names a test, and that each one it names is where its link leads."""
    found = re.findall(r"\[`(test_\w+)`\]\(\.\./(tests/\w+/test_\w+\.py)\)", row)
    assert found, f"this line names no test: {row}"
    assert len(found) == row.count("`test_"), f"a test without its file: {row}"
    for name, file in found:
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"


def test_every_page_is_in_the_navigation() -> None:
    toctrees = re.findall(r"```\{toctree\}\n(.*?)```", (ROOT / "docs/index.md").read_text(), re.DOTALL)
    listed = [line for toctree in toctrees for line in toctree.splitlines() if re.fullmatch(r"[\w-]+", line)]
    assert sorted(listed) == sorted(page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_links_of_a_page_outside_of_the_site_lead_to_what_is_there(page: str) -> None:
    found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", (ROOT / page).read_text())
    assert found
    assert [path for path, _ in found if not (ROOT / path).exists()] == []
    assert [link for link in found if link[1] and link[1] not in anchors(ROOT / (link[0] or page))] == []


def anchors(page: Path) -> set[str]:
    """Return those of the headings of *page*, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("view", ["flask_plain", "flask_batched", "django_plain", "django_batched"])
def test_the_tutorial_shows_the_views_that_it_measures(view: str) -> None:
    page = (ROOT / "docs/tutorial.md").read_text()
    _, code = (ROOT / f"examples/tutorial/{view}.py").read_text().split('"""\n\n', 1)
    included = f"```{{literalinclude}} ../examples/tutorial/{view}.py\n:language: python\n```"
    assert f"```python\n{code}```" in page or (included in page and f"(../examples/tutorial/{view}.py)" in page)


def test_the_page_of_own_stores_shows_the_files_that_the_tests_run() -> None:
    page = (ROOT / "docs/own-stores.md").read_text()
    files = sorted(path.stem for path in (ROOT / "examples/stores").glob("*with_*.py"))
    shown = re.findall(r"```\{literalinclude\} \.\./examples/stores/(\w+)\.py\n:language: python\n```", page)
    assert sorted(shown) == files
    assert [name for name in files if f"[examples/stores/{name}.py](../examples/stores/{name}.py)" not in page] == []
    (of_test,) = [block.source for block in python_blocks(ROOT / "docs/own-stores.md")]
    compile(of_test, "own-stores", "exec")


def test_the_page_of_own_stores_names_every_check_of_the_contract() -> None:
    page = (ROOT / "docs/own-stores.md").read_text()
    groups = (_store_checks.ALWAYS, _store_checks.SIDE_BY_SIDE, _store_checks.CONSTRAINTS, _store_breaks.BREAKS)
    assert re.findall(r"^- `(\w+)`$", page, re.MULTILINE) == [check.__name__ for group in groups for check in group]


@pytest.mark.variants
def test_the_tutorial_measures_every_view_and_checks_what_it_prints() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "examples.tutorial", "--seconds", "0.4", "--clients", "5"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Checked: the balance is what the clients were told." in ran.stdout, ran.stdout + ran.stderr
    assert re.findall(r"^(\w+, \w+) ", ran.stdout, re.MULTILINE) == [
        "Flask, plain",
        "Flask, batched",
        "Django, plain",
        "Django, batched",
    ]

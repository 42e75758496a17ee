"""The page that shows where things stand is about what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "geventbatch"
PAGE = (ROOT / "docs" / "architecture.md").read_text()

LONGEST = 460
"""Lines of a file."""


def modules() -> list[Path]:
    return [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]


def test_the_page_has_every_file_once_and_no_other() -> None:
    rooms = re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", PAGE, re.MULTILINE)
    assert sorted(name for name, _ in rooms) == [str(path) for path in sorted(modules(), key=str)]


def test_what_the_page_says_of_an_operations_way_is_there() -> None:
    names = re.findall(r"`((?:\w+/)*_?\w+\.py)`", PAGE)
    assert names
    assert [name for name in names if not (PACKAGE / name).is_file()] == []
    drawn = PAGE.partition("```text")[2].partition("```")[0]
    folders = re.findall(r"(\w+)/", drawn)
    assert [name for name in folders if not list(PACKAGE.glob(f"**/{name}"))] == []


def test_the_page_says_where_each_guarantee_is_kept() -> None:
    numbers = re.findall(r"^## (\d+)\.", (ROOT / "docs" / "guarantees.md").read_text(), re.MULTILINE)
    assert len(numbers) >= 20
    rows = re.findall(r"^\| (\d+)(?: and (\d+))?, ", PAGE, re.MULTILINE)
    assert [one for row in rows for one in row if one] == numbers


@pytest.mark.parametrize("path", modules(), ids=str)
def test_a_file_is_no_longer_than_a_reader_can_keep_in_mind_and_says_what_it_is(path: Path) -> None:
    text = (PACKAGE / path).read_text()
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text))


def test_the_core_imports_nothing_of_a_store_or_an_integration() -> None:
    found = [
        f"{path}: {line.strip()}"
        for path in modules()
        if path.parts[0].startswith("_") and len(path.parts) > 1
        for line in (PACKAGE / path).read_text().splitlines()
        if re.match(r"\s*(from|import) geventbatch\.(stores|integrations|testing)", line)
    ]
    assert found == []

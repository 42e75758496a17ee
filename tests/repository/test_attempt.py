"""The wall between a batch and its attempt: what a batch knows, hardly anybody else changes."""

from __future__ import annotations

import ast
from pathlib import Path

import geventbatch

MOST = 14
"""Places outside of its own file that set an attribute of a batch."""


def test_hardly_any_place_outside_of_a_batch_sets_its_attributes() -> None:
    package = Path(geventbatch.__file__).parent
    attributes = _slots(package / "_core" / "batch.py")
    places = [
        f"{file.name}:{node.lineno}"
        for file in package.rglob("*.py")
        if file.name != "batch.py"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and node.attr in attributes
        and ast.unparse(node.value).split(".")[-1] in {"batch", "last", "first"}
    ]
    assert 0 < len(places) <= MOST, places


def _slots(file: Path) -> set[str]:
    """Read them from the source: a compiled class has none."""
    return {
        name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__"
        for name in ast.literal_eval(node.value)
    }

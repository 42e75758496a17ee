"""Integrations and test tools reach a processor through `geventbatch._seam` alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "geventbatch"
NOT_OURS = {
    "_callbacks": "of gevent's loop",
    "_cv_token": "of a context of Flask's",
    "_cv_tokens": "of a context of Flask's",
    "_connections": "of a transaction of SQLAlchemy's session",
    "_meta": "of a model of Django's",
    "_modules": "of geventbatch.integrations.django, which its own app fills",
    "_non_atomic_requests": "of a view of Django's",
    "_replace": "of a NamedTuple",
    "_shutdown": "of a Huey",
    "_trans_context_manager": "of SQLAlchemy's session",
}


def reached(source: str) -> list[str]:
    """The private attributes that *source* asks of anything but itself."""
    asked = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            asked.append((ast.unparse(node.value), node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("getattr", "setattr")):
            asked.append((ast.unparse(node.args[0]), ast.unparse(node.args[1]).strip("'")))
    return [name for owner, name in asked if re.match("_(?!_)", name) and owner not in {"self", "cls", "super()"}]


def test_no_integration_and_no_test_tool_reaches_into_a_processor_but_through_the_seam() -> None:
    files = [*PACKAGE.glob("integrations/**/*.py"), *PACKAGE.glob("testing/**/*.py")]
    found = {path.name: sorted({*reached(path.read_text())} - {*NOT_OURS}) for path in files}
    assert {name: names for name, names in found.items() if names} == {}
    assert len(files) > 20


def test_what_reaches_into_a_processor_is_found() -> None:
    source = "processor._current().counts; self._own; one.processor._options; x.__dict__; getattr(x, '_use')"
    assert sorted(reached(source)) == ["_current", "_options", "_use"]

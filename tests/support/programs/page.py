"""Runs the Python of one page of the documentation from top to bottom, as one program.

    python -m tests.support.programs.page docs/stores.md

What the page leaves to its reader (a database, a class, a request) is in ``tests/support/pages/NAME.py``:

- what stands in it is there for the blocks of the page, by the same names;
- ``REPLACED`` is text of the page that is something else here: an address, an ellipsis;
- ``check(page)`` is called after the last block, with the names that there are then.
"""

from gevent import monkey

monkey.patch_all()

import re
import sys
from pathlib import Path
from runpy import run_path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "pages"


class Block(NamedTuple):
    """A block of Python."""

    line: int
    source: str


def python_blocks(page: Path) -> list[Block]:
    """Give all of them."""
    text = page.read_text()
    fences = re.finditer(r"^( *)```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [
        Block(text.count("\n", 0, fence.start(2)) + 1, re.sub(rf"^{fence[1]}", "", fence[2], flags=re.MULTILINE))
        for fence in fences
    ]


def run(page: Path) -> None:
    """Run them all."""
    before = FOLDER / f"{page.stem.lower().replace('-', '_')}.py"
    names: dict[str, Any] = run_path(str(before)) if before.exists() else {}
    names["__name__"] = page.stem
    for block in python_blocks(page):
        source = block.source
        for shown, meant in names.get("REPLACED", {}).items():
            source = source.replace(shown, meant)
        # So that a traceback shows the line of the page.
        exec(compile("\n" * (block.line - 1) + source, str(page), "exec"), names)  # noqa: S102 - that is the point
    if "check" in names:
        names["check"](names)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "django_project"))
    run(Path(sys.argv[1]))

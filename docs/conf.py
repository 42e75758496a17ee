"""The site: ``sphinx-build -W docs FOLDER``, with the extra "docs"."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()  # as the module for gunicorn does: not too late

import os
import re
from typing import TYPE_CHECKING

import django
from django.conf import settings
from pygments.lexers.special import TextLexer

import geventbatch

if TYPE_CHECKING:
    from sphinx.application import Sphinx

settings.configure(INSTALLED_APPS=["django.contrib.contenttypes", "geventbatch.integrations.django"])
django.setup()

project = "geventbatch"
author = copyright = "geventbatch contributors"  # noqa: A001 - the name that Sphinx asks for
version = release = geventbatch.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "py:obj"
myst_heading_anchors = 3  # links to a heading that is not there are warnings, and so errors
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as they are written, not as their reprs: addresses tell nothing
autodoc_typehints = "none"  # they are in the signatures of overloads; the sections say what each argument is
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"geventbatch {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

_REPOSITORY = os.environ.get("GITHUB_REPOSITORY")


def link_to_repository(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Have links out of this folder lead to the repository; without one, the files are copied into the site."""
    if _REPOSITORY:
        source[0] = source[0].replace("](../", f"](https://github.com/{_REPOSITORY}/blob/main/")


def mend(_app: Sphinx, *told: object) -> None:
    """Make of a docstring in the project's form what docutils wants.

    What is said of switches, right under a section, becomes a paragraph; a name may have an s behind it.
    """
    lines = told[-1]
    assert isinstance(lines, list)
    for number, line in reversed(list(enumerate(lines))):
        plain = re.sub(r"(`[\w.]+`)s\b", r"\1\\ s", line)
        switches = re.match(r"( *)Switches: (.*)", plain)
        lines[number : number + 1] = ["", f"{switches[1]}**Switches:** {switches[2]}"] if switches else [plain]


def readable(*told: object) -> tuple[str, object] | None:
    """Name the functions and classes among the defaults; a protocol is never called, so it shows no signature."""
    signature, returns = told[-2:]
    if not isinstance(signature, str):
        return None
    named = re.sub(r"<(?:function|class) '?([\w.]+)'?>", r"\1", signature)
    return "" if named == "(*args, **kwargs)" else named, returns


def setup(app: Sphinx) -> None:
    """Connect them; before Napoleon, which reads the sections."""
    app.add_lexer("haproxy", TextLexer)
    app.connect("source-read", link_to_repository)
    app.connect("autodoc-process-docstring", mend, priority=400)
    app.connect("autodoc-process-signature", readable)

"""The site is built without a warning, and its reference shows what there is."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from geventbatch import Batch, scopes
from geventbatch._options import DEFAULTS

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.site, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(site)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return (site / "api.html").read_text()


def test_the_reference_shows_the_options_of_a_processor_with_their_defaults(reference: str) -> None:
    (shown,) = re.findall(r'<dt [^>]*id="geventbatch\.Processor">.*?</dt>', reference, re.DOTALL)
    text = re.sub(r"\s+", "", html.unescape(re.sub("<[^>]+>", "", shown)))
    options = ",".join(f"{name}={described(default)}" for name, default in DEFAULTS.items())
    assert f"(*,{options},)" in text


def test_the_reference_shows_what_users_see_of_a_batch(reference: str) -> None:
    found = re.findall(r'id="geventbatch\.Batch\.(\w+)"', reference)
    assert sorted(found) == sorted(name for name in dir(Batch) if not name.startswith("_"))


def test_the_reference_shows_every_protocol_of_scopes_and_stores(reference: str) -> None:
    found = re.findall(r'id="geventbatch\.scopes\.(\w+)"', reference)
    assert sorted(found) == sorted(scopes.__all__)


def described(default: Any) -> str:
    """Give *default* as Sphinx writes it, without blanks."""
    if callable(default):
        return f"<function{default.__name__}>"
    return repr(default).replace(" ", "")

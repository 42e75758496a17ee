"""`python -m geventbatch` says which form runs, with which versions, and what `check_setup` finds in an application."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import geventbatch

ROOT = Path(__file__).parents[2]
SCREEN = 24
"""Lines of a terminal."""

WELL = "import socket\nfrom gevent import monkey\nassert monkey.is_module_patched('socket')\napp = None\n"
LOSES = """
from geventbatch import Processor
import warnings
warnings.simplefilter("ignore")
processor = Processor(load_resource=lambda key: [], min_duration=0)
"""


def said(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What is said in *directory*, by an interpreter whose warnings are errors."""
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "geventbatch", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )


def test_it_says_the_form_and_the_versions_on_one_screen_and_that_it_has_looked_at_no_application(
    tmp_path: Path,
) -> None:
    done = said(tmp_path)
    words = " ".join(done.stdout.split())
    assert (done.returncode, done.stderr) == (0, "")
    form = "compiled" if geventbatch.COMPILED else "pure Python"
    assert words.startswith(f"geventbatch {geventbatch.__version__}, {form}, in {Path(geventbatch.__file__).parent} ")
    assert ("--no-binary" in words) is not geventbatch.COMPILED
    python = ".".join(map(str, sys.version_info[:3]))
    assert f" Python {python}, CPython, " in words
    for name in ("gevent", "greenlet", "SQLAlchemy", "Django", "redis", "psycopg", "PyMySQL", "gunicorn"):
        assert f"{name} {metadata.version(name)}" in words
    assert "mysqlclient" not in words  # it is not installed
    assert words.endswith(
        " check_setup nothing, and no application was looked at: python -m geventbatch MODULE imports one"
    )
    assert len(done.stdout.splitlines()) < SCREEN
    assert max(map(len, done.stdout.splitlines())) <= 110


@pytest.mark.parametrize("name", ["shop", "shop:app"])
def test_an_application_without_a_problem_is_imported_patched_and_the_status_is_0(tmp_path: Path, name: str) -> None:
    (tmp_path / "shop.py").write_text(WELL)
    done = said(tmp_path, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["check_setup", "nothing,", "after", "importing", "shop"]


def test_a_problem_is_named_with_what_mends_it_and_the_status_is_1(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(LOSES)
    done = said(tmp_path, "shop:app")
    assert done.returncode == 1
    told = " ".join(done.stdout.partition("check_setup")[2].split())
    assert told.startswith("unsaved: ")
    assert "save_resource" in told


@pytest.mark.parametrize("breaks", ["import nothing_like_it", "raise SystemExit('DATABASE_URL is not set')"])
def test_an_application_that_cannot_be_imported_is_a_traceback_behind_the_versions_and_the_status_2(
    tmp_path: Path, breaks: str
) -> None:
    (tmp_path / "shop.py").write_text(breaks)
    done = said(tmp_path, "shop")
    assert done.returncode == 2
    assert breaks in done.stderr
    assert "gevent" in done.stdout
    assert "not asked: importing shop raised what is above" in done.stdout

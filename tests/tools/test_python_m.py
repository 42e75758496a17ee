"""`python -m geventbatch` says which form runs, with which versions, and what `check_setup` finds in an application."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import geventbatch
from geventbatch.__main__ import _load, _NoApplication

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SCREEN = 24
"""Lines of a terminal."""

WELL = "import socket\nfrom gevent import monkey\nassert monkey.is_module_patched('socket')\napp = None\n"
WELL += "def function(environ, start_response, extra=None): ...\ndef wrapper(*args, **kwargs): ...\n"
LOSES = """
from geventbatch import Processor
import warnings
warnings.simplefilter("ignore")
app = None
processor = Processor(load_resource=lambda key: [], min_duration=0)
"""

FACTORY = """
from geventbatch import Processor
import warnings
warnings.simplefilter("ignore")

class App:
    def __init__(self):
        self.processor = Processor(load_resource=lambda key: [], min_duration=0)

def create_app(config=None, testing=False, **more):
    return App()

def with_one(config):
    return App()
"""
GAUGES = """
from pathlib import Path
from geventbatch import Processor
from geventbatch.integrations import prometheus
processor = Processor(load_resource=lambda key: [], save_resource=print, min_duration=0)
prometheus.watch()
Path("made").write_text(str(any(Path("gauges").glob("gauge_live*"))))
"""
CONFIGURATION = """
from geventbatch.integrations.gunicorn import *

from psycogreen.gevent import patch_psycopg

patch_psycopg()


def post_fork(server, worker):
    raise AssertionError("no hook is called")
"""


def said(directory: Path, *arguments: str, path: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """What is said in *directory*, by an interpreter whose warnings are errors."""
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "geventbatch", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(path), **environ},
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
    assert ("GEVENTBATCH_COMPILE=1 pip install " in words) is not geventbatch.COMPILED
    assert "wheels" not in words  # nobody has said that there are any
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


def test_a_directory_that_hides_what_is_installed_is_told(tmp_path: Path) -> None:
    installed = tmp_path / "site/geventbatch"
    installed.mkdir(parents=True)
    (described := tmp_path / "site/geventbatch-9.dist-info").mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: geventbatch\nVersion: 9\n")
    (clone := tmp_path / "clone").mkdir()
    (clone / "geventbatch").symlink_to(Path(geventbatch.__file__).parent)
    done = said(clone, path=tmp_path / "site")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert (
        f", in {clone}/geventbatch That hides the one that is installed, in {installed}: run this in another" in words
    )


def test_the_gauges_that_an_application_makes_here_do_not_stay_in_the_folder_of_a_server(tmp_path: Path) -> None:
    (gauges := tmp_path / "gauges").mkdir()
    (tmp_path / "shop.py").write_text(GAUGES)
    done = said(tmp_path, "shop", PROMETHEUS_MULTIPROC_DIR=str(gauges))
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "made").read_text() == "True"
    assert list(gauges.glob("gauge_live*")) == []


@pytest.mark.parametrize("name", ["shop", "shop:app"])
def test_an_application_without_a_problem_is_imported_patched_and_the_status_is_0(tmp_path: Path, name: str) -> None:
    (tmp_path / "shop.py").write_text(WELL)
    done = said(tmp_path, name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["check_setup", "nothing,", "after", "importing", name]


def test_a_factory_is_called_as_gunicorn_calls_it_and_its_application_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(FACTORY)
    done = said(tmp_path, "shop:create_app('production', testing=True)")
    assert (done.returncode, done.stderr) == (1, "")
    assert " check_setup unsaved: " in " ".join(done.stdout.split())


def test_a_factory_that_is_not_called_is_told_with_the_call_and_the_status_2(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(FACTORY)
    done = said(tmp_path, "shop:create_app")
    assert (done.returncode, done.stderr) == (2, "")
    told = " check_setup not asked: shop:create_app is a factory, and was not called: 'shop:create_app()' calls it"
    assert " ".join(done.stdout.split()).endswith(told)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that can be imported in this process."""
    name = f"shop_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(WELL + FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["app", "function", "wrapper", "App"])
def test_what_may_be_an_application_is_no_factory(shop: str, name: str) -> None:
    assert _load(f"{shop}:{name}") == (f"importing {shop}:{name}", getattr(sys.modules[shop], name))


def test_a_module_with_a_factory_is_imported_and_the_call_is_named(shop: str) -> None:
    told = f"importing {shop}; if it does not call its create_app, name it: '{shop}:create_app()'"
    assert _load(shop) == (told, sys.modules[shop])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nosuch", "shop has no nosuch"),
        ("nosuch()", "shop has no nosuch"),
        ("with_one", "shop:with_one is a factory, and was not called: 'shop:with_one()' calls it"),
        *[
            (text, f"{text!r} is neither a name nor a call of one with literal arguments")
            for text in ("", "app.app", "app(", "create_app(app)", "create_app(**{})", "create_app(*[])")
        ],
    ],
)
def test_a_name_that_is_not_there_or_is_no_name_is_refused(shop: str, name: str, why: str) -> None:
    with pytest.raises(_NoApplication) as raised:
        _load(f"{shop}:{name}")
    assert str(raised.value).replace(shop, "shop") == why


def test_psycopg2_is_patched_by_the_configuration_of_gunicorn_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("import psycopg2\napp = object()")
    (tmp_path / "gunicorn.conf.py").write_text(CONFIGURATION)
    done = said(tmp_path, "--config", "gunicorn.conf.py", "shop:app")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split()[1:] == ["nothing,", "after", "importing", "shop:app"]
    without = said(tmp_path, "shop:app")
    assert (without.returncode, without.stderr) == (1, "")
    told = " ".join(without.stdout.split())
    assert " check_setup psycopg2: psycopg2 waits in C" in told
    assert "with --config gunicorn.conf.py, at the top of that file; not in a hook of gunicorn" in told


def test_a_configuration_that_cannot_be_executed_is_a_traceback_and_the_status_2(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(WELL)
    done = said(tmp_path, "--config", "conf.py", "shop:app")
    assert done.returncode == 2
    assert "FileNotFoundError" in done.stderr
    assert "not asked: executing conf.py raised what is above" in done.stdout


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

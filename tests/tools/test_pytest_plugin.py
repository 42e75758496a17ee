"""``pytest_geventbatch``: the fixtures, in a pytest of their own, and what the plugin costs who does not use them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

from tests.support.servers import postgres_url

ROOT = Path(__file__).parents[2]


def entry_point() -> EntryPoint:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    ((name, value),) = told.items()
    return EntryPoint(name, value, "pytest11")


def run_pytest(folder: Path, source: str) -> str:
    """Run *source* as a test module, with the plugin as an installed distribution gives it."""
    plugin = entry_point()
    for name in ("metadata", "site"):
        (folder / name).mkdir()
    information = folder / "metadata" / "plugin_of_this_folder-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-this-folder\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[pytest11]\n{plugin.name} = {plugin.value}\n")
    (folder / "test_sample.py").write_text(source)
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    path = os.pathsep.join([str(folder / "metadata"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=50,
    ).stdout


def test_the_plugin_is_what_its_name_says() -> None:
    assert entry_point().load().__doc__.startswith("The fixtures of `geventbatch.testing`")


def test_who_uses_none_of_the_fixtures_imports_neither_geventbatch_nor_gevent(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        """
import sys

def test_nothing_is_imported(pytestconfig):
    assert pytestconfig.pluginmanager.has_plugin("geventbatch")
    assert "pytest_geventbatch" in sys.modules
    assert not {"geventbatch", "gevent", "greenlet"} & set(sys.modules)
""",
    )
    assert "1 passed" in output


def test_each_fixture_does_what_the_function_of_its_name_does(tmp_path: Path) -> None:
    output = run_pytest(
        tmp_path,
        """
from gevent import monkey; monkey.patch_all()
import gevent, pytest
from geventbatch import Processor, SaveFailed, current_batch
from geventbatch.testing import ImpureOperation

kept = []

def give(numbers):
    return numbers

@pytest.fixture
def processor():
    with Processor(load_resource=lambda key: kept, save_resource=lambda *_: None, min_duration=10) as processor:
        yield processor

def test_clock(geventbatch_clock, processor):
    processor.run("k", list.append, 1)
    assert geventbatch_clock.now() == 10

def test_faults(geventbatch_clock, processor, geventbatch_faults):
    geventbatch_faults(processor).lose_answer()
    with pytest.raises(SaveFailed):
        processor.run("k", list.append, 2)

def test_a_fault_never_happens(processor, geventbatch_faults):
    geventbatch_faults(processor).lose_answer()

def test_check(geventbatch_clock, processor, geventbatch_check):
    assert processor.run("k", give) == kept
    geventbatch_check(processor)
    with pytest.raises(ImpureOperation):
        processor.run("k", give)

def test_check_with_options(geventbatch_clock, processor, geventbatch_check):
    geventbatch_check(processor, skip=["shares"])
    assert processor.run("k", give) == kept

@pytest.mark.usefixtures("geventbatch_checked")
def test_checked(geventbatch_clock):
    with pytest.raises(ImpureOperation):
        always.run("k", give)

def test_batching_off(geventbatch_batching_off):
    assert always.run("k", lambda _: current_batch().alone)

def test_batching_is_on_again():
    assert always.batching

always = Processor(load_resource=lambda key: kept, save_resource=lambda *_: None, min_duration=0)
""",
    )
    assert "9 errors" not in output
    told = output.splitlines()[-1]
    assert "8 passed, 3 errors" in told, output
    for name in ("a_fault_never_happens", "check", "checked"):
        assert f"ERROR test_sample.py::test_{name} - " in output
    assert "planned, but never happened: <Fault: save 1 raises ConnectionResetError" in output


# docs/testing.md

PAGE = (ROOT / "docs" / "testing.md").read_text()


def blocks(language: str) -> list[str]:
    return [block.partition("\n```")[0] + "\n" for block in PAGE.split(f"\n```{language}\n")[1:]]


def test_the_examples_of_the_page_are_a_module_whose_tests_pass(tmp_path: Path) -> None:
    source = "\n".join(block for block in blocks("python") if not block.startswith(("# examples/", "# conftest.py")))
    output = run_pytest(tmp_path, source)
    assert source.count("\ndef test_") == 6
    assert output.splitlines()[-1].startswith("6 passed"), output


def test_the_fixture_of_the_page_rolls_back_what_flask_sqlalchemy_commits(tmp_path: Path) -> None:
    (fixture,) = [block for block in blocks("python") if block.startswith("# conftest.py")]
    (tmp_path / "conftest.py").write_text(f"""
from gevent import monkey

monkey.patch_all()

import pytest
from geventbatch.testing import batching_off, joined_engine
from shop import batches, create_app, db

{fixture}""")
    (tmp_path / "shop.py").write_text("""
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from geventbatch.integrations.flask import GeventBatch
from geventbatch.stores import SQLAlchemyStore
from sqlalchemy.orm import Mapped, mapped_column

URLS = []
db = SQLAlchemy()
batches = GeventBatch()
trains = batches.processor(make_store=lambda: SQLAlchemyStore.mapped(db.session, Train), min_duration=0)

class Train(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)
    sold: Mapped[int]

def sell(train):
    train.sold += 1
    return train.sold

def create_app():
    app = Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = URLS[-1]
    db.init_app(app)
    batches.init_app(app)

    @app.post("/trains/<int:number>")
    def view(number):
        assert db.session.get(Train, number)
        return {"sold": trains.run(number, sell)}

    return app
""")
    urls = [f"sqlite:///{tmp_path / 'shop.sqlite'}", postgres_url().replace("postgresql:", "postgresql+psycopg:")]
    output = run_pytest(
        tmp_path,
        f"""
import pytest
import shop
from shop import Train, create_app, db, sell, trains

@pytest.fixture(params={urls}, autouse=True)
def tables(request):
    shop.URLS.append(request.param)
    with create_app().app_context():
        db.create_all()
        yield
        try:
            assert db.session.scalars(db.select(Train)).all() == []
        finally:
            db.session.remove()
            db.drop_all()
            db.engine.dispose()

@pytest.mark.parametrize("time", ["once", "again"])
def test_sold(tables, app, time):
    db.session.add(Train(id=1, sold=0))
    db.session.commit()
    assert trains.run(1, sell) == 1
    assert app.test_client().post("/trains/1").json == {{"sold": 2}}
    assert db.session.get(Train, 1).sold == 2
""",
    )
    assert output.splitlines()[-1].startswith("4 passed"), output


def test_the_example_that_the_page_includes_passes(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```{literalinclude} \.\./(\S+)\n:language: python\n```", PAGE)
    output = run_pytest(tmp_path, (ROOT / shown).read_text())
    assert output.splitlines()[-1].startswith("2 passed"), output


def test_what_the_page_shows_of_the_examples_is_there() -> None:
    shown = [block for block in blocks("python") if block.startswith("# examples/")]
    assert shown
    for block in shown:
        path, code = block.removeprefix("# ").split("\n", 1)
        assert code in (ROOT / path).read_text()

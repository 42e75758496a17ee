"""`check_setup`, and the warning of the first run in a process."""

from __future__ import annotations

import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from geventbatch import SetupProblem, check_setup
from tests.support import mariadb

LOOK = """
{before}
import json, sys, types, warnings
from geventbatch import Processor, check_setup

def fake(name, **members):
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(members)

{imports}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with Processor(min_duration=0) as processor:
        for _ in range(2):
            processor.run("k", lambda resource: None)
print(json.dumps([[problem.name for problem in check_setup()], [str(warning.message) for warning in caught]]))
"""

PATCHED = "from gevent import monkey; monkey.patch_all()"


def looked(imports: str = "", before: str = PATCHED) -> tuple[list[str], list[str]]:
    """The problems of a process, and what its first two runs warn of."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(before=before, imports=imports)],
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    names, warned = json.loads(done.stdout.splitlines()[-1])
    return names, warned


def modules(monkeypatch: pytest.MonkeyPatch, **members: dict[str, Any]) -> None:
    """Have these modules be imported, as far as one can see, and no other driver; and no store of another test."""
    for name in ("psycopg", "psycopg.waiting", "psycopg2.extensions", "MySQLdb._mysql", CEXT, ENGINES):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name, its in members.items():
        module = ModuleType(name)
        vars(module).update(its)
        monkeypatch.setitem(sys.modules, name.replace("__", "."), module)


pytestmark = pytest.mark.usefixtures("no_other_processors")

CEXT = "mysql.connector.connection_cext"
ENGINES = "geventbatch.stores.sqlalchemy._engines"


def wait_c() -> None:
    """Wait in C."""


class Connection:
    """As psycopg's."""


@pytest.mark.parametrize(
    "imported",
    [
        {},
        {"psycopg": {"Connection": Connection}, "psycopg__waiting": {"wait": len, "wait_c": wait_c}},
        {"psycopg2__extensions": {"get_wait_callback": lambda: len}},
        {"psycopg": {}, "psycopg2__extensions": {"get_wait_callback": lambda: None}},
        {"MySQLdb": {}, "pymysql": {}},
    ],
)
def test_of_drivers_that_wait_in_gevents_way_there_is_nothing_to_say(
    monkeypatch: pytest.MonkeyPatch, imported: dict[str, Any]
) -> None:
    modules(monkeypatch, **imported)
    assert check_setup() == []


@pytest.mark.parametrize(
    ("imported", "name", "mend"),
    [
        (
            {"psycopg2__extensions": {"get_wait_callback": lambda: None}},
            "psycopg2",
            "psycogreen.gevent.patch_psycopg()",
        ),
        ({"MySQLdb___mysql": {}}, "mysqlclient", "pymysql.install_as_MySQLdb()"),
    ],
)
def test_a_driver_that_blocks_is_named_with_what_mends_it(
    monkeypatch: pytest.MonkeyPatch, imported: dict[str, Any], name: str, mend: str
) -> None:
    modules(monkeypatch, **imported)
    (problem,) = check_setup()
    assert problem.name == name
    assert mend in problem.mend
    assert "every greenlet" in problem.what


USES = f"""
import psycopg.waiting
{PATCHED}
import gc, json, warnings
import psycopg_pool
import sqlalchemy as sa
from geventbatch import Processor, check_setup
from geventbatch.stores import SQLAlchemyStore
warnings.simplefilter("ignore")
named = dict()

def use(how, make):
    gc.collect()  # what was used before
    it = make()
    named[how] = [problem.name for problem in check_setup()]

def set_up_django():
    import django
    from django.conf import settings
    settings.configure(DATABASES=dict(default=dict(ENGINE="django.db.backends.postgresql")))
    django.setup()
    return django.db.connections["default"]

url = "postgresql+psycopg://"
use("imported", lambda: psycopg)
use("another driver", lambda: [sa.create_engine(one) for one in ("postgresql+psycopg2://", "sqlite://")])
use("connection", lambda: psycopg.Connection.__new__(psycopg.Connection))
use("pool", lambda: psycopg_pool.ConnectionPool(open=False))
use("engine", lambda: sa.create_engine(url))
use("closed again", lambda: None)
def hidden():
    store = SQLAlchemyStore.documents(sa.create_engine(url), "documents")
    gc.freeze()
    return store
use("store of an engine that the collector leaves out", hidden)
gc.unfreeze()
use("Django", set_up_django)
print(json.dumps(named))
"""


def test_psycopg_that_was_imported_before_the_patching_is_named_where_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", USES], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "imported": [],
        "another driver": [],
        "connection": ["psycopg"],
        "pool": ["psycopg"],
        "engine": ["psycopg"],
        "closed again": [],
        "store of an engine that the collector leaves out": ["psycopg"],
        "Django": ["psycopg"],
    }


def test_psycopg2_is_named_beside_psycopg_if_a_store_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: dict[str, Any] = {"drivers": lambda: {"psycopg2"}}
    extensions = {"get_wait_callback": lambda: None}
    both: dict[str, Any] = {"psycopg": {}, "psycopg2__extensions": extensions}
    modules(monkeypatch, **both, geventbatch__stores__sqlalchemy___engines=engines)
    assert [problem.name for problem in check_setup()] == ["psycopg2"]


def test_mysql_connector_is_named_when_a_connection_is_one_of_its_extension_and_not_because_that_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CMySQLConnection:
        """As the extension's."""

    modules(monkeypatch, mysql__connector__connection_cext={"CMySQLConnection": CMySQLConnection})
    assert check_setup() == []
    connection = CMySQLConnection()
    (problem,) = check_setup()
    assert problem.name == "mysql-connector"
    assert "use_pure=True" in problem.mend
    del connection


CONNECTS = """
import _mysql_connector  # first of all, or else the driver may not find it
from gevent import monkey; monkey.patch_all()
import sys, warnings
import sqlalchemy as sa
from geventbatch import check_setup
warnings.simplefilter("ignore")

def names():
    return [problem.name for problem in check_setup()]

url = sa.make_url(sys.argv[1]).set(drivername="mysql+mysqlconnector")
query = dict(url.query)
url = url.set(query={key: value for key, value in query.items() if key == "unix_socket"})
for pure in (True, False):
    engine = sa.create_engine(url, connect_args={"use_pure": pure})
    before = names()
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT 1")
        print(before, type(connection.connection.driver_connection).__name__, names())
    engine.dispose()
import django
from django.conf import settings
database = {"ENGINE": "mysql.connector.django"}
settings.configure(DATABASES={"default": {}, "one": database, "pure": {**database, "OPTIONS": {"use_pure": True}}})
django.setup()
import geventbatch.stores.django
print([problem.what for problem in check_setup()])
"""


@pytest.mark.mariadb
def test_the_real_extension_of_mysql_connector_is_named_when_it_has_connected_or_djangos_settings_say_it_will() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONNECTS, mariadb.url()], capture_output=True, text=True, check=False, timeout=50
    )
    *connected, told = done.stdout.splitlines()
    assert connected == ["[] MySQLConnection []", "[] CMySQLConnection ['mysql-connector']"], done.stderr
    assert told.count("mysql-connector-python is to connect to Django's database 'one' by its C extension, ") == 1


def test_a_driver_that_blocks_is_warned_of_at_the_first_run_only() -> None:
    names, (warning,) = looked('fake("MySQLdb._mysql")')
    assert names == ["mysqlclient"]
    assert "pymysql.install_as_MySQLdb()" in warning


def test_psycopg_that_is_used_and_waits_in_c_is_warned_of_at_the_first_run() -> None:
    names, (warning,) = looked(
        before=f"import psycopg.waiting\n{PATCHED}",
        imports="import psycopg_pool; pool = psycopg_pool.ConnectionPool(open=False)",
    )
    assert names == ["psycopg"]
    assert "psycopg waits in C, so that a statement blocks every greenlet" in warning
    assert "monkey.patch_all() first" in warning


def test_a_process_that_is_not_patched_has_that_problem_alone() -> None:
    names, warned = looked('fake("psycopg2.extensions", get_wait_callback=lambda: None)', before="")
    assert names == ["unpatched"]
    assert len(warned) == 1


def test_huey_consumer_that_is_not_patched_is_told_what_to_run_instead() -> None:
    names, warned = looked('sys.argv[0] = "/venv/bin/huey_consumer"', before="")
    assert names == ["unpatched", "huey_consumer"]
    assert "geventbatch.integrations.huey.consume(huey)" in warned[1]


def test_a_process_that_is_patched_after_the_import_is_told_so_at_its_first_run() -> None:
    names, (warning,) = looked(before="import geventbatch", imports=PATCHED)
    assert names == ["patched-late"]
    assert "what was made or imported by name before" in warning
    assert "gevent-early-monkey-patch" in warning


def test_a_fork_that_gevent_does_not_know_of_is_a_problem() -> None:
    names, (warning,) = looked(before="from gevent import monkey; monkey.patch_all(os=False)")
    assert names == ["fork-unpatched"]
    assert "without os=False" in warning


FORK = """
from gevent import monkey; monkey.patch_all()
import os, warnings
from geventbatch import Processor, check_setup
from tests.support.children import wait_for
processor = Processor(min_duration=0)
if {runs}:
    processor.run("k", lambda resource: None)
pid = os.fork()
if pid == 0:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor.run("k", lambda resource: None)
    print([problem.name for problem in check_setup()], len(caught), flush=True)
    os._exit(0)
wait_for(pid)
print([problem.name for problem in check_setup()])
"""


@pytest.mark.parametrize(("runs", "child"), [(True, "['forked-late'] 1"), (False, "[] 0")])
def test_a_child_of_a_process_that_had_run_batches_is_told_so(runs: bool, child: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK.format(runs=runs)], capture_output=True, text=True, check=True, timeout=50
    )
    assert done.stdout.splitlines() == [child, "[]"]


def test_a_problem_is_a_frozen_record_that_reads_as_two_sentences() -> None:
    problem = SetupProblem("name", "What is wrong.", "What mends it.")
    assert str(problem) == "What is wrong. What mends it."
    with pytest.raises(AttributeError):
        problem.name = "other"  # type: ignore[misc]


def test_where_warnings_are_errors_the_first_run_raises_and_what_else_is_to_begin_then_does() -> None:
    source = f"""
{PATCHED}
import sys, warnings
from geventbatch import Processor
from geventbatch._core import process
sys.modules["MySQLdb._mysql"] = sys
process.at_first_run(lambda: print("begun"))
warnings.simplefilter("error")
processor = Processor(min_duration=0)
try:
    processor.run("k", print)
except RuntimeWarning as warning:
    print("raised", "mysqlclient" in str(warning))
print(processor.run("k", lambda resource: "answered"), processor.stats().operations_total)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=50)
    assert done.stdout.splitlines() == ["begun", "raised True", "answered 1"]

"""`check`, and the warning of the first run in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from geventbatch import Problem, check

LOOK = """
{before}
import json, sys, types, warnings
from geventbatch import Processor, check

def fake(name, **members):
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(members)

def wait_c():
    pass

{imports}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with Processor(min_duration=0) as processor:
        for _ in range(2):
            processor.run("k", lambda resource: None)
print(json.dumps([[problem.name for problem in check()], [str(warning.message) for warning in caught]]))
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


def test_in_a_patched_process_with_drivers_that_wait_in_gevents_way_there_is_nothing_to_say() -> None:
    waits = 'fake("psycopg"); fake("psycopg.waiting", wait=len, wait_c=wait_c)\n'
    waits += 'fake("MySQLdb"); fake("pymysql")'
    assert looked(waits) == ([], [])
    assert looked('fake("psycopg2.extensions", get_wait_callback=lambda: len)') == ([], [])


@pytest.mark.parametrize(
    ("imports", "name", "mend"),
    [
        ('fake("psycopg"); fake("psycopg.waiting", wait=wait_c, wait_c=wait_c)', "psycopg", "monkey.patch_all() first"),
        (
            'fake("psycopg2.extensions", get_wait_callback=lambda: None)',
            "psycopg2",
            "psycogreen.gevent.patch_psycopg()",
        ),
        ('fake("MySQLdb._mysql")', "mysqlclient", "pymysql.install_as_MySQLdb()"),
        ('fake("_mysql_connector")', "mysql-connector", "use_pure=True"),
    ],
)
def test_a_driver_that_blocks_is_named_with_what_mends_it_and_warned_of_at_the_first_run_only(
    imports: str, name: str, mend: str
) -> None:
    names, (warning,) = looked(imports)
    assert names == [name]
    assert mend in warning
    assert "every greenlet" in warning


def test_the_real_psycopg_that_was_imported_before_the_patching_is_found() -> None:
    names, _ = looked(before=f"import psycopg.waiting\n{PATCHED}")
    assert names == ["psycopg"]
    assert looked(before=f"{PATCHED}\nimport psycopg.waiting") == ([], [])


def test_a_process_that_is_not_patched_has_that_problem_alone() -> None:
    names, warned = looked('fake("psycopg2.extensions", get_wait_callback=lambda: None)', before="")
    assert names == ["unpatched"]
    assert len(warned) == 1


def test_a_fork_that_gevent_does_not_know_of_is_a_problem() -> None:
    names, (warning,) = looked(before="from gevent import monkey; monkey.patch_all(os=False)")
    assert names == ["fork-unpatched"]
    assert "without os=False" in warning


FORK = """
from gevent import monkey; monkey.patch_all()
import os, warnings
from geventbatch import Processor, check
processor = Processor(min_duration=0)
if {runs}:
    processor.run("k", lambda resource: None)
pid = os.fork()
if pid == 0:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor.run("k", lambda resource: None)
    print([problem.name for problem in check()], len(caught), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print([problem.name for problem in check()])
"""


@pytest.mark.parametrize(("runs", "child"), [(True, "['forked-late'] 1"), (False, "[] 0")])
def test_a_child_of_a_process_that_had_run_batches_is_told_so(runs: bool, child: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK.format(runs=runs)], capture_output=True, text=True, check=True, timeout=50
    )
    assert done.stdout.splitlines() == [child, "[]"]


def test_a_problem_is_a_frozen_record_that_reads_as_two_sentences() -> None:
    problem = Problem("name", "What is wrong.", "What mends it.")
    assert str(problem) == "What is wrong. What mends it."
    with pytest.raises(AttributeError):
        problem.name = "other"  # type: ignore[misc]


def test_this_very_process_is_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check() == []
    modules: dict[str, Any] = {"MySQLdb._mysql": os}
    monkeypatch.setitem(sys.modules, *modules.popitem())
    assert [problem.name for problem in check()] == ["mysqlclient"]

"""`geventbatch.testing.store_contract`: our own stores pass it, and each store that does wrong is caught by it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from geventbatch.testing import StoreBench, _store_trial, store_contract
from tests.support.adapters.base import Case, cases
from tests.support.benches import CaseBench, beside
from tests.support.psycopg_bench import (
    AnswersBeforeItSaved,
    FailsEverybodyForAConstraint,
    HoldsItsLockWhenNothingIsSaved,
    KeepsWhatItHasLoaded,
    LeaksAfterADeadline,
    LeaksFromAPoolWithoutBounds,
    LosesConcurrentWrites,
    PsycopgBench,
    SavesWhatWasLeftByAnError,
    SaysThatNothingWasSavedOfALostCommit,
    SharesStateBetweenKeys,
    SwallowsTheErrorOfCommit,
    TakesItsOwnWriteForAConflict,
    schema,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from geventbatch.testing import StoreCheck

ROOT = Path(__file__).parents[2]

OURS = [
    "sqlalchemy-document-version-sqlite",
    "sqlalchemy-document-lock-postgresql",
    "sqlalchemy-mapped-version-postgresql",
    "django-row-sqlite",
    "django-lock-postgresql",
    "redis",
    "sql-psycopg-postgresql",
]
"""Each store with and without locks, with and without a server; others go with ``-m variants`` or ``-m mariadb``."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Case], str]]:
    """Gives the address of a case's place, which is there until the last test has ended."""
    with ExitStack() as stack:

        @cache
        def made(case: Case) -> str:
            return stack.enter_context(case.fresh(tmp_path_factory.mktemp("place")))

        yield made


def of_ours() -> Iterator[Any]:
    for case in cases():
        if case.name.endswith("-bulk") or case.name.startswith("redis-cluster"):
            continue
        marks = case.marks or (() if case.name in OURS else (pytest.mark.variants,))
        for check in store_contract(CaseBench(case.name)):
            yield pytest.param(case, check, id=f"{case.name}-{check}", marks=marks)


@pytest.mark.parametrize(("case", "check"), list(of_ours()))
def test_our_own_stores_pass(case: Case, check: StoreCheck, place: Callable[[Case], str]) -> None:
    with case.opens(place(case)) as adapter:
        beside[adapter.address] = adapter
        try:
            check(CaseBench(case.name, adapter.address))
        finally:
            del beside[adapter.address]


@pytest.fixture(scope="module")
def accounts() -> Iterator[str]:
    with schema() as name:
        yield name


@pytest.mark.parametrize(
    ("wrong", "caught_by", "told"),
    [
        (LosesConcurrentWrites, "two_processes_lose_nothing", "after two processes had each added 1"),
        (LosesConcurrentWrites, "two_stores_lose_nothing", r"were answered \[1, 1\]"),
        (
            LosesConcurrentWrites,
            "what_somebody_else_writes_between_load_and_save_is_not_lost",
            "that was answered 11, and 11 is saved",
        ),
        (LosesConcurrentWrites, "with_batching_off_nothing_is_lost", "after operations without batching"),
        (AnswersBeforeItSaved, "nobody_is_answered_before_the_save_is", "before the database had answered the save"),
        (SwallowsTheErrorOfCommit, "a_save_that_does_not_arrive_is_no_success", "was answered 11, and 10 is saved"),
        (TakesItsOwnWriteForAConflict, "a_save_whose_answer_is_lost_is_applied_once", "answered 12, and 12 is saved"),
        (
            SaysThatNothingWasSavedOfALostCommit,
            "a_save_whose_answer_is_lost_is_applied_once",
            "answered 12, and 12 is saved",
        ),
        (LeaksAfterADeadline, "deadlines_in_the_load_lose_no_connection", "0 of 4 batches could run at once"),
        (LeaksAfterADeadline, "deadlines_in_the_save_are_told_as_they_are", "0 of 4 batches could run at once"),
        (
            LeaksFromAPoolWithoutBounds,
            "deadlines_in_the_load_lose_no_connection",
            "12 connections are open, for 8 batches",
        ),
        (SharesStateBetweenKeys, "keys_are_apart", "100 is saved at .*, not 101"),
        (KeepsWhatItHasLoaded, "an_answer_means_saved", "another program had saved 100"),
        (SavesWhatWasLeftByAnError, "a_deadline_between_load_and_save_saves_nothing", "0 is saved at .*, not 10"),
        (
            HoldsItsLockWhenNothingIsSaved,
            "a_batch_of_which_nothing_is_left_saves_nothing",
            "an operation raised, and its caller was answered BatchTimeout",
        ),
        (
            FailsEverybodyForAConstraint,
            "a_state_that_the_database_refuses_fails_its_culprit_alone",
            "before the culprit were answered SaveFailed",
        ),
    ],
)
def test_a_store_that_does_wrong_is_caught(
    wrong: type[PsycopgBench], caught_by: str, told: str, accounts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store_trial, "PATIENCE", 4.0)
    (check,) = [one for one in store_contract(wrong) if one.name == caught_by]
    with pytest.raises(AssertionError, match=rf"^{wrong.__name__}: .*{told}.*\. The contract: "):
        check(wrong(accounts))


@pytest.mark.parametrize("marker", ["save_marker", "load_marker"])
def test_a_marker_that_no_message_has_is_told_of(marker: str, accounts: str) -> None:
    bench = PsycopgBench(accounts)
    setattr(bench, marker, b"what nobody sends")
    of_marker = {"save_marker": "a_save_that_does_not_arrive_is_no_success"}
    name = of_marker.get(marker, "deadlines_in_the_load_lose_no_connection")
    (check,) = [one for one in store_contract(bench) if one.name == name]
    with pytest.raises(AssertionError, match=rf"no message of the store had the {marker} b'what nobody sends' in it"):
        check(bench)


class OneAtATime(PsycopgBench):
    max_batches = 1
    load_marker = save_marker = b""
    violate = StoreBench.violate  # type: ignore[assignment] # as if it were not written


class WithOneMarker(PsycopgBench):
    load_marker = b""


def test_what_a_bench_has_nothing_for_is_not_checked() -> None:
    found = {cls: {str(check) for check in store_contract(cls)} for cls in (OneAtATime, PsycopgBench)}
    assert found[OneAtATime] < found[PsycopgBench]
    assert found[PsycopgBench] - found[OneAtATime] == {
        "a_save_that_does_not_arrive_is_no_success",
        "a_save_whose_answer_is_lost_is_applied_once",
        "a_state_that_the_database_refuses_fails_its_culprit_alone",
        "connections_that_have_ended_cost_no_more_than_a_safe_error",
        "deadlines_in_the_load_lose_no_connection",
        "deadlines_in_the_save_are_told_as_they_are",
        "keys_are_apart",
        "nobody_is_answered_before_the_save_is",
        "two_stores_lose_nothing",
        "what_somebody_else_writes_between_load_and_save_is_not_lost",
    }


@pytest.mark.parametrize("wrong", [WithOneMarker, dict, "PsycopgBench"])
def test_what_is_no_bench_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"WithOneMarker needs both load_marker and save_marker|takes a StoreBench"):
        store_contract(wrong)


def test_the_contract_patches_nothing_in_the_process_that_asks_for_it() -> None:
    program = (
        "from gevent import monkey\n"
        "from geventbatch.testing import StoreBench, store_contract\n"
        "assert store_contract(StoreBench)\n"
        "assert not monkey.is_anything_patched()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


OF_AN_AUTHOR = """
from gevent import monkey

monkey.patch_all()

import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from geventbatch.stores import as_not_saved
from geventbatch.testing import StoreBench, store_contract

PATH = Path(__file__).with_name("totals.sqlite")


@contextmanager
def open_total(key):
    with closing(connected()) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
            row = connection.execute("SELECT total FROM totals WHERE key = ?", [key]).fetchone() or [0]
            resource = {"total": row[0]}
            yield resource
            connection.execute("REPLACE INTO totals VALUES (?, ?)", [key, resource["total"]])
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise as_not_saved(error, key) from error


def connected():
    connection = sqlite3.connect(PATH, isolation_level=None, timeout=20)
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("CREATE TABLE IF NOT EXISTS totals (key TEXT PRIMARY KEY, total INTEGER CHECK (total >= 0))")
    return connection


class Bench(StoreBench):
    max_batches = 1

    @contextmanager
    def open_store(self, server):
        yield open_total

    def add(self, resource, amount):
        resource["total"] += amount
        return resource["total"]

    def violate(self, resource):
        resource["total"] = -1

    def get(self, key):
        with closing(connected()) as connection:
            return (connection.execute("SELECT total FROM totals WHERE key = ?", [key]).fetchone() or [None])[0]

    def put(self, key, total):
        with closing(connected()) as connection:
            connection.execute("REPLACE INTO totals VALUES (?, ?)", [key, total])


@pytest.mark.parametrize("check", store_contract(Bench), ids=str)
def test_the_store(check):
    check(Bench())
"""


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_the_tests_of_an_author_are_run_by_pytest_however_it_imports_them(mode: str, tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(OF_AN_AUTHOR)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    elsewhere = tmp_path / "elsewhere"  # so that nobody finds the module in the current directory
    elsewhere.mkdir()
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--import-mode={mode}", str(tmp_path)],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "9 passed" in ran.stdout, ran.stdout + ran.stderr

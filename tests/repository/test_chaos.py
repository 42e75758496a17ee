"""Broken on purpose, in short: `tests/support/chaos` says how it is done, and how a whole night of it is run."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos.clients import Entry
from tests.support.chaos.judge import (
    BESIDE,
    BOOKS,
    HALF,
    LIED,
    LOST,
    MISPLACED,
    SUM,
    TWICE,
    UNASKED,
    broken_books,
    broken_rules,
    names_of,
    unknown_but_there,
)
from tests.support.chaos.places import STORES, Found
from tests.support.chaos.settings import MUTANTS
from tests.support.servers import side_by_side

ROOT = Path(__file__).parents[2]

TRIES = 5
"""A mutant is found in the first round, nearly always."""


def run(program: str, *arguments: str) -> tuple[int, str]:
    """The exit status of a program of the chaos, and what it printed."""
    command = [sys.executable, "-m", program, *arguments]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return ended.returncode, ended.stdout


def succeeds(program: str, *arguments: str) -> None:
    status, output = run(program, *arguments)
    assert status == 0, output


def rounds(*stores: str) -> None:
    """Play a short one for each."""
    side_by_side(succeeds, *(("tests.support.chaos", "--store", store, "--seconds", "5") for store in stores))


def is_found(mutant: str, store: str, *rules: str) -> None:
    """Fail unless the judge says that one of these rules is broken."""
    output = ""
    for seed in range(TRIES):
        arguments = ("--store", store, "--seconds", "4", "--seed", str(seed), "--mutant", mutant)
        status, output = run("tests.support.chaos", *arguments)
        if status == 1 and any(line.startswith(rules) for line in output.splitlines()):
            return
    pytest.fail(f"{mutant!r} on {store} was found by nobody; the last round:\n{output}")


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_what_was_answered_is_true_whatever_breaks() -> None:
    rounds(*STORES[:5])


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_transfers_are_there_whole_or_not_at_all_whatever_breaks() -> None:
    rounds(*(store for store in STORES if store.startswith("transfers-") and "mariadb" not in store))


@pytest.mark.mariadb
@pytest.mark.timeout(300)
def test_transfers_on_mariadb_are_there_whole_or_not_at_all_whatever_breaks() -> None:
    rounds(*(store for store in STORES if "mariadb" in store))


def test_transfers_are_there_whole_or_not_at_all_in_a_short_round() -> None:
    succeeds("tests.support.chaos", "--store", "transfers-postgres-version", "--seconds", "2")


@pytest.mark.chaos
@pytest.mark.timeout(300)
def test_a_library_that_is_wrong_is_found() -> None:
    cases = [
        ("no-conflicts", "postgres-version", LOST),
        ("lying", "postgres-lock", LIED, TWICE),
        ("early", "redis-version", LOST),
        ("forgetful", "postgres-lock", TWICE),
        ("trusting", "postgres-reuse", LOST),
        ("halves", "transfers-postgres-lock", HALF),
        ("lying", "transfers-postgres-version", LIED, TWICE),
        ("forgetful", "transfers-redis-version", TWICE),
    ]
    assert {mutant for mutant, *_ in cases} == set(MUTANTS)
    side_by_side(is_found, *cases)


@pytest.mark.chaos
@pytest.mark.timeout(120)
def test_ten_times_the_capacity_is_refused_and_the_capacity_served() -> None:
    succeeds("tests.support.chaos.overload", "--seconds", "6")


@pytest.mark.chaos
@pytest.mark.timeout(120)
def test_workers_stay_as_they_are_while_keys_come_and_go() -> None:
    succeeds("tests.support.chaos.soak", "--seconds", "10")


# -- the judge ------------------------------------------------------------------------------------------------


def judged(entry: Entry, times: int) -> list[str]:
    found = {"k": [entry.name] * times} if times else {}
    return rules_of([entry], found)


def rules_of(entries: list[Entry], found: Found) -> list[str]:
    return [line.partition(":")[0] for line in broken_rules(entries, found, None)]


@pytest.mark.parametrize(
    ("told", "times", "rule"),
    [
        ("saved", 0, LOST),
        ("saved", 1, None),
        ("saved", 2, TWICE),
        ("refused", 0, None),
        ("refused", 1, LIED),
        ("unknown", 0, None),
        ("unknown", 1, None),
        ("unknown", 2, TWICE),
    ],
)
def test_the_judge_compares_what_is_there_with_what_was_told(told: Any, times: int, rule: str | None) -> None:
    assert judged(Entry("n", "k", "once", told=told, places=[1]), times) == ([] if rule is None else [rule])


def test_the_judge_finds_what_nobody_has_asked_for() -> None:
    entries = [Entry("n", "k", "once", told="unknown")]
    lines = list(broken_rules(entries, {"k": ["n", "m"], "l": ["n"]}, None))
    assert lines == [f"{UNASKED}: 'm' at 'k'", f"{UNASKED}: 'n' at 'l'"]
    assert unknown_but_there(entries, {"k": ["n"]}) == 1


def test_the_judge_asks_for_the_place_that_an_answer_has_named() -> None:
    entries = [Entry("n", "k", "once", told="saved", places=[2])]
    assert list(broken_rules(entries, {"k": ["m", "n"]}, None)) == [f"{UNASKED}: 'm' at 'k'"]
    assert [line.partition(":")[0] for line in broken_rules(entries, {"k": ["n"]}, None)] == [MISPLACED]


def test_the_judge_compares_the_rows_beside_the_resources_too() -> None:
    entries = [Entry("n", "k", "once", told="saved", places=[1])]
    assert list(broken_rules(entries, {"k": ["n"]}, {"k": Counter(n=1)})) == []
    assert list(broken_rules(entries, {"k": ["n"]}, {"k": Counter(n=2)})) == [f"{BESIDE}: 'k'"]
    assert list(broken_rules(entries, {"k": ["n"]}, {})) == [f"{BESIDE}: 'k'"]


@pytest.mark.parametrize("told", ["saved", "refused", "unknown"])
@pytest.mark.parametrize(
    ("found", "rule"),
    [
        ({"k": ["n"]}, HALF),
        ({"l": ["n"]}, HALF),
        ({"k": ["n"], "l": ["n", "n"]}, TWICE),
        ({"l": ["n", "n"]}, TWICE),
    ],
)
def test_the_judge_finds_a_half_of_what_is_to_be_at_several_keys_whatever_was_told(
    told: Any, found: Found, rule: str
) -> None:
    assert rules_of([Entry("n", ("k", "l"), "once", told=told, places=[1, 1])], found) == [rule]


@pytest.mark.parametrize(
    ("told", "found", "rules"),
    [
        ("saved", {"k": ["n"], "l": ["m", "n"]}, []),
        ("saved", {"k": ["n"], "l": ["n", "m"]}, [MISPLACED]),
        ("saved", {"l": ["m"]}, [LOST]),
        ("refused", {"k": ["n"], "l": ["m", "n"]}, [LIED]),
        ("refused", {"l": ["m"]}, []),
        ("unknown", {"k": ["n"], "l": ["m", "n"]}, []),
        ("unknown", {"l": ["m"]}, []),
    ],
)
def test_the_judge_compares_all_keys_of_an_entry_with_what_was_told(told: Any, found: Found, rules: list[str]) -> None:
    asked = [Entry("n", ("k", "l"), "once", told=told, places=[1, 2]), Entry("m", ("l",), "once", told="unknown")]
    assert rules_of(asked, found) == rules


def test_the_judge_adds_up_the_lines_of_accounts() -> None:
    books = {"k": ["a -5 -5", "b +0 -5"], "l": ["a +5 5"]}
    assert list(broken_books(books)) == []
    assert names_of(books) == {"k": ["a", "b"], "l": ["a"]}


def test_the_judge_finds_money_that_has_come_from_nowhere() -> None:
    assert list(broken_books({"k": ["a -5 -5"], "l": ["a +5 5", "b +2 7"]})) == [f"{SUM}: +2"]


def test_the_judge_finds_an_account_that_was_overwritten() -> None:
    assert [line.partition(":")[0] for line in broken_books({"k": ["a -5 -5", "b +5 5"], "l": []})] == [BOOKS]

"""The oracle: made-up models and operations, run one by one and in batches, give the same (docs/as-if-alone.md).

The same examples in each run; GEVENTBATCH_ORACLE_EXAMPLES=20000 tries so many others. A failure prints a program of its
own, to be saved and run in a clone.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.oracle import django_orm, documents, mapped
from tests.support.oracle.judge import Mismatch
from tests.support.oracle.known import known
from tests.support.oracle.mutants import mutated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    from tests.support.oracle.example import Example

CHOSEN = os.environ.get("GEVENTBATCH_ORACLE_EXAMPLES")
EXAMPLES = int(CHOSEN or 500)
"""Of all tests that are run together."""

SHARES = {
    (mapped, "sqlite"): 0.2,
    (mapped, "postgresql"): 0.25,
    (mapped, "mariadb"): 0.25,
    (documents, "sqlite"): 0.1,  # and Redis
    (documents, "postgresql"): 0.1,
    (django_orm, "sqlite"): 0.15,
    (django_orm, "postgresql"): 0.2,
    (django_orm, "mariadb"): 0.2,
}


ACROSS = {
    (documents, "sqlite"): 0.1,
    (documents, "postgresql"): 0.2,
    (documents, "mariadb"): 0.1,
    (mapped, "sqlite"): 0.15,
    (mapped, "postgresql"): 0.3,
    (mapped, "mariadb"): 0.15,
    (django_orm, "sqlite"): 0.1,
    (django_orm, "postgresql"): 0.2,
    (django_orm, "mariadb"): 0.1,
}
"""Of operations across keys beside such on one key: what the module has to have is `across_examples`."""


@pytest.fixture(autouse=True)
def _nothing_is_logged() -> Iterator[None]:
    """Thousands of batches are refused on purpose."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


ROOT = __file__.rpartition("/tests/")[0]


def over(shares: dict[tuple[ModuleType, str], float]) -> pytest.MarkDecorator:
    cases = [pytest.param(*case, marks=[pytest.mark.mariadb] if case[1] == "mariadb" else []) for case in shares]
    return pytest.mark.parametrize(("orm", "server"), cases)


@pytest.mark.timeout(120 + EXAMPLES)
@over(SHARES)
def test_batches_of_made_up_operations_on_made_up_models_give_what_the_operations_alone_give(
    orm: ModuleType, server: str, tmp_path: Path
) -> None:
    with orm.place(server, tmp_path) as place:
        search(orm.examples(server), place.run, round(EXAMPLES * SHARES[orm, server]))


@pytest.mark.timeout(120 + EXAMPLES)
@over(ACROSS)
def test_made_up_operations_across_keys_give_what_a_transaction_for_each_of_them_gives(
    orm: ModuleType, server: str, tmp_path: Path
) -> None:
    with orm.place(server, tmp_path) as place:
        search(orm.across_examples(server), place.run, round(EXAMPLES * ACROSS[orm, server]))


class _Enough(BaseException):
    """The time to look for a smaller example is over."""


# -- and it can fail ---------------------------------------------------------------------------------------------


def test_a_store_that_forgets_the_rows_beside_the_resource_is_found_by_a_program_that_fails_by_itself(
    tmp_path: Path,
) -> None:
    with pytest.raises(Mismatch) as found, mutated("forgotten rows"), mapped.place("sqlite", tmp_path) as place:
        search(mapped.examples("sqlite"), place.run, 200)
    program = tmp_path / "program.py"
    program.write_text(str(found.value).partition("The program:")[2].strip())
    assert ended(program, "forgotten rows") == (1, "FAIL")
    assert ended(program, "") == (0, "PASS")


@pytest.mark.parametrize("mutant", ["a component without one of its keys", "each key of a component by itself"])
def test_a_store_that_saves_a_part_of_what_an_operation_across_keys_has_changed_is_found(
    mutant: str, tmp_path: Path
) -> None:
    with pytest.raises(Mismatch) as found, mutated(mutant), documents.place("sqlite", tmp_path) as place:
        search(documents.across_examples("sqlite"), place.run, 100)
    program = tmp_path / "program.py"
    program.write_text(str(found.value).partition("The program:")[2].strip())
    assert ended(program, mutant) == (1, "FAIL")
    assert ended(program, "") == (0, "PASS")


RARE = {"refreshed without a flush": 4, "computed is stale": 4}
"""How many times the usual number it takes: one operation in a hundred does what shows the difference."""


@pytest.mark.variants
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("mutant", "orm", "server"),
    [
        ("compared by ==", mapped, "sqlite"),
        ("refreshed without a flush", mapped, "sqlite"),
        ("what raised stays", mapped, "sqlite"),
        ("what raised stays", documents, "sqlite"),
        ("what raised stays", django_orm, "sqlite"),
        ("computed is stale", mapped, "postgresql"),
        ("answers are aliases", documents, "sqlite"),
        ("applied in another order", documents, "sqlite"),
        ("applied in another order", django_orm, "sqlite"),
    ],
)
def test_a_broken_library_is_found_within_the_usual_number_of_examples(
    mutant: str, orm: ModuleType, server: str, tmp_path: Path
) -> None:
    with pytest.raises(Mismatch), mutated(mutant), orm.place(server, tmp_path) as place:
        search(orm.examples(server), place.run, EXAMPLES * RARE.get(mutant, 1), patience=0)


def ended(program: Path, mutant: str) -> tuple[int, str]:
    """How *program* ends, and what it prints last, with a store that is broken so."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.oracle.mutants", mutant, program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, (ran.stdout.strip() or ran.stderr).rpartition("\n")[2]


def search(examples: Any, run: Callable[[Example], None], count: int, patience: float = 15) -> None:
    """Raise the program of the smallest example that gives a mismatch."""
    found: dict[str, str] = {}
    begun: list[float] = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=CHOSEN is None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(examples)
    def one(example: Example) -> None:
        if begun and time.monotonic() > begun[0] + patience:
            raise _Enough
        try:
            run(example)
        except Mismatch as mismatch:
            if known(example, str(mismatch)) is None:
                begun.append(time.monotonic())
                found[example.program()] = str(mismatch)
                raise

    with suppress(Mismatch, _Enough):
        one()
    if found:
        program = min(found, key=len)
        raise Mismatch(f"{found[program]}\n\nThe program:\n\n{program}")

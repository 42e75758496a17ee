"""MariaDB's snapshot isolation, the default since 11.6: a row that others have changed since ends the transaction."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.stores import test_stores
from tests.stores.test_stores import (
    Another,
    adapter,  # noqa: F401 - a fixture
    another,  # noqa: F401 - a fixture
    over,
    place,  # noqa: F401 - a fixture
    processor,  # noqa: F401 - a fixture
)
from tests.stores.test_stores_across import PAIRS, After, Bank, together, transfers
from tests.support import mariadb

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch import Processor
    from tests.support.adapters.base import Adapter, Case

over_mariadb = over(lambda case: "mariadb" in case.name)
over_unlocked = over(lambda case: "mariadb" in case.name and not case.has_locks)
over_bulks = over(lambda case: "mariadb" in case.name and case.has_across and not case.has_locks)


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("GEVENTBATCH_TEST_MARIADB_URL", mariadb.started("--innodb-snapshot-isolation=ON"))
        yield


@over_mariadb
def test_two_processes_that_race_lose_nothing(case: Case, adapter: Adapter, another: Another) -> None:  # noqa: F811
    test_stores.test_two_processes_that_race_for_first_inserts_and_for_versions_lose_nothing(case, adapter, another)


@over_unlocked
def test_what_a_foreign_writer_saves_between_load_and_save_is_kept(
    adapter: Adapter,  # noqa: F811
    processor: Processor[Any],  # noqa: F811
) -> None:
    test_stores.test_what_a_foreign_writer_saves_between_load_and_save_is_kept(adapter, processor)


@over_bulks
def test_a_key_of_a_bulk_that_somebody_else_has_changed_costs_the_others_a_replay_and_nothing_else(
    adapter: Adapter,  # noqa: F811
) -> None:
    bank = Bank(adapter)
    runs = transfers(bank)
    runs[PAIRS[0]] = (After(partial(adapter.put, "n3", 50), bank.transfer), 1)
    with bank.processor() as opened:
        answers = together(opened, runs)
    assert answers == dict.fromkeys(PAIRS, (9, 11)) | {PAIRS[1]: (9, 51)}
    assert bank.totals() == [9, 11, 9, 51, *[9, 11] * 8]

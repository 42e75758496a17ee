"""Idempotency keys over the stores in a component that is saved in parts: each outcome once, with its own part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.stores.test_across_outcomes import over_sql, together
from tests.stores.test_stores import (
    adapter,  # noqa: F401 - a fixture
    another,  # noqa: F401 - a fixture
    class_of,
    place,  # noqa: F401 - a fixture
)
from tests.stores.test_stores_across import Bank
from tests.support.adapters.base import TooLittle

if TYPE_CHECKING:
    from tests.support.adapters.base import Adapter


@over_sql
@pytest.mark.parametrize("order", ["fbbbr", "fbbrb", "wbbbr", "rb", "fbrbf"])
def test_an_error_is_recorded_once_and_every_caller_with_a_new_key_is_answered(
    adapter: Adapter,  # noqa: F811
    order: str,
) -> None:
    bank = Bank(adapter)

    def transfer(accounts: tuple[Any, ...], how: str, mark: int) -> list[int]:
        totals = adapter.transfer(accounts, 1)
        if how == "f":
            adapter.insert(accounts[0], f"sql {mark}")
        if how == "w":
            bank.noted(accounts, 0, f"row {mark}")
        if how == "b":
            bank.noted(accounts, 0, "there")
        if how == "r":
            raise TooLittle(mark)
        return totals

    with bank.processor(recorded_errors=(TooLittle,)) as processor:
        assert processor.run_across(["n2", "n3"], bank.noted, 1, "there") == (9, 11)
        sent: list[Any] = [(("n0", "n1"), f"key-{n}", transfer, how, n) for n, how in enumerate(order)]
        answers = together(processor, sent)
        recorded = adapter.outcomes()
        again = together(processor, sent)
    saved = len(order) - order.count("b") - order.count("r")
    kinds = {"b": "IntegrityError", "r": "TooLittle"}
    for told in (answers, again):
        assert all(class_of(one) == kinds.get(how, "list") for how, one in zip(order, told, strict=True)), told
    assert [one for one in answers if isinstance(one, list)] == [[9 - n, 11 + n] for n in range(saved)]
    assert bank.totals(["n0", "n1"]) == [10 - saved, 10 + saved]
    assert recorded == adapter.outcomes() == len(order) - order.count("b")

"""Idempotency keys in a batch that is saved in parts: each outcome is recorded once, with its own part."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from geventbatch import Rejected
from tests.support import keeping_store
from tests.support.keeping_ledger import KeepingLedger, call
from tests.support.ledger import append_to_all
from tests.support.plain import Taken
from tests.support.recording_store import Store

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch.testing import VirtualTime
    from tests.support.ledger import Account


class Uncopied:
    """What cannot be copied: what has it cannot be restored."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError("not copied")

    __reduce_ex__ = __deepcopy__


def apply(found: Any, how: str, mark: int) -> int:
    accounts = found if isinstance(found, tuple) else (found,)
    judged_by_others = how == "judges" and any("bad" in account for account in accounts)
    for account in accounts:
        account.append("bad" if how == "breaks" else mark)
        if how == "uncopied":
            account.append(Uncopied())
    if how == "raises" or judged_by_others:
        raise Taken(mark)
    return mark


def refuse_bad(resources: dict[Any, Account]) -> None:
    if any("bad" in account for account in resources.values()):
        raise Rejected("a constraint")


def told(answer: Any) -> Any:
    return type(answer) if isinstance(answer, BaseException) else answer


def assert_as_if_alone(clock: VirtualTime, keys: str, hows: list[str], *, partly: bool, copied: bool) -> None:
    """Apply these in one batch, and compare answers, lists and outcomes with those of each alone. Twice."""
    ledger = KeepingLedger(partly=partly)
    letters = keys.rstrip(".")
    ledger.kept = {letter: [] if copied else [Uncopied()] for letter in "ab"}
    with ledger.processor(recorded_errors=(Taken,), max_duration=60) as processor:
        ledger.save_time = 0.1
        blocker = call(processor, "ab", None, append_to_all, "m")
        clock.advance(0.05)
        ledger.on_save = refuse_bad
        alone = [{"breaks": Rejected, "raises": Taken}.get(how, mark) for mark, how in enumerate(hows)]
        sent = list(enumerate(hows))
        callers = [call(processor, keys, f"x{mark}", apply, how, mark) for mark, how in sent]
        clock.advance(20)
        blocker.get()
        assert [told(caller.get(block=False)) for caller in callers] == alone, hows
        assert len(ledger.outcomes) == len(hows) - hows.count("breaks"), hows
        again = [call(processor, keys, f"x{mark}", apply, how, mark) for mark, how in sent]
        clock.advance(20)
        assert [told(caller.get(block=False)) for caller in again] == alone, hows
    for letter in letters:
        kept = [mark for mark in ledger.kept[letter] if type(mark) is int]
        assert kept == [mark for mark in alone if type(mark) is int], hows


@pytest.mark.parametrize("partly", [True, False])
@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("keys", ["ab", "a."])
@pytest.mark.parametrize(
    "hows",
    [
        ["uncopied", "breaks", "breaks", "breaks", "raises"],
        ["uncopied", "breaks", "breaks", "raises", "breaks"],
        ["uncopied", "raises", "breaks"],
        ["uncopied", "breaks", "judges", "breaks"],
    ],
    ids=lambda hows: "".join(how[0] for how in hows),
)
def test_an_error_is_recorded_once_with_its_own_part_of_a_batch(
    clock: VirtualTime, keys: str, hows: list[str], partly: bool, copied: bool
) -> None:
    assert_as_if_alone(clock, keys, hows, partly=partly, copied=copied)


@pytest.mark.parametrize("keys", ["ab", "a."])
@pytest.mark.parametrize("seed", range(3))
def test_in_any_order_each_has_the_answer_and_the_record_that_it_has_alone(
    clock: VirtualTime, keys: str, seed: int
) -> None:
    choose = random.Random(f"{keys}{seed}")
    for _ in range(25):
        hows = choose.choices(["plain", "uncopied", "breaks", "raises", "judges"], k=choose.randint(2, 5))
        assert_as_if_alone(clock, keys, hows, partly=choose.random() < 0.5, copied=choose.random() < 0.5)


# -- one key at a time --------------------------------------------------------------------------------------------


class RefusesBad(Store):
    def save(self, key: Hashable, resource: list[Any]) -> None:
        refuse_bad({key: resource})
        super().save(key, resource)


@pytest.mark.parametrize("copied", [True, False])
def test_with_one_key_each_has_the_answer_and_the_record_that_it_has_alone_in_any_order(
    clock: VirtualTime, copied: bool
) -> None:
    choose = random.Random(copied)
    for _ in range(40):
        hows = choose.choices(["plain", "uncopied", "breaks", "raises", "judges"], k=choose.randint(2, 5))
        store = RefusesBad(clock, "scope")
        store.kept["k"] = [] if copied else [Uncopied()]
        keeping = keeping_store.Keeping(store)
        alone = [{"breaks": Rejected, "raises": Taken}.get(how, mark) for mark, how in enumerate(hows)]
        with keeping_store.opened(keeping, recorded_errors=(Taken,), min_duration=0.1) as processor:
            for _ in range(2):
                callers = [keeping_store.call(processor, f"x{n}", apply, how, n) for n, how in enumerate(hows)]
                clock.advance(2)
                assert [told(caller.get(block=False)) for caller in callers] == alone, hows
                assert len(keeping.recorded) == len(hows) - hows.count("breaks"), hows
        kept = [mark for mark in store.kept["k"] if type(mark) is int]
        assert kept == [mark for mark in alone if type(mark) is int], hows

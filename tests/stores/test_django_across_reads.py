"""What operations across keys have only read, or refused, on Django models: in mode "version" it is compared.

Otherwise an answer, or a row beside, would tell of a state that never was.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import connections

from geventbatch import Processor, current_batch
from tests.stores.test_django_across import account, balances, elsewhere, opened, pay, store_of
from tests.support.callers import answer_of
from tests.support.django_accounts import MARIADB, entries, opening

from tests.support.django_project.bank.models import Account, Entry  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable

alias = opening("sqlite", "postgresql", MARIADB)


def ran(processor: Processor[Any], *runs: Any) -> list[Any]:
    """What the callers were told, who named keys, an operation, its arguments and perhaps a dict of options."""

    def call(run: Callable[[], Any]) -> Any:
        try:
            return answer_of(run)
        finally:
            for connection in connections.all(initialized_only=True):
                connection.close()

    callers = []
    for keys, operation, *given in runs:
        options = given.pop() if given and isinstance(given[-1], dict) else {}
        callers.append(gevent.spawn(call, partial(processor.run_across, keys, operation, *given, **options)))
    return [one.get() for one in callers]


class Meanwhile:
    """Lets somebody else write, once, when an operation has its state."""

    def __init__(self, write: Callable[[], object]) -> None:
        self._todo = [write]

    def look(self, resources: tuple[Any, ...]) -> tuple[int, int]:
        while self._todo:
            elsewhere(self._todo.pop())
        return resources[0].balance, resources[1].balance

    @property
    def has_written(self) -> bool:
        return not self._todo


def derive(alias: str) -> None:
    """Set b by what a is now: what has paid from a comes later."""
    accounts = Account.objects.using(alias)
    accounts.filter(name="b").update(balance=60 + accounts.get(name="a").balance)


def test_an_answer_is_of_one_state_also_where_a_key_was_only_read(alias: str) -> None:
    other = Meanwhile(partial(derive, alias))
    with opened(alias, "version") as processor:
        answers = ran(
            processor,
            ([account("a"), account("c")], pay, 1),
            ([account("a"), account("b")], other.look, {"read_only": True}),
        )
    assert other.has_written
    assert answers == [9, (9, 70)]
    assert balances(alias) == "9 70 11 10 10 10"


def test_a_refusal_that_is_recorded_is_of_one_state(alias: str) -> None:
    other = Meanwhile(partial(derive, alias))

    def refuse(resources: tuple[Any, ...]) -> tuple[int, int]:
        found = other.look(resources)
        if resources[1].balance < 50:
            raise ValueError(*found)
        return found

    with opened(alias, "version") as processor:
        answers = ran(
            processor,
            ([account("a"), account("c")], pay, 1),
            ([account("a"), account("b")], refuse, {"idempotency_key": "k", "identified_by": ("refuse",)}),
        )
    assert other.has_written
    assert answers == [9, (9, 70)]


def test_a_refusal_that_is_recorded_is_compared_though_nothing_else_is_saved(alias: str) -> None:
    other = Meanwhile(lambda: Account.objects.using(alias).filter(name="b").update(balance=70))

    def refuse(resources: tuple[Any, ...]) -> tuple[int, int]:
        found = other.look(resources)
        raise ValueError(*found)

    with opened(alias, "version") as processor:
        (error,) = ran(
            processor, ([account("a"), account("b")], refuse, {"idempotency_key": "k", "identified_by": ("refuse",)})
        )
    assert error.args == (10, 70), error
    assert other.has_written


def test_a_key_by_which_an_operation_was_refused_is_compared_with_what_connected_ones_save(alias: str) -> None:
    other = Meanwhile(lambda: Account.objects.using(alias).filter(name="b").update(balance=70))

    def refuse(resources: tuple[Any, ...]) -> tuple[int, int]:
        if other.look(resources)[1] < 50:
            raise ValueError("too little")
        resources[0].balance += 1
        return resources[0].balance, resources[1].balance

    with opened(alias, "version") as processor:
        answers = ran(processor, ([account("a"), account("c")], pay, 1), ([account("a"), account("b")], refuse))
    assert other.has_written
    assert answers == [9, (10, 70)]
    assert balances(alias) == "10 70 11 10 10 10"


@pytest.mark.parametrize("connected", [True, False])
def test_a_row_beside_tells_of_what_is_compared(alias: str, connected: bool) -> None:
    other = Meanwhile(lambda: Account.objects.using(alias).filter(name="b").update(balance=70))

    def note(resources: tuple[Any, ...]) -> None:
        current_batch().add_row(Entry(text=f"b is {other.look(resources)[1]}"))

    first = [([account("a"), account("c")], pay, 1)] if connected else []
    with opened(alias, "version") as processor:
        ran(processor, *first, ([account("a"), account("b")], note, {"read_only": True}))
    assert other.has_written
    assert entries(alias) == ["b is 70"]


def test_of_two_that_each_read_what_the_other_writes_one_is_applied_again(alias: str) -> None:
    # Two processes: neither may save what it has judged by a state that the other has ended.
    def take(resources: tuple[Any, ...], meanwhile: Callable[[], object] = bool) -> int:
        meanwhile()
        source, beside = resources
        if source.balance + beside.balance < 20:
            raise ValueError("too little together")
        source.balance -= 10
        return int(source.balance)

    told: list[Any] = []
    keys = [account("a"), account("b")]

    def meanwhile() -> None:
        if not told:
            told.append(None)
            told[0] = elsewhere(second.run_across, keys[::-1], take)

    with opened(alias, "version") as first:
        store = store_of(alias, "version").open_resources
        with Processor(open_resources=store, min_duration=0, max_duration=10) as second:
            (error,) = ran(first, (keys, take, meanwhile))
    assert told == [0]
    assert str(error) == "too little together"
    assert balances(alias) == "10 0 10 10 10 10"

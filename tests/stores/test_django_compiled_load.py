"""The query that loads a row of a Django model: compiled once for each store, and Django's own each time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from django.db import models

from geventbatch import Processor, ResourceMissing
from geventbatch.stores import DjangoStore
from geventbatch.stores.django import _selection
from tests.support.django_accounts import MARIADB, opening

from tests.support.django_project.bank.models import Account, Purse, Savings, Ticket  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from collections.abc import Iterator

alias = opening("postgresql", MARIADB)


def processor(store: Any) -> Processor[Any]:
    return Processor(open_resource=store, min_duration=0, max_duration=10, max_attempts=1)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models of the queries that Django has made for loads."""
    made: list[str] = []
    to_load = _selection.Selection.to_load

    def note(selection: Any, *where: Any, **fields: Any) -> Any:
        made.append(selection._rows.model.__name__)
        return to_load(selection, *where, **fields)

    monkeypatch.setattr(_selection.Selection, "to_load", note)
    return made


def seen(row: Any) -> dict[str, Any]:
    """All that a row is, but what is set by its save."""
    values = {name: value for name, value in vars(row).items() if name not in {"_state", "changed_at"}}
    return values | {"state": (row._state.db, row._state.adding)}


def selects(sent: list[str]) -> list[str]:
    return [one for one in sent if " FOR " in one and one.startswith("SELECT")]


ROWS: dict[str, tuple[Any, str, Any, dict[str, Any]]] = {
    "text": (Account, "name", "b %s ' é", {"document": {"seats": [1, None]}}),
    "own conversion": (Purse, "name", "b", {"total": 7}),
    "number": (Ticket, "number", -3, {}),
    "primary key": (Account, "pk", 77, {"name": "c"}),
}


@pytest.mark.parametrize("case", ROWS)
def test_the_compiled_query_loads_what_djangos_own_does(
    alias: str, case: str, sent: list[str], made: list[str]
) -> None:
    model, by, key, values = ROWS[case]
    model.objects.using(alias).create(**{by: key}, **values)
    with processor(DjangoStore(model, by=by, using=alias)) as opened:
        del sent[:]
        first, second = [opened.run(key, seen, read_only=True) for _ in range(2)]
    assert made == [model.__name__]
    assert first == second
    one, other = selects(sent)
    assert one == other


def test_a_row_that_is_not_there_is_missing_for_the_compiled_query(alias: str, made: list[str]) -> None:
    Ticket.objects.using(alias).create(number=1)
    with processor(DjangoStore(Ticket, by="number", using=alias)) as opened:
        assert opened.run(1, lambda row: row.total) == 0
        with pytest.raises(ResourceMissing):
            opened.run(2, lambda row: row.total)
        assert made == ["Ticket"]


@pytest.mark.parametrize("key", [2**31, -(2**40)])
def test_a_number_that_no_column_has_is_left_to_django(alias: str, key: int) -> None:
    Ticket.objects.using(alias).create(number=1)
    store = DjangoStore(Ticket, by="number", using=alias)
    with processor(store) as opened:
        assert opened.run(1, lambda row: row.total) == 0
        with pytest.raises(ResourceMissing):
            opened.run(key, lambda row: row.total)


class Switched(models.Manager[Account]):
    """A manager whose rows are others from day to day."""

    hidden: str | None = None

    def get_queryset(self) -> models.QuerySet[Account]:
        rows = super().get_queryset()
        return rows if self.hidden is None else rows.exclude(name=self.hidden)


@pytest.fixture
def switched() -> Iterator[Switched]:
    manager = Switched()
    manager.contribute_to_class(Account, "switched")
    yield manager
    del Account.switched
    Account._meta.local_managers.remove(next(one for one in Account._meta.local_managers if one.name == "switched"))
    Account._meta._expire_cache()  # type: ignore[attr-defined]


def test_a_managers_query_is_made_for_each_load(alias: str, switched: Switched, made: list[str]) -> None:
    with processor(DjangoStore(Account, by="name", using=alias, manager="switched")) as opened:
        assert opened.run("a", lambda row: row.balance) == 0
        Account.switched.hidden = "a"  # type: ignore[attr-defined]
        with pytest.raises(ResourceMissing):
            opened.run("a", lambda row: row.balance)
    assert made == ["Account"] * 2


@pytest.mark.parametrize(
    ("model", "by", "key"),
    [(Savings, "name", "s"), (Account, ("name", "id"), ("a", 1))],
    ids=["two tables", "two columns"],
)
def test_a_query_for_more_than_one_column_or_table_is_made_for_each_load(
    alias: str, model: Any, by: Any, key: Any, made: list[str]
) -> None:
    if model is Savings:
        Savings.objects.using(alias).create(name="s")
    with processor(DjangoStore(model, by=by, using=alias)) as opened:
        for _ in range(2):
            opened.run(key, seen, read_only=True)
    assert made == [model.__name__] * 2

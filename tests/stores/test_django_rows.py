"""What DjangoStore writes of a row, and to which database."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.db import router
from django.db.models.signals import post_save, pre_save

from tests.stores.test_django_models import MODES, SERVERS, processing, tables
from tests.support.callers import answer_of

from tests.support.django_project.bank.models import Ticket  # isort: skip - after Django is set up
from tests.support.django_project.bank.shapes import Computed, Counting, Heard, Order, Seat, Sum  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from django.db.models import Model


@pytest.fixture
def listener() -> Iterator[None]:
    def compute(instance: Any, **_: Any) -> None:
        instance.total = instance.pieces * instance.price

    pre_save.connect(compute, sender=Heard)
    yield
    pre_save.disconnect(compute, sender=Heard)


def order(resource: Any) -> int:
    resource.pieces += 1
    return int(resource.pieces)


@pytest.mark.usefixtures("listener")
@pytest.mark.parametrize(("server", "mode"), MODES)
@pytest.mark.parametrize("model", [Order, Heard, Computed])
def test_a_column_that_saving_computes_is_saved(server: str, mode: Any, model: Any, tmp_path: Path) -> None:
    with tables(server, tmp_path, model) as alias:
        row = model.objects.using(alias).create()
        with processing(model, alias, mode=mode) as processor:
            callers = [gevent.spawn(processor.run, row.pk, order) for _ in range(3)]
            assert sorted(caller.get() for caller in callers) == [1, 2, 3]
        assert model.objects.using(alias).get().total == 21


@pytest.mark.parametrize("server", SERVERS)
def test_an_operation_finds_what_save_computes_as_it_was_loaded(server: str, tmp_path: Path) -> None:
    with tables(server, tmp_path, Order) as alias:
        row = Order.objects.using(alias).create()
        with processing(Order, alias) as processor:
            callers = [gevent.spawn(processor.run, row.pk, one) for one in (order, lambda one: (one.pieces, one.total))]
            assert callers[1].get() == (1, 0)
            assert processor.run(row.pk, lambda one: one.total) == 7


@pytest.mark.parametrize("server", SERVERS)
def test_a_save_that_an_operation_calls_computes_although_no_field_has_changed(server: str, tmp_path: Path) -> None:
    def seat(row: Any) -> None:
        Seat.objects.using(row._state.db).create(line="north", number=1)
        row.save()

    with tables(server, tmp_path, Counting, Seat) as alias:
        row = Counting.objects.using(alias).create()
        with processing(Counting, alias) as processor:
            processor.run(row.pk, seat)
        assert Counting.objects.using(alias).get().seats == 1


@pytest.mark.parametrize("server", SERVERS)
def test_a_signal_is_told_that_all_is_saved_as_by_save(server: str, tmp_path: Path) -> None:
    told = []

    def hear(update_fields: Any, created: bool, **_: Any) -> None:
        told.append((update_fields, created))

    post_save.connect(hear, sender=Ticket)
    try:
        with tables(server, tmp_path, Ticket) as alias:
            ticket = Ticket.objects.using(alias).create(number=1)
            ticket.save(using=alias)
            with processing(Ticket, alias) as processor:
                processor.run(1, lambda one: setattr(one, "total", 5))
    finally:
        post_save.disconnect(hear, sender=Ticket)
    assert told == [(None, True), (None, False), (None, False)]


class Elsewhere:
    """A router that sends whatever is not said otherwise to another database."""

    def db_for_read(self, model: type[Model], **_: object) -> str:
        return "elsewhere"

    db_for_write = db_for_read


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "routers", [Elsewhere()])


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("server", SERVERS)
def test_all_that_the_store_writes_goes_to_its_own_database(server: str, tmp_path: Path) -> None:
    with tables(server, tmp_path, Ticket) as alias:
        Ticket.objects.using(alias).create(number=1)
        with processing(Ticket, alias, missing=lambda number: Ticket(number=number)) as processor:
            processor.run(2, lambda one: setattr(one, "total", 5))
            processor.run(2, lambda one: setattr(one, "total", 6))
            processor.run(1, lambda one: one.delete())
        assert list(Ticket.objects.using(alias).values_list("number", "total")) == [(2, 6)]


@pytest.mark.usefixtures("elsewhere")
def test_a_delete_of_the_models_own_that_would_go_elsewhere_is_refused(tmp_path: Path) -> None:
    class Own(Ticket):
        class Meta:
            app_label = "bank"
            proxy = True

        def delete(self) -> Any:  # type: ignore[override]
            return super().delete()

    with tables("sqlite", tmp_path, Ticket) as alias:
        Ticket.objects.using(alias).create(number=1)
        with processing(Own, alias) as processor:
            assert isinstance(answer_of(processor.run, 1, lambda one: one.delete()), RuntimeError)
        assert Ticket.objects.using(alias).exists()


@pytest.mark.parametrize("server", SERVERS)
def test_what_a_field_writes_by_itself_before_a_save_is_committed_with_the_row_or_not_at_all(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(_: Sum, row: Any, add: bool) -> int:
        tickets = Ticket.objects.using(row._state.db)
        tickets.create(number=tickets.count())
        return 10**30 if row.pieces == 2 and not add else 1

    with tables(server, tmp_path, Computed, Ticket) as alias:
        row = Computed.objects.using(alias).create()
        monkeypatch.setattr(Sum, "pre_save", count)
        with processing(Computed, alias) as processor:
            assert processor.run(row.pk, order) == 1
            assert Ticket.objects.using(alias).count() == 1
            assert isinstance(answer_of(processor.run, row.pk, order), Exception)
        assert Ticket.objects.using(alias).count() == 1

"""What an operation on a Django model finds is what it would have loaded, had the one before it been saved."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import gevent
import pytest
from django.apps.registry import Apps
from django.db import DataError, connections, models
from psycopg.types.range import Range

from tests.stores.test_django_models import SERVERS, processing, tables
from tests.support.callers import answer_of

from tests.support.django_project.bank.shapes import Form, Sums, Train  # isort: skip - after Django is set up
from tests.support.django_project.bank.shapes_of_postgres import Series  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch import Processor


class Colour(StrEnum):
    RED = "red"


class Size(IntEnum):
    LARGE = 3


def answers_of(processor: Processor[Any], key: Any, *operations: Callable[[Any], object]) -> list[Any]:
    callers = [gevent.spawn(answer_of, processor.run, key, operation) for operation in operations]
    return [caller.get() for caller in callers]


def assigning(name: str, value: Any) -> Callable[[Any], None]:
    return lambda row: setattr(row, name, value)


def reading(name: str) -> Callable[[Any], Any]:
    return lambda row: getattr(row, name)


ASSIGNED = [
    ("number", "12"),
    ("number", True),
    ("number", 3.7),
    ("number", Size.LARGE),
    ("text", 5),
    ("text", Colour.RED),
    ("yes", 1),
    ("yes", "True"),
    ("price", "12"),
    ("price", 1),
    ("price", 0.25),
    ("price", Decimal("0.123")),
    ("price", Decimal("-0.00")),
    ("share", "1.5"),
    ("share", 1),
    ("day", "2026-06-01"),
    ("day", datetime(2026, 6, 1, 12, tzinfo=UTC)),
    ("seen", "2026-06-01T12:00:00Z"),
    ("seen", datetime(2026, 6, 1, 12, tzinfo=timezone(timedelta(hours=2)))),
    ("uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"),
    ("uuid", UUID(int=5)),
    ("document", {1: (1, 2), None: Colour.RED}),
    ("document", [True, 1, 1.0, (None,)]),
    ("blob", bytearray(b"a")),
    ("blob", memoryview(b"a")),
    ("address", "::FFFF:10.0.0.1"),
    ("address", "2001:DB8::0:1"),
    ("path", Path("/tmp/a")),  # noqa: S108 - never read
]


@pytest.mark.parametrize("server", SERVERS)
def test_the_next_operation_finds_what_the_column_makes_of_a_value(server: str, tmp_path: Path) -> None:
    with tables(server, tmp_path, Form) as alias:
        for name, value in ASSIGNED:
            form = Form.objects.using(alias).create()
            alone = Form.objects.using(alias).get(pk=form.pk)
            setattr(alone, name, value)
            alone.save(using=alias)
            expected = getattr(Form.objects.using(alias).get(pk=form.pk), name)
            Form.objects.using(alias).update(**{name: getattr(Form(), name)})
            with processing(Form, alias) as processor:
                _, found = answers_of(processor, form.pk, assigning(name, value), reading(name))
            there = getattr(Form.objects.using(alias).get(pk=form.pk), name)
            assert (name, value, repr(found), repr(there)) == (name, value, repr(expected), repr(expected))


@pytest.mark.parametrize("server", SERVERS)
def test_a_document_changed_in_place_is_what_its_json_is(server: str, tmp_path: Path) -> None:
    def number(row: Any) -> None:
        row.document["names"] = {1: (2,)}

    with tables(server, tmp_path, Form) as alias:
        form = Form.objects.using(alias).create()
        with processing(Form, alias) as processor:
            _, found = answers_of(processor, form.pk, number, lambda row: dict(row.document))
    assert found == {"names": {"1": [2]}}


WRONG = [
    ("number", "twelve"),
    ("price", "NaN"),
    ("yes", "perhaps"),
    ("day", "today"),
    ("uuid", "no"),
    ("share", "x"),
    ("length", "x"),
    ("text", "\ud800"),
    ("document", {"a": object()}),
    ("blob", "a"),
]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_value_that_no_column_takes_is_the_error_of_who_assigned_it_as_it_is_of_save(
    server: str, name: str, value: Any, tmp_path: Path
) -> None:
    with tables(server, tmp_path, Form) as alias:
        form = Form.objects.using(alias).create()
        alone = Form.objects.using(alias).get()
        setattr(alone, name, value)
        expected = answer_of(alone.save, using=alias)
        with processing(Form, alias) as processor:
            before, refused, found = answers_of(
                processor, form.pk, assigning("text", "a"), assigning(name, value), reading("text")
            )
        assert (before, found) == (None, "a")
        told = [str(error).partition("\nLINE")[0] for error in (refused, expected)]  # PostgreSQL shows the statement
        assert (type(refused), told[0]) == (type(expected), told[1])
        assert Form.objects.using(alias).get().text == "a"


def sell(train: Any) -> int:
    if train.left <= 0:
        raise ValueError("sold out")
    train.sold += 1
    return int(train.left)


@pytest.mark.parametrize("server", SERVERS)
def test_a_column_that_the_database_computes_is_that_of_the_values_at_hand(server: str, tmp_path: Path) -> None:
    def rename(train: Any) -> tuple[Any, Any]:
        before, train.name = train.shown, "tgv"
        return before, train.shown

    with tables(server, tmp_path, Train) as alias:
        train = Train.objects.using(alias).create()
        with processing(Train, alias) as processor:
            *answers, names = answers_of(processor, train.pk, *[sell] * 5, rename)
        assert answers[:2] == [1, 0]
        assert [type(one) for one in answers[2:]] == [ValueError] * 3
        assert names == ("ICE", "TGV")
        assert Train.objects.using(alias).get().left == 0


@pytest.mark.parametrize("server", SERVERS)
def test_what_the_database_computes_has_the_type_that_a_load_gives(server: str, tmp_path: Path) -> None:
    names = ("cost", "many", "shown", "next_day", "inner", "share")

    def change(row: Any) -> list[str]:
        row.number, row.price, row.name, row.day = 4, Decimal("2.50"), "b", date(2026, 6, 1)
        row.document["a"] = 1
        return [repr(getattr(row, name)) for name in names]

    with tables(server, tmp_path, Sums) as alias:
        sums = Sums.objects.using(alias).create()
        with processing(Sums, alias) as processor:
            answer = processor.run(sums.pk, change)
        found = Sums.objects.using(alias).get()
        assert answer == [repr(getattr(found, name)) for name in names]


def write_and_raise(train: Any) -> None:
    Train.objects.using(train._state.db).create()
    raise KeyError


def test_what_the_database_cannot_compute_is_the_error_of_who_made_it_so(tmp_path: Path) -> None:
    with tables("postgresql", tmp_path, Train) as alias:
        train = Train.objects.using(alias).create()
        with processing(Train, alias) as processor:
            refused, each, left = answers_of(processor, train.pk, assigning("cars", 0), reading("each"), sell)
            assert isinstance(refused, DataError)
            assert (each, left) == (2, 1)
            # Nobody is blamed for what another one made, though it is mended before the save.
            operations = [assigning("cars", 0), reading("each"), assigning("cars", 2)]
            refused, each, _ = answers_of(processor, train.pk, *operations)
            assert isinstance(refused, DataError)
            assert each == 2
            raised, refused, each, _ = answers_of(processor, train.pk, write_and_raise, *operations)
        assert isinstance(raised, KeyError)
        assert isinstance(refused, DataError)
        assert each == 1


@pytest.mark.parametrize("server", SERVERS)
def test_a_new_row_has_what_the_database_computes(server: str, tmp_path: Path) -> None:
    with (
        tables(server, tmp_path, Train) as alias,
        processing(Train, alias, missing=lambda key: Train(pk=key, places=5)) as processor,
    ):
        assert answers_of(processor, 1, sell, sell) == [4, 3]


def test_the_next_operation_finds_an_array_as_its_column_has_it(tmp_path: Path) -> None:
    def fill(series: Any) -> None:
        series.numbers = ("1", True, None)
        series.flags = [[1, 0]]
        series.document.append({1: (2,)})

    with tables("postgresql", tmp_path, Series) as alias:
        series = Series.objects.using(alias).create()
        with processing(Series, alias) as processor:
            _, numbers, flags, document = answers_of(
                processor, series.pk, fill, reading("numbers"), reading("flags"), reading("document")
            )
    assert (repr(numbers), repr(flags), repr(document)) == ("[1, 1, None]", "[[True, False]]", "[{'1': [2]}]")


def test_postgresqls_order_of_names_and_form_of_numbers_come_with_the_next_load(tmp_path: Path) -> None:
    with tables("postgresql", tmp_path, Form) as alias:
        form = Form.objects.using(alias).create()
        with processing(Form, alias) as processor:
            _, found = answers_of(
                processor, form.pk, assigning("document", {"bb": 1e16, "a": -0.0}), lambda row: repr(row.document)
            )
            assert found == "{'bb': 1e+16, 'a': -0.0}"
            assert processor.run(form.pk, lambda row: repr(row.document)) == "{'a': 0.0, 'bb': 10000000000000000}"


def test_a_range_is_found_as_it_was_assigned(tmp_path: Path) -> None:
    with tables("postgresql", tmp_path, Series) as alias:
        series = Series.objects.using(alias).create()
        with processing(Series, alias) as processor:
            _, found = answers_of(processor, series.pk, assigning("span", Range(1, 5, "[]")), reading("span"))
            assert found == Range(1, 5, "[]")
            assert processor.run(series.pk, reading("span")) == Range(1, 6)


def test_on_sqlite_a_decimal_number_is_saved_with_the_places_of_its_column(tmp_path: Path) -> None:
    with tables("sqlite", tmp_path, Sums) as alias:
        sums = Sums.objects.using(alias).create()
        with processing(Sums, alias) as processor:
            processor.run(sums.pk, assigning("price", Decimal("0.125")))
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT price FROM bank_sums")
            assert float(cursor.fetchone()[0]) == 0.12


@pytest.mark.parametrize("value", [Decimal("1e30"), Decimal("12345678901.00")])
def test_on_sqlite_a_number_that_could_not_be_read_back_is_refused_to_who_assigned_it(
    value: Decimal, tmp_path: Path
) -> None:
    with tables("sqlite", tmp_path, Form) as alias:
        form = Form.objects.using(alias).create()
        with processing(Form, alias) as processor:
            refused, found = answers_of(processor, form.pk, assigning("price", value), reading("price"))
        assert (type(refused), found) == (ValueError, Decimal("0.00"))
        assert "price has more digits than its column, which has 10: it could not be read back" in str(refused)


def test_on_sqlite_a_long_number_is_found_as_the_float_that_it_is_there(tmp_path: Path) -> None:
    class Long(models.Model):
        price: models.DecimalField[Decimal, Decimal] = models.DecimalField(max_digits=20, decimal_places=2, default=0)

        class Meta:
            app_label = "bank"
            apps = Apps()

        def __str__(self) -> str:
            return str(self.price)

    with tables("sqlite", tmp_path, Long) as alias:
        long = Long.objects.using(alias).create()
        with processing(Long, alias) as processor:
            value = Decimal("12345678901234567.89")
            _, found = answers_of(processor, long.pk, assigning("price", value), reading("price"))
            assert found == processor.run(long.pk, reading("price")) == Decimal("12345678901234600.00")

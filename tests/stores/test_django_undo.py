"""An operation on a Django model that raises changes nothing: whatever it has changed in memory, the rest goes on."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from threading import Lock
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from django.core.files.base import ContentFile
from django.db import transaction
from django.db.backends.utils import CursorWrapper
from django.db.models import prefetch_related_objects
from django.utils.functional import SimpleLazyObject
from psycopg.types.range import Range

from geventbatch import Processor, current_batch
from geventbatch.stores import DjangoStore
from geventbatch.stores._sql import bounds
from geventbatch.stores.django._connections import close_idle
from tests.stores.test_django_models import answers_of, processing, tables
from tests.support.django_project.start import database, options_of, place

from tests.support.django_project.bank.shapes import Form  # isort: skip - after Django is set up
from tests.support.django_project.bank.shapes_of_postgres import Series  # isort: skip
from tests.support.django_project.bank.wagons import SHAPES, Depot, Line, Placed, Point, Telling, Wagon  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SERVERS = ("sqlite", "postgresql")


class Refused(Exception):
    pass


@pytest.fixture(params=SERVERS)
def alias(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with _place(request.param, tmp_path) as alias:
        yield alias


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    with _place("postgresql", tmp_path) as alias:
        yield alias


@contextmanager
def _place(server: str, directory: Path) -> Iterator[str]:
    with (
        place(server, directory, models=SHAPES) as address,
        database(address, create=False, options=options_of(address)) as alias,
    ):
        Depot.objects.using(alias).create(name="north")
        Depot.objects.using(alias).create(name="south")
        yield alias
        close_idle(alias)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All that Django sends from now on, without what is in it."""
    statements: list[str] = []
    execute = CursorWrapper._execute  # type: ignore[attr-defined]

    def remember(self: Any, sql: Any, *args: Any) -> Any:
        statements.extend(bounds.without_prefix(one).removeprefix("WITH written AS (") for one in str(sql).split("; "))
        return execute(self, sql, *args)

    monkeypatch.setattr(CursorWrapper, "_execute", remember)
    return statements


def sell(wagon: Any) -> int:
    wagon.sold += 1
    wagon.document["seats"].append(wagon.sold)
    return int(wagon.sold)


def look(wagon: Any) -> Any:
    """All that there is to be seen of it."""
    depot = None if wagon.depot is None else (wagon.depot.name, wagon.depot.sold)
    return (
        *(wagon.sold, wagon.note, wagon.document, wagon.depot_id, depot, str(wagon.plan), wagon.version, wagon.twice),
        *(wagon.seen, [line.text for line in wagon.lines.all()]),
        *((wagon.corner.x, wagon.corner.y) if isinstance(wagon, Placed) else ()),
        *(wagon._state.adding, wagon._state.db, wagon.pk, wagon.name, type(wagon), hasattr(wagon, "mark")),
    )


def outcome_of(
    alias: str, sent: list[str], model: Any, operations: Sequence[Callable[[Any], object]], **options: Any
) -> Any:
    """What they answer in one batch on a new row, the row then, what was written, and in how many attempts."""
    Wagon.objects.using(alias).all().delete()
    Depot.objects.using(alias).update(sold=0)
    south = Depot.objects.using(alias).get(name="south")
    kind: Any = Placed if model is Placed else Wagon
    kind.objects.using(alias).create(
        pk=1, name="a", depot=south, document={"seats": ["seat", "seat"], "of": {"x": [1]}}, plan="a.txt"
    )
    Line.objects.using(alias).create(wagon_id=1, text="first")
    sent.clear()
    store: DjangoStore[Any] = DjangoStore(model, by="name", using=alias, **options)
    with Processor(open_resource=store, min_duration=0.02, max_duration=20) as processor:
        metrics = processor.subscribe_batch_metrics()
        answers = answers_of(processor, "a", *operations)
    (metric,) = metrics
    written = [one.partition("\nRETURNING")[0] for one in map(str.strip, sent) if one.startswith(_WRITES)]
    row = {
        name: value
        for name, value in model.objects.using(alias).values().get().items()
        if name not in {"id", "wagon_ptr_id"}
    }
    beside = [*Depot.objects.using(alias).values_list("name", "sold").order_by("name")]
    lines = [*Line.objects.using(alias).values_list("text", flat=True).order_by("pk")]
    return [_shown(one) for one in answers], (_shown(row), beside, lines, written), metric.attempts


_WRITES = ("UPDATE", "INSERT", "DELETE")


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: (part.x, part.y) if isinstance(part, Point) else part for name, part in value.items()}
    return value


# -- what is changed in memory -----------------------------------------------------------------------------------


def columns(wagon: Any) -> None:
    wagon.sold, wagon.note, wagon.version = -960, "gone", 77


def a_document_in_place(wagon: Any) -> None:
    wagon.document["seats"].append("x")
    wagon.document["of"]["x"].clear()
    wagon.document["more"] = {1: 2}


def another_document(wagon: Any) -> None:
    wagon.document = ["another"]


def the_state(wagon: Any) -> None:
    wagon._state.adding, wagon._state.db = True, "elsewhere"
    wagon.pk = None


def another_state(wagon: Any) -> None:
    wagon._state = type(wagon._state)()


def the_class(wagon: Any) -> None:
    wagon.__class__ = Wagon
    wagon.sold = 12


def the_related_object(wagon: Any) -> None:
    wagon.depot.name, wagon.depot.sold = "changed", 100


def another_related_object(wagon: Any) -> None:
    wagon.depot = Depot.objects.using(wagon._state.db).get(name="north")
    wagon.depot.sold = 100


def a_new_related_object(wagon: Any) -> None:
    wagon.depot = Depot(name="new")


def a_lazy_related_object(wagon: Any) -> None:
    wagon.depot = SimpleLazyObject(lambda: Depot.objects.using(wagon._state.db).get(name="north"))
    wagon.depot.sold = 50


def none_related(wagon: Any) -> None:
    wagon.depot = None


def the_key_of_the_related_object(wagon: Any) -> None:
    wagon.depot_id = 12345


def what_is_prefetched(wagon: Any) -> None:
    prefetch_related_objects([wagon], "lines")
    for line in wagon.lines.all():
        line.text, line.wagon.note = "changed", "by its line"
    vars(wagon)["_prefetched_objects_cache"]["lines"]._result_cache.append(Line(text="made up"))


def what_is_computed_once(wagon: Any) -> None:
    wagon.seen.append("x")
    wagon.__dict__["seen"] = [*wagon.seen, "y"]


def other_attributes(wagon: Any) -> None:
    wagon.mark = {"a": 1}
    wagon.twice = 12345
    wagon.__dict__["save"] = None


def gone_attributes(wagon: Any) -> None:
    del wagon.note
    del wagon.sold
    wagon.__dict__.pop("plan")


def the_file(wagon: Any) -> None:
    wagon.plan.name = "other.txt"


def another_file(wagon: Any) -> None:
    wagon.plan = ContentFile(b"plan", name="another.txt")


def a_file_that_is_stored(wagon: Any) -> None:
    wagon.plan.save("stored.txt", ContentFile(b"plan"), save=False)


def a_value_of_a_type_of_the_users_own(wagon: Any) -> None:
    wagon.sold = 100
    if isinstance(wagon, Placed):
        wagon.corner.x = 100


def the_save(wagon: Any) -> None:
    wagon.sold = 50
    wagon.save()


def the_end(wagon: Any) -> None:
    wagon.delete()


def rows_beside(wagon: Any) -> None:
    current_batch().add_row(Line(wagon=wagon, text="added"))
    wagon.sold = 20


def hooks(wagon: Any) -> None:
    transaction.on_commit(pytest.fail, using=wagon._state.db)


CHANGES: tuple[Callable[[Any], None], ...] = (
    columns,
    a_document_in_place,
    another_document,
    the_state,
    another_state,
    the_class,
    the_related_object,
    another_related_object,
    a_new_related_object,
    a_lazy_related_object,
    none_related,
    the_key_of_the_related_object,
    what_is_prefetched,
    what_is_computed_once,
    other_attributes,
    gone_attributes,
    the_file,
    another_file,
    a_file_that_is_stored,
    a_value_of_a_type_of_the_users_own,
    the_save,
    the_end,
    rows_beside,
    hooks,
)


def raising(change: Callable[[Any], None]) -> Callable[[Any], object]:
    @functools.wraps(change)
    def operation(wagon: Any) -> object:
        change(wagon)
        raise Refused

    return operation


def touch(wagon: Any) -> None:
    """Change beside the columns what stays there, and what the save writes."""
    wagon.sold += 10
    if isinstance(wagon, Telling):
        wagon.events.append(wagon.sold)
        wagon.seen.append(wagon.sold)
        depot: Any = wagon.depot
        depot.sold += 1


WAYS: tuple[tuple[type[Any], dict[str, Any], int], ...] = (
    (Wagon, {}, 1),
    (Wagon, {"manager": "lean"}, 1),
    (Wagon, {"manager": "joined"}, 1),
    (Wagon, {"manager": "prefetched"}, 2),
    (Wagon, {"version": "version", "mode": "version"}, 1),
    (Placed, {}, 2),
    (Telling, {}, 2),
    (Telling, {"manager": "joined"}, 2),
)
"""Models, options, and how many loads: two where what was loaded has something that operations may change in place."""


@pytest.mark.parametrize(("model", "options", "attempts"), WAYS)
def test_what_an_operation_that_raises_has_changed_in_memory_is_undone(
    alias: str, model: type[Any], options: dict[str, Any], attempts: int, sent: list[str]
) -> None:
    good = [sell, touch, sell, look, touch, sell, look]
    expected, left, _ = outcome_of(alias, sent, model, good, **options)
    for change in CHANGES:
        bad = raising(change)
        mixed = [bad, sell, bad, bad, touch, sell, bad, look, touch, bad, sell, bad, look, bad]
        answers, found, loads = outcome_of(alias, sent, model, mixed, **options)
        assert [one for one in answers if not isinstance(one, Refused)] == expected, change
        assert sum(isinstance(one, Refused) for one in answers) == 7, change
        assert found == left, change
        assert loads == attempts, change


# -- columns of all types ----------------------------------------------------------------------------------------


FORM: dict[str, Any] = {
    "number": 5,
    "text": "a",
    "yes": True,
    "price": Decimal("1.50"),
    "share": -0.0,
    "day": date(2026, 6, 1),
    "seen": datetime(2026, 6, 1, 12, tzinfo=UTC),
    "length": timedelta(seconds=1),
    "uuid": UUID(int=5),
    "document": {"a": ["same", "same", {"b": [1.0, None]}], "same": "same", "": ""},
    "blob": b"blob",
    "address": "2001:db8::1",
    "path": "/tmp/a",  # noqa: S108 - never read
}
SERIES: dict[str, Any] = {
    "numbers": [1, 2, 2],
    "flags": [[True, False], [False, True]],
    "span": Range(1, 5),
    "time": Range(datetime(2026, 6, 1, tzinfo=UTC), None),
    "document": [{"a": [1]}, "same", "same"],
}


@pytest.mark.parametrize(
    ("model", "values", "server"),
    [(Form, FORM, "sqlite"), (Form, FORM, "postgresql"), (Series, SERIES, "postgresql")],
)
def test_columns_of_all_types_are_as_they_were_loaded_and_nothing_is_written(
    model: Any, values: dict[str, Any], server: str, tmp_path: Path, sent: list[str]
) -> None:
    def read(row: Any) -> Any:
        return repr([(name, bytes(value) if name == "blob" else value) for name, value in _columns_of(row)])

    def spoil(row: Any) -> None:
        for name, value in _columns_of(row):
            if isinstance(value, list | dict):
                value.clear()
            setattr(row, name, model._meta.get_field(name).get_default())
        raise Refused

    def change(row: Any) -> None:
        for _, value in _columns_of(row):
            if isinstance(value, list):
                value.append(value[0])
            elif isinstance(value, dict):
                value["more"] = [2]

    with tables(server, tmp_path, model) as alias:
        model.objects.using(alias).create(pk=1, **values)
        sent.clear()
        with processing(model, alias) as processor:
            metrics = processor.subscribe_batch_metrics()
            answers = answers_of(processor, 1, read, spoil, read, spoil, spoil, read)
            assert not [one for one in sent if one.strip().startswith("UPDATE")]
            assert answers[0] == answers[2] == answers[5]
            again = answers_of(processor, 1, change, read, spoil, read, spoil, spoil, read)
            assert answers[0] != again[1] == again[3] == again[6]
        assert [metric.attempts for metric in metrics] == [1, 1]
        found = model.objects.using(alias).get()
        document = values["document"]
        assert found.document == ({**document, "more": [2]} if model is Form else [*document, document[0]])


def _columns_of(row: Any) -> list[tuple[str, Any]]:
    return [(field.attname, getattr(row, field.attname)) for field in row._meta.concrete_fields]


def test_what_cannot_be_copied_costs_a_load_for_each_that_raises_and_is_exact_too(alias: str) -> None:
    def lock(wagon: Any) -> int:
        wagon.lock = Lock()
        return sell(wagon)

    def refuse(wagon: Any) -> None:
        sell(wagon)
        assert wagon.lock is not None
        raise Refused

    Wagon.objects.using(alias).create(name="a", document={"seats": []})
    with processing(Telling, alias, by="name") as processor:
        answers = answers_of(processor, "a", sell, lock, refuse, sell, refuse, sell)
    assert [type(answer) if isinstance(answer, Exception) else answer for answer in answers] == [
        *(1, 2, Refused, 3, Refused, 4)
    ]

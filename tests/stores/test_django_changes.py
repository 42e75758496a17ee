"""What DjangoStore takes for a change: what the database would see."""

from __future__ import annotations

import pickle
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import gevent
import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage
from psycopg.types.range import Range

from geventbatch import LoadFailed
from tests.stores.test_django_models import MODES, SERVERS, answers_of, processing, tables
from tests.support.callers import answer_of

from tests.support.django_project.bank.shapes import Agent, Client, Mystery, Point, Secret, Wide  # isort: skip - after Django
from tests.support.django_project.bank.shapes_of_postgres import Series  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOON = datetime(2026, 6, 1, 12, tzinfo=UTC)


def pay(row: Any) -> Any:
    row.document["paid"] = True
    return row.document


def weigh(row: Any) -> Any:
    row.document["weight"] = 2.0
    return row.document


def rank(row: Any) -> Any:
    row.document["ranks"] = dict(reversed(row.document["ranks"].items()))
    return row.document


def turn(row: Any) -> float:
    row.share += 0.25
    return float(row.share)


def move(row: Any) -> tuple[int, int]:
    row.point.y += 1
    return row.point.x, row.point.y


def shift(row: Any) -> tuple[int, int]:
    row.point = Point(row.point.x, row.point.y)
    row.point.y += 1
    return row.point.x, row.point.y


def collect(row: Any) -> Any:
    row.pickled |= {True, 2.0, "three"}
    return set(row.pickled)


def whisper(row: Any) -> Any:
    row.secret.plain.append(1)
    return list(row.secret.plain)


def whisper_anew(row: Any) -> Any:
    row.secret = Secret([*row.secret.plain, 1])
    return list(row.secret.plain)


def fill(row: Any) -> bytes:
    row.blob = bytearray(b"abc")
    return b"abc"


READ: dict[str, Callable[[Any], Any]] = {
    "document": lambda row: row.document,
    "share": lambda row: row.share,
    "point": lambda row: (row.point.x, row.point.y),
    "pickled": lambda row: row.pickled,
    "secret": lambda row: row.secret.plain,
    "blob": lambda row: bytes(row.blob),
}
CHANGES = [
    ("document", pay),
    ("document", weigh),
    ("document", rank),
    ("share", turn),
    ("point", move),
    ("point", shift),
    ("pickled", collect),
    ("secret", whisper),
    ("secret", whisper_anew),
    ("blob", fill),
]


def made(alias: str) -> Wide:
    wide = Wide(document={"paid": 1, "weight": 2, "ranks": {"a": 1, "b": 2}}, price=Decimal("1.50"), seen=NOON)
    wide.save(using=alias)
    return wide


@pytest.mark.parametrize(("server", "mode"), MODES)
def test_what_is_answered_is_saved_whatever_is_equal_to_what(server: str, mode: Any, tmp_path: Path) -> None:
    with tables(server, tmp_path, Wide) as alias:
        wide = made(alias)
        with processing(Wide, alias, mode=mode) as processor:
            for name, change in CHANGES:
                answer = processor.run(wide.pk, change)
                there = processor.run(wide.pk, READ[name], read_only=True)
                if server == "postgresql" and change is rank:  # a jsonb has an order of its own
                    assert answer == there
                elif name != "pickled":
                    assert (change.__name__, repr(there)) == (change.__name__, repr(answer))
                else:
                    assert answer == there


@pytest.mark.parametrize(("server", "mode"), MODES)
def test_a_batch_that_only_looks_writes_nothing(server: str, mode: Any, tmp_path: Path, sent: list[str]) -> None:
    def look(row: Any) -> None:
        for read in READ.values():
            read(row)
        assert not row.paper
        row.seen = row.seen + timedelta(0)
        row.price = +row.price

    with tables(server, tmp_path, Wide) as alias:
        wide = made(alias)
        with processing(Wide, alias, mode=mode) as processor:
            sent.clear()
            processor.run(wide.pk, look)
            assert [one for one in sent if one.startswith(("UPDATE", "BEGIN IMMEDIATE"))] == []
            processor.run(wide.pk, turn)
            (update,) = [one for one in sent if one.startswith("UPDATE")]
    assert re.findall(r'["`](\w+)["`] = ', update.partition(" WHERE ")[0]) == ["share"]


@pytest.mark.parametrize("server", SERVERS)
def test_a_file_is_stored_with_the_save_also_under_the_name_that_there_was(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(row: Any) -> None:
        row.paper = ContentFile(b"second", name="paper.txt")

    storage = FileSystemStorage(location=tmp_path / "papers")
    monkeypatch.setattr(Wide._meta.get_field("paper"), "storage", storage)
    with tables(server, tmp_path, Wide) as alias:
        wide = made(alias)
        wide.paper.save("paper.txt", ContentFile(b"first"), save=False)
        wide.save(using=alias)
        with processing(Wide, alias) as processor:
            processor.run(wide.pk, write)
        with Wide.objects.using(alias).get().paper.open() as paper:
            assert paper.read() == b"second"


@pytest.mark.parametrize("mode", ["lock", "version"])
def test_arrays_and_ranges_of_postgresql_are_saved(mode: Any, tmp_path: Path) -> None:
    def append(row: Any) -> Any:
        row.numbers.append(2)
        return list(row.numbers)

    def deeper(row: Any) -> Any:
        row.flags[0][1] = True
        return [list(one) for one in row.flags]

    def widen(row: Any) -> Any:
        row.span = Range(1, 10)
        return row.span

    def later(row: Any) -> Any:
        row.time = Range(NOON, NOON + timedelta(hours=1))
        return row.time

    def inside(row: Any) -> Any:
        row.document[0]["a"] = 1.0
        return [dict(one) for one in row.document]

    with tables("postgresql", tmp_path, Series) as alias:
        series = Series.objects.using(alias).create(
            numbers=[1], flags=[[True, False]], span=Range(1, 5), document=[{"a": 1}]
        )
        with processing(Series, alias, mode=mode) as processor:
            for name, change in (
                ("numbers", append),
                ("flags", deeper),
                ("span", widen),
                ("time", later),
                ("document", inside),
            ):
                answer = processor.run(series.pk, change)
                there = processor.run(series.pk, getattr, name, read_only=True)
                assert repr(there) == repr(answer)


@pytest.mark.parametrize("server", SERVERS)
def test_a_related_row_that_is_saved_after_it_was_assigned_is_referred_to(server: str, tmp_path: Path) -> None:
    def assign(client: Any) -> None:
        client.agent = Agent(name="Ann")
        client.agent.save(using=client._state.db)

    with tables(server, tmp_path, Agent, Client) as alias:
        Client.objects.using(alias).create(number="1")
        with processing(Client, alias, by="number") as processor:
            processor.run("1", assign)
        agent = Client.objects.using(alias).get().agent
        assert agent is not None
        assert agent.name == "Ann"


def test_a_query_that_is_to_be_read_later_is_told_of_and_one_that_was_read_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def read(query: Any) -> Any:
        len(query)
        return query

    def raw(client: Any) -> Any:
        return Client.objects.using(client._state.db).raw("SELECT * FROM bank_client")

    def managed(client: Any) -> Any:
        return Client.objects.using(client._state.db)

    with tables("sqlite", tmp_path, Agent, Client) as alias:
        client = Client.objects.using(alias).create(number="1")
        answers: list[Callable[[Any], Any]] = [
            managed,
            raw,
            lambda _: Client.objects,
            lambda row: {"all": managed(row).all()},
        ]
        for answer in answers:
            with processing(Client, alias, by="number") as processor:
                caplog.clear()
                assert processor.run("1", lambda row: read(managed(row).all()))[0] == client
                processor.run("1", lambda row: list(managed(row)))
                gevent.sleep(0)
                assert not caplog.records
                processor.run("1", answer)
                gevent.sleep(0)
                assert "which is the batch's own" in caplog.text


@pytest.mark.parametrize("server", SERVERS)
def test_a_column_whose_changes_cannot_be_told_is_named(server: str, tmp_path: Path) -> None:
    with tables(server, tmp_path, Mystery) as alias:
        mystery = Mystery.objects.using(alias).create()
        with processing(Mystery, alias) as processor:
            error = answer_of(processor.run, mystery.pk, lambda row: None)
    assert isinstance(error, LoadFailed)
    assert "bank.Mystery.untold" in str(error)


class Box:
    """A value of one's own in a column, which is changed in place."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)


@pytest.mark.parametrize("server", SERVERS)
def test_an_object_in_a_column_is_answered_as_it_was_then_or_the_operator_is_told(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fill_box(row: Any) -> None:
        row.pickled.names.append("Bob")

    with tables(server, tmp_path, Wide) as alias:
        wide = made(alias)
        Wide.objects.using(alias).update(pickled=Box("Ann"))
        with processing(Wide, alias) as processor:
            box, *_ = answers_of(processor, wide.pk, READ["pickled"], fill_box)
            assert (type(box), box.names) == (Box, ["Ann"])
            assert not caplog.records
            point = processor.run(wide.pk, lambda row: row.point)  # of which copy() would lose half
            gevent.sleep(0)
    assert (point.x, point.y) == (1, 2)
    assert "the batch's own" in caplog.text


@pytest.mark.parametrize(
    "returned",
    [
        lambda row: row.pickled["box"],
        lambda row: [row.pickled["box"].names[0]],
        lambda row: row.pickled,
        lambda row: (row.pickled["boxes"][1],),
    ],
    ids=["in a dict", "deeper", "the dict", "in a list"],
)
@pytest.mark.parametrize("server", SERVERS)
def test_an_object_that_lies_deep_in_a_column_is_answered_as_it_was_then(
    server: str, returned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fill_boxes(row: Any) -> None:
        row.pickled["box"].names[0].names.append("changed")
        row.pickled["boxes"][1].names.append("changed")

    with tables(server, tmp_path, Wide) as alias:
        wide = made(alias)
        boxes: Any = {"box": Box(Box("Ann")), "boxes": [1, Box("Ben")]}  # type: ignore[arg-type]  # one in another
        Wide.objects.using(alias).update(pickled=boxes)
        with processing(Wide, alias) as processor:
            answer, _, again = answers_of(processor, wide.pk, returned, fill_boxes, returned)
        assert b"changed" not in pickle.dumps(answer)
        assert b"changed" in pickle.dumps(again)
        assert Wide.objects.using(alias).get().pickled["boxes"][1].names == ["Ben", "changed"]
    assert not caplog.records

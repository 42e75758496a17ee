"""Attributes of Django instances that are in `__slots__`, and so in no dict, are undone and forgotten as others are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.stores.test_django_models import answers_of, processing, tables

from tests.support.django_project.bank.wagons import Boat, Pier, Writing  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from pathlib import Path


def mark_and_raise(boat: Any) -> None:
    boat.mark = "gone"
    boat.marks.append("gone")
    boat.marks = [*boat.marks, "gone"]
    boat.pier.mark = "gone"
    boat.sold += 50
    raise ValueError(boat.sold)


def unmark_and_raise(boat: Any) -> None:
    del boat.marks
    raise ValueError(boat.sold)


def sell(boat: Any) -> Any:
    boat.sold += 1
    return boat.sold, hasattr(boat, "mark"), boat.marks


def mark(boat: Any) -> Any:
    boat.mark = 1
    return hasattr(boat.pier, "mark")


def answers_and_sold(alias: str, model: Any, *operations: Any) -> tuple[list[Any], int]:
    pier = Pier.objects.using(alias).create()
    boat = Boat.objects.using(alias).create(pier=pier)
    with processing(model, alias) as processor:
        answers = answers_of(processor, boat.pk, *operations)
    return answers, Boat.objects.using(alias).get(pk=boat.pk).sold


@pytest.mark.parametrize("spoil", [mark_and_raise, unmark_and_raise])
@pytest.mark.parametrize("model", [Boat, Writing])
@pytest.mark.parametrize("server", ["sqlite", "postgresql"])
def test_what_an_operation_that_raises_has_changed_in_slots_is_undone(
    server: str, model: Any, spoil: Any, tmp_path: Path
) -> None:
    with tables(server, tmp_path, Pier, Boat) as alias:
        answers, sold = answers_and_sold(alias, model, spoil, sell, spoil, sell, spoil)
    assert [one for one in answers if not isinstance(one, ValueError)] == [(1, False, []), (2, False, [])]
    assert [str(one) for one in answers if isinstance(one, ValueError)] == (
        ["50", "51", "52"] if spoil is mark_and_raise else ["0", "1", "2"]
    )
    assert sold == 2


def test_what_an_operation_has_left_in_slots_is_forgotten_as_other_attributes_are(tmp_path: Path) -> None:
    with tables("sqlite", tmp_path, Pier, Boat) as alias:
        assert answers_and_sold(alias, Boat, mark, sell, mark) == ([False, (1, False, []), False], 1)


def test_what_a_save_of_the_models_own_writes_of_slots_is_not_lost(tmp_path: Path) -> None:
    with tables("sqlite", tmp_path, Pier, Boat) as alias:
        answers, sold = answers_and_sold(alias, Writing, sell, mark, mark_and_raise, sell)
    assert [*answers[:2], answers[3]] == [(1, False, []), False, (2, True, [])]
    assert sold == 1002

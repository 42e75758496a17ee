"""What the scopes of documents, and in Redis, undo an operation with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from geventbatch._batch import batch_at_hand
from geventbatch.errors import CannotUndo
from tests.support.document_places import (
    PARAMETERS,
    NotEnough,
    Place,
    book,
    look,
    opened_place,
    put,
    spoil,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=PARAMETERS, ids=str)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    yield from opened_place(request.param, tmp_path)


def test_a_copy_can_be_restored_many_times(place: Place) -> None:
    def operation(resource: Any) -> None:
        scope = batch_at_hand().scope
        book(resource, "1", "Bob")
        mark = scope.checkpoint()
        for _ in range(2):
            with pytest.raises(NotEnough):
                spoil(resource, "1")
            resource = scope.restore(mark)
            assert look(resource) == {"total": 0, "seats": {"1": ["Ann", "Bob"]}}
            with pytest.raises(NotEnough):
                spoil(resource, "1")
            resource = scope.restore(None)
            assert look(resource) == {"total": 0, "seats": {"1": ["Ann"]}}
        scope.restore(mark)

    with place.opened() as opened:
        opened.run("k", book, "1", "Ann")
        opened.run("k", operation)
        assert opened.run("k", look) == {"total": 0, "seats": {"1": ["Ann", "Bob"]}}


def test_what_would_not_come_back_is_not_copied(place: Place) -> None:
    thing = (one for one in "ab")

    def operation(resource: Any) -> None:
        scope = batch_at_hand().scope
        resource["seats"]["1"] = thing
        with pytest.raises(CannotUndo, match="'k' cannot be copied: "):
            scope.checkpoint()
        assert look(scope.restore(None)) == {"total": 3, "seats": {}}

    with place.opened() as opened:
        opened.run("k", put, 3)
        opened.run("k", operation)
        assert opened.run("k", look) == {"total": 3, "seats": {}}

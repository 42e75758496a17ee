"""A batch on a Django model goes when it is over: the garbage collector finds nothing of it."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
from django.db import connections

from tests.stores.test_django_models import MODES, processing, tables
from tests.support.callers import answer_of

from tests.support.django_project.bank.models import Ticket  # isort: skip - after Django is set up

if TYPE_CHECKING:
    from pathlib import Path


def sell(ticket: Any) -> None:
    ticket.total += 1


def look(ticket: Any) -> int:
    return int(Ticket.objects.using(ticket._state.db).count())


def write(ticket: Any) -> None:
    Ticket.objects.using(ticket._state.db).create(number=Ticket.objects.using(ticket._state.db).count() + 1)


def hook(ticket: Any) -> None:
    ticket.total += 1
    connections[ticket._state.db].on_commit(list)


@pytest.mark.parametrize("operation", [sell, look, write, hook])
@pytest.mark.parametrize(("server", "mode"), MODES)
def test_a_batch_that_is_over_leaves_nothing_to_the_garbage_collector(
    server: str, mode: Any, operation: Any, tmp_path: Path
) -> None:
    with tables(server, tmp_path, Ticket) as alias:
        Ticket.objects.using(alias).create(number=1)
        with processing(Ticket, alias, mode=mode) as processor:
            for _ in range(3):
                assert not isinstance(answer_of(processor.run, 1, operation), Exception)
            gc.collect()
            gc.disable()
            try:
                for _ in range(3):
                    processor.run(1, operation)
                assert gc.collect() == 0
            finally:
                gc.enable()

"""Read by type checkers, as usage.py: what they make of processors that are declared for a Flask application."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_type

from geventbatch import Processor
from geventbatch.integrations.flask import AppProcessor, GeventBatch

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


class Train:
    def book(self, seat: int, passenger: str) -> bool:
        return bool(seat and passenger)


def open_train(key: str) -> AbstractContextManager[Train]:
    raise NotImplementedError


def load(key: str) -> Train:
    raise NotImplementedError


batches = GeventBatch()
trains = batches.processor(open_resource=open_train, min_duration=0)
assert_type(trains, AppProcessor[Train])
assert_type(batches.processor(load_resource=load), AppProcessor[Train])
assert_type(batches.processor(make_store=lambda: open_train), AppProcessor[Train])
assert_type(batches.processor(), AppProcessor[None])
assert_type(batches.processor(open_resource=open_train, release_session=False), AppProcessor[Train])


def answers() -> None:
    assert_type(trains.run("ICE 1", Train.book, 12, "Ann"), bool)
    assert_type(trains.for_app(), Processor[Train])
    trains.run("ICE 1", Train.book, "12", "Ann")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    batches.processor(max_duraton=5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]

"""What operations get as their resource, and what of it is saved under which key."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
import pytest

from geventbatch import Processor
from tests.support.callers import answer_of
from tests.support.recording_store import FORMS, Store, add

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geventbatch.testing import VirtualTime


@pytest.mark.parametrize("form", FORMS)
def test_an_operation_changes_what_was_loaded_for_its_key_and_that_is_saved_under_the_same_key(
    clock: VirtualTime, form: Any
) -> None:
    store = Store(clock, form)
    store.kept["a"], store.kept["b"] = ["of a"], ["of b"]
    with store.processor(min_duration=0.1) as processor:
        gevent.joinall([gevent.spawn(processor.run, key, add, f"more of {key}") for key in "abc"], raise_error=True)
        assert store.kept == {"a": ["of a", "more of a"], "b": ["of b", "more of b"], "c": ["more of c"]}
        assert processor.run("a", list) == ["of a", "more of a"]


def test_the_very_object_that_was_loaded_is_given_to_every_operation_and_to_the_save(clock: VirtualTime) -> None:
    seen: list[Any] = []
    loaded: list[str] = []
    with Processor(
        load_resource=lambda key: loaded, save_resource=lambda key, resource: seen.append(resource), min_duration=0.1
    ) as processor:
        gevent.joinall([gevent.spawn(processor.run, "k", seen.append) for _ in range(3)], raise_error=True)
    assert len(seen) == 4
    assert all(one is loaded for one in seen)


def test_the_resource_is_none_by_default_and_saving_it_does_nothing(clock: VirtualTime) -> None:
    with Processor(min_duration=0) as processor:
        assert processor.run("k", lambda resource: [resource]) == [None]


def test_a_load_resource_alone_is_enough_and_so_is_a_save_resource(clock: VirtualTime) -> None:
    with Processor(load_resource=lambda key: [key], min_duration=0) as processor:
        assert processor.run("k", list) == ["k"]
    saved: list[tuple[str, None]] = []
    with Processor(save_resource=lambda key, resource: saved.append((key, resource)), min_duration=0) as other:
        other.run("k", lambda resource: None)
    assert saved == [("k", None)]


def test_open_resource_takes_the_place_of_the_pair(clock: VirtualTime) -> None:
    noted: list[Any] = []

    @contextmanager
    def scope(key: str) -> Iterator[list[str]]:
        noted.append(("begin", key))
        resource: list[str] = []
        try:
            yield resource
        except BaseException as error:
            noted.append(("roll back", key, type(error)))
            raise
        noted.append(("commit", key, tuple(resource)))

    def refuse(resource: list[str]) -> None:
        raise KeyError("taken")

    with Processor(open_resource=scope, min_duration=0) as processor:
        assert processor.run("k", add, "a") == "a"
        assert isinstance(answer_of(processor.run, "k", refuse), KeyError)
    assert noted[:2] == [("begin", "k"), ("commit", "k", ("a",))]
    assert noted[2] == ("begin", "k")
    assert noted[3][:2] == ("roll back", "k")

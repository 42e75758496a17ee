"""What scopes and stores may have, and what is told of a name that is nearly one of these (guarantee 15)."""

from __future__ import annotations

import inspect
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geventbatch import Processor, check, scopes

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime

STORES = Path(__file__).parent.parent / "docs/stores.md"


def names(protocols: tuple[type, ...]) -> list[str]:
    """Give the public names of these, sorted: what a class must have to be one of each."""
    return sorted(name for one in protocols for name in vars(one) if not name.startswith("_"))


def documented(begin: str, end: str) -> list[str]:
    """Give the names in the first cells of the rows between two lines of the page, sorted."""
    lines = STORES.read_text().partition(begin)[2].partition(end)[0].splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    found = [re.match(r"\w+(?=\(| =|$)", name) for cell in cells for name in re.findall("`([^`]+)`", cell)]
    return sorted({one[0] for one in found if one and one[0] != "current_batch"})


def test_what_the_page_says_a_scope_may_have_is_in_a_protocol_and_the_other_way_round() -> None:
    told = documented("What `open_resource(key)` returns may have more", "And `open_resource` itself")

    assert told == names(scopes.OF_A_SCOPE)


def test_what_the_page_says_a_store_may_have_is_in_a_protocol_and_the_other_way_round() -> None:
    told = documented("And `open_resource` itself", "An attempt that is judged **step by step**")

    assert told == names(scopes.OF_A_STORE)


def test_every_protocol_is_public_and_in_the_reference() -> None:
    everything: list[Any] = [*scopes.OF_A_SCOPE, *scopes.OF_A_STORE]
    page = (STORES.parent / "api.md").read_text()
    [members] = re.findall(r"automodule:: geventbatch.scopes\n +:members: (.*)", page)

    assert sorted(one.__name__ for one in everything) == scopes.__all__
    assert members.split(", ") == [one.__name__ for one in everything]


def test_a_scope_is_one_of_a_protocol_when_it_has_its_names() -> None:
    class Scope:
        takes_rows = True

        def saved(self) -> None: ...

    given: object = Scope()
    assert isinstance(given, scopes.TakesRows)
    assert isinstance(given, scopes.AfterSave)
    assert not isinstance(given, scopes.Deletes)
    assert not isinstance(given, scopes.StepByStep)


def test_every_function_of_a_protocol_says_whether_it_may_switch() -> None:
    everything = (*scopes.OF_A_SCOPE, *scopes.OF_A_STORE)
    functions = [value for one in everything for value in vars(one).values() if inspect.isfunction(value)]
    public = [one for one in functions if not one.__name__.startswith("_")]

    assert len(public) > 10
    assert [one.__qualname__ for one in public if "Switches: " not in (one.__doc__ or "")] == []


def test_what_a_store_has_is_looked_up_when_the_processor_is_made_and_not_again(clock: VirtualTime) -> None:
    asked: list[str] = []

    class Store:
        def __call__(self, key: str) -> AbstractContextManager[list[str]]:
            return nullcontext([key])

        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            raise AttributeError(name)

    with Processor(open_resource=Store(), min_duration=0, max_duration=5) as processor:
        before = list(asked)
        processor.run("k", list.__len__)
        processor.run("k", list.__len__)
        check()
    assert set(names(scopes.OF_A_STORE)) <= {*before}
    assert asked == before

"""What scopes and stores may have, and what is told of a name that is nearly one of these (guarantee 15)."""

from __future__ import annotations

import inspect
import re
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from flask import Flask

from geventbatch import Processor, check_setup, scopes
from geventbatch._misspelt import misspelt
from geventbatch._seam import options_of
from geventbatch.integrations.flask import GeventBatch
from geventbatch.testing import faults

if TYPE_CHECKING:
    from geventbatch.testing import VirtualTime

OWN_STORES = Path(__file__).parents[2] / "docs/own-stores.md"


def names(protocols: tuple[type, ...]) -> list[str]:
    """Give the public names of these, sorted: what a class must have to be one of each."""
    return sorted(name for one in protocols for name in vars(one) if not name.startswith("_"))


def documented(begin: str, end: str) -> list[str]:
    """Give the names in the first cells of the rows between two lines of the page, sorted."""
    lines = OWN_STORES.read_text().partition(begin)[2].partition(end)[0].splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    found = [re.match(r"\w+(?=\(| =|$)", name) for cell in cells for name in re.findall("`([^`]+)`", cell)]
    return sorted({one[0] for one in found if one and one[0] != "current_batch"})


def test_what_the_page_says_a_scope_may_have_is_in_a_protocol_and_the_other_way_round() -> None:
    told = documented("What `open_resource(key)` returns may have more", "And `open_resource` itself")

    assert told == names(scopes.OF_A_SCOPE)


def test_what_the_page_says_a_store_may_have_is_in_a_protocol_and_the_other_way_round() -> None:
    told = documented("And `open_resource` itself", "In an operation, a scope may call")

    assert told == names(scopes.OF_A_STORE)


def test_each_row_of_the_page_names_the_protocol_of_what_is_in_it() -> None:
    rows = re.findall(r"^\| `(\w+)[^|]*\| `(\w+)` \|", OWN_STORES.read_text(), re.MULTILINE)

    assert sorted(name for _, name in rows) == sorted({*scopes.__all__} - {"OutcomeName"})  # which is what one is told
    assert [row for row in rows if row[0] not in vars(getattr(scopes, row[1]))] == []


def test_every_protocol_is_public_and_in_the_reference() -> None:
    everything: list[Any] = [*scopes.OF_A_SCOPE, *scopes.OF_A_STORE]
    page = (OWN_STORES.parent / "api.md").read_text()
    [members] = re.findall(r"automodule:: geventbatch.scopes\n +:members: (.*)", page)

    assert sorted([one.__name__ for one in everything] + ["OutcomeName"]) == scopes.__all__
    assert members.split(", ") == [*(one.__name__ for one in everything), "OutcomeName"]


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
        check_setup()
    assert set(names(scopes.OF_A_STORE)) <= {*before}
    assert asked == before


# -- misspelt names -------------------------------------------------------------------------------------------------


def named(name: str, *, value: Any, **others: Any) -> Any:
    """Make an object of a user's class that has this name, and can be a store and a scope."""

    def call(self: Any, key: object) -> Any:
        return named("_own", value=None)

    own = {"__call__": call, "__enter__": lambda self: [], "__exit__": lambda self, *raised: None}
    return type("Mine", (), {**own, **others, name: value})()


def function(*args: object) -> None:
    """Do nothing."""


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("normalise_key", "normalize_key"),
        ("normalizeKey", "normalize_key"),
        ("normalize_keys", "normalize_key"),
        ("check_outcome", "check_outcomes"),
        ("admits", "admit"),
        ("stoped", "stopped"),
    ],
)
def test_a_misspelt_function_of_a_store_is_told_as_the_processor_is_made(name: str, right: str) -> None:
    store = named(name, value=function, on_server=True)

    with pytest.warns(RuntimeWarning, match=rf"The store Mine has {name} \(did you mean {right}\?\)") as told:
        processor = Processor(open_resource=store, min_duration=0, max_duration=5)
    assert [one.filename for one in told] == [__file__]
    assert [problem.name for problem in check_setup() if "Mine" in problem.what] == ["misspelt"]
    processor.stop()


@pytest.mark.parametrize("name", ["keep_outcomes", "keepsOutcomes", "open_resource_s", "onServer"])
def test_a_misspelt_flag_of_a_store_is_told_as_the_processor_is_made(name: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"The store Mine has {name}"):
        Processor(open_resource=named(name, value=True), min_duration=0, max_duration=5).stop()


@pytest.mark.parametrize("batching", [True, False])
@pytest.mark.parametrize("many", [True, False])
def test_a_misspelt_name_of_a_scope_is_told_once_at_the_first_load(
    clock: VirtualTime, many: bool, batching: bool
) -> None:
    opened: list[Any] = []

    class Scope:
        take_rows = True

        def __init__(self, asked: Any) -> None:
            opened.append(asked)
            self.delete = True
            self._resource = {key: [] for key in asked} if many else []

        def __enter__(self) -> Any:
            return self._resource

        def __exit__(self, *raised: object) -> None: ...

        def saved(self) -> None: ...

        @staticmethod
        def operation_raises(error: Exception) -> None: ...

    opener: dict[str, Any] = {"open_resources" if many else "open_resource": Scope}
    with (
        warnings.catch_warnings(record=True) as told,
        Processor(**opener, min_duration=0, max_duration=5, batching=batching) as processor,
    ):
        warnings.simplefilter("always")
        for _ in range(3):
            processor.run("k", list.__len__)
    [warning] = told
    assert "The scope " in str(warning.message)
    for name, right in (("take_rows", "takes_rows"), ("operation_raises", "operation_raised"), ("delete", "deletes")):
        assert f"{name} (did you mean {right}?)" in str(warning.message)
    assert len(opened) == 3


def test_a_scope_inside_what_an_application_and_a_test_tool_put_around_it_is_looked_at(clock: VirtualTime) -> None:
    app = Flask(__name__)
    scope = named("take_rows", value=True)
    trains: Any = GeventBatch(app).processor(open_resource=lambda key: scope, min_duration=0, max_duration=5)

    with app.app_context():
        with faults(trains):
            with pytest.warns(RuntimeWarning, match="The scope Mine has take_rows"):
                trains.run("k", list.__len__)
            trains.run("k", list.__len__)
        trains.run("k", list.__len__)
        trains.for_app().stop()


@pytest.mark.parametrize(
    "own",
    [
        {"save": function, "step": function, "record": function, "takes_rows": True},
        {"delete": function, "deleted": False, "checkpoints": [], "takes_rows": True},
        {"stop": function, "normalize": function, "on_server": True, "store": function},
        {"admits": function},
        {"_take_rows": True, "_normalise_key": function},
        {"normalise_key": function, "normalize_key": lambda self, key: key},
        {"__getattr__": function, "take_rows": True},
    ],
    ids=", ".join,
)
def test_what_may_well_be_a_name_of_the_users_own_is_not_told(own: dict[str, Any]) -> None:
    given = named("_own", value=None, **own)

    assert [*misspelt(given, scope=True), *misspelt(given, scope=False)] == []


def test_a_processor_opens_by_the_users_own_function_after_its_first_load(clock: VirtualTime) -> None:
    def open_resource(key: str) -> AbstractContextManager[list[str]]:
        return nullcontext([key])

    with Processor(open_resource=open_resource, min_duration=0, max_duration=5) as processor:
        assert processor.name.endswith("open_resource")
        processor.run("k", list.__len__)
        assert options_of(processor).open_resource is open_resource
        with faults(processor):
            processor.run("k", list.__len__)
        assert options_of(processor).open_resource is open_resource

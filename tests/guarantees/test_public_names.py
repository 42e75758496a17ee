"""The names that users see: what they are, and the old ones of those that were renamed."""

from __future__ import annotations

import inspect
import pydoc
import re
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any, get_overloads

import pytest
import redis
import sqlalchemy as sa

from geventbatch import Batch, Processor, current_batch
from geventbatch._core.batch import Batch as Inner
from geventbatch._options import DEFAULTS, PLAIN, OptionTypes
from geventbatch.integrations.flask import AppProcessor, GeventBatch
from geventbatch.stores import DjangoStore, RedisStore, SQLAlchemyStore
from geventbatch.testing import state_of
from tests.support.django_project.start import database  # noqa: F401 - it sets Django up

from tests.support.django_project.bank.models import Account  # isort: skip - after Django is set up


RENAMED = [
    ("geventbatch", "BatchMetrics", "MetricSubscription"),
    ("geventbatch", "check", "check_setup"),
    ("geventbatch", "Problem", "SetupProblem"),
    ("geventbatch.stores", "what_it_means", "as_not_saved"),
    ("geventbatch.testing", "Faults", "FaultPlan"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_is_the_same_object_and_warns_of_the_new_one_where_it_is_used(
    module: str, old: str, new: str
) -> None:
    found = import_module(module)

    with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} is now {module}\.{new}") as told:
        assert getattr(found, old) is getattr(found, new)
    assert [one.filename for one in told] == [__file__]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_can_be_imported(module: str, old: str, new: str) -> None:
    names: dict[str, object] = {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        exec(compile(f"from {module} import {new}, {old}", "their.py", "exec"), names)  # noqa: S102 - as users write it
    assert names[old] is names[new]
    assert {(one.category, one.filename) for one in told} == {(DeprecationWarning, "their.py")}


@pytest.mark.parametrize("module", {module for module, _, _ in RENAMED})
def test_a_name_that_never_was_is_none_and_the_old_ones_are_not_listed(module: str) -> None:
    found = import_module(module)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        _ = found.nothing
    assert not {old for where, old, _ in RENAMED if where == module} & {*found.__all__, *dir(found)}


def test_the_page_on_moving_has_each_old_name_with_the_new_one() -> None:
    page = (Path(__file__).parents[2] / "docs/moving.md").read_text()
    rows = re.findall(r"^\| `(geventbatch[\w.]*)\.(\w+)` \| `\1\.(\w+)` \|$", page, re.MULTILINE)
    assert rows == RENAMED


# -- a batch ------------------------------------------------------------------------------------------------------

FOR_OPERATIONS = ["add_row", "alone", "delete", "key", "keys", "remaining"]
FOR_SCOPES = ["ask_scope", "bulk", "completed", "cut", "deleted", "deleted_keys", "outcomes", "rows"]


def public(owner: object) -> list[str]:
    """Give the names of *owner* that do not begin with an underscore, sorted."""
    return sorted(name for name in dir(owner) if not name.startswith("_"))


def test_a_batch_shows_six_names_to_operations_and_eight_to_scopes_each_with_what_it_is() -> None:
    assert public(Batch) == sorted(FOR_OPERATIONS + FOR_SCOPES)
    for name in public(Batch):
        assert inspect.getdoc(inspect.getattr_static(Batch, name))
        assert f"`{name}`" in (Batch.__doc__ or "")


def test_what_operations_get_is_a_batch_that_has_all_these_names() -> None:
    seen: list[Any] = []
    with Processor(min_duration=0) as processor:
        processor.run("k", lambda resource: seen.append(current_batch()))
    (batch,) = seen
    assert type(batch) is Inner
    assert isinstance(batch, Batch)
    assert set(public(Batch)) <= set(public(batch))


def test_nobody_but_the_library_makes_a_batch() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Batch()  # type: ignore[misc]


# -- stores -------------------------------------------------------------------------------------------------------


def test_a_store_shows_what_is_for_users_and_what_a_processor_asks_and_nothing_else(tmp_path: Path) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'it.db'}")
    asked = {"keeps_outcomes", "normalize_key", "on_server", "stopped"}
    shown = {
        DjangoStore(Account): {"admit", "allow_atomic", "model", "open_resources", "purge_outcomes", "using"},
        RedisStore(redis.Redis()): {"check_outcomes", "open_resources"},
        SQLAlchemyStore.documents(engine, "trains"): {
            *("create_table", "documents", "mapped", "mode", "open_resources", "purge_outcomes", "table"),
        },
    }
    for store, names in shown.items():
        assert public(store) == sorted(asked | names)
    engine.dispose()


@pytest.mark.parametrize("given", [("sqlite://",), ("sqlite://", "trains"), (sa.Column,)])
def test_a_sqlalchemy_store_that_is_made_by_its_class_says_what_makes_one(given: tuple[Any, ...]) -> None:
    make: Any = SQLAlchemyStore
    with pytest.raises(TypeError, match=r"make a store by SQLAlchemyStore\.documents\(engine, table\), or by "):
        make(*given)


# -- what tests have ------------------------------------------------------------------------------------------------


def test_state_of_takes_the_value_and_nothing_else() -> None:
    assert [*inspect.signature(state_of).parameters] == ["value"]
    circle: list[Any] = [1]
    circle.append(circle)
    other: list[Any] = [1]
    other.append(other)
    assert state_of(circle) == state_of(other) != state_of([1, [1]])


# -- a processor ----------------------------------------------------------------------------------------------------


def test_the_signature_of_a_processor_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(Processor).parameters
    assert {name: one.default for name, one in shown.items()} == DEFAULTS
    assert {one.kind for one in shown.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert "min_duration: 'float' = 0.1" in pydoc.plain(pydoc.render_doc(Processor))


def test_the_options_are_the_same_for_checkers_in_the_table_and_in_the_docstring() -> None:
    typed = inspect.get_annotations(OptionTypes)
    assert [name for name in DEFAULTS if name in typed] == [*typed]
    opening = {name for one in get_overloads(Processor.__init__) for name in inspect.signature(one).parameters}
    assert {*typed, *opening} - {"self", "options"} == {*DEFAULTS}
    documented = re.findall(r"^    (\w+): ", inspect.getdoc(Processor) or "", re.MULTILINE)
    assert [name for name in documented if not name.endswith("Error")] == [*DEFAULTS]


# -- the processors of an application of Flask ----------------------------------------------------------------------


def test_a_processor_that_was_declared_has_all_that_a_processor_has_but_its_end() -> None:
    assert {*public(Processor)} - {*public(AppProcessor)} == {"stop"}
    assert {*public(AppProcessor)} - {*public(Processor)} == {"for_app", "store"}
    for name in {*public(Processor)} & {*public(AppProcessor)}:
        theirs, ours = (inspect.getattr_static(owner, name) for owner in (Processor, AppProcessor))
        if isinstance(theirs, property):
            assert (theirs.fset is None) == (ours.fset is None), name
        else:
            assert arguments(ours) == arguments(theirs), name


def test_what_declares_a_processor_shows_every_option_and_make_store() -> None:
    own = {"self": inspect.Parameter.empty, "make_store": None, "release_session": None}
    assert arguments(GeventBatch.processor) == {**own, **DEFAULTS}


def test_what_an_application_may_configure_is_named_where_it_is_looked_for() -> None:
    names = {name.upper() for name in PLAIN} | {"ERROR_ANSWERS", "RETRY_AFTER", "RELEASE_SESSION"}
    assert {*re.findall(r"``(?:GEVENTBATCH_|…_)(\w+)``", GeventBatch.__doc__ or "")} == names


def arguments(function: Any) -> dict[str, Any]:
    """Give what *function* takes, each with its default."""
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


def test_a_method_of_the_public_face_of_a_batch_does_not_do_nothing_in_silence() -> None:
    def add(resource: object) -> None:
        Batch.add_row(current_batch(), "a line")

    with Processor(min_duration=0) as processor, pytest.raises(NotImplementedError):
        processor.run("k", add)

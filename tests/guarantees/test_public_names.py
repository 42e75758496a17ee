"""The names that users see: what they are, and the old ones of those that were renamed."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest

RENAMED = [
    ("geventbatch", "BatchMetrics", "MetricSubscription"),
    ("geventbatch", "Problem", "SetupProblem"),
    ("geventbatch", "check", "check_setup"),
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

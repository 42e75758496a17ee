"""Stores that are broken on purpose: the oracle has to find each.

    python -m tests.support.oracle.mutants "forgotten rows" program.py

runs a program with one of them; with "" it runs it as it is.
"""

from gevent import monkey

monkey.patch_all()

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from geventbatch._core import applying
from geventbatch._core.batch import Batch
from geventbatch._core.undo import Undo
from geventbatch.stores.sqlalchemy import _bulk_documents, _loaded_resource
from geventbatch.stores.sqlalchemy._bound_values import BoundColumn
from geventbatch.stores.sqlalchemy._guard import Guard


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """Break the library so, until the block is left."""
    whole = [(owner, attribute, owner.__dict__[attribute]) for owner, attribute, _ in MUTANTS[name]]
    for owner, attribute, broken in MUTANTS[name]:
        setattr(owner, attribute, broken(owner.__dict__[attribute]))
    try:
        yield
    finally:
        for owner, attribute, before in whole:
            setattr(owner, attribute, before)


def _added_first(add: Any) -> Any:
    def broken(batch: Batch, operation: Any) -> None:
        add(batch, operation)
        batch.operations.insert(0, batch.operations.pop())

    return broken


def _nothing(_: Any) -> Any:
    return lambda *_: None


class _Parts:
    """What stores take for the components of a bulk."""

    def __init__(self, *parts: tuple[Any, list[Any]]) -> None:
        self._parts = parts

    def items(self) -> Sequence[tuple[Any, list[Any]]]:
        return self._parts


def _without_last(by_component: Any) -> Any:
    def broken(keys: Any, bulk: Any) -> _Parts:
        parts = by_component(keys, bulk).items()
        return _Parts(*((batch, some[:-1] or some) for batch, some in parts))

    return broken


def _each_alone(_: Any) -> Any:
    return lambda keys, bulk: _Parts(*((bulk[key], [key]) for key in keys))


MUTANTS: dict[str, list[tuple[Any, str, Any]]] = {
    "forgotten rows": [(Batch, "rows", lambda _: property(lambda _: []))],
    "compared by ==": [(BoundColumn, "exact", lambda _: lambda _, value: deepcopy(value))],
    "refreshed without a flush": [(Guard, "check_refresh", _nothing), (Guard, "check_execute", _nothing)],
    "what raised stays": [(Undo, "undo", lambda _: lambda *_: False)],
    "computed is stale": [(_loaded_resource, "forget", _nothing)],
    "answers are aliases": [
        (applying, "own_answer", lambda _: lambda _attempt, _operation, _resource, value: value),
    ],
    "applied in another order": [(Batch, "add", _added_first)],
    "a component without one of its keys": [(_bulk_documents, "by_component", _without_last)],
    "each key of a component by itself": [(_bulk_documents, "by_component", _each_alone)],
}
"""What is broken in each: of whom, which attribute, and what makes the broken one of the whole one."""


if __name__ == "__main__":
    _, mutant, program = sys.argv
    if mutant:
        with mutated(mutant):
            runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_path(program, run_name="__main__")

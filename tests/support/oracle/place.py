"""Where the examples of one ORM are run: a database, and the models that are there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tests.support.oracle.judge import Clean, Dirty, Trial, add_row, delete, judge

if TYPE_CHECKING:
    from tests.support.oracle.example import Example
    from tests.support.oracle.judge import World

NAMES = {"Clean": Clean, "Dirty": Dirty, "Trial": Trial, "add_row": add_row, "delete": delete}
"""What the source of every example may use."""


class Place(ABC):
    """A database, and the models that are there."""

    MOST = 40
    """Models at a time."""

    def __init__(self, **names: Any) -> None:
        """With *names* of the ORM's for the source of models and operations."""
        self._names = {**NAMES, **names}
        self._models: dict[str, dict[str, Any]] = {}
        self._prefix = f"m{uuid4().hex[:6]}"  # a server may be that of other places too
        self._made = 0

    def run(self, example: Example) -> None:
        """Raise what is wrong."""
        names = {**self._model(example.model)}
        exec(compile(example.calls, "<operations>", "exec", dont_inherit=True), names)  # noqa: S102 - it is our own
        judge(self.world(example, names), eval(example.trial, names))  # noqa: S307 - likewise

    def _model(self, source: str) -> dict[str, Any]:
        """As it is there, the one that was used last in the last place."""
        found = self._models.pop(source, None) or self._new(source)
        self._models[source] = found
        while len(self._models) > self.MOST:
            self.drop(self._models.pop(next(iter(self._models))))
        return found

    def _new(self, source: str) -> dict[str, Any]:
        self._made += 1
        name = f"model_{self._made}"
        model = {**self._names, "PREFIX": f"{self._prefix}_{self._made}_", "__name__": name}
        exec(compile(source, "<model>", "exec", dont_inherit=True), model)  # noqa: S102 - it is our own
        self.make(model)
        return model

    @abstractmethod
    def world(self, example: Example, names: dict[str, Any]) -> World:
        """What the judge is given."""

    @abstractmethod
    def make(self, model: dict[str, Any]) -> None:
        """Make its tables."""

    @abstractmethod
    def drop(self, model: dict[str, Any]) -> None:
        """Drop its tables."""

    @abstractmethod
    def close(self) -> None:
        """Give the connections back."""

"""Undoes an operation that raised on a Django model: in memory, if nothing but memory has changed.

A written statement is not undone in memory. The guard numbers the transaction's states, and a copy of the memory keeps
the number of its own: if the number has changed, the copy is not enough.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from django.db.models import Model

from geventbatch._safe_repr import shown
from geventbatch.errors import CannotUndo
from geventbatch.stores.django._instance_class import instance_class
from geventbatch.stores.django._memory import Memory, attributes

if TYPE_CHECKING:
    from geventbatch.stores.django._guard import Guard
    from geventbatch.stores.django._row import Row

M = TypeVar("M", bound=Model)


class Checkpoint(NamedTuple):
    """The state between two operations."""

    memory: Memory
    save_asked: bool
    hooks: int
    """The number of callbacks given to `on_commit`."""
    mark: int
    """The guard's number of the transaction's state."""


class Undo(Generic[M]):
    """Restores the resource of one attempt. Made when it was loaded."""

    __slots__ = ("_guard", "_hooks", "_loaded", "_model", "_related", "_row", "found")

    def __init__(self, row: Row[M], model: type[M], guard: Guard, *, copies: bool) -> None:
        """Copy the loaded memory if it *copies*; else rebuild it from the state kept for comparison, when needed."""
        instance = row.instance
        self.found = {**attributes(instance, model)}
        """The instance's attributes when it was loaded."""
        self._row = row
        self._model = model
        self._guard = guard
        self._related = "fields_cache" in vars(instance._state)
        self._hooks = len(guard.connection.run_on_commit)  # above 0 inside an outer block
        # -- mutable state ---------------------------------------------------------------------------------
        self._loaded: Checkpoint | None = None
        if copies or row.new:
            with suppress(CannotUndo):
                self._loaded = self.checkpoint()

    def checkpoint(self) -> Checkpoint:
        """Return a copy of the present state. Raises `CannotUndo` if a value cannot be copied. Switches: no."""
        row = self._row
        memory = Memory.of(row.instance, self._model)
        return Checkpoint(memory, row.save_asked, len(self._connection["run_on_commit"]), self._guard.mark)

    def restore(self, checkpoint: Checkpoint | None) -> M:
        """Go back to *checkpoint*, else to the load. Raises `CannotUndo` if memory is not enough. Switches: no."""
        kept = self.as_of(checkpoint)
        if kept.mark != self._guard.mark:
            raise CannotUndo(
                f"an operation on {shown(self._row.key)} has sent a statement that writes: memory alone cannot undo it"
            )
        self.put_back(kept)
        return self._row.instance

    def as_of(self, checkpoint: Checkpoint | None) -> Checkpoint:
        """Return *checkpoint*; for None, that of the load. Raises `CannotUndo` if there is none. Switches: no."""
        return self._as_loaded() if checkpoint is None else checkpoint

    def put_back(self, kept: Checkpoint) -> None:
        """Restore the memory of *kept*, and drop the callbacks given to `on_commit` since. Switches: no."""
        self.put_back_memory(kept)
        connection = self._connection
        if len(connection["run_on_commit"]) != kept.hooks:
            connection["run_on_commit"] = connection["run_on_commit"][: kept.hooks]

    def put_back_memory(self, kept: Checkpoint) -> None:
        """Restore the memory of *kept*. Switches: no."""
        row = self._row
        instance: Any = row.instance
        kind: Any = instance_class(self._model)
        if type(instance) is not kind:
            instance.__class__ = kind
        kept.memory.put_back(instance)
        row.save_asked = kept.save_asked

    def _as_loaded(self) -> Checkpoint:
        if self._loaded is None:
            row = self._row
            if row.new:
                raise CannotUndo(f"the new row of {shown(row.key)} has a value that cannot be copied")
            if self._related and row.computes(self._model):
                raise CannotUndo(f"objects loaded with {shown(row.key)} may have been changed since")
            state = {**vars(row.instance._state), "adding": False, "db": self._guard.connection.alias}
            state.pop("fields_cache", None)
            memory = Memory.as_loaded(self.found, state, row.loaded, self._model)
            self._loaded = Checkpoint(memory, save_asked=False, hooks=self._hooks, mark=0)
        return self._loaded

    @property
    def _connection(self) -> dict[str, Any]:
        """Attributes of the connection, read past its guard, which would count this as the operation's act."""
        return vars(self._guard.connection)

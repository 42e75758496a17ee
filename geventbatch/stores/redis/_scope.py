"""The scope of one batch on one resource in Redis."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from geventbatch import current_batch
from geventbatch.stores._reuse import as_conflicts

if TYPE_CHECKING:
    from types import TracebackType

    from geventbatch.stores.redis._resources import Resources
    from geventbatch.stores.redis._save import State

R = TypeVar("R")


class Scope(Generic[R]):
    """Loads on entering, saves on exiting; does nothing on exiting with an error. It holds no connection in between."""

    deletes: Final = True

    # -- mutable state ---------------------------------------------------------------------------------------
    reused: bool  # cached, not loaded: the save must compare even if there is nothing to save
    _loaded: State
    _last: State  # after the last step
    _resource: R

    def __init__(self, resources: Resources[R], key: str) -> None:
        self._resources = resources
        self._key = key

    def __enter__(self) -> R:
        self.reused = self._reuse()
        if not self.reused:
            self._loaded = self._resources.load(self._key)
            self._resource = self._resources.resource_of(self._key, self._loaded)
        return self._resource

    # -- an operation that raised ----------------------------------------------------------------------------

    def checkpoint(self) -> object:
        """Copy the present resource. Raises `CannotUndo`. Switches: no."""
        return self._resources.checkpoint(self._key, self._loaded, self._resource)

    def restore(self, checkpoint: Any) -> R:
        """Return the resource as it was at *checkpoint*, or at the load. Raises `CannotUndo`. Switches: no."""
        if checkpoint is None:
            self._resource = self._resources.made_again(self._key, self._loaded, self._resource)
        else:
            make, copy = checkpoint
            self._resource = make(copy)
        return self._resource

    # -- step by step: nothing is sent before the save -------------------------------------------------------

    @property
    def steps(self) -> bool:
        """Return whether each operation can be judged by itself."""
        return not self.reused

    def begin_steps(self) -> None:
        """Make the loaded state the one to go back to. Switches: no."""
        self._last = self._loaded

    def keep(self) -> None:
        """Encode the resource after an operation. Switches: no."""
        value = self._resources.encoded(self._key, self._resource, self._last.value)
        self._last = self._last._replace(value=value)

    def undo(self) -> R:
        """Return the resource as it was after the last step. Switches: no."""
        self._resource = self._resources.resource_of(self._key, self._last)
        return self._resource

    # ---------------------------------------------------------------------------------------------------------

    def recorded(self, keys: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of operations with these idempotency keys. Switches: yes."""
        return self._resources.recorded(keys, self._key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        with as_conflicts(self._key) if self.reused else nullcontext():
            saved = self._resources.save(self._key, self._loaded, self._resource, current_batch())
            if self.reused and saved is self._loaded:
                self._resources.compare(self._key, saved)
        self._resources.keep(self._key, saved)

    def _reuse(self) -> bool:
        """Take the cached state, and return whether there was one that can be decoded."""
        kept = self._resources.take(self._key)
        if kept is None:
            return False
        self._loaded = kept
        try:
            self._resource = self._resources.resource_of(self._key, kept)
        except Exception:
            return False  # no caller is told before a true load
        return True

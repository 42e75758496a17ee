"""Resources of many keys, loaded from Redis together and saved together.

Keys that operations across keys connect are loaded by one script and saved by one; each other key has its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from geventbatch._batch import current_batch
from geventbatch.errors import PartlySaved, ResourceMissing

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable
    from types import TracebackType

    from geventbatch import Batch
    from geventbatch.stores.redis import RedisStore
    from geventbatch.stores.redis._resources import Resources
    from geventbatch.stores.redis._save import Change

R = TypeVar("R")


class BulkRedis(Generic[R]):
    """The ``open_resources`` of a `Processor`: opens resources of many keys."""

    all_or_nothing: Final = True
    """It saves keys that operations connect together, or none of them."""
    keeps_outcomes = False
    """It takes no operations with idempotency keys."""
    on_server = True

    def __init__(self, store: RedisStore[R], resources: Resources[R]) -> None:
        self._store = store
        self._resources = resources

    def __repr__(self) -> str:
        return f"<in bulk: {self._store!r}>"

    def __call__(self, keys: Iterable[Hashable]) -> BulkScope[R]:
        """Return the scope of the resources at *keys*. Switches: no."""
        return BulkScope(self._resources, [self.normalize_key(key) for key in keys])

    def normalize_key(self, key: Hashable) -> str:
        """Return *key* as `RedisStore.normalize_key` does. Switches: no."""
        return self._store.normalize_key(key)

    def check_keys(self, keys: tuple[str, ...]) -> None:
        """Raise a `ValueError` unless all *keys* lie in one slot, if they are in a cluster. Switches: no."""
        self._resources.check_slot(keys)


class BulkScope(Generic[R]):
    """The scope of one batch for each of many keys: entering loads, exiting saves."""

    deletes = True

    # -- mutable state ---------------------------------------------------------------------------------------
    _loaded: dict[str, Any]  # the hashes as loaded
    _resources: dict[str, Any]

    def __init__(self, resources: Resources[R], keys: list[str]) -> None:
        self._common = resources
        self._keys = keys

    def __enter__(self) -> dict[str, Any]:
        self._loaded, self._resources = {}, {}
        batch = current_batch()
        groups: dict[Batch, list[str]] = {}
        for key in self._keys:
            groups.setdefault(batch.bulk[key], []).append(key)
        for key, found in self._common.load_all(groups.values(), batch).items():
            if isinstance(found, Exception):
                self._resources[key] = found
                continue
            try:
                self._resources[key] = self._common.resource_of(key, found)
            except ResourceMissing:
                continue
            except Exception as error:
                self._resources[key] = error
            else:
                self._loaded[key] = found
        return self._resources

    def checkpoint(self) -> object:
        """Copy the current key's resource. Raises `CannotUndo`. Switches: no."""
        key: Any = current_batch().key
        return self._common.checkpoint(key, self._loaded[key], self._resources[key])

    def restore(self, checkpoint: Any) -> Any:
        """Return the current key's resource as at *checkpoint*, or at the load. Raises `CannotUndo`. Switches: no."""
        key: Any = current_batch().key
        if checkpoint is None:
            resource = self._common.made_again(key, self._loaded[key], self._resources[key])
        else:
            make, copy = checkpoint
            resource = make(copy)
        self._resources[key] = resource
        return resource

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            return
        batch = current_batch()
        failed: dict[str, Exception] = {}
        groups: dict[Batch, list[str]] = {}
        for key in self._resources:
            if key in self._loaded:
                groups.setdefault(batch.bulk[key], []).append(key)
        to_save = []
        for of, keys in groups.items():
            try:
                changes = self._changes(keys, of)
            except Exception as raised:
                failed[keys[0]] = raised
                continue
            if changes:
                to_save.append(changes)
        failed |= self._common.save_all(to_save, batch)
        if failed:
            raise PartlySaved(failed)

    def _changes(self, keys: list[str], batch: Batch) -> list[Change]:
        """Return what a save does to *keys*, which are saved together; nothing if *batch* has changed none of them."""
        changes = []
        news = False
        for key in keys:
            loaded = self._loaded[key]
            value = self._common.value_of(key, loaded, self._resources[key], batch)
            change = self._common.change(key, loaded, value)
            if value == loaded.value:  # an operation has read it: the others depend on it
                change = replace(change, lives=None)
            else:
                news = True
            changes.append(change)
        return changes if news else []

"""Resources of many keys, loaded from Redis together and saved together, each by a script of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from geventbatch._batch import current_batch
from geventbatch.errors import PartlySaved, ResourceMissing

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable
    from types import TracebackType

    from geventbatch.stores.redis import RedisStore
    from geventbatch.stores.redis._resources import Resources

R = TypeVar("R")


class BulkRedis(Generic[R]):
    """The ``open_resources`` of a `Processor`: opens resources of many keys."""

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
        for key, found in self._common.load_all(self._keys, current_batch()).items():
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
        changes = {}
        for key, resource in self._resources.items():
            if key not in self._loaded:
                continue
            loaded = self._loaded[key]
            try:
                value = self._common.value_of(key, loaded, resource, batch.bulk[key])
            except Exception as raised:
                failed[key] = raised
                continue
            if value != loaded.value:
                changes[key] = loaded, value
        failed |= self._common.save_all(changes, batch)
        if failed:
            raise PartlySaved(failed)

"""Resources of many keys, loaded from Redis together and saved together.

Keys that operations across keys connect are loaded by one script and saved by one; each other key has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from geventbatch._batch import batch_at_hand, current_batch
from geventbatch._bulk.connected import by_component
from geventbatch.errors import PartlySaved, Rejected, ResourceMissing
from geventbatch.stores.redis._save import Save

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
    on_server: Final = True

    def __init__(self, store: RedisStore[R], resources: Resources[R]) -> None:
        self._store = store
        self._resources = resources

    def __repr__(self) -> str:
        return f"<in bulk: {self._store!r}>"

    def __call__(self, keys: Iterable[Hashable]) -> BulkScope[R]:
        """Return the scope of the resources at *keys*. Switches: no."""
        normalized = [self.normalize_key(key) for key in keys]
        if self._resources.kept is not None:
            self._resources.kept.drop(normalized)
        return BulkScope(self._resources, normalized)

    @property
    def keeps_outcomes(self) -> bool:
        """Return whether it records the outcomes of operations with an idempotency key."""
        return self._store.keeps_outcomes

    def check_outcomes(self, key: Hashable) -> None:
        """Do what `RedisStore.check_outcomes` does."""
        self._store.check_outcomes(key)

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
        batch: Any = batch_at_hand()
        groups = by_component(self._keys, batch.bulk).values()
        for key, found in self._common.load_all(groups, batch).items():
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

    def recorded(self, names: list[str]) -> dict[str, str]:
        """Return the recorded outcomes of these names. Switches: yes."""
        return self._common.recorded(names, self._keys[0])

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
        batch: Any = batch_at_hand()
        failed: dict[str, Exception] = {}
        saves: dict[str, Save] = {}
        keys = [key for key in self._loaded if key in batch.bulk]
        for component, connected in by_component(keys, batch.bulk).items():
            try:
                changes = self._changes(connected, component)
                if changes:
                    outcomes = self._common.to_record(component, connected[0])
                    saves[connected[0]] = Save(self._common.server, changes, batch, outcomes)
            except Exception as raised:
                failed[connected[0]] = raised
        failed |= self._common.save_all(saves, batch)
        if failed:
            raise PartlySaved(failed)

    def _changes(self, keys: list[str], batch: Batch) -> list[Change]:
        """Return what a save does to *keys*, which belong to *batch*; nothing if there is nothing to save."""
        try:
            values = {key: self._value(key, batch) for key in keys}
        except Rejected:
            self._common.refuse_repeated(batch, keys[0])
            raise
        written = {key for key, value in values.items() if value != self._loaded[key].value}
        if not written and batch.outcomes:
            written = {keys[0]}  # its token shows whether they are recorded
        changes = [self._common.change(key, self._loaded[key], values[key]) for key in keys] if written else []
        # What operations have only read, or refused, is compared: the others depend on it.
        return [change if change.key in written else change._replace(lives=None) for change in changes]

    def _value(self, key: str, batch: Batch) -> bytes | None:
        loaded = self._loaded[key]
        if key not in self._resources:  # nothing has changed it
            value: bytes | None = loaded.value
            return value
        return self._common.value_of(key, loaded, self._resources[key], batch)

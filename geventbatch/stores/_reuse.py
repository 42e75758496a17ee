"""The option ``reuse_resource``: cached states, so that the next batch of a key needs no load. Imports no vendor.

No answer depends on the cache: the store compares the version before any caller is answered.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from geventbatch._batch import batch_at_hand
from geventbatch._check_values import check_seconds, count
from geventbatch._core.clock import clock
from geventbatch._core.process import here
from geventbatch._safe_repr import said, shown
from geventbatch.errors import Conflict, NotSaved, Repeated
from geventbatch.stores._conflict import changed

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """Cache what a store has saved last, so that the next batch of the key needs no load.

    The encoded state is cached with its version, and each batch decodes it anew. No answer depends on the cache: a save
    compares the version as always, and a batch that has nothing to save reads the version. If another process has
    written meanwhile, the batch loads and replays, which takes an attempt.

    Args:
        max_keys: The number of cached keys, the last ones saved. Mind the memory that their states take.
        max_age: Seconds after which a cached state is loaded again at the latest.

    Raises:
        TypeError: An argument is no number.
        ValueError: An argument is out of range.
    Switches: no.
    """

    max_keys: int = 1000
    max_age: float = 60.0

    def __post_init__(self) -> None:
        """Check both."""
        count("max_keys", self.max_keys)
        check_seconds("max_age", self.max_age, positive=True)


class Kept(Generic[T]):
    """Cached states by key. Nothing here switches greenlets; threads may use it too.

    A batch removes the entry that it uses, and puts one back only if it ends well. After any failure, the next batch
    loads.
    """

    def __init__(self, reuse: Reuse) -> None:
        """Begin empty."""
        self._most: Final = reuse.max_keys
        self._longest: Final = reuse.max_age
        # -- mutable state ---------------------------------------------------------------------------------
        self._epoch = here.epoch
        self._entries: OrderedDict[Hashable, tuple[float, T]] = OrderedDict()  # with monotonic expiry; oldest first

    def take(self, key: Hashable) -> T | None:
        """Remove and return the entry of *key*, in the first attempt of a batch only: a replay loads."""
        if self._epoch != here.epoch:  # inherited from the parent of a fork
            self.clear()
        until, entry = self._entries.pop(key, (0.0, None))
        return entry if clock.monotonic() < until and batch_at_hand().attempts == 1 else None

    def put(self, key: Hashable, entry: T) -> None:
        """Cache *entry*, as the newest."""
        entries = self._entries
        entries.pop(key, None)
        entries[key] = clock.monotonic() + self._longest, entry
        if len(entries) > self._most:
            with suppress(KeyError):  # another thread has emptied it
                entries.popitem(last=False)

    def drop(self, keys: Iterable[Hashable]) -> None:
        """Drop the entries of *keys*, which are loaded and saved in a bulk: the next batch of one of them loads."""
        for key in keys:
            self._entries.pop(key, None)

    def clear(self) -> None:
        """Drop all entries."""
        self._epoch = here.epoch
        self._entries.clear()

    def __len__(self) -> int:
        """Return the number of cached keys."""
        return len(self._entries)


def outdated(key: Hashable) -> Conflict:
    """Return the `Conflict` of a cached resource that is not what the database has."""
    return changed(key, since="this process saved it")


@contextmanager
def as_conflicts(key: Hashable) -> Iterator[None]:
    """Turn a `NotSaved` into a `Conflict`, but for a `Repeated`, while a cached resource is saved.

    So the batch is replayed from a real load before any caller is answered.
    """
    try:
        yield
    except (Conflict, Repeated):
        raise
    except NotSaved as error:
        raise Conflict(f"{shown(key)} was not saved, and is loaded now: {said(error)}") from error


def kept_by(reuse: object, mode: str = "version") -> Kept[Any] | None:
    """Check the option ``reuse_resource`` of a store in that mode, and return its cache; None if it has none."""
    if reuse is None:
        return None
    if not isinstance(reuse, Reuse):
        raise TypeError(
            f"reuse_resource is {shown(reuse)}, but must be a geventbatch.stores.Reuse, as Reuse(), or None"
        )
    if mode != "version":
        raise ValueError(
            f"reuse_resource is {shown(reuse)}, but mode {shown(mode)} locks in the load, which a cached state skips: "
            "pass mode='version', or leave reuse_resource out"
        )
    return Kept(reuse)

"""A lane: the live batches of one key, of which only the first may run (guarantee 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geventbatch import _clock
from geventbatch._batch import Batch

if TYPE_CHECKING:
    from collections.abc import Hashable

    from geventbatch._failure import Failure
    from geventbatch._shard import Shard
    from geventbatch._state import State


class Lane:
    """One key that has live batches. No method switches greenlets."""

    __slots__ = ("batches", "hashed", "key", "retired", "shard", "state")

    def __init__(self, state: State, key: Hashable, hashed: int, shard: Shard) -> None:
        """Start without a batch."""
        self.state = state
        self.key = key
        self.hashed = hashed
        self.shard = shard
        # -- mutable state ---------------------------------------------------------------------------------
        self.batches: list[Batch] = []  # in the order they opened: the first runs or is queued, the last may be open
        self.retired = False  # no longer among the processor's lanes

    def open_batch(self) -> Batch:
        """Give the batch that takes the next operation of the key, a new one if need be."""
        batches = self.batches
        if batches:
            batch = batches[-1]
            if batch.open:
                if not batch.loaded or _clock.monotonic() < batch.window_end:
                    return batch
                batch.close()
        window = self.state.options.min_duration
        batch = Batch(self.state, self.key, self, _clock.monotonic() + window if window else 0.0)
        batches.append(batch)
        self.state.live += 1
        if len(batches) == 1:
            self.shard.put(batch)
        return batch

    def fail_behind(self, batch: Batch, failure: Failure) -> None:
        """Answer the callers of all batches behind *batch* with *failure*, and forget them."""
        behind = self.batches[1:]
        if not behind or self.batches[0] is not batch:
            return
        del self.batches[1:]
        self.state.live -= len(behind)
        for other in behind:
            other.end(failure)

    def finish(self) -> None:
        """The code of the first batch has returned: the key is free for the next one."""
        batches = self.batches
        del batches[0]
        self.state.live -= 1
        if batches:
            self.shard.put(batches[0])
        else:
            self.state.retire(self)
        if self.state.stopping:
            self.state.check_stopped()

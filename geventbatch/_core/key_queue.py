"""A key queue: the live batches of one key, of which only the first may run (guarantee 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from geventbatch._core.batch import Batch
from geventbatch._core.clock import clock as _clock

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from geventbatch._core.shard import Shard


class KeyQueue:
    """One key that has live batches. No method switches greenlets."""

    __slots__ = ("beside", "first", "hashed", "key", "last", "retired", "shard")

    def __init__(self, key: Hashable, hashed: object, shard: Shard, beside: KeyQueue | None) -> None:
        """Start without a batch; *beside* is the next key queue whose key has the same hash."""
        self.key = key
        self.hashed = hashed
        self.shard = shard
        # -- mutable state ---------------------------------------------------------------------------------
        self.beside = beside
        self.first: Batch | None = None  # runs or is queued; `behind` links the others in the order they opened
        self.last: Batch | None = None  # the only one that may be open
        self.retired = False  # no longer among the dispatcher's key queues

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the live batches in the order they opened."""
        batch = self.first
        while batch is not None:
            yield batch
            batch = batch.behind

    def open_batch(self) -> Batch:
        """Return the batch that takes the next operation of the key, a new one if need be."""
        last = self.last
        if last is not None and last.open:
            if not last.loaded or _clock.monotonic() < last.window_end:
                return last
            last.close()
        dispatcher = self.shard.dispatcher
        window = dispatcher.options.min_duration
        now = _clock.monotonic()
        batch = Batch(dispatcher, self.key, now, self, now + window if window else 0.0)
        if now >= dispatcher.counts.next_sample:
            dispatcher.counts.sample(now)
        dispatcher.live += 1
        self.last = batch
        if last is None:
            self.first = batch
            self.shard.put(batch)
        else:
            last.behind = batch
        return batch

    def append(self, place: Batch) -> None:
        """Let *place*, a crossing's, wait behind what is there, which takes no more operations."""
        self.shard.dispatcher.live += 1
        self.shard.dispatcher.places += 1
        last, self.last = self.last, place
        if last is None:
            self.first = place
        else:
            last.behind = place
            last.close()

    def cut_behind(self) -> list[Batch]:
        """Forget what waits behind the batches that a worker has taken, and return it; crossings leave all queues."""
        last = self.first
        while last is not None and last.behind is not None and last.behind.taken:
            last = last.behind
        behind, one = [], last and last.behind
        while one is not None:
            behind.append(one)
            one = one.behind
        if last is not None:
            last.behind = None
        self.last = last
        self.shard.dispatcher.live -= len(behind)
        return [found for one in behind if (found := one.cut_off()) is not None]

    def finish(self) -> None:
        """Free the key for the next batch: the code of the first one has returned."""
        dispatcher = self.shard.dispatcher
        batch = self.first and self.first.behind
        dispatcher.live -= 1
        while batch is not None and batch.key_queue is None:  # the place of a crossing that was given up
            dispatcher.live -= 1
            dispatcher.places -= 1
            batch = batch.behind
        self.first = batch
        if batch is None:
            self.last = None
            dispatcher.retire(self)
        else:
            batch.come_first(self)
        if dispatcher.stopping:
            dispatcher.check_stopped()

    def drop(self, batch: Batch) -> None:
        """Take out *batch*, whose code has returned, though another one that was taken with it may be before it."""
        if batch is self.first:
            self.finish()
            return
        before = self.first
        while before is not None and before.behind is not batch:
            before = before.behind
        if before is not None:
            before.behind = batch.behind
            if self.last is batch:
                self.last = before
            self.shard.dispatcher.live -= 1

"""Which batches and crossings a worker takes together, while operations across keys wait.

It takes what is ready. Then it goes on behind that, in the order in which it came: it takes whatever has nothing before
it, at any of its keys, but what is taken already. So a key that is in all operations makes one bulk of all that wait,
up to ``max_bulk`` keys. What is left waits for this bulk. So the order of each key holds; and the oldest that waits,
waits for running ones only: nothing can deadlock or starve.

Over a store that opens one key at a time, operations across keys have a shard for themselves (see `Dispatcher`). A
batch of a single key that is ready runs by itself, in the store's form for one key. One that stands behind an operation
across keys is taken with that, if the store's form for many keys can do for it all that its own can.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from geventbatch._bulk.crossing import Crossing, Place

if TYPE_CHECKING:
    from geventbatch._core.batch import Batch
    from geventbatch._core.key_queue import KeyQueue
    from geventbatch._core.shard import Shard
    from geventbatch._options import Options


def take(shard: Shard, batches: dict[Batch, None]) -> bool:
    """Move batches and crossings into *batches*. Return False if the worker is to end. Switches: no."""
    queue, taking, ends = shard.queue, Taking(shard, batches), 0
    front: Batch | None = None  # the next one of the shard's queue, which is still there
    ready = True  # it may be taken
    while True:
        if ready and front is None and len(queue):
            front = queue.peek(block=False)
            if front is None:
                ends += 1  # a worker is to end: not before this bulk has run
                queue.get(block=False)
                continue
        if ready and front is not None and not taking.is_older_than(front):
            if taking.has_room_for(front):
                queue.get(block=False)
                taking.add(front)
                front = None
            else:
                ready = False
        elif not taking.go_on():
            break
    for _ in range(ends if batches else ends - 1):
        queue.put(None)
    return bool(batches) or not ends


class Taking:
    """What one worker takes at one time."""

    def __init__(self, shard: Shard, batches: dict[Batch, None]) -> None:
        """Take into *batches*."""
        self._batches = batches
        options = shard.dispatcher.options
        self._most_keys: int = options.max_bulk
        self._most_operations = shard.dispatcher.max_batch_size
        self._takes_single_keys = options.open_resources is not None or _is_as_able(options)
        # -- mutable state ---------------------------------------------------------------------------------
        self._operations: dict[KeyQueue, int] = {}  # taken, for each key of the bulk
        self._behind: list[tuple[float, int, Batch]] = []  # a heap: may be taken, since all before it is
        self._blocked: dict[Crossing, int] = {}  # keys at which something is before it that is not taken
        self._count = 0

    def is_older_than(self, ready: Batch) -> bool:
        """Return whether something behind what was taken came before *ready*, or at the same time."""
        return bool(self._behind) and self._behind[0][0] <= ready.opened

    def has_room_for(self, batch: Batch) -> bool:
        """Return whether *batch* may be taken too."""
        taken, most = self._operations, self._most_operations
        keys = len(taken)
        for node in batch.nodes:
            if node.key_queue not in taken:
                keys += 1
            elif most is not None and taken[node.key_queue] + batch.size > most:
                return False
        return keys <= self._most_keys and (most is None or batch.size <= most)

    def go_on(self) -> bool:
        """Take the oldest one that is behind what was taken, if there is room. Return False if there is none."""
        if not self._behind:
            return False
        batch = heappop(self._behind)[2]
        if self.has_room_for(batch):
            self.add(batch)
        return True

    def add(self, batch: Batch) -> None:
        """Take *batch*, and look behind it."""
        self._batches[batch] = None
        operations, size = self._operations, batch.size
        for node in batch.nodes:
            key_queue: Any = node.key_queue
            operations[key_queue] = operations.get(key_queue, 0) + size
            behind = node.behind
            if behind is None:
                continue
            if behind.key_queue is None:
                behind = _behind(key_queue, node)
            if type(behind) is Place:
                crossing = behind.crossing
                assert crossing is not None  # noqa: S101 - for type checkers
                left = self._blocked[crossing] = self._blocked.get(crossing, crossing.blocked) - 1
                if not left:
                    self._push(crossing)
            elif behind is not None and type(node) is Place and self._takes_single_keys:
                self._push(behind)  # a batch behind a batch is another one for a reason

    def _push(self, batch: Batch) -> None:
        self._count += 1
        heappush(self._behind, (batch.opened, self._count, batch))


def _is_as_able(options: Options) -> bool:
    """Return whether the form for many keys does for an operation of a single key all that its own form does."""
    return bool(options.across.keeps_outcomes or not options.store.keeps_outcomes)


def _behind(key_queue: KeyQueue, node: Batch) -> Batch | None:
    """Return what waits behind *node*, and forget places between that nobody waits at any more."""
    behind = node.behind
    while behind is not None and behind.key_queue is None:
        key_queue.shard.dispatcher.live -= 1
        key_queue.shard.dispatcher.places -= 1
        node.behind = behind.behind
        if key_queue.last is behind:
            key_queue.last = node
        behind = node.behind
    return behind

"""A crossing: an operation across keys, while it waits in the queues of all its keys.

In each of them a place stands for it. No operation joins a place: one that comes behind it opens a new batch. A
crossing is ready when each of its places is the first of its queue. Then it stands in the shard of the key that became
free last. A worker may also take it earlier, with all that is before it (see `taking`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, final

from geventbatch._core.batch import Batch
from geventbatch._safe_repr import shown
from geventbatch.errors import ResourceMissing, named, not_started

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from geventbatch._core.dispatcher import Dispatcher
    from geventbatch._core.key_queue import KeyQueue
    from geventbatch._core.operation import Operation
    from geventbatch._failure import Failure
    from geventbatch._options import Options
    from geventbatch.errors import OperationCancelled


_NO_OPERATIONS: Final[list[Operation[Any]]] = []


def of_keys(failure: Failure, batch: Batch) -> Failure:
    """Return *failure* as it is told to the callers of *batch*: of its own keys, with one that has failed as `key`."""
    keys = batch.loads
    named = failure.cause.key if isinstance(failure.cause, ResourceMissing) else failure.key
    key = next((key for key in (named, failure.key, *failure.keys) if key in keys), batch.key)
    return replace(failure, key=key, keys=keys)


def none_deleted(batch: Batch) -> bool:
    """Return False, or raise if *batch* deletes some of its keys: a scope that asks so would delete all of them."""
    if batch.deleted_keys:
        raise RuntimeError(
            f"deleted: the batch of the {named(batch.loads)} deletes the {named(batch.deleted_keys)}: let the scope "
            "ask for each key whether it is in current_batch().bulk[key].deleted_keys"
        )
    return False


@final
class Place(Batch):
    """Stands for a crossing in the queue of one of its keys."""

    __slots__ = ("crossing",)

    # -- mutable state -------------------------------------------------------------------------------------
    crossing: Crossing | None  # None, as its key queue, when the crossing is not waiting any more

    def __init__(self, crossing: Crossing, key_queue: KeyQueue) -> None:
        """Stand for *crossing* in *key_queue*; the caller puts it there."""
        # Each key of each operation pays for this: a batch's own would make it a list. All that it sets is set here,
        # since compiled code, where it is not sure of that for each batch, checks at each read.
        self.crossing = crossing
        self.dispatcher = crossing.dispatcher
        self.key = key_queue.key
        self.key_queue = key_queue
        self.opened = crossing.opened
        self.window_end = 0.0
        self.operations = _NO_OPERATIONS
        self.attempt = self.behind = self.failure = self.bell = None
        self.open = self.ended = self.loaded = False
        self.waiting = self.size = self.reads = self.attempts = 0

    @property
    def taken(self) -> bool:
        """True if a worker has taken the crossing."""
        return self.crossing is not None and self.crossing.taken

    def come_first(self, key_queue: KeyQueue) -> None:
        """Count one key less that the crossing waits for."""
        if self.crossing is not None:
            self.crossing.come_first(key_queue)

    def cut_off(self) -> Batch | None:
        """Take the crossing out of its other queues, and return it; None if it was there no more."""
        self.dispatcher.places -= 1
        crossing, self.crossing, self.key_queue = self.crossing, None, None
        if crossing is not None:
            crossing.leave()
        return crossing

    def whole(self) -> Batch:
        """Return the crossing."""
        return self if self.crossing is None else self.crossing

    def listed(self) -> Batch | None:
        """Return the crossing at its first place, so that it is shown once."""
        crossing = self.crossing
        return crossing if crossing is not None and crossing.places[0] is self else None


@final
class Crossing(Batch):
    """A batch of one operation, across keys."""

    __slots__ = ("blocked", "named", "places")

    # -- mutable state -------------------------------------------------------------------------------------
    places: list[Place]  # in the order of its keys; empty when it has left the queues
    blocked: int  # places that are not the first of their queue

    def __init__(
        self, dispatcher: Dispatcher, named: tuple[Hashable, ...], opened: float, key_queues: list[KeyQueue]
    ) -> None:
        """Be of the keys that its operation has *named*; without *key_queues* it is unbatched."""
        super().__init__(dispatcher, named[0], opened, key_queues[0] if key_queues else None)
        self.named = named
        self.places = [Place(self, key_queue) for key_queue in key_queues]
        self.blocked = 0

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """Its keys, in the order in which its operation has named them."""
        return self.named

    @property
    def loads(self) -> tuple[Hashable, ...]:
        """Its keys."""
        return self.named

    @property
    def deleted(self) -> bool:
        """Return False, or raise: see `none_deleted`."""
        return none_deleted(self)

    def opener(self, options: Options) -> Any:
        """Return what opens the scope of all its keys, for an unbatched operation."""
        from geventbatch._bulk.scopes import OneOfBulk

        many: Any = options.open_across
        return partial(OneOfBulk, many)

    @property
    def nodes(self) -> Sequence[Batch]:
        """Its places."""
        return self.places

    def count_keys(self, started: int) -> Iterable[tuple[Hashable, int]]:
        """Return its keys, and how many operations each has had of those that were *started*."""
        return [(key, started) for key in self.named]

    def enter(self, operation: Operation[Any]) -> None:
        """Wait in all queues, with *operation*, which has a group for its caller to wait for."""
        self.operations = [operation]
        self.waiting = self.size = 1
        self.reads = int(operation.read_only)
        self.shut(self.opened)
        self.dispatcher.crossings += 1
        for place in self.places:
            key_queue: Any = place.key_queue
            key_queue.append(place)
            if key_queue.first is not place:
                self.blocked += 1

    def come_first(self, key_queue: KeyQueue) -> None:
        """Count one key less to wait for; after the last one, wait for a worker."""
        self.blocked -= 1
        if not self.blocked and not self.taken:
            self.dispatcher.put_across(self, key_queue)

    def end(self, failure: Failure | None = None) -> None:
        """Fix its outcome, with the failure of all its keys."""
        super().end(None if failure is None else of_keys(failure, self))

    def not_started(self, seconds: float) -> OperationCancelled:
        """Return an error that names the first of its keys at which something is before it, or else a worker."""
        behind = [one.key for one in self.places if one.key_queue is not None and one.key_queue.first is not one]
        what = f"the key {shown(behind[0])}, which other operations hold" if behind else "a worker"
        return not_started(self.named, seconds, f", since it waited for {what}", behind[0] if behind else None)

    def withdraw(self, operation: Operation[Any]) -> None:
        """Leave the queues with its caller, so that it holds up nobody. If it is ready, a worker drops it."""
        super().withdraw(operation)
        if not self.waiting and self.blocked and self.places and not self.taken:
            self.ended = True
            self.leave()

    def leave(self) -> None:
        """Wait in no queue any more. A place that is not the first is passed over when it would become that."""
        self.dispatcher.crossings -= 1
        places, self.places = self.places, []
        for place in places:
            key_queue, place.key_queue, place.crossing = place.key_queue, None, None
            if key_queue is not None and key_queue.first is place:
                self.dispatcher.places -= 1
                key_queue.finish()

    def free(self) -> None:
        """Free all its keys: it has ended, and its code has returned."""
        self.let_go()
        self.dispatcher.crossings -= 1
        places, self.places = self.places, []
        for place in places:
            if place.key_queue is not None:
                self.dispatcher.places -= 1
                place.key_queue.drop(place)
            place.crossing = None

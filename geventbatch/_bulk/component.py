"""A component: the batches of a bulk that operations across keys connect. It is saved as one, or not at all.

It is a batch itself. Its operations are those of its members, in an order that keeps the order of each key. They are
applied to a composite: the resources by key, of which each operation gets its own. So an attempt applies, undoes,
replays and halves a component like any batch. Callers wait for their members, which a component ends with itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

from geventbatch._bulk.composite import At, Composite
from geventbatch._bulk.crossing import Crossing, none_deleted, of_keys
from geventbatch._core.batch import Batch
from geventbatch._core.clock import clock as _clock
from geventbatch._core.hub_turns import WIDTH, pace
from geventbatch._core.operation import BROKEN, SETTLED, STARTED, WAS_STARTED, WITHDRAWN
from geventbatch._watch import log
from geventbatch._watch.summary import tell

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, MutableMapping

    from geventbatch._core.attempt import Attempt
    from geventbatch._core.key_queue import KeyQueue
    from geventbatch._core.operation import Operation
    from geventbatch._failure import Failure


def components_of(batches: dict[Batch, None]) -> list[Batch]:
    """Return *batches*, but those that share a key with a crossing as the components that they form."""
    groups: dict[KeyQueue | None, list[Batch]] = {}  # connected key queues have the very same list
    every: list[list[Batch]] = []  # also those that were emptied into another one
    for batch in batches:
        nodes = batch.nodes
        group: list[Batch] | None = None
        for node in nodes:
            other = groups.get(node.key_queue)
            if other is not None and other is not group:
                group = other if group is None else _merged(groups, group, other)
        if group is None:
            group = [batch]
            every.append(group)
        else:
            group.append(batch)
        for node in nodes:
            groups[node.key_queue] = group
    return [
        group[0] if len(group) == 1 and type(group[0]) is not Crossing else Component(group, batches)
        for group in every
        if group
    ]


def _merged(groups: dict[KeyQueue | None, list[Batch]], group: list[Batch], other: list[Batch]) -> list[Batch]:
    """Empty the shorter one into the longer one, and return that."""
    if len(other) > len(group):
        group, other = other, group
    for batch in other:
        for node in batch.nodes:
            groups[node.key_queue] = group
    group += other
    other.clear()
    return group


def _key_queues(batch: Batch) -> list[KeyQueue]:
    if type(batch) is Crossing:
        return [place.key_queue for place in batch.places if place.key_queue is not None]
    return [] if batch.key_queue is None else [batch.key_queue]


def members_of(batch: Batch) -> Iterable[Batch]:
    """Return the batches that callers wait for: the members of a component, or *batch* itself."""
    return batch.members if type(batch) is Component else (batch,)


@final
class Component(Batch):
    """The batches and crossings that share keys with one another."""

    __slots__ = ("_batches", "_keys", "complete", "composite", "gathered", "members", "named")

    # -- mutable state -------------------------------------------------------------------------------------
    members: list[Batch]  # in an order that keeps the order of each key
    complete: bool  # it is gathered, and has all operations of all its members
    gathered: bool  # its operations are those of its members: nothing joins any more
    named: tuple[Hashable, ...]  # the keys of the operation at hand; outside of operations, all
    composite: Composite | None  # of the attempt at hand

    def __init__(self, members: list[Batch], batches: dict[Batch, None]) -> None:
        """Be of *members*, which a worker has taken together with others, all of which are *batches*."""
        first = members[0]
        opened, keys = first.opened, first.loads
        if len(members) > 1:
            opened = min([one.opened for one in members])
            keys = tuple({key: None for member in members for key in member.loads})
        super().__init__(first.dispatcher, first.key, opened, first.key_queue)
        self.members = members
        self.gathered = self.complete = False
        self.composite = None
        self._batches = batches
        self.named = self._keys = keys
        if self.dispatcher.max_batch_size is not None:
            for member in members:
                member.close()

    def __repr__(self) -> str:
        """Sum up its state on one line."""
        return super().__repr__().replace("<Batch ", f"<Component of {len(self.members)} batches, ", 1)

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """The keys of the operation at hand; outside of operations, all."""
        return self.named

    @property
    def loads(self) -> tuple[Hashable, ...]:
        """Its keys."""
        return self._keys

    @property
    def deleted(self) -> bool:
        """Return False, or raise: see `none_deleted`."""
        return none_deleted(self)

    # -- from the start to the operations -----------------------------------------------------------------

    def start(self, attempt: Attempt) -> None:
        """Let its members share *attempt*."""
        for member in self.members:
            member.attempt = attempt

    def takes(self, key_queues: list[KeyQueue]) -> bool:
        """Return whether an operation at *key_queues* may join: it loads these, and has no bound on its operations."""
        attempt = self.attempt
        if self.gathered or self.ended or attempt is None or attempt.phase != "load":
            return False
        if self.dispatcher.max_batch_size is not None:
            return False
        # In a replay it is without the keys whose load has failed before.
        return self.attempts < 2 or all(key_queue.key in self._keys for key_queue in key_queues)  # noqa: PLR2004

    def take_in(self, crossing: Crossing) -> None:
        """Let *crossing*, all of whose keys are its own, join behind all that it has."""
        crossing.attempt = self.attempt
        self.members.append(crossing)
        self._batches[crossing] = None

    def gather(self) -> None:
        """Take the operations of its members over, of which none takes any more."""
        if not self.gathered:
            now = _clock.monotonic()
            self.gathered = self.complete = True
            for member in self.members:
                if member.ended:
                    self.complete = False
                else:
                    self._gather_from(member, now)
            if self.open:
                self.shut(now)

    def _gather_from(self, member: Batch, now: float) -> None:
        if member.open:
            member.shut(now)
        member.loaded = True
        self.waiting += member.waiting
        self.reads += member.reads
        keys, several = member.loads, type(member) is Crossing
        for operation in member.operations:
            operation.callable = At(keys, operation.callable, several=several)
        if self.operations:
            self.operations += member.operations
        else:  # most have one member alone, which can have no more operations: they may share a list
            self.operations = member.operations if len(self.members) == 1 else [*member.operations]

    def compose(self, resources: MutableMapping[Any, Any]) -> Composite:
        """Return what its operations are applied to: its part of *resources*."""
        self.composite = Composite(self, resources)
        return self.composite

    def rest(self) -> None:
        """Be of all its keys again: no operation is at hand."""
        self.key, self.named = self.members[0].key, self._keys

    def applied(self, operations: list[Any]) -> set[Hashable]:
        """Return the keys at which some of *operations* were applied, whatever came of them."""
        return _keys_of(one for one in operations if one.state in {STARTED, BROKEN})

    def changes_all(self, attempt: Attempt) -> bool:
        """Return whether operations that may change something have returned at each of its keys."""
        return self.complete and not self.reads and not attempt.parts and attempt.completed == len(self.operations)

    def changed(self, operations: list[Any]) -> set[Hashable]:
        """Return the keys of those *operations* that have returned, and are not read-only or have added rows."""
        returned = [one for one in operations if one.state == STARTED and one.error is None]
        changed = _keys_of(one for one in returned if not one.read_only).union(self.deleted_keys)
        return changed or (_keys_of(returned) if self.rows else set())

    def count_keys(self, started: int) -> Iterable[tuple[Hashable, int]]:  # noqa: ARG002 - it has counts of its own
        """Return its keys, and how many operations each has had. It runs no function of the user's."""
        counts = {id(key): (key, 0) for key in self.loads}
        for operation in self.operations:
            found: Any = operation.callable
            for key in found.keys if type(found) is At and operation.state in WAS_STARTED else ():
                counts[id(key)] = key, counts.get(id(key), (key, 0))[1] + 1
        return counts.values()

    # -- the outcome --------------------------------------------------------------------------------------

    def end(self, failure: Failure | None = None) -> None:
        """Fix the outcome of every member, and begin to wake the callers. The first call counts."""
        if self.ended:
            return
        self.ended = True
        attempt = self.attempt
        if failure is not None:
            failure = self._of_all(failure if attempt is None else failure.in_parts(attempt.parts))
        self.failure = failure
        waiting = 0
        for member in self.members:
            waiting += _release(member, failure)
        self.gather()
        if not self.operations:
            self.operations = [one for member in self.members for one in member.operations]
        if self.composite is not None:
            self.composite.let_go()
            self.composite = None
        dispatcher = self.dispatcher
        if failure is not None:
            log.failed(dispatcher.options.name, failure, waiting)
        counts = dispatcher.counts
        if attempt is not None:
            attempt.must_look = True
            if self.attempts:
                counts.batches += 1
                counts.failed_batches += failure is not None
                if dispatcher.subscriptions or attempt.undo is not None:
                    tell(attempt, waiting)
        counts.answered += waiting

    def fail_load(self, failure: Failure) -> None:
        """Answer all callers that wait for any of its keys (guarantee 3)."""
        if not self.ended:
            loaded = {id(key) for key in self.loads}  # without a key whose own load has failed before
            every = [one for member in self.members for one in _key_queues(member)]
            key_queues = dict.fromkeys(one for one in every if id(one.key) in loaded)
            _end_behind(key_queues, self._of_all(failure))
            self.end(failure)

    def _of_all(self, failure: Failure) -> Failure:
        return failure if failure.keys or len(self._keys) == 1 else replace(failure, keys=self.loads)

    def drop(self, failures: dict[Hashable, Failure]) -> None:
        """Answer all callers that wait for a key whose load alone has failed, by its failure. The others go on."""
        failures = {key: replace(failure, keys=(key,)) for key, failure in failures.items()}
        self._keys = tuple([one for one in self._keys if one not in failures])
        places = {key: place for place, key in enumerate(failures)}
        needing: dict[Hashable, list[Batch]] = {key: [] for key in failures}
        key_queues: dict[Hashable, dict[KeyQueue, None]] = {key: {} for key in failures}
        goes_on = False
        for member in self.members:  # once, whatever the number of keys
            for key_queue in _key_queues(member):
                if key_queue.key in failures:
                    key_queues[key_queue.key][key_queue] = None
            if not member.ended:
                failed = [key for key in member.loads if key in failures]
                goes_on = goes_on or not failed
                if failed:
                    needing[min(failed, key=places.__getitem__)].append(member)
        last: Any = None if goes_on else next((key for key in reversed(failures) if needing[key]), next(iter(failures)))
        if self.gathered:  # it is replayed
            out = [one for key, members in needing.items() if goes_on or key != last for one in members]
            self._take_out({one for member in out for one in member.operations if one.state != SETTLED})
        for key, failure in failures.items():
            _end_behind(key_queues[key], failure)
            if not goes_on and key == last:
                self.end(failure)
            elif not self.ended:
                waiting = sum(_release(member, failure) for member in needing[key])
                log.failed(self.dispatcher.options.name, failure, waiting)
                self.dispatcher.counts.answered += waiting

    def _take_out(self, operations: set[Operation[Any]]) -> None:
        """Apply *operations* no more, which are about to be answered."""
        self.complete = False  # some of its keys may have none any more
        for operation in operations:
            operation.state = WITHDRAWN
        self.operations = [one for one in self.operations if one not in operations]
        attempt = self.attempt
        if attempt is not None:
            if attempt.parts:
                attempt.parts = [[one for one in part if one not in operations] for part in attempt.parts]
            if attempt.asked:
                attempt.asked = [one for one in attempt.asked if one not in operations]
            if attempt.undo is not None:
                attempt.undo.out = [one for one in attempt.undo.out if one not in operations]


def _keys_of(operations: Iterable[Any]) -> set[Hashable]:
    return {key for one in operations if type(one.callable) is At for key in one.callable.keys}


def _release(member: Batch, failure: Failure | None) -> int:
    """Fix the outcome of *member*, and begin to wake its callers. Return their number."""
    if member.ended:
        return 0
    member.ended = True
    member.failure = None if failure is None else of_keys(failure, member)
    if member.open:
        member.close()
    waiting, member.waiting = member.waiting, 0
    member.dispatcher.pending -= waiting
    operations = member.operations
    for first in range(0, len(operations), WIDTH):
        pace.add(operations[first].group, min(WIDTH, len(operations) - first))
    return waiting


def _end_behind(key_queues: Iterable[KeyQueue], failure: Failure) -> None:
    """Answer with *failure* what waits in *key_queues*. All is cut off before the first one ends: see `Batch`."""
    for batch in [one for key_queue in key_queues for one in key_queue.cut_behind()]:
        batch.end(of_keys(failure, batch))

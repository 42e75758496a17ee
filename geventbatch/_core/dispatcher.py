"""The dispatcher: one process's half of a processor, which admits, finds the key queue, and stops (8, 12, 15)."""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

from gevent.event import Event

from geventbatch._check_values import refuse_key
from geventbatch._core import process
from geventbatch._core.counts import Counts
from geventbatch._core.fair_semaphore import FairSemaphore
from geventbatch._core.hub_turns import WIDTH, pace
from geventbatch._core.key_queue import KeyQueue
from geventbatch._core.moments import Moments
from geventbatch._core.pair import Pair
from geventbatch._core.process import here
from geventbatch._core.shard import Shard
from geventbatch._safe_repr import shown
from geventbatch._watch import log
from geventbatch._watch.call_unwaited import call_aside
from geventbatch.errors import ProcessorOverloaded, ProcessorStopped, of_keys

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator
    from contextvars import Context
    from typing import NoReturn
    from weakref import ref

    from geventbatch._core.batch import Batch
    from geventbatch._core.operation import Operation
    from geventbatch._options import Options
    from geventbatch._watch.metrics import BatchMetric, Watcher


_ACROSS: Final = -1
"""Stands for a worker number: that of the shard of operations across keys."""


class Dispatcher:
    """The key queues, shards and counts of a processor in this process. A fork begins a fresh one (guarantee 12)."""

    def __init__(self, options: Options, subscriptions: list[ref[Watcher]], *, stopping: bool = False) -> None:
        """Start with nothing live: no greenlet, no timer."""
        self.options = options
        self.epoch = here.epoch
        self.slots = None if options.max_batches is None else FairSemaphore(options.max_batches)
        self.subscriptions = subscriptions
        self.counts = Counts()
        # Copies of the options that every operation reads: compiled code reads an attribute of its own without a
        # look-up. Set here, not by calling `use`: else mypyc checks at each read that it is set (1 % of an operation).
        self.door = options.door
        self.pair = options.open_resource if isinstance(options.open_resource, Pair) else None
        self.max_pending = options.max_pending
        self.max_batch_size = options.max_batch_size
        self.blocking = inf if options.max_blocking_time is None else options.max_blocking_time
        self.slow = options.max_duration / 2  # seconds; a longer load or save is logged
        self.long = min(self.blocking, self.slow)
        # -- mutable state ---------------------------------------------------------------------------------
        self.key_queues: dict[object, KeyQueue] = {}  # by hash of the key: the front one; only keys with live batches
        self.shards: dict[int, Shard] = {}  # by worker number, made when first needed
        self.deadlines = Moments(priority=-1)
        self.windows = Moments()
        self.pending = 0  # operations on key queues: being admitted, or admitted, not answered, not withdrawn
        self.live = 0  # batches on key queues whose code has not returned yet; a crossing counts at each of its keys
        self.places = 0  # of these, the places of crossings, also of those that have left
        self.crossings = 0  # operations across keys that were admitted and have no outcome yet
        self.alone: set[Batch] = set()  # unbatched: run by their callers; other threads add to it, in one step
        self.stopping = stopping
        self.ended = False  # nothing runs any more
        self.told_of_own = False  # the warning was given that an operation returned an object of its batch
        self.stopped = Event()  # nothing runs any more, and every caller has been woken

    def __repr__(self) -> str:
        """Sum up the state, for the processor's own summary."""
        workers = sum(shard.workers for shard in self.shards.values())
        state = "stopped" if self.stopped.is_set() else "stopping" if self.stopping else "running"
        return (
            f"{state}, {sum(1 for _ in self._all_key_queues())} keys, {self.batch_count()} batches, "
            f"{self.pending + len(self.alone)} operations pending, {workers} workers"
        )

    def use(self, options: Options) -> None:
        """Open resources by *options* from now on; they differ from the former ones in nothing else. Switches: no."""
        self.options = options
        self.door = options.door
        self.pair = options.open_resource if isinstance(options.open_resource, Pair) else None

    # -- admitting ----------------------------------------------------------------------------------------

    def admit(self, key: Hashable, operation: Operation[Any]) -> Batch:
        """Put *operation* into the open batch of *key*, and return the batch.

        Functions of the user run while the key queue is looked up. They may switch, stop the processor or run another
        operation of the key. After the look-up nothing switches. A signal handler that stops the processor in between
        is noticed, since the operation is counted before `stopping` is read.
        """
        if self.stopping:
            self.refuse((key,))
        try:
            hashed: object = hash(key)
        except TypeError as error:
            refuse_key(key, error)
        key_queue = self.key_queues.get(hashed)
        if (
            key_queue is None
            or key_queue.retired
            or not (key_queue.key is key or key_queue.key == key)
            or key_queue.retired
        ):
            key_queue = self.find_key_queue(key, hashed)
        # No switch from here.
        self.pending += 1
        most = self.max_pending
        if self.stopping or (most is not None and self.pending + len(self.alone) > most):
            self.pending -= 1
            self.discard(key_queue)
            self.refuse((key,))
        batch = key_queue.last
        if batch is None or not batch.open or batch.loaded:
            batch = key_queue.open_batch()
        batch.add(operation)
        if self.stopping:  # set by a signal handler since it was read: the handler could not see this batch
            batch.close()
        return batch

    def admit_alone(self, batch: Batch) -> None:
        """Count *batch*, which its caller is about to run. Raise if the processor refuses it."""
        self.alone.add(batch)
        most = self.max_pending
        if self.stopping or (most is not None and self.pending + len(self.alone) > most):
            self.leave_alone(batch)
            self.refuse(batch.loads)

    def leave_alone(self, batch: Batch) -> None:
        """Forget *batch*, which its caller has run, perhaps in a thread without our greenlets."""
        self.alone.discard(batch)
        if not self.stopping:
            return
        if process.in_thread():
            self.check_stopped()
        else:
            here.hub.loop.run_callback_threadsafe(self.check_stopped)

    def refuse(self, keys: tuple[Hashable, ...]) -> NoReturn:
        """Raise for an operation on *keys*, since the processor was stopped, or is overloaded."""
        if self.stopping:
            why = (
                "the processor was stopped before the operation was admitted; nothing was saved, it is safe to run it "
            )
            raise of_keys(ProcessorStopped(f"{self.options.name}: {why}again on another processor"), keys)
        self.counts.overloaded += 1
        log.overloaded(self.options, self.counts.overloaded)
        seconds, known = self.retry_after(), self.counts.rate() > 0
        told = (
            f"{self.options.name}: max_pending of {self.options.max_pending} operations are waiting already; nothing "
            "was saved, it is safe to run it again later: "
            + ("at the recent rate they will have their answers in" if known else "no rate is known yet, try in")
            + f" {seconds:.3g} s"
        )
        raise of_keys(ProcessorOverloaded(told, retry_after=seconds), keys)

    # -- key queues --------------------------------------------------------------------------------------

    def find_key_queue(self, key: Hashable, hashed: object) -> KeyQueue:
        """Find the key queue of *key* among the key queues of the same hash, or open one.

        The key's ``__eq__`` and the worker number may be functions that switch. Therefore `retired` of the queue that
        was found is read again. New queues are prepended: ours is inserted only if the head is unchanged since the
        comparison began, else we compare again. Nothing of the user's runs when a queue is taken out.
        """
        shard: Shard | None = None
        while True:
            front = key_queue = self.key_queues.get(hashed)
            while key_queue is not None:  # not by `_row`: most often there is none, and a generator costs more
                if (key_queue.key is key or key_queue.key == key) and not key_queue.retired:
                    return key_queue
                key_queue = key_queue.beside
            if shard is None:
                if key != key:  # noqa: PLR0124 - such as a NaN
                    refuse_key(key)
                shard = self._shard(key)
            elif self.key_queues.get(hashed) is front:
                self.key_queues[hashed] = key_queue = KeyQueue(key, hashed, shard, front)
                return key_queue

    def _shard(self, key: Hashable) -> Shard:
        workers = self.options.workers
        ask: Any = self.options.worker_number_for_key  # so that compiled code leaves it to us to check the number
        number = ask(key, workers)
        if type(number) is not int and (isinstance(number, bool) or not isinstance(number, int)):
            raise TypeError(
                f"worker_number_for_key returned {shown(number)} for the key {shown(key)}, but must return an int"
            )
        if not 0 <= number < workers:
            raise ValueError(
                f"worker_number_for_key returned {shown(number)} for the key {shown(key)}, but must return a number "
                f"from 0 to {workers - 1}, since workers is {workers}"
            )
        shard = self.shards.get(number)
        if shard is None:
            shard = self.shards[number] = Shard(self, bulks=self.options.open_resources is not None)
        return shard

    def put_across(self, crossing: Batch, key_queue: KeyQueue) -> None:
        """Queue *crossing*, which is ready since *key_queue* is free. Switches: no.

        Where single keys are batches of their own, it has a shard for itself, whose workers open many keys.
        """
        shard = key_queue.shard
        if not shard.bulks:
            found = self.shards.get(_ACROSS)
            shard = self.shards[_ACROSS] = Shard(self, bulks=True) if found is None else found
        shard.put(crossing)

    def retire(self, key_queue: KeyQueue) -> None:
        """Forget *key_queue*, which has no batch."""
        key_queue.retired = True
        front = self.key_queues.pop(key_queue.hashed)
        if front is not key_queue:
            self.key_queues[key_queue.hashed] = front
            before = next(other for other in _row(front) if other.beside is key_queue)
            before.beside = key_queue.beside
        elif key_queue.beside is not None:
            self.key_queues[key_queue.hashed] = key_queue.beside

    def _all_key_queues(self) -> Iterator[KeyQueue]:
        for front in self.key_queues.values():
            yield from _row(front)

    def discard(self, key_queue: KeyQueue) -> None:
        """Forget *key_queue* if it has no batch."""
        if key_queue.first is None and not key_queue.retired:
            self.retire(key_queue)
        if self.stopping:
            self.check_stopped()

    # -- stopping -----------------------------------------------------------------------------------------

    def begin_stop(self) -> None:
        """Admit no more operations, and close the open windows. Switches: no."""
        self.stopping = True
        for key_queue in self._all_key_queues():
            for batch in key_queue:
                batch.close()
        self.check_stopped()

    def check_stopped(self) -> None:
        """Finish the stop, if nothing runs any more. Called at every end of a batch or an admission."""
        if self.live or self.pending or self.alone or self.ended:
            return
        self.ended = True
        batched = bool(self.shards)
        for shard in self.shards.values():
            shard.stop()
        self.shards.clear()
        self.deadlines.close()
        self.windows.close()
        for subscription in self._watchers():
            try:
                subscription.close()
            except Exception as error:
                log.watcher_failed(subscription, error)
        self._tell_store()
        if batched and not pace.idle():
            pace.add(self.stopped, WIDTH)  # behind the callers that have their answers and are not awake yet
        else:
            self.stopped.set()

    def _tell_store(self) -> None:
        stopped = self.options.store.stopped
        if stopped is not None:
            try:
                stopped()
            except Exception as error:
                log.error("the store of the stopped processor %s raised in stopped()", self.options.name, error=error)

    # -- for watchers ---------------------------------------------------------------------------------------

    def doing(self, phase: str) -> Any:
        """Return the function of the user's for *phase*, "load" or "save"."""
        many = self.options.open_resources
        opens: Any = self.options.open_resource if many is None else many
        name = f"{phase}_resource" if many is None else f"{phase}_resources"
        return getattr(opens, name, opens)  # a pair has one for each

    def retry_after(self) -> float:
        """Estimate, by the recent rate, the seconds until all callers that wait now will have their answers."""
        rate = self.counts.rate()
        return (self.pending + len(self.alone)) / rate if rate else self.options.max_duration

    def batch_count(self) -> int:
        """Return the number of live batches."""
        return self.live - self.places + self.crossings + len(self.alone)

    def batches(self) -> list[Batch]:
        """Return the live batches, for each key in the order they opened; in another thread, only the unbatched ones.

        There the key queues may change meanwhile. Written as plain loops, since there may be very many batches.
        """
        found = list(self.alone)
        for front in self.key_queues.values() if process.in_thread() else ():
            key_queue: KeyQueue | None = front
            while key_queue is not None:
                batch = key_queue.first
                while batch is not None:
                    listed = batch.listed()
                    if listed is not None:
                        found.append(listed)
                    batch = batch.behind
                key_queue = key_queue.beside
        return found

    def announce(self, batches: list[Batch], context: Context) -> Context:
        """Show *batches*, which are about to be loaded together in *context*, to each watcher with a ``begin``.

        Return the context as the watchers leave it. A watcher that waits is not waited for.
        """
        for subscription in self._watchers():
            begin: Any = getattr(subscription, "begin", None)
            if begin is not None:
                inside = call_aside(context, partial(log.watcher_failed, subscription), begin, batches)
                if inside is None:
                    log.watcher_waits(subscription)
                else:
                    context = inside
        return context

    def publish(self, metric: BatchMetric, batch: Batch) -> None:
        """Show *metric*, of *batch*, to every watcher."""
        for subscription in self._watchers():
            end: Any = getattr(subscription, "end", None)
            try:
                if end is None:
                    subscription.publish(metric)
                else:
                    end(batch, metric)
            except Exception as error:
                log.watcher_failed(subscription, error)

    def _watchers(self) -> list[Watcher]:
        # Other threads may subscribe or drop a subscription meanwhile: the copy is made in one step.
        return [subscription for held in tuple(self.subscriptions) if (subscription := held()) is not None]


def _row(front: KeyQueue | None) -> Iterator[KeyQueue]:
    """Iterate over *front* and the key queues behind it, whose keys have the same hash."""
    while front is not None:
        yield front
        front = front.beside

"""A shard: a queue of batches, and the workers that take them.

Guarantees kept here:
- While the queue holds a batch, a free worker will take it, or a callback adds a worker. Every place where the number
  of free workers falls, or the queue grows, ends in `_reinforce_later`.
- A slow key keeps to itself (9): a worker that runs a batch is not free.
- A killed worker answers, ends, and is replaced (7).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.hub import Waiter
from gevent.queue import SimpleQueue

from geventbatch._core.attempt import Attempt
from geventbatch._core.clock import clock as _clock
from geventbatch._core.deadline import Alarm
from geventbatch._core.hub_turns import pace
from geventbatch._core.process import here
from geventbatch._watch import log

if TYPE_CHECKING:
    from geventbatch._core.batch import Batch
    from geventbatch._core.dispatcher import Dispatcher

IDLE: Final = 10.0
"""Seconds. A worker that was not needed for so long ends."""


_UNBOUNDED: Final = nullcontext()
"""Stands for the slots of ``max_batches``, if there is no bound."""


class Shard:
    """The workers of the keys with one worker number."""

    def __init__(self, dispatcher: Dispatcher, *, bulks: bool) -> None:
        """Start without a worker; *bulks* says whether a worker takes all that is ready, or one batch."""
        self.dispatcher = dispatcher
        self.bulks = bulks
        self.queue: SimpleQueue[Batch | None] = SimpleQueue()  # None ends the worker that takes it
        # -- mutable state ---------------------------------------------------------------------------------
        self.workers = 0
        self.free = 0  # workers that run no batch: parked, woken, or waiting for one of the ``max_batches`` slots
        # The last worker to park is woken first: its memory is still in the cache, and the others become surplus.
        # (`queue.get` would scan all its waiters for each that comes and goes.)
        self.parked: list[Waiter[None]] = []
        self._least_free = 0  # over the present period of IDLE seconds
        self._reinforcing = False  # a callback is on its way
        self._idle_timer: Any = None  # ends the period, while there is more than one worker

    def put(self, batch: Batch) -> None:
        """Queue *batch*. Switches: no; works in the hub too."""
        self.queue.put(batch)
        if self.parked:
            self._wake()
        elif not self.free:
            self._reinforce_later()

    def _end_worker(self) -> None:
        self.queue.put(None)
        if self.parked:
            self._wake()

    def _wake(self) -> None:
        here.hub.loop.run_callback(self.parked.pop().switch, None)

    def park(self) -> None:
        """Wait for something in the queue. Switches: yes.

        Woken by `put` and `_end_worker`. By then another worker may have taken the batch. If the worker is killed here,
        the batch stays in the queue, and `_left` sees to it.
        """
        waiter: Waiter[None] = Waiter()
        self.parked.append(waiter)
        try:
            waiter.get()
        except BaseException:
            if waiter in self.parked:
                self.parked.remove(waiter)
            raise

    def _reinforce_later(self) -> None:
        # By a callback, not now: a batch that never waits ends before the hub calls back, and its worker goes on.
        if not self.free and not self._reinforcing and len(self.queue):
            self._reinforcing = True
            gevent.get_hub().loop.run_callback(self._reinforce)

    def _reinforce(self) -> None:
        self._reinforcing = False
        if not self.free and len(self.queue) and self.dispatcher.epoch == here.epoch:
            self.workers += 1
            self.free += 1
            # A link, not a `finally` in the worker: a worker may be killed before its first step.
            gevent.spawn(Worker(self).work).rawlink(self._left)
            if self.workers > 1:
                self._start_period()

    # -- surplus workers end ------------------------------------------------------------------------------

    def _start_period(self) -> None:
        if self._idle_timer is None:
            self._least_free = self.free
            # Without a reference, so that it does not keep the hub alive: gevent is to detect deadlocks.
            self._idle_timer = gevent.get_hub().loop.timer(IDLE, ref=False)
            self._idle_timer.start(self._end_period)

    def _end_period(self) -> None:
        self._close_timer()
        if self.dispatcher.epoch != here.epoch:
            return
        for _ in range(min(self._least_free, self.workers - 1)):
            self._end_worker()
        if self.workers > 1:
            self._start_period()

    def _close_timer(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.close()
            self._idle_timer = None

    def stop(self) -> None:
        """End all workers; no batch is left. Switches: no."""
        self._close_timer()
        for _ in range(self.workers):
            self._end_worker()

    # -- called by workers, without a switch --------------------------------------------------------------

    def mark_busy(self) -> None:
        """Count a free worker as busy: it begins to run a batch."""
        self.free = free = self.free - 1
        if free < self._least_free:  # noqa: PLR1730 - min() costs a batch 50 ns
            self._least_free = free
        if not free:
            self._reinforce_later()

    def _left(self, worker: object) -> None:  # noqa: ARG002 - the signature is a link's
        self.workers -= 1
        self.free -= 1
        if self.parked and len(self.queue):  # it may have been woken for a batch, and killed before it took the batch
            self._wake()
        self._reinforce_later()


class Worker:
    """A greenlet that runs one batch after another."""

    __slots__ = ("_dispatcher", "_shard")

    def __init__(self, shard: Shard) -> None:
        """Belong to *shard*, which counts it as free."""
        self._shard = shard
        self._dispatcher = shard.dispatcher

    def work(self) -> None:
        """Take batches until it is told to end, is killed, or must not be used again."""
        shard = self._shard
        queue = shard.queue
        bulks = shard.bulks
        run: Any = None
        if bulks:
            from geventbatch._bulk import bulk  # only here, since most processors have no bulks

            run = bulk.run
        alarm = Alarm(self._dispatcher.deadlines)
        try:
            while True:
                while not len(queue):
                    alarm.relax()
                    shard.park()
                if bulks:
                    if not self._run_bulk(alarm, run):
                        return
                    continue
                batch = queue.get_nowait()
                if batch is None:
                    return
                if not self._run(batch, alarm):
                    return
                del batch  # else an idle worker keeps its operations alive, and the contexts of their callers
        finally:
            alarm.close()

    def _run(self, batch: Batch, alarm: Alarm) -> bool:
        """Run *batch*. Return False if this worker must not be used again."""
        slots = self._dispatcher.slots
        try:
            if slots is None:
                self._run_when_due(batch, alarm)
            else:
                with slots:
                    self._run_when_due(batch, alarm)
        except BaseException as error:  # a kill, perhaps during the wait for a slot or for a turn of the hub
            batch.abort(error)
            if batch.attempt is not None:
                batch.attempt.after = None
            log.killed([batch], error)
            raise
        finally:
            attempt = batch.let_go()
            after = attempt is not None and attempt.after is not None
            if after:
                self._dispatcher.live += 1
            if batch.key_queue is not None:
                batch.key_queue.finish()
        if attempt is None:  # all callers had left: it did not run
            return True
        if after:
            self._run_after(attempt)
        if attempt.spent:
            log.lost(attempt)
            return False
        return True

    def _run_after(self, attempt: Attempt) -> None:
        # The key and the slot of ``max_batches`` are released already, since a hook may call `run`. The worker is not
        # free, and a stop waits for it.
        self._shard.mark_busy()
        try:
            attempt.run_after()
        finally:
            self._shard.free += 1
            self._dispatcher.live -= 1
            if self._dispatcher.stopping:
                self._dispatcher.check_stopped()

    def _run_bulk(self, alarm: Alarm, run: Any) -> bool:
        """Let *run* run the queued batches as one bulk (see `bulk`). Return False if this worker has to end."""
        batches: dict[Batch, None] = {}
        taken: list[Batch] = []
        spent: Attempt | None = None
        after: Attempt | None = None
        try:
            with self._dispatcher.slots or _UNBOUNDED:
                now = _clock.monotonic()
                # Callers that go on may want keys that are not in this bulk, and could not join it: they come first.
                waits = now >= pace.slice_end(now) or (self._dispatcher.crossings and not pace.idle())
                if waits and len(self._shard.queue) and not self._dispatcher.ended:
                    pace.wait()
                # Only now that it has a slot: batches that came during the wait for it are in the bulk too.
                if not self._take(batches):
                    return False
                taken = list(batches)
                self._shard.mark_busy()
                try:
                    spent, after = run(batches, alarm, across=self._dispatcher.crossings > 0)
                finally:
                    self._shard.free += 1
        except BaseException as error:
            for batch in batches:
                batch.abort(error)
            if taken:
                log.killed(taken, error)
            raise
        finally:
            for batch in [*batches]:  # after a kill, in the order of each key: the first of a queue is not searched for
                del batches[batch]
                batch.free()
        if after is not None:
            self._run_after(after)
        if spent is not None:
            log.lost(spent)
        return spent is None

    def _take(self, batches: dict[Batch, None]) -> bool:
        """Move queued batches, if another worker has left any, into *batches*. Return False to end this worker."""
        if self._dispatcher.crossings:
            from geventbatch._bulk.taking import take

            return take(self._shard, batches)
        queue = self._shard.queue
        while len(batches) < self._dispatcher.options.max_bulk and len(queue):
            batch = queue.get(block=False)
            if batch is not None:
                batches[batch] = None
            elif batches:  # a worker is to end: not before this bulk has run
                queue.put(None)
                return True
            else:
                return False
        return True

    def _run_when_due(self, batch: Batch, alarm: Alarm) -> None:
        now = _clock.monotonic()
        slice_end = pace.slice_end(now)
        if now >= slice_end:
            pace.wait()  # the worker still counts as free: another one would get its turn no sooner
            now = _clock.monotonic()
        self._shard.mark_busy()
        try:
            if batch.waiting:
                Attempt(batch, alarm, now).run(slice_end)  # the constructor sets batch.attempt
            else:
                batch.end()  # all callers have left
        finally:
            self._shard.free += 1

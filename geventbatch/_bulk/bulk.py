"""A bulk: the batches of many keys that one worker runs together: which of them leads, and the rounds to come.

Each batch keeps its own operations, answers, attempts and conflicts. The batches of a bulk share the greenlet, the
scope and the deadline. They go through rounds (see `round`). A batch that has its outcome leaves the bulk after the
round, and its key is free. A batch that is replayed takes part in a later round.

One batch leads: the alarm watches it, and `current_batch` returns it. The deadline goes from one leader to the next,
since a pause (guarantee 10) moves it.
"""

from __future__ import annotations

from contextvars import Context
from typing import TYPE_CHECKING

from geventbatch._bulk.component import Component, components_of, members_of
from geventbatch._bulk.round import Round
from geventbatch._core import process
from geventbatch._core.attempt import Attempt
from geventbatch._core.batch_turns import take_breath
from geventbatch._core.clock import clock as _clock
from geventbatch._core.hub_turns import pace
from geventbatch._core.replay import back_off
from geventbatch._core.verdict import ends_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable

    from geventbatch._core.batch import Batch
    from geventbatch._core.deadline import Alarm


class Bulk:
    """The batches that a worker runs together."""

    def __init__(self, batches: dict[Batch, None], alarm: Alarm, now: float, *, across: bool) -> None:
        """Begin to run *batches* in the greenlet of *alarm*. Each is taken out of the dict when it is freed."""
        self._alarm = alarm
        self.across = across  # whether a batch may have several keys
        # -- mutable state ---------------------------------------------------------------------------------
        self._batches = batches
        self._attempts: dict[Attempt, None] = {}  # of these batches, or of the components that they form
        context = Context()  # until a round has one
        for batch in components_of(batches) if across else batches:
            attempt = Attempt(batch, alarm, now, context)
            attempt.mates = self._attempts
            self._attempts[attempt] = None
        if across:
            for attempt in self._attempts:
                if type(attempt.batch) is Component:
                    attempt.batch.start(attempt)
        self._lead = next(iter(self._attempts))
        self.asks = self._lead.dispatcher.options.idempotency is not None  # a round may have to ask for outcomes
        self._rounds = [(now, list(self._attempts))]  # rounds to come, the next one last: earliest time, attempts
        self._unfit: Attempt | None = None  # an attempt after which the greenlet must not be used again
        self._after: list[Callable[[], object]] = []  # hooks of scopes, to call after the answers

    def run(self) -> tuple[Attempt | None, Attempt | None]:
        """Run the batches, until the code of all has returned. Raise what ends the greenlet.

        Return an attempt after which the greenlet must not be used again; and one whose hooks are to be called, now
        that all have their answers; or None for each.
        """
        try:
            while self._rounds:
                earliest, attempts = self._rounds.pop()
                first, before = attempts[0], attempts[0].now
                self.follow(first)
                if first.batch.attempts:
                    first.aside += first.now - before
                if not self._lead.batch.attempts or self._wait_until(earliest):
                    Round(self, attempts).run()
                self._free_ended()
        except BaseException as error:  # thrown into a wait of our own: a kill, or a Timeout that is not the bulk's
            self._lead.over()
            self._unfit = self._lead
            for attempt in self._attempts:
                attempt.batch.abort(error)
            if ends_greenlet(self._lead, error):
                if self._after:
                    self._lead.dispatcher.live -= 1  # before the batches are freed, which ends a stop
                raise
        finally:
            self._alarm.attempt = None
            process.running.pop(self._alarm.greenlet, None)
        if not self._after:
            return self._unfit, None
        self._lead.after = [*self._after]
        self._lead.context = Context()  # each hook enters that of its own round
        return self._unfit, self._lead

    def call_after(self, hook: Callable[[], object]) -> None:
        """Call *hook* when the callers have their answers. A stop waits for it."""
        if not self._after:
            self._lead.dispatcher.live += 1
        self._after.append(hook)

    def _wait_until(self, earliest: float) -> bool:
        seconds = max(0.0, earliest - _clock.monotonic())
        return back_off(self._lead, seconds) and take_breath(self._lead, 0.0)

    def follow(self, attempt: Attempt) -> None:
        """Let *attempt* lead from now on."""
        attempt.now = _clock.monotonic()
        attempt.deadline = self._lead.deadline
        self._lead = attempt
        process.running[self._alarm.greenlet] = attempt
        self._alarm.attempt = attempt
        if not self._alarm.armed:
            self._alarm.arm()

    def again(self, attempts: list[Attempt], seconds: float = 0.0) -> None:
        """Plan another round of *attempts*, not before so many *seconds* from now."""
        if attempts:
            self._rounds.append((_clock.monotonic() + seconds, attempts))

    def _free_ended(self) -> None:
        """Free the batches whose outcomes are fixed. Switches: yes, in pauses. After a kill, `Worker` does it."""
        if self._rounds:  # the alarm must not watch an attempt that was freed
            self.follow(self._rounds[-1][1][0])
        else:
            self._alarm.attempt = None
        ended = [attempt for attempt in self._attempts if attempt.batch.ended]
        for attempt in ended:
            now = _clock.monotonic()
            if attempt is not ended[0] and now >= pace.slice_end(now):  # not after the last: a stop may end with it
                self._lead.pause()
            if attempt.spent:
                self._unfit = attempt
            del self._attempts[attempt]
            batch = attempt.batch
            if self.across:
                self._free(batch)
                continue
            del self._batches[batch]  # the only one of its key: see `Batch.free`
            batch.let_go()
            if batch.key_queue is not None:
                batch.key_queue.finish()

    def _free(self, batch: Batch) -> None:
        batches = self._batches
        for member in members_of(batch):
            del batches[member]
            member.free()
        batch.let_go()  # of a component: its members have let go of the same attempt


def run(batches: dict[Batch, None], alarm: Alarm, *, across: bool) -> tuple[Attempt | None, Attempt | None]:
    """Run as one bulk what another worker has left of *batches*, but none that all callers left: see `Bulk.run`."""
    left = [batch for batch in batches if not batch.waiting]
    if batches and not left:
        return Bulk(batches, alarm, _clock.monotonic(), across=across).run()
    for batch in left:
        batch.end()
        del batches[batch]
    bulk = Bulk(batches, alarm, _clock.monotonic(), across=across) if batches else None
    for batch in left:  # only now: the batches of the bulk, of which some may be behind these, are seen to run
        batch.free()
    return (None, None) if bulk is None else bulk.run()

"""A round: one attempt of each of its batches.

One scope loads all keys, the operations are applied batch by batch, and the scope saves all keys. The round ends with
outcomes, or with another round of the batches that are replayed (see `bulk`).
"""

from __future__ import annotations

import sys
from contextvars import Context
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from gevent import get_hub

from geventbatch._bulk.component import Component
from geventbatch._bulk.scopes import errors_of, fault_of, loaded
from geventbatch._check_callables import NOT_OPENED, blame_opener
from geventbatch._core.applying import apply, has_news
from geventbatch._core.batch_turns import took
from geventbatch._core.clock import clock as _clock
from geventbatch._core.halving import current_part, is_left, settle
from geventbatch._core.process import leave_to_parent
from geventbatch._core.replay import delay, save_raised
from geventbatch._core.verdict import ends_greenlet, kill_behind, traceback_of, without_our_frame
from geventbatch._failure import load_failed, save_failed
from geventbatch.errors import Apart, Conflict, LoadFailed, NothingToSave, PartlySaved, Rejected, Repeated

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, MutableMapping

    from geventbatch._bulk.bulk import Bulk
    from geventbatch._core.attempt import Attempt
    from geventbatch._core.batch import Batch
    from geventbatch._core.dispatcher import Dispatcher


class Round:
    """Takes some attempts of a bulk from load to save once, in one scope."""

    def __init__(self, bulk: Bulk, attempts: list[Attempt]) -> None:
        self._bulk = bulk
        self._attempts = attempts
        self._across = bulk.across
        self._context = Context()  # of its load and its save (guarantee 11)
        self._leave: Callable[..., object]  # the exit of the scope
        self._saved: Any  # the hook of the scope to call after the answers
        self._turn: Any  # tells one of our own scopes that the operations of the leading attempt come next
        # -- mutable state ---------------------------------------------------------------------------------
        self._at_hand: dict[Hashable, Attempt] = (  # by key: loaded, or to be saved; a component's has several keys
            {key: one for one in attempts for key in one.batch.loads}
            if self._across
            else {one.batch.key: one for one in attempts}
        )
        self._shown: dict[Hashable, Batch] = {key: one.batch for key, one in self._at_hand.items()}  # for scopes
        self._resources: MutableMapping[Any, Any] = {}  # by key
        self._reason: BaseException = NothingToSave()  # to exit the scope with, if nothing is saved
        self._spoiled = False  # an operation has spoiled the transaction: all attempts are replayed
        self._again: list[Attempt] = []  # attempts to replay
        self._apart: list[tuple[Attempt, float]] = []  # to replay, each in a round of its own, after so many seconds
        self._seconds = 0.0  # to wait before their round

    def run(self) -> None:
        """Load, apply, save; and plan another round of the attempts that are to be replayed."""
        if self._load():
            try:
                self._look_at_resources()
                if not self._bulk.asks:
                    self._apply()
                elif self._ask():
                    self._apply()
                    self._ask()
                self._settle()
            except BaseException as error:
                for attempt in self._attempts:
                    attempt.batch.abort(error)
                self._leave_for(error)
                raise
            self._save()
        self._reason = NothingToSave()  # the error of a broken operation refers to this frame: no cycle
        for apart, seconds in reversed(self._apart):
            if not apart.batch.ended:
                self._bulk.again([apart], seconds)
        self._bulk.again([one for one in self._again if not one.batch.ended], self._seconds)

    # -- load ---------------------------------------------------------------------------------------------

    def _load(self) -> bool:
        """Enter the scope. Return False if that raised, so that no resource was loaded."""
        first = self._attempts[0]
        leave_to_parent(first.dispatcher)
        first.turn = get_hub().loop.iteration
        begun, deadline, loaded_with = first.now, first.deadline, len(self._shown)
        for attempt in self._attempts:
            batch = attempt.batch
            if batch.attempts:
                attempt.aside += begun - attempt.now
                attempt.begin_again()
            batch.attempts += 1
            attempt.phase = "load"
            attempt.now = begun
            attempt.deadline = deadline
            attempt.bulk = self._shown
            attempt.loaded_with = loaded_with
            attempt.context = self._context
        open_resources: Any = first.dispatcher.options.open_across
        scope: Any = NOT_OPENED
        try:
            if first.dispatcher.subscriptions:
                self._announce(first.dispatcher)
            scope = self._context.run(open_resources, list(self._at_hand))
            for attempt in self._attempts:
                attempt.scope = scope
            self._saved, self._turn = getattr(scope, "saved", None), getattr(scope, "turn", None)
            self._leave, self._resources = scope.__exit__, self._context.run(scope.__enter__)
        except BaseException as error:
            first.over()
            if ends_greenlet(first, error):
                raise
            error = without_our_frame(blame_opener(error, "open_resources", scope))
            of_many = len(self._at_hand) > 1
            for attempt in self._attempts:
                self._load_raised(attempt, error, of_many=of_many)
            return False
        finally:
            now = _clock.monotonic()
            for attempt in self._attempts:
                attempt.now = now
                attempt.load_duration += now - begun
            took(first, "load", now - begun)
        first.over()
        return True

    def _announce(self, dispatcher: Dispatcher) -> None:
        self._context = dispatcher.announce([*self._shown.values()], self._context)
        for attempt in self._attempts:
            attempt.context = self._context

    def _look_at_resources(self) -> None:
        fault = fault_of(self._resources, self._at_hand)
        if fault is not None:
            self._resources = {}  # a wrong object is not changed
        for attempt in self._attempts:
            attempt.phase = "operations"
            if self._across and fault is None and type(attempt.batch) is Component:
                self._look_at_component(attempt, attempt.batch)
                continue
            found = fault or self._found(attempt.batch.key)
            if isinstance(found, Exception):
                self._load_raised(attempt, found)

    def _found(self, key: Hashable) -> Any:
        """Return the resource of *key*, or the error of its load."""
        resources = self._resources
        try:
            return resources[key] if key in resources else loaded(resources, key)
        except Exception as error:
            return without_our_frame(error)

    def _look_at_component(self, attempt: Attempt, component: Component) -> None:
        """Answer those that need a key whose load has failed; a conflict of one key is one of all."""
        errors = {key: found for key in component.loads if isinstance(found := self._found(key), Exception)}
        if not errors:
            if attempt.over():
                self._leave_out(attempt)
            return
        if not attempt.over():  # a user's mapping may have switched meanwhile
            failures = {key: load_failed(key, one) for key, one in errors.items() if not isinstance(one, Conflict)}
            if failures:
                component.drop(failures)
            for key in failures:
                self._leave_key_out(key)
        conflict = next((error for error in errors.values() if isinstance(error, Conflict)), None)
        if component.ended:
            self._leave_out(attempt)
        elif conflict is not None:
            self._load_raised(attempt, conflict)

    def _load_raised(self, attempt: Attempt, error: BaseException, *, of_many: bool = False) -> None:
        if attempt.over():
            pass
        elif isinstance(error, Conflict):
            self._replay(attempt, delay(attempt, error, loading=True))
        else:
            attempt.spent = not isinstance(error, Exception)
            failure = load_failed(attempt.batch.key, error)
            if of_many:  # a `ResourceMissing` does not tell which key it is about
                failure = replace(failure, kind=LoadFailed)
            attempt.batch.fail_load(failure)
        self._leave_out(attempt)

    def _leave_out(self, attempt: Attempt) -> None:
        """Leave *attempt* out of the rest of this round: nothing of it is saved."""
        for key in attempt.batch.loads:
            self._leave_key_out(key)

    def _leave_key_out(self, key: Hashable) -> None:
        for mapping in (self._at_hand, self._shown, self._resources):
            mapping.pop(key, None)

    def _replay(self, attempt: Attempt, seconds: float | None) -> None:
        if seconds is not None:
            if attempt.apart:
                self._apart.append((attempt, seconds))
            else:
                self._again.append(attempt)
                self._seconds = max(self._seconds, seconds)

    # -- operations ---------------------------------------------------------------------------------------

    def _ask(self) -> bool:
        """Ask the scope for the idempotency keys of operations that are in no save (see `once`).

        Return False if the transaction is spoiled.
        """
        asking = [one for one in self._attempts if one.asked and one.broken is one.verdict is None and not one.over()]
        if asking:  # which is rare
            at_hand = set(self._at_hand.values())
            asking = [one for one in asking if one in at_hand]
        if asking and not self._spoiled:
            self._bulk.follow(asking[0])
            self._spoiled = not asking[0].dispatcher.options.idempotency.ask(*asking)
        return not self._spoiled

    def _apply(self) -> None:  # noqa: C901 - every batch of a bulk passes it, in one piece
        at_hand = self._at_hand.values()
        for attempt in dict.fromkeys(at_hand) if self._across else list(at_hand):
            if attempt.over():
                continue
            self._bulk.follow(attempt)
            if self._turn is not None:
                self._turn()
            attempt.turn = get_hub().loop.iteration
            batch = attempt.batch
            batch.loaded = True
            if attempt.now >= attempt.deadline:  # the hub was blocked, so the alarm could not ring
                attempt.expire()
                continue
            try:
                if type(batch) is Component:
                    batch.gather()
                    apply(attempt, batch.compose(self._resources), 0.0)
                    batch.rest()
                else:
                    apply(attempt, self._resources[batch.key], 0.0)
                    if attempt.undo is not None:
                        self._resources[batch.key] = attempt.undo.resource
            except BaseException as error:
                if ends_greenlet(attempt, error):
                    raise
                if not attempt.over():
                    attempt.batch.abort(without_our_frame(error))
            verdict = attempt.verdict
            if verdict is not None and not isinstance(verdict, Apart):  # it is spoiled, and all attempts share it
                self._spoiled = True
                return

    def _settle(self) -> None:
        """Leave out the attempts of which nothing is to be saved, and the keys of a component that nothing changed."""
        at_hand = self._at_hand.values()
        for attempt in dict.fromkeys(at_hand) if self._across else list(at_hand):
            verdict = attempt.verdict
            if attempt.over():
                self._leave_out(attempt)
            elif verdict is attempt.broken is None and not self._spoiled and (has_news(attempt) or _compares(attempt)):
                if type(attempt.batch) is Component or not attempt.completed:
                    self._leave_unchanged_out(attempt, attempt.batch)
            elif isinstance(verdict, Conflict):
                self._replay(attempt, delay(attempt, verdict))
                self._leave_out(attempt)
            elif verdict is not None and not isinstance(verdict, Rejected):
                attempt.batch.end(save_failed(attempt.batch.key, verdict, doing="an operation"))
                self._leave_out(attempt)
            else:
                left = attempt.batch.open or attempt.asked or is_left(attempt)
                replay = (self._spoiled or attempt.broken is not None) and left
                self._reason = self._reason if attempt.broken is None else attempt.broken
                attempt.broken = None  # its traceback refers to this frame: no cycle
                self._replay(attempt, 0.0 if replay or settle(attempt) else None)
                self._leave_out(attempt)

    def _leave_unchanged_out(self, attempt: Attempt, batch: Batch) -> None:
        """Leave out the resources that no operation has changed, and keys at which none was applied."""
        if type(batch) is Component:
            if batch.changes_all(attempt):
                return
            operations = current_part(attempt)
            applied, changed = batch.applied(operations), batch.changed(operations)
            for key in batch.loads:
                if key not in applied:
                    self._leave_key_out(key)
                elif key not in changed:
                    self._resources.pop(key, None)
        elif not attempt.completed:
            self._resources.pop(batch.key, None)

    # -- save ---------------------------------------------------------------------------------------------

    def _save(self) -> None:
        attempts = list(dict.fromkeys(self._at_hand.values()) if self._across else self._at_hand.values())
        if attempts:
            self._bulk.follow(attempts[0])
            if attempts[0].now >= attempts[0].deadline:  # the operations never yielded, so the alarm could not ring
                attempts[0].expire()
        if not attempts or attempts[0].over():
            self._leave_for(TimeoutError("the deadline of the bulk has passed") if attempts else self._reason)
            return
        first = attempts[0]
        leave_to_parent(first.dispatcher)
        first.turn = get_hub().loop.iteration
        begun, deadline = first.now, first.deadline
        for attempt in attempts:
            attempt.phase = "save"
            attempt.now = begun
            attempt.deadline = deadline
        raised: BaseException | None = None
        try:
            self._context.run(self._leave, None, None, None)
        except BaseException as error:
            raised = without_our_frame(error)
        now = _clock.monotonic()
        for attempt in attempts:
            attempt.now = now
            attempt.save_duration += now - begun
        took(attempts[0], "save", now - begun)
        attempts[0].over()
        if raised is not None:
            raised = kill_behind(attempts[0], raised, sys.exc_info()[1])
        try:
            if raised is not None and ends_greenlet(attempts[0], raised):
                raise raised
            saved = self._saved
            if saved is not None and (raised is None or isinstance(raised, PartlySaved)) and callable(saved):
                self._bulk.call_after(partial(self._context.run, saved))
            self._end(attempts, raised)
        finally:
            del raised  # its traceback refers to this frame: no cycle

    def _end(self, attempts: list[Attempt], raised: BaseException | None) -> None:
        """Fix the outcomes of *attempts* after the save; *raised* is its error, or None."""
        if raised is None:
            for attempt in attempts:
                if attempt.parts:
                    self._end_one(attempt, None)
                else:
                    attempt.batch.end()
            return
        if isinstance(raised, PartlySaved):
            try:
                lost = errors_of(raised, self._at_hand)
            except TypeError as error:
                raised = error.with_traceback(None)  # our frames refer to the operations of all callers
            else:
                errors = {one: next((lost[key] for key in one.batch.loads if key in lost), None) for one in attempts}
                self._end_each(errors)
                return
        if isinstance(raised, Apart) and len(self._attempts) > 1:
            self._part(attempts, raised)
            return
        if isinstance(raised, Rejected) and len(attempts) > 1 and not attempts[0].over():
            self._halve(attempts)
            return
        if isinstance(raised, Repeated) and len(attempts) > 1:
            attempts = self._replay_others(attempts, raised)
        self._end_each(dict.fromkeys(attempts, raised))

    def _end_each(self, errors: dict[Attempt, Any]) -> None:
        """Fix the outcome of each attempt, with its error or None."""
        repeated = [one for one, error in errors.items() if isinstance(error, Repeated)]
        for attempt in repeated:
            attempt.phase = "operations"  # nothing was written
        for attempt, error in errors.items():
            if attempt not in repeated:
                self._end_one(attempt, error)
        for attempt in repeated:  # last, since these may pause: what was saved is answered by then
            self._bulk.follow(attempt)
            self._end_one(attempt, errors[attempt])

    def _replay_others(self, attempts: list[Attempt], repeated: Repeated) -> list[Attempt]:
        """Replay the attempts that *repeated* does not concern, and return the others; all, if it concerns none."""
        concerned = [one for one in attempts if any(name in repeated.outcomes for name in one.outcomes or ())]
        for attempt in attempts if concerned else ():
            if attempt not in concerned and not attempt.over():
                attempt.phase = "operations"
                self._replay(attempt, 0.0)
        return concerned or attempts

    def _part(self, attempts: list[Attempt], reason: Apart) -> None:
        concerned = [self._at_hand[key] for key in reason.keys if key in self._at_hand]
        for attempt in attempts:
            self._again_for(attempt, reason, alone=attempt in (concerned or attempts))

    def _again_for(self, attempt: Attempt, reason: Apart, *, alone: bool) -> None:
        """Replay *attempt*, of which nothing was saved: *alone* in its round, or with the others."""
        if attempt.over():
            attempt.abort(reason)
            return
        attempt.phase = "operations"
        attempt.apart = attempt.apart or alone
        self._replay(attempt, 0.0)

    def _end_one(self, attempt: Attempt, raised: BaseException | None) -> None:
        if isinstance(raised, Apart) and len(self._attempts) > 1:
            self._again_for(attempt, raised, alone=True)
        elif raised is not None:
            self._replay(attempt, save_raised(attempt, raised))
        elif not attempt.parts:
            attempt.batch.end()
        elif not attempt.batch.ended and settle(attempt):
            self._replay(attempt, 0.0)

    def _halve(self, attempts: list[Attempt]) -> None:
        """Plan a round for each half of *attempts*, to find the key that the store refused."""
        for attempt in attempts:
            attempt.phase = "operations"
            attempt.rejections += 1
        middle = len(attempts) // 2
        self._bulk.again(attempts[middle:])
        self._bulk.again(attempts[:middle])

    def _leave_for(self, reason: BaseException) -> None:
        """Exit the scope without a save. Ignore what its exit raises, unless that is a kill."""
        first = self._attempts[0]
        try:
            self._context.run(self._leave, type(reason), reason, traceback_of(reason))
        except BaseException as error:
            first.over()
            if error is not reason and ends_greenlet(first, error):
                raise
        else:
            first.over()


def _compares(attempt: Attempt) -> bool:
    """Return whether one of our own scopes must compare though there is nothing to save. If so, make it save nothing.

    See `Attempt`, which does so for a scope of one key.
    """
    must_compare: Any = getattr(attempt.scope, "must_compare_of", None)
    if must_compare is None or not must_compare(attempt.batch):
        return False
    attempt.completed = 0
    return True

"""A processor of the simulation, its callers and their operations, and what has to hold while they run."""

from __future__ import annotations

import weakref
from math import inf
from typing import TYPE_CHECKING, Any

import gevent

from geventbatch import Processor, current_batch
from tests.support.simulation import LONGEST_BACKOFF, MARK
from tests.support.simulation_across.answers import AnswersLife
from tests.support.simulation_across.bank import Bank, Saver, Store
from tests.support.simulation_across.reached import reach
from tests.support.simulation_across.world import KEYS, AcrossCall

if TYPE_CHECKING:
    from tests.support.simulation import Act
    from tests.support.simulation_across.world import Account, BulkVisit

_ROUNDING = 1e-6


class AcrossOperation:
    """The operation of a call: it adds its identity to each of its accounts, in its own way."""

    def __init__(self, call: AcrossCall) -> None:
        self.call = call

    def __call__(self, resources: Any, mark: object) -> object:
        life: Any = self.call.life
        return life.apply_across(self.call, resources if type(resources) is tuple else (resources,), mark)


class AcrossLife(AnswersLife):
    """A processor with operations across keys."""

    def _make(self) -> Processor[Any]:
        choices = self.choices
        names = (
            "min_duration",
            "max_duration",
            "workers",
            "max_batches",
            "max_batch_size",
            "max_pending",
            "max_attempts",
        )
        options: dict[str, Any] = {name: getattr(choices, name) for name in (*names, "max_bulk")}
        if choices.numbering:
            options["worker_number_for_key"] = self.number
        if choices.narrow:
            options["clean_errors"] = self.clean_errors
        if choices.copying == "none":
            options["copy_resource"] = None
        if choices.opens == "by a pair":
            return Processor(load_resources=self.load_all, save_resources=Saver(self), **options)
        if choices.opens == "by a store":
            return Processor(open_resource=Store(self), **options)
        return Processor(open_resources=Bank(self), **options)

    def shards(self) -> int:
        own = self.choices.opens == "by a store"  # of operations across keys
        return self.choices.workers + own

    def number(self, key: str, workers: int) -> int:
        gevent.sleep(0)
        return KEYS.index(key) % workers

    def is_idle(self) -> bool:
        # Of a pair, no visit runs while an operation does.
        return not (any(call.waiting for call in self.calls) or self.running or self.applying)

    def _note_quiet(self) -> None:
        self.quiet = True
        self.quiet_since = min(self.quiet_since, self.world.clock.now())
        for visit in self.running + self.applying:
            if not visit.alone:
                self.world.wrong(f"stop() has returned True, but a bulk of {visit.keys} runs")

    # -- callers ------------------------------------------------------------------------------------------

    def call_across(
        self, keys: tuple[str, ...], acts: tuple[Act, ...], patience: float | None, start_timeout: float | None
    ) -> None:
        self.world.numbers += 1
        call = AcrossCall(self, self.world.numbers, keys[0], acts, patience, start_timeout, keys=keys)
        self.world.refs.append(weakref.ref(call.mark))
        call.greenlet = self.world.spawn(self._run, call)
        self.calls.append(call)
        self.callers[call.greenlet] = call

    def _run(self, call: Any) -> None:
        operation = AcrossOperation(call)
        self.world.refs.append(weakref.ref(operation))
        MARK.set(call.mark)
        call.timer = gevent.Timeout(call.patience)
        call.timer.start()
        call.came = self.world.clock.now()
        call.after_stop = self.stopping
        call.alone = not self.processor.batching
        self._reach_by_call(call)
        call.sequence = self._moment("a caller")
        options: Any = {"start_timeout": call.start_timeout, "read_only": call.reads}
        try:
            if call.several:
                value = self.processor.run_across(call.keys, operation, call.mark, **options)
            else:
                value = self.processor.run(call.key, operation, call.mark, **options)
        except BaseException as error:
            self._moment("a caller")
            self._judge(call, error)
        else:
            self._moment("a caller")
            self._returned(call, value)
        finally:
            call.timer.close()

    def _reach_by_call(self, call: AcrossCall) -> None:
        choices = self.choices
        reach(choices.opens)
        reach(f"run_across of {len(call.keys)} keys".replace("1 keys", "1 key") if call.several else "run of one key")
        if call.several and choices.workers > 1 and len(call.keys) > 1:
            reach("keys of several shards, as far as their numbers say")
        if choices.numbering and call.several:
            reach("a worker_number_for_key that switches")
        call.came_during = frozenset(visit for visit in self.running if visit.phase == "a load" and not visit.alone)
        before = [one for one in self.calls if one.waiting and not one.starts and set(one.keys) & set(call.keys)]
        if any(len(one.keys) > 1 and set(call.keys) - set(one.keys) for one in before):
            reach("waited for an operation across keys")
        if call.several and any(not one.several and call.came < one.came + choices.min_duration for one in before):
            reach("a window ended early")

    # -- operations ---------------------------------------------------------------------------------------

    def apply_across(self, call: Any, accounts: tuple[Account, ...], mark: object) -> object:
        tick = self._moment("an operation")
        visit = accounts[0].visit
        visit.run.first.setdefault(current_batch(), tick)
        self._check_apply_across(call, visit, accounts, mark)
        self._note_applied(call, visit)
        act = call.acts[min(call.starts, len(call.acts) - 1)]
        call.starts += 1
        call.last, call.raised, call.last_end = None, None, act.end
        self.applying.append(visit)
        try:
            for place, account in enumerate(accounts):
                if not call.reads:
                    account.entries.append(call.number)
                if place == call.number % len(accounts):
                    self._wait(act.first, act.guard, visit)
                    self._end_at(call, act.end, accounts)
            self._wait(act.last, act.guard, visit)
        except BaseException as error:
            call.raised = error
            raise
        finally:
            self.applying.remove(visit)
        visit.returned.add(call.number)
        call.last = object()
        return call.last

    def _end_at(self, call: Any, end: str, accounts: tuple[Account, ...]) -> None:
        if end == "half-way":
            accounts[0].entries.insert(0, -2)
            accounts[0].version -= 1
            if len(accounts) > 1:
                reach("an operation raised half-way")
        elif end == "refuse" and self.clean_errors:  # then it promises that it has changed nothing
            for account in accounts:
                if call.number in account.entries:
                    account.entries.remove(call.number)
        self._end_operation(call, end)

    def _note_applied(self, call: Any, visit: BulkVisit) -> None:
        run = visit.run
        if call.at is not None and call.at is not visit and not call.alone:
            reach("a component was replayed" if len(call.keys) > 1 else "one key was replayed")
        if len(call.keys) > 1:
            if call.alone:
                reach("an operation ran alone, across keys")
            elif visit in call.came_during:
                reach("joined while it loaded")
        call.run, call.at = run, visit
        if call not in visit.applied:
            visit.applied.append(call)
        visit.returned.discard(call.number)
        most = self.choices.max_batch_size
        for key in call.keys:
            applied = run.at_key.setdefault(key, set())
            applied.add(call.number)
            if most is not None and len(applied) > most:
                self.world.wrong(f"{len(applied)} operations at {key!r} in a bulk, but max_batch_size is {most}")
            elif len(applied) == most:
                reach("as many operations as max_batch_size")

    def _check_apply_across(self, call: Any, visit: BulkVisit, accounts: tuple[Account, ...], mark: object) -> None:
        wrong = self.world.wrong
        batch = current_batch()
        if batch.key != call.key or batch.keys != call.keys or batch.remaining() < 0.001:
            wrong(f"{call} of {call.keys} sees {batch!r} of {batch.keys}")
        if call.fate and not (call.fate == "left" and call.starts):
            wrong(f"{call} is applied, but is {call.fate!r} already")
        if call.doomed:
            wrong(f"{call} is applied, but the load of one of its keys has failed")
        if call.after_stop:
            wrong(f"{call} is applied, but came after stop()")
        if self._saved_at(call):
            wrong(f"{call} is applied again, but is saved")
        if tuple(account.key for account in accounts) != call.keys:
            wrong(f"{call} of {call.keys} is applied to {[account.key for account in accounts]}")
        self._check_accounts(call, visit, accounts, mark)
        if not call.alone and not self.choices.numbering:
            self._check_order(call, visit)
            if not call.starts:
                self._check_joined(call, visit)

    def _check_accounts(self, call: Any, visit: BulkVisit, accounts: tuple[Account, ...], mark: object) -> None:
        wrong = self.world.wrong
        if MARK.get() is not call.mark or mark is not call.mark:
            wrong(f"{call} sees another context than its caller's")
        MARK.set(visit)
        if visit.began:
            wrong(f"{call} is applied after the save has begun")
        if call.run not in {None, visit.run}:
            wrong(f"{call} is applied in a second bulk")
        if call in visit.applied and call.number not in visit.returned:
            wrong(f"{call} is applied again to what it was applied to, though it has raised")
        for account in accounts:
            expected = visit.expected(account.key, call)
            if account.visit is not visit or account.entries != expected:
                wrong(f"{call} is applied to {account.entries} at {account.key!r}, in place of {expected}")

    def _check_order(self, call: AcrossCall, visit: BulkVisit) -> None:
        for key in call.keys:
            if not call.starts:
                if call.sequence < self.newest[key]:
                    self.world.wrong(f"{call} is started at {key!r} after one that came later")
                self.newest[key] = call.sequence
            later = [one.number for one in visit.applied if key in one.keys and one.sequence > call.sequence]
            if call not in visit.applied and later:
                self.world.wrong(f"{call} is applied at {key!r} behind {later}, which came later")

    def _check_joined(self, call: AcrossCall, visit: BulkVisit) -> None:
        """Check one that came behind the load, or behind the first operation of its batch."""
        late = call.sequence > visit.run.first[current_batch()]
        if not late and call.sequence < visit.loaded_tick:
            return
        if not late and not call.several:  # a batch of one key is open while those of others are at work
            reach("joined behind the load, before the operations of its batch")
            return
        opened = min((one.came for one in visit.applied if one.keys == call.keys), default=call.came)
        window = self.choices.min_duration
        if call.several or not window or call.came >= opened + window + _ROUNDING:
            self.world.wrong(f"{call} of {call.keys} came after the load, but is applied")

    # -- what has to hold ---------------------------------------------------------------------------------

    def check_settled(self) -> None:
        """Nothing is ready to run now: all that wait have a reason to."""
        now = self.world.clock.now()
        waiting = [call for call in self.calls if call.waiting]
        most = self.choices.max_pending
        if most is not None and len(waiting) > most:
            self.world.wrong(f"{len(waiting)} are pending, but max_pending is {most}")
        if self.quiet and waiting:
            self.world.wrong(f"stop() has returned True, but {waiting[0]} was not answered")
        for call in waiting:
            self._check_call(call, now)
        self._check_stoppers(now)
        if self.quiet and not any(not one.dead for one in self.stoppers) and self.world.live_workers():
            self.world.wrong(f"stop() has returned True, but {self.world.workers} live")
        self._check_nobody_waits_for_nobody(waiting, now)
        self._check_shown(waiting)

    def _backing_off(self, now: float) -> set[str]:
        since = now - LONGEST_BACKOFF - _ROUNDING
        runs = [run for run in self.runs.values() if run.conflict_at is not None and run.conflict_at >= since]
        return {key for run in runs for key in run.keys}

    def _check_call(self, call: AcrossCall, now: float) -> None:
        late = call.start_timeout is not None and now > call.came + call.start_timeout + _ROUNDING
        if late and not call.starts and not call.alone and not self.choices.numbering:
            self.world.wrong(f"{call} was not answered, but its start_timeout has passed")
        if call.doomed:
            self.world.wrong(f"{call} was not answered, but its load has failed")
        if call.run is not None and not call.alone and now > self.deadline_of(call.run):
            self.world.wrong(f"{call} was not answered, but the deadline of its bulk has passed")

    def _check_nobody_waits_for_nobody(self, waiting: list[AcrossCall], now: float) -> None:
        busy = self._backing_off(now) | {key for visit in self.running if not visit.alone for key in visit.holds}
        busy |= {key for visit in self.applying if not visit.alone for key in visit.run.keys}
        busy |= {key for call in waiting if call.run is not None and not call.alone for key in call.run.keys}
        ended = 0.0 if self.stopping else self.choices.min_duration
        most = self.choices.max_batches
        runs = [run for run in self.runs.values() if run.keys & busy]
        before: set[str] = set()  # keys at which an older one waits
        for call in sorted(waiting, key=lambda call: call.sequence):
            if call.alone:
                runs_it = any(visit.caller is call for visit in self.running) or self.choices.opens == "by a pair"
                if not runs_it and not set(call.keys) & self._backing_off(now):
                    self.world.wrong(f"{call} waits for nobody, alone")
                continue
            crowded = most is not None and len(runs) >= most
            due = now > call.came + ended + _ROUNDING and not self.choices.numbering
            if due and not crowded and not set(call.keys) & (busy | before):
                self.world.wrong(f"{call} of {call.keys} waits for nobody")
            before |= set(call.keys)

    def _check_shown(self, waiting: list[AcrossCall]) -> None:
        """What is shown of live batches is what there is."""
        if self.choices.numbering:  # then some are not admitted yet
            return
        batched = sum(1 for call in waiting if not call.alone)
        shown = sum(one.waiting for one in self.processor.live_batches())
        counted = self.processor.stats().operations
        if not batched <= shown <= len(waiting) or not batched <= counted <= len(waiting):
            self.world.wrong(f"{len(waiting)} wait, {batched} in batches, but {shown} are shown, {counted} counted")

    def check_saved(self) -> None:
        for call in self.calls:
            if call.sequence and not call.fate:
                self.world.wrong(f"{call} was never answered")
            saved = self._saved_at(call)
            if saved and (call.fate not in {"saved", "unknown", "left"} or not call.starts):
                self.world.wrong(f"{call} is saved, but was {call.fate}")
            if call.fate == "saved" and not saved and not call.reads:
                self.world.wrong(f"{call} was answered, but is not saved")
        calls = {call.number: call for call in self.calls}
        for key, entries in self.world.kept.items():
            own = [number for number in entries if number > 0]
            if len(set(own)) != len(own):
                self.world.wrong(f"an operation is saved twice at {key!r}: {own}")
            came = [calls[number].sequence for number in own if number in calls and not calls[number].alone]
            if came != sorted(came) and not self.choices.numbering:
                self.world.wrong(f"the operations at {key!r} are saved in another order than they came")
        self._check_counts()

    def _check_counts(self) -> None:
        stats = self.processor.stats()
        if self.quiet_since < inf and (stats.keys or stats.operations or stats.batches):
            self.world.wrong(f"something is left over: {stats}")
        metrics: Any = self.metrics
        started = sum(1 for call in self.calls if call.starts)
        dropped = sum(1 for call in self.calls if call.dropped)  # they may be in no metric
        late = sum(1 for call in self.calls if call.alone and not call.starts and call.start_timeout is not None)
        counted = sum(metric.operation_count for metric in metrics._held)
        if not metrics.missed and not started - dropped <= counted <= started + late:
            self.world.wrong(f"{started} operations were started, but metrics have counted {counted}")

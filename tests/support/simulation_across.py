"""The simulation of operations across keys: a world as in `simulation`, whose store saves all of a bulk or nothing.

Each call names one key (`run`) or up to five (`run_across`). What has to hold: an operation is saved at all its keys or
at none, as its caller was told; in the order of admission on each key; no two running bulks have a key in common; each
is applied to what those before it have left, and to nothing of one that has raised; nobody waits for nobody; and
nothing is left over.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gevent
from gevent import GreenletExit

from geventbatch import (
    BatchAborted,
    BatchError,
    Conflict,
    PartlySaved,
    Processor,
    ProcessorStopped,
    Rejected,
    current_batch,
)
from tests.support import simulation as one_key
from tests.support.simulation import (
    CLEANUP,
    LONGEST_BACKOFF,
    MARK,
    SECONDS,
    WORK,
    Act,
    Call,
    Choices,
    Life,
    StoreError,
    World,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

KEYS = "Mabcdefg"

_ROUNDING = 1e-6


@dataclass(frozen=True)
class AcrossChoices(Choices):
    """How a processor is made that has operations across keys."""

    pair: bool = False  # of load_resources and save_resources
    max_bulk: int = 100


@dataclass(eq=False)
class AcrossCall(Call):
    """One `run` or `run_across` of one caller."""

    keys: tuple[str, ...] = ()


@dataclass(eq=False, slots=True, weakref_slot=True)
class Account:
    """What a load gives: a copy of what is saved, and its version."""

    of: Any  # written in C: no copy is made of it
    key: str
    entries: list[int]
    version: int

    @property
    def visit(self) -> BulkVisit:
        visit: BulkVisit = self.of()[0]
        return visit


@dataclass(eq=False, slots=True)
class BulkVisit:
    """A load of some keys, and what follows up to the save."""

    keys: list[str]
    alone: bool
    loaded: dict[str, list[int]] = field(default_factory=dict)
    returned: set[int] = field(default_factory=set)  # calls
    began: bool = False  # its save has
    over: bool = False  # it has been left


class AcrossOperation:
    """The operation of a call: it adds its identity to each of its accounts, in its own way."""

    def __init__(self, call: AcrossCall) -> None:
        self.call = call

    def __call__(self, resources: Any, mark: object) -> object:
        life: Any = self.call.life
        return life.apply_across(self.call, resources if type(resources) is tuple else (resources,), mark)


class Bank:
    """The opener; and what saves for a pair."""

    all_or_nothing = True

    def __init__(self, life: AcrossLife) -> None:
        self.life = life

    def __call__(self, keys: list[str]) -> AbstractContextManager[dict[str, Any]]:
        return self.life.scope(keys)


class Saver:
    """The ``save_resources`` of a pair."""

    all_or_nothing = True

    def __init__(self, life: AcrossLife) -> None:
        self.life = life

    def __call__(self, resources: dict[str, Account]) -> None:
        self.life.save_all(resources)


class AcrossWorld(World):
    """Virtual time, a store of many keys and a processor."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.kept: dict[str, list[int]] = {key: [] for key in KEYS}
        self.versions = dict.fromkeys(KEYS, 0)

    def make_life(self, choices: Choices) -> Life:
        assert isinstance(choices, AcrossChoices)
        return AcrossLife(self, choices)

    def write_foreign(self, key: str) -> None:
        self.kept[key].append(-1)
        self.versions[key] += 1


class AcrossLife(Life):
    """A processor with operations across keys."""

    world: AcrossWorld
    choices: AcrossChoices

    def __init__(self, world: AcrossWorld, choices: AcrossChoices) -> None:
        self.running: list[BulkVisit] = []
        self.fails: set[str] = set()  # keys that the loads do not find
        self.active_at = 0.0  # when something ran last
        self.saves_ever = 0
        super().__init__(world, choices)

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
        if choices.narrow:
            options["clean_errors"] = self.clean_errors
        if choices.copying == "none":
            options["copy_resource"] = None
        if choices.pair:
            return Processor(load_resources=self.load_all, save_resources=Saver(self), **options)
        return Processor(open_resources=Bank(self), **options)

    def forget(self) -> None:
        super().forget()
        self.running.clear()

    def is_idle(self) -> bool:
        return not any(call.waiting for call in self.calls) and not self.running

    def _note_quiet(self) -> None:
        self.quiet = True
        self.quiet_since = min(self.quiet_since, self.world.clock.now())
        if any(not visit.alone for visit in self.running) and not self.choices.pair:
            self.world.wrong(f"stop() has returned True, but a bulk of {self.running[0].keys} runs")

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
        call.sequence = self._moment("a caller")
        options: Any = {"start_timeout": call.start_timeout}
        try:
            if len(call.keys) == 1 and call.number % 2:
                value = self.processor.run(call.key, operation, call.mark, **options)
            else:
                value = self.processor.run_across(call.keys, operation, call.mark, **options)
        except BaseException as error:
            self._moment("a caller")
            self._judge(call, error)
        else:
            self._moment("a caller")
            self._returned(call, value)
        finally:
            call.timer.close()

    def _saved_at(self, call: Any) -> int:
        """The number of its keys at which it is saved: all or none of them, at any time that anybody looks."""
        at = [key for key in KEYS if call.number in self.world.kept[key]]
        if at and set(at) != set(call.keys):
            self.world.wrong(f"{call} of {call.keys} is saved at {at} only")
        return len(at)

    def _returned(self, call: Any, value: object) -> None:
        call.fate = "saved"
        if value is None or value is not call.last:
            self.world.wrong(f"{call} was answered {value!r}, but has returned {call.last!r} last")
        if not self._saved_at(call):
            self.world.wrong(f"{call} was answered, but is not saved")

    def _judge(self, call: Any, error: BaseException) -> None:
        if error is call.timer or isinstance(error, GreenletExit) or (call.alone and isinstance(error, gevent.Timeout)):
            call.fate = "left"
            return
        if error is call.raised:
            call.fate = "raised"
        elif isinstance(error, BatchError):
            call.fate = "safe" if error.retry_safe else "unknown"
            if isinstance(error, BatchAborted) and (error.keys != call.keys or error.key not in call.keys):
                self.world.wrong(f"{call} of {call.keys} was answered with {error!r} of {error.keys}")
            self._check_own(call, error)
        else:
            self.world.wrong(f"{call} was answered with {error!r}")
            call.fate = "unknown"
        if call.fate != "unknown" and self._saved_at(call):
            self.world.wrong(f"{call} was answered with {error!r}, but is saved")
        if call.after_stop and type(error) is not ProcessorStopped:
            self.world.wrong(f"{call} came after stop(), and was answered with {error!r}")

    # -- the store ----------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        resources, visit = self._load(keys)
        try:
            try:
                yield resources
            except BaseException:
                self._wait(self._plan(self.world.leaves, "", one_key.QUICK).first, "")
                raise
            self._save(visit, resources)
        finally:
            self._leave(visit)

    def load_all(self, keys: list[str]) -> dict[str, Any]:
        resources, visit = self._load(keys)
        self._leave(visit)  # nobody tells a pair that it is left
        return resources

    def save_all(self, resources: dict[str, Account]) -> None:
        visit = next(iter(resources.values())).visit
        visit.over = False
        self._enter_bulk(visit)
        try:
            self._save(visit, resources)
        finally:
            self._leave(visit)

    def _enter_bulk(self, visit: BulkVisit) -> None:
        self._moment("a bulk")
        if self.quiet and not visit.alone:
            self.world.wrong(f"a bulk of {visit.keys} after stop() has returned True")
        others = [one for one in self.running if not one.alone]
        if not visit.alone and any(set(one.keys) & set(visit.keys) for one in others):
            self.world.wrong(f"a bulk of {visit.keys} runs beside {[one.keys for one in others]}")
        most = self.choices.max_batches
        if not visit.alone and most is not None and len(others) >= most:
            self.world.wrong(f"{len(others) + 1} bulks run at once")
        if len(visit.keys) > self.choices.max_bulk:
            self.world.wrong(f"a bulk has {len(visit.keys)} keys")
        self.running.append(visit)

    def _leave(self, visit: BulkVisit) -> None:
        visit.over = True
        self.active_at = self.world.clock.now()
        if visit in self.running:
            self.running.remove(visit)

    def _wait(self, way: Any, guard: Any, *_: object) -> None:  # type: ignore[override]
        try:
            if way in SECONDS and not self.world.closing:
                gevent.sleep(SECONDS[way])
            elif way in WORK:
                self.world.spend(WORK[way])
        except BaseException as error:
            if self.world.closing or not guard:
                raise
            if guard == "swallow":
                return
            if guard == "convert":
                raise StoreError("interrupted") from error
            gevent.sleep(CLEANUP)
            raise

    def _load(self, keys: list[str]) -> tuple[dict[str, Any], BulkVisit]:
        visit = BulkVisit(list(keys), gevent.getcurrent() in self.callers)
        self._enter_bulk(visit)
        try:
            act = self._plan(self.world.loads, "", self.choices.load)
            self._wait(act.first, act.guard)
            if act.end != "some":
                self._end_act(act.end)
            missing = self.fails if act.end == "some" else set()
            resources: dict[str, Any] = {}
            for place, key in enumerate(keys):
                visit.loaded[key] = list(self.world.kept[key])
                resources[key] = Account([visit].copy, key, list(visit.loaded[key]), self.world.versions[key])
                self.world.refs.append(weakref.ref(resources[key]))
                if key in missing:
                    resources[key] = Conflict() if place % 3 == 0 else StoreError() if place % 3 == 1 else None
                    if resources[key] is None:
                        del resources[key]
        except BaseException:
            self._leave(visit)
            raise
        return resources, visit

    def _end_act(self, end: str) -> None:
        error = one_key._error(end)
        if error is not None:
            raise error

    def _save(self, visit: BulkVisit, resources: dict[str, Account]) -> None:
        visit.began = True
        act = self._plan(self.world.saves, "", self.choices.save)
        end, _, when = act.end.partition(" ")
        self._check_saves(visit, resources)
        self._wait(act.first, act.guard)
        if when != "after" and end != "partly":
            self._end_act(end)
        lost = self._lost(resources) if end == "partly" and not visit.alone else {}
        for key, account in resources.items():
            if key not in lost and account.version != self.world.versions[key]:
                raise Conflict(key)
        self._refuse_offenders(visit, resources)
        for key, account in resources.items():
            if key not in lost:
                self.world.kept[key] = list(account.entries)
                self.world.versions[key] += 1
        self.saves_ever += 1
        self._wait(act.last, act.guard)
        if when == "after":
            self._end_act(end)
        if lost:
            raise PartlySaved({min(lost): Conflict()})  # one key of a component stands for all of it

    def _lost(self, resources: dict[str, Account]) -> dict[str, Conflict]:
        """Lose one component, as a store may that saves the others."""
        bulk = current_batch().bulk
        first = bulk[next(iter(resources))]
        return {key: Conflict() for key in resources if bulk[key] is first}

    def _refuse_offenders(self, visit: BulkVisit, resources: dict[str, Account]) -> None:
        calls: dict[int, Any] = {call.number: call for call in self.calls}
        new = {one for account in resources.values() for one in account.entries if one in visit.returned}
        offending = [number for number in sorted(new) if calls[number].last_end == "offend"]
        if offending:
            error = Rejected("a constraint")
            error.__cause__ = offence = StoreError("an operation offends")
            if len(offending) == 1:
                calls[offending[0]].raised = offence
            raise error

    def _expected(self, visit: BulkVisit, key: str, before: Any = None) -> list[int]:
        calls: dict[int, Any] = {call.number: call for call in self.calls}
        returned = [calls[number] for number in visit.returned if key in calls[number].keys]
        if before is not None:
            returned = [call for call in returned if call.sequence < before.sequence]
        return visit.loaded[key] + [call.number for call in sorted(returned, key=lambda call: call.sequence)]

    def _check_saves(self, visit: BulkVisit, resources: dict[str, Account]) -> None:
        calls: dict[int, Any] = {call.number: call for call in self.calls}
        if not resources:
            self.world.wrong("a save of nothing")
        for key, account in resources.items():
            if account.visit is not visit:
                self.world.wrong(f"{key!r} is saved with an account of another load")
            if account.entries != self._expected(visit, key):
                self.world.wrong(f"{key!r} is saved as {account.entries}, in place of {self._expected(visit, key)}")
        for number in visit.returned:
            there = [key for key in calls[number].keys if key in resources]
            if there and len(there) != len(calls[number].keys):
                self.world.wrong(f"{calls[number]} of {calls[number].keys} is to be saved at {there} only")

    # -- operations ---------------------------------------------------------------------------------------

    def apply_across(self, call: Any, accounts: tuple[Account, ...], mark: object) -> object:
        self._moment("an operation")
        visit = accounts[0].visit
        self._check_apply_across(call, visit, accounts, mark)
        act = call.acts[min(call.starts, len(call.acts) - 1)]
        call.starts += 1
        call.last, call.raised, call.last_end = None, None, act.end
        visit.returned.discard(call.number)
        try:
            for place, account in enumerate(accounts):
                account.entries.append(call.number)
                if not place:
                    self._wait(act.first, act.guard)
                    if act.end == "half-way":
                        account.entries.insert(0, -2)
                        account.version -= 1
                        self._end_act(act.end)
                    if act.end == "refuse" and self.clean_errors:
                        account.entries.remove(call.number)
                    self._end_operation(call, act.end)
            self._wait(act.last, act.guard)
        except BaseException as error:
            call.raised = error
            raise
        visit.returned.add(call.number)
        call.last = object()
        return call.last

    def _check_apply_across(self, call: Any, visit: BulkVisit, accounts: tuple[Account, ...], mark: object) -> None:
        wrong = self.world.wrong
        batch = current_batch()
        if batch.key != call.key or batch.keys != call.keys or batch.remaining() < 0.001:
            wrong(f"{call} of {call.keys} sees {batch!r} of {batch.keys}")
        if call.fate and not (call.fate == "left" and call.starts):
            wrong(f"{call} is applied, but is {call.fate!r} already")
        if call.after_stop:
            wrong(f"{call} is applied, but came after stop()")
        if tuple(account.key for account in accounts) != call.keys:
            wrong(f"{call} of {call.keys} is applied to {[account.key for account in accounts]}")
        if MARK.get() is not call.mark or mark is not call.mark:
            wrong(f"{call} sees another context than its caller's")
        if visit.began:
            wrong(f"{call} is applied after the save has begun")
        for account in accounts:
            expected = self._expected(visit, account.key, call)
            if account.visit is not visit or account.entries != expected:
                wrong(f"{call} is applied to {account.entries} at {account.key!r}, in place of {expected}")

    # -- what has to hold ---------------------------------------------------------------------------------

    def check_settled(self) -> None:
        now = self.world.clock.now()
        waiting: list[Any] = [call for call in self.calls if call.waiting]
        most = self.choices.max_pending
        if most is not None and len(waiting) > most:
            self.world.wrong(f"{len(waiting)} are pending, but max_pending is {most}")
        if self.quiet and waiting:
            self.world.wrong(f"stop() has returned True, but {waiting[0]} was not answered")
        for call in waiting:
            late = call.start_timeout is not None and now > call.came + call.start_timeout + _ROUNDING
            if late and not call.starts and not call.alone:
                self.world.wrong(f"{call} was not answered, but its start_timeout has passed")
        self._check_oldest([call for call in waiting if not call.alone], now)

    def _check_oldest(self, waiting: list[Any], now: float) -> None:
        """The oldest that waits, waits for what runs."""
        if not waiting or self.choices.pair or now <= self.active_at + LONGEST_BACKOFF + _ROUNDING:
            return
        oldest = min(waiting, key=lambda call: call.sequence)
        running = {key for visit in self.running if not visit.alone for key in visit.keys}
        crowded = self.choices.max_batches is not None and running
        if now > oldest.came + self.choices.min_duration + _ROUNDING and not crowded and not running & set(oldest.keys):
            self.world.wrong(f"{oldest} of {oldest.keys} waits for nobody")

    def check_saved(self) -> None:
        for call in self.calls:
            if call.sequence and not call.fate:
                self.world.wrong(f"{call} was never answered")
            saved = self._saved_at(call)
            if saved and (call.fate not in {"saved", "unknown", "left"} or not call.starts):
                self.world.wrong(f"{call} is saved, but was {call.fate}")
            if call.fate == "saved" and not saved:
                self.world.wrong(f"{call} was answered, but is not saved")
        calls = {call.number: call for call in self.calls}
        for key, entries in self.world.kept.items():
            own = [number for number in entries if number > 0]
            if len(set(own)) != len(own):
                self.world.wrong(f"an operation is saved twice at {key!r}: {own}")
            came = [calls[number].sequence for number in own if number in calls and not calls[number].alone]
            if came != sorted(came):
                self.world.wrong(f"the operations at {key!r} are saved in another order than they came")
        stats = self.processor.stats()
        if stats.keys or stats.operations or stats.batches:
            self.world.wrong(f"something is left over: {stats}")

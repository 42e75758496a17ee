"""The store of the simulation, in its forms: it loads and saves many keys at once, all or none."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gevent
from gevent import GreenletExit

from geventbatch import Conflict, NotSaved, PartlySaved, Rejected, ResourceMissing, current_batch
from tests.support import simulation as one_key
from tests.support.simulation import CLEANUP, MARK, SECONDS, WORK, Life, StoreError
from tests.support.simulation_across.reached import reach
from tests.support.simulation_across.world import KEYS, Account, BulkVisit, Run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from tests.support.simulation_across.world import AcrossChoices, AcrossWorld

_ROUNDING = 1e-6
PAUSES = 1e-3  # for the library's turns on the hub, a microsecond each


class Bank:
    """The opener of many keys."""

    all_or_nothing = True

    def __init__(self, life: BankLife) -> None:
        self.life = life

    def __call__(self, keys: list[str]) -> AbstractContextManager[dict[str, Any]]:
        return self.life.scope(keys)


class Store:
    """The opener of one key, which has one of many keys too."""

    def __init__(self, life: BankLife) -> None:
        self.life = life

    @property
    def open_resources(self) -> Bank:
        return Bank(self.life)

    def __call__(self, key: str) -> AbstractContextManager[Account]:
        return self.life.scope_of_one(key)


class Saver:
    """The ``save_resources`` of a pair."""

    all_or_nothing = True

    def __init__(self, life: BankLife) -> None:
        self.life = life

    def __call__(self, resources: dict[str, Account]) -> None:
        self.life.save_all(resources)


class BankLife(Life):
    """What the store sees of a processor."""

    world: AcrossWorld
    choices: AcrossChoices
    calls: list[Any]  # of AcrossCall

    def __init__(self, world: AcrossWorld, choices: AcrossChoices) -> None:
        self.running: list[BulkVisit] = []
        self.applying: list[BulkVisit] = []
        self.runs: dict[Any, Run] = {}  # by batch: one that is replayed, or saved in halves, stays the same
        self.fails: set[str] = set()  # keys that the loads do not find
        self.failed: set[str] = set()  # keys whose load has failed, ever
        super().__init__(world, choices)

    def forget(self) -> None:
        super().forget()
        self.running.clear()
        self.runs.clear()

    # -- the forms ----------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, keys: list[str]) -> Iterator[dict[str, Any]]:
        resources, visit = self._load(keys)
        with self._leaving(visit, resources):
            yield resources

    @contextmanager
    def scope_of_one(self, key: str) -> Iterator[Account]:
        resources, visit = self._load([key])
        found = resources.get(key, ResourceMissing(key, key=key))
        if isinstance(found, Exception):
            self._leave(visit)
            raise found
        with self._leaving(visit, resources):
            yield found

    @contextmanager
    def _leaving(self, visit: BulkVisit, resources: dict[str, Any]) -> Iterator[None]:
        try:
            try:
                yield
            except BaseException:
                act = self._plan(self.world.leaves, "", one_key.QUICK)
                self._wait(act.first, "", visit)
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

    # -- what goes on -------------------------------------------------------------------------------------

    def _enter_bulk(self, visit: BulkVisit) -> None:
        self._moment("a bulk")
        others = [one for one in self.running if not one.alone]
        if not visit.alone:
            most = self.choices.max_batches
            if self.quiet:
                self.world.wrong(f"a bulk of {visit.keys} after stop() has returned True")
            if any(one.holds & visit.holds for one in others):
                self.world.wrong(f"a bulk of {visit.keys} runs beside {[one.keys for one in others]}")
            if most is not None and len(others) >= most:
                self.world.wrong(f"{len(others) + 1} bulks run at once")
            if most is not None and len(others) + 1 == most:
                reach("as many bulks as max_batches")
        if visit.run.interrupted:
            self.world.wrong(f"{visit.phase} of {visit.keys} after the deadline has interrupted the bulk")
        if len(visit.keys) > self.choices.max_bulk:
            self.world.wrong(f"a bulk has {len(visit.keys)} keys")
        self.running.append(visit)

    def _leave(self, visit: BulkVisit) -> None:
        visit.over = True
        if visit in self.running:
            self.running.remove(visit)

    def _wait(self, way: Any, guard: Any, visit: BulkVisit) -> None:  # type: ignore[override]
        try:
            if way in SECONDS and not self.world.closing:
                gevent.sleep(SECONDS[way])
            elif way in WORK:
                visit.run.spent += WORK[way]
                self.world.spend(WORK[way])
        except BaseException as error:
            self._note_interrupted(visit, error)
            if self.world.closing or not guard:
                raise
            if guard == "swallow":
                return
            if guard == "convert":
                raise StoreError("interrupted") from error
            gevent.sleep(CLEANUP)
            raise

    def _note_interrupted(self, visit: BulkVisit, error: BaseException) -> None:
        caller: Any = self.callers.get(gevent.getcurrent())
        run = visit.run
        if isinstance(error, GreenletExit) and caller is None and not self.world.closing:
            reach(f"a worker was killed in {visit.phase}")
        if not isinstance(error, gevent.Timeout):
            return
        if caller is not None and (error is caller.timer or (caller.start_timeout is not None and not caller.starts)):
            return
        run.interrupted = True
        if self.world.clock.now() < run.began + self.choices.max_duration - _ROUNDING:
            self.world.wrong(f"a bulk of {sorted(run.keys)} was interrupted before its deadline")

    def deadline_of(self, run: Run) -> float:
        """Return the latest moment of *run*: while other code was busy, the library may have paused it."""
        return run.began + self.choices.max_duration + self.world.spent - run.spent_before + PAUSES

    # -- load ---------------------------------------------------------------------------------------------

    def _begin(self, keys: list[str]) -> BulkVisit:
        batches: list[Any] = list(current_batch().bulk.values()) or [current_batch()]
        run = next((self.runs[batch] for batch in batches if batch in self.runs), None)
        if run is None:
            run = Run(self.world.clock.now(), self.world.spent)
        for batch in batches:
            if self.runs.setdefault(batch, run) is not run:
                self.world.wrong(f"batches of {keys} are loaded together, but began in different bulks")
        run.batches += batches
        run.rounds += 1
        run.keys.update(keys)
        caller: Any = self.callers.get(gevent.getcurrent())
        visit = BulkVisit(list(keys), run, caller)
        bulk = current_batch().bulk
        for key, batch in bulk.items():
            run.held.setdefault(batch, set()).add(key)
        visit.holds.update(keys, *[run.held[batch] for batch in bulk.values()])
        if set(current_batch().bulk) not in (set(), set(keys)):
            self.world.wrong(f"the bulk has batches of {sorted(current_batch().bulk)}, but loads {keys}")
        before: Any = MARK.get()
        if before is not None and before.run is not run:
            self.world.wrong(f"a load of {keys} sees another context")
        MARK.set(visit)
        if current_batch().remaining() < 0.001:
            self.world.wrong(f"{current_batch()!r} has no time left")
        return visit

    def _load(self, keys: list[str]) -> tuple[dict[str, Any], BulkVisit]:
        visit = self._begin(keys)
        self._enter_bulk(visit)
        if len(keys) == self.choices.max_bulk and self._waits_beside(visit):
            reach("as many keys as max_bulk, and others wait")
        try:
            act = self._plan(self.world.loads, "", self.choices.load)
            self._wait(act.first, act.guard, visit)
            if act.end != "some":
                self._end_act(act.end)
            resources = {key: self._account(visit, key) for key in keys}
            if act.end == "some":
                self._fail_some(visit, resources)
        except BaseException as error:
            self._load_raised(visit, error)
            self._leave(visit)
            raise
        visit.phase = "an operation"
        visit.loaded_tick = self.world.tick()
        return resources, visit

    def _waits_beside(self, visit: BulkVisit) -> bool:
        return any(call.waiting and not call.starts and set(call.keys) - set(visit.keys) for call in self.calls)

    def _account(self, visit: BulkVisit, key: str) -> Account:
        visit.loaded[key] = list(self.world.kept[key])
        account = Account([visit].copy, key, list(visit.loaded[key]), self.world.versions[key])
        self.world.refs.append(weakref.ref(account))
        return account

    def _fail_some(self, visit: BulkVisit, resources: dict[str, Any]) -> None:
        failed = visit.failed
        for key in visit.keys:
            kind = (KEYS.index(key) + visit.run.rounds) % 3
            if key not in self.fails:
                continue
            if kind == 0:
                resources[key] = Conflict()
                visit.run.conflict_at = self.world.clock.now()
                reach("a conflict of one key in the load")
                continue
            failed.add(key)
            if kind == 1:
                resources[key] = StoreError()
            else:
                del resources[key]
                reach("a key was missing")
        self._doom(visit, failed)

    def _load_raised(self, visit: BulkVisit, error: BaseException) -> None:
        if isinstance(error, Conflict):
            visit.run.conflict_at = self.world.clock.now()
        elif not visit.run.interrupted and not isinstance(error, GreenletExit):
            reach("a whole load failed")
            self._doom(visit, set(visit.keys))

    def _doom(self, visit: BulkVisit, failed: set[str]) -> None:  # type: ignore[override]
        """The load of *failed* has: nobody who waits for one of them now may ever be applied."""
        self.failed |= failed
        for call in self.calls:
            admitted = call.waiting and not call.alone and not self.choices.numbering
            if admitted and not visit.alone and failed & set(call.keys):
                call.doomed = True
            if call.run is visit.run and failed is visit.failed and failed & set(call.keys):
                call.dropped = True

    def _end_act(self, end: str) -> None:
        error = one_key._error(end)
        if error is not None:
            raise error

    # -- save ---------------------------------------------------------------------------------------------

    def _save(self, visit: BulkVisit, resources: dict[str, Account]) -> None:
        visit.began, visit.phase = True, "a save"
        run = visit.run
        act = self._plan(self.world.saves, "", self.choices.save)
        end, _, when = act.end.partition(" ")
        self._check_saves(visit, resources)
        run.unclear, before = True, run.unclear
        visit.unclear = True
        try:
            self._wait(act.first, act.guard, visit)
            if when != "after" and end != "partly":
                self._end_act(end)
            lost = self._lost(resources) if end == "partly" and not visit.alone else {}
            self._compare(resources, lost)
            self._refuse_offenders(visit, resources)
        except NotSaved as error:
            if not run.interrupted:  # else the outcome was fixed before
                run.unclear, visit.unclear = before, False
            if isinstance(error, Conflict):
                self._note_conflict(visit)
            raise
        self._write(resources, lost)
        self._wait(act.last, act.guard, visit)
        if when == "after":
            self._end_act(end)
        if not run.interrupted:
            run.unclear, visit.unclear = before, False
        if lost:
            self._note_conflict(visit)
            if not current_batch().bulk:
                raise Conflict
            if len(lost) < len(resources):
                reach("one component was replayed, and another saved")
            raise PartlySaved({min(lost): Conflict()})  # one key of a component stands for all of it

    def _note_conflict(self, visit: BulkVisit) -> None:
        visit.run.conflict_at = self.world.clock.now()

    def _compare(self, resources: dict[str, Account], lost: dict[str, Conflict]) -> None:
        for key, account in resources.items():
            if key not in lost and account.version != self.world.versions[key]:
                raise Conflict(key)

    def _write(self, resources: dict[str, Account], lost: dict[str, Conflict]) -> None:
        for key, account in resources.items():
            if key not in lost:
                self.world.kept[key] = list(account.entries)
                self.world.versions[key] += 1

    def _lost(self, resources: dict[str, Account]) -> dict[str, Conflict]:
        """Lose one component, as a store may that saves the others."""
        bulk = current_batch().bulk
        if not bulk:  # a store's form of one key
            return dict.fromkeys(resources, Conflict())
        first = bulk[next(iter(resources))]
        return {key: Conflict() for key in resources if bulk[key] is first}

    def _refuse_offenders(self, visit: BulkVisit, resources: dict[str, Account]) -> None:
        new = {one for account in resources.values() for one in account.entries}
        returned = [call for call in visit.applied if call.number in visit.returned and call.number in new]
        offending = [call for call in returned if call.last_end == "offend"]
        if not offending:
            return
        error = Rejected("a constraint")
        error.__cause__ = offence = StoreError("an operation offends")
        if len(offending) == 1:
            offending[0].raised = offence
        if len(returned) > 1:
            reach("a refused save was halved")
        elif visit.run.rounds > 1 and offending[0].several:
            reach("a culprit was found in a component")
        raise error

    def _check_saves(self, visit: BulkVisit, resources: dict[str, Account]) -> None:
        wrong = self.world.wrong
        if MARK.get() is not visit:
            wrong(f"a save of {visit.keys} sees another context than its load")
        if not resources:
            wrong("a save of nothing")
        for key, account in resources.items():
            if account.visit is not visit:
                wrong(f"{key!r} is saved with an account of another load")
            if account.entries != visit.expected(key):
                wrong(f"{key!r} is saved as {account.entries}, in place of {visit.expected(key)}")
        for call in visit.applied:
            there = [key for key in call.keys if key in resources]
            if there and call.number in visit.returned and not call.reads and len(there) != len(call.keys):
                wrong(f"{call} of {call.keys} is to be saved at {there} only")
        if self.world.clock.now() > self.deadline_of(visit.run) - visit.run.spent:
            wrong(f"save of {visit.keys} after its deadline")
        self._check_components(visit, resources)

    def _check_components(self, visit: BulkVisit, resources: dict[str, Account]) -> None:
        bulk = current_batch().bulk
        for key in resources if bulk else ():
            split = [other for other in visit.connected(key) if other in bulk and bulk[other] is not bulk[key]]
            if split:
                self.world.wrong(f"{key!r} and {split} are connected, but have different batches")
        self._reach_by_save(visit, len({id(batch) for batch in bulk.values()}))

    def _reach_by_save(self, visit: BulkVisit, components: int) -> None:
        across = [call for call in visit.applied if len(call.keys) > 1]
        if components > 1:
            reach("a bulk of several components")
        for call in across:
            mine = visit.connected(call.key)
            others = [one for one in visit.applied if one is not call and set(one.keys) & mine]
            if any(len(one.keys) > 1 for one in others):
                reach("a component of several operations across keys")
            if any(len(one.keys) == 1 for one in others):
                reach("operations of one key in a component")
            if call.number in visit.returned and any(one.number not in visit.returned for one in others):
                reach("an operation raised, and others of its component were saved")
            if visit.failed and any(one.doomed and set(one.keys) & set(call.keys) for one in self.calls):
                reach("the load of one key failed, and a component went on")
